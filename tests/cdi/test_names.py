"""Qualified device names (CDI SPEC.md, "Kind" and "CDI Devices"; CDI Go library, pkg/parser/parser.go)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cdi import names
from shim.errors import CdiError

VALID = {
    "valid, plain": ("vendor.com/class=device", ("vendor.com", "class", "device")),
    "valid, GPU index": ("nvidia.com/gpu=0", ("nvidia.com", "gpu", "0")),
    "valid, MIG index": ("nvidia.com/gpu=0:1", ("nvidia.com", "gpu", "0:1")),
    "valid, UUID": ("nvidia.com/gpu=GPU-12ab-34", ("nvidia.com", "gpu", "GPU-12ab-34")),
    "valid, one character each": ("v/c=d", ("v", "c", "d")),
    "valid, dots in a row in the vendor": ("v..com/c=d", ("v..com", "c", "d")),
    "valid, underscores": ("v_x/c_y=d_z", ("v_x", "c_y", "d_z")),
    "valid, a vendor of 400 characters": ("v" * 400 + "/c=d", ("v" * 400, "c", "d")),
    "valid, capital letters": ("Vendor/Class=Device", ("Vendor", "Class", "Device")),
    "valid, a digit ends vendor and class": ("v1/c2=3", ("v1", "c2", "3")),
    "valid, a dot in the class": ("v.com/c.d=e", ("v.com", "c.d", "e")),
}
INVALID = {
    "invalid, empty": "",
    "invalid, device alone": "device",
    "invalid, no class": "vendor.com=device",
    "invalid, no vendor": "/class=device",
    "invalid, no device": "vendor.com/class=",
    "invalid, no equals sign": "vendor.com/class",
    "invalid, a path": "/dev/null",
    "invalid, vendor starts with a digit": "1vendor/class=device",
    "invalid, vendor starts with a dash": "-vendor/class=device",
    "invalid, vendor ends with a dot": "vendor./class=device",
    "invalid, class starts with a digit": "vendor/1class=device",
    "invalid, class ends with an underscore": "vendor/class_=device",
    "invalid, second slash": "vendor/cla/ss=device",
    "invalid, device starts with a colon": "vendor/class=:device",
    "invalid, device ends with a dash": "vendor/class=device-",
    "invalid, second equals sign": "vendor/class=dev=ice",
    "invalid, blank in the device": "vendor/class=dev ice",
    "invalid, colon in the vendor": "ven:dor/class=device",
    "invalid, a letter that is not ASCII": "véndor/class=device",
    "invalid, a digit that is not ASCII": "vendor/class=device١",
    "invalid, newline": "vendor/class=device\n",
}


@pytest.mark.parametrize(("name", "parts"), VALID.values(), ids=VALID)
def test_valid_names_split_at_the_first_equals_and_slash(name: str, parts: tuple[str, str, str]) -> None:
    assert names.parse_qualified(name) == parts
    assert names.kind(name) == f"{parts[0]}/{parts[1]}"


@pytest.mark.parametrize("name", INVALID.values(), ids=INVALID)
def test_invalid_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(CdiError) as caught:
        names.parse_qualified(name)
    assert name.replace("\n", " ") in str(caught.value)


FILE_NAMES = {
    "valid, for a kind": (("vendor.com/class",), "vendor.com-class"),
    "valid, transient": (("vendor.com/class", "pod1"), "vendor.com-class_pod1"),
    "valid, slashes of the id become underscores": (("v/c", "a/b/c"), "v-c_a_b_c"),
}


@pytest.mark.parametrize(("arguments", "name"), FILE_NAMES.values(), ids=FILE_NAMES)
def test_file_names(arguments: tuple[str, ...], name: str) -> None:
    assert names.file_name(*arguments) == name


@pytest.mark.parametrize("kind", ["", "v", "v/", "/c", "../x/c", "1v/c", "v/c/d"])
def test_a_file_name_needs_a_kind(kind: str) -> None:
    with pytest.raises(CdiError):
        names.file_name(kind)


@given(st.text(max_size=40))
def test_any_text_is_an_error_or_splits_into_parts_that_join_again(text: str) -> None:
    try:
        vendor, class_, device = names.parse_qualified(text)
    except CdiError:
        return
    assert f"{vendor}/{class_}={device}" == text
