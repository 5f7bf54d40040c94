"""chandler-nri.service under systemd: its hardening blocks nothing that it needs, and it always comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import bundle
from lab.containerd import RELEASES, Containerd
from lab.cri import CRI, Refused, lines
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node, uuid
from lab.nvidia import Commands
from lab.plugin import until
from lab.units import Unit, systemctl

from shim.state.leases import is_of_sandbox

UNIT = Unit("chandler-nri.service")
SLICE = "kubepods.slice"
ONE = bundle.request(resources={"gpu": {"count": 1}})


# What does not depend on the release takes one.
latest = pytest.mark.parametrize("containerd", RELEASES[-1:], indirect=True, ids=lambda release: release.label)


class Service:
    def __init__(self, chandler: Installation, gpus: Node) -> None:
        self.chandler, self.gpus = chandler, gpus

    def configure(self, more: str = "") -> None:
        self.chandler.configure(["/usr/sbin/runc"], [self.gpus.cdi], '[gpu]\nallocator = "leases"\n' + more)

    def leases(self) -> dict[str, str]:
        """Container to owner, from the ledger file itself, because it is read often here."""
        with open(os.path.join(self.chandler.state, "leases"), encoding="utf-8") as ledger:
            held = json.load(ledger)["leases"]
        return {lease["id"]: lease["owner"] for lease in held if not is_of_sandbox(lease)}


@pytest.fixture
def service(chandler: Installation, gpus: Node, containerd: Containerd, cri: CRI) -> Iterator[Service]:
    """Started before a test's pods, stopped after them."""
    made = Service(chandler, gpus)
    made.configure()
    systemctl("start", UNIT.name)
    yield made
    for pod in list(cri.pods):
        cri.end(pod)
    systemctl("stop", UNIT.name)


def opened(cri: CRI, container: str) -> list[int]:
    return [
        int(n)
        for n in cri.exec(container, "sh", "-c", "for n in 0 1; do (exec 3</dev/nvidia$n) && echo $n; done").out.split()
    ]


def serves(cri: CRI, name: str) -> str:
    """A pod's container, with the device that it requested."""
    container = cri.run(cri.pod(name, ONE, cgroup_parent=SLICE))
    assert len(opened(cri, container)) == 1
    return container


def refused(cri: CRI, pod: Any) -> str:
    """The reason of a refusal; "" if the create is not refused."""
    try:
        cri.remove(cri.create(pod))
    except Refused as error:
        return str(error.details())
    return ""


def attempt(cri: CRI, pod: Any) -> str:
    try:
        return cri.create(pod)
    except Refused:
        return ""


def test_a_start_is_over_when_it_serves(service: Service, cri: CRI) -> None:
    """Type=notify; a reload keeps the connection; after a kill -9 callers notice only a pause."""
    assert (UNIT.state, UNIT.shown("SubState")) == ("active", "running")
    assert UNIT.shown("StatusText").startswith("serving containerd"), "notified after the runtime had it"
    first = serves(cri, "first")
    assert service.leases() == {first: "nri"}
    assert any(line.get("container") == first for line in lines(UNIT.log()))

    service.configure('[policy]\ndeny = ["env"]\n')
    before, connections = UNIT.pid, UNIT.sockets()
    systemctl("reload", UNIT.name)
    denied = cri.pod("denied", bundle.request(env={"A": "b"}), cgroup_parent=SLICE)
    until(lambda: "deny of [policy]" in refused(cri, denied), "the new rule")
    until(lambda: UNIT.active, "the end of the reload")
    assert UNIT.pid == before and UNIT.sockets() >= connections, "the connection to the runtime must stay open"

    os.kill(before, signal.SIGKILL)
    until(lambda: UNIT.active and UNIT.pid not in (0, before), "the restart")
    second = serves(cri, "second")
    assert service.leases() == {first: "nri", second: "nri"} and opened(cri, first) == [0]
    cri.remove(second)
    until(lambda: service.leases() == {first: "nri"}, "the lease's end")


@latest
def test_it_comes_back_to_a_runtime_that_restarts(service: Service, cri: CRI, containerd: Containerd) -> None:
    first, before = serves(cri, "first"), UNIT.pid
    containerd.stop()
    until(lambda: UNIT.shown("StatusText") == "waiting for the runtime", "its notice")
    containerd.start()
    until(lambda: UNIT.shown("StatusText").startswith("serving"), "its return")
    assert UNIT.pid == before and cri.ready() and service.leases() == {first: "nri"}
    assert opened(cri, serves(cri, "second")) == [1]


@latest
def test_a_stale_lease_of_the_wrapper_is_taken_back(service: Service, cri: CRI, workdir: str) -> None:
    """The wrapper's lease of a container that has ended and whose hook never ran.

    The plugin asks the runtime from inside its sandbox.
    """
    engine = Engine([service.chandler.program()], workdir + "/root")
    both = bundle.request(resources={"gpu": {"count": 2}})
    engine.create(bundle.make(workdir + "/b", ["true"], both), "ended")
    engine.call("start", "ended")
    engine.wait("ended", "stopped")
    assert service.leases() == {"ended": "oci"}
    pod = cri.pod("after", both, cgroup_parent=SLICE)
    container = cri.start(until(lambda: attempt(cri, pod), "the lease, with the kubelet's retries"))
    assert opened(cri, container) == [0, 1] and service.leases() == {container: "nri"}
    engine.delete("ended")
    assert service.leases() == {container: "nri"}


@latest
def test_a_daemon_for_a_shared_gpu(service: Service, cri: CRI) -> None:
    """nvidia-smi and systemctl work from inside the sandbox; the daemon's unit is outside."""
    Commands("/usr/bin").forget()  # where the unit has its daemon
    commands = Commands("/run/chandler/nv")  # this one notes what it is told, so it must be where the plugin may write
    service.chandler.configure(["/usr/sbin/runc"], [service.gpus.cdi], commands.toml("managed", mps_patience=30))
    systemctl("reload", UNIT.name)
    daemon = Unit(f"chandler-mps@{uuid(0)}.service")
    pod = cri.pod("shared", bundle.request(resources={"gpu": {"sharing": "mps"}}), cgroup_parent=SLICE)
    container = cri.start(until(lambda: attempt(cri, pod), "the daemon, with the kubelet's retries"))
    assert daemon.active
    assert commands.gpus()[uuid(0)]["mode"] == "EXCLUSIVE_PROCESS"
    assert cri.exec(container, "ls", "/tmp/nvidia-mps").out == "control\n" and opened(cri, container) == [0]
    os.kill(UNIT.pid, signal.SIGKILL)
    until(lambda: UNIT.shown("StatusText").startswith("serving") and UNIT.pid, "the restart")
    assert daemon.active, "the daemon must outlive the plugin"
    cri.remove(container)
    until(lambda: not daemon.active, "the daemon's end")
    until(lambda: commands.gpus()[uuid(0)]["mode"] == "DEFAULT", "the mode that was before")


def test_systemd_rates_the_hardening_as_good(chandler: Installation) -> None:
    """systemd's own rating of the hardening, in tenths; 100 means none."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--threshold=30", UNIT.name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1]
