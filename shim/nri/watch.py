"""Notices that a source of the inventory may have changed: inotify where there is one, times and sizes elsewhere.

Source: inotify(7).
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Dict, List, Mapping, Set, Tuple

_EVENT = struct.Struct("iIII")
_MASK = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800  # written, attributes, moved, made, removed
_OVERFLOW, _SELF = 0x4000, 0x4 | 0x400 | 0x800

# Of one directory: how the names end that matter in it, and names that matter whole.
Wanted = Tuple[Set[str], Set[str]]


def _places(directories: Mapping[str, Tuple[str, ...]]) -> Dict[str, Wanted]:
    """What to watch: each directory itself and, for the day on which it comes or is replaced, its name in the
    nearest directory above that is there."""
    places: Dict[str, Wanted] = {}
    for directory, ends in directories.items():
        at = os.path.realpath(directory)
        if os.path.isdir(at):
            places.setdefault(at, (set(), set()))[0].update(ends)
        while at != "/":
            at, name = os.path.split(at)
            if os.path.isdir(at):
                places.setdefault(at, (set(), set()))[1].add(name)
                break
    return places


def _matters(name: str, wanted: Wanted) -> bool:
    return name in wanted[1] or name.endswith(tuple(wanted[0]))


class Watch:
    """Over the directories of the inventory's sources; `fileno` is readable when something happened, or -1 where
    `changed` has to be asked from time to time."""

    def __init__(self, use_inotify: bool = True) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True) if use_inotify else None
        self._descriptor = -1
        self._wanted: Dict[int, Wanted] = {}
        self._polled: Dict[str, Wanted] = {}
        self._seen: List[Tuple[str, Tuple[int, ...]]] = []
        if self._libc is not None and hasattr(self._libc, "inotify_init1"):
            self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor to wait for, or -1."""
        return self._descriptor

    def close(self) -> None:
        """Ends it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def set(self, directories: Mapping[str, Tuple[str, ...]]) -> None:
        """Watches these directories, each for names with one of the given ends, from now on.

        Call it before the sources are read, so that no change is missed.
        """
        places = _places(directories)
        if self._descriptor < 0 or self._libc is None:
            self._polled = places
            self._seen = self._look()
            return
        before, self._wanted = self._wanted, {}
        for place, wanted in places.items():
            number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(place), _MASK)
            if number >= 0:
                self._wanted[number] = wanted
        for number in before.keys() - self._wanted.keys():
            self._libc.inotify_rm_watch(self._descriptor, number)

    def changed(self) -> bool:
        """Whether a source may have changed since the last time; never waits."""
        if self._descriptor < 0:
            before, self._seen = self._seen, self._look()
            return before != self._seen
        found = False
        while True:
            try:
                data = os.read(self._descriptor, 64 << 10)
            except OSError:
                return found
            at = 0
            while at < len(data):
                number, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size
                name = os.fsdecode(data[at : at + length].rstrip(b"\0"))
                at += length
                wanted = self._wanted.get(number)
                found = (
                    found
                    or bool(mask & _OVERFLOW)
                    or wanted is not None
                    and (_matters(name, wanted) if name else bool(mask & _SELF))
                )

    def _look(self) -> List[Tuple[str, Tuple[int, ...]]]:
        seen: List[Tuple[str, Tuple[int, ...]]] = []
        for place, wanted in self._polled.items():
            try:
                names = [name for name in sorted(os.listdir(place)) if _matters(name, wanted)]
            except OSError:
                continue
            for path in (os.path.join(place, name) for name in names):
                try:
                    found = os.stat(path)
                except OSError:
                    continue
                whole = found.st_mtime_ns if os.path.isfile(path) else 0
                seen.append(
                    (
                        path,
                        (found.st_dev, found.st_ino, found.st_size if whole else 0, whole, found.st_mode, found.st_uid),
                    )
                )
        return seen
