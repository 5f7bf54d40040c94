"""Attacks on the node's policy by a request, an image or an engine's own rule that once worked, on real runtimes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import bundle as bundles
from lab import node as gpu_node
from lab import runtimes
from lab.engine import Engine, records
from lab.install import Installation
from lab.node import Node
from lab.served import inventory

from shim import engine
from shim.errors import RequestError

ONCE = ["runc", "crun", "youki"]
STORAGE = (
    '[policy]\nallow = ["gpu", "env", "resources", "storage.tmpfs", "storage.bind", "command"]\nbind-sources = ["/"]\n'
)
MOUNTS = ("sh", "-c", 'while read -r _ where _; do echo "on $where"; done < /proc/mounts')


class Attacked:
    """Chandler over one runtime; `cold`: every create compiles the inventory."""

    def __init__(self, runtime: runtimes.Runtime, node: Node, workdir: str, cold: bool) -> None:
        self.workdir, self.node, self.runtime, self.cold = workdir, node, runtime, cold
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.engine = Engine(
            [*runtime.wrap, self.installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
        )
        self.count = 0
        self.policy("")

    def policy(self, text: str, cdi: str = "") -> None:
        self.installation.configure([self.runtime.path], [cdi or self.node.cdi], text)
        if not self.cold:
            self.installation.refresh()

    def bundle(
        self, args: tuple[str, ...] = ("true",), prepare: Callable[[str], None] = lambda root: None, **document: Any
    ) -> bundles.Bundle:
        self.count += 1
        made = bundles.make(os.path.join(self.workdir, f"b{self.count}"), args, bundles.request(**document))
        prepare(os.path.join(made.directory, "rootfs"))
        return made

    def refused(self, made: bundles.Bundle) -> str:
        """The one sentence of a create that changed nothing and started nothing."""
        before = made.bytes
        done = self.engine.run(made, f"c{self.count}", check=False)
        assert done.returncode == 1 and made.bytes == before, done
        (record,) = records(made.log)
        assert not os.path.exists(os.path.join(self.engine.root, f"c{self.count}")) and self.installation.leases() == {}
        sentence: str = record["msg"]
        assert "internal error" not in sentence and "Traceback" not in done.stderr
        return sentence

    def output(self, made: bundles.Bundle) -> str:
        return self.engine.run(made, f"c{self.count}").stdout


@pytest.fixture
def attacked(request: pytest.FixtureRequest, runtime: runtimes.Runtime, node: Node, workdir: str) -> Iterator[Attacked]:
    made = Attacked(runtime, node, workdir, getattr(request, "param", "cold") == "cold")
    yield made
    made.engine.clean()


# For tests that depend on the inventory. A warm one costs two seconds, until its sources are old enough.
both = pytest.mark.parametrize("attacked", ["warm", "cold"], indirect=True)


def gpu(**keys: Any) -> dict[str, Any]:
    return {"resources": {"gpu": keys}}


# --- words of the policy cover what a request means -------------------------------------------------------------


@both
@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_a_default_count_needs_the_word_gpu_count(attacked: Attacked) -> None:
    attacked.policy('[policy]\nallow = ["gpu"]\ndeny = ["gpu.count"]\n')
    for keys in ({}, {"vendor": "nvidia"}, {"count": 1}, {"prefer": "numa"}, {"sharing": "exclusive"}):
        assert "is refused by 'gpu.count' in deny of [policy]" in attacked.refused(attacked.bundle(**gpu(**keys)))
    attacked.policy('[policy]\nallow = ["gpu.vendor", "gpu.prefer", "gpu.sharing"]\n')
    for keys in ({}, {"vendor": "nvidia"}, {"prefer": "link"}):
        assert "allow of [policy] has no 'gpu.count'" in attacked.refused(attacked.bundle(**gpu(**keys)))


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"cpu_shares": 262144}, "resources.cpu_shares = 262144 gives more than the kernel's default of 1024"),
        ({"cpu_shares": 1025}, "resources.cpu_shares = 1025"),
        ({"blkio_weight": 1000}, "resources.blkio_weight = 1000 gives more than the kernel's default"),
    ],
)
def test_a_limit_gives_no_more_than_the_kernels_default(
    attacked: Attacked, resources: dict[str, Any], words: str
) -> None:
    assert words in attacked.refused(attacked.bundle(resources=resources))


# --- what is no text ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_half_a_surrogate_pair_is_refused(attacked: Attacked) -> None:
    for asked in (
        {"chandler.oci/service": '{"env": {"A": "\\ud800"}}'},
        {"chandler.oci/service": '{"env": {"\\udc00": "x"}}'},
        {"chandler.oci/env.A": "\udfff"},
        {"chandler.oci/resources.gpu.devices": "\ud800"},
    ):
        made = attacked.bundle()
        made.config = {**made.config, "annotations": asked}
        assert "is no Unicode text" in attacked.refused(made)


# --- device rules of the engine's beside a grant -----------------------------------------------------------------


def ruled(made: bundles.Bundle, *rules: dict[str, Any]) -> bundles.Bundle:
    config = made.config
    config["linux"]["resources"]["devices"] += rules
    made.config = config
    return made


@both
@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_a_rule_of_the_engine_opens_no_other_gpu(attacked: Attacked) -> None:
    other = attacked.node.gpus[-1]
    steal = ("sh", "-c", f"mknod /tmp/x c {other.major} {other.minor}; (: < /tmp/x) && echo OPENED; true")
    for rule in (
        {"type": "c", "major": other.major, "access": "rwm"},
        {"type": "c", "access": "r"},
        {"access": "rwm"},
        {"type": "a", "access": "w"},
        {"type": "c", "major": other.major, "minor": other.minor, "access": "rw"},
        {"type": "c", "minor": other.minor},
        {"type": "c", "major": -1, "minor": -1, "access": "rwm"},
        # for type a, or without a type, runtimes and the kernel ignore the numbers; crun treats an unknown type as a
        {"type": "a", "major": 5, "minor": 5, "access": "m"},
        {"major": 5, "access": "rwm"},
        {"type": "u", "major": 5, "minor": 5},
        {"type": "p", "major": 5, "minor": 5},
        {"type": "C", "major": 5, "minor": 5},
        {"type": "c", "major": other.major + (1 << 32), "minor": other.minor, "access": "rwm"},
        {"type": "c", "Major": other.major, "minor": other.minor, "access": "rwm"},
    ):
        made = ruled(
            attacked.bundle(steal, **gpu(count=1)),
            {"allow": True, **rule},
            {"allow": False, "type": "c", "major": other.major, "minor": other.minor, "access": "rwm"},
        )
        assert "opens nvidia.com/gpu=" in attacked.refused(made)
    # what every engine writes: mknod is allowed, and none of these rules opens a GPU
    usual = (
        {"allow": True, "type": "c", "access": "m"},
        {"allow": True, "type": "b", "access": "m"},
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        {"allow": True, "type": "c", "major": 136, "access": "rwm"},
        {"allow": True, "type": "c", "major": 5, "minor": 2, "access": "rwm"},
    )
    made = ruled(
        attacked.bundle(steal, **gpu(count=1)),
        {"allow": True, "access": "rwm"},
        {"allow": False, "access": "rwm"},
        *usual,
    )
    assert "OPENED" not in attacked.output(made) and "granted" in json.dumps(made.config["annotations"])


@both
@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_a_key_in_another_case_hides_nothing(attacked: Attacked) -> None:
    """Runtimes written in Go read it as the usual key."""
    for keys, hidden in (
        (["linux"], "Resources"),
        (["linux", "resources"], "device\u017f"),
        ([], "MOUNTS"),
        ([], "Linux"),
    ):
        made = attacked.bundle(**gpu(count=1))
        config = made.config
        functools.reduce(dict.__getitem__, keys, config)[hidden] = []
        made.config = config
        assert "only in case" in attacked.refused(made)


# --- links of the image under a target --------------------------------------------------------------------------


def link(path: str, to: str) -> Callable[[str], None]:
    def prepare(root: str) -> None:
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        if os.path.isdir(root + path):
            os.rmdir(root + path)
        os.symlink(to, root + path)

    return prepare


def chain(root: str) -> None:
    os.symlink("/a/b", root + "/l")
    os.mkdir(root + "/a")
    os.symlink("../../../p", root + "/a/b")
    os.symlink("proc/./sys", root + "/p")


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
@pytest.mark.parametrize(
    ("target", "prepare"),
    [
        ("/l", link("/l", "/proc")),
        ("/l", link("/l", "/proc/sys")),
        ("/l", link("/l", "proc/self/attr")),
        ("/l", link("/l", "/sys")),
        ("/l", link("/l", "/sys/fs/cgroup")),
        ("/l", link("/l", "../../proc/sys")),
        ("/l", link("/l", "/proc/self/cwd/proc")),
        ("/l/sys", link("/l", "/proc")),
        ("/usr/l/kernel", link("/usr/l", "/sys")),
        ("/l", chain),
        ("/l", link("/l", "/proc/missing/../sys")),
    ],
)
def test_a_link_leads_no_mount_into_the_kernel_s(
    attacked: Attacked, target: str, prepare: Callable[[str], None]
) -> None:
    attacked.policy(STORAGE)
    made = attacked.bundle(MOUNTS, prepare, storage=[{"type": "tmpfs", "target": target}])
    assert "the image leads " + target in attacked.refused(made)
    attacked.policy('[policy]\ntrust = "all"\n')  # which trusts callers, and no image
    assert "the image leads " + target in attacked.refused(
        attacked.bundle(MOUNTS, prepare, storage=[{"type": "bind", "source": attacked.workdir, "target": target}])
    )


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_a_link_within_the_image_is_followed_once(attacked: Attacked) -> None:
    attacked.policy(STORAGE)

    def prepare(root: str) -> None:
        os.makedirs(root + "/srv/data")
        os.symlink("/srv/data", root + "/l")

    made = attacked.bundle(MOUNTS, prepare, storage=[{"type": "tmpfs", "target": "/l/cache"}])
    assert "on /srv/data/cache" in attacked.output(made).splitlines()
    assert made.config["mounts"][-1]["destination"] == "/srv/data/cache", "the runtime meets what was judged"


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_a_target_in_a_directory_that_the_engine_mounts(attacked: Attacked) -> None:
    """Whoever can write to a volume may replace a directory by a link after Chandler's check, before the mount."""
    attacked.policy(STORAGE)
    volume = os.path.join(attacked.workdir, "volume")
    os.makedirs(volume + "/plain")
    os.symlink("/proc/sys", volume + "/link")

    def with_volume(made: bundles.Bundle) -> bundles.Bundle:
        config = made.config
        config["mounts"].append(
            {"destination": "/var/volume", "type": "bind", "source": volume, "options": ["rbind", "rw"]}
        )
        made.config = config
        return made

    for target in ("/var/volume/plain", "/v/plain", "/var/volume/new"):
        sentence = attacked.refused(
            with_volume(
                attacked.bundle(MOUNTS, link("/v", "/var/volume"), storage=[{"type": "tmpfs", "target": target}])
            )
        )
        assert f"{target} lies in /var/volume, which the engine mounts" in sentence
    attacked.policy('[policy]\ntrust = "all"\n')
    assert "is a link in a directory that the engine mounts" in attacked.refused(
        with_volume(attacked.bundle(MOUNTS, storage=[{"type": "tmpfs", "target": "/var/volume/link"}]))
    )
    assert (
        "on /var/volume/plain"
        in attacked.output(
            with_volume(attacked.bundle(MOUNTS, storage=[{"type": "tmpfs", "target": "/var/volume/plain"}]))
        ).splitlines()
    )


