"""Answers questions about config.json.  Only this module and its writing counterparts in shim.oci know its keys.

A document is the decoded config.json, a plain dict.  A part with the wrong type counts as absent; the functions that
raise BundleError instead say so.  Pure; part of the create path.
Source: OCI runtime specification.
"""

from __future__ import annotations

from shim import edits as _edits
from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

    from shim.edits import Edits
    from shim.shapes import Document


CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
_RULE = frozenset(("allow", "type", "major", "minor", "access"))
# The keys of config.json, linux and linux.resources that decide which devices a container has.
_KEYS = frozenset(("process", "root", "mounts", "hooks", "annotations", "linux", "devices", "namespaces", "resources"))
CPU_PERIOD = 100000  # microseconds: the kernel's default, Documentation/scheduler/sched-bwc.rst


def member(parent: Document, key: str, kind: Any) -> Any:
    """Replaces parent[key] by a copy, which the caller may change, and returns the copy.

    `kind` is dict or list; the copy is empty where the key was absent or null.  Raises BundleError for another type.
    """
    value = parent.get(key)
    if value is None:
        value = kind()
    elif type(value) is not kind:
        raise errors.BundleError(f"config.json: {key!r} is not {'an object' if kind is dict else 'a list'}")
    else:
        value = value.copy()
    parent[key] = value
    return value


def root_path(config: Document, bundle: str) -> str:
    """The container's root file system on the host; '' when unknown.  `bundle`: the bundle's directory or ''."""
    root = config.get("root")
    path = root.get("path") if isinstance(root, dict) else None
    if type(path) is not str or not path:
        return ""
    if path.startswith("/"):
        return path
    return f"{bundle}/{path}" if bundle else ""


def process_user(config: Document) -> Dict[str, int]:
    """{"uid": …, "gid": …} of the container's process; 0 where config.json has none."""
    process = config.get("process")
    user = process.get("user") if isinstance(process, dict) else None
    ids = {}
    for key in ("uid", "gid"):
        value = user.get(key) if isinstance(user, dict) else None
        ids[key] = value if type(value) is int and value > 0 else 0
    return ids


def environment(config: Document) -> Dict[str, str]:
    """The environment of the container's process.  When a variable is there twice, the last one counts."""
    process = config.get("process")
    env = process.get("env") if isinstance(process, dict) else None
    if not isinstance(env, list):
        return {}
    return dict(entry.split("=", 1) for entry in env if isinstance(entry, str) and "=" in entry)


def device_numbers(config: Document) -> Dict[str, str]:
    """The devices of linux.devices: number (c195:0) to path in the container."""
    linux = config.get("linux")
    devices = linux.get("devices") if isinstance(linux, dict) else None
    return {
        f"{'c' if entry.get('type') == 'u' else entry.get('type')}{entry.get('major')}:{entry.get('minor')}": str(
            entry.get("path")
        )
        for entry in devices or ()
        if isinstance(entry, dict)
    }


def in_user_namespace(config: Document) -> bool:
    """Whether config.json gives the container a user namespace."""
    return bool(_user_namespaces(config))


def maps_owners(config: Document) -> bool:
    """Whether to idmap bind mounts, so that files show their owners in the container's user namespace.

    True when the container joins a user namespace by path, or gets a new one with both uid and gid mappings.  Runtimes
    treat the options idmap and ridmap in different ways:
    - runc from 1.2 on and crun 1.28 map the owners in both cases.  For a path they read the namespace's own mappings.
    - crun 1.8 applies idmap and ignores ridmap.  runc 1.1 ignores both options, and requires both mappings even with a
      path.  The container starts and sees the owner as nobody, as it would without the option.
    - youki 0.7 refuses such a container, so its callers do not ask for idmapped mounts (runtimes.can_map_owners).
    - No runtime starts a container whose new namespace lacks a mapping.
    The CDI Go library (1.1.2) wants both mappings in either case.  Engines that share a pod's namespace by path often
    list no mappings: with that library such a container sees the owner as nobody, with ours it sees the real owners.
    """
    linux: Document = config["linux"] if isinstance(config.get("linux"), dict) else {}
    mapped = bool(linux.get("uidMappings") and linux.get("gidMappings"))
    return any(entry.get("path") or mapped for entry in _user_namespaces(config))


def _user_namespaces(config: Document) -> List[Document]:
    linux = config.get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    if not isinstance(namespaces, list):
        return []
    return [entry for entry in namespaces if isinstance(entry, dict) and entry.get("type") == "user"]


