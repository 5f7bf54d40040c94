"""Free devices that are neighbours: `resources.gpu.prefer`.  Pure; part of a create that asks for it.

`numa`: of one memory node.  `link`: linked with each other (NVLink, XGMI), else near each other on PCI, below one switch
rather than below one host bridge, else of one memory node.  A wish, never a condition: what the host does not say makes
no difference, and of equal choices the one with the lowest indexes is taken.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Tuple

    Place = Tuple[str, List[str], List[str]]  # memory node, way through PCI, places of linked devices

_MOST = 64  # of more free devices than this the first ones are looked at
_LINK, _STEP, _NUMA = 256, 2, 1  # a link counts more than any way through PCI, and that more than the memory node


def choose(free: List[int], count: int, how: str, text: str) -> List[int]:
    """`count` of the devices at the places `free`, in order.  `text`: a line for each place, as shim.generate.topology
    writes it, or ''."""
    lines = text.split("\n")
    if not text or count >= len(free) or count > _MOST:
        return free[:count]
    places = {number: _place(lines[number]) for number in free[:_MOST]}
    near: Dict[Tuple[int, int], int] = {}
    for one in places:
        for other in places:
            near[one, other] = 0 if one == other else _closeness(one, places[one], other, places[other], how)
    return min((_grown(start, count, list(places), near) for start in places), key=_rank(near, list(places)))


def _place(line: str) -> Place:
    numa, way, links = line.split("\t")
    return numa, way.split("/"), links.split()


def _closeness(one: int, here: Place, other: int, there: Place, how: str) -> int:
    numa = _NUMA if here[0] and here[0] == there[0] else 0
    if how == "numa":
        return numa
    common = 0
    for mine, theirs in zip(here[1], there[1]):
        if not mine or mine != theirs:
            break
        common += 1
    return numa + _STEP * common + (_LINK if str(other) in here[2] or str(one) in there[2] else 0)


def _grown(start: int, count: int, places: List[int], near: Dict[Tuple[int, int], int]) -> List[int]:
    """`start`, and one after another the device that is nearest to all taken so far, the lowest of equals."""
    chosen = [start]
    gain = {place: near[start, place] for place in places if place != start}
    while len(chosen) < count:
        best = max(gain, key=lambda place: (gain[place], -place))
        del gain[best]
        chosen.append(best)
        for place in gain:
            gain[place] += near[best, place]
    return sorted(chosen)


def _rank(near: Dict[Tuple[int, int], int], places: List[int]) -> Callable[[List[int]], Tuple[int, int, List[int]]]:
    """Sorts the nearest first; of equals that which breaks up the least of what stays free, then the lowest."""

    def rank(chosen: List[int]) -> Tuple[int, int, List[int]]:
        inside = sum(near[one, other] for one in chosen for other in chosen)
        return -inside, sum(near[one, other] for one in chosen for other in places) - inside, chosen

    return rank
