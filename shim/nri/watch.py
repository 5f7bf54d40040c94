"""Notices that a source of the inventory may have changed: inotify where there is one, times and sizes elsewhere.

Source: inotify(7).
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Dict, Iterable, List, Optional, Set, Tuple

_EVENT = struct.Struct("iIII")
_MASK = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800  # written, attributes, moved, made, removed
_OVERFLOW, _SELF = 0x4000, 0x400 | 0x800
_ANY: Optional[str] = None


def _places(directories: Iterable[str]) -> Dict[str, Set[Optional[str]]]:
    """What to watch: each directory itself and, for the day on which it comes or is replaced, its name in the
    nearest directory above that is there."""
    places: Dict[str, Set[Optional[str]]] = {}
    for directory in directories:
        at = os.path.realpath(directory)
        if os.path.isdir(at):
            places.setdefault(at, set()).add(_ANY)
        while at != "/":
            at, name = os.path.split(at)
            if os.path.isdir(at):
                places.setdefault(at, set()).add(name)
                break
    return places


class Watch:
    """Over the directories of the inventory's sources; `fileno` is readable when something happened, or -1 where
    `changed` has to be asked from time to time."""

    def __init__(self, use_inotify: bool = True) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True) if use_inotify else None
        self._descriptor = -1
        self._wanted: Dict[int, Set[Optional[str]]] = {}
        self._directories: List[str] = []
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

    def set(self, directories: Iterable[str]) -> None:
        """Watches these directories from now on.  Call it before the sources are read, so that no change is missed."""
        self._directories = list(directories)
        if self._descriptor < 0 or self._libc is None:
            self._seen = self._look()
            return
        before, self._wanted = self._wanted, {}
        for place, names in _places(self._directories).items():
            number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(place), _MASK)
            if number >= 0:
                self._wanted.setdefault(number, set()).update(names)
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
                name = os.fsdecode(data[at:at + length].rstrip(b"\0"))
                at += length
                wanted = self._wanted.get(number, ())
                found = found or bool(mask & _OVERFLOW) or _ANY in wanted or bool(mask & _SELF and wanted) or name in wanted

    def _look(self) -> List[Tuple[str, Tuple[int, ...]]]:
        seen: List[Tuple[str, Tuple[int, ...]]] = []
        for place in sorted(_places(self._directories)):
            names = os.listdir(place) if place in map(os.path.realpath, self._directories) else ()
            for path in (place, *(os.path.join(place, name) for name in sorted(names))):
                try:
                    found = os.stat(path)
                except OSError:
                    continue
                seen.append((path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid)))
        return seen
