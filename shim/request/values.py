"""Readers of single values that requests have in common: each gives the value in normal form or raises RequestError.

A leaf of the request's table is a pair of functions: one that checks a JSON value and gives its normal form, one that reads
the text of a single-value annotation.  Pure; part of the create path.
"""

from __future__ import annotations

from shim import errors, jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List, Tuple

    Leaf = Tuple[Callable[[Any], Any], Callable[[str], Any]]

MAX_INT = (1 << 63) - 1


def wrong(value: Any, what: str, todo: str = "") -> errors.RequestError:
    """The error that a value, shortened to 80 characters, is or holds what it must not."""
    shown = repr(value)
    return errors.RequestError(f"{shown if len(shown) < 80 else shown[:77] + '...'} {what}", todo)


def text(value: Any, limit: int = 4096) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise wrong(value, "is not a text")
    if "\0" in value or len(value) > limit:
        raise wrong(value, f"holds a NUL, or more than {limit} characters")
    return value


def number(value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    if type(value) is not int:
        raise wrong(value, "is not a whole number")
    if not low <= value <= high:
        raise errors.RequestError(f"{value} is not between {low} and {high}")
    return value


def number_text(written: str) -> Any:
    """The number that a single-value annotation writes; what is none stays text, for the check to refuse."""
    digits = written[1:] if written.startswith("-") else written
    return int(written) if digits.isdigit() and digits.isascii() and len(digits) < 20 else written


def integer(low: int, high: int = MAX_INT) -> Leaf:
    """The leaf of a whole number."""
    return lambda value: number(value, low, high), number_text


def as_text(value: Any) -> str:
    """The text of a number or a text: quantities and names of devices may be written as either."""
    if type(value) in (int, float) or isinstance(value, jsontext.Number):  # a float: from YAML
        return str(value)
    return text(value)


def host_path(value: Any) -> str:
    """An absolute path on the host, without `..`."""
    path = text(value)
    if not path.startswith("/") or not path.isprintable() or ".." in path.split("/") or len(path) > 1024:
        raise wrong(value, "is no absolute path without '..'")
    return path


def listed(written: str) -> List[str]:
    """The items of a single-value annotation, which separates them with commas."""
    return [part.strip() for part in written.split(",")]
