"""ld.so.cache files: valid ones, as ldconfig writes them, and invalid ones."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

_HEADER = Struct("<20sIIB3xI12x")  # magic, number of entries, length of strings, byte order, place of the extension
_ROW = Struct("<iIIIQ")  # flags, places of key and value, version, hardware
_MAGIC = b"glibc-ld.so.cache1.1"
FLAGS = 0x0303  # a library of x86-64


def write(entries: Sequence[tuple[int, bytes, bytes, int, int]] = (), hardware: Sequence[bytes] = ()) -> bytes:
    """A cache of (flags, key, value, version, hardware) in the given order, which should be the loader's order."""
    workdirs: dict[bytes, int] = {}
    strings = bytearray()
    start = _HEADER.size + _ROW.size * len(entries)
    for text in (*(text for entry in entries for text in entry[1:3]), *hardware):
        if text not in workdirs:
            workdirs[text] = start + len(strings)
            strings += text + b"\0"
    rows = b"".join(
        _ROW.pack(flags, workdirs[key], workdirs[value], version, bits) for flags, key, value, version, bits in entries
    )
    length = len(strings)
    strings += bytes(-(start + length) % 4)
    extension = start + len(strings) if hardware else 0
    header = _HEADER.pack(_MAGIC, len(entries), length, 2, extension)
    more = b""
    if hardware:
        more = Struct("<IIIIII").pack(0xEAA42174, 1, 1, 0, extension + 24, 4 * len(hardware)) + b"".join(
            workdirs[text].to_bytes(4, "little") for text in hardware
        )
    return header + rows + (bytes(strings) + more if hardware else bytes(strings[:length]))


def bomb(size: int) -> bytes:
    """A cache of about `size` bytes whose entries share the ends of long strings.

    A reader that copies each string needs 8 KiB for every 88 bytes.
    """
    width, shared = 4096, 64  # bytes of a string with its NUL; entries that point into one string
    rows, strings = bytearray(), bytearray()
    regions = size // (shared * _ROW.size + width)
    start = _HEADER.size + regions * shared * _ROW.size
    for region in range(regions):
        at = start + len(strings)
        strings += (b"lib%08x" % region).ljust(width - 1, b"a") + b"\0"
        for skip in range(shared):
            rows += _ROW.pack(FLAGS, at + skip, at + skip, 0, 0)
    return _HEADER.pack(_MAGIC, regions * shared, len(strings), 0, 0) + rows + strings