def resource(config: Document, controller: str, key: str, kind: Any = int) -> Any:
    """linux.resources.<controller>.<key> as the engine set it, or None.  Raises BundleError for another type."""
    value: Any = config
    for name in ("linux", "resources", controller, key):
        value = value.get(name) if isinstance(value, dict) else None
    if value is not None and type(value) is not kind:
        expected = "a whole number" if kind is int else "a text"
        raise errors.BundleError(f"config.json: linux.resources.{controller}.{key} is not {expected}")
    return value


def cgroups_path(config: Document, edits: Edits, manager: str = "") -> str:
    """linux.cgroupsPath once the edits are applied; '' for none.

    `manager` is crun's --cgroup-manager: with "disabled" the runtime makes no control group, and the answer is `//`.
    """
    if manager == "disabled":
        return "//"
    linux = config.get("linux")
    path = linux.get("cgroupsPath") if isinstance(linux, dict) else None
    for _, key, value, _ in edits.of(_edits.LINUX):
        path = value if key == "cgroupsPath" else path
    return path if isinstance(path, str) else ""


def unified(config: Document) -> Document:
    """linux.resources.unified; {} when there is none."""
    value: Any = config
    for name in ("linux", "resources", "unified"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def device_rules(config: Document) -> List[Any]:
    """linux.resources.devices; [] when there are none."""
    value: Any = config
    for name in ("linux", "resources", "devices"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, list) else []


NO_DENIAL = (None, None, None, "the lack of a device rule that denies everything")


def opening_rules(config: Document, complete: bool) -> List[Any]:
    """The device rules that let a container read or write devices, each as (type, major, minor, the rule in words).

    None stands for a type or a number that the rule leaves open.  `complete`: the runtime adds no rules to this list.

    - With a complete list everything is open until a rule denies everything, since crun applies the list as it is:
      NO_DENIAL is then the first.
    - A rule that denies everything cancels all rules before it.  A rule that denies less cancels nothing here, because
      cgroup v1 takes an allowance back only in exactly the words in which it was given.
    - A rule whose type is neither `c` nor `b` opens everything.  For type `a`, and without a type, runtimes and cgroup
      v1 ignore the numbers and the access; crun takes an unknown type to mean every type.
    - A rule with a key that differs from a known one only in case opens everything: see other_case.
    Source: OCI runtime specification, "Allowed Device list"; Documentation/admin-guide/cgroup-v1/devices.rst.
    """
    opening: List[Any] = [NO_DENIAL] if complete else []
    for rule in device_rules(config):
        if not isinstance(rule, dict):
            continue
        access, kind = str(rule.get("access") or "rwm"), rule.get("type")
        numbers = [
            number if type(number) is int and 0 <= number < 1 << 32 else None
            for number in (rule.get("major"), rule.get("minor"))
        ]
        words = " ".join(
            (str(kind or "a"), ":".join("*" if number is None else str(number) for number in numbers), access)
        )
        if kind not in ("c", "b") and rule.get("allow") is True or other_case(rule, _RULE):
            opening.append((None, None, None, f"the engine's device rule {words!r}, which opens every device,"))
        elif rule.get("allow") is True:
            if "r" in access or "w" in access:
                opening.append((kind, *numbers, f"the engine's device rule {words!r}"))
        elif kind in (None, "", "a") and numbers == [None, None] and "r" in access and "w" in access:
            opening = []
    return opening


def rule_covers(number: str, kind: Optional[str], major: Optional[int], minor: Optional[int]) -> bool:
    """Whether the type, major and minor of a device rule, where None means any, include a device number (c195:0)."""
    device_major, _, device_minor = number[1:].partition(":")
    return kind in (None, number[0]) and major in (None, int(device_major)) and minor in (None, int(device_minor))


def other_case(parent: Document, names: frozenset[str]) -> str:
    """The first key that differs from one of `names` only in case; '' when there is none.

    Runtimes written in Go read such a key as that name.  Source: Go's encoding/json, Unmarshal.
    """
    return next((key for key in parent if key not in names and key.casefold() in names), "")


def check_keys(config: Document) -> None:
    """Raises BundleError when a key differs from one of _KEYS only in case: runtimes read it in different ways."""
    linux = config.get("linux")
    resources = linux.get("resources") if isinstance(linux, dict) else None
    for parent in (config, linux, resources):
        key = other_case(parent, _KEYS) if isinstance(parent, dict) else ""
        if key:
            raise errors.BundleError(
                f"config.json: {key!r} differs from {key.casefold()!r} only in case, and runtimes read it differently",
                f"remove {key!r}",
            )


def bind_sources(config: Document) -> List[str]:
    """The sources of the bind mounts."""
    mounts = config.get("mounts")
    sources = []
    for mount in mounts if isinstance(mounts, list) else ():
        source = mount.get("source") if isinstance(mount, dict) else None
        if type(source) is str:
            options = mount.get("options")
            if mount.get("type") == "bind" or isinstance(options, list) and ("bind" in options or "rbind" in options):
                sources.append(source)
    return sources


def first_missing_node(config: Document, nodes: List[Any]) -> str:
    """The path of the first of `nodes` that the container cannot open, for lack of the node or of a device rule.

    `nodes`: devices as [path, type, major, minor].  '' when the container can open all of them.
    """
    linux = config.get("linux")
    linux = linux if isinstance(linux, dict) else {}
    present = [_node_tuple(entry, entry.get("path")) for entry in linux.get("devices") or () if isinstance(entry, dict)]
    allowed = [
        _node_tuple(entry, None)
        for entry in device_rules(config)
        if isinstance(entry, dict) and entry.get("allow") is True
    ]
    for path, kind, major, minor in nodes:
        if (path, kind, major, minor) not in present or kind != "p" and (None, kind, major, minor) not in allowed:
            return str(path)
    return ""


def _node_tuple(entry: Document, path: Any) -> Any:
    """(path, type, major, minor) of a device, or of a device rule, whose path is None."""
    return path, entry.get("type"), entry.get("major"), entry.get("minor")


def namespace(config: Document, kind: str) -> Any:
    """The container's namespace of type `kind`: its path, '' for a new one, None for the host's."""
    linux = config.get("linux")
    entries = linux.get("namespaces") if isinstance(linux, dict) else None
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("type") == kind:
            return entry.get("path") or ""
    return None


def capabilities(config: Document) -> Dict[str, List[str]]:
    """process.capabilities: set (of CAPABILITY_SETS) to names.  Raises BundleError for a wrong type."""
    process = config.get("process")
    sets = process.get("capabilities") if isinstance(process, dict) else None
    if sets is None:
        return {}
    if not isinstance(sets, dict):
        raise errors.BundleError("config.json: process.capabilities is not an object")
    for key, names in sets.items():
        if not (names is None or isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise errors.BundleError(f"config.json: process.capabilities.{key} is not a list of texts")
    return {key: names or [] for key, names in sets.items() if key in CAPABILITY_SETS}


def rlimits(config: Document) -> Document:
    """process.rlimits: type (RLIMIT_NOFILE) to (soft, hard)."""
    process = config.get("process")
    limits = process.get("rlimits") if isinstance(process, dict) else None
    return {
        str(entry.get("type")): (entry.get("soft"), entry.get("hard"))
        for entry in (limits if isinstance(limits, list) else ())
        if isinstance(entry, dict)
    }


def hugepages(config: Document) -> Document:
    """linux.resources.hugepageLimits: page size (2MB) to the limit in bytes."""
    linux = config.get("linux")
    resources = linux.get("resources") if isinstance(linux, dict) else None
    limits = resources.get("hugepageLimits") if isinstance(resources, dict) else None
    return {
        str(entry.get("pageSize")): entry.get("limit")
        for entry in (limits if isinstance(limits, list) else ())
        if isinstance(entry, dict)
    }


def kernel_mounts(config: Document) -> List[Document]:
    """The mounts of type sysfs, cgroup and cgroup2."""
    mounts = config.get("mounts")
    return [
        mount
        for mount in (mounts if isinstance(mounts, list) else ())
        if isinstance(mount, dict) and mount.get("type") in ("sysfs", "cgroup", "cgroup2")
    ]


def text(config: Document, *keys: str) -> str:
    """The text at a path of keys; '' when there is none."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def readonly_root(config: Document) -> bool:
    """Whether the engine has made the root file system read-only."""
    root = config.get("root")
    return isinstance(root, dict) and root.get("readonly") is True


def oom_score(config: Document) -> int:
    """process.oomScoreAdj; 0 where the engine gives none."""
    process = config.get("process")
    value = process.get("oomScoreAdj") if isinstance(process, dict) else None
    return value if type(value) is int else 0
