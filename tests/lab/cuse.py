#!/usr/bin/python3
"""cuse.py NAME MAJOR MINOR: a character device /dev/NAME with these numbers, which this process serves until it ends.

The device can be opened, returns "fake GPU" to a read, accepts any write, and answers every ioctl with 42. It needs
/dev/cuse, so it works only in the lab's machine (vm.py). Source: the kernel's include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import os
import struct
import sys

INIT = 4096  # this one is CUSE's; the others are FUSE's
OPEN, READ, WRITE, RELEASE, FLUSH, IOCTL = 14, 15, 16, 18, 25, 39
MAX = 65536  # largest read or write, in bytes
NOT_IMPLEMENTED = -38
TEXT = b"fake GPU\n"


def answer(opcode: int, body: bytes, name: str, major: int, minor: int) -> bytes | None:
    """The payload of the answer to one request; None for an operation that this device does not have."""
    if opcode == INIT:
        _, their_minor, _, flags = struct.unpack_from("<4I", body)
        return (
            struct.pack("<8I40x", 7, their_minor, 0, flags & 1, MAX, MAX, major, minor)
            + b"DEVNAME="
            + name.encode()
            + b"\0"
        )
    if opcode == OPEN:
        return struct.pack("<QII", 0, 1, 0)  # direct I/O: no page cache
    if opcode == READ:
        _, offset, size = struct.unpack_from("<QQI", body)
        return TEXT[offset:][:size]
    if opcode == WRITE:
        return struct.pack("<II", *struct.unpack_from("<16xI", body), 0)
    if opcode == IOCTL:
        return struct.pack("<iIII", 42, 0, 0, 0)
    return b"" if opcode in (RELEASE, FLUSH) else None


def main(name: str, major: str, minor: str) -> None:
    device = os.open("/dev/cuse", os.O_RDWR | os.O_CLOEXEC)
    while True:
        request = os.read(device, MAX + 4096)
        length, opcode, unique = struct.unpack_from("<IIQ", request)
        data = answer(opcode, request[40:length], name, int(major), int(minor))
        error = NOT_IMPLEMENTED if data is None else 0
        os.write(device, struct.pack("<IiQ", 16 + len(data or b""), error, unique) + (data or b""))


if __name__ == "__main__":
    main(*sys.argv[1:])
