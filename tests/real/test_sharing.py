"""GPUs shared by real containers: one daemon from the first container to the last, its mounts, and lost hooks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
from lab import bundle, node, runtimes
from lab.churn import Churn
from lab.engine import PATIENCE, Engine, records
from lab.install import Installation
from lab.nvidia import Commands

# Chandler starts no daemon from a mount namespace other than the host's, and crun needs one here.
PLAIN = [label for label in ("runc", "youki") if not runtimes.named(label).wrap]
UUID = node.uuid(0)


class Sharing:
    """Chandler over one runtime; NVIDIA's commands are fakes."""

    def __init__(self, runtime: runtimes.Runtime, gpus: node.Node, workdir: str) -> None:
        self.workdir = workdir
        self.gpus = gpus
        self.commands = Commands(os.path.join(workdir, "nv"))
        self.runtime = runtime
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.state = tempfile.mkdtemp(prefix="s-", dir="/var/lib")  # the path of a socket is short
        os.chmod(self.state, 0o755)
        os.makedirs(self.installation.etc + "/config.d", exist_ok=True)
        with open(self.installation.etc + "/config.d/state.toml", "w", encoding="ascii") as file:
            file.write(f'state-dir = "{self.state}"\n')
        self.configure("managed")
        self.engine = Engine(
            [*runtime.wrap, self.installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
        )

    def configure(self, mps: str, **more: Any) -> None:
        self.installation.configure(
            [self.runtime.path],
            [self.gpus.cdi],
            self.commands.toml(mps, mps_patience=30, **more) + '[policy]\ntrust = "all"\n',
        )
        self.installation.refresh()

    def bundle(self, name: str, command: str = "sleep 60", **gpu: Any) -> bundle.Bundle:
        return bundle.make(
            os.path.join(self.workdir, name), ["sh", "-c", command], bundle.request(resources={"gpu": gpu})
        )

    def mode(self) -> str:
        return str(self.commands.gpus().get(UUID, {}).get("mode", "DEFAULT"))

    def lose_hook(self) -> str:
        """Make poststop hooks do nothing from now on; returns the path to restore the hook from."""
        hook = self.installation.program("chandler-hook")
        os.rename(hook, hook + ".away")
        with open(hook, "w", encoding="ascii") as file:
            file.write(f'#!/bin/sh\n[ "$1" = release ] || exec {hook}.away "$@"\nexec /bin/cat >/dev/null\n')
        os.chmod(hook, 0o755)
        return hook


@pytest.fixture
def sharing(runtime: runtimes.Runtime, node: node.Node, workdir: str) -> Iterator[Sharing]:
    made = Sharing(runtime, node, workdir)
    yield made
    made.engine.clean()
    made.commands.end()
    shutil.rmtree(made.state)


@pytest.mark.parametrize("runtime", PLAIN, indirect=True)
def test_a_daemon_from_the_first_to_the_last(sharing: Sharing) -> None:
    engine = sharing.engine
    looks = sharing.bundle(
        "b1",
        "ls /tmp/nvidia-mps; echo $CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_ACTIVE_THREAD_PERCENTAGE $CUDA_VISIBLE_DEVICES",
        sharing="mps",
        mps_active_thread_percentage=40,
    )
    engine.create(looks, "c1")
    engine.create(sharing.bundle("b2", sharing="mps"), "c2")
    assert len(sharing.commands.running()) == 1 and sharing.mode() == "EXCLUSIVE_PROCESS"
    engine.call("start", "c1")
    engine.wait("c1", "stopped")
    assert looks.output().split() == ["control", "/tmp/nvidia-mps", "40", "0"]
    third = sharing.bundle("b3", devices=["0"])
    assert engine.create(third, "c3", check=False).returncode == 1
    assert "c2 holds nvidia.com/gpu=0 (mps, uid 0) since" in records(third.log)[-1]["msg"]
    assert len(sharing.commands.running()) == 1, "c1 has ended, and its lease with it; c2 runs"
    engine.delete("c1")
    engine.delete("c2", "--force")
    assert sharing.commands.running() == [] and sharing.mode() == "DEFAULT", "the poststop hook has stopped it"
    engine.create(third, "c3")


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_an_engine_that_reads_to_the_end_returns_though_the_daemon_stays(sharing: Sharing) -> None:
    sharing.lose_hook()
    started = time.monotonic()
    done = sharing.engine.run(
        sharing.bundle("b1", "echo ran", sharing="mps"), "c1"
    )  # its output is a pipe, read to its end
    assert done.stdout == "ran\n" and time.monotonic() - started < PATIENCE
    assert len(sharing.commands.running()) == 1
    (seen,) = sharing.commands.started()
    assert {seen["fds"][number] for number in ("0", "1", "2")} == {"/dev/null"} and seen["cwd"] == "/"


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_the_next_holder_repairs_a_lost_hook(sharing: Sharing) -> None:
    engine = sharing.engine
    hook = sharing.lose_hook()
    engine.create(sharing.bundle("b1", sharing="mps"), "c1")
    engine.delete("c1", "--force")
    assert len(sharing.commands.running()) == 1 and sharing.mode() == "EXCLUSIVE_PROCESS"
    os.rename(hook + ".away", hook)
    engine.create(sharing.bundle("b2", devices=["0"]), "c2")
    assert sharing.commands.running() == [] and sharing.mode() == "DEFAULT"


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_a_daemon_that_stops_answering_before_the_start_stops_the_container(sharing: Sharing) -> None:
    sharing.commands.mood(sharing.commands.control, answers=1)
    made = sharing.bundle("b1", sharing="mps")
    done = sharing.engine.create(made, "c1", check=False)
    assert done.returncode != 0 and "mps-ready" in done.stderr + str(records(made.log))
    assert sharing.commands.running() == [], "runc runs the poststop hook of a create that fails"


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
@pytest.mark.parametrize("mood", [{"start": "dies"}, {"start": "no"}])
def test_a_create_that_fails_changes_nothing(sharing: Sharing, mood: dict[str, str]) -> None:
    sharing.commands.mood(sharing.commands.control, **mood)
    made = sharing.bundle("b1", sharing="mps")
    before = made.bytes
    if mood["start"] == "no":
        sharing.installation.configure(
            [sharing.runtime.path], [sharing.gpus.cdi], sharing.commands.toml("managed", mps_patience=1)
        )
        sharing.installation.refresh()
    assert sharing.engine.create(made, "c1", check=False).returncode == 1
    assert "the MPS daemon of" in records(made.log)[-1]["msg"] and made.bytes == before
    assert sharing.commands.running() == [] and sharing.mode() == "DEFAULT"
    sharing.engine.create(sharing.bundle("b2", devices=["0"]), "c2")


@pytest.mark.parametrize("runtime", ["crun"], indirect=True)
def test_a_mount_namespace_of_the_callers_is_left_or_the_start_refused(sharing: Sharing) -> None:
    if not sharing.runtime.wrap:
        pytest.skip("crun runs in the host's mount namespace here")
    made = sharing.bundle("b1", sharing="mps")
    done = sharing.engine.create(made, "c1", check=False)
    if done.returncode == 0:
        assert len(sharing.commands.running()) == 1
        return
    assert "it would keep the mounts of whoever creates the container" in records(made.log)[-1]["msg"]
    assert sharing.mode() == "DEFAULT"


@pytest.mark.parametrize("runtime", ["runc", "crun", "youki"], indirect=True)
def test_a_daemon_of_others(sharing: Sharing) -> None:
    pipe, log = (os.path.join(sharing.workdir, name) for name in ("pipe", "log"))
    os.mkdir(pipe)
    os.mkdir(log)
    sharing.configure("external", mps_pipe_dir=pipe)
    with subprocess.Popen(
        [sharing.commands.control, "-f"],
        stdin=subprocess.DEVNULL,
        env={"CUDA_MPS_PIPE_DIRECTORY": pipe, "CUDA_MPS_LOG_DIRECTORY": log},
    ) as daemon:
        deadline = time.monotonic() + PATIENCE
        while not os.path.exists(pipe + "/control"):
            assert time.monotonic() < deadline
        done = sharing.engine.run(sharing.bundle("b1", "ls /tmp/nvidia-mps", sharing="mps", count=2), "c1")
        assert done.stdout == "control\n"
        daemon.kill()
    made = sharing.bundle("b2", sharing="mps")
    assert sharing.engine.create(made, "c2", check=False).returncode == 1
    assert "no MPS daemon answers" in records(made.log)[-1]["msg"]


@pytest.mark.parametrize("runtime", ["runc", "crun", "youki"], indirect=True)
def test_time_slices(sharing: Sharing) -> None:
    engine = sharing.engine
    engine.create(sharing.bundle("b1", sharing="time-slice", time_slice="short"), "c1")
    engine.create(sharing.bundle("b2", sharing="time-slice"), "c2")
    conflicting = sharing.bundle("b3", sharing="time-slice", time_slice="long", devices=["0"])
    assert engine.create(conflicting, "c3", check=False).returncode == 1
    assert "c1 holds nvidia.com/gpu=0 (time-slice, short) since" in records(conflicting.log)[-1]["msg"]
    engine.delete("c1", "--force")
    assert sharing.commands.gpus()[UUID]["slice"] == 1
    engine.delete("c2", "--force")
    assert sharing.commands.gpus()[UUID]["slice"] == 0
    engine.create(conflicting, "c3")
    assert sharing.commands.gpus()[UUID]["slice"] == 3


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_churn_of_all_ways_to_share(sharing: Sharing) -> None:
    """Creates and deletes in parallel, killed at any time.

    Containers on one GPU share it in one way, and at the end no lease, no daemon and no setting is left.
    """
    wishes: list[dict[str, Any]] = [
        {"sharing": "mps"},
        {"sharing": "mps", "mps_active_thread_percentage": 50},
        {"sharing": "time-slice", "time_slice": "short"},
        {"sharing": "time-slice", "time_slice": "long"},
        {"sharing": "time-slice"},
        {},
        {"count": 2},
    ]
    churn = Churn(
        sharing.engine,
        sharing.installation,
        sharing.state + "/leases",
        sharing.gpus,
        sharing.workdir,
        lambda rng: {**rng.choice(wishes), **({"devices": [str(rng.randrange(3))]} if rng.random() < 0.3 else {})},
        seed=7,
    )
    churn.spoil_hooks()
    churn.run(300)
    assert churn.wrong == []
    assert churn.created > 40 and churn.together > 3, "the kills, or other containers, came too early to prove anything"
    chandler = sharing.installation.program("chandler")
    subprocess.run([chandler, "leases", "release", "--stale"], check=True, env={}, stdout=subprocess.DEVNULL)
    with open(sharing.state + "/leases", encoding="utf-8") as file:
        assert json.load(file)["leases"] == []
    assert sharing.commands.running() == [] and not os.path.exists(sharing.state + "/shared")
    assert {(gpu["mode"], gpu["slice"]) for gpu in sharing.commands.gpus().values()} == {("DEFAULT", 0)}
