"""The function that ends a test's containers must end nothing else: it finds its victims in /proc."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from lab import bundle, cgroups


def test_a_mount_that_a_killed_runtime_left_is_no_sign_of_a_container(workdir: str) -> None:
    """Every process of the host sees such a mount."""
    left = os.path.join(workdir, "runc.left")
    Path(left).touch()
    subprocess.run(["mount", "--bind", "/bin/true", left], check=True)
    before = subprocess.Popen(
        [*cgroups.LEGACY, "sleep", "600"]
    )  # sees that mount from a mount namespace of its own, as a runtime does
    try:
        assert not cgroups.inside(workdir)
        cgroups.end(workdir)
        assert not os.path.ismount(left) and before.poll() is None
    finally:
        before.kill()
        before.wait()


def test_a_process_whose_root_lies_there_is_ended(workdir: str) -> None:
    shutil.copy(bundle.BUSYBOX, workdir)
    change = (
        f"mount --bind {workdir} {workdir} && exec chroot {workdir} /busybox sh -c 'echo in; exec /busybox sleep 600'"
    )
    process = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", change], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        assert cgroups.inside(workdir) == [process.pid]
        cgroups.end(workdir)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
