"""JSON in and out with the interpreter's C scanner and encoder alone.

`import json` costs as much again as the interpreter's own start, because it brings re, enum and functools; the
C code behind it costs nothing.  It leaves some work to its caller, done here: blanks around the text, the end
of input, one error for all that can be wrong, no NaN, and numbers that are not integers stay as they were
written (class Number).  A damaged text is parsed again with `json` only to say where it is damaged.
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


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise errors.JsonError(f"the key {key!r} stands twice in one object")
            seen.add(key)
    return members


def _scanner(unique: bool = False) -> Callable[[str, int], Tuple[Any, int]]:
    """A function from text and place to value and the place after it."""
    hook = _unique if unique else None
    if make_scanner is not None:
        # any object with these attributes will do; a class of our own would cost more than a small document
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
    """The value of a JSON text in UTF-8.  `unique`: a key that stands twice in one object is an error, too.

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
    """Where `text` is damaged: the slow parser knows, and this is no hot path any more."""
    import json

    try:
        json.loads(text)
    except ValueError as error:
        return errors.JsonError(f"not JSON: {error}")
    except RecursionError:
        return errors.JsonError(f"nested more than {MAX_DEPTH} deep")
    return errors.JsonError("not JSON")


def check_value(value: Any, limit: int = MAX_DEPTH) -> None:
    """Raises JsonError when a parsed value is nested deeper than `limit`, or holds a text that is not Unicode: JSON can
    write half of a surrogate pair (`\\ud800`), which no file and no system call can take (RFC 8259, section 8.2)."""
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
    """A parsed text that remembers how its larger parts were written.

    `value` is the document.  The members of the document, and of its members `deep`, that are objects or lists are
    kept as text as well; `dumps` writes those that are still the same object as they were, which saves encoding
    most of a config.json and leaves it to the byte.
    """

    __slots__ = ("value", "deep", "_texts")

    def __init__(self, data: bytes, deep: Tuple[str, ...]) -> None:
        """Raises JsonError, also when the text is no object."""
        self.value: Dict[str, Any] = {}
        self.deep = deep
        self._texts: Dict[int, str] = {}
        text = data.decode("utf-8", "replace")
        try:
            end = self._members(text, _blanks(text, 0), self.value, _scanner(), deep)
            whole = not text[end:].strip(_BLANKS) and "\ufffd" not in text
        except (ChandlerError, RecursionError, StopIteration, IndexError, ValueError, SystemError):
            whole = False
        if not whole:  # damaged, or written in a way that the fast walk does not know
            self._texts = {}
            self.value = loads(data)
            if type(self.value) is not dict:
                raise errors.JsonError("not an object")

    def _members(self, text: str, at: int, members: Dict[str, Any], scan: Any, deep: Tuple[str, ...]) -> int:
        """Reads the object that begins at `at`; the place after it."""
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
                raise ValueError  # the first value would be forgotten, and another could take its identity
            members[key] = value
            if type(value) is dict or type(value) is list:
                self._texts[id(value)] = text[start:at]
            at = _blanks(text, at)
            if text[at] == "}":
                return at + 1
            if text[at] != ",":
                raise ValueError
            at = _blanks(text, at + 1)

    def dumps(self, value: Dict[str, Any]) -> bytes:
        """`value`, a document made from ours, as JSON on one line but for what is as it was."""
        return _written(lambda encode: self._text(value, encode, self.deep)).encode("utf-8")

    def _text(self, members: Dict[str, Any], encode: Encode, deep: Tuple[str, ...]) -> str:
        texts = self._texts
        parts = []
        for key, value in members.items():
            text = texts.get(id(value))
            if text is None:
                text = self._text(value, encode, ()) if key in deep and type(value) is dict else encode(value)
            parts.append(f"{encode(key)}:{text}")
        return "{" + ",".join(parts) + "}"


def _blanks(text: str, at: int) -> int:
    while text[at] in _BLANKS:
        at += 1
    return at


def dumps(value: Any) -> bytes:
    """A value as JSON on one line, ASCII only; Numbers as they were written.  Raises JsonError for NaN."""
    return _written(lambda encode: encode(value)).encode("ascii")


def _written(write: Callable[[Encode], str]) -> str:
    """The text that `write` makes with an encoder, with every Number as it was written."""
    token = "chandler number"
    while True:
        numbers: List[str] = []
        text = write(_encoder(token, numbers))
        if not numbers:
            return text
        pieces = text.split(f'"{token}"')
        if len(pieces) == len(numbers) + 1:
            return "".join(piece + number for piece, number in zip(pieces, [*numbers, ""]))
        token += "'"  # a string of the document looks like our placeholder


def _encoder(token: str, numbers: List[str]) -> Encode:
    """A function from value to text, with `token` in the place of every Number, whose text goes to `numbers`."""

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
