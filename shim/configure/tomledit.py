"""Edits TOML in place: `put` adds settings to a text, `take` removes them again, and all other bytes stay.

Settings whose table can have a header of its own are appended to the text as one block, which needs no library.  For
every other edit tomlkit edits the whole document, and the standard library's parser checks that the result means
exactly what was intended.  If it does not, ConfigError refuses the file and says what to write by hand.

This module looks for a table in the nodes of tomlkit's document (`body`), not with `document[key]`.  In the tomlkit of
Debian 12 and 13 and Ubuntu 24.04 the latter cannot change a table whose parts are not together, as in the
configuration of EKS nodes.  Pure.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from typing import Any, Callable

from shim.configure.model import ELEMENT, TABLE, VALUE, Setting, lookup, with_setting, with_settings
from shim.errors import ChandlerError, ConfigError
from shim.shapes import Document

COMMENT = "# From `chandler configure`; its --remove takes this out again.\n"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

Path = tuple[str, ...]


def parse(text: str) -> Document:
    """Parses a document.  Raises ConfigError for a text that is not TOML."""
    try:
        import tomllib
    except ImportError:  # Python before 3.11
        import tomli as tomllib  # type: ignore[no-redef, unused-ignore]
    try:
        return tomllib.loads(text)
    except (RecursionError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"it is not TOML: {error}", "correct it first") from None


def put(text: str, settings: list[Setting]) -> tuple[str, Document]:
    """Returns the text with the settings, and the record that `take` needs.  Raises ConfigError.

    The record has the appended `block`; the paths of the `tables` that are ours; the `values` in the block (path and
    value); and the `changes` outside of the block.  Each change has `previous`: for an element, the text inserted into
    the list; for anything else, the former value as the file had it written, None when there was none.
    """
    document = parse(text)
    missing = [setting for setting in settings if not _has(document, setting)]
    appended = [setting for setting in missing if _appendable(text, document, setting)]
    result, changes = text, []
    for setting in missing:
        if setting not in appended:
            result, previous = _put_in_place(result, setting)
            changes.append(
                {"kind": setting.kind, "path": list(setting.path), "value": setting.value, "previous": previous}
            )
    block = ""
    if appended:
        blank_lines = "" if not result else "\n" if result.endswith("\n") else "\n\n"
        block = blank_lines + COMMENT + snippet(appended)
        wanted = with_settings(parse(result), appended)
        result += block
        if not _means(result, wanted):
            raise _cannot_edit(_write_by_hand(appended))
    return result, {
        "block": block,
        "changes": changes,
        "tables": [list(setting.path) for setting in missing if setting.kind == TABLE],
        "values": [[list(setting.path), setting.value] for setting in appended if setting.kind == VALUE],
    }


def take(text: str, record: Document) -> str:
    """Returns the text without what `put` added, and keeps every other change since then.  Raises ConfigError.

    Our tables are removed in any case.  A value or element that somebody has changed is no longer ours, and stays.
    """
    block = record["block"]
    text = text.replace(block if block and text.count(block) == 1 else COMMENT, "")
    for path in record["tables"]:
        text = _remove(text, tuple(path))
    for path, value in record["values"]:
        if lookup(parse(text), tuple(path)) == value:
            text = _remove(text, tuple(path))
    for change in record["changes"]:
        if change["kind"] != TABLE:
            text = _undo(text, change["kind"], tuple(change["path"]), change["value"], change["previous"])
    return text


def notes_about_later_files(paths: list[str], path: Path, read: Callable[[str], str | None]) -> list[str]:
    """Returns a note for each file that the engine reads after ours and that sets the same key."""
    notes = []
    for name in paths:
        try:
            if lookup(parse(read(name) or ""), path) is not None:
                notes.append(f"{name} is read later, and sets {'.'.join(path)}, so its value is the one in force")
        except ConfigError:
            continue  # whatever needs that file's content reports this
    return notes


def snippet(settings: list[Setting]) -> str:
    """Writes settings as TOML, each table with a header of its own."""
    return "\n".join(_lines(with_settings({}, settings))).lstrip("\n") + "\n"


def render(value: Any) -> str:
    """Writes a value as TOML.  Every JSON string is a TOML string, except that TOML escapes DEL."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key(name)} = {render(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(render, value)) + "]"
    if isinstance(value, (str, bool)):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def key(name: str) -> str:
    """Writes a key, in quotes where TOML needs them."""
    return name if _BARE_KEY.fullmatch(name) else render(name)


def _lines(table: Document, path: Path = ()) -> list[str]:
    """A table's lines, with its header and those of the tables in it, each after an empty line."""
    values = [f"{key(name)} = {render(value)}" for name, value in table.items() if not isinstance(value, dict)]
    header = ["", "[" + ".".join(map(key, path)) + "]"] if path and (values or not table) else []
    tables = [line for name, value in table.items() if isinstance(value, dict) for line in _lines(value, (*path, name))]
    return header + values + tables


