"""Reads and writes JSON with only the interpreter's C scanner and encoder (the module _json).

`import json` costs as much as the interpreter's own start, because it imports re, enum and functools.  The C code costs
nothing, but leaves some work to its caller: blanks around the text, text after the value, one error class for all that
can be wrong.  This module also refuses NaN, and keeps numbers that are not integers as they were written (class
Number).  A damaged text is parsed again with `json`, only to say where it is damaged.  Part of the create path.
"""

from __future__ import annotations

import sys

from shim import errors
from shim.errors import ChandlerError

try:
    from _json import encode_basestring_ascii, make_encoder, make_scanner
except ImportError:  # an interpreter without the C accelerator: slower, the same results
    make_scanner = None  # type: ignore[assignment, misc, unused-ignore]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, NoReturn, Tuple

    from shim.shapes import Document

    Encode = Callable[[Any], str]

MAX_DEPTH = 64
_BLANKS = " \t\n\r"


class Number:
    """A JSON number with a fraction or an exponent, as it was written."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Number) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return self.text


def _refuse_constant(name: str) -> NoReturn:
    raise errors.JsonError(f"{name} is not JSON")


def _unique(pairs: List[Tuple[str, Any]]) -> Document:
    """The object with these members.  Raises JsonError for a key that is there twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise errors.JsonError(f"the key {key!r} stands twice in one object")
            seen.add(key)
    return members


def _scanner(unique: bool = False) -> Callable[[str, int], Tuple[Any, int]]:
    """A function that takes a text and an offset, and gives the value there and the offset after it."""
    hook = _unique if unique else None
    if make_scanner is not None:
        # The C code takes any object with these attributes.  sys.implementation has a suitable class: to make one
        # would cost more than to read a small document.
        return make_scanner(
            type(sys.implementation)(  # type: ignore[arg-type, call-arg, unused-ignore]
                strict=True,
                object_hook=None,
                object_pairs_hook=hook,
                parse_float=Number,
                parse_int=int,
                parse_constant=_refuse_constant,
                memo={},
            )
        )
    import json

    decoder = json.JSONDecoder(parse_float=Number, parse_constant=_refuse_constant, object_pairs_hook=hook)
    return decoder.scan_once  # type: ignore[attr-defined, no-any-return]


def loads(data: bytes, unique: bool = False) -> Any:
    """The value of a JSON text in UTF-8.

    `unique`: refuse a key that an object has twice; else its last value counts.
    Raises JsonError, which says where the text is damaged.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise errors.JsonError(f"not UTF-8 at byte {error.start}") from None
    start = len(text) - len(text.lstrip(_BLANKS))
    try:
        value, end = _scanner(unique)(text, start)
    except ChandlerError:
        raise
    except RecursionError:
        raise errors.JsonError(f"nested more than {MAX_DEPTH} deep") from None
    except (StopIteration, ValueError, SystemError):
        raise _damage(text) from None
    if text[end:].strip(_BLANKS):
        raise _damage(text)
    return value


def _damage(text: str) -> errors.JsonError:
    """The error that says where `text` is damaged.  The slow module `json` knows it, and errors need not be fast."""
    import json

    try:
        json.loads(text)
    except ValueError as error:
        return errors.JsonError(f"not JSON: {error}")
    except RecursionError:
        return errors.JsonError(f"nested more than {MAX_DEPTH} deep")
    return errors.JsonError("not JSON")


def check_value(value: Any, limit: int = MAX_DEPTH) -> None:
    """Raises JsonError when a parsed value is nested deeper than `limit`, or has a text that is not Unicode.

    JSON can write half of a surrogate pair (`\\ud800`), which cannot be encoded for a file or a system call (RFC 8259,
    section 8.2).
    """
    level = [value]
    for _ in range(limit):
        below: List[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str):
                check_text(item)
        if not below:
            return
        level = below
    if any(isinstance(item, (dict, list)) for item in level):
        raise errors.JsonError(f"nested more than {limit} deep")
    for item in level:
        if isinstance(item, str):
            check_text(item)


def check_text(text: str) -> None:
    """Raises JsonError when a text is not Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise errors.JsonError(
            f"{text[:64]!r} is no Unicode text: it holds {text[error.start]!r}, half of a surrogate pair"
        ) from None


