"""The YAML that CDI generators write, read line by line, without a YAML library and several times faster.

Importing PyYAML alone costs five starts of the interpreter.  This reads only block mappings and sequences of
plain and simply quoted scalars on one line each, in printable ASCII.  It never finds an error: whatever it does
not know for certain is NotPlain and left to yamltext, which gives the same value for all that is read here (a
property test compares the two).
"""

from __future__ import annotations

from shim.cdi import yamltext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Tuple

MAX_DEPTH = 32  # less than that of yamltext, which decides beyond it
MAX_KEY = 128

_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._+=~(")
_EMPTY: Dict[str, Any] = {"[]": list, "{}": dict}


class NotPlain(Exception):
    """The text may be YAML, but not of the simple kind."""


def load(text: str, scalar: Callable[[str], Any] = yamltext.plain) -> Any:
    """The mapping that `text` is, `scalar` as in yamltext; raises NotPlain if that is not certain."""
    if not text.isascii() or not text.replace("\n", "").isprintable():
        raise NotPlain
    lines = _Lines(text, scalar)
    value = lines.mapping(0, 0)
    if lines.at < len(lines.lines) - 1:
        raise NotPlain
    return value


class _Lines:
    """The lines that count, each as (indentation, content), and the one to be read next."""

    def __init__(self, text: str, plain: Callable[[str], Any]) -> None:
        self.plain = plain
        self.at = 0
        self.lines: List[Tuple[int, str]] = []
        for line in text.split("\n"):
            content = line.lstrip(" ")
            if content and content[0] != "#":
                self.lines.append((len(line) - len(content), content.rstrip(" ")))
        if self.lines[:1] == [(0, "---")]:
            del self.lines[0]
        self.lines.append((-1, ""))  # the end, less indented than anything

    def mapping(self, indent: int, depth: int) -> Dict[str, Any]:
        if depth > MAX_DEPTH:
            raise NotPlain
        items: Dict[str, Any] = {}
        lines = self.lines
        while True:
            here, content = lines[self.at]
            if here != indent or content[:2] == "- ":
                if here > indent or not items or here == indent:
                    raise NotPlain
                return items
            key, colon, rest = content.partition(":")
            if not colon or not key.isidentifier() or key in yamltext.CONSTANTS or key in items or len(key) > MAX_KEY:
                raise NotPlain
            self.at += 1
            if not rest:
                items[key] = self.nested(indent, depth + 1)
            elif rest[0] == " ":
                items[key] = _scalar(rest.lstrip(" "), self.plain)
            else:
                raise NotPlain

    def nested(self, indent: int, depth: int) -> Any:
        """What stands below a key that is indented by `indent`."""
        here, content = self.lines[self.at]
        if content[:2] == "- " and here >= indent:  # a sequence may stand as far left as its key
            return self.sequence(here, depth)
        return self.mapping(here, depth) if here > indent else None

    def sequence(self, indent: int, depth: int) -> List[Any]:
        if depth > MAX_DEPTH:
            raise NotPlain
        items: List[Any] = []
        lines = self.lines
        while True:
            here, content = lines[self.at]
            if here != indent or content[:2] != "- ":
                if here > indent:
                    raise NotPlain
                return items
            item = content[2:].lstrip(" ")
            if item[0] not in "\"'" and (": " in item or item[-1] == ":"):
                lines[self.at] = (indent + len(content) - len(item), item)
                items.append(self.mapping(lines[self.at][0], depth + 1))
            else:
                items.append(_scalar(item, self.plain))
                self.at += 1


def _scalar(text: str, plain: Callable[[str], Any]) -> Any:
    first = text[0]
    if first in _FIRST or (first == "-" and text[1:2] not in ("", " ")):
        if ": " in text or " #" in text or text[-1] == ":":
            raise NotPlain
        return plain(text)
    if text in _EMPTY:
        return _EMPTY[text]()
    if first in "\"'" and text.find(first, 1) == len(text) - 1 > 0 and (first == "'" or "\\" not in text):
        return text[1:-1]
    raise NotPlain
