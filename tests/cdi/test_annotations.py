"""Annotations `cdi.k8s.io/*` (CDI Go library, pkg/cdi/annotations.go)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cdi import annotations as cdi
from shim.errors import CdiError

KEYS = {
    "valid, plain": ("vendor.plugin", "gpu0", "cdi.k8s.io/vendor.plugin_gpu0"),
    "valid, slashes of the id become underscores": ("p", "a/b/c", "cdi.k8s.io/p_a_b_c"),
    "valid, underscore in the plugin": ("p_q", "d", "cdi.k8s.io/p_q_d"),
    "valid, as long as may be": ("p" * 31, "d" * 31, "cdi.k8s.io/" + "p" * 31 + "_" + "d" * 31),
}
BAD_KEYS = {
    "invalid, no plugin": ("", "d"),
    "invalid, no device id": ("p", ""),
    "invalid, one character too long": ("p" * 32, "d" * 31),
    "invalid, slash in the plugin": ("p/q", "d"),
    "invalid, starts with a dash": ("-p", "d"),
    "invalid, ends with a slash": ("p", "d/"),
    "invalid, blank inside": ("p", "a b"),
    "invalid, colon inside": ("p", "a:b"),
}
VALUES = {
    "valid, one": (["v.com/c=d"], "v.com/c=d"),
    "valid, two": (["v.com/c=d", "w/c=0:1"], "v.com/c=d,w/c=0:1"),
    "valid, twice the same": (["v/c=d", "v/c=d"], "v/c=d,v/c=d"),
}
PARSED = {
    "valid, none": ({}, []),
    "valid, foreign keys only": ({"io.kubernetes.cri": "x", "cdi.k8s.io.example/x": ""}, []),
    "valid, one": ({"cdi.k8s.io/p_d": "v/c=d"}, ["v/c=d"]),
    "valid, several in one value": ({"cdi.k8s.io/p_d": "v/c=d,v/c=e"}, ["v/c=d", "v/c=e"]),
    "valid, keys in sorted order": ({"cdi.k8s.io/b": "v/c=2", "cdi.k8s.io/a": "v/c=1"}, ["v/c=1", "v/c=2"]),
    "valid, duplicates kept": ({"cdi.k8s.io/b": "v/c=1", "cdi.k8s.io/a": "v/c=1"}, ["v/c=1", "v/c=1"]),
    "valid, any key with the prefix": ({"cdi.k8s.io/": "v/c=1"}, ["v/c=1"]),
}
BAD_VALUES = {
    "invalid, empty value": "",
    "invalid, trailing comma": "v/c=d,",
    "invalid, leading comma": ",v/c=d",
    "invalid, blank after the comma": "v/c=d, v/c=e",
    "invalid, unqualified": "gpu0",
    "invalid, one of two": "v/c=d,gpu0",
    "invalid, a device path": "/dev/null",
}


@pytest.mark.parametrize(("plugin", "device_id", "key"), KEYS.values(), ids=KEYS)
def test_keys(plugin: str, device_id: str, key: str) -> None:
    assert cdi.key(plugin, device_id) == key


@pytest.mark.parametrize(("plugin", "device_id"), BAD_KEYS.values(), ids=BAD_KEYS)
def test_bad_keys(plugin: str, device_id: str) -> None:
    with pytest.raises(CdiError):
        cdi.key(plugin, device_id)


@pytest.mark.parametrize(("devices", "value"), VALUES.values(), ids=VALUES)
def test_values_and_back(devices: list[str], value: str) -> None:
    assert cdi.value(devices) == value
    assert cdi.parse({"cdi.k8s.io/p_d": value}) == devices


@pytest.mark.parametrize("devices", [["gpu0"], ["v/c=d", ""], ["v/c=d "], ["v/c"]])
def test_a_value_is_made_of_qualified_names_only(devices: list[str]) -> None:
    with pytest.raises(CdiError):
        cdi.value(devices)


@pytest.mark.parametrize(("given_", "devices"), PARSED.values(), ids=PARSED)
def test_parse(given_: dict[str, str], devices: list[str]) -> None:
    before = dict(given_)
    assert cdi.parse(given_) == devices
    assert given_ == before


@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES)
def test_one_bad_value_fails_everything_and_is_named(value: str) -> None:
    with pytest.raises(CdiError, match="cdi.k8s.io/bad"):
        cdi.parse({"cdi.k8s.io/a": "v/c=d", "cdi.k8s.io/bad": value})


def test_a_value_that_is_no_string_is_an_error() -> None:
    with pytest.raises(CdiError, match="not a string"):
        cdi.parse({"cdi.k8s.io/a": 3})


@given(st.dictionaries(st.text(max_size=9).map(lambda name: "cdi.k8s.io/" + name), st.text(max_size=30), max_size=4))
def test_any_annotation_gives_devices_or_an_error(given_: dict[str, str]) -> None:
    try:
        devices = cdi.parse(given_)
    except CdiError:
        return
    assert ",".join(devices) == ",".join(given_[key] for key in sorted(given_))
