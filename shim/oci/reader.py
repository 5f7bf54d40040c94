"""What config.json says, in the OCI runtime specification's terms: the only place, with shim.oci.writer, that knows
its keys.

A document is a plain dict.  Odd shapes count as absent, or raise BundleError where a question says so.  Pure; part of
the create path.
"""

from __future__ import annotations

from shim import edits as _edits
from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

    from shim.edits import Edits

    Document = Dict[str, Any]

CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
_RULE = frozenset(("allow", "type", "major", "minor", "access"))
# Keys of config.json, of linux and of linux.resources that say which devices a container has.
_KEYS = frozenset(("process", "root", "mounts", "hooks", "annotations", "linux", "devices", "namespaces", "resources"))
CPU_PERIOD = 100000  # microseconds: the kernel's default, Documentation/scheduler/sched-bwc.rst


def member(parent: Document, key: str, kind: Any) -> Any:
    """A copy of parent[key], put in its place: an object or a list, empty where it was absent or null."""
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
    """The container's root file system on the host, '' when it is not known; `bundle` is the bundle's directory or
    ''."""
    root = config.get("root")
    path = root.get("path") if isinstance(root, dict) else None
    if type(path) is not str or not path:
        return ""
    if path.startswith("/"):
        return path
    return f"{bundle}/{path}" if bundle else ""


def process_user(config: Document) -> Dict[str, int]:
    """uid and gid of the container's own process (0 where config.json does not say)."""
    process = config.get("process")
    user = process.get("user") if isinstance(process, dict) else None
    found = {}
    for key in ("uid", "gid"):
        value = user.get(key) if isinstance(user, dict) else None
        found[key] = value if type(value) is int and value > 0 else 0
    return found


def environment(config: Document) -> Dict[str, str]:
    """The variables of the container's process; of one that stands twice the last."""
    process = config.get("process")
    env = process.get("env") if isinstance(process, dict) else None
    if not isinstance(env, list):
        return {}
    return dict(entry.split("=", 1) for entry in env if isinstance(entry, str) and "=" in entry)


def device_numbers(config: Document) -> Dict[str, str]:
    """The devices of linux.devices as numbers such as c195:0, with their paths."""
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
    """Whether bind mounts become idmapped ones, so that files show their owners in the container's user namespace.

    Yes where the namespace is joined by its path, or made with both uid and gid mappings.  What runtimes make of it:
    - runc from 1.2 and crun 1.28 map the owners in both cases; for a path they read the namespace's own mappings.
    - crun 1.8 maps idmap and passes over ridmap; runc 1.1 passes over both, and wants both mappings even with a path.
      The container starts and sees the owners as nobody, as it would without.
    - youki 0.7 refuses the container (runtimes.can_map_owners), so its callers ask for none.
    - None starts a container whose new namespace lacks a mapping.
    The CDI Go library (1.1.2) asks for both mappings in either case.  Engines that share a pod's namespace by path
    often list none: there its container would see nobody, and ours sees the owners.
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
        wanted = "a whole number" if kind is int else "a text"
        raise errors.BundleError(f"config.json: linux.resources.{controller}.{key} is not {wanted}")
    return value


def cgroups_path(config: Document, edits: Edits, manager: str = "") -> str:
    """linux.cgroupsPath as it will be with some edits, '' for none, `//` where the runtime is told to make no group."""
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


def opening_rules(config: Document, complete: bool) -> List[Any]:
    """The device rules that let a container read or write, as (type, major, minor, the rule in words); a type or a
    number that the rule leaves open is None.

    `complete`: whether these are all rules.  Then everything is open until a rule denies everything: crun takes the
    list as it stands.  A rule that denies everything ends all before it.  One that denies less ends nothing here:
    cgroup v1 takes an allowance back only in the very words in which it was given.  A rule whose type is neither `c`
    nor `b` opens everything: for type `a`, and where there is no type, runtimes and cgroup v1 do not look at the
    numbers and the access; crun takes a type that it does not know for any.  So does a rule with a key that Go reads
    without regard to case. Source: OCI runtime specification, "Allowed Device list";
    Documentation/admin-guide/cgroup-v1/devices.rst.
    """
    found: List[Any] = [(None, None, None, "the lack of a device rule that denies everything")] if complete else []
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
            found.append((None, None, None, f"the engine's device rule {words!r}, which opens every device,"))
        elif rule.get("allow") is True:
            if "r" in access or "w" in access:
                found.append((kind, *numbers, f"the engine's device rule {words!r}"))
        elif kind in (None, "", "a") and numbers == [None, None] and "r" in access and "w" in access:
            found = []
    return found


def covers(number: str, kind: Optional[str], major: Optional[int], minor: Optional[int]) -> bool:
    """Whether a device number (c195:0) is among those of a rule, in which None leaves a part open."""
    own_major, _, own_minor = number[1:].partition(":")
    return kind in (None, number[0]) and major in (None, int(own_major)) and minor in (None, int(own_minor))


def other_case(parent: Document, names: frozenset[str]) -> str:
    """The first key that differs from one of some names in nothing but case, '' when there is none: runtimes that are
    written in Go take it for that one.  Source: Go's encoding/json, Unmarshal."""
    return next((key for key in parent if key not in names and key.casefold() in names), "")


