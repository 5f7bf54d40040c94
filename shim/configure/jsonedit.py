"""Edits JSON in place: `put` adds settings to a text, `take` removes them again, and all other characters stay.

The text is never serialised as a whole.  The functions insert, replace and cut single members, in the indentation that
the file already has.  Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from shim import jsontext
from shim.configure.model import Setting, lookup, with_setting, with_settings
from shim.errors import ChandlerError, ConfigError
from shim.shapes import Document

_BLANKS = " \t\r\n"


def parse(text: str) -> Document:
    """Parses a document; an empty text is an empty object.  Raises ConfigError, also for a key that occurs twice."""
    if not text.strip(_BLANKS):
        return {}
    try:
        document = jsontext.loads(text.encode(), unique=True)
    except ChandlerError as error:
        raise ConfigError(
            f"it is not JSON that can be edited: {error.what}", "correct it first; JSON has no comments"
        ) from None
    if not isinstance(document, dict):
        raise ConfigError("it is not a JSON object", "correct it first")
    return document


def put(text: str, settings: list[Setting]) -> tuple[str, Document]:
    """Returns the text with the settings, and the record that `take` needs.  Raises ConfigError.

    The record has a list `changes`.  Each change has a `path` and a `value`; `previous`, the former value as the file
    had it written (None: there was none); and `made`, how many keys of the path lead to the first member that `put`
    created.
    """
    wanted = parse(text)
    result = text if text.strip(_BLANKS) else "{}\n"
    changes = []
    for setting in settings:
        previous = lookup(wanted, setting.path)
        if previous == setting.value:
            continue
        depth = next(
            number
            for number in range(1, len(setting.path) + 1)
            if number == len(setting.path) or not _exists(wanted, setting.path[:number])
        )
        old = None
        if _exists(wanted, setting.path):
            begin, end = _span(result, setting.path)
            old = result[begin:end]
        changes.append({"path": list(setting.path), "value": setting.value, "previous": old, "made": depth})
        result = _put(result, result.index("{"), setting.path, setting.value, _unit(result), 0)
        wanted = with_setting(wanted, setting)
    if parse(result) != wanted:
        raise ConfigError(
            "it is written in a way that this command cannot edit safely", "write this into it: " + snippet(settings)
        )
    return result, {"changes": changes}


def take(text: str, record: Document) -> str:
    """Returns the text without what `put` added, and keeps every other change since then.  Raises ConfigError."""
    for change in reversed(record["changes"]):
        path = tuple(change["path"])
        present = lookup(parse(text), path)
        is_ours = isinstance(change["value"], dict) or present == change["value"]
        if present is None or not is_ours:
            continue
        if change["previous"] is not None:
            begin, end = _span(text, path)
            text = text[:begin] + change["previous"] + text[end:]
            continue
        text = _cut(text, path)
        for depth in range(len(path) - 1, change["made"] - 1, -1):
            if lookup(parse(text), path[:depth]) == {}:
                text = _cut(text, path[:depth])
    return text


def _exists(document: Any, path: tuple[str, ...]) -> bool:
    """Whether there is a member at a path; it may be null."""
    above = lookup(document, path[:-1])
    return isinstance(above, dict) and path[-1] in above


def snippet(settings: list[Setting]) -> str:
    """Writes settings as JSON, for an error message."""
    return json.dumps(with_settings({}, settings))


def _members(text: str, at: int) -> Iterator[tuple[str, int, int, int]]:
    """Yields each member of the object that begins at offset `at`: key, key's offset, start and end of the value."""
    decoder = json.JSONDecoder()
    at = _skip(text, at + 1)
    while text[at] != "}":
        start = at
        name, at = decoder.raw_decode(text, at)
        begin = _skip(text, _skip(text, at) + 1)
        _, end = decoder.raw_decode(text, begin)
        yield name, start, begin, end
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    while text[at] in _BLANKS:
        at += 1
    return at


def _unit(text: str) -> str:
    """The blanks with which the file indents one level; "" for a file that has all members in one line."""
    members = list(_members(text, text.index("{")))
    if not members:
        return "    "
    blanks = text[: members[0][1]].rpartition("{")[2]
    return blanks.rpartition("\n")[2] or "    " if "\n" in blanks else ""


def _put(text: str, at: int, path: tuple[str, ...], value: Any, unit: str, depth: int) -> str:
    """The text with a value at a path below the object that begins at offset `at`, `depth` levels below the top."""
    members = list(_members(text, at))
    for name, _, begin, end in members:
        if name != path[0]:
            continue
        if len(path) == 1:
            return text[:begin] + _render(value, unit, depth + 1) + text[end:]
        if text[begin] != "{":
            raise ConfigError(f"{name!r} is not an object", "correct it first")
        return _put(text, begin, path[1:], value, unit, depth + 1)
    for part in reversed(path[1:]):
        value = {part: value}
    member = f"{json.dumps(path[0])}: {_render(value, unit, depth + 1)}"
    if not members:
        end = text.index("}", at)
        inner = f"\n{unit * (depth + 1)}{member}\n{unit * depth}" if unit else member
        return text[: at + 1] + inner + text[end:]
    # Repeat the blanks that stand before the last member, so that the new one is indented like it.
    last = members[-1]
    before = members[-2][3] if members[1:] else at
    blanks = text[before + 1 : last[1]].lstrip(",") if members[1:] else text[at + 1 : last[1]]
    blanks = blanks[len(blanks.rstrip(_BLANKS)) :] if blanks.strip(_BLANKS) else blanks
    return text[: last[3]] + "," + (blanks or " ") + member + text[last[3] :]


def _render(value: Any, unit: str, depth: int) -> str:
    if not unit:
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, indent=unit, ensure_ascii=False).replace("\n", "\n" + unit * depth)


def _span(text: str, path: tuple[str, ...]) -> tuple[int, int]:
    """Where the value at a path begins and ends."""
    at = text.index("{")
    end = len(text)
    for part in path:
        at, end = next((begin, end) for name, _, begin, end in _members(text, at) if name == part)
    return at, end


def _cut(text: str, path: tuple[str, ...]) -> str:
    """The text without the member at a path, and without the comma that it needed."""
    at = _span(text, path[:-1])[0] if path[1:] else text.index("{")
    members = list(_members(text, at))
    number = next(number for number, member in enumerate(members) if member[0] == path[-1])
    _, start, _, end = members[number]
    if number:
        return text[: members[number - 1][3]] + text[end:]
    if members[1:]:
        return text[:start] + text[members[1][1] :]
    return text[: at + 1] + text[text.index("}", end) :]
