"""Notices that a source of the inventory may have changed: by inotify, or by times and sizes where there is none.

Source: inotify(7).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping

from shim.node import cdi_files

_EVENT = struct.Struct("iIII")  # of struct inotify_event: watch descriptor, mask, cookie, length of the name
# IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF
_MASK = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
_OVERFLOW = 0x4000  # IN_Q_OVERFLOW: events were lost
_SELF = 0x4 | 0x400 | 0x800  # IN_ATTRIB, IN_DELETE_SELF, IN_MOVE_SELF: of the directory itself

# Which names matter in one directory: (endings of names, whole names).
_Names = tuple[set[str], set[str]]


def _watched_directories(directories: Mapping[str, tuple[str, ...]]) -> dict[str, _Names]:
    """What to watch: each directory itself and, to notice when it is made or replaced, its name in the nearest
    directory above it that exists."""
    watched: dict[str, _Names] = {}
    for directory, ends in directories.items():
        path = os.path.realpath(directory)
        if os.path.isdir(path):
            watched.setdefault(path, (set(), set()))[0].update(ends)
        while path != "/":
            path, name = os.path.split(path)
            if os.path.isdir(path):
                watched.setdefault(path, (set(), set()))[1].add(name)
                break
    return watched


def _matters(name: str, wanted: _Names) -> bool:
    return name in wanted[1] or name.endswith(tuple(wanted[0])) and not name.startswith(cdi_files.CLAIMS)


class Watch:
    """Watches the directories of the inventory's sources.

    `fileno` is readable when something has happened.  It is -1 where there is no inotify, and the caller then has to
    call `changed` from time to time.
    """

    def __init__(self, use_inotify: bool = True) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True) if use_inotify else None
        self._descriptor = -1
        self._wanted: dict[int, _Names] = {}
        self._polled: dict[str, _Names] = {}
        self._seen: list[tuple[str, tuple[int, ...]]] = []
        if self._libc is not None and hasattr(self._libc, "inotify_init1"):
            self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor to wait for, or -1."""
        return self._descriptor

    def close(self) -> None:
        """Ends the watch."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def set(self, directories: Mapping[str, tuple[str, ...]]) -> None:
        """Watches these directories from now on, each for names with one of the given endings.

        Call it before the sources are read, so that no change is missed.
        """
        watched = _watched_directories(directories)
        if self._descriptor < 0 or self._libc is None:
            self._polled = watched
            self._seen = self._look()
            return
        before, self._wanted = self._wanted, {}
        for path, wanted in watched.items():
            number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(path), _MASK)
            if number >= 0:
                self._wanted[number] = wanted
        for number in before.keys() - self._wanted.keys():
            self._libc.inotify_rm_watch(self._descriptor, number)

    def changed(self) -> bool:
        """Whether a source may have changed since the last call; never waits."""
        if self._descriptor < 0:
            before, self._seen = self._seen, self._look()
            return before != self._seen
        change = False
        while True:
            try:
                data = os.read(self._descriptor, 64 << 10)
            except OSError:
                return change
            offset = 0
            while offset < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, offset)
                offset += _EVENT.size
                name = os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
                offset += length
                wanted = self._wanted.get(number)
                change = (
                    change
                    or bool(mask & _OVERFLOW)
                    or wanted is not None
                    and (_matters(name, wanted) if name else bool(mask & _SELF))
                )

    def _look(self) -> list[tuple[str, tuple[int, ...]]]:
        """(path, numbers from stat) of every file that matters, where there is no inotify."""
        seen: list[tuple[str, tuple[int, ...]]] = []
        for directory, wanted in self._polled.items():
            try:
                names = [name for name in sorted(os.listdir(directory)) if _matters(name, wanted)]
            except OSError:
                continue
            for path in (os.path.join(directory, name) for name in names):
                try:
                    status = os.stat(path)
                except OSError:
                    continue
                # The time and size of a directory change with any name in it, so only those of files count.
                time_ns = status.st_mtime_ns if os.path.isfile(path) else 0
                seen.append(
                    (
                        path,
                        (
                            status.st_dev,
                            status.st_ino,
                            status.st_size if time_ns else 0,
                            time_ns,
                            status.st_mode,
                            status.st_uid,
                        ),
                    )
                )
        return seen
