"""What a person asks of `chandler configure`, and what an engine's module answers: settings for files."""

from __future__ import annotations

import posixpath
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from shim.errors import ConfigError

TOML, JSON, TEMPLATE = "toml", "json", "template"

# What a setting is: a table that is ours alone; a value; an element of a list.
TABLE, VALUE, ELEMENT = "table", "value", "element"

PROGRAMS = ("chandler-runtime", "chandler-runc", "chandler-youki", "chandler-crun")


class Setting(NamedTuple):
    """`path` is the keys from the top of the document; for an element, of its list."""

    kind: str
    path: Tuple[str, ...]
    value: Any


class Edit(NamedTuple):
    """What one file is to have.  `own`: a file that is Chandler's alone, a drop-in; `form`: TOML, JSON or TEMPLATE."""

    path: str
    form: str
    settings: List[Setting]
    own: bool = False


class Wish(NamedTuple):
    """`handlers`: name and program of each; `annotations`: what is let through; `version`: the engine's, () when it
    is unknown; `drop_in`: a path, "" for the usual one, None when none was asked for."""

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
    home: str  # where a caller without root keeps configuration, "" for root
    nri_required: bool = False


class Plan(NamedTuple):
    """`edits` in the order in which they are written; `notes` for the person; `command`: what makes the engine read
    its configuration anew, () when it does so by itself."""

    edits: List[Edit]
    notes: List[str]
    command: Tuple[str, ...]


class Read(NamedTuple):
    """How an engine's module sees files: their text without what Chandler has put there (None when there would be
    no file), their text as it is, and the paths that a pattern stands for."""

    text: Callable[[str], Optional[str]]
    raw: Callable[[str], Optional[str]]
    glob: Callable[[str], List[str]]


def in_directory(wanted: Optional[str], directory: str, usual: str, ending: str = "") -> str:
    """The path of a drop-in.  Raises ConfigError for one that the engine would not read."""
    path = wanted or f"{directory}/{usual}"
    if posixpath.dirname(path) != directory or not path.endswith(ending):
        raise ConfigError(f"--drop-in {path} would not be read", f"name a file {directory}/NAME{ending}")
    return path


def lookup(document: Any, path: Tuple[str, ...]) -> Any:
    """What is at a path of nested dicts; None when nothing is."""
    for part in path:
        if not isinstance(document, dict) or part not in document:
            return None
        document = document[part]
    return document


def table(document: Any, path: Tuple[str, ...]) -> Dict[str, Any]:
    """The table at a path; an empty one where there is none, or something else."""
    found = lookup(document, path)
    return found if isinstance(found, dict) else {}


def words(document: Any, path: Tuple[str, ...]) -> List[str]:
    """The texts of the list at a path; none where there is no list."""
    found = lookup(document, path)
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


def merged(low: Dict[str, Any], high: Dict[str, Any]) -> Dict[str, Any]:
    """Two documents as one, table by table; the second wins."""
    result = dict(low)
    for key, value in high.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def with_setting(document: Dict[str, Any], setting: Setting) -> Dict[str, Any]:
    """A document as it is to be with a setting in it."""
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