def _has(document: Document, setting: Setting) -> bool:
    present = lookup(document, setting.path)
    if setting.kind == ELEMENT:
        return isinstance(present, list) and setting.value in present
    return bool(present == setting.value)


def _appendable(text: str, document: Document, setting: Setting) -> bool:
    """Whether the setting can be appended: its table has no header in the text yet, and is not in an inline table."""
    return setting.kind != ELEMENT and _means(f"{text}\n{snippet([setting])}", with_setting(document, setting))


def _put_in_place(text: str, setting: Setting) -> tuple[str, str | None]:
    """Puts a setting into its existing table.  Returns the text and `previous` for the record.  Raises ConfigError."""
    previous = _as_written(text, setting.path)
    remedy = _write_by_hand([setting])
    if setting.kind != ELEMENT:
        return _set(text, setting.path, render(setting.value), remedy), previous
    if previous is None:
        return _set(text, setting.path, render([setting.value]), remedy), None
    array, inserted = _with_element(previous, setting.value, remedy)
    return _set(text, setting.path, array, remedy), inserted


def _undo(text: str, kind: str, path: Path, value: Any, previous: str | None) -> str:
    """Undoes what `_put_in_place` did, unless somebody has changed it since.  Raises ConfigError."""
    present = lookup(parse(text), path)
    if kind == ELEMENT:
        if not isinstance(present, list) or value not in present:
            return text
        if present != [value] or previous is not None:
            remedy = _remove_by_hand(path)
            array = _without_element(_as_written(text, path) or "", value, previous or "", remedy)
            return _set(text, path, array, remedy)
    elif present != value:
        return text
    return _remove(text, path) if previous is None else _set(text, path, previous, _remove_by_hand(path))


def _with_element(array: str, value: Any, remedy: str) -> tuple[str, str]:
    """Adds an element at the end of an array's text.  Returns the new text and the inserted part.  Raises ConfigError.

    It does not use tomlkit's `append`, which makes invalid TOML of an array that ends in a comment.
    """
    elements = _parsed_value(array)
    start = array[:-1].rstrip()
    last = start.rpartition("\n")[2]
    gap = "\n" + last[: len(last) - len(last.lstrip())] if "\n" in array else " "
    # Where the element may go: after "[", after a comma, after an element, after a comment below an element.
    for separator in (*([] if elements else [""]), gap, "," + gap, gap + ", "):
        inserted = separator + render(value)
        result = start + inserted + array[len(start) :]
        if _means(f"x = {result}", {"x": [*elements, value]}):
            return result, inserted
    raise _cannot_edit(remedy)


def _without_element(array: str, value: Any, inserted: str, remedy: str) -> str:
    """The text of an array without an element.  Raises ConfigError.

    `inserted` is the text that `_with_element` inserted ("" in records from before 0.1.0).
    """
    wanted = {"x": [item for item in _parsed_value(array) if item != value]}
    written = render(value)
    for part in filter(None, (inserted, ", " + written, written + ", ", written + ",", written)):
        start, _, end = array.rpartition(part)
        if _means(f"x = {start}{end}", wanted):
            return start + end
    raise _cannot_edit(remedy)


def _parsed_value(written: str) -> Any:
    return parse(f"x = {written}")["x"]


def _tomlkit() -> Any:
    try:
        import tomlkit
    except ImportError:
        raise ChandlerError(
            "tomlkit, the Python package that edits TOML, is not installed", "install python3-tomlkit"
        ) from None
    return tomlkit


def _as_written(text: str, path: Path) -> str | None:
    """The text of the value at a path, as the file has it written; None when there is no value."""
    present = lookup(parse(text), path)
    if present is None:
        return None
    for table in _tables(_tomlkit().parse(text), path[:-1]):
        if path[-1] in _container(table) and not isinstance(present, dict):
            return str(_container(table).item(path[-1]).as_string())
    return render(present)


