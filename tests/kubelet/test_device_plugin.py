"""The device plugin as a process, at a kubelet that this test plays, and containers that get what it allocates."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from lab import REPOSITORY, bundle, runtimes
from lab.engine import Engine, read
from lab.install import PYTHON, Installation
from lab.kubelet import Kubelet
from lab.node import Node, make
from lab.plugin import Plugin, until
from lab.runtimes import Runtime

from shim.paths import VERSION

RESOURCE, KEY = "chandler.oci/nvidia", "chandler.oci/allocation.nvidia.com"
NVIDIA = "nvidia.com/gpu"
pytestmark = pytest.mark.skipif(
    subprocess.run([PYTHON, "-c", "import grpc, google.protobuf"], capture_output=True, check=False).returncode != 0,
    reason="not installed: python3-grpcio, python3-protobuf",
)


def gpu(number: int) -> str:
    return f"{NVIDIA}={number}"


class Stage:
    """An installation of its own, so that no test meets another's key, leases or devices."""

    def __init__(self, workdir: str, gpus: int) -> None:
        self.workdir = workdir
        self.node: Node = make(os.path.join(workdir, "node"), gpus)
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.kubelet = Kubelet(os.path.join(workdir, "kubelet"))
        self.plugin = Plugin(self.installation.program("chandler-kubelet-plugin"), os.path.join(workdir, "log"), "")
        self.plugin.command = [self.plugin.command[0], "--directory", self.kubelet.directory]
        self._engine: Engine | None = None

    def start(self) -> Kubelet:
        self.plugin.start(serving=False)
        until(lambda: self.kubelet.health.get(RESOURCE) or self.plugin.ended(), "the first list")
        return self.kubelet

    def engine(self, runtime: Runtime) -> Engine:
        if self._engine is None:
            command = [*runtime.wrap, self.installation.program()]
            self._engine = Engine(command, os.path.join(self.workdir, "root"), hangs=runtime.kind == "youki")
        return self._engine

    def run(
        self, runtime: Runtime, name: str, annotations: dict[str, str]
    ) -> tuple[subprocess.CompletedProcess[str], bundle.Bundle]:
        """Create a container with these annotations; the call's result, and the bundle."""
        directory = os.path.join(self.workdir, name)
        made = bundle.make(directory, ["sleep", "600"], {**bundle.pod(name), **annotations})
        return self.engine(runtime).create(made, name, check=False), made

    def close(self) -> None:
        if self._engine is not None:
            self._engine.clean()
        if self.plugin.process is not None:
            self.plugin.stop(signal.SIGKILL)
        self.kubelet.stop()


@pytest.fixture
def stage(workdir: str, needs_devices: None) -> Iterator[Stage]:
    """Three GPUs and a kubelet; the plugin is not started yet."""
    made = Stage(workdir, 3)
    made.installation.configure(["runc"], [made.node.cdi])
    made.kubelet.start()
    yield made
    made.close()


def leased(stage: Stage) -> dict[str, list[str]]:
    return stage.installation.leases()


def test_a_container_gets_what_the_kubelet_allocated(stage: Stage, runtime: Runtime) -> None:
    stage.installation.configure([runtime.path], [stage.node.cdi])
    stage.installation.refresh()  # warm; the next test is cold
    kubelet = stage.start()
    kubelet.until_healthy(RESOURCE, [gpu(0), gpu(1), gpu(2)])
    annotations = kubelet.allocate(RESOURCE, gpu(2), gpu(0))
    assert list(annotations) == [KEY]
    done, made = stage.run(runtime, "one", annotations)
    assert (done.returncode, leased(stage)) == (0, {"one": [gpu(2), gpu(0)]}), done.stdout
    nodes = [device["path"] for device in made.config["linux"]["devices"]]
    assert {stage.node.gpus[0].inside, stage.node.gpus[2].inside} <= set(nodes)
    assert stage.node.gpus[1].inside not in nodes
    # The kubelet knows of these leases, so they make no device unhealthy.
    done, _ = stage.run(runtime, "two", {"chandler.oci/resources.gpu.count": "1"})
    assert done.returncode == 0 and leased(stage)["two"] == [gpu(1)]
    kubelet.until_healthy(RESOURCE, [gpu(0), gpu(2)])
    assert f"{gpu(1)} is unhealthy: two holds {gpu(1)}" in read(stage.plugin.log)
    # Leases stay the second line: what others hold is refused, whatever the kubelet says.
    done, made = stage.run(runtime, "three", kubelet.allocate(RESOURCE, gpu(1)))
    assert done.returncode and "is not free: two holds" in done.stdout and "three" not in leased(stage)
    stage.engine(runtime).delete("two", "--force")
    kubelet.until_healthy(RESOURCE, [gpu(0), gpu(1), gpu(2)])
    assert f"{gpu(1)} is healthy again" in read(stage.plugin.log)


