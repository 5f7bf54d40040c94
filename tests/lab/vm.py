"""A machine with systemd as process 1: this host's own root file system under a kernel of its own, User-Mode Linux.

It has what a container on a build service lacks: systemd, cgroup v2 with cpu, io, memory and pids controllers, every
capability, devices of its own. It boots in seconds, needs no virtualisation and leaves nothing behind, because files
are written to memory. It has no network, and one processor.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from typing import NamedTuple

from lab.engine import read
from lab.runtimes import CACHE

KERNEL = f"{CACHE}/uml/bin/linux.uml"
MODULES = f"{CACHE}/uml/root/usr/lib/uml/modules"
SYSTEMD = "/lib/systemd/systemd"
INIT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vm-init")
# Kernel 7.2 does not start with fewer than two variables.
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/"}
MEMORY = 3072  # MiB, an upper limit: pages that are never touched cost nothing


class Ended(NamedTuple):
    """`status`: the command's exit status; None if the machine ended before it.

    `console`: output of kernel and systemd.
    """

    status: int | None
    output: str
    console: str


def missing() -> str:
    """Why no machine can run here, or ""."""
    if os.geteuid() != 0:
        return "only root can give the machine the whole root file system"
    if not os.access(KERNEL, os.X_OK):
        return "not installed: linux.uml"
    return "" if os.access(SYSTEMD, os.X_OK) else "not installed: systemd"


def run(command: str, share: str, patience: float) -> Ended:
    """Boot the machine, run a shell command as its root, and end it.

    Every path of the host is visible inside and can be written to without effect on the host. `share`, a directory of
    the host, is /share; what is written there stays. The machine is killed after `patience` seconds.
    """
    for name in ("output", "status", "console"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(share, name))
    with open(os.path.join(share, "command"), "w", encoding="utf-8") as file:
        file.write(f"#!/bin/sh\n{command}\n")
    os.chmod(os.path.join(share, "command"), 0o755)
    with tempfile.TemporaryDirectory(prefix="vm-") as own, open(os.path.join(share, "console"), "wb") as console:
        machine = subprocess.Popen(
            [
                KERNEL,
                f"mem={MEMORY}M",
                "seccomp=auto",
                "root=/dev/root",
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
                "con=null",
                "con0=null,fd:1",
                f"uml_dir={own}/",
                f"init={INIT}",
                f"LAB_SHARE={os.path.realpath(share)}",
                f"LAB_MODULES={MODULES}",
                "systemd.show_status=false",
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            cwd=own,
            env=_memory_in(own),
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
        )
        try:
            machine.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()
    status = read(os.path.join(share, "status")).strip()
    return Ended(
        int(status) if status else None, read(os.path.join(share, "output")), read(os.path.join(share, "console"))
    )


def _memory_in(directory: str) -> dict[str, str]:
    """The environment that decides where the file with the machine's memory is.

    It is in /dev/shm, User-Mode Linux' default, or in `directory` if /dev/shm is too small.
    """
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free >> 20 > MEMORY:
            return ENVIRONMENT
    return {**ENVIRONMENT, "TMPDIR": directory}
