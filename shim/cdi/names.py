"""Reads CDI names, `vendor/class=device`, and checks their parts.

Source: CDI SPEC.md, "Kind" and "CDI Devices".  Part of the create path: imports only shim.errors.
"""

from __future__ import annotations

from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Tuple

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ALPHANUMERIC = _LETTERS + "0123456789"

# part       first character   last character   every character
_RULES = {
    "vendor": (_LETTERS, _ALPHANUMERIC, _ALPHANUMERIC + "_.-"),
    "class": (_LETTERS, _ALPHANUMERIC, _ALPHANUMERIC + "_.-"),
    "device": (_ALPHANUMERIC, _ALPHANUMERIC, _ALPHANUMERIC + "_.-:"),
}


def _check(part: str, value: str) -> None:
    """Raises CdiError if `value` cannot be the `part` (vendor, class or device) of a name."""
    first, last, every = _RULES[part]
    if not value:
        raise errors.CdiError(f"{part} name is empty")
    if value[0] not in first:
        what = "a letter" if first is _LETTERS else "a letter or digit"
        raise errors.CdiError(f'{part} name "{value}" does not start with {what}')
    if value[-1] not in last:
        raise errors.CdiError(f'{part} name "{value}" does not end with a letter or digit')
    rest = value.lstrip(every)  # what is left starts with the first character that is not allowed
    if rest:
        raise errors.CdiError(f'{part} name "{value}" holds the character {rest[0]!r}')


def check_vendor(value: str) -> None:
    """Raises CdiError unless `value` is a vendor name."""
    _check("vendor", value)


def check_class(value: str) -> None:
    """Raises CdiError unless `value` is a class name."""
    _check("class", value)


def check_device(value: str) -> None:
    """Raises CdiError unless `value` is a device name."""
    _check("device", value)


def split_kind(kind: str) -> Tuple[str, str]:
    """`vendor/class` as (vendor, class), split at the first slash.

    Raises CdiError if there is no slash or a part is empty; the characters are not checked.
    """
    vendor, _, class_ = kind.partition("/")
    if not vendor or not class_:
        raise errors.CdiError(f'"{kind}" is not of the form vendor/class')
    return vendor, class_


def parse_qualified(name: str) -> Tuple[str, str, str]:
    """`vendor/class=device` as (vendor, class, device).

    Raises CdiError if a part is missing (CDI calls such a name unqualified) or is not allowed.
    """
    kind_, equals, device = name.partition("=")
    vendor, slash, class_ = kind_.partition("/")
    if not (vendor and slash and class_ and equals and device):
        raise errors.CdiError(f'unqualified device "{name}"', "write vendor/class=device")
    for part, value in (("vendor", vendor), ("class", class_), ("device", device)):
        try:
            _check(part, value)
        except errors.CdiError as error:
            raise error.within(f'invalid device "{name}"') from None
    return vendor, class_, device


def file_name(kind: str, transient_id: str = "") -> str:
    """The name, without suffix, of a CDI file for the devices of a kind, or for one transient device of that kind.

    Raises CdiError if `kind` is not a kind.  Source: CDI Go library, pkg/cdi/spec.go (GenerateTransientSpecName).
    """
    vendor, class_ = split_kind(kind)
    check_vendor(vendor)
    check_class(class_)
    return f"{vendor}-{class_}" + (f"_{transient_id.replace('/', '_')}" if transient_id else "")


def kind(name: str) -> str:
    """The `vendor/class` of a qualified name.  Raises CdiError if the name is not qualified."""
    vendor, class_, _ = parse_qualified(name)
    return f"{vendor}/{class_}"
