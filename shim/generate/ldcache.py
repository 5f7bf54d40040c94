"""Reads and writes the dynamic loader's cache (ld.so.cache).  Pure: bytes in, bytes out.

The hook program imports this module too, so it imports almost nothing itself.

Entries may share strings or the ends of strings, so a small file can stand for gigabytes of text.  A Cache therefore
keeps the bytes of the file, and takes out one string at a time.
Source: glibc, sysdeps/generic/dl-cache.h, elf/cache.c and elf/dl-cache.c.
"""

from __future__ import annotations

from struct import Struct, error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Callable


class Entry:
    """One entry.  `flags`: for which machine; `key`: the name that a program asks for; `value`: the path.

    `version` and `hardware` are osversion and hwcap of glibc's entry.
    """

    __slots__ = ("flags", "key", "value", "version", "hardware")

    def __init__(self, flags: int, key: bytes, value: bytes, version: int, hardware: int) -> None:
        self.flags = flags
        self.key = key
        self.value = value
        self.version = version
        self.hardware = hardware


_OLD = b"ld.so-1.7.0"
_NEW = b"glibc-ld.so.cache1.1"
_HEADER = Struct("<20sIIB3xI12x")  # magic, number of entries, length of strings, byte order, offset of the extension
_ROW = Struct("<iIIIQ")  # an entry: flags, offsets of key and value, version, hardware
_EXTENSION = Struct("<II")  # magic, number of sections
_SECTION = Struct("<IIII")  # tag, flags, offset, size
_EXTENSION_MAGIC, _HWCAPS = 0xEAA42174, 1
MAX_STRING = 4096  # bytes of a key or a path
MAX_HARDWARE = 64  # names of hardware, and sections of the extension

# ELF's e_machine: the flags of a 64-bit library for glibc 2.x on that machine.
FLAGS = {62: 0x0303, 183: 0x0A03}


class Damaged(Exception):
    """The bytes are not a cache in a form that this module can read."""


class Cache:
    """A cache in the order in which the loader searches it: the file's entries, and those that insert() added."""

    def __init__(self, data: bytes) -> None:
        """`data`: a file's bytes.  Raises Damaged."""
        try:
            self._read(data)
        except (error, ValueError):
            raise Damaged("the loader's cache is damaged") from None

    def _read(self, data: bytes) -> None:
        start = 0
        if data.startswith(_OLD):  # the cache has both forms: the new one follows the old one, aligned to 8 bytes
            start = (16 + int.from_bytes(data[12:16], "little") * 12 + 7) & ~7
        body = self._body = data[start:] if start else data
        magic, self._count, length, self._order, extension = _HEADER.unpack_from(body)
        self._strings = _HEADER.size + self._count * _ROW.size
        self._end = self._strings + length
        if magic != _NEW or self._order not in (0, 2) or self._end > len(body):
            raise ValueError
        self._hardware = _hardware(body, extension) if extension else []
        self._added: list[tuple[int, Entry]] = []  # in order: (index of the file's entry that it precedes, entry)
        first, last = self._strings, 0
        for _, key, value, _, _ in self._rows():
            first, last = min(first, key, value), max(last, key, value)
        if self._count or self._hardware:
            first, last = min((first, *self._hardware)), max((last, *self._hardware))
            # a string begins outside of the strings, or has no end
            if first < self._strings or body.find(b"\0", last, self._end) < 0:
                raise ValueError

    def _rows(self) -> Iterator[tuple[int, ...]]:
        return _ROW.iter_unpack(memoryview(self._body)[_HEADER.size : self._strings])

    def __iter__(self) -> Iterator[Entry]:
        """The file's entries."""
        return map(self._entry, range(self._count))

    def _entry(self, number: int) -> Entry:
        flags, key, value, version, hardware = _ROW.unpack_from(self._body, _HEADER.size + number * _ROW.size)
        return Entry(flags, _string(self._body, key), _string(self._body, value), version, hardware)

    def hardware(self) -> list[bytes]:
        """The names of hardware capabilities that entries refer to."""
        return [_string(self._body, offset) for offset in self._hardware]

    def insert(self, new: Entry) -> bool:
        """Adds an entry in the loader's order, before those with the same key.  False when it is there already."""
        position, present = _search(new, self._count, self._entry)
        added_position, added = _search(new, len(self._added), lambda number: self._added[number][1])
        if present or added:
            return False
        self._added.insert(added_position, (position, new))
        return True

    def build(self) -> bytes:
        """The file's bytes, in the form that every glibc since 2.2 reads."""
        shift = _ROW.size * len(self._added)  # the strings move by this many bytes
        offset = self._end + shift
        before: dict[int, list[Entry]] = {}
        for position, entry in self._added:
            before.setdefault(position, []).append(entry)
        texts: list[bytes] = []
        rows = bytearray()
        file = self._rows()
        for number in range(self._count + 1):
            for entry in before.get(number, ()):
                rows += _ROW.pack(entry.flags, offset, offset + len(entry.key) + 1, entry.version, entry.hardware)
                texts.append(entry.key + b"\0" + entry.value + b"\0")
                offset += len(texts[-1])
            if number < self._count:
                flags, key, value, version, hardware = next(file)
                rows += _ROW.pack(flags, key + shift, value + shift, version, hardware)
        padding = -offset % 4
        extension = b""
        if self._hardware:
            at = offset + padding + _EXTENSION.size + _SECTION.size
            extension = (
                b"\0" * padding
                + _EXTENSION.pack(_EXTENSION_MAGIC, 1)
                + _SECTION.pack(_HWCAPS, 0, at, 4 * len(self._hardware))
                + b"".join((position + shift).to_bytes(4, "little") for position in self._hardware)
            )
        header = _HEADER.pack(
            _NEW,
            self._count + len(self._added),
            offset - self._strings - shift,
            self._order,
            offset + padding if extension else 0,
        )
        return b"".join((header, rows, memoryview(self._body)[self._strings : self._end], *texts, extension))


