"""Reads values that only rare keys have: lists, objects, paths.  Each function gives the normal form of a value, or
raises RequestError.  Pure.
"""

from __future__ import annotations

from shim import errors, jsontext
from shim.pathtext import clean
from shim.request import quantity, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    from shim.shapes import Document

LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_MAX_ITEMS = 1024


def string(value: Any) -> str:
    """A text, which may be empty."""
    return value if value == "" and type(value) is str else values.text(value, 128 << 10)


def boolean(value: Any) -> bool:
    """true or false."""
    if type(value) is not bool:
        raise values.wrong_value(value, "is neither true nor false")
    return value


def boolean_text(text: str) -> Any:
    """The value of a single-value annotation that is true or false.  Other text stays as it is, so that the check
    refuses it."""
    return {"true": True, "false": False}.get(text, text)


FLAG = boolean, boolean_text  # an entry (shim.keys.common)


def listing(value: Any, item: Callable[[Any], Any], empty: bool = False) -> list[Any]:
    """A list, each item of which `item` checks.  `empty`: it may be empty."""
    if not isinstance(value, list):
        raise values.wrong_value(value, "is not a list")
    if not value and not empty:
        raise errors.RequestError("the list is empty", "leave the key out")
    if len(value) > _MAX_ITEMS:
        raise errors.RequestError(f"the list has {len(value)} items, more than {_MAX_ITEMS}")
    return [item(member) for member in value]


def json_text(text: str) -> Any:
    """The value of a single-value annotation that is JSON.  Other text stays as it is, so that the check refuses it."""
    try:
        value = jsontext.loads(text.encode("utf-8", "surrogatepass"), unique=True)
        jsontext.check_value(value)
        return value
    except errors.JsonError:
        return text


def object_of(value: Any, members: dict[str, Callable[[Any], Any]], needed: tuple[str, ...]) -> Document:
    """An object with no other members than `members`, each checked by its function.

    `needed`: the members that must be there.  Raises RequestError, which names the member.
    """
    if not isinstance(value, dict):
        raise values.wrong_value(value, "is not an object")
    result = {}
    for key, item in value.items():
        if key not in members:
            raise errors.RequestError(f"unknown key {key!r}", f"known here: {', '.join(sorted(members))}")
        try:
            result[key] = members[key](item)
        except errors.RequestError as error:
            raise error.within(key) from None
    for key in needed:
        if key not in result:
            raise errors.RequestError(f"has no {key!r}")
    return result


def mapping(value: Any, name: Callable[[str], str], item: Callable[[Any], Any]) -> Document:
    """An object whose keys are free.  `name` checks a key and gives its normal form, `item` checks a value."""
    if not isinstance(value, dict):
        raise values.wrong_value(value, "is not an object")
    result: Document = {}
    for key, member in value.items():
        normal = name(key)
        if normal in result:
            raise errors.RequestError(f"{key!r} is the second key that means {normal!r}", "remove one of them")
        try:
            result[normal] = item(member)
        except errors.RequestError as error:
            raise error.within(key) from None
    return result


def path(value: Any) -> str:
    """An absolute path without `..`, doubled slashes, or a slash at the end."""
    text = values.text(value)
    if not text.startswith("/") or clean(text) != text or not text.isprintable():
        raise values.wrong_value(
            value, "is not a plain absolute path", "write it without .., // and a slash at the end"
        )
    return text


def amount(value: Any) -> int:
    """A number of bytes, from a number or a quantity."""
    if type(value) is int or isinstance(value, jsontext.Number):
        value = str(value)
    return quantity.scaled(values.text(value, 100))


def size(value: Any) -> int:
    """As `amount`, but not 0."""
    number = amount(value)
    if not number:
        raise errors.RequestError("a size of 0 is no limit", "leave the key out")
    return number
