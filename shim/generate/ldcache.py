"""The dynamic loader's cache, read and written.  Pure: bytes in, bytes out; imports next to nothing, for hooks use it too.

Source: glibc, sysdeps/generic/dl-cache.h, elf/cache.c and elf/dl-cache.c.
"""

from __future__ import annotations

from _operator import itemgetter  # operator brings the same and more
from struct import Struct, error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, NamedTuple

    class Entry(NamedTuple):
        """`flags` say for which machine; `key` is what a program asks for, `value` the path."""
        flags: int
        key: bytes
        value: bytes
        version: int
        hardware: int
else:
    class Entry(tuple):  # without collections, which a hook has no other need of
        __slots__ = ()
        flags, key, value, version, hardware = (property(itemgetter(place)) for place in range(5))

        def __new__(cls, *values):
            return tuple.__new__(cls, values)

_OLD = b"ld.so-1.7.0"
_NEW = b"glibc-ld.so.cache1.1"
_HEADER = Struct("<20sIIB3xI12x")  # magic, number of entries, length of strings, byte order, place of the extension
_ENTRY = Struct("<iIIIQ")  # flags, key, value, version, hardware
_EXTENSION = Struct("<II")  # magic, number of sections
_SECTION = Struct("<IIII")  # tag, flags, place, size
_EXTENSION_MAGIC, _HWCAPS = 0xEAA42174, 1
MAX_ENTRIES = 1 << 18

# e_machine of ELF: the flags of a 64-bit library of the GNU C library 2.x on that machine
FLAGS = {62: 0x0303, 183: 0x0A03}


class Damaged(Exception):
    """The bytes are no cache that this module knows."""


class Cache:
    """A cache: `entries` in the order in which the loader searches them, the names of hardware that entries refer to."""

    __slots__ = ("entries", "hardware", "order")

    def __init__(self, entries: List[Entry], hardware: List[bytes], order: int) -> None:
        self.entries = entries
        self.hardware = hardware
        self.order = order


def parse(data: bytes) -> Cache:
    """The cache in `data`; raises Damaged."""
    try:
        return _parse(data)
    except (error, ValueError, IndexError):
        raise Damaged("the loader's cache is damaged") from None


def _parse(data: bytes) -> Cache:
    start = 0
    if data.startswith(_OLD):  # the new form stands behind the old one, aligned
        start = (16 + int.from_bytes(data[12:16], "little") * 12 + 7) & ~7
    body = data[start:] if start else data
    magic, count, _, order, extension = _HEADER.unpack_from(body)
    if magic != _NEW or order not in (0, 2) or count > MAX_ENTRIES:
        raise ValueError
    entries: List[Entry] = []
    for number in range(count):
        flags, key, value, version, hardware = _ENTRY.unpack_from(body, _HEADER.size + number * _ENTRY.size)
        entries.append(Entry(flags, _string(body, key), _string(body, value), version, hardware))
    return Cache(entries, _hardware(body, extension) if extension else [], order)


def _string(body: bytes, place: int) -> bytes:
    return body[place:body.index(b"\0", place, place + 4096)]


def _hardware(body: bytes, place: int) -> List[bytes]:
    magic, count = _EXTENSION.unpack_from(body, place)
    if magic != _EXTENSION_MAGIC or count > 64:
        raise ValueError
    for number in range(count):
        tag, _, at, size = _SECTION.unpack_from(body, place + _EXTENSION.size + number * _SECTION.size)
        if tag == _HWCAPS:
            if size > 4096:
                raise ValueError
            return [_string(body, int.from_bytes(body[here:here + 4], "little")) for here in range(at, at + size, 4)]
    return []


def build(cache: Cache) -> bytes:
    """The file's bytes, in the form that every glibc since 2.2 reads."""
    offset = _HEADER.size + _ENTRY.size * len(cache.entries)
    places: dict[bytes, int] = {}
    strings: List[bytes] = []
    for text in (text for entry in cache.entries for text in (entry.key, entry.value)):
        if text not in places:
            places[text] = offset
            strings.append(text + b"\0")
            offset += len(text) + 1
    for text in cache.hardware:
        if text not in places:
            places[text] = offset
            strings.append(text + b"\0")
            offset += len(text) + 1
    joined = b"".join(strings)
    padding = -offset % 4
    extension = b""
    if cache.hardware:
        at = offset + padding + _EXTENSION.size + _SECTION.size
        extension = (b"\0" * padding + _EXTENSION.pack(_EXTENSION_MAGIC, 1) + _SECTION.pack(_HWCAPS, 0, at, 4 * len(cache.hardware))
                     + b"".join(places[text].to_bytes(4, "little") for text in cache.hardware))
    header = _HEADER.pack(_NEW, len(cache.entries), len(joined), cache.order, offset + padding if extension else 0)
    rows = [_ENTRY.pack(entry.flags, places[entry.key], places[entry.value], entry.version, entry.hardware) for entry in cache.entries]
    return b"".join((header, *rows, joined, extension))


def insert(cache: Cache, new: Entry) -> bool:
    """Puts an entry where the loader finds it, before those of the same name; False when it is there already."""
    entries = cache.entries
    low, high = 0, len(entries)
    while low < high:  # the order is descending
        middle = (low + high) // 2
        if compare(entries[middle].key, new.key) > 0:
            low = middle + 1
        else:
            high = middle
    place = low
    while place < len(entries) and entries[place].key == new.key:
        if entries[place][:3] == new[:3]:
            return False
        place += 1
    entries.insert(low, new)
    return True


def compare(one: bytes, other: bytes) -> int:
    """glibc's _dl_cache_libcmp: numbers inside names count as numbers, with the overflow of a C int."""
    a, b = one + b"\0", other + b"\0"
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


def paths(data: bytes, library: str) -> List[str]:
    """Where the cache says a library is, best first; none for a cache that is damaged or of another kind."""
    try:
        entries = parse(data).entries
    except Damaged:
        return []
    return [entry.value.decode("utf-8", "replace") for entry in entries if entry.key == library.encode()]
