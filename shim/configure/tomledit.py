"""TOML edited in place: settings are put into a text and taken out of it, and everything else stays as it was.

New tables go to the end of the text as one block, which `take` cuts out again; a value that is there already is
changed where it stands, by tomlkit.  Whatever was done is checked: the result must say exactly what it should (by the
standard library's parser) and every other line must still be there.  Otherwise the file is refused, with what to
write into it by hand.  Pure.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Dict, List, Tuple

from shim.configure.model import ELEMENT, TABLE, VALUE, Setting, lookup, with_setting
from shim.errors import ChandlerError, ConfigError

COMMENT = "# From `chandler configure`; its --remove takes this out again.\n"
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def parse(text: str) -> Dict[str, Any]:
    """The document.  Raises ConfigError."""
    try:
        import tomllib
    except ImportError:  # Python before 3.11
        import tomli as tomllib  # type: ignore[no-redef, unused-ignore]
    try:
        return tomllib.loads(text)
    except (RecursionError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"it is not TOML: {error}", "mend it first") from None


def put(text: str, settings: List[Setting]) -> Tuple[str, Dict[str, Any]]:
    """The text with the settings, and the record that `take` needs.  Raises ConfigError."""
    document = parse(text)
    missing = [setting for setting in settings if not _has(document, setting)]
    wanted = document
    for setting in missing:
        wanted = with_setting(wanted, setting)
    appended = [setting for setting in missing if _appendable(text, setting)]
    changes = []
    edited = text
    for setting in missing:
        if setting not in appended:
            edited, change = _change(edited, setting)
            changes.append(change)
    block = _block(edited, appended)
    result = edited + block
    try:
        right = parse(result) == wanted and _kept(text, result, len(changes))
    except ConfigError:
        right = False
    if not right:
        raise ConfigError("it is written in a way that cannot be edited without harm",
                          "write this into it: " + " ".join(snippet(missing).split()))
    return result, {"block": block, "tables": [list(s.path) for s in settings if s.kind == TABLE],
                    "values": [[list(s.path), s.value] for s in appended if s.kind == VALUE], "changes": changes}


def take(text: str, record: Dict[str, Any]) -> str:
    """The text without what `put` has put there, whatever else has changed since.  Raises ConfigError."""
    document = parse(text)
    block = record["block"]
    if block and text.count(block) == 1:
        text = text.replace(block, "")
        document = parse(text)
    doc = _tomlkit().parse(text)
    touched = 0
    for path in record["tables"]:
        touched += _drop(doc, path) if lookup(document, tuple(path)) is not None else 0
    for path, value in record["values"]:
        touched += _drop(doc, path) if lookup(document, tuple(path)) == value else 0
    for change in record["changes"]:
        touched += _undo(doc, change, document)
    result: str = doc.as_string() if touched else text
    parse(result)
    return result


def snippet(settings: List[Setting]) -> str:
    """Settings as TOML, for a person or for the end of a file."""
    lines: List[str] = []
    for setting in settings:
        lines += ["", *_lines(setting)]
    return "\n".join(lines).strip("\n") + "\n"


def render(value: Any) -> str:
    """A value as TOML.  Strings as JSON writes them, which TOML reads."""
    import json
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key(name)} = {render(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(render, value)) + "]"
    if isinstance(value, (str, bool)):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def key(name: str) -> str:
    """A key, quoted where it must be."""
    return name if _BARE.fullmatch(name) else render(name)


def _header(path: Tuple[str, ...]) -> str:
    return "[" + ".".join(map(key, path)) + "]"


def _lines(setting: Setting) -> List[str]:
    path, value = setting.path, setting.value
    if setting.kind == TABLE:
        plain = {name: item for name, item in value.items() if not isinstance(item, dict)}
        lines = [_header(path), *(f"{key(name)} = {render(item)}" for name, item in plain.items())]
        for name, item in value.items():
            if isinstance(item, dict):
                lines += _lines(Setting(TABLE, (*path, name), item))
        return lines
    line = f"{key(path[-1])} = {render([value] if setting.kind == ELEMENT else value)}"
    return [_header(path[:-1]), line] if path[1:] else [line]


def _has(document: Dict[str, Any], setting: Setting) -> bool:
    found = lookup(document, setting.path)
    return setting.value in (found or []) if setting.kind == ELEMENT else bool(found == setting.value)


def _appendable(text: str, setting: Setting) -> bool:
    """Whether a setting can stand at the end of the text, below a header of its own."""
    if len(setting.path) == 1:
        return False  # there it would belong to the last table
    try:
        parse(text + "\n" + snippet([setting]))
        return True
    except ConfigError:
        return False


def _block(text: str, settings: List[Setting]) -> str:
    if not settings:
        return ""
    groups: Dict[Tuple[str, ...], List[str]] = {}
    parts = []
    for setting in settings:
        lines = _lines(setting)
        if setting.kind == VALUE and setting.path[:-1] in groups:
            groups[setting.path[:-1]].append(lines[1])  # one header for all values of a table
            continue
        if setting.kind == VALUE:
            groups[setting.path[:-1]] = lines
        parts.append(lines)
    start = "" if not text or text.endswith("\n") else "\n"
    return start + ("\n" if text else "") + COMMENT + "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _tomlkit() -> Any:
    try:
        import tomlkit
    except ImportError:
        raise ChandlerError("tomlkit, the Python package that edits TOML, is not installed",
                            "install python3-tomlkit") from None
    return tomlkit


def _change(text: str, setting: Setting) -> Tuple[str, Dict[str, Any]]:
    """One setting put where its table stands, and how to undo that."""
    change: Dict[str, Any] = {"kind": setting.kind, "path": list(setting.path), "value": setting.value, "previous": None}
    previous = lookup(parse(text), setting.path)
    if previous is None and len(setting.path) == 1:
        line = _lines(setting)[0] + "\n"
        at = re.match(r"(?:\ufeff?(?:[ \t]*(?:#[^\n]*)?\n)*)(?:[ \t]*version[ \t]*=[^\n]*(?:\n|$))?", text)
        cut = at.end() if at else 0
        before = text[:cut]
        return before + ("" if not before or before.endswith("\n") else "\n") + line + text[cut:], change
    tomlkit = _tomlkit()
    at = doc = tomlkit.parse(text)
    for part in setting.path[:-1]:
        if part not in at:
            at[part] = tomlkit.inline_table() if type(at).__name__ == "InlineTable" else tomlkit.table()
        at = at[part]
    name = setting.path[-1]
    if setting.kind == ELEMENT and previous is not None:
        at[name].append(setting.value)
    else:
        if previous is not None:
            change["previous"] = at[name].as_string()
        value = [setting.value] if setting.kind == ELEMENT else setting.value
        at[name] = tomlkit.value(render(value))
    return str(doc.as_string()), change


def _undo(doc: Any, change: Dict[str, Any], document: Dict[str, Any]) -> int:
    """What a change did undone, as far as nobody has done something else since; how many lines that touches."""
    path, value = tuple(change["path"]), change["value"]
    now = lookup(document, path)
    if change["kind"] == ELEMENT:
        if not isinstance(now, list) or value not in now:
            return 0
        if now == [value] and change["previous"] is None:
            return _drop(doc, change["path"])
        _walk(doc, path).remove(value)
        return 1
    if now != value:
        return 0
    if change["previous"] is None:
        return _drop(doc, change["path"])
    _walk(doc, path[:-1])[path[-1]] = _tomlkit().value(change["previous"])
    return 1


def _walk(doc: Any, path: Tuple[str, ...]) -> Any:
    for part in path:
        doc = doc[part]
    return doc


def _drop(doc: Any, path: List[str]) -> int:
    del _walk(doc, tuple(path[:-1]))[path[-1]]
    return 1


def _kept(before: str, after: str, changes: int) -> bool:
    """Whether every line is still there but those that were to be changed."""
    lost = Counter(line.rstrip() for line in before.split("\n")) - Counter(line.rstrip() for line in after.split("\n"))
    return sum(lost.values()) <= changes
