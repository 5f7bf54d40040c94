"""The ids of a rootless container, from tables of subuid files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.bundle import rootless

FILE = """\
alice:100000:65536
bob:165536:65536
# a remark
1000:300000:1000

alice:400000:10
broken:1
broken:x:5
broken:-1:5
broken:5:0
huge:4294967290:100
carol:1_0:5
carol:\u0661\u0662:5
dave : 7 : 7
:9:9
alice:500000:1:extra
"""


@pytest.mark.parametrize(
    ("owners", "found"),
    [
        (["bob"], [(165536, 65536)]),
        (["alice"], [(100000, 65536), (400000, 10)]),
        (["1000"], [(300000, 1000)]),
        (["1000", "alice"], [(100000, 65536), (300000, 1000), (400000, 10)]),
        (["nobody"], []),
        ([], []),
        (["broken"], []),
        (["huge"], []),
        (["carol"], []),
        (["dave"], []),
        ([""], []),
        (["# a remark"], []),
    ],
)
def test_ranges(owners: list[str], found: list[tuple[int, int]]) -> None:
    assert rootless.ranges(FILE, owners) == found


@pytest.mark.parametrize(
    ("own", "lent", "mapped"),
    [
        (1000, [], [(0, 1000, 1)]),
        (1000, [(100000, 65536)], [(0, 1000, 1), (1, 100000, 65536)]),
        (1000, [(100000, 10), (200000, 20)], [(0, 1000, 1), (1, 100000, 10), (11, 200000, 20)]),
        (1000, [(1000, 1)], [(0, 1000, 1)]),  # himself
        (1000, [(999, 3)], [(0, 1000, 1), (1, 999, 1), (2, 1001, 1)]),  # around himself
        (1000, [(5, 10), (10, 10)], [(0, 1000, 1), (1, 5, 10), (11, 15, 5)]),  # one into the other
        (1000, [(5, 10), (5, 10)], [(0, 1000, 1), (1, 5, 10)]),
        (1000, [(0, 4294967295)], [(0, 1000, 1), (1, 0, 1000), (1001, 1001, 4294966294)]),
        (0, [(100000, 65536)], [(0, 0, 1), (1, 100000, 65536)]),
    ],
)
def test_mappings(own: int, lent: list[tuple[int, int]], mapped: list[tuple[int, int, int]]) -> None:
    assert [(each["containerID"], each["hostID"], each["size"]) for each in rootless.mappings(own, lent)] == mapped


@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=8))
def test_no_id_is_mapped_twice(own: int, lent: list[tuple[int, int]]) -> None:
    made = rootless.mappings(own, lent)
    for side in ("containerID", "hostID"):
        ids = [number for each in made for number in range(each[side], each[side] + each["size"])]
        assert len(ids) == len(set(ids))
    hosts = {number for each in made for number in range(each["hostID"], each["hostID"] + each["size"])}
    assert hosts == {own} | {number for first, count in lent for number in range(first, first + count)}


def test_a_map_has_at_most_340_lines() -> None:
    assert len(rootless.mappings(1, [(number * 10, 2) for number in range(1, 1000)])) == rootless.MAX_LINES


def test_ids_in_a_map() -> None:
    ids = rootless.Ids(rootless.of_map("         0       1000          1\n         1     100000      65536\n"))
    assert 0 in ids and 65536 in ids and 65537 not in ids and -1 not in ids and "0" not in ids
    assert 5 not in rootless.Ids(rootless.mappings(1000, []))
    assert 4294967294 in rootless.Ids(rootless.of_map("0 0 4294967295"))


def test_a_missing_subuid_file_gives_no_ranges(tmp_path: Path) -> None:
    assert rootless.read(str(tmp_path / "subuid")) == "" and rootless.read(str(tmp_path)) == ""
    (tmp_path / "subuid").write_bytes(b"\xffbob:1:2\nbob:3:4\n")
    assert rootless.ranges(rootless.read(str(tmp_path / "subuid")), ["bob"]) == [(3, 4)]
