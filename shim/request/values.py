"""Checks of single values of a request.  Each gives the value in normal form, or raises RequestError.

`number_text` and `split_list` make a JSON value of the text of a single-value annotation.  Pure; part of the
create path.
"""

from __future__ import annotations

from shim import errors, jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List

MAX_INT = (1 << 63) - 1


def wrong_value(value: Any, what: str, todo: str = "") -> errors.RequestError:
    """An error that begins with the value, shortened to 80 characters.  `what`: what is wrong with it."""
    shown = repr(value)
    return errors.RequestError(f"{shown if len(shown) < 80 else shown[:77] + '...'} {what}", todo)


def text(value: Any, limit: int = 4096) -> str:
    """A text of 1 to `limit` characters, without NUL."""
    if not isinstance(value, str) or not value:
        raise wrong_value(value, "is not a text")
    if "\0" in value or len(value) > limit:
        raise wrong_value(value, f"holds a NUL, or more than {limit} characters")
    return value


def number(value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    if type(value) is not int:
        raise wrong_value(value, "is not a whole number")
    if not low <= value <= high:
        raise errors.RequestError(f"{value} is not between {low} and {high}")
    return value


def number_text(written: str) -> Any:
    """The number in a single-value annotation.  Other text stays as it is, so that the check refuses it."""
    digits = written[1:] if written.startswith("-") else written
    return int(written) if digits.isdigit() and digits.isascii() and len(digits) < 20 else written


def integer(low: int, high: int = MAX_INT) -> Callable[[Any], int]:
    """Reads a whole number from `low` to `high`."""
    return lambda value: number(value, low, high)


def word(*known: str) -> Callable[[Any], str]:
    """Reads a value that is one of some words."""

    def read(value: Any) -> str:
        if value not in known:
            raise wrong_value(value, f"is not one of {', '.join(known)}")
        return str(value)

    return read


def as_text(value: Any) -> str:
    """A text, or a number as text: quantities and names of devices can be written as either."""
    if type(value) in (int, float) or isinstance(value, jsontext.Number):  # only YAML gives floats
        return str(value)
    return text(value)


def host_path(value: Any) -> str:
    """An absolute path on the host, without `..`."""
    path = text(value)
    if not path.startswith("/") or not path.isprintable() or ".." in path.split("/") or len(path) > 1024:
        raise wrong_value(value, "is no absolute path without '..'")
    return path


def split_list(written: str) -> List[str]:
    """The items of a single-value annotation, which are separated by commas."""
    return [part.strip() for part in written.split(",")]
