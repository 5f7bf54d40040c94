"""disable-device-node-modification: stops NVIDIA's libraries in a container from making device nodes.

The libraries read /proc/driver/nvidia/params, and leave /dev alone when it has "ModifyDeviceFiles: 0".  The hook mounts
a copy with that line over the file in the container's /proc.  The copy lies in a tmpfs without a path: the hook makes,
attaches and detaches it through descriptors alone (fsopen, fsmount, move_mount, open_tree; Linux 5.2), so that nothing
in the image can interfere.
Source: NVIDIA driver README, "ModifyDeviceFiles"; fsopen(2), move_mount(2), open_tree(2).
"""

from __future__ import annotations

import ctypes
import errno
import os

from hooks.bounds import say
from hooks.container import Container, HookError
from shim.host.inroot import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PARAMS = "/proc/driver/nvidia/params"
_PROC_MAGIC = 0x9FA0
_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT, _OPEN_TREE = 430, 431, 432, 429, 428  # system calls, on every architecture
_FROM_EMPTY, _TO_EMPTY = 0x04, 0x40  # MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH: both are descriptors
_ATTRIBUTES = 0x02 | 0x04 | 0x08  # MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


def parse(arguments: list[str]) -> None:
    """Raises HookError when there are arguments: the hook takes none."""
    if arguments:
        raise HookError("takes no arguments")


def run(container: Container, _: None) -> int:
    """Covers the container's file.  Returns 1 when that fails, 0 otherwise, also when there is nothing to cover."""
    try:
        with open(PARAMS, "rb") as file:
            text = file.read(65536)
    except FileNotFoundError:
        return 0
    changed = text.replace(b"ModifyDeviceFiles: 1", b"ModifyDeviceFiles: 0")
    if changed == text:
        return 0
    try:
        cover(container.root, PARAMS, changed)
    except FileNotFoundError:
        return 0  # the container's /proc has no such file
    except OSError as error:
        say(f"disable-device-node-modification: {PARAMS} of the container could not be covered: {error.strerror}")
        return 1
    return 0


def cover(root: Root, path: str, data: bytes, procfs: bool = True) -> None:
    """Mounts a read-only file with `data` over `path`.  Raises OSError.

    `procfs`: refuse a path that is not in a procfs.
    """
    target = root.find(path, cross=True, follow=False)
    folder = root.find(path.rpartition("/")[0], cross=True, follow=False)
    try:
        if procfs and not (_is_procfs(target) and _is_procfs(folder)):
            raise OSError(errno.ENODEV, "the container's /proc is not procfs")
        tmpfs = _tmpfs(data)
        try:
            # Before Linux 6.15 only an attached mount can be cloned: attach the tmpfs to the folder for a moment.
            _call(_MOVE_MOUNT, tmpfs, b"", folder, b"", _FROM_EMPTY | _TO_EMPTY)
            try:
                copy = _call(_OPEN_TREE, tmpfs, b"params", 1 | os.O_CLOEXEC)  # OPEN_TREE_CLONE
            finally:
                if _libc.umount2(f"/proc/self/fd/{tmpfs}".encode(), 2):  # MNT_DETACH
                    _fail()
            try:
                _call(_MOVE_MOUNT, copy, b"", target, b"", _FROM_EMPTY | _TO_EMPTY)
            finally:
                os.close(copy)
        finally:
            os.close(tmpfs)
    finally:
        os.close(target)
        os.close(folder)


def _tmpfs(data: bytes) -> int:
    """A descriptor of a new, read-only tmpfs that is mounted nowhere and holds the file `params`."""
    context = _call(_FSOPEN, b"tmpfs", 1)  # FSOPEN_CLOEXEC
    try:
        for key, value in ((b"size", b"64k"), (b"mode", b"0755")):
            _call(_FSCONFIG, context, 1, key, value, 0)  # FSCONFIG_SET_STRING
        _call(_FSCONFIG, context, 6, None, None, 0)  # FSCONFIG_CMD_CREATE
        mount = _call(_FSMOUNT, context, 1, _ATTRIBUTES)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open("params", flags, 0o444, dir_fd=mount), "wb") as file:
                file.write(data)
            _call(_FSCONFIG, context, 0, b"ro", None, 0)  # FSCONFIG_SET_FLAG
            _call(_FSCONFIG, context, 7, None, None, 0)  # FSCONFIG_CMD_RECONFIGURE
        except BaseException:
            os.close(mount)
            raise
        return mount
    finally:
        os.close(context)


def _is_procfs(descriptor: int) -> bool:
    buffer = ctypes.create_string_buffer(256)  # more than struct statfs, whose first member is f_type
    if _libc.fstatfs(descriptor, buffer):
        _fail()
    return ctypes.c_long.from_buffer(buffer).value == _PROC_MAGIC


def _call(number: int, *arguments: Any) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        _fail()
    return result


def _fail() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
