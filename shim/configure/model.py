"""The values that `chandler configure` and the engines' modules exchange: requests, plans, and settings for files."""

from __future__ import annotations

import posixpath
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from shim.errors import ConfigError

TOML, JSON, TEMPLATE = "toml", "json", "template"

# Kinds of settings: a table that is Chandler's alone; one value; one element of a list.
TABLE, VALUE, ELEMENT = "table", "value", "element"

PROGRAMS = ("chandler-runtime", "chandler-runc", "chandler-youki", "chandler-crun")


class Setting(NamedTuple):
    """`path`: the keys from the top of the document to the table or value; for an element, to its list."""

    kind: str
    path: Tuple[str, ...]
    value: Any


class Edit(NamedTuple):
    """The settings for one file.  `form`: TOML, JSON or TEMPLATE; `own`: it is a drop-in that only Chandler writes."""

    path: str
    form: str
    settings: List[Setting]
    own: bool = False


class Wish(NamedTuple):
    """What the command line asks for.  `handlers`: name and program of each; `annotations`: patterns of those that the
    engine passes on; `version`: the engine's, () when it is unknown; `drop_in`: a path, "" for the usual one, None when
    no drop-in was asked for; `home`: where a caller without root keeps configuration, "" for root."""

    engine: str
    handlers: List[Tuple[str, str]]
    annotations: List[str]
    default: bool
    cdi: bool
    nri: bool
    config: str
    drop_in: Optional[str]
    in_place: bool
    version: Tuple[int, ...]
    home: str
    nri_required: bool = False


class Changes(NamedTuple):
    """`edits` in the order in which they are written; `notes` to print; `command`: makes the engine read its
    configuration again, () when it does so by itself."""

    edits: List[Edit]
    notes: List[str]
    command: Tuple[str, ...]


class Read(NamedTuple):
    """How an engine's module reads files.  `text`: a file without what Chandler has written (None when there would be
    no file); `raw`: the file as it is; `glob`: the paths that match a pattern, sorted."""

    text: Callable[[str], Optional[str]]
    raw: Callable[[str], Optional[str]]
    glob: Callable[[str], List[str]]


def in_directory(wanted: Optional[str], directory: str, usual: str, ending: str = "") -> str:
    """The drop-in's path: `wanted` or the usual one.  Raises ConfigError when the engine would not read it."""
    path = wanted or f"{directory}/{usual}"
    if posixpath.dirname(path) != directory or not path.endswith(ending):
        raise ConfigError(f"--drop-in {path} would not be read", f"name a file {directory}/NAME{ending}")
    return path


def lookup(document: Any, path: Tuple[str, ...]) -> Any:
    """The value at a path of nested dicts; None when there is none."""
    for part in path:
        if not isinstance(document, dict) or part not in document:
            return None
        document = document[part]
    return document


def table(document: Any, path: Tuple[str, ...]) -> Dict[str, Any]:
    """The table at a path; an empty one when there is none, or no table."""
    found = lookup(document, path)
    return found if isinstance(found, dict) else {}


def words(document: Any, path: Tuple[str, ...]) -> List[str]:
    """The strings of the list at a path; none when there is no list."""
    found = lookup(document, path)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def merged(low: Dict[str, Any], high: Dict[str, Any]) -> Dict[str, Any]:
    """Merges two documents table by table; a value of `high` replaces one of `low`."""
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def with_setting(document: Dict[str, Any], setting: Setting) -> Dict[str, Any]:
    """A copy of the document with the setting."""
    value = setting.value
    if setting.kind == ELEMENT:
        value = [*(lookup(document, setting.path) or []), value]
    result = dict(document)
    at = result
    for part in setting.path[:-1]:
        at[part] = dict(at[part]) if isinstance(at.get(part), dict) else {}
        at = at[part]
    at[setting.path[-1]] = value
    return result


def with_settings(document: Dict[str, Any], settings: List[Setting]) -> Dict[str, Any]:
    """A copy of the document with all the settings, in their order."""
    for setting in settings:
        document = with_setting(document, setting)
    return document
