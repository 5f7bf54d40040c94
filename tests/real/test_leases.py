"""Exclusive GPUs on real runtimes: one holder each, released by the poststop hook, reclaimed where the hook is lost."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import bundle, podman, runtimes
from lab import node as gpu_node
from lab.churn import COUNT, SEED, Churn
from lab.engine import Engine, records
from lab.install import PYTHON, Installation
from lab.node import Node

ONCE = ["runc", "crun", "youki"]


class Leased:
    """Chandler over one runtime, with `allocator = "leases"`."""

    def __init__(self, runtime: runtimes.Runtime, node: Node, workdir: str) -> None:
        self.workdir = workdir
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.installation.configure([runtime.path], [node.cdi], '[gpu]\nallocator = "leases"\n')
        self.installation.refresh()
        self.engine = Engine(
            [*runtime.wrap, self.installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
        )

    def bundle(self, name: str, count: int = 1, **more: Any) -> bundle.Bundle:
        return bundle.make(
            os.path.join(self.workdir, name),
            ["sleep", "60"],
            bundle.request(resources={"gpu": {"count": count, **more}}),
        )

    def leases(self) -> dict[str, list[str]]:
        """Container to devices."""
        done = subprocess.run(
            [self.installation.program("chandler"), "leases", "--format", "json"],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
        )
        return {lease["id"]: lease["names"] for lease in json.loads(done.stdout)}


@pytest.fixture
def leased(runtime: runtimes.Runtime, node: Node, workdir: str) -> Iterator[Leased]:
    made = Leased(runtime, node, workdir)
    yield made
    made.engine.clean()


def granted(made: bundle.Bundle) -> str:
    text: str = made.config["annotations"]["chandler.oci/granted"]
    return text


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_no_two_containers_hold_one_gpu(leased: Leased, node: Node) -> None:
    kind, engine = "nvidia.com/gpu", leased.engine
    half = len(node.gpus) // 2
    first, second, third = leased.bundle("b1", half), leased.bundle("b2", len(node.gpus) - half), leased.bundle("b3")
    engine.create(first, "c1")
    engine.create(second, "c2")
    assert granted(first) == ",".join(f"{kind}={n}" for n in range(half))
    assert granted(second) == ",".join(f"{kind}={n}" for n in range(half, len(node.gpus)))
    before = third.bytes
    assert engine.create(third, "c3", check=False).returncode == 1
    message = records(third.log)[-1]["msg"]
    assert f"0 of {len(node.gpus)} are free: c1 holds {kind}=0" in message and "c2 holds" in message
    assert third.bytes == before and leased.leases().keys() == {"c1", "c2"}
    engine.delete("c1", "--force")
    assert leased.leases().keys() == {"c2"}, "the poststop hook has released it"
    engine.create(third, "c3")
    assert granted(third) == f"{kind}=0"
    named = leased.bundle("b4", 1, devices=["0"])
    assert engine.create(named, "c4", check=False).returncode == 1
    assert f"{kind}=0 is not free: c3 holds" in records(named.log)[-1]["msg"]


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_a_lease_whose_hook_was_lost_is_taken_back_when_gpus_are_short(leased: Leased, node: Node) -> None:
    engine = leased.engine
    engine.create(leased.bundle("b1", len(node.gpus)), "c1")
    hook = leased.installation.program("chandler-hook")
    os.rename(hook, hook + ".away")
    with open(hook, "w", encoding="ascii") as file:
        file.write(
            "#!/bin/sh\nexec /bin/cat >/dev/null\n"
        )  # a hook that ends before it does its work; youki needs the file to exist
    os.chmod(hook, 0o755)
    engine.delete("c1", "--force")
    os.rename(hook + ".away", hook)
    assert leased.leases().keys() == {"c1"}
    engine.create(leased.bundle("b2", len(node.gpus)), "c1")
    assert leased.leases().keys() == {"c1"}
    engine.delete("c1", "--force")
    assert leased.leases() == {}


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_a_failed_create_keeps_nothing(leased: Leased, node: Node) -> None:
    """runc runs poststop when a create fails. crun does not, so the next create that needs GPUs ends the lease."""
    engine = leased.engine
    broken = leased.bundle("b1", len(node.gpus))
    config = broken.config
    config["root"]["path"] = "/nowhere/at/all"
    broken.config = config
    assert engine.create(broken, "c1", check=False).returncode != 0
    engine.create(leased.bundle("b2", len(node.gpus)), "c2")
    assert leased.leases().keys() == {"c2"}


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_churn_with_kills(leased: Leased, node: Node) -> None:
    """Creates and deletes in parallel, with kills and late hooks: no GPU has two holders, and no lease is lost or left.

    Wrapper, runtime and hooks are killed at any time, ids are used again at once, and hooks run after the next
    container of the same id.
    """
    churn = Churn(
        leased.engine,
        leased.installation,
        leased.installation.state + "/leases",
        node,
        leased.workdir,
        lambda rng: {"count": rng.choice((1, 1, 1, 2))},
        seed=SEED,
    )
    churn.spoil_hooks()
    for _ in range(10):  # a busy machine lets the watcher look less often
        churn.run(COUNT)
        if churn.seen > 50:
            break
    assert churn.wrong == []
    print(f"{churn.created} containers of {COUNT} creates, processes seen {churn.seen} times")
    assert churn.created > 20 and churn.seen > 50, "the kills, or other containers, came too early to prove anything"
    subprocess.run(
        [leased.installation.program("chandler"), "leases", "release", "--stale"],
        check=True,
        env={},
        stdout=subprocess.DEVNULL,
    )
    assert leased.leases() == {}
    leased.engine.create(leased.bundle("last", len(node.gpus)), "last")


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_gpus_that_the_engine_gave_are_not_given_again(leased: Leased, runtime: runtimes.Runtime, node: Node) -> None:
    """A container got a GPU from docker's --device or from a device plugin.

    Chandler does not add to it, and `chandler ps` shows it beside the containers with leases.
    """

    def give(made: bundle.Bundle) -> bundle.Bundle:
        config, gpu = made.config, node.gpus[7]
        config["linux"]["devices"] = [
            {"path": gpu.inside, "type": "c", "major": gpu.major, "minor": gpu.minor, "fileMode": 0o666}
        ]
        config["linux"]["resources"]["devices"].append(
            {"allow": True, "type": "c", "major": gpu.major, "minor": gpu.minor, "access": "rwm"}
        )
        made.config = config
        return made

    both = give(leased.bundle("b0"))
    assert leased.engine.create(both, "c0", check=False).returncode == 1
    assert "config.json has a GPU already, /dev/nvidia7, from the engine" in records(both.log)[-1]["msg"]
    others = give(bundle.make(os.path.join(leased.workdir, "b1"), ["sleep", "60"]))
    leased.engine.create(others, "theirs")
    leased.engine.create(leased.bundle("b2", 2), "ours")
    leased.engine.create(bundle.make(os.path.join(leased.workdir, "b3"), ["sleep", "60"]), "without")
    for name in ("theirs", "ours", "without"):
        leased.engine.call("start", name)
    done = subprocess.run(
        [leased.installation.program("chandler"), "ps", "--format", "json"],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={},
    )
    answer = json.loads(done.stdout)
    if any("psutil" in note for note in answer["notes"]):
        pytest.skip("not installed: psutil")
    found = {row["pid"]: (row["mode"], row["devices"]) for row in answer["containers"]}
    pids = {name: leased.engine.state(name)["pid"] for name in ("theirs", "ours", "without")}
    assert found[pids["ours"]] == ("exclusive", ["nvidia.com/gpu=0", "nvidia.com/gpu=1"])
    assert found[pids["theirs"]] == ("not leased", ["nvidia.com/gpu=7"]) and pids["without"] not in found


@pytest.mark.parametrize("runtime", ONCE[:1], indirect=True)
def test_prefer_uses_the_hosts_sysfs(runtime: runtimes.Runtime, node: Node, workdir: str) -> None:
    """/sys assigns GPUs alternately to two processors.

    A count takes the first free GPUs. With `prefer` it takes GPUs of one processor, whichever are taken already.
    """
    installation = Installation(os.path.join(workdir, "installed"))
    for number, gpu in enumerate(node.gpus):
        bdf, way = f"0000:{number:02x}:00.0", f"pci0000:{number % 2}0/0000:{number % 2}0:01.0"
        os.makedirs(f"{workdir}/host/sys/bus/pci/devices/{bdf}")
        with open(f"{workdir}/host/sys/bus/pci/devices/{bdf}/numa_node", "w", encoding="ascii") as file:
            file.write(f"{number % 2}\n")
        os.makedirs(f"{workdir}/host/sys/dev/char", exist_ok=True)
        os.symlink(f"../../devices/{way}/{bdf}/gpu", f"{workdir}/host/sys/dev/char/{gpu.major}:{gpu.minor}")
    compiler = os.path.join(installation.prefix, "lib/chandler/shim/node/compiler.py")
    with open(compiler, encoding="utf-8") as file:
        text = file.read()
    assert text.count("topology.Topology(HostTree()") == 1
    with open(compiler, "w", encoding="utf-8") as file:  # the installed copy reads another directory as /sys
        file.write(text.replace("topology.Topology(HostTree()", f"topology.Topology(HostTree({workdir + '/host'!r})"))
    subprocess.run(
        [PYTHON, "-I", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash", compiler], check=True
    )
    installation.configure([runtime.path], [node.cdi])
    installation.refresh()
    engine = Engine([*runtime.wrap, installation.program()], os.path.join(workdir, "root"))
    try:
        cases: list[tuple[str, dict[str, Any], str]] = [
            ("c1", {"count": 2}, "0 1"),
            ("c2", {"count": 3, "prefer": "numa"}, "2 4 6"),
            ("c3", {"count": 2, "prefer": "link"}, "3 5"),
            ("c4", {"count": 1, "prefer": "numa"}, "7"),
        ]
        for name, asked, wanted in cases:
            made = bundle.make(os.path.join(workdir, name), ["sleep", "60"], bundle.request(resources={"gpu": asked}))
            engine.create(made, bundle.GROUPS + name)
            assert granted(made) == ",".join(f"nvidia.com/gpu={number}" for number in wanted.split())
    finally:
        engine.clean()


@pytest.mark.parametrize("release", podman.RELEASES[:1], ids=[release.label for release in podman.RELEASES[:1]])
def test_podman_with_one_gpu_refuses_a_second_container(release: podman.Release, workdir: str) -> None:
    """Only the GPU's CDI file is configured: a second container cannot have the GPU, and its error says why."""
    runtime = runtimes.named("runc")
    if release.missing or runtime.missing:
        pytest.skip(release.missing or runtime.missing)
    installation = Installation(os.path.join(workdir, "installed"))
    installation.configure([runtime.path], [gpu_node.make(os.path.join(workdir, "node"), 1).cdi])
    installation.refresh()
    machine, program = podman.Podman(release, os.path.join(workdir, "podman")), installation.program()
    ask = {"chandler.oci/resources.gpu.count": "1"}
    try:
        machine.load()
        first = machine.run(program, "--detach", annotations=ask, command=["sleep", "60"]).stdout.strip()
        refused = machine.run(program, "--rm", annotations=ask, command=["true"], check=False)
        assert refused.returncode != 0
        assert (
            f"0 of 1 are free: {first} holds nvidia.com/gpu=0 since" in refused.stderr
            and "end one of these containers" in refused.stderr
        )
        machine.cli("rm", "--force", "--time=0", first)
        for _ in range(2):
            assert machine.run(program, "--rm", annotations=ask, command=["ls", "/dev/nvidia0"]).stdout.split() == [
                "/dev/nvidia0"
            ]
    finally:
        machine.close()