def _set(text: str, path: Path, written: str, remedy: str) -> str:
    """The text with a value at a path: in place of the old value, or new in the innermost table that exists.

    `written` is the value's TOML.  Raises ConfigError, with `remedy`.
    """
    wanted = with_setting(parse(text), Setting(VALUE, path, _parsed_value(written)))
    previous = _as_written(text, path) or ""
    text = text if text.endswith("\n") or not text else text + "\n"

    def act(document: Any) -> None:
        depth, tables = next(
            (depth, tables)
            for depth in range(len(path) - 1, -1, -1)
            for tables in [list(_tables(document, path[:depth]))]
            if tables
        )
        name, value = path[depth], written
        for part in reversed(path[depth + 1 :]):
            value = "{" + f"{key(part)} = {value}" + "}"
        table = next((table for table in tables if name in _container(table)), None)
        if table is not None:
            _container(table)[name] = _tomlkit().value(value)  # `table[name]` might change the indentation
            return
        with_header = (table for table in tables if type(table).__name__ != "Table" or not table.is_super_table())
        table = next(with_header, tables[0])
        if type(table).__name__ == "InlineTable":
            table.append(name, _tomlkit().value(value))
            return
        # Insert after the table's last value: tomlkit would insert after the comment of the next table.
        body = _container(table).body
        values = [
            (number, item)
            for number, (other, item) in enumerate(body)
            if other is not None and not hasattr(item, "is_super_table")
        ]
        number, indent = (values[-1][0] + 1, values[-1][1].trivia.indent) if values else (0, "")
        body.insert(number, _tomlkit().parse(f"{indent}{key(name)} = {value}\n").body[0])

    result = _edited(text, act, wanted, remedy)
    # What tomlkit replaced must be the previous value and nothing else.
    start = len(posixpath.commonprefix([text, result]))
    end = len(posixpath.commonprefix([text[start:][::-1], result[start:][::-1]]))
    if text[start : len(text) - end].strip() not in previous:
        raise _cannot_edit(remedy)
    return result


def _remove(text: str, path: Path) -> str:
    """The text without the table or value at a path.  Raises ConfigError."""
    document = parse(text)
    if lookup(document, path) is None:
        return text

    def act(document: Any) -> None:
        for table in list(_tables(document, path[:-1])):
            if type(table).__name__ == "InlineTable":
                table.remove(path[-1])
                continue
            body = _container(table).body
            for number, (name, item) in enumerate(body):
                if name is not None and name.key == path[-1]:
                    body[number] = None, _tomlkit().ws(_trailing_comments(item))

    return _edited(text, act, _without(document, path), _remove_by_hand(path))


def _trailing_comments(item: Any) -> str:
    """The blank lines and comments at a table's end.

    To a reader they belong to the next table, while tomlkit counts them to this one.
    """
    written = ""
    for name, inner in reversed(_container(item).body if hasattr(item, "is_super_table") else []):
        if name is not None:
            return _trailing_comments(inner) + written
        written = inner.as_string() + written
    return written


def _edited(text: str, act: Callable[[Any], None], wanted: Document, remedy: str) -> str:
    """The text after `act` has edited its tomlkit document.  Raises ConfigError when the result does not mean `wanted`.

    The result has only the changed lines from tomlkit and all others from the text.  The tomlkit of Debian 12 does not
    keep the indentation of every line, for instance in the configuration of AKS nodes.
    """
    tomlkit = _tomlkit()
    try:
        document = tomlkit.parse(text)
        before = document.as_string().split("\n")
        act(document)
        after = document.as_string().split("\n")
    except (tomlkit.exceptions.TOMLKitError, LookupError, ValueError, TypeError, AttributeError):
        raise _cannot_edit(remedy) from None  # each tomlkit release fails differently on what it does not support
    lines = text.split("\n")
    start = len(posixpath.commonprefix([before, after]))
    end = len(posixpath.commonprefix([before[start:][::-1], after[start:][::-1]]))
    result = "\n".join([*lines[:start], *after[start : len(after) - end], *lines[len(lines) - end :]])
    if len(lines) != len(before) or not _means(result, wanted):
        raise _cannot_edit(remedy)
    return result


def _container(table: Any) -> Any:
    """The tomlkit object that holds the nodes of a table.  A document holds its nodes itself."""
    return table if type(table).__name__ == "TOMLDocument" else table.value


def _tables(table: Any, path: Path) -> Iterator[Any]:
    """Every tomlkit node that is a part of the table at a path.  A table may have several parts in a document."""
    if not path:
        yield table
        return
    for name, item in _container(table).body:
        if name is not None and name.key == path[0] and type(item).__name__ in ("Table", "InlineTable"):
            yield from _tables(item, path[1:])


def _means(text: str, wanted: Document) -> bool:
    """Whether a text parses to the document `wanted`.  Empty tables are ignored, since one may lose its header."""
    try:
        return bool(_without_empty(parse(text)) == _without_empty(wanted))
    except ConfigError:
        return False


def _without_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    items = {name: _without_empty(item) for name, item in value.items()}
    return {name: item for name, item in items.items() if item != {}}


def _without(document: Document, path: Path) -> Document:
    if path[1:]:
        return {**document, path[0]: _without(document[path[0]], path[1:])}
    return {name: value for name, value in document.items() if name != path[0]}


def _cannot_edit(remedy: str) -> ConfigError:
    return ConfigError("it is written in a way that this command cannot edit safely", remedy)


def _write_by_hand(settings: list[Setting]) -> str:
    return "write this into it: " + " ".join(snippet(settings).split())


def _remove_by_hand(path: Path) -> str:
    return f"remove {'.'.join(path)} by hand"