@pytest.mark.parametrize(
    ("request_annotation", "names", "words"),
    [
        ({"count": 2}, [1, 2], ""),
        ({"count": 1}, [1, 2], "resources.gpu.count is 1, and the kubelet allocated"),
        ({"vendor": "nvidia"}, [0], ""),
        ({"vendor": "amd"}, [0], "resources.gpu.vendor is amd, and the kubelet allocated"),
        ({"devices": ["1"]}, [1], ""),
        ({"devices": ["0"]}, [1], "resources.gpu.devices names 0, and the kubelet allocated"),
        ({"prefer": "link"}, [2, 0], ""),
        ({}, [0, 1, 2], ""),
        (None, [2], ""),
    ],
)
def test_annotation_and_allocation_are_one_request(
    stage: Stage, request_annotation: dict[str, Any] | None, names: list[int], words: str
) -> None:
    kubelet = stage.start()
    runtime = runtimes.named("runc")
    asked = {"env": {"A": "b"}} if request_annotation is None else {"resources": {"gpu": request_annotation}}
    annotations = {**bundle.request(**asked), **kubelet.allocate(RESOURCE, *map(gpu, names))}
    done, made = stage.run(runtime, "one", annotations)
    assert (done.returncode != 0) == bool(words) and words in done.stdout, done.stdout
    assert leased(stage) == ({} if words else {"one": [gpu(number) for number in names]})
    if words:
        assert "annotation chandler.oci/service: resources.gpu" in done.stdout
    assert words or request_annotation is not None or "A=b" in made.config["process"]["env"]


def test_an_annotation_alone_proves_nothing(stage: Stage) -> None:
    runtime = runtimes.named("runc")
    key = os.path.join(stage.installation.keep, "allocation.key")

    def refusal(name: str, value: str) -> str:
        done, made = stage.run(runtime, name, {KEY: value})
        assert done.returncode and not leased(stage) and not os.path.exists(made.pid_file), done.stdout
        return done.stdout

    assert f"{key} is not there" in refusal("early", f"{gpu(0)} {'0' * 64}")
    kubelet = stage.start()
    right = kubelet.allocate(RESOURCE, gpu(0))[KEY]
    assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
    other = kubelet.allocate(RESOURCE, gpu(1))[KEY]
    changed = [
        "",
        gpu(0),
        f"{gpu(0)} ",
        f"{gpu(0)} {'0' * 64}",
        right.replace("=0", "=1"),
        right + "0",
        right.upper(),
        f"{gpu(1)} {right.split()[1]}",
        f"{gpu(0)},{gpu(1)} {other.split()[1]}",
        right + "\u00e9",
    ]
    for number, value in enumerate(changed):
        assert "is not the kubelet's" in refusal(f"changed-{number}", value), value
    os.chmod(key, 0o644)
    assert "can be read by others" in refusal("open", right)
    os.chmod(key, 0o600)
    os.chown(key, 4711, 4711)
    assert "4711" in refusal("foreign", right)
    os.chown(key, 0, 0)
    done, _ = stage.run(runtime, "right", {KEY: right})
    assert done.returncode == 0 and leased(stage) == {"right": [gpu(0)]}


def test_the_policy_judges_an_allocation_like_a_count(stage: Stage) -> None:
    stage.installation.configure(["runc"], [stage.node.cdi], '[policy]\ndeny = ["gpu.devices"]\nmax-gpus = 1\n')
    kubelet = stage.start()
    runtime = runtimes.named("runc")
    done, _ = stage.run(runtime, "two", kubelet.allocate(RESOURCE, gpu(0), gpu(1)))
    assert done.returncode and "max-gpus" in done.stdout and "the kubelet's allocation" in done.stdout
    done, _ = stage.run(runtime, "one", kubelet.allocate(RESOURCE, gpu(1)))
    assert done.returncode == 0 and leased(stage) == {"one": [gpu(1)]}
    stage.installation.configure(["runc"], [stage.node.cdi], '[policy]\ndeny = ["gpu.count"]\n')
    done, _ = stage.run(runtime, "none", kubelet.allocate(RESOURCE, gpu(0)))
    assert done.returncode and "gpu.count" in done.stdout


