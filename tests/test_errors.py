"""The error family: one sentence for a person, context added outward."""

from __future__ import annotations

import pytest

from shim import errors

NAMES = [
    "JsonError",
    "RequestError",
    "PolicyError",
    "CdiError",
    "TrustError",
    "ConfigError",
    "HostError",
    "BundleError",
]
FAMILY: list[type[errors.ChandlerError]] = [getattr(errors, name) for name in NAMES]


def test_an_error_is_one_sentence_of_what_and_todo() -> None:
    assert str(errors.ChandlerError("a is wrong")) == "a is wrong"
    assert str(errors.ChandlerError("a is wrong", "write b")) == "a is wrong; write b"


def test_an_error_is_one_line() -> None:
    assert str(errors.HostError("a\nb\n", "c\nd")) == "a b ; c d"


@pytest.mark.parametrize("kind", FAMILY)
def test_context_is_put_before_and_keeps_the_rest(kind: type[errors.ChandlerError]) -> None:
    inner = kind("it is wrong", "mend it")
    outer = inner.within("key").within("file")
    assert type(outer) is kind
    assert (outer.what, outer.todo) == ("file: key: it is wrong", "mend it")
    assert (inner.what, inner.todo) == ("it is wrong", "mend it"), "the error inside is not changed"


def test_the_family_is_not_a_value_error() -> None:
    """Code that catches ValueError of the interpreter would hide Chandler's errors."""
    assert not [kind for kind in FAMILY if issubclass(kind, (ValueError, OSError, RuntimeError))]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_always_gives_the_same_class(name: str) -> None:
    kind = getattr(errors, name)
    assert kind is getattr(errors, name)
    assert issubclass(kind, errors.ChandlerError)
    assert (kind.__name__, kind.__module__) == (name, "shim.errors")
    assert kind.__doc__


def test_no_other_name_is_an_error_class() -> None:
    with pytest.raises(AttributeError):
        getattr(errors, "NoSuchError")  # noqa: B009
