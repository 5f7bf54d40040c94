"""TOML edited in place: settings are put into a text and taken out of it, and everything else stays as it was.

New tables go to the end of the text as one block, which `take` cuts out again.  A value is changed, added or taken away
where its table stands: in the lines of that key alone, or, where a table is written in another way, by tomlkit in
the whole document (which mends its own lines well, and tables that are not together badly).  Whatever was done is
checked: the result must say exactly what it should, by the standard library's parser, and every other line must still
be there.  Otherwise the file is refused, with what to write into it by hand.  Pure.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

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
    appended = [setting for setting in missing if _appendable(text, setting)]
    changes = []
    edited = text
    for setting in missing:
        if setting not in appended:
            changes.append(_undoing(edited, setting))
            edited = _changed(edited, setting)
    block = _block(edited, appended)
    result = edited + block
    wanted = parse(edited)  # every change was looked at when it was made
    for setting in appended:
        wanted = with_setting(wanted, setting)
    if not _says(result, wanted) or not _kept(text, result, len(changes)):
        raise _unsafe(missing)
    return result, {"block": block, "tables": [list(s.path) for s in missing if s.kind == TABLE],
                    "values": [[list(s.path), s.value] for s in appended if s.kind == VALUE], "changes": changes}


def take(text: str, record: Dict[str, Any]) -> str:
    """The text without what `put` has put there, whatever else has changed since.  Raises ConfigError."""
    block = record["block"]
    text = text.replace(block if block and text.count(block) == 1 else COMMENT, "")
    document = parse(text)
    values = [{"kind": VALUE, "path": path, "value": value, "previous": None} for path, value in record["values"]]
    undone = [change for change in [*values, *record["changes"]] if change["kind"] != TABLE and _still(document, change)]
    tables = [path for path in record["tables"] if lookup(document, tuple(path)) is not None]
    if not undone and not tables:
        return text
    for path in tables:
        text = _edited(text, tuple(path), _drop, _without(parse(text), path))
    for change in undone:
        text = _undone(text, change)
    return text


def overriders(paths: List[str], path: Tuple[str, ...], read: Callable[[str], Optional[str]]) -> List[str]:
    """What to know of files that an engine reads after ours and that set a key which is ours to set."""
    found = []
    for name in paths:
        try:
            if lookup(parse(read(name) or ""), path) is not None:
                found.append(f"{name} is read later, and sets {'.'.join(path)}: that is what counts")
        except ConfigError:
            continue  # whoever needs the file says so
    return found


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
    return isinstance(found, list) and setting.value in found if setting.kind == ELEMENT else bool(found == setting.value)


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


def _undoing(text: str, setting: Setting) -> Dict[str, Any]:
    """How to undo a setting that is about to be put where its table stands."""
    previous = lookup(parse(text), setting.path)
    raw = None
    if setting.kind == ELEMENT:
        raw = None if previous is None else ""  # whether there was a list
    elif previous is not None:
        raw = render(previous)
        for start, end in _chunks(text, setting.path, previous):
            raw = _raw(_tomlkit().parse(_joined(text, start, end))[setting.path[-1]])
    return {"kind": setting.kind, "path": list(setting.path), "value": setting.value, "previous": raw}


def _raw(item: Any) -> str:
    """A value as it is written; true and false come without that."""
    return str(item.as_string()) if hasattr(item, "as_string") else render(item)


def _changed(text: str, setting: Setting) -> str:
    """One setting put where its table stands.  Raises ConfigError."""
    document = parse(text)
    wanted = with_setting(document, setting)
    previous = lookup(document, setting.path)

    def act(table: Any, name: str) -> None:
        if setting.kind == ELEMENT and previous is not None:
            table[name].append(setting.value)
        else:
            table[name] = _tomlkit().value(render([setting.value] if setting.kind == ELEMENT else setting.value))
    if previous is None:
        line = _lines(setting)[-1] if setting.kind != TABLE else f"{key(setting.path[-1])} = {render(setting.value)}"
        inserted = _inserted(text, setting.path[:-1], line)
        if inserted is not None and _says(inserted, wanted):
            return inserted
    try:
        return _edited(text, setting.path, act, wanted)
    except ConfigError:
        if setting.kind != ELEMENT or not previous:
            raise _unsafe([setting]) from None
    # tomlkit loses its way at a list that ends in a remark: ours goes before the others
    first = render(setting.value) + ", "
    result = _respelled(text, setting.path, lambda lines: lines.replace("[", "[" + first, 1), with_setting(document, Setting(VALUE, setting.path, [setting.value, *previous])))
    if result is None:
        raise _unsafe([setting])
    return result


def _respelled(text: str, path: Tuple[str, ...], spell: Callable[[str], str], wanted: Dict[str, Any]) -> Optional[str]:
    """The text with the lines of one key spelled in another way; None when it then says something else."""
    lines = text.split("\n")
    for start, end in _chunks(text, path, lookup(parse(text), path)):
        result = "\n".join([*lines[:start], spell("\n".join(lines[start:end])), *lines[end:]])
        return result if _says(result, wanted) else None
    return None


def _inserted(text: str, table: Tuple[str, ...], line: str) -> Optional[str]:
    """A line put below the header of its table, or at the top below the version; None when the table has no header."""
    lines = text.split("\n")
    if not table:
        at = re.match(r"(?:[ \t]*(?:#[^\n]*)?\n)*(?:[ \t]*version[ \t]*=[^\n]*(?:\n|$))?", text)
        cut = at.end() if at else 0
        return text[:cut] + ("" if not cut or text[:cut].endswith("\n") else "\n") + line + "\n" + text[cut:]
    for path, start, end in _sections(lines):
        if path == table:
            below = next((each for each in lines[start + 1:end] if each.strip()), lines[start])
            lines.insert(start + 1, below[:len(below) - len(below.lstrip())] + line)
            return "\n".join(lines)
    return None


Act = Callable[[Any, str], None]


def _edited(text: str, path: Tuple[str, ...], act: Act, wanted: Dict[str, Any]) -> str:
    """The text after an act on the table that holds the last key of the path, so that it says what is wanted.

    Raises ConfigError when there is no way to that.
    """
    for way in (_in_its_lines, _in_sections, _in_whole):
        try:
            result = way(text, path, act)
            if result is not None and _says(result, wanted):
                return result
        except (KeyError, ValueError, TypeError, IndexError, AttributeError):  # what tomlkit has for a table that it does not understand
            continue
    raise ConfigError("it is written in a way from which what is Chandler's cannot be taken without harm", f"take out {'.'.join(path)} by hand")


def _in_its_lines(text: str, path: Tuple[str, ...], act: Act) -> Optional[str]:
    lines = text.split("\n")
    for start, end in _chunks(text, path, lookup(parse(text), path)):
        doc = _tomlkit().parse(_joined(text, start, end))
        act(doc, path[-1])
        edited = doc.as_string().rstrip("\n")
        return "\n".join([*lines[:start], *([edited] if edited.strip() else []), *lines[end:]])
    return None


def _in_sections(text: str, path: Tuple[str, ...], act: Act) -> Optional[str]:
    """A table dropped with all that has a header within; remarks before the next header are somebody else's."""
    if act is not _drop:
        return None
    lines = text.split("\n")
    for found, start, end in reversed(list(_sections(lines))):
        if found[:len(path)] == path:
            while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
                end -= 1
            del lines[start:end]
    return "\n".join(lines)


