"""Files of the state directory that others could have written, that are of an older Chandler, or out of date."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from lab import bundle, runtimes
from lab import node as gpu_node
from lab.engine import Engine, records
from lab.install import Installation
from lab.node import Node

OTHER = 54321


class Scene:
    """An installation over a real runtime, with one container that holds GPU 0."""

    def __init__(self, installation: Installation, node: Node, workdir: str, runtime: runtimes.Runtime) -> None:
        self.installation, self.workdir, self.state = installation, workdir, installation.state
        installation.forget()
        installation.configure([runtime.path], [node.cdi])
        installation.refresh()
        self.engine = Engine([*runtime.wrap, installation.program()], os.path.join(workdir, "root"))
        self.runtime = runtime.path
        self.root = bundle.rootfs(os.path.join(workdir, "image"))
        assert self.create("c0") == ""

    def create(self, name: str, **gpu: object) -> str:
        """The refusal; '' where the container was created."""
        asked = bundle.request(resources={"gpu": gpu or {"count": 1}})
        made = bundle.make(os.path.join(self.workdir, name), ["sleep", "60"], asked, root=self.root)
        before = made.bytes
        done = self.engine.create(made, name, check=False)
        if done.returncode == 0:
            return ""
        assert made.bytes == before and "Traceback" not in done.stderr and "internal error" not in done.stderr
        return str(records(made.log)[-1]["msg"])

    def admin(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.installation.program("chandler"), *words],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={},
        )

    def file(self, name: str) -> str:
        """A file of the state directory; `grants`: the record of c0."""
        if name == "grants":
            (record,) = os.listdir(f"{self.state}/grants")
            return f"{self.state}/grants/{record}"
        return f"{self.state}/{name}"


@pytest.fixture(params=["runc", "crun"])
def scene(request: pytest.FixtureRequest, installation: Installation, node: Node, workdir: str) -> Iterator[Scene]:
    runtime = runtimes.named(request.param)
    if runtime.missing:
        pytest.skip(runtime.missing)
    made = Scene(installation, node, workdir, runtime)
    yield made
    made.engine.clean()
    installation.forget()


def distrust(path: str, how: str) -> str:
    """Make a file one that others could have written; gives the reason that is to be said."""
    if how == "mode":
        os.chmod(path, 0o666)
        return f"{path} can be written by others (mode 0666)"
    os.chown(path, OTHER, OTHER)
    return f"{path} belongs to uid {OTHER}, not to root"


@pytest.mark.parametrize("how", ["mode", "owner"])
def test_a_ledger_that_others_could_have_written(scene: Scene, how: str) -> None:
    """It is forged, with a checksum that is right: c0 would hold nothing."""
    path = scene.file("leases")
    why = distrust(path, how)
    said = scene.create("c1")
    assert why in said and said.endswith("`chandler leases rebuild`")
    for words in (["leases"], ["leases", "release", "--stale"]):
        assert scene.admin(*words).returncode == 1 and why in scene.admin(*words).stderr
    assert why in scene.admin("doctor").stdout
    assert scene.admin("leases", "rebuild").returncode == 0
    assert list(scene.installation.leases()) == ["c0"] and os.stat(path).st_mode & 0o777 == 0o600
    assert scene.create("c2") == "" and list(scene.installation.leases()) == ["c0", "c2"]


@pytest.mark.parametrize("how", ["mode", "owner"])
@pytest.mark.parametrize("name", ["leases.lock", "leases.creating"])
def test_a_lock_that_others_could_hold_for_ever(scene: Scene, name: str, how: str) -> None:
    why = distrust(scene.file(name), how)
    assert why in scene.create("c1") and list(scene.installation.leases()) == ["c0"]


@pytest.mark.parametrize("how", ["mode", "owner"])
def test_a_record_that_others_could_have_written(scene: Scene, how: str) -> None:
    """The ledger is not rebuilt from it, and nothing is granted, since nothing says certainly what c0 holds."""
    path = scene.file("grants")
    distrust(path, how)
    assert "Traceback" not in scene.admin("ps").stderr
    for name in ("leases", "leases.copy"):
        os.unlink(scene.file(name))
    rebuilt = scene.admin("leases", "rebuild")
    assert rebuilt.returncode == 1 and path in rebuilt.stderr and "--force" in rebuilt.stderr
    assert "chandler leases rebuild" in scene.create("c1")


def test_an_older_ledger_is_read_as_it_is(scene: Scene) -> None:
    """Without checksum and token, before any create has written a new one."""
    with open(scene.file("leases"), encoding="utf-8") as file:
        leases = json.load(file)["leases"]
    path = scene.file("grants")
    with open(path, encoding="utf-8") as file:
        record = json.load(file)
    older = (
        "id",
        "root",
        "runtime",
        "config",
        "source",
        "devices",
        "physical",
        "before",
        "after",
        "time",
        "rules",
        "grant",
    )
    with open(path, "w", encoding="utf-8") as file:
        json.dump({key: record[key] for key in older}, file)
    with open(scene.file("leases"), "w", encoding="utf-8") as file:
        json.dump(leases, file)
    os.unlink(scene.file("leases.copy"))
    assert list(scene.installation.leases()) == ["c0"]
    assert scene.admin("ps").returncode == 0
    assert not [line for line in scene.admin("doctor").stdout.splitlines() if "damaged" in line]
    scene.engine.call("delete", "--force", "c0")
    assert scene.installation.leases() == {}, "the release hook"


def test_devices_that_changed_their_numbers(scene: Scene, workdir: str) -> None:
    """c0 holds GPU 0.  The driver was loaded again, and GPUs 0 and 1 have each other's numbers."""
    swapped = os.path.join(workdir, "node")
    shutil.rmtree(swapped, ignore_errors=True)
    node = gpu_node.make(swapped, 2)
    scene.engine.clean()
    scene.installation.configure([scene.runtime], [node.cdi])
    scene.installation.refresh()
    assert scene.create("c1", devices=["0"]) == ""
    first, second = node.gpus[0].host, node.gpus[1].host
    os.rename(first, first + ".x")
    os.rename(second, first)
    os.rename(first + ".x", second)
    assert "c1 holds" in scene.create("c2", devices=["1"]), "this is the GPU that c1 has"
    assert scene.create("c3", devices=["0"]) == ""
