"""Device nodes that a container does not make itself: those of its image, and those that its engine bind-mounts."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import bundle
from lab.bundle import Bundle
from lab.engine import Engine
from lab.install import Installation
from lab.node import Device, Node
from lab.runtimes import Runtime

RUNTIMES = ["runc", "crun", "newer-runc", "newer-crun", "youki"]
MAPPING = [{"containerID": 0, "hostID": 200000, "size": 65536}]
DENY_ALL = {"allow": False, "access": "rwm"}
Make = Callable[..., Bundle]


@pytest.fixture
def engine(runtime: Runtime, node: Node, workdir: str) -> Iterator[Engine]:
    """Chandler over the runtime.  Container `holder` has leased GPU 7."""
    installation = Installation(workdir + "/installed")
    installation.configure([runtime.path], [node.cdi])
    installation.refresh()
    engine = Engine(
        [*runtime.wrap, installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
    )
    holder = bundle.make(workdir + "/holder", ["sleep", "60"], bundle.request(resources={"gpu": {"devices": ["7"]}}))
    engine.create(holder, "holder")
    yield engine
    engine.clean()


@pytest.fixture
def make(node: Node, workdir: str) -> Make:
    """Bundles of root's containers in a user namespace whose image has a node of GPU 7, `/image`."""

    def make(rules: list[dict[str, Any]] | None, bound: dict[str, str], command: str = "") -> Bundle:
        tries = [f"(: <{path}) 2>/dev/null && echo {path}" for path in ("/image", "/dev/nvidia0", "/dev/null", *bound)]
        made = bundle.make(
            workdir + "/b", ["sh", "-c", command or "; ".join((*tries, ":"))], bundle.request(resources={"gpu": {}})
        )
        root = made.directory + "/rootfs"
        device_node(root + "/image", node.gpus[7])
        for path in bound:
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
        subprocess.run(["chown", "-R", "200000:200000", root], check=True)
        config = made.config
        config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]
        config["mounts"] += [
            {"destination": path, "type": "bind", "source": source, "options": ["bind"]}
            for path, source in bound.items()
        ]
        config["linux"]["namespaces"].append({"type": "user"})
        config["linux"].update(uidMappings=MAPPING, gidMappings=MAPPING)
        if rules is None:
            del config["linux"]["resources"]["devices"]
        else:
            config["linux"]["resources"]["devices"] = rules
        made.config = config
        return made

    return make


def device_node(path: str, device: Device) -> None:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(device.major, device.minor))
    os.chmod(path, 0o666)


@pytest.mark.parametrize("runtime", RUNTIMES, indirect=True)
@pytest.mark.parametrize(
    "rules", [None, [], [DENY_ALL], [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]]
)
def test_a_node_of_the_image_does_not_open(engine: Engine, make: Make, rules: list[dict[str, Any]] | None) -> None:
    """podman writes no device rules for a user namespace, and crun takes that for a container that may open all."""
    assert engine.run(make(rules, {}), "c1").stdout.split() == ["/dev/nvidia0", "/dev/null"]


@pytest.mark.parametrize("runtime", ["crun", "newer-crun", "youki"], indirect=True)
def test_a_device_that_the_engine_mounts_still_opens(engine: Engine, make: Make, node: Node, workdir: str) -> None:
    """podman --device, in a user namespace, is a bind mount without a device rule."""
    fuse = workdir + "/fuse"
    os.mknod(fuse, 0o666 | stat.S_IFCHR, os.makedev(1, 11))
    os.chmod(fuse, 0o644)
    made = make([], {"/mine": fuse})
    engine.run(made, "c1")
    allowed = [rule for rule in made.config["linux"]["resources"]["devices"] if rule.get("major") == 1]
    assert allowed == [{"allow": True, "type": "c", "major": 1, "minor": 11, "access": "rwm"}]


@pytest.mark.parametrize("runtime", ["crun"], indirect=True)
def test_a_gpu_that_the_engine_mounts_is_refused(engine: Engine, make: Make, node: Node, workdir: str) -> None:
    device_node(workdir + "/gpu", node.gpus[3])
    done = engine.run(make([], {"/mine": workdir + "/gpu"}), "c1", check=False)
    assert done.returncode and "the engine mounts" in done.stderr and "nvidia.com/gpu=3" in done.stderr


@pytest.mark.parametrize("runtime", ["crun", "newer-crun"], indirect=True)
def test_an_update_opens_nothing(engine: Engine, make: Make, workdir: str) -> None:
    """crun replaces the container's rules by those of the update."""
    made = make([], {}, "sleep 60")
    engine.create(made, "c1")
    engine.call("start", "c1")
    resources = workdir + "/resources.json"
    with open(resources, "w", encoding="ascii") as file:
        file.write('{"devices": [{"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"}]}')
    engine.call("update", "--resources", resources, "c1")
    tried = engine.exec("c1", "sh", "-c", "(: </image) 2>/dev/null && echo image; (: </dev/nvidia0) && echo granted")
    assert tried.stdout.split() == ["granted"]


@pytest.mark.parametrize("runtime", ["crun", "newer-crun"], indirect=True)
@pytest.mark.parametrize("option", [["--cgroup-manager=disabled"], ["--cgroup-manager", "disabled"]])
def test_without_a_control_group_no_gpu_is_granted(engine: Engine, node: Node, workdir: str, option: list[str]) -> None:
    """No device rule is in force then: a container could make the node of any GPU."""
    made = bundle.make(workdir + "/b", ["true"], bundle.request(resources={"gpu": {}}))
    before = made.bytes
    done = engine.call(*option, "create", "--bundle", made.directory, "c1", check=False)
    assert done.returncode and "without a control group nothing keeps" in done.stderr
    assert made.bytes == before
