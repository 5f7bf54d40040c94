"""Resolves paths inside a container's root file system as the container itself would, from a process of the host.

An ordinary open() of such a path is not safe: an image may have links to /etc, `..` and FIFOs, and whoever started the
container may have mounted a directory of the host anywhere in it (CVE-2024-0132, CVE-2025-23267).
The kernel resolves the path (openat2 with RESOLVE_IN_ROOT, Linux 5.6).  On an older kernel, or if a seccomp filter
forbids the call, each component is opened by itself, and links are followed here.
Source: openat2(2), path_resolution(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

_OPENAT2 = 437  # on every architecture
_NO_XDEV, _NO_MAGICLINKS, _IN_ROOT = 0x01, 0x02, 0x10
_FIND = os.O_PATH | os.O_CLOEXEC
_MAX_LINKS = 40
_libc = ctypes.CDLL(None, use_errno=True)


class Root:
    """A directory that is `/` for all paths that are looked up in it.

    `kernel`: whether to use openat2.
    """

    def __init__(self, path: str, kernel: bool = True) -> None:
        self.descriptor = os.open(path, _FIND | os.O_DIRECTORY)
        self.kernel = kernel

    def close(self) -> None:
        """Closes the directory."""
        os.close(self.descriptor)

    def find(self, path: str, cross: bool = False, follow: bool = True) -> int:
        """An O_PATH descriptor of what is at `path`: to open that has no effect on a FIFO or a device.

        `cross`: whether the path may cross a mount point.  A caller that writes must not allow it, since the mounted
        directory may be the host's.  `follow`: whether to follow a link at the end of the path.
        Raises OSError: EXDEV for a mount point that may not be crossed, ELOOP for too many links.
        """
        flags = _FIND if follow else _FIND | os.O_NOFOLLOW
        if self.kernel:
            resolve = _IN_ROOT | _NO_MAGICLINKS | (0 if cross else _NO_XDEV)
            how = struct.pack("QQQ", flags, 0, resolve)
            result: int = _libc.syscall(_OPENAT2, self.descriptor, os.fsencode(path), how, len(how))
            if result >= 0:
                return result
            number = ctypes.get_errno()
            if number not in (errno.ENOSYS, errno.EPERM):
                raise OSError(number, os.strerror(number), path)
        return self._walk(path, cross, follow)

    def directory(self, path: str, make: bool = False) -> int:
        """A descriptor of a directory to write in.  `make`: makes it, and its parents, if needed.  Raises OSError."""
        try:
            return _directory(self.find(path), path)
        except FileNotFoundError:
            parent, _, name = path.rstrip("/").rpartition("/")
            if not make or not name:
                raise
        above = self.directory(parent or "/", make)
        try:
            os.mkdir(name, 0o755, dir_fd=above)
        finally:
            os.close(above)
        return _directory(self.find(path), path)

    def _walk(self, path: str, cross: bool, follow: bool) -> int:
        """`find` without openat2: opens each component by itself, and never leaves the root."""
        mount = mount_id(self.descriptor)
        opened = [os.dup(self.descriptor)]  # the directories from the root to the present one, for `..`
        rest = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        links = 0
        try:
            while rest:
                part = rest.pop()
                if part == "..":
                    if len(opened) > 1:
                        os.close(opened.pop())
                    continue
                child = os.open(part, _FIND | os.O_NOFOLLOW, dir_fd=opened[-1])
                if stat.S_ISLNK(os.fstat(child).st_mode) and (rest or follow):
                    try:
                        target = os.readlink("", dir_fd=child)
                    finally:
                        os.close(child)
                    links += 1
                    if links > _MAX_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                    if target.startswith("/"):
                        while len(opened) > 1:
                            os.close(opened.pop())
                    rest += [part for part in reversed(target.split("/")) if part not in ("", ".")]
                    continue
                opened.append(child)
                if not cross and mount_id(child) != mount:
                    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
            return os.dup(opened[-1])
        finally:
            for descriptor in opened:
                os.close(descriptor)


def _directory(descriptor: int, path: str) -> int:
    """The descriptor, if it is a directory's; otherwise closes it and raises NotADirectoryError."""
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)


def mount_id(descriptor: int) -> int:
    """The id of the mount that a descriptor is on, -1 when unknown.  Source: proc_pid_fdinfo(5).

    Unlike the device number, it also differs for a bind mount of the same file system.
    """
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
        for line in file:
            if line.startswith(b"mnt_id:"):
                return int(line[7:])
    return -1


def read_regular(descriptor: int, limit: int) -> bytes:
    """The bytes of the regular file behind a descriptor from `find`.

    Raises OSError; EINVAL when it is not a regular file, or has more than `limit` bytes.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise OSError(errno.EINVAL, "is not a regular file, or too large")
    opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with open(opened, "rb") as file:
        return file.read(limit)


def replace(directory: int, name: str, data: bytes) -> None:
    """Writes a new file in a directory and renames it to `name`, so that what is at `name` is never opened.

    Raises OSError.
    """
    temporary = f".{name}.chandler"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, 0o644, dir_fd=directory)
    except FileExistsError:
        os.unlink(temporary, dir_fd=directory)
        descriptor = os.open(temporary, flags, 0o644, dir_fd=directory)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(descriptor, 0o644)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(temporary, dir_fd=directory)
        raise