def _in_whole(text: str, path: Tuple[str, ...], act: Act) -> str:
    tomlkit = _tomlkit()
    at = doc = tomlkit.parse(text)
    for part in path[:-1]:
        if part not in at:
            at[part] = tomlkit.inline_table() if type(at).__name__ == "InlineTable" else tomlkit.table()
        at = at[part]
    act(at, path[-1])
    return str(doc.as_string())


def _sections(lines: List[str]) -> Iterator[Tuple[Tuple[str, ...], int, int]]:
    """The path of every table that has a header, with its first line and the one after its last.

    What looks like a header within a string or a list is taken for one: the caller checks what comes of it.
    """
    found: List[Tuple[Tuple[str, ...], int]] = []
    for number, line in enumerate(lines):
        if line.lstrip().startswith("["):
            path: List[str] = []
            try:
                at = parse(line)
            except ConfigError:
                continue
            while isinstance(at, dict) and at:
                path += at
                at = at[path[-1]]
            found.append((tuple(path), number))
    for number, (header, start) in enumerate(found):
        yield header, start, found[number + 1][1] if found[number + 1:] else len(lines)


def _chunks(text: str, path: Tuple[str, ...], value: Any) -> Iterator[Tuple[int, int]]:
    """Where the lines are that give a key its value, and nothing else: the first, and the one after the last."""
    lines = text.split("\n")
    sections = list(_sections(lines))
    places = [(start + 1, end) for header, start, end in sections if header == path[:-1]]
    if not path[1:]:
        places = [(0, sections[0][1] if sections else len(lines))]
    for first, last in places:
        for start in range(first, last):
            if path[-1] not in lines[start] or lines[start].lstrip().startswith("#"):
                continue
            for end in range(start + 1, last + 1):
                try:
                    if parse("\n".join(lines[start:end])) == {path[-1]: value}:
                        yield start, end
                    break
                except ConfigError:
                    continue  # a list in several lines


