"""The error family: one sentence for a person, context added outward."""

from __future__ import annotations

import pytest

from shim import errors

FAMILY = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.ChandlerError) and value is not errors.ChandlerError
]


def test_what_and_todo_make_one_sentence() -> None:
    assert str(errors.ChandlerError("a is wrong")) == "a is wrong"
    assert str(errors.ChandlerError("a is wrong", "write b")) == "a is wrong; write b"


def test_never_more_than_one_line() -> None:
    assert str(errors.HostError("a\nb\n", "c\nd")) == "a b ; c d"


@pytest.mark.parametrize("kind", FAMILY)
def test_context_is_put_before_and_keeps_the_rest(kind: type[errors.ChandlerError]) -> None:
    inner = kind("it is wrong", "mend it")
    outer = inner.within("key").within("file")
    assert type(outer) is kind
    assert (outer.what, outer.todo) == ("file: key: it is wrong", "mend it")
    assert (inner.what, inner.todo) == ("it is wrong", "mend it"), "the error inside is not changed"


def test_the_family_is_not_a_value_error() -> None:
    """Callers that catch ValueError for the interpreter's own errors would swallow ours."""
    assert len(FAMILY) >= 8
    assert not [kind for kind in FAMILY if issubclass(kind, (ValueError, OSError, RuntimeError))]
