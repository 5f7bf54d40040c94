"""What the other tests of this directory rely on: the machine has what lab/vm.py says, and its devices open."""

from __future__ import annotations

import fcntl
import os
import subprocess

from lab.install import Installation
from lab.node import Node


def test_systemd_is_process_one_with_version_2_groups() -> None:
    with open("/proc/1/comm", encoding="ascii") as comm:
        assert comm.read() == "systemd\n"
    with open("/sys/fs/cgroup/cgroup.controllers", encoding="ascii") as controllers:
        assert {"cpu", "io", "memory", "pids"} <= set(controllers.read().split())


def test_the_devices_open(gpus: Node) -> None:
    for device in (*gpus.gpus, *gpus.controls):
        found = os.stat(device.host).st_rdev
        assert (os.major(found), os.minor(found)) == (device.major, device.minor)
        with open(device.host, "r+b", buffering=0) as opened:
            assert opened.read(100) == b"fake GPU\n" and fcntl.ioctl(opened, 0x4600) == 42


def test_units_are_what_systemd_expects(chandler: Installation) -> None:
    units = [
        f"/usr/lib/systemd/system/{name}"
        for name in os.listdir("/usr/lib/systemd/system")
        if name.startswith("chandler-")
    ]
    assert len(units) == 7
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(name.replace("@.", "@GPU-1.") for name in units)],
        capture_output=True,
        text=True,
        check=False,
    )
    # NVIDIA's own program is what a node without a card lacks.
    assert [line for line in done.stderr.splitlines() if "nvidia-cuda-mps-control is not executable" not in line] == []
