"""Puts into config.json the edits that only the rarer keys of a request make; shim.oci.writer hands over to it.

Each applies its kind to a document whose parts it copies first.  Pure.  Source: OCI runtime specification 1.2.
"""

from __future__ import annotations

from shim import edits as _edits
from shim.oci.reader import member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List

    from shim.edits import Edit

    Document = Dict[str, Any]


def apply(config: Document, by_kind: Dict[str, List[Edit]]) -> None:
    """Puts the edits of these kinds into `config`, a document that is ours to change at its top."""
    for kind, change in _APPLY:
        if kind in by_kind:
            change(config, by_kind[kind])


def _put(parent: Document, edits: List[Edit]) -> None:
    for _, key, value, _ in edits:
        if value is None:
            parent.pop(key, None)
        else:
            parent[key] = value


def _process(config: Document, edits: List[Edit]) -> None:
    process = member(config, "process", dict)
    _put(process, edits)
    if any(edit[1] == "args" for edit in edits):
        process.pop("commandLine", None)  # Windows' form of the same


def _user(config: Document, edits: List[Edit]) -> None:
    user = member(member(config, "process", dict), "user", dict)
    user.pop("username", None)
    for _, key, value, _ in edits:
        user[key] = value


def _capabilities(config: Document, edits: List[Edit]) -> None:
    _put(member(member(config, "process", dict), "capabilities", dict), edits)


def _rlimits(config: Document, edits: List[Edit]) -> None:
    process = member(config, "process", dict)
    limits = member(process, "rlimits", list)
    asked = {edit[1] for edit in edits}
    kept = [entry for entry in limits if not (isinstance(entry, dict) and entry.get("type") in asked)]
    process["rlimits"] = kept + [
        {"type": name, "hard": value["hard"], "soft": value["soft"]} for _, name, value, _ in edits
    ]


def _hostname(config: Document, edits: List[Edit]) -> None:
    config["hostname"] = edits[-1][2]


def _root(config: Document, edits: List[Edit]) -> None:
    _put(member(config, "root", dict), edits)


def _sysctls(config: Document, edits: List[Edit]) -> None:
    _put(member(member(config, "linux", dict), "sysctl", dict), edits)


def _namespaces(config: Document, edits: List[Edit]) -> None:
    linux = member(config, "linux", dict)
    namespaces = member(linux, "namespaces", list)
    for _, kind, path, _ in edits:
        entry = {"type": kind, "path": path} if path else {"type": kind}
        places = [place for place, each in enumerate(namespaces) if isinstance(each, dict) and each.get("type") == kind]
        if path is not None and places:
            namespaces[places[0]] = entry
        elif path is not None:
            namespaces.append(entry)
        for place in reversed(places if path is None else places[1:]):
            del namespaces[place]


def _linux(config: Document, edits: List[Edit]) -> None:
    _put(member(config, "linux", dict), edits)


def _hugepages(config: Document, edits: List[Edit]) -> None:
    resources = member(member(config, "linux", dict), "resources", dict)
    limits = member(resources, "hugepageLimits", list)
    asked = {edit[1] for edit in edits}
    kept = [entry for entry in limits if not (isinstance(entry, dict) and entry.get("pageSize") in asked)]
    resources["hugepageLimits"] = kept + [{"pageSize": size, "limit": limit} for _, size, limit, _ in edits]


def _device_rules(config: Document, edits: List[Edit]) -> None:
    rules = member(member(member(config, "linux", dict), "resources", dict), "devices", list)
    for _, _, rule, _ in edits:
        if rule not in rules:
            rules.append(rule)


_APPLY: tuple[tuple[str, Callable[[Document, List[Edit]], None]], ...] = (
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
