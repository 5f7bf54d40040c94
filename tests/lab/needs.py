"""What a test may need of this machine that no package provides, and why it is not there."""

from __future__ import annotations

import functools
import os
import stat
import subprocess
import tempfile
from collections.abc import Callable

# Under CI=true root must be allowed all of this: tests/conftest.py makes a failure of a skip whose reason begins so.
NOT_ALLOWED = "not allowed here: "


def root() -> str:
    return "" if os.geteuid() == 0 else "only root can do this"


def mounts() -> str:
    return root() or _fails(
        "mount namespaces", "unshare", "-m", "--propagation", "private", "mount", "--bind", "/", "/"
    )


def chroot() -> str:
    return root() or _fails("chroot", "unshare", "-m", "chroot", "/", "/bin/true")


def devices() -> str:
    """Whether device nodes can be made, and opened where they lie."""
    if root():
        return root()
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "null")
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            os.close(os.open(path, os.O_RDONLY))
        except OSError as error:
            return f"{NOT_ALLOWED}device nodes ({error.strerror})"
    return ""


def terminals() -> str:
    try:
        for end in os.openpty():
            os.close(end)
    except OSError as error:
        return f"{NOT_ALLOWED}pseudo terminals ({error.strerror})"
    return ""


def kmsg() -> str:
    return "" if os.path.exists("/dev/kmsg") else NOT_ALLOWED + "/dev/kmsg, which stands for a GPU"


def _fails(what: str, *command: str) -> str:
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return f"{NOT_ALLOWED}{what} ({done.stderr.strip()})" if done.returncode else ""


# By the fixture of tests/conftest.py that a test asks for; each gives '' or the reason why it must be skipped.
NEEDS: dict[str, Callable[[], str]] = {
    f"needs_{probe.__name__}": functools.cache(probe) for probe in (root, mounts, chroot, devices, terminals, kmsg)
}
