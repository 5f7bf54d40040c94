"""Turns YAML text into plain values, as the CDI Go library reads it (pkg/cdi/spec.go, with sigs.k8s.io/yaml).

The rules are those of that Go parser of YAML 1.1, not PyYAML's: `1:0` and dates are strings, `0o17` and `017` are
octal, a key that comes twice (or is merged twice) is an error, and only the first document counts.
PyYAML's parser, with libyaml if it has that, delivers the events, and this module builds the values.  It limits the
depth and how much aliases may add.  Pure: text in, values out.  yaml is imported only when it is needed.

The Go library knows the type of a field when it reads a scalar: in a string field an unquoted `010` or `yes` is its
text; in a number field `010` is 8.  Here only shim.cdi.schema knows the types, later, so such a scalar can be kept as
both (Scalar).
"""

from __future__ import annotations

from shim.errors import CdiError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    from shim.shapes import Document

MAX_DEPTH = 64  # of nested mappings and sequences
MAX_ALIASED = 1 << 20  # characters that aliases may add to a file; each node adds _NODE to its characters
MAX_PURE = 1 << 20  # characters for PyYAML's parser in Python, which is about a hundred times slower than libyaml
_NODE = 8

_TRUE = ("y", "Y", "yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON")
_FALSE = ("n", "N", "no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF")
_NULL = ("", "~", "null", "Null", "NULL")
_INFINITE = (".inf", ".Inf", ".INF")
CONSTANTS: dict[str, None | bool | float] = {
    **dict.fromkeys(_TRUE, True),
    **dict.fromkeys(_FALSE, False),
    **dict.fromkeys(_NULL, None),
    **dict.fromkeys((*_INFINITE, *("+" + word for word in _INFINITE)), float("inf")),
    **dict.fromkeys(("-" + word for word in _INFINITE), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_NUMERIC = frozenset("+-.0123456789")
_BASES = {"0x": 16, "0o": 8, "0b": 2}

_TAG = "tag:yaml.org,2002:"
_COLLECTION_TAGS = frozenset((None, "!", _TAG + "map", _TAG + "seq"))
_SCALAR_TAGS = {  # tag -> the types that the scalar's text must have
    _TAG + "int": (int,),
    _TAG + "float": (int, float),
    _TAG + "bool": (bool,),
    _TAG + "null": (type(None),),
}
_TEXT_TAGS = frozenset(("!", _TAG + "str", _TAG + "timestamp"))


class Scalar:
    """An unquoted scalar that is a number or a boolean: its `text` for string fields, its `value` for others."""

    __slots__ = ("text", "value")

    def __init__(self, text: str, value: Any) -> None:
        self.text = text
        self.value = value

    def __repr__(self) -> str:
        return f"Scalar({self.text!r}, {self.value!r})"


def load(text: str, scalar: Callable[[str], Any] | None = None) -> Any:
    """The value of the first document in `text`; None if that is empty.

    `scalar` reads an unquoted scalar: `plain` (the default), or `plain_or_scalar`, which keeps the text with the value.
    Raises CdiError, with the line, if the text is not such YAML or exceeds a limit.
    """
    try:
        import yaml
    except ImportError:
        raise CdiError("YAML needs PyYAML, which is not installed", "install python3-yaml") from None
    parser = getattr(yaml, "CBaseLoader", None)
    if parser is None:
        if len(text) > MAX_PURE:
            raise CdiError(f"more than {MAX_PURE} characters of YAML", "install python3-yaml with libyaml")
        parser = yaml.BaseLoader
    try:
        return _Document(yaml.events, parser(text).get_event, scalar or plain).value()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise CdiError(f"line {mark.line + 1 if mark else 1}: {error.problem or error.context}") from None
    # PyYAML's parser in Python raises errors of Python's for some texts (an escape beyond Unicode, a number in a
    # directive).
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise CdiError(f"not YAML: {str(error).splitlines()[0] if str(error) else 'unreadable'}") from None


class _Document:
    """Builds the value of one document from parser events."""

    def __init__(self, events: Any, next_event: Callable[[], Any], plain_scalar: Callable[[str], Any]) -> None:
        self.next = next_event
        self.plain = plain_scalar
        self.scalar_event = events.ScalarEvent
        self.map_event = events.MappingStartEvent
        self.map_end = events.MappingEndEvent
        self.list_event = events.SequenceStartEvent
        self.list_end = events.SequenceEndEvent
        self.alias_event = events.AliasEvent
        self.stream_end = events.StreamEndEvent
        self.anchors: Document = {}
        self.sizes: dict[str, int] = {}
        self.size = 0  # size of all nodes so far; an alias counts as the node that it stands for
        self.aliased = 0  # the part of `size` that aliases added

    def value(self) -> Any:
        self.next()  # the start of the stream
        if type(self.next()) is self.stream_end:
            return None
        return self.node(self.next(), 0)  # later documents are not read

    def node(self, event: Any, depth: int) -> Any:
        kind = type(event)
        if kind is self.alias_event:
            return self.alias(event)
        if depth > MAX_DEPTH:
            raise _error(event, f"nested deeper than {MAX_DEPTH}")
        before = self.size
        if kind is self.scalar_event:
            self.size += _NODE + len(event.value)
            value = _scalar(event, self.plain)
        else:
            if event.tag not in _COLLECTION_TAGS:
                raise _error(event, f"the tag {event.tag} is not supported")
            self.size += _NODE
            value = self.mapping(depth) if kind is self.map_event else self.sequence(depth)
        anchor = event.anchor
        if anchor is not None:  # only set when its node is complete, so no node can contain itself
            self.anchors[anchor] = value
            self.sizes[anchor] = self.size - before
        return value

    def alias(self, event: Any) -> Any:
        anchor = event.anchor
        if anchor not in self.anchors:
            raise _error(event, f"alias *{anchor} has no anchor before it, or is inside the anchor's own node")
        self.size += self.sizes[anchor]
        self.aliased += self.sizes[anchor]
        if self.aliased > MAX_ALIASED:
            raise _error(event, f"aliases add more than {MAX_ALIASED} characters")
        return self.anchors[anchor]

    def sequence(self, depth: int) -> list[Any]:
        items: list[Any] = []
        next_event, end, node = self.next, self.list_end, self.node
        event = next_event()
        while type(event) is not end:
            items.append(node(event, depth + 1))
            event = next_event()
        return items

    def mapping(self, depth: int) -> Document:
        items: Document = {}
        next_event, end, node = self.next, self.map_end, self.node
        event = next_event()
        while type(event) is not end:
            key = node(event, depth + 1)
            value = node(next_event(), depth + 1)
            if key == "<<" and type(event) is self.scalar_event and event.implicit[0]:
                for merged in _merged(event, value):
                    for name in merged:
                        _put(items, name, merged[name], event)
            else:
                _put(items, key if type(key) is str else _key(event, key), value, event)
            event = next_event()
        return items


def _put(items: Document, key: str, value: Any, event: Any) -> None:
    if key in items:
        raise _error(event, f'key "{key}" comes twice')
    items[key] = value


def _key(event: Any, key: Any) -> str:
    """The text of a key that is not a string, such as 1 or yes."""
    if key is None or isinstance(key, (list, dict)):
        raise _error(event, "a key must be a string")
    text: str = event.value
    return text


def _merged(event: Any, value: Any) -> list[Document]:
    """The mappings that the value of a merge key (<<) stands for."""
    maps = value if isinstance(value, list) else [value]
    if not all(isinstance(each, dict) for each in maps):
        raise _error(event, "<< needs a mapping or a list of mappings")
    return maps


def _scalar(event: Any, read: Callable[[str], Any]) -> Any:
    tag = event.tag
    if tag is None:
        return read(event.value) if event.implicit[0] else event.value
    if tag in _TEXT_TAGS:
        return event.value
    types = _SCALAR_TAGS.get(tag)
    if types is None:
        raise _error(event, f"the tag {tag} is not supported")
    if type(plain(event.value)) not in types:
        raise _error(event, f'"{event.value}" is not of the type that its tag {tag} says')
    return read(event.value)


def _error(event: Any, what: str) -> CdiError:
    return CdiError(f"line {event.start_mark.line + 1}: {what}")


def plain(text: str) -> Any:
    """The value of an unquoted scalar: None, a bool, an int of at most 64 bits, a float, or the text itself."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if text[0] not in _NUMERIC or not text.isascii():
        return text
    digits = text.replace("_", "")
    value = _integer(digits)
    return value if value is not None else _float(digits, text)


def plain_or_scalar(text: str) -> Any:
    """The value of an unquoted scalar as `plain` gives it, but a number or a bool as a Scalar."""
    value = plain(text)
    return value if value is None or type(value) is str else Scalar(text, value)


def _integer(text: str) -> int | None:
    digits = text[1:] if text[0] in "+-" else text
    base = _BASES.get(digits[:2].lower())
    if base is not None:
        digits = digits[2:]
    elif digits[:1] == "0":
        base = 8
    if not digits.isalnum() or len(digits) > 64:  # 64 binary digits; int() would also accept signs and blanks
        return None
    try:
        value = int(digits, base or 10)
    except ValueError:
        return None
    if text[0] == "-":
        value = -value
    return value if -(1 << 63) <= value < 1 << 64 else None


def _float(digits: str, text: str) -> Any:
    if digits.lstrip("0123456789+-.eE"):  # float() would also accept words such as nan
        return text
    try:
        value = float(digits)
    except ValueError:
        return text
    return value if abs(value) != float("inf") else text
