"""chandler-mps@.service under a real systemd: a daemon from the first container to the last."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import bundle
from lab.containerd import RELEASES
from lab.cri import CRI, Refused, reason
from lab.engine import Engine, records
from lab.install import Installation
from lab.node import Node, uuid
from lab.nvidia import Commands
from lab.plugin import until
from lab.units import Unit, systemctl

UUID = uuid(0)
UNIT = Unit(f"chandler-mps@{UUID}.service")
BASE = f"/run/chandler/mps/{UUID}"


class Sharing:
    def __init__(self, chandler: Installation, gpus: Node, workdir: str) -> None:
        self.commands = Commands("/usr/bin")  # where the unit has them
        self.commands.forget()
        self.chandler, self.gpus, self.workdir = chandler, gpus, workdir
        self.engine = Engine([chandler.program()], workdir + "/root")
        self.configure()

    def configure(self, **more: Any) -> None:
        self.chandler.configure(
            ["/usr/sbin/runc"], [self.gpus.cdi], self.commands.toml("managed", **{"mps_patience": 30, **more})
        )

    def bundle(self, name: str, command: str = "sleep 60", **gpu: Any) -> bundle.Bundle:
        return bundle.make(
            os.path.join(self.workdir, name),
            ["sh", "-c", command],
            bundle.request(resources={"gpu": {"sharing": "mps", **gpu}}),
        )

    def mode(self) -> str:
        return str(self.commands.gpus().get(UUID, {}).get("mode", "DEFAULT"))


@pytest.fixture
def sharing(chandler: Installation, gpus: Node, workdir: str) -> Iterator[Sharing]:
    made = Sharing(chandler, gpus, workdir)
    yield made
    made.engine.clean()
    systemctl("stop", UNIT.name)
    systemctl("reset-failed")
    made.commands.forget()


def test_from_the_first_container_to_the_last(sharing: Sharing) -> None:
    engine = sharing.engine
    first, second = sharing.bundle("b1", "ls /tmp/nvidia-mps; echo word > /dev/shm/word"), sharing.bundle("b2")
    engine.create(first, "c1")
    assert UNIT.active and sharing.mode() == "EXCLUSIVE_PROCESS"
    daemon = UNIT.pid
    (seen,) = sharing.commands.started()
    assert (seen["pid"], seen["cwd"]) == (daemon, "/")
    assert {name: value for name, value in seen["env"].items() if name.startswith("CUDA")} == {
        "CUDA_VISIBLE_DEVICES": UUID,
        "CUDA_MPS_PIPE_DIRECTORY": BASE + "/pipe",
        "CUDA_MPS_LOG_DIRECTORY": BASE + "/log",
    }
    assert seen["groups"].strip().startswith("0::/system.slice/") and seen["groups"].strip().endswith(
        "/" + UNIT.name
    ), "the daemon must have its own control group"
    for name, mode in (("", 0o755), ("/pipe", 0o755), ("/log", 0o755), ("/shm", 0o1777)):
        found = os.stat(BASE + name)
        assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, mode), name
    assert os.path.samefile(f"/proc/{daemon}/root/dev/shm", BASE + "/shm") and not os.path.samefile(
        "/dev/shm", BASE + "/shm"
    )

    engine.create(second, "c2")
    engine.call("start", "c1")
    engine.wait("c1", "stopped")
    assert first.output() == "control\n"
    with open(BASE + "/shm/word", encoding="ascii") as word:
        assert word.read() == "word\n", "the container's shared memory is the daemon's"
    systemctl("daemon-reload")
    engine.delete("c1")
    assert UNIT.active and UNIT.pid == daemon, "one daemon, as long as a container shares the GPU"
    engine.delete("c2", "--force")
    assert (UNIT.state, UNIT.shown("Result")) == ("inactive", "success") and sharing.mode() == "DEFAULT"
    assert f"quit {daemon}" in sharing.commands.calls(sharing.commands.control), (
        "the daemon must be told to end, not killed"
    )


@pytest.mark.parametrize("mood", [{"start": "dies"}, {"start": "no"}], ids=lambda mood: mood["start"])
def test_a_daemon_that_does_not_start(sharing: Sharing, mood: dict[str, str]) -> None:
    """The create fails with the last line of the daemon's log, and leaves nothing."""
    sharing.configure(mps_patience=1 if mood["start"] == "no" else 30)
    sharing.commands.mood(sharing.commands.control, **mood)
    made = sharing.bundle("b1")
    before = made.bytes
    assert sharing.engine.create(made, "c1", check=False).returncode == 1
    message = records(made.log)[-1]["msg"]
    assert (
        UUID in message
        and ("MPS control daemon cannot use the device" if mood["start"] == "dies" else "Starting control daemon")
        in message
    )
    assert made.bytes == before and not UNIT.active and sharing.mode() == "DEFAULT"
    assert (
        subprocess.run(
            [sharing.chandler.program("chandler"), "leases"], capture_output=True, text=True, check=True
        ).stdout.count("\n")
        == 1
    )
    sharing.commands.mood(sharing.commands.control)
    sharing.engine.create(made, "c1")
    assert UNIT.active


def test_a_daemon_that_was_killed_is_started_again(sharing: Sharing) -> None:
    sharing.engine.create(sharing.bundle("b1"), "c1")
    before = UNIT.pid
    os.kill(before, signal.SIGKILL)
    until(lambda: not UNIT.active, "systemd's notice")
    sharing.engine.create(sharing.bundle("b2"), "c2")
    assert UNIT.active and UNIT.pid != before and sharing.mode() == "EXCLUSIVE_PROCESS"
    for _ in range(7):  # as often as short jobs start it: no start limit of systemd may stop that
        systemctl("restart", UNIT.name)


@pytest.mark.parametrize("containerd", RELEASES[-1:], indirect=True, ids=lambda release: release.label)
def test_pods(sharing: Sharing, cri: CRI) -> None:
    ask = bundle.request(resources={"gpu": {"sharing": "mps", "mps_active_thread_percentage": 25}})
    pods = [cri.run(cri.pod(name, ask, "chandler", cgroup_parent="kubepods.slice")) for name in ("one", "two")]
    daemon = UNIT.pid
    assert UNIT.active
    for container in pods:
        assert cri.env(container)["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
        assert cri.exec(container, "sh", "-c", "ls /tmp/nvidia-mps; exec 3</dev/nvidia0 && test -c /dev/nvidia0") == (
            0,
            "control\n",
            "",
        )
    with pytest.raises(Refused) as error:
        exclusive = bundle.request(resources={"gpu": {"devices": ["0"]}})
        cri.run(cri.pod("alone", exclusive, "chandler", cgroup_parent="kubepods.slice"))
    assert "holds nvidia.com/gpu=0 (mps" in reason(error)
    cri.remove(pods[0])
    assert UNIT.pid == daemon
    cri.remove(pods[1])
    assert not UNIT.active and sharing.mode() == "DEFAULT"
