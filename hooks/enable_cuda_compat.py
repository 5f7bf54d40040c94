"""enable-cuda-compat: lets programs use the CUDA library of their image when it is newer than the host's driver.

NVIDIA's images carry a forward-compatible libcuda in /usr/local/cuda/compat.  It works only with a driver whose major
version is older than its own.  Arguments: `--host-driver-version VERSION`.
Source: CUDA Compatibility guide, "Forward Compatibility".
"""

from __future__ import annotations

from hooks import update_ldcache
from hooks.container import Container, HookError

FOLDER = "/usr/local/cuda/compat"
DROP_IN = "00-chandler-compat.conf"  # ldconfig reads it before the drop-in of update-ldcache, since it sorts first
_LIBRARY = "libcuda.so."


def parse(arguments: list[str]) -> int:
    """The major version of the host's driver.  Raises HookError."""
    if len(arguments) == 1 and "=" in arguments[0]:  # NVIDIA's hook also takes --host-driver-version=VERSION
        arguments = arguments[0].split("=", 1)
    if len(arguments) != 2 or arguments[0] != "--host-driver-version" or _major(arguments[1]) < 0:
        raise HookError("the arguments are `--host-driver-version VERSION`")
    return _major(arguments[1])


def run(container: Container, host: int) -> int:
    """Puts the image's libraries before the host's if their major version is newer.  Always returns 0."""
    versions = [
        _major(name[len(_LIBRARY) :])
        for name in update_ldcache.names(container.root, FOLDER)
        if name.startswith(_LIBRARY)
    ]
    if max(versions, default=-1) > host:
        return update_ldcache.add(container.root, [FOLDER], DROP_IN, own=True)
    return 0


def _major(version: str) -> int:
    """The major version: 550 for 550.54.15; -1 for anything else, such as the 1 of libcuda.so.1."""
    major, dot, _ = version.partition(".")
    return int(major) if dot and major.isascii() and major.isdigit() and len(major) < 6 else -1
