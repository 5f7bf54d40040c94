"""Turns valid CDI container edits into Edits (see shim.edits).  Tables say what each category and field becomes."""

from __future__ import annotations

from shim import edits as kinds
from shim import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any, Callable

    from shim.edits import Edit
    from shim.shapes import Document

    Key = Any
    Pairs = Iterator[tuple[Key, Any]]

# A hook without an environment would inherit the container's, with its LD_PRELOAD, and run as root with it.
SAFE_HOOK_ENV = ("PATH=" + paths.SAFE_PATH,)

# OCI field: CDI field
_MOUNT = (("destination", "containerPath"), ("type", "type"), ("source", "hostPath"), ("options", "options"))
_HOOK = (("path", "path"), ("args", "args"), ("env", "env"), ("timeout", "timeout"))
_RDT = tuple((field, field) for field in ("closID", "schemata", "l3CacheSchema", "memBwSchema", "enableMonitoring"))
_NODE = tuple(
    (field, field) for field in ("path", "hostPath", "type", "major", "minor", "fileMode", "permissions", "uid", "gid")
)
_KEPT_ZERO = ("fileMode", "uid", "gid", "timeout")  # fields in which 0 means something else than an absent field


def _fields(table: Iterable[tuple[str, str]], item: Document) -> Document:
    """The CDI object `item` with the OCI field names of `table`; empty fields are left out."""
    return {name: item[key] for name, key in table if item.get(key) or (key in _KEPT_ZERO and key in item)}


def compile_edits(block: Document, origin: str, hook_env: Sequence[str] | None = SAFE_HOOK_ENV) -> tuple[Edit, ...]:
    """The edits of `block`, one decoded and valid `containerEdits`, in the order of _KINDS.

    `origin` goes into every edit, for errors.  `hook_env` is the environment for hooks that have none; with None they
    get none, as in the CDI Go library.
    """

    def hooks(items: Any) -> Pairs:
        for item in items:
            hook = _fields(_HOOK, item)
            if hook_env is not None:
                hook.setdefault("env", list(hook_env))
            yield item["hookName"], hook

    pairs: dict[str, Callable[[Any], Pairs]] = {**_PAIRS, "hooks": hooks}
    return tuple(
        (kind, key, value, origin)
        for category, kind in _KINDS
        if block.get(category) is not None
        for key, value in pairs[category](block[category])
    )


def container_edits(edits: Iterable[Edit]) -> Document:
    """The `containerEdits` that have these edits; those that CDI cannot express are left out."""
    fields = {kinds.DEVICE: _NODE, kinds.MOUNT: _MOUNT, kinds.HOOK: _HOOK, kinds.RDT: _RDT}
    block: Document = {}
    for kind, key, value, _ in edits:
        category = next((name for name, each in _KINDS if each == kind), "")
        if kind in fields:
            value = {field: value[name] for name, field in fields[kind] if name in value}
        if kind == kinds.ENV:
            value = f"{key}={value}"
        elif kind == kinds.NET_DEVICE:
            value = {"hostInterfaceName": key, "name": value}
        elif kind == kinds.HOOK:
            value["hookName"] = key
        elif kind == kinds.GID:
            value = key
        if kind == kinds.RDT:
            block[category] = value
        elif category:
            block.setdefault(category, []).append(value)
    return block


def _env(items: Any) -> Pairs:
    for item in items:
        name, _, value = item.partition("=")
        yield name, value


def _gids(items: Any) -> Pairs:
    return ((gid, None) for gid in dict.fromkeys(items) if gid)  # 0 is the default group, not an additional one


# (category in CDI, kind of edit), in the order in which the CDI Go library applies them.
_KINDS = (
    ("env", kinds.ENV),
    ("deviceNodes", kinds.DEVICE),
    ("netDevices", kinds.NET_DEVICE),
    ("mounts", kinds.MOUNT),
    ("hooks", kinds.HOOK),
    ("intelRdt", kinds.RDT),
    ("additionalGids", kinds.GID),
)
# category -> the (key, value) of each edit that its items become
_PAIRS: dict[str, Callable[[Any], Pairs]] = {
    "env": _env,
    "deviceNodes": lambda items: ((item["path"], _fields(_NODE, item)) for item in items),
    "netDevices": lambda items: ((item["hostInterfaceName"], item["name"]) for item in items),
    "mounts": lambda items: ((item["containerPath"], _fields(_MOUNT, item)) for item in items),
    "intelRdt": lambda item: iter((("", _fields(_RDT, item)),)),
    "additionalGids": _gids,
}
