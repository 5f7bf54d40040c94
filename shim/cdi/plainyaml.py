"""Reads the simple YAML that CDI generators write, line by line, without a YAML library and several times faster.

Importing PyYAML alone costs as much as five starts of the interpreter.  This module reads only block mappings and block
sequences whose scalars are plain or simply quoted, on one line each, in printable ASCII.  It never reports an error.
For anything else it raises NotPlain, and the caller lets yamltext read the text.  For all text that this module reads,
yamltext gives the same value (a property test compares the two).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

from shim.cdi import yamltext

if TYPE_CHECKING:
    from shim.shapes import Document

MAX_DEPTH = 32  # less than that of yamltext, so that yamltext decides what is too deep
MAX_KEY = 128  # characters; longer keys are left to yamltext

# First characters that begin a plain scalar; `-` does too unless a blank follows.
_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._+=~(")
_EMPTY: dict[str, Callable[[], Any]] = {"[]": list, "{}": dict}


class NotPlain(Exception):
    """The text is not of the simple kind that this module reads; it may still be YAML."""


def load(text: str, scalar: Callable[[str], Any] = yamltext.plain) -> Any:
    """The mapping in `text`.  `scalar` reads an unquoted scalar, as in yamltext.load.

    Raises NotPlain if this module cannot be sure of the value.
    """
    if not text.isascii() or not text.replace("\n", "").isprintable():
        raise NotPlain
    lines = _Lines(text, scalar)
    value = lines.mapping(0, 0)
    if lines.at < len(lines.lines) - 1:
        raise NotPlain
    return value


class _Lines:
    """The lines of a text without blanks and comments, each as (indentation, content); `at`: index of the next line."""

    def __init__(self, text: str, plain: Callable[[str], Any]) -> None:
        self.plain = plain
        self.at = 0
        self.lines: list[tuple[int, str]] = []
        for line in text.split("\n"):
            content = line.lstrip(" ")
            if content and content[0] != "#":
                self.lines.append((len(line) - len(content), content.rstrip(" ")))
        if self.lines[:1] == [(0, "---")]:
            del self.lines[0]
        self.lines.append((-1, ""))  # marks the end: less indented than any line

    def mapping(self, indent: int, depth: int) -> Document:
        if depth > MAX_DEPTH:
            raise NotPlain
        items: Document = {}
        lines = self.lines
        while True:
            line_indent, content = lines[self.at]
            if line_indent != indent or content[:2] == "- ":
                if line_indent > indent or not items or line_indent == indent:
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
        """The value in the lines below a key that is indented by `indent`; None if there are none."""
        line_indent, content = self.lines[self.at]
        if content[:2] == "- " and line_indent >= indent:  # a sequence need not be indented more than its key
            return self.sequence(line_indent, depth)
        return self.mapping(line_indent, depth) if line_indent > indent else None

    def sequence(self, indent: int, depth: int) -> list[Any]:
        if depth > MAX_DEPTH:
            raise NotPlain
        items: list[Any] = []
        lines = self.lines
        while True:
            line_indent, content = lines[self.at]
            if line_indent != indent or content[:2] != "- ":
                if line_indent > indent:
                    raise NotPlain
                return items
            item = content[2:].lstrip(" ")
            if item[0] not in "\"'" and (": " in item or item[-1] == ":"):
                # A mapping that begins behind the dash: read its first line as one indented to the key.
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