@both
@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_a_link_leads_no_library_of_a_cdi_file_into_the_kernel_s(attacked: Attacked) -> None:
    directory = os.path.join(attacked.workdir, "cdi")
    os.makedirs(directory)
    library = os.path.join(attacked.workdir, "libcuda.so.1")
    gpu_node.write(library, "")
    gpu_node.write(
        os.path.join(directory, "nvidia.yaml"),
        gpu_node.spec(attacked.node, mounts=[(library, "/usr/lib/driver/libcuda.so.1")]),
    )
    attacked.policy("", directory)
    for prepare in (
        link("/usr/lib", "/proc"),
        link("/usr/lib/driver", "/sys/kernel"),
        link("/usr/lib/driver/libcuda.so.1", "/proc/sysrq-trigger"),
    ):
        assert "the image leads /usr/lib/driver/libcuda.so.1 to " in attacked.refused(
            attacked.bundle(MOUNTS, prepare, **gpu(count=1))
        )
    made = attacked.bundle(MOUNTS, link("/usr/lib/driver", "/opt"), **gpu(count=1))
    assert "on /opt/libcuda.so.1" in attacked.output(made).splitlines()


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_a_link_leads_no_working_directory_into_the_kernel_s(attacked: Attacked) -> None:
    attacked.policy(STORAGE)
    made = attacked.bundle(("true",), link("/w", "/proc/self/fd"), command={"workdir": "/w/7"})
    assert "the image leads /w/7 to /proc/self/fd/7" in attacked.refused(made)


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_a_target_in_what_the_request_itself_mounts(attacked: Attacked) -> None:
    """One container makes links in a directory; another has it mounted, and a target behind such a link."""
    attacked.policy(STORAGE)
    shared = os.path.join(attacked.workdir, "shared")
    os.makedirs(shared + "/plain")
    os.symlink("/proc", shared + "/toproc")
    outer = {"type": "bind", "source": shared, "target": "/x"}
    for inner in (
        {"type": "tmpfs", "target": "/x/toproc/sys"},
        {"type": "bind", "source": attacked.workdir, "target": "/x/toproc"},
        {"type": "tmpfs", "target": "/x/plain"},
    ):
        for storage in ([outer, inner], [inner, outer]):
            assert f"{inner['target']} lies in /x, which the request mounts" in attacked.refused(
                attacked.bundle(MOUNTS, storage=storage)
            )
    attacked.policy('[policy]\ntrust = "all"\n')
    assert "/toproc is a link" in attacked.refused(
        attacked.bundle(MOUNTS, storage=[outer, {"type": "tmpfs", "target": "/x/toproc/sys"}])
    )
    assert (
        "on /x/plain"
        in attacked.output(
            attacked.bundle(MOUNTS, storage=[outer, {"type": "tmpfs", "target": "/x/plain"}])
        ).splitlines()
    )


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_a_library_below_what_the_request_mounts(attacked: Attacked) -> None:
    directory, library, shared = (os.path.join(attacked.workdir, name) for name in ("cdi", "libcuda.so.1", "shared"))
    os.makedirs(directory)
    os.makedirs(shared)
    gpu_node.write(library, "")
    gpu_node.write(
        os.path.join(directory, "nvidia.yaml"),
        gpu_node.spec(attacked.node, mounts=[(library, "/usr/lib/driver/libcuda.so.1")]),
    )
    os.symlink("/proc/sysrq-trigger", shared + "/libcuda.so.1")
    attacked.policy(STORAGE, directory)
    made = attacked.bundle(
        MOUNTS, storage=[{"type": "bind", "source": shared, "target": "/usr/lib/driver"}], **gpu(count=1)
    )
    assert "leads /usr/lib/driver/libcuda.so.1 elsewhere" in attacked.refused(made)


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_one_path_with_two_names_and_the_engine_s_kernel_mounts(attacked: Attacked) -> None:
    attacked.policy(STORAGE)
    made = attacked.bundle(
        MOUNTS, link("/l", "/srv"), storage=[{"type": "tmpfs", "target": "/l/q"}, {"type": "tmpfs", "target": "/srv/q"}]
    )
    assert "are the same path in the image, /srv/q" in attacked.refused(made)
    made = attacked.bundle(MOUNTS, storage=[{"type": "tmpfs", "target": "/kernel/sys"}])
    config = made.config
    config["mounts"].append({"destination": "/kernel", "type": "proc", "source": "proc"})
    made.config = config
    assert "/kernel/sys lies in /kernel, which is the kernel's" in attacked.refused(made)


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_an_engine_that_denies_nothing_opens_everything(attacked: Attacked) -> None:
    """crun applies only the rules in the list, and an empty list denies nothing."""
    other = attacked.node.gpus[-1]
    lists: list[dict[str, Any]] = [
        {},
        {"devices": []},
        {"devices": None},
        {"devices": [{"allow": False, "type": "b"}]},
        {"devices": [{"allow": False, "access": "m"}]},
    ]
    for resources in lists:
        made = attacked.bundle(
            ("sh", "-c", f"mknod /tmp/x c {other.major} {other.minor}; (: < /tmp/x) && echo OPENED; true"),
            **gpu(count=1),
        )
        config = made.config
        config["linux"]["resources"] = resources
        made.config = config
        assert "the lack of a device rule that denies everything opens nvidia.com/gpu=" in attacked.refused(made)


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_an_inherited_score_is_not_loosened(attacked: Attacked) -> None:
    made = attacked.bundle(resources={"oom_score_adj": 0})
    config = made.config
    config["process"].pop("oomScoreAdj", None)
    made.config = config
    argv = [
        "sh",
        "-c",
        'echo 500 > /proc/self/oom_score_adj && exec "$@"',
        "sh",
        *attacked.engine.argv("run", "--bundle", made.directory, "scored", log=made.log),
    ]
    done = subprocess.run(
        argv, check=False, env=attacked.engine.env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 1 and "resources.oom_score_adj = 0 loosens the engine's 500" in done.stderr


@both
@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_devices_that_hold_several_gpus(attacked: Attacked) -> None:
    """Another CDI file describes devices of two and more GPUs.

    A node that all of its devices share is still a GPU and not a control node.
    """
    directory = os.path.join(attacked.workdir, "cdi")
    os.makedirs(directory)
    node = attacked.node
    gpu_node.write(os.path.join(directory, "nvidia.yaml"), gpu_node.spec(node))

    def device(name: str, gpus: list[gpu_node.Device]) -> dict[str, Any]:
        return {
            "name": name,
            "containerEdits": {"deviceNodes": [{"path": each.inside, "hostPath": each.host} for each in gpus]},
        }

    more = [device("everything", node.gpus), device("pair", node.gpus[:2]), device("seven", node.gpus[:-1])]
    gpu_node.write(
        os.path.join(directory, "more.json"),
        json.dumps({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": more}),
    )
    alone = [device("x", node.gpus)]
    gpu_node.write(
        os.path.join(directory, "amd.json"),
        json.dumps({"cdiVersion": "0.5.0", "kind": "example.com/gpu", "devices": alone}),
    )
    attacked.policy("", directory)
    assert "nvidia.com/gpu=everything, which stands for every device of its kind, is not allowed" in attacked.refused(
        attacked.bundle(**gpu(devices=["everything"]))
    )
    attacked.policy(
        '[policy]\nallow = ["gpu", "gpu.all"]\nkinds = ["nvidia.com/gpu", "example.com/gpu"]\nmax-gpus = 6\n', directory
    )
    for name, count in (("everything", 8), ("seven", 7), ("example.com/gpu=x", 8)):
        assert f"asks for {count} devices; max-gpus" in attacked.refused(attacked.bundle(**gpu(devices=[name])))
    held = attacked.bundle(("sleep", "60"), **gpu(devices=["1"]))
    attacked.engine.create(held, "holder")
    done = attacked.engine.run(attacked.bundle(**gpu(devices=["pair"])), "second", check=False)
    assert done.returncode == 1 and "holds nvidia.com/gpu=1" in done.stderr


# --- mounts that bring GPUs where no control group keeps devices apart --------------------------------------------


def test_a_mount_that_brings_a_gpu_without_root(node: Node, workdir: str) -> None:
    """Every spelling of the source counts: a link, another path of the directory, another node with that number."""
    if os.geteuid() != 0:
        pytest.skip("only root makes device nodes")
    with open(node.spec, "rb") as file:
        known = inventory(file.read())
    known.config["policy.allow"] = ["gpu"]
    tree, other = os.path.dirname(node.gpus[0].host), node.gpus[3]
    os.makedirs(workdir + "/empty")
    os.makedirs(workdir + "/own")
    os.mknod(workdir + "/own/x", 0o20666, os.makedev(other.major, other.minor))
    os.symlink(tree, workdir + "/dir")
    os.symlink(other.host, workdir + "/node")

    def plan(*sources: str) -> None:
        document = {
            "process": {"user": {"uid": 0}},
            "annotations": bundles.request(**gpu(devices=["0"])),
            "mounts": [
                {"destination": f"/m{workdir}", "source": source, "options": ["rbind"]}
                for workdir, source in enumerate(sources)
            ],
        }
        engine.plan(document, known, held=[], call_facts={"rootless": True, "bundle": workdir})

    plan(workdir + "/empty", "empty", "/proc", workdir + "/nowhere")
    for source in (
        tree,
        other.host,
        workdir + "/dir",
        "dir",
        workdir + "/node",
        f"{workdir}/dir/{os.path.basename(other.host)}",
        f"/proc/self/root{tree}",
        f"/proc/self/root{os.path.dirname(tree)}",
        workdir + "/own",
        workdir + "/own/x",
    ):
        with pytest.raises(RequestError, match="which is not granted"):
            plan(source)
