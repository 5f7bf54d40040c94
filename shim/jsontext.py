"""JSON in and out with the interpreter's C scanner and encoder alone.

`import json` costs as much again as the interpreter's own start, because it brings re, enum and functools; the
C code behind it costs nothing.  It leaves some work to its caller, done here: blanks around the text, the end
of input, one error for all that can be wrong, no NaN, and numbers that are not integers stay as they were
written (class Number).  A damaged text is parsed again with `json` only to say where it is damaged.
"""

from __future__ import annotations

from shim.errors import JsonError

try:
    from _json import encode_basestring_ascii, make_encoder, make_scanner
except ImportError:  # an interpreter without the C accelerator: slower, the same results
    make_scanner = None  # type: ignore[assignment, misc, unused-ignore]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

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


class _Constant(ValueError):
    pass


def _refuse_constant(name: str) -> NoReturn:
    raise _Constant(name)


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {key!r} stands twice in one object")
            seen.add(key)
    return members


class _Context:
    """What make_scanner wants to be asked for."""

    strict = True
    object_hook = None
    object_pairs_hook: Optional[Callable[[List[Tuple[str, Any]]], Any]] = None
    parse_float = Number
    parse_int = int
    parse_constant = staticmethod(_refuse_constant)
    memo: Dict[str, str] = {}


class _StrictContext(_Context):
    object_pairs_hook = staticmethod(_unique)


def _scanner(context: Any) -> Any:
    if make_scanner is not None:
        return make_scanner(context)
    import json
    decoder = json.JSONDecoder(parse_float=Number, parse_constant=_refuse_constant,
                               object_pairs_hook=context.object_pairs_hook)
    return decoder.scan_once  # type: ignore[attr-defined]


def loads(data: bytes, unique: bool = False) -> Any:
    """The value of a JSON text in UTF-8.  `unique`: a key that stands twice in one object is an error, too.

    Raises JsonError, which says where the text is damaged.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 at byte {error.start}") from None
    start = len(text) - len(text.lstrip(_BLANKS))
    try:
        value, end = _scanner(_StrictContext if unique else _Context)(text, start)
    except JsonError:
        raise
    except _Constant as error:
        raise JsonError(f"{error} is not JSON") from None
    except RecursionError:
        raise JsonError(f"nested more than {MAX_DEPTH} deep") from None
    except (StopIteration, ValueError, SystemError):
        raise _damage(text) from None
    if text[end:].strip(_BLANKS):
        raise _damage(text)
    return value


def _damage(text: str) -> JsonError:
    """Where `text` is damaged: the slow parser knows, and this is no hot path any more."""
    import json
    try:
        json.loads(text)
    except ValueError as error:
        return JsonError(f"not JSON: {error}")
    except RecursionError:
        return JsonError(f"nested more than {MAX_DEPTH} deep")
    return JsonError("not JSON")


def check_depth(value: Any, limit: int = MAX_DEPTH) -> None:
    """Raises JsonError when a parsed value is nested deeper than `limit`."""
    level = [value]
    for _ in range(limit):
        below: List[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    if any(isinstance(item, (dict, list)) for item in level):
        raise JsonError(f"nested more than {limit} deep")


def dumps(value: Any) -> bytes:
    """A value as JSON on one line, ASCII only; Numbers as they were written.  Raises JsonError for NaN."""
    token = "chandler number"
    while True:
        text, numbers = _encode(value, token)
        if not numbers:
            return text.encode("ascii")
        pieces = text.split(f'"{token}"')
        if len(pieces) == len(numbers) + 1:
            return "".join(piece + number for piece, number in zip(pieces, [*numbers, ""])).encode("ascii")
        token += "'"  # a string of the document looks like our placeholder


def _encode(value: Any, token: str) -> Tuple[str, List[str]]:
    """The text with `token` in the place of every Number, and their texts in order."""
    numbers: List[str] = []

    def default(item: Any) -> str:
        if not isinstance(item, Number):
            raise TypeError(f"{type(item).__name__} is no JSON value")
        numbers.append(item.text)
        return token

    try:
        if make_scanner is not None:
            encoder = make_encoder(None, default, encode_basestring_ascii, None, ":", ",", False, False, False)
            return "".join(encoder(value, 0)), numbers
        import json
        return json.dumps(value, default=default, separators=(",", ":"), allow_nan=False), numbers
    except ValueError as error:
        raise JsonError(str(error)) from None
    except RecursionError:
        raise JsonError(f"nested more than {MAX_DEPTH} deep") from None