class Source:
    """A parsed JSON object that remembers how its larger members were written.

    `value`: the document.  `deep`: names of members whose own members are remembered one by one.
    The text of each remembered object or list is kept.  `dumps` writes that text for every member that is still the
    identical Python object.  So most of a config.json need not be encoded, and stays byte for byte as it was.
    """

    __slots__ = ("value", "deep", "_texts")

    def __init__(self, data: bytes, deep: Tuple[str, ...]) -> None:
        """Parses `data`.  Raises JsonError, also when the text is not an object."""
        self.value: Document = {}
        self.deep = deep
        self._texts: Dict[int, str] = {}
        text = data.decode("utf-8", "replace")
        try:
            end = self._members(text, _blanks(text, 0), self.value, _scanner(), deep)
            whole = not text[end:].strip(_BLANKS) and "\ufffd" not in text
        except (ChandlerError, RecursionError, StopIteration, IndexError, ValueError, SystemError):
            whole = False
        if not whole:  # damaged, or valid in a way that _members does not handle
            self._texts = {}
            self.value = loads(data)
            if type(self.value) is not dict:
                raise errors.JsonError("not an object")

    def _members(self, text: str, at: int, members: Document, scan: Any, deep: Tuple[str, ...]) -> int:
        """Reads the object at the offset `at` into `members`, and gives the offset after it.

        Raises one of several exceptions where it cannot; __init__ then parses the whole text again.
        """
        if text[at] != "{":
            raise ValueError
        at = _blanks(text, at + 1)
        if text[at] == "}":
            return at + 1
        while True:
            key, at = scan(text, at)
            if type(key) is not str:
                raise ValueError
            at = _blanks(text, at)
            if text[at] != ":":
                raise ValueError
            start = at = _blanks(text, at + 1)
            if key in deep and text[at] == "{":
                value: Any = {}
                at = self._members(text, at, value, scan, ())
            else:
                value, at = scan(text, at)
            if key in members:
                # the first value would be freed, and a later one could get its id(), which is the key of _texts
                raise ValueError
            members[key] = value
            if type(value) is dict or type(value) is list:
                self._texts[id(value)] = text[start:at]
            at = _blanks(text, at)
            if text[at] == "}":
                return at + 1
            if text[at] != ",":
                raise ValueError
            at = _blanks(text, at + 1)

    def dumps(self, value: Document) -> bytes:
        """`value`, a changed copy of the document, as JSON.  Members that did not change keep their text.

        The rest is written on one line.
        """
        return _written(lambda encode: self._text(value, encode, self.deep)).encode("utf-8")

    def _text(self, members: Document, encode: Encode, deep: Tuple[str, ...]) -> str:
        texts = self._texts
        parts = []
        for key, value in members.items():
            text = texts.get(id(value))
            if text is None:
                text = self._text(value, encode, ()) if key in deep and type(value) is dict else encode(value)
            parts.append(f"{encode(key)}:{text}")
        return "{" + ",".join(parts) + "}"


def _blanks(text: str, at: int) -> int:
    """The offset of the first character from `at` on that is not blank."""
    while text[at] in _BLANKS:
        at += 1
    return at


def dumps(value: Any) -> bytes:
    """A value as JSON on one line, in ASCII, with Numbers as they were written.

    Raises JsonError for NaN, and for a value that is nested too deep.
    """
    return _written(lambda encode: encode(value)).encode("ascii")


def _written(write: Callable[[Encode], str]) -> str:
    """The text that `write` makes with the encoder that it is given, with every Number as it was written.

    The C encoder cannot write a Number as it is.  So it writes a placeholder string, which is replaced afterwards.
    """
    token = "chandler number"
    while True:
        numbers: List[str] = []
        text = write(_encoder(token, numbers))
        if not numbers:
            return text
        pieces = text.split(f'"{token}"')
        if len(pieces) == len(numbers) + 1:
            return "".join(piece + number for piece, number in zip(pieces, [*numbers, ""]))
        token += "'"  # a string of the document equals the placeholder: try another one


def _encoder(token: str, numbers: List[str]) -> Encode:
    """A function that encodes a value, with the string `token` for every Number.  Appends their texts to `numbers`."""

    def default(item: Any) -> str:
        if not isinstance(item, Number):
            raise TypeError(f"{type(item).__name__} is no JSON value")
        numbers.append(item.text)
        return token

    if make_scanner is not None:
        write = make_encoder(None, default, encode_basestring_ascii, None, ":", ",", False, False, False)
    else:
        import json

        encoder = json.JSONEncoder(default=default, separators=(",", ":"), allow_nan=False)
        write = encoder.iterencode  # type: ignore[assignment, unused-ignore]

    def encode(value: Any) -> str:
        try:
            return "".join(write(value, 0))
        except ValueError as error:
            raise errors.JsonError(str(error)) from None
        except RecursionError:
            raise errors.JsonError(f"nested more than {MAX_DEPTH} deep") from None

    return encode
