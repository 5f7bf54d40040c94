"""The values that `chandler configure` and the engines' modules exchange: requests, plans, and settings for files."""

from __future__ import annotations

import posixpath
from typing import Any, Callable, NamedTuple

from shim.errors import ConfigError
from shim.shapes import Document

TOML, JSON, TEMPLATE = "toml", "json", "template"

# Kinds of settings: a table that is Chandler's alone; one value; one element of a list.
TABLE, VALUE, ELEMENT = "table", "value", "element"

PROGRAMS = ("chandler-runtime", "chandler-runc", "chandler-youki", "chandler-crun")


class Setting(NamedTuple):
    """A setting.  `path`: the keys from the top of the document to the table or value; for an element, to its list."""

    kind: str
    path: tuple[str, ...]
    value: Any


class Edit(NamedTuple):
    """The settings for one file.  `form`: TOML, JSON or TEMPLATE.  `own`: it is a drop-in that only Chandler writes."""

    path: str
    form: str
    settings: list[Setting]
    own: bool = False


class ConfigureRequest(NamedTuple):
    """What the command line asks for.

    `handlers`: name and program of each handler.  `annotations`: patterns of the annotations that the engine passes to
    the runtime.  `version`: the engine's version, () when it is unknown.  `drop_in`: a path, "" for the usual one, None
    when the command line asks for no drop-in.  `home`: the configuration directory of a caller without root, "" for
    root.
    """

    engine: str
    handlers: list[tuple[str, str]]
    annotations: list[str]
    default: bool
    cdi: bool
    nri: bool
    config: str
    drop_in: str | None
    in_place: bool
    version: tuple[int, ...]
    home: str
    nri_required: bool = False


class Changes(NamedTuple):
    """What an engine's module plans to change.

    `edits`: in the order in which they are written.  `notes`: sentences to print.  `command`: makes the engine read its
    configuration again, () when the engine does that without a command.
    """

    edits: list[Edit]
    notes: list[str]
    command: tuple[str, ...]


class Read(NamedTuple):
    """How an engine's module reads files.

    `text`: a file's text without the part that Chandler wrote, None when no file would be left.  `raw`: the file's text
    as it is, None when there is no file.  `glob`: the paths that match a pattern, sorted.
    """

    text: Callable[[str], str | None]
    raw: Callable[[str], str | None]
    glob: Callable[[str], list[str]]


def in_directory(wanted: str | None, directory: str, usual: str, ending: str = "") -> str:
    """The drop-in's path: `wanted`, or the file `usual` in `directory`.

    Raises ConfigError for a path that the engine would not read: outside of `directory`, or without `ending`.
    """
    path = wanted or f"{directory}/{usual}"
    if posixpath.dirname(path) != directory or not path.endswith(ending):
        raise ConfigError(f"--drop-in {path} would not be read", f"name a file {directory}/NAME{ending}")
    return path


def lookup(document: Any, path: tuple[str, ...]) -> Any:
    """The value at a path of nested dicts; None when there is none."""
    for part in path:
        if not isinstance(document, dict) or part not in document:
            return None
        document = document[part]
    return document


def table(document: Any, path: tuple[str, ...]) -> Document:
    """The table at a path; an empty one when the path has no value, or a value that is no table."""
    value = lookup(document, path)
    return value if isinstance(value, dict) else {}


def words(document: Any, path: tuple[str, ...]) -> list[str]:
    """The strings of the list at a path; none when there is no list."""
    value = lookup(document, path)
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def merged(low: Document, high: Document) -> Document:
    """Merges two documents table by table; a value of `high` replaces one of `low`."""
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def with_setting(document: Document, setting: Setting) -> Document:
    """A copy of the document with the setting."""
    value = setting.value
    if setting.kind == ELEMENT:
        value = [*(lookup(document, setting.path) or []), value]
    result = dict(document)
    table_at_part = result
    for part in setting.path[:-1]:
        table_at_part[part] = dict(table_at_part[part]) if isinstance(table_at_part.get(part), dict) else {}
        table_at_part = table_at_part[part]
    table_at_part[setting.path[-1]] = value
    return result


def with_settings(document: Document, settings: list[Setting]) -> Document:
    """A copy of the document with all the settings, in their order."""
    for setting in settings:
        document = with_setting(document, setting)
    return document