def test_kubelet_and_plugin_restart(stage: Stage) -> None:
    kubelet = stage.start()
    names = [gpu(0), gpu(1), gpu(2)]
    (first,) = kubelet.registered
    assert (first.version, first.resource_name, first.endpoint) == (
        "v1beta1",
        RESOURCE,
        "chandler-chandler.oci_nvidia.sock",
    )
    assert first.options.get_preferred_allocation_available and not first.options.pre_start_required
    kubelet.stop()
    kubelet.start()
    until(lambda: len(kubelet.registered) == 2, "another registration")
    kubelet.until_healthy(RESOURCE, names)
    before = kubelet.allocate(RESOURCE, gpu(1))
    stage.plugin.stop(signal.SIGKILL)  # leaves its socket
    stage.plugin.start(serving=False)
    until(lambda: len(kubelet.registered) == 3, "the new plugin's registration")
    kubelet.until_healthy(RESOURCE, names)
    assert kubelet.allocate(RESOURCE, gpu(1)) == before, "the kubelet keeps answers over restarts and reboots"
    assert stage.plugin.stop() == 0
    assert os.listdir(kubelet.directory) == ["kubelet.sock"]


def test_devices_come_and_go(stage: Stage) -> None:
    spec = stage.node.spec
    os.rename(spec, spec + ".later")
    stage.plugin.start(serving=False)
    kubelet = stage.kubelet
    # A node without a GPU has no resource, until one comes.
    until(lambda: os.path.exists(os.path.join(stage.installation.keep, "allocation.key")), "the start")
    assert not kubelet.registered
    os.rename(spec + ".later", spec)
    kubelet.until_healthy(RESOURCE, [gpu(0), gpu(1), gpu(2)])
    node = stage.node.gpus[1].host
    os.rename(node, node + ".gone")
    kubelet.until_healthy(RESOURCE, [gpu(0), gpu(2)])
    assert f"{gpu(1)}: {node} is not on this host" in read(stage.plugin.log)
    os.rename(node + ".gone", node)
    kubelet.until_healthy(RESOURCE, [gpu(0), gpu(1), gpu(2)])
    # Who holds what is not known, so nothing can be given.
    os.makedirs(stage.installation.state, exist_ok=True)
    ledger = os.path.join(stage.installation.state, "leases")
    with open(ledger, "w", encoding="ascii") as file:
        file.write("{")
    kubelet.until_healthy(RESOURCE, [])
    os.unlink(ledger)
    kubelet.until_healthy(RESOURCE, [gpu(0), gpu(1), gpu(2)])
    # A wrong configuration leaves the one before in force; a right one gives the resource another name.
    more = '[kubernetes]\nresources = {nvidia = "nvidia.com/gpu"}\n'
    stage.installation.configure(["runc"], [stage.node.cdi], more + "x = 1\n")
    until(lambda: "the inventory from before stays in force" in read(stage.plugin.log), "the refusal")
    stage.installation.configure(["runc"], [stage.node.cdi], more)
    kubelet.until_healthy("nvidia.com/gpu", [gpu(0), gpu(1), gpu(2)])
    os.unlink(spec)
    until(lambda: kubelet.health["nvidia.com/gpu"] == {}, "an empty list")


def test_neighbours_are_preferred(stage: Stage) -> None:
    kubelet = stage.start()
    available = [gpu(2), gpu(0), gpu(1)]
    assert kubelet.preferred(RESOURCE, available, [], 2) == [gpu(0), gpu(1)]
    assert kubelet.preferred(RESOURCE, available, [gpu(2)], 2) == [gpu(0), gpu(2)]
    assert kubelet.preferred(RESOURCE, [gpu(1)], [], 1) == [gpu(1)]
    with pytest.raises(grpc.RpcError, match="nvidia.com/gpu=9 is no device of this node"):
        kubelet.allocate(RESOURCE, gpu(9))


def test_what_a_person_can_meet(workdir: str) -> None:
    installation = Installation(os.path.join(workdir, "installed"))
    installation.configure(["runc"])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = installation.program("chandler-kubelet-plugin")
        return subprocess.run(
            [program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env={}
        )

    assert run("--version").stdout == f"chandler-kubelet-plugin {VERSION}\n"
    assert "--directory x is not an absolute path" in run("--directory", "x").stderr
    os.makedirs(installation.keep)
    with open(os.path.join(installation.keep, "allocation.key"), "w", encoding="ascii") as file:
        file.write("short")
    done = run()
    assert done.returncode == 1 and "allocation.key" in done.stderr and "Traceback" not in done.stderr
    os.unlink(os.path.join(installation.keep, "allocation.key"))
    for names, words in (
        ('{gaudi = "x.com/a", habana = "x.com/b"}', "intel.com/gaudi has several names: x.com/a, x.com/b"),
        ('{nvidia = "chandler.oci/amd"}', "chandler.oci/amd is the resource of nvidia.com/gpu and of another kind"),
    ):
        installation.configure(["runc"], more=f"[kubernetes]\nresources = {names}\n")
        done = run()
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    code = f"import sys; sys.path.insert(0, {REPOSITORY!r}); from shim.kubelet.main import main; sys.exit(main())"
    alone = [PYTHON, "-I", "-S", "-c", code]
    done = subprocess.run(alone, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "install python3-protobuf" in done.stderr
