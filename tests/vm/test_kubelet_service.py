"""chandler-kubelet-plugin.service under systemd, at a kubelet that the test plays: its hardening blocks nothing that it
needs, and it always comes back."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator

import pytest
from lab import bundle
from lab.engine import Engine, read
from lab.install import Installation
from lab.kubelet import Kubelet
from lab.node import Node, spec, write
from lab.plugin import until
from lab.units import Unit, systemctl

UNIT = Unit("chandler-kubelet-plugin.service")
DIRECTORY, KEPT = "/var/lib/kubelet/device-plugins", "/var/lib/chandler"
RESOURCE = "chandler.oci/nvidia"
GPUS = ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]


@pytest.fixture
def plugin(chandler: Installation, gpus: Node) -> Iterator[Installation]:
    """Started on a node where no kubelet has run yet."""
    chandler.configure(["/usr/sbin/runc"], [gpus.cdi])
    time.sleep(2.1)  # younger sources are compiled, but not stored
    chandler.refresh()
    assert not os.path.exists(os.path.dirname(DIRECTORY))
    systemctl("start", UNIT.name)
    yield chandler
    systemctl("stop", UNIT.name)
    for directory in (os.path.dirname(DIRECTORY), KEPT):
        shutil.rmtree(directory)


@pytest.fixture
def kubelet(plugin: Installation) -> Iterator[Kubelet]:
    made = Kubelet(DIRECTORY)
    until(lambda: f"no kubelet listens at {DIRECTORY}/kubelet.sock" in UNIT.log(), "the plugin's wish")
    yield made.start()
    made.stop()


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_it_serves_a_kubelet_that_starts_later(plugin: Installation, kubelet: Kubelet, workdir: str) -> None:
    """Type=notify; after a kill -9, and after a restart of the kubelet, the devices are there again."""
    assert (UNIT.state, UNIT.shown("SubState")) == ("active", "running")
    assert (mode(DIRECTORY), mode(KEPT), mode(f"{KEPT}/allocation.key")) == (0o750, 0o755, 0o600)
    kubelet.until_healthy(RESOURCE, GPUS)

    engine = Engine([plugin.program()], workdir + "/root")
    annotations = kubelet.allocate(RESOURCE, GPUS[1])
    engine.create(bundle.make(workdir + "/b", ["sleep", "60"], annotations), "one")
    assert plugin.leases() == {"one": [GPUS[1]]}
    engine.create(bundle.make(workdir + "/c", ["sleep", "60"], bundle.request(resources={"gpu": {"count": 1}})), "two")
    kubelet.until_healthy(RESOURCE, [GPUS[1]])
    engine.clean()
    kubelet.until_healthy(RESOURCE, GPUS)

    before = UNIT.pid
    os.kill(before, signal.SIGKILL)
    until(lambda: UNIT.active and UNIT.pid not in (0, before) and len(kubelet.registered) == 2, "the restart")
    kubelet.until_healthy(RESOURCE, GPUS)
    assert kubelet.allocate(RESOURCE, GPUS[1]) == annotations
    kubelet.stop()
    kubelet.start()
    until(lambda: len(kubelet.registered) == 3, "another registration")
    kubelet.until_healthy(RESOURCE, GPUS)
    systemctl("stop", UNIT.name)
    assert UNIT.shown("Result") == "success" and os.listdir(DIRECTORY) == ["kubelet.sock"]
    systemctl("start", UNIT.name)
    assert "Traceback" not in UNIT.log()


def test_creates_use_the_inventory_that_it_compiles(plugin: Installation, kubelet: Kubelet, gpus: Node) -> None:
    """What it sees in its sandbox is what a create sees."""

    def index() -> str:
        (path,) = glob.glob(f"{plugin.state}/inventory/*/index")
        return read(path)

    def refreshed() -> bool:
        before = index()
        plugin.refresh()
        return index() == before

    assert refreshed()
    before = index()
    write(gpus.spec, spec(Node(gpus.directory, gpus.gpus[:1], gpus.controls)))
    kubelet.until_healthy(RESOURCE, GPUS[:1])
    time.sleep(2.1)
    systemctl("restart", UNIT.name)
    assert index() != before and refreshed()
    write(gpus.spec, spec(gpus))
    kubelet.until_healthy(RESOURCE, GPUS)


def test_systemd_rates_the_hardening_as_good(chandler: Installation) -> None:
    """systemd's own rating of the hardening, in tenths; 100 means none."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--threshold=25", UNIT.name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.splitlines()[-1]
