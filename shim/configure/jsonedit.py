"""Edits JSON in place: `put` adds settings to a text, `take` removes them again, and all other characters stay.

The text is never serialised as a whole: single members are inserted, replaced and cut, in the file's own indentation.
Pure.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Iterator, List, Tuple

from shim import jsontext
from shim.configure.model import Setting, lookup, with_setting, with_settings
from shim.errors import ChandlerError, ConfigError

_BLANKS = " \t\r\n"


def parse(text: str) -> Dict[str, Any]:
    """Parses a document; an empty text is an empty object.  Raises ConfigError, also for a key that occurs twice."""
    if not text.strip(_BLANKS):
        return {}
    try:
        document = jsontext.loads(text.encode(), unique=True)
    except ChandlerError as error:
        raise ConfigError(
            f"it is not JSON that can be edited: {error.what}", "mend it first; comments are not JSON"
        ) from None
    if not isinstance(document, dict):
        raise ConfigError("it is not a JSON object", "mend it first")
    return document


def put(text: str, settings: List[Setting]) -> Tuple[str, Dict[str, Any]]:
    """Returns the text with the settings, and the record that `take` needs.  Raises ConfigError.

    The record has the `changes`: path and value, the `previous` value as it was written (None: there was none), and
    how many keys of the path lead to the first object that was `made`.
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
            if number == len(setting.path) or not _there(wanted, setting.path[:number])
        )
        old = None
        if _there(wanted, setting.path):
            begin, end = _span(result, setting.path)
            old = result[begin:end]
        changes.append({"path": list(setting.path), "value": setting.value, "previous": old, "made": depth})
        result = _put(result, result.index("{"), setting.path, setting.value, _unit(result), 0)
        wanted = with_setting(wanted, setting)
    if parse(result) != wanted:
        raise ConfigError(
            "it is written in a way that cannot be edited without harm", "write this into it: " + snippet(settings)
        )
    return result, {"changes": changes}


def take(text: str, record: Dict[str, Any]) -> str:
    """Returns the text without what `put` added, whatever else was changed since.  Raises ConfigError."""
    for change in reversed(record["changes"]):
        path = tuple(change["path"])
        now = lookup(parse(text), path)
        ours = isinstance(change["value"], dict) or now == change["value"]
        if now is None or not ours:
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


def _there(document: Any, path: Tuple[str, ...]) -> bool:
    """Whether there is a member at a path; it may be null."""
    above = lookup(document, path[:-1])
    return isinstance(above, dict) and path[-1] in above


def snippet(settings: List[Setting]) -> str:
    """Writes settings as JSON, for an error message."""
    return json.dumps(with_settings({}, settings))


def _members(text: str, at: int) -> Iterator[Tuple[str, int, int, int]]:
    """Yields, for each member of the object that begins at `at`: the key, its start, and the value's start and end."""
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
    """The file's indentation of one level; "" for a file whose members are all in one line."""
    members = list(_members(text, text.index("{")))
    if not members:
        return "    "
    blanks = text[: members[0][1]].rpartition("{")[2]
    return blanks.rpartition("\n")[2] or "    " if "\n" in blanks else ""


def _put(text: str, at: int, path: Tuple[str, ...], value: Any, unit: str, depth: int) -> str:
    members = list(_members(text, at))
    for name, _, begin, end in members:
        if name != path[0]:
            continue
        if len(path) == 1:
            return text[:begin] + _render(value, unit, depth + 1) + text[end:]
        if text[begin] != "{":
            raise ConfigError(f"{name!r} is no object", "mend it first")
        return _put(text, begin, path[1:], value, unit, depth + 1)
    for part in reversed(path[1:]):
        value = {part: value}
    member = f"{json.dumps(path[0])}: {_render(value, unit, depth + 1)}"
    if not members:
        end = text.index("}", at)
        inner = f"\n{unit * (depth + 1)}{member}\n{unit * depth}" if unit else member
        return text[: at + 1] + inner + text[end:]
    last = members[-1]
    before = members[-2][3] if members[1:] else at
    blanks = text[before + 1 : last[1]].lstrip(",") if members[1:] else text[at + 1 : last[1]]
    blanks = blanks[len(blanks.rstrip(_BLANKS)) :] if blanks.strip(_BLANKS) else blanks
    return text[: last[3]] + "," + (blanks or " ") + member + text[last[3] :]


def _render(value: Any, unit: str, depth: int) -> str:
    if not unit:
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value, indent=unit, ensure_ascii=False).replace("\n", "\n" + unit * depth)


def _span(text: str, path: Tuple[str, ...]) -> Tuple[int, int]:
    """Where the value at a path begins and ends."""
    at = text.index("{")
    end = len(text)
    for part in path:
        at, end = next((begin, end) for name, _, begin, end in _members(text, at) if name == part)
    return at, end


def _cut(text: str, path: Tuple[str, ...]) -> str:
    """The text without one member."""
    at = _span(text, path[:-1])[0] if path[1:] else text.index("{")
    members = list(_members(text, at))
    number = next(number for number, member in enumerate(members) if member[0] == path[-1])
    _, start, _, end = members[number]
    if number:
        return text[: members[number - 1][3]] + text[end:]
    if members[1:]:
        return text[:start] + text[members[1][1] :]
    return text[: at + 1] + text[text.index("}", end) :]
