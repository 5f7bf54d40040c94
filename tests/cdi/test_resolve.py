"""Resolving names to edits (CDI SPEC.md, "OCI Edits" and "Error Handling"; CDI Go library, pkg/cdi/cache.go)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cdi.resolve import resolve
from shim.edits import EMPTY, Edits, merge
from shim.errors import CdiError

Edit = tuple[str, Any, Any, str]  # kind, key, value, origin


def env(name: str, value: str = "1") -> Edit:
    return ("env", name, value, "test")


FILES = {
    "a": (("a", (env("COMMON_A"),), (env("A0"),))),
    "a2": (("a", (env("COMMON_A"),), (env("A2"),))),
    "b": (("b", (env("COMMON_B"),), (env("B0"),))),
}
CASES = {
    "valid, nothing": ([], []),
    "valid, a file's own edits come before its first device": (["a"], ["COMMON_A", "A0"]),
    "valid, later devices of the file bring only their own": (["a", "a2"], ["COMMON_A", "A0", "A2"]),
    "valid, in the order asked": (["a2", "a"], ["COMMON_A", "A2", "A0"]),
    "valid, the order of files is that of their first devices": (
        ["b", "a", "a2"],
        ["COMMON_B", "B0", "COMMON_A", "A0", "A2"],
    ),
    "valid, interleaved": (["a", "b", "a2"], ["COMMON_A", "A0", "COMMON_B", "B0", "A2"]),
    "valid, a repeated name counts once": (["a", "a", "a"], ["COMMON_A", "A0"]),
}
MISSING = {
    "invalid, one unknown": (["x"], "unresolvable CDI devices x"),
    "invalid, all unknown ones in the order asked": (["y", "a", "x"], "unresolvable CDI devices y, x"),
    "invalid, an unknown one named once": (["x", "x"], "unresolvable CDI devices x"),
    "invalid, the empty name": ([""], 'unresolvable CDI devices ""'),
}


@pytest.mark.parametrize(("names", "variables"), CASES.values(), ids=CASES)
def test_order(names: list[str], variables: list[str]) -> None:
    assert [key for _, key, _, _ in resolve(names, FILES.get).items] == variables


@pytest.mark.parametrize(("names", "sentence"), MISSING.values(), ids=MISSING)
def test_every_missing_name_is_reported(names: list[str], sentence: str) -> None:
    with pytest.raises(CdiError) as caught:
        resolve(names, FILES.get)
    assert str(caught.value) == sentence


def test_the_device_wins_over_its_file() -> None:
    found = {"d": ("f", (env("X", "file"),), (env("X", "device"),))}
    assert resolve(["d"], found.get) == Edits([env("X", "device")])


kinds = st.sampled_from(["env", "device", "mount", "hook", "netDevice", "additionalGid", "intelRdt"])
edits = st.lists(
    st.tuples(
        kinds,
        st.sampled_from("abc"),
        st.dictionaries(st.sampled_from("xy"), st.integers(0, 3), max_size=2),
        st.just("o"),
    )
).map(Edits)


@given(edits, edits, edits)
def test_merge_is_associative_with_the_empty_edits_as_identity(one: Edits, two: Edits, three: Edits) -> None:
    before = copy.deepcopy([one.items, two.items, three.items])
    assert merge(merge(one, two), three) == merge(one, merge(two, three)) == merge(one, two, three)
    assert merge(EMPTY, one) == merge(one, EMPTY) == one
    assert [one.items, two.items, three.items] == before


@given(st.lists(st.sampled_from(sorted(FILES)), max_size=6))
def test_resolving_is_a_function_of_the_first_mention_of_each_name(names: list[str]) -> None:
    assert resolve(names, FILES.get) == resolve(list(dict.fromkeys(names)), FILES.get)


@given(st.lists(st.text(max_size=5), min_size=1))
def test_unknown_names_are_an_error_that_names_them(names: list[str]) -> None:
    with pytest.raises(CdiError) as caught:
        resolve(names, lambda name: None)
    assert all(" ".join(name.split("\n")) in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (("eth0", "net0"), ("eth1", "net0"), r"interfaces eth0 \(one\) and eth1 \(other\) cannot both be net0"),
        (("eth0", "net0"), ("eth0", "net1"), r"interface eth0 cannot be both net0 \(one\) and net1 \(other\)"),
        (("eth0", "net0"), ("eth1", "net1"), ""),
        (("eth0", "net0"), ("eth0", "net0"), ""),
    ],
)
def test_network_devices_that_exclude_each_other(one: tuple[str, str], other: tuple[str, str], words: str) -> None:
    files = {name: (name, (), (("netDevice", *device, name),)) for name, device in (("one", one), ("other", other))}
    assert resolve(["one"], files.get).items and resolve(["other"], files.get).items
    if words:
        with pytest.raises(CdiError, match=words):
            resolve(["one", "other"], files.get)
    else:
        assert {key: value for _, key, value, _ in resolve(["one", "other"], files.get).items} == dict([one, other])
