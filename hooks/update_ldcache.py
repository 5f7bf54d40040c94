"""update-ldcache: adds the libraries that were mounted into a container to its loader cache.

Arguments: `--folder PATH`, once for each folder.

NVIDIA's hook runs the host's ldconfig in the container's root.  This hook runs no program: it reads the image's
ld.so.cache, adds the libraries that are mounted in the folders, and replaces the cache.  ldconfig would be unsafe
there: it reads the image's ld.so.conf (a FIFO there blocks it for ever), parses every library of the image as root
outside of the container, and writes links into whatever is mounted in the image's library folders.  Also the host may
have no ldconfig, or one that writes another format.

This hook reads everything as bytes and within limits.  It writes only two files, each by a rename in a directory of the
image itself: the cache, and a drop-in for a later ldconfig.  An image without a cache (musl, or a single program) is
left alone.  Memory: the bytes of the cache, twice while the new one is built, and the names of libraries in one folder.
"""

from __future__ import annotations

import errno
import os
import stat

from hooks.bounds import say
from hooks.container import Container, HookError
from shim.generate import ldcache
from shim.host.inroot import Root, read_regular, replace

CACHE, DROP_INS = "ld.so.cache", "/etc/ld.so.conf.d"
DROP_IN = "00-chandler.conf"
MAX_CACHE = 8 << 20  # bytes; the cache of a desktop with 5,000 libraries has half a megabyte
MAX_NAMES = 1 << 16  # entries of one folder that are read
MAX_LIBRARIES = 1 << 12  # libraries in one folder; a driver has about a hundred
MAX_FOLDERS = 1 << 8
MAX_FOLDER = 1024  # characters of a folder's path


def parse(arguments: list[str]) -> list[str]:
    """The folders.  Raises HookError."""
    if len(arguments) % 2 or set(arguments[::2]) - {"--folder"} or len(arguments) > 2 * MAX_FOLDERS:
        raise HookError(f"the arguments are `--folder PATH`, at most {MAX_FOLDERS} times")
    for folder in arguments[1::2]:
        if not folder.startswith("/") or "\n" in folder or len(folder) > MAX_FOLDER:
            raise HookError(f"{folder[:MAX_FOLDER]!r} is not an absolute path of at most {MAX_FOLDER} characters")
    return arguments[1::2]


def run(container: Container, folders: list[str]) -> int:
    """Adds the mounted libraries of the folders.  Always returns 0, since programs may find them without the cache."""
    return add(container.root, folders, DROP_IN)


def add(root: Root, folders: list[str], drop_in: str, own: bool = False) -> int:
    """Adds libraries before all that the cache has, those of the first folder first.  Always returns 0.

    `drop_in`: the file name below /etc/ld.so.conf.d; `own`: add the image's own libraries, not the mounted ones.
    """
    try:
        _update(root, folders, drop_in, own)
    except (OSError, ldcache.Damaged) as error:
        why = (
            "something is mounted there"
            if getattr(error, "errno", 0) == errno.EXDEV
            else getattr(error, "strerror", None) or error
        )
        say(f"update-ldcache: the image's /etc/{CACHE} was left as it is: {why}")
    return 0


def _update(root: Root, folders: list[str], drop_in: str, own: bool) -> None:
    try:
        etc = root.directory("/etc")
    except FileNotFoundError:
        return
    try:
        try:
            present = os.open(CACHE, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=etc)
        except FileNotFoundError:
            return
        try:
            cache = ldcache.Cache(read_regular(present, MAX_CACHE))
        finally:
            os.close(present)
        added = 0
        for folder in reversed(folders):  # the first folder's entries come first
            for path, flags in _libraries(root, folder, own):
                added += cache.insert(
                    ldcache.Entry(flags, os.fsencode(path.rpartition("/")[2]), os.fsencode(path), 0, 0)
                )
        if added:
            replace(etc, CACHE, cache.build())
    finally:
        os.close(etc)
    _drop_in(root, folders, drop_in)


def _drop_in(root: Root, folders: list[str], name: str) -> None:
    """Writes a drop-in of ld.so.conf, so that an ldconfig run in the container later keeps the folders.

    Does nothing when the image has no directory for it.
    """
    try:
        directory = root.directory(DROP_INS)
    except OSError:
        return
    try:
        replace(directory, name, "".join(f"{folder}\n" for folder in folders).encode())
    finally:
        os.close(directory)


def _libraries(root: Root, folder: str, own: bool) -> list[tuple[str, int]]:
    """The mounted shared libraries in a folder (with `own`: the image's), as (path, flags in the cache).

    Sorted by name.  A link in the image to a mounted library counts as mounted.  The image's own libraries are in its
    cache already.
    """
    libraries: list[tuple[str, int]] = []
    for name in names(root, folder):
        path = f"{folder}/{name}"
        try:
            os.close(root.find(path))
            if not own:
                continue  # found without crossing a mount: it is the image's
        except OSError as error:
            if own or error.errno != errno.EXDEV:
                continue
        try:
            flags = _flags(root, path)
        except OSError:
            continue
        if flags:
            libraries.append((path, flags))
    return libraries


def names(root: Root, folder: str) -> list[str]:
    """The names of the libraries in a folder of the container, sorted; [] when there is no such folder.

    When a folder exceeds the limits, the hook prints a line and ignores the rest of it.
    """
    try:
        descriptor = root.find(folder, cross=True)
    except OSError:
        return []
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return []
        libraries: list[str] = []
        with os.scandir(f"/proc/self/fd/{descriptor}") as entries:
            for number, entry in enumerate(entries):
                name = entry.name
                if number == MAX_NAMES or len(libraries) == MAX_LIBRARIES:
                    say(
                        f"update-ldcache: {folder} has more than {MAX_NAMES} files or {MAX_LIBRARIES} libraries; the "
                        "rest is ignored"
                    )
                    break
                if name.startswith("lib") and ".so" in name and "\n" not in name:
                    libraries.append(name)
        return sorted(libraries)
    finally:
        os.close(descriptor)


def _flags(root: Root, path: str) -> int:
    """The flags that the loader's cache has for a library of its machine; 0 for a file that is no library (elf(5))."""
    descriptor = root.find(path, cross=True)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return 0
        opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    finally:
        os.close(descriptor)
    try:
        head = os.read(opened, 20)
    finally:
        os.close(opened)
    if head[:6] != b"\x7fELF\x02\x01":  # an ELF file of 64 bits, little endian
        return 0
    return ldcache.FLAGS.get(int.from_bytes(head[18:20], "little"), 0)
