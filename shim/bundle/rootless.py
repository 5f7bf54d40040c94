"""The user and group ids of a container that an unprivileged user starts.

In the container, the user's own id is root, and the ids from 1 on are the subordinate ids that the administrator gave
this user in /etc/subuid and /etc/subgid.
Source: user_namespaces(7), subuid(5), subgid(5).  All functions except `read` are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shim.errors import ChandlerError
from shim.host import files

Mapping = dict[str, int]
Range = tuple[int, int]

MAX_ID = (1 << 32) - 2  # 2**32 - 1 stands for "no id", see user_namespaces(7)
MAX_LINES = 340  # the most lines that uid_map and gid_map can have, see user_namespaces(7)
MAX_FILE = 16 << 20


def ranges(text: str, owners: Sequence[str]) -> list[Range]:
    """The ranges in a subuid or subgid file that belong to one of `owners`, as (first id, number of ids).

    `owners`: user names, or numbers as text.  Lines of another form are ignored, as shadow's tools do.
    """
    result: list[Range] = []
    for line in text.splitlines():
        fields = line.strip().split(":")
        if len(fields) != 3 or not fields[0] or fields[0] not in owners:
            continue
        first, count = (
            int(field) if field.isascii() and field.isdigit() and len(field) < 11 else -1 for field in fields[1:]
        )
        if first >= 0 and count > 0 and first + count - 1 <= MAX_ID:
            result.append((first, count))
    return result


def mappings(own_id: int, subordinate: Sequence[Range]) -> list[Mapping]:
    """The id map of a user namespace: 0 is the host's id `own_id`, and from 1 on come the ids of `subordinate`.

    An id that is in several ranges, or is `own_id`, is mapped only once, since the kernel refuses overlapping mappings.
    """
    id_map = [{"containerID": 0, "hostID": own_id, "size": 1}]
    next_id = 1
    for first, count in subordinate:
        for start, size in _unmapped(first, count, id_map):
            if len(id_map) == MAX_LINES or next_id + size - 1 > MAX_ID:
                return id_map
            id_map.append({"containerID": next_id, "hostID": start, "size": size})
            next_id += size
    return id_map


def _unmapped(first: int, count: int, id_map: Sequence[Mapping]) -> list[Range]:
    """The parts of a range of host ids that a map does not have yet."""
    parts = [(first, first + count)]
    for mapping in id_map:
        low, high = mapping["hostID"], mapping["hostID"] + mapping["size"]
        parts = [
            piece
            for start, end in parts
            for piece in ((start, min(end, low)), (max(start, high), end))
            if piece[0] < piece[1]
        ]
    return [(start, end - start) for start, end in parts]


class Ids:
    """The ids that exist in a container with an id map.  Ask with `number in ids`."""

    def __init__(self, id_map: Sequence[Mapping]) -> None:
        self._id_map = id_map

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and any(
            0 <= number - mapping["containerID"] < mapping["size"] for mapping in self._id_map
        )


def of_map(text: str) -> list[Mapping]:
    """Parses a uid_map or gid_map of /proc."""
    rows = [[int(word) for word in line.split()] for line in text.splitlines() if line.strip()]
    return [{"containerID": row[0], "hostID": row[1], "size": row[2]} for row in rows]


def read(path: str) -> str:
    """The text of a file such as /etc/subuid.

    Gives '' for a file that is missing or unreadable: then the user has no ranges.
    """
    try:
        data: Any = files.read(path, MAX_FILE, follow=True)[0]
    except (OSError, ChandlerError):
        return ""
    return str(data.decode("utf-8", "replace"))
