"""Which free devices are taken when a request prefers neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.gpu import neighbours

# Two processors with two switches each and two GPUs below each; of the first processor 0 and 3, 1 and 2 have a link.
EIGHT = "".join(
    f"{n // 4}\tpci0000:{n // 4}0/0000:{n // 4}0:0{n // 2 % 2}.0/0000:{n}5:00.0\t{links}\n"
    for n, links in enumerate(["3", "2", "1", "0", "", "", "", ""])
)
ALL = list(range(8))


@pytest.mark.parametrize(
    ("free", "count", "how", "taken"),
    [
        (ALL, 2, "link", [0, 3]),
        (ALL, 2, "numa", [0, 1]),
        (ALL, 8, "link", ALL),
        ([1, 4, 5, 7], 2, "link", [4, 5]),
        ([1, 4, 5, 7], 2, "numa", [4, 5]),
        ([0, 1, 2, 4, 5, 6, 7], 3, "link", [0, 1, 2]),
        ([0, 1, 2, 5, 6, 7], 4, "numa", [0, 1, 2, 5]),
        ([3, 4, 6], 2, "link", [4, 6]),
        ([0, 7], 2, "link", [0, 7]),
        # free GPUs stay together: take a single one, then a pair, before a part of four
        ([0, 4, 5, 6, 7], 1, "numa", [0]),
        ([0, 1, 4, 5, 6, 7], 2, "numa", [0, 1]),
        ([2, 3, 4, 6, 7], 2, "numa", [2, 3]),
        ([4, 6, 7], 1, "link", [4]),
        ([], 1, "link", []),
    ],
)
def test_neighbours(free: list[int], count: int, how: str, taken: list[int]) -> None:
    assert neighbours.choose(free, count, how, EIGHT) == taken


@pytest.mark.parametrize("how", ["numa", "link"])
@pytest.mark.parametrize("text", ["", "\t\t\n" * 8, "0\t\t\n" * 8, "0\tpci0000:00/0000:01:00.0\t\n" * 8])
def test_unknown_topology_makes_no_difference(how: str, text: str) -> None:
    assert neighbours.choose([1, 3, 4, 6], 3, how, text) == [1, 3, 4]


def test_beyond_the_limit_devices_are_taken_in_order() -> None:
    text = "".join(f"{n % 2}\t\t\n" for n in range(500))
    assert neighbours.choose(list(range(500)), 2, "numa", text) == [0, 2]
    assert neighbours.choose(list(range(500)), 400, "numa", text) == list(range(400))


@given(st.lists(st.sampled_from("012"), min_size=2, max_size=12), st.data())
def test_one_memory_node_where_one_has_enough(nodes: Sequence[str], data: st.DataObject) -> None:
    text = "".join(f"{node}\t\t\n" for node in nodes)
    free = sorted(data.draw(st.sets(st.sampled_from(range(len(nodes))), min_size=1)))
    count = data.draw(st.integers(1, len(free)))
    taken = neighbours.choose(free, count, "numa", text)
    assert len(taken) == count and set(taken) <= set(free) and taken == sorted(taken)
    assert taken == neighbours.choose(free, count, "numa", text)
    if any(sum(nodes[n] == node for n in free) >= count for node in "012"):
        assert len({nodes[n] for n in taken}) == 1


@given(st.sets(st.sampled_from(range(8)), min_size=2), st.data())
def test_no_choice_is_nearer(free: set[int], data: st.DataObject) -> None:
    """For pairs only: a choice that adds one device after another is the best for these."""
    lines = [neighbours._position(line) for line in EIGHT.split("\n")[:8]]

    def closeness(pair: Sequence[int]) -> int:
        return neighbours._closeness(pair[0], lines[pair[0]], pair[1], lines[pair[1]], "link")

    taken = neighbours.choose(sorted(free), 2, "link", EIGHT)
    assert closeness(taken) == max(map(closeness, itertools.combinations(sorted(free), 2)))
