"""Chooses free devices that are close to each other: `resources.gpu.prefer`.  Pure; loaded by creates that ask for it.

`numa` prefers devices of one NUMA node.  `link` prefers devices that are linked with each other (NVLink, XGMI), then
devices that are close on PCI (below one switch before below one host bridge), then devices of one NUMA node.  It is a
preference: a container gets its devices even where none are close.  What the host does not report counts for no device.
Of equal choices the one with the lowest indexes wins.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

    Position = tuple[str, list[str], list[str]]  # NUMA node, PCI path from the host bridge, indexes of linked devices

_MAX_FREE = 64  # of more free devices than these, only the first are compared
# A link counts more than any PCI path in common, and one step of a path more than the NUMA node.
_LINK, _STEP, _NUMA = 256, 2, 1


def choose(free: list[int], count: int, how: str, text: str, included: list[int] | None = None) -> list[int]:
    """Chooses `count` of the devices with the indexes `free`; gives their indexes in order.

    `how`: numa or link.  `text`: one line for each device of the kind, as shim.generate.topology writes it, or ''.
    `included`: devices of `free` that are chosen in any case, at most `count`.
    """
    lines = text.split("\n")
    included = included or []
    free = [*included, *(index for index in free if index not in included)]
    if not text or count >= len(free) or count > _MAX_FREE:
        return sorted(free[:count])
    positions = {index: _position(lines[index]) for index in free[:_MAX_FREE]}
    closeness: dict[tuple[int, int], int] = {}
    for first in positions:
        for second in positions:
            closeness[first, second] = (
                0 if first == second else _closeness(first, positions[first], second, positions[second], how)
            )
    starts = [included] if included else [[index] for index in positions]
    candidates = (_grow(start, count, list(positions), closeness) for start in starts)
    return min(candidates, key=_rank(closeness, list(positions)))


def numa_node(line: str) -> int | None:
    """The NUMA node in a device's line; None where the host does not report it."""
    numa = _position(line)[0]
    return int(numa) if numa else None


def pci_path(line: str) -> list[str]:
    """The PCI path in a device's line, from the host bridge to the device; [""] where the host does not report it."""
    return _position(line)[1]


def _position(line: str) -> Position:
    numa, pci_path, links = line.split("\t")
    return numa, pci_path.split("/"), links.split()


def _closeness(first: int, first_position: Position, second: int, second_position: Position, how: str) -> int:
    """How close two devices are: the higher, the closer."""
    numa = _NUMA if first_position[0] and first_position[0] == second_position[0] else 0
    if how == "numa":
        return numa
    common = 0
    for first_step, second_step in zip(first_position[1], second_position[1]):
        if not first_step or first_step != second_step:
            break
        common += 1
    linked = str(second) in first_position[2] or str(first) in second_position[2]
    return numa + _STEP * common + (_LINK if linked else 0)


def _grow(start: list[int], count: int, indexes: list[int], closeness: dict[tuple[int, int], int]) -> list[int]:
    """`count` devices, beginning with `start`: each time the device is added that is closest to those chosen so far."""
    chosen = list(start)
    gain = {index: sum(closeness[first, index] for first in start) for index in indexes if index not in start}
    while len(chosen) < count:
        best = max(gain, key=lambda index: (gain[index], -index))  # of equals the lowest index
        del gain[best]
        chosen.append(best)
        for index in gain:
            gain[index] += closeness[best, index]
    return sorted(chosen)


def _rank(
    closeness: dict[tuple[int, int], int], indexes: list[int]
) -> Callable[[list[int]], tuple[int, int, list[int]]]:
    """A sort key for choices: the closest devices first.

    Of equals, the choice comes first whose devices are the least close to the others, since those stay free together.
    Then the lowest indexes come first.
    """

    def rank(chosen: list[int]) -> tuple[int, int, list[int]]:
        inside = sum(closeness[first, second] for first in chosen for second in chosen)
        to_all = sum(closeness[first, second] for first in chosen for second in indexes)
        return -inside, to_all - inside, chosen

    return rank