def _joined(text: str, start: int, end: int) -> str:
    return "\n".join(text.split("\n")[start:end]) + "\n"


def _says(text: str, wanted: Dict[str, Any]) -> bool:
    """Whether a text means a document; a table that is empty may or may not have a line of its own."""
    try:
        return bool(_pruned(parse(text)) == _pruned(wanted))
    except ConfigError:
        return False


def _unsafe(settings: List[Setting]) -> ChandlerError:
    return ConfigError("it is written in a way that cannot be edited without harm", "write this into it: " + " ".join(snippet(settings).split()))


def _still(document: Dict[str, Any], change: Dict[str, Any]) -> bool:
    """Whether nobody has changed something of ours into something else."""
    now = lookup(document, tuple(change["path"]))
    if change["kind"] == ELEMENT:
        return isinstance(now, list) and change["value"] in now
    return bool(now == change["value"])


def _undone(text: str, change: Dict[str, Any]) -> str:
    """What a change did undone.  Raises ConfigError."""
    path, value, previous = tuple(change["path"]), change["value"], change["previous"]
    document = parse(text)
    now = lookup(document, path)
    if change["kind"] == ELEMENT and (now != [value] or previous is not None):
        wanted = _with(document, path, [item for item in now if item != value])
        first = _respelled(text, path, lambda lines: lines.replace(render(value) + ", ", "", 1), wanted)
        if first is not None:
            return first
        return _edited(text, path, lambda table, name: table[name].remove(value), wanted)
    if previous is None:
        return _edited(text, path, _drop, _without(document, change["path"]))
    return _edited(text, path, lambda table, name: table.__setitem__(name, _tomlkit().value(previous)),
                   _with(document, path, parse("x = " + previous)["x"]))


def _with(document: Dict[str, Any], path: Tuple[str, ...], value: Any) -> Dict[str, Any]:
    return with_setting(document, Setting(VALUE, path, value))


def _without(document: Dict[str, Any], path: List[str]) -> Dict[str, Any]:
    if path[1:]:
        return {**document, path[0]: _without(document[path[0]], path[1:])}
    return {key: value for key, value in document.items() if key != path[0]}


def _pruned(value: Any) -> Any:
    """A document less its empty tables, which may or may not have a line of their own."""
    if not isinstance(value, dict):
        return value
    found = {key: _pruned(item) for key, item in value.items()}
    return {key: item for key, item in found.items() if item != {}}


def _drop(table: Any, name: str) -> None:
    del table[name]


def _kept(before: str, after: str, changes: int) -> bool:
    """Whether every line is still there but those that were to be changed."""
    lost = Counter(line.rstrip() for line in before.split("\n")) - Counter(line.rstrip() for line in after.split("\n"))
    return sum(lost.values()) <= changes
