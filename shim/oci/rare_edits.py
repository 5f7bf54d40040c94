"""Puts into config.json the kinds of edits that only rare keys of a request make.  shim.oci.writer calls it for them.

Each function applies the edits of one kind to `config`, and copies the parts that it changes.  Pure.
Source: OCI runtime specification 1.2.
"""

from __future__ import annotations

from shim import edits as _edits
from shim.oci.reader import member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

    from shim.edits import Edit
    from shim.shapes import Document


def apply(config: Document, by_kind: dict[str, list[Edit]]) -> None:
    """Puts the edits into `config`, whose top level the caller has copied.  Ignores kinds that are not in _APPLY."""
    for kind, change in _APPLY:
        if kind in by_kind:
            change(config, by_kind[kind])


def _put(parent: Document, edits: list[Edit]) -> None:
    """Sets each edit's key to its value, or removes the key when the value is None."""
    for _, key, value, _ in edits:
        if value is None:
            parent.pop(key, None)
        else:
            parent[key] = value


def _process(config: Document, edits: list[Edit]) -> None:
    process = member(config, "process", dict)
    _put(process, edits)
    if any(edit[1] == "args" for edit in edits):
        process.pop("commandLine", None)  # what Windows has instead of args


def _user(config: Document, edits: list[Edit]) -> None:
    user = member(member(config, "process", dict), "user", dict)
    user.pop("username", None)
    for _, key, value, _ in edits:
        user[key] = value


def _capabilities(config: Document, edits: list[Edit]) -> None:
    _put(member(member(config, "process", dict), "capabilities", dict), edits)


def _rlimits(config: Document, edits: list[Edit]) -> None:
    process = member(config, "process", dict)
    limits = member(process, "rlimits", list)
    replaced = {edit[1] for edit in edits}
    kept = [entry for entry in limits if not (isinstance(entry, dict) and entry.get("type") in replaced)]
    process["rlimits"] = kept + [
        {"type": name, "hard": value["hard"], "soft": value["soft"]} for _, name, value, _ in edits
    ]


def _hostname(config: Document, edits: list[Edit]) -> None:
    config["hostname"] = edits[-1][2]


def _root(config: Document, edits: list[Edit]) -> None:
    _put(member(config, "root", dict), edits)


def _sysctls(config: Document, edits: list[Edit]) -> None:
    _put(member(member(config, "linux", dict), "sysctl", dict), edits)


def _namespaces(config: Document, edits: list[Edit]) -> None:
    linux = member(config, "linux", dict)
    namespaces = member(linux, "namespaces", list)
    for _, kind, path, _ in edits:  # path: None for the host's namespace, "" for a new one
        entry = {"type": kind, "path": path} if path else {"type": kind}
        indexes = [
            n for n, present in enumerate(namespaces) if isinstance(present, dict) and present.get("type") == kind
        ]
        if path is not None and indexes:
            namespaces[indexes[0]] = entry
        elif path is not None:
            namespaces.append(entry)
        for index in reversed(indexes if path is None else indexes[1:]):
            del namespaces[index]


def _linux(config: Document, edits: list[Edit]) -> None:
    _put(member(config, "linux", dict), edits)


def _hugepages(config: Document, edits: list[Edit]) -> None:
    resources = member(member(config, "linux", dict), "resources", dict)
    limits = member(resources, "hugepageLimits", list)
    replaced = {edit[1] for edit in edits}
    kept = [entry for entry in limits if not (isinstance(entry, dict) and entry.get("pageSize") in replaced)]
    resources["hugepageLimits"] = kept + [{"pageSize": size, "limit": limit} for _, size, limit, _ in edits]


def _device_rules(config: Document, edits: list[Edit]) -> None:
    rules = member(member(member(config, "linux", dict), "resources", dict), "devices", list)
    for _, _, rule, _ in edits:
        if rule not in rules:
            # A rule that denies everything cancels those before it.
            rules.insert(len(rules) if rule["allow"] else 0, rule)


# In the order in which they are applied.
_APPLY: tuple[tuple[str, Callable[[Document, list[Edit]], None]], ...] = (
    (_edits.PROCESS, _process),
    (_edits.USER, _user),
    (_edits.CAPABILITY, _capabilities),
    (_edits.RLIMIT, _rlimits),
    (_edits.HOSTNAME, _hostname),
    (_edits.ROOT, _root),
    (_edits.SYSCTL, _sysctls),
    (_edits.NAMESPACE, _namespaces),
    (_edits.LINUX, _linux),
    (_edits.HUGEPAGES, _hugepages),
    (_edits.DEVICE_RULE, _device_rules),
)
