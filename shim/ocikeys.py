"""The OCI interpreter of the Edits that only the rarer keys of a request make; shim.oci hands over to it.

Each applies its kind to a document whose parts it copies first.  Pure.  Source: OCI runtime specification 1.2.
"""

from __future__ import annotations

from shim import edits as _edits
from shim import errors
from shim.oci import member

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List

    from shim.edits import Edit

    Document = Dict[str, Any]

CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")


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
    process["rlimits"] = kept + [{"type": name, "hard": value["hard"], "soft": value["soft"]} for _, name, value, _ in edits]


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


# --- questions --------------------------------------------------------------------------------------------------

def namespace(config: Document, kind: str) -> Any:
    """The namespace of a kind: its path, '' for a new one, None when the container has the host's."""
    linux = config.get("linux")
    entries = linux.get("namespaces") if isinstance(linux, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("type") == kind:
            return entry.get("path") or ""
    return None


def capabilities(config: Document) -> Dict[str, List[str]]:
    """The sets that config.json has.  Raises BundleError for odd shapes."""
    process = config.get("process")
    found = process.get("capabilities") if isinstance(process, dict) else None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise errors.BundleError("config.json: process.capabilities is not an object")
    for key, names in found.items():
        if not (names is None or isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise errors.BundleError(f"config.json: process.capabilities.{key} is not a list of texts")
    return {key: names or [] for key, names in found.items() if key in CAPABILITY_SETS}


def rlimits(config: Document) -> Dict[str, Any]:
    """The limits that config.json has, by type, each as (soft, hard)."""
    process = config.get("process")
    found = process.get("rlimits") if isinstance(process, dict) else None
    return {str(entry.get("type")): (entry.get("soft"), entry.get("hard"))
            for entry in (found if isinstance(found, list) else ()) if isinstance(entry, dict)}


def hugepages(config: Document) -> Dict[str, Any]:
    """The limits on huge pages that config.json has, by the size of the page."""
    linux = config.get("linux")
    resources = linux.get("resources") if isinstance(linux, dict) else None
    found = resources.get("hugepageLimits") if isinstance(resources, dict) else None
    return {str(entry.get("pageSize")): entry.get("limit")
            for entry in (found if isinstance(found, list) else ()) if isinstance(entry, dict)}


def kernel_mounts(config: Document) -> List[Document]:
    """The mounts of sysfs and of control groups."""
    mounts = config.get("mounts")
    return [mount for mount in (mounts if isinstance(mounts, list) else ())
            if isinstance(mount, dict) and mount.get("type") in ("sysfs", "cgroup", "cgroup2")]


def text(config: Document, *keys: str) -> str:
    """The text at a path of keys, '' where there is none."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def readonly_root(config: Document) -> bool:
    """Whether the engine has made the root file system read-only."""
    root = config.get("root")
    return isinstance(root, dict) and root.get("readonly") is True


def oom_score(config: Document) -> int:
    """The engine's oom_score_adj; 0 where it says none."""
    process = config.get("process")
    value = process.get("oomScoreAdj") if isinstance(process, dict) else None
    return value if type(value) is int else 0


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
