"""The laws of Edits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim import edits as kinds
from shim.edits import EMPTY, Edits, merge

REPEATABLE = (kinds.DEVICE, kinds.HOOK)
ONCE = (kinds.ENV, kinds.NET_DEVICE, kinds.RDT, kinds.GID, kinds.RESOURCE, kinds.ANNOTATION)

keys = st.sampled_from(["a", "b", "/c", "/c/d"])
values = st.one_of(
    st.text("xy", max_size=2),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(keys, st.integers(0, 3), max_size=2),
)
items = st.tuples(st.sampled_from([*REPEATABLE, *ONCE, kinds.MOUNT]), keys, values, st.sampled_from(["one", "two"]))
some_edits = st.lists(items, max_size=8).map(Edits)


@given(some_edits)
def test_empty_is_the_identity(edits: Edits) -> None:
    assert merge(EMPTY, edits) == merge(edits, EMPTY) == merge(edits) == edits


def test_merging_nothing_gives_empty() -> None:
    assert merge() == EMPTY
    assert not EMPTY
    assert Edits([(kinds.ENV, "a", "1", "x")])


@given(some_edits, some_edits, some_edits)
def test_merge_is_associative(one: Edits, two: Edits, three: Edits) -> None:
    assert merge(merge(one, two), three) == merge(one, merge(two, three)) == merge(one, two, three)


@given(some_edits)
def test_merging_edits_with_themselves_repeats_only_devices_and_hooks(edits: Edits) -> None:
    twice = merge(edits, edits)
    for kind in (*ONCE, kinds.MOUNT):
        assert twice.of(kind) == edits.of(kind)
    for kind in REPEATABLE:
        assert twice.of(kind) == edits.of(kind) * 2


@given(st.lists(items, max_size=8), st.lists(items, max_size=8))
def test_a_later_value_takes_the_place_of_the_earlier_one(first: list[Any], second: list[Any]) -> None:
    """A model: the last value of a key counts. It stays where the key came first; a mount moves to the end."""
    merged = merge(Edits(first), Edits(second))
    every = first + second
    for kind in ONCE:
        of_kind = [item for item in every if item[0] == kind]
        expected = [
            [item for item in of_kind if item[1] == key][-1] for key in dict.fromkeys(item[1] for item in of_kind)
        ]
        assert merged.of(kind) == expected
    mounts = [item for item in every if item[0] == kinds.MOUNT]
    assert merged.of(kinds.MOUNT) == [
        item for n, item in enumerate(mounts) if all(later[1] != item[1] for later in mounts[n + 1 :])
    ]
    for kind in REPEATABLE:
        assert merged.of(kind) == [item for item in every if item[0] == kind]


@given(st.lists(items, max_size=8), st.lists(items, max_size=8))
def test_inputs_are_never_changed(first: list[Any], second: list[Any]) -> None:
    before = copy.deepcopy((first, second))
    one, two = Edits(first), Edits(second)
    kept = (one.items, two.items)
    merge(one, two)
    assert (first, second) == before
    assert (one.items, two.items) == kept


@given(some_edits, some_edits)
def test_equality_compares_items_and_order(one: Edits, two: Edits) -> None:
    assert (one == two) == (one.items == two.items)
    assert one != one.items


def test_edits_are_not_hashable() -> None:
    with pytest.raises(TypeError, match="not hashable"):
        hash(EMPTY)


def test_resources_are_keyed_by_controller_and_key() -> None:
    edits = Edits(
        [
            (kinds.RESOURCE, ("cpu", "quota"), 1, ""),
            (kinds.RESOURCE, ("cpu", "period"), 2, ""),
            (kinds.RESOURCE, ("cpu", "quota"), 3, ""),
        ]
    )
    assert [(key, value) for _, key, value, _ in edits.items] == [(("cpu", "quota"), 3), (("cpu", "period"), 2)]


def test_repr() -> None:
    assert repr(Edits([(kinds.GID, 5, None, "x")])) == "Edits([('additionalGid', 5, None, 'x')])"


def test_a_repeated_mount_moves_to_the_end() -> None:
    """Every other kind keeps its first place."""
    for kind, order in ((kinds.MOUNT, ["/b", "/a"]), (kinds.ENV, ["/a", "/b"])):
        edits = Edits([(kind, "/a", 1, ""), (kind, "/b", 2, ""), (kind, "/a", 3, "")])
        assert [(key, value) for _, key, value, _ in edits.items] == [(key, {"/a": 3, "/b": 2}[key]) for key in order]