def _hardware(body: bytes, offset: int) -> list[int]:
    """The offsets of the names of hardware capabilities.  Raises ValueError or struct.error for a damaged extension."""
    magic, count = _EXTENSION.unpack_from(body, offset)
    if magic != _EXTENSION_MAGIC or count > MAX_HARDWARE:
        raise ValueError
    for number in range(count):
        tag, _, at, size = _SECTION.unpack_from(body, offset + _EXTENSION.size + number * _SECTION.size)
        if tag == _HWCAPS:
            if size > 4 * MAX_HARDWARE or at + size > len(body):
                raise ValueError
            return [int.from_bytes(body[here : here + 4], "little") for here in range(at, at + size, 4)]
    return []


def _string(body: bytes, offset: int) -> bytes:
    """The string at an offset, cut after MAX_STRING bytes."""
    end = body.find(b"\0", offset, offset + MAX_STRING)
    return body[offset:end] if end >= 0 else body[offset : offset + MAX_STRING]


def _search(new: Entry, count: int, entry_at: Callable[[int], Entry]) -> tuple[int, bool]:
    """The index of `new` among `count` entries in the loader's descending order, and whether it is there already."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if compare(entry_at(middle).key, new.key) > 0:
            low = middle + 1
        else:
            high = middle
    for number in range(low, count):
        entry = entry_at(number)
        if entry.key != new.key:
            break
        if entry.value == new.value and entry.flags == new.flags:
            return low, True
    return low, False


def compare(left: bytes, right: bytes) -> int:
    """Compares two names as glibc's _dl_cache_libcmp does: digits in names as numbers, with the overflow of a C int."""
    a, b = left + b"\0", right + b"\0"
    i = j = 0
    while a[i]:
        digit, digit_too = 48 <= a[i] <= 57, 48 <= b[j] <= 57
        if digit and digit_too:
            x = y = 0
            while 48 <= a[i] <= 57:
                x, i = (x * 10 + a[i] - 48) & 0xFFFFFFFF, i + 1
            while 48 <= b[j] <= 57:
                y, j = (y * 10 + b[j] - 48) & 0xFFFFFFFF, j + 1
            if x != y:
                return ((x - y + 0x80000000) & 0xFFFFFFFF) - 0x80000000
        elif digit or digit_too:
            return 1 if digit else -1
        elif a[i] != b[j]:
            return a[i] - b[j]
        else:
            i, j = i + 1, j + 1
    return a[i] - b[j]


def paths(data: bytes, library: str) -> list[str]:
    """The paths of a library in a cache, best first; none for a cache that is damaged or of another form."""
    try:
        return [entry.value.decode("utf-8", "replace") for entry in Cache(data) if entry.key == library.encode()]
    except Damaged:
        return []
