"""The ids of a container that an unprivileged user starts: his own as root, and what the administrator lent him.

Source: user_namespaces(7), subuid(5), subgid(5).  All but `read` is pure.
"""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

from shim.errors import ChandlerError
from shim.host import files

Mapping = Dict[str, int]
Range = Tuple[int, int]

MAX_ID = (1 << 32) - 2  # 2**32 - 1 means no id
MAX_LINES = 340  # user_namespaces(7): lines of uid_map and gid_map
MAX_FILE = 16 << 20


def ranges(text: str, owners: Sequence[str]) -> List[Range]:
    """(first, count) of every range in a subuid or subgid file that is any of `owners`, a name or a number in text.

    Lines that are no range are passed over, as shadow's tools do.
    """
    found: List[Range] = []
    for line in text.splitlines():
        fields = line.strip().split(":")
        if len(fields) != 3 or not fields[0] or fields[0] not in owners:
            continue
        first, count = (
            int(field) if field.isascii() and field.isdigit() and len(field) < 11 else -1 for field in fields[1:]
        )
        if first >= 0 and count > 0 and first + count - 1 <= MAX_ID:
            found.append((first, count))
    return found


def mappings(own: int, lent: Sequence[Range]) -> List[Mapping]:
    """The map of a user namespace: 0 is `own`, and from 1 on the ids of all ranges, one after the other.

    What a range has in common with an earlier one, or with `own`, is mapped once: the kernel refuses it twice.
    """
    made = [{"containerID": 0, "hostID": own, "size": 1}]
    following = 1
    for first, count in lent:
        for start, size in _without(first, count, made):
            if len(made) == MAX_LINES or following + size - 1 > MAX_ID:
                return made
            made.append({"containerID": following, "hostID": start, "size": size})
            following += size
    return made


def _without(first: int, count: int, made: Sequence[Mapping]) -> List[Range]:
    """The parts of a range that are not mapped yet."""
    parts = [(first, first + count)]
    for mapping in made:
        low, high = mapping["hostID"], mapping["hostID"] + mapping["size"]
        parts = [
            piece
            for start, end in parts
            for piece in ((start, min(end, low)), (max(start, high), end))
            if piece[0] < piece[1]
        ]
    return [(start, end - start) for start, end in parts]


class Ids:
    """The ids that a map gives a container; asked with `in`."""

    def __init__(self, made: Sequence[Mapping]) -> None:
        self._made = made

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and any(
            0 <= number - mapping["containerID"] < mapping["size"] for mapping in self._made
        )


def of_map(text: str) -> List[Mapping]:
    """The mappings in a uid_map or gid_map of /proc."""
    rows = [[int(word) for word in line.split()] for line in text.splitlines() if line.strip()]
    return [{"containerID": row[0], "hostID": row[1], "size": row[2]} for row in rows]


def read(path: str) -> str:
    """The text of a file such as /etc/subuid; '' where there is none or it cannot be read, as for a user without a
    range."""
    try:
        data: Any = files.read(path, MAX_FILE, follow=True)[0]
    except (OSError, ChandlerError):
        return ""
    return str(data.decode("utf-8", "replace"))