def check_keys(config: Document) -> None:
    """Raises BundleError when runtimes would read a key of config.json in different ways."""
    linux = config.get("linux")
    resources = linux.get("resources") if isinstance(linux, dict) else None
    for parent in (config, linux, resources):
        key = other_case(parent, _KEYS) if isinstance(parent, dict) else ""
        if key:
            raise errors.BundleError(
                f"config.json: {key!r} differs from {key.casefold()!r} in nothing but case, and runtimes do not agree what that means",
                "take it out",
            )


def bind_sources(config: Document) -> List[str]:
    """The sources of bind mounts, which may bring device nodes."""
    mounts = config.get("mounts")
    found = []
    for mount in mounts if isinstance(mounts, list) else ():
        source = mount.get("source") if isinstance(mount, dict) else None
        if type(source) is str:
            options = mount.get("options")
            if mount.get("type") == "bind" or isinstance(options, list) and ("bind" in options or "rbind" in options):
                found.append(source)
    return found


def missing(config: Document, nodes: List[Any]) -> str:
    """The path of the first of some devices ([path, type, major, minor]) that a container with this config.json has
    no node of, or no rule for; '' when it can open all."""
    linux = config.get("linux")
    linux = linux if isinstance(linux, dict) else {}
    present = [_numbers(entry, entry.get("path")) for entry in linux.get("devices") or () if isinstance(entry, dict)]
    allowed = [
        _numbers(entry, None)
        for entry in device_rules(config)
        if isinstance(entry, dict) and entry.get("allow") is True
    ]
    for path, kind, major, minor in nodes:
        if (path, kind, major, minor) not in present or kind != "p" and (None, kind, major, minor) not in allowed:
            return str(path)
    return ""


def _numbers(entry: Document, path: Any) -> Any:
    return path, entry.get("type"), entry.get("major"), entry.get("minor")


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
    return {
        str(entry.get("type")): (entry.get("soft"), entry.get("hard"))
        for entry in (found if isinstance(found, list) else ())
        if isinstance(entry, dict)
    }


def hugepages(config: Document) -> Dict[str, Any]:
    """The limits on huge pages that config.json has, by the size of the page."""
    linux = config.get("linux")
    resources = linux.get("resources") if isinstance(linux, dict) else None
    found = resources.get("hugepageLimits") if isinstance(resources, dict) else None
    return {
        str(entry.get("pageSize")): entry.get("limit")
        for entry in (found if isinstance(found, list) else ())
        if isinstance(entry, dict)
    }


def kernel_mounts(config: Document) -> List[Document]:
    """The mounts of sysfs and of control groups."""
    mounts = config.get("mounts")
    return [
        mount
        for mount in (mounts if isinstance(mounts, list) else ())
        if isinstance(mount, dict) and mount.get("type") in ("sysfs", "cgroup", "cgroup2")
    ]


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
