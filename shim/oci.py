"""The OCI interpreter of Edits: with shim.ocikeys the only module that knows config.json's keys.

`apply` follows the CDI reference library, category by category (CDI specification, "OCI edits"); where it
differs it says why.  A document is a plain dict; keys that are unknown here survive.  Pure; part of the create
path.
"""

from __future__ import annotations

from shim import edits as _edits
from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

    from shim.edits import Edit, Edits

    Document = Dict[str, Any]

_RULE = frozenset(("allow", "type", "major", "minor", "access"))
# Keys of config.json, of linux and of linux.resources that say which devices a container has.
_KEYS = frozenset(("process", "root", "mounts", "hooks", "annotations", "linux", "devices", "namespaces", "resources"))
CPU_PERIOD = 100000  # microseconds: the kernel's default, Documentation/scheduler/sched-bwc.rst


def apply(config: Document, edits: Edits, idmap: bool = True) -> Document:
    """`config` with all edits in it, as a new document; `config` itself is not changed.

    Edits must be complete (host.complete).  Applying twice gives what applying once gives.  `idmap`: bind
    mounts become idmapped ones where maps_owners() says so; the kernel grants that to real root only (mount_setattr(2)),
    so a rootless caller says False, as does one whose runtime refuses such mounts.
    Raises BundleError when config.json has another shape than the OCI runtime specification gives it.
    """
    result = dict(config)
    idmap = idmap and maps_owners(config)
    by_kind: Dict[str, List[Edit]] = {}
    for edit in edits.items:
        if idmap and edit[0] == _edits.MOUNT:
            edit = (edit[0], edit[1], idmapped(edit[2]), edit[3])
        by_kind.setdefault(edit[0], []).append(edit)
    if by_kind.keys() - _OWN:
        from shim import ocikeys
        ocikeys.apply(result, by_kind)  # before devices, whose owner is the process' user
    for kind, change in _APPLY:
        if kind in by_kind:
            change(result, by_kind[kind])
    return result


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


def _env(config: Document, edits: List[Edit]) -> None:
    env = member(member(config, "process", dict), "env", list)
    # of variables that stand twice the last one counts, and is the one that is replaced
    places = {entry.partition("=")[0]: place for place, entry in enumerate(env) if isinstance(entry, str)}
    for _, name, value, _ in edits:
        entry = f"{name}={value}"
        if name in places:
            env[places[name]] = entry
        else:
            places[name] = len(env)
            env.append(entry)


def _devices(config: Document, edits: List[Edit]) -> None:
    """Every device goes into linux.devices and, as a rule, into linux.resources.devices.

    A device that is only in one of them cannot be opened, or is lost at the next update of the cgroup.
    """
    user = process_user(config)
    linux = member(config, "linux", dict)
    devices = member(linux, "devices", list)
    rules = member(member(linux, "resources", dict), "devices", list)
    for _, path, node, _ in edits:
        kind = node["type"]
        device = {"path": path, "type": kind, "major": node.get("major", 0), "minor": node.get("minor", 0)}
        if node.get("fileMode") is not None:
            device["fileMode"] = node["fileMode"]
        for owner in ("uid", "gid"):
            # a container that does not run as root can open a node only when it owns it
            value = node[owner] if node.get(owner) is not None else user[owner] or None
            if value is not None:
                device[owner] = value
        _place(devices, path, device)
        if kind in ("b", "c"):
            access = node.get("permissions") or "rwm"
            rule = {"allow": True, "type": kind, "major": device["major"], "minor": device["minor"]}
            if access != "none":
                rule["access"] = access
            if rule not in rules:  # the reference appends it a second time, to no effect
                rules.append(rule)


def _place(devices: List[Any], path: str, device: Document) -> None:
    """The reference's order: the first entry of that path is taken out, a second one replaced where it is."""
    places = [place for place, entry in enumerate(devices) if isinstance(entry, dict) and entry.get("path") == path]
    if len(places) > 1:
        for place in places[1:]:
            devices[place] = device
    else:
        devices.append(device)
    if places:
        del devices[places[0]]


def root_path(config: Document, bundle: str) -> str:
    """The container's root file system on the host, '' when it is not known; `bundle` is the bundle's directory or ''."""
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
    return {f"{'c' if entry.get('type') == 'u' else entry.get('type')}{entry.get('major')}:{entry.get('minor')}": str(entry.get("path"))
            for entry in devices or () if isinstance(entry, dict)}


def _net_devices(config: Document, edits: List[Edit]) -> None:
    devices = member(member(config, "linux", dict), "netDevices", dict)
    for _, interface, name, origin in edits:
        devices[interface] = {"name": name}
        for other, device in devices.items():
            if other != interface and (device.get("name") if isinstance(device, dict) else None) == name:
                raise errors.BundleError(f"config.json gives the container the network interface {other} as {name}, which {interface} "
                                         f"is to be as well ({origin})", "give one of them another name")


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
    The reference library (1.1.2) asks for both mappings in either case.  Engines that share a pod's namespace by path
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


def _mounts(config: Document, edits: List[Edit]) -> None:
    """Mounts are made in the order of the list, so the engine's keep theirs and each of ours goes where it has to be.

    In the place of the engine's mount of the same destination, if that is the last at or above it; else as late as
    possible: at the end, or before the first later mount that lies below it.  After what lies above it, it is not
    covered; before what lies below it, it covers nothing.  (A mount below that comes before the last one above is
    covered by that one anyway, so the two never conflict.)  Late, since a link in the image may lead into a later mount:
    /var/run/x into that of /run.  The reference sorts all mounts by depth, which uncovers what an engine covered.
    """
    mounts = member(config, "mounts", list)
    ours: Dict[str, Any] = {}
    for _, path, mount, _ in edits:
        if path[:1] != "/" or "/." in path or "//" in path or path[-1] == "/":
            path = absolute(path)
        if path in ours:
            del ours[path]
        ours[path] = mount
    last: Dict[str, int] = {}  # path of a mount of the engine's: its place, the last of several
    below: Dict[str, List[int]] = {}  # path of one of ours: the places of the engine's mounts below it
    for place, mount in enumerate(mounts):
        destination = mount.get("destination") if isinstance(mount, dict) else None
        if isinstance(destination, str):
            path = absolute(destination)
            last[path] = place
            while path != "/":
                path = path[:path.rindex("/")] or "/"
                if path in ours:
                    below.setdefault(path, []).append(place)
    before: Dict[int, List[Any]] = {}  # place in the engine's list: those of ours that go before it
    after: List[Any] = []  # those that go to the end, nearly all
    # parents before children; equal depths keep their order
    for _, _, path in sorted([(path != "/" and path.count("/"), number, path) for number, path in enumerate(ours)]):
        if path not in last and path not in below:
            after.append(ours[path])
            continue
        above = -1
        parent = path
        while parent != "/":
            parent = parent[:parent.rindex("/")] or "/"
            above = max(above, last.get(parent, -1))
        same = last.get(path, -1)
        later = [place for place in below.get(path, ()) if place > above]
        if same > above:
            mounts[same] = ours[path]
        elif later:
            before.setdefault(later[0], []).append(ours[path])
        else:
            after.append(ours[path])
    mounts += after
    for place in sorted(before, reverse=True):
        mounts[place:place] = before[place]


def absolute(destination: str) -> str:
    """The path of a destination, from the container's root and without dots; a relative one is meant from there, too."""
    if "//" in destination or "/." in destination or destination[-1:] == "/" or destination[:1] != "/":
        return clean(f"/{destination}")
    return destination


def clean(path: str) -> str:
    """Go's filepath.Clean."""
    rooted = path.startswith("/")
    parts: List[str] = []
    for part in path.split("/"):
        if part in ("", "."):
            continue
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".." or not rooted:
            parts.append(part)
    return "/" + "/".join(parts) if rooted else "/".join(parts) or "."


def idmapped(mount: Document) -> Document:
    """A bind mount with the option idmap, so that its owners are right in the container's user namespace.

    Only an option: a mount type of that name does not exist (CDI reference library, withIDMapForBindMount).
    """
    options = mount.get("options") or []
    if "idmap" in options or "ridmap" in options:
        return mount
    binds = [option for option in options if option in ("bind", "rbind")]
    if not binds and mount.get("type") != "bind":
        return mount
    return {**mount, "options": [*options, "ridmap" if binds[-1:] == ["rbind"] else "idmap"]}


def _hooks(config: Document, edits: List[Edit]) -> None:
    hooks = member(config, "hooks", dict)
    before = {stage: list(entries) for stage, entries in hooks.items() if isinstance(entries, list)}
    copied = set()
    for _, stage, hook, origin in edits:
        present = before.get(stage, [])
        if hook in present:  # ours, from an earlier injection of the same edits
            present.remove(hook)
            continue
        if stage not in copied:
            copied.add(stage)
            member(hooks, stage, list)
        if origin == _edits.LEASE:
            hooks[stage].insert(0, hook)  # runc stops at a hook that fails, and a lease must not depend on others' hooks
        else:
            hooks[stage].append(hook)


def _rdt(config: Document, edits: List[Edit]) -> None:
    member(config, "linux", dict)["intelRdt"] = edits[-1][2]


def _gids(config: Document, edits: List[Edit]) -> None:
    user = member(member(config, "process", dict), "user", dict)
    gids = member(user, "additionalGids", list)
    for _, gid, _, _ in edits:
        if gid not in gids:
            gids.append(gid)


def _resources(config: Document, edits: List[Edit]) -> None:
    resources = member(member(config, "linux", dict), "resources", dict)
    copied = set()
    for _, (controller, key), value, _ in edits:
        if controller not in copied:
            copied.add(controller)
            member(resources, controller, dict)
        resources[controller][key] = value


def _annotations(config: Document, edits: List[Edit]) -> None:
    annotations = member(config, "annotations", dict)
    for _, key, value, _ in edits:
        annotations[key] = value


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
    """The device rules that let a container read or write, as (type, major, minor, the rule in words); a type or a number
    that the rule leaves open is None.

    `complete`: whether these are all rules.  Then everything is open until a rule denies everything: crun takes the list as
    it stands.  A rule that denies everything ends all before it.  One that denies less ends nothing here: cgroup v1 takes an
    allowance back only in the very words in which it was given.  A rule whose type is neither `c` nor `b` opens
    everything: for type `a`, and where there is no type, runtimes and cgroup v1 do not look at the numbers and the access;
    crun takes a type that it does not know for any.  So does a rule with a key that Go reads without regard to case.
    Source: OCI runtime specification, "Allowed Device list"; Documentation/admin-guide/cgroup-v1/devices.rst.
    """
    found: List[Any] = [(None, None, None, "the lack of a device rule that denies everything")] if complete else []
    for rule in device_rules(config):
        if not isinstance(rule, dict):
            continue
        access, kind = str(rule.get("access") or "rwm"), rule.get("type")
        numbers = [number if type(number) is int and 0 <= number < 1 << 32 else None for number in (rule.get("major"), rule.get("minor"))]
        words = " ".join((str(kind or "a"), ":".join("*" if number is None else str(number) for number in numbers), access))
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
            raise errors.BundleError(f"config.json: {key!r} differs from {key.casefold()!r} in nothing but case, and runtimes do not agree what that means",
                                     "take it out")


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
    allowed = [_numbers(entry, None) for entry in device_rules(config) if isinstance(entry, dict) and entry.get("allow") is True]
    for path, kind, major, minor in nodes:
        if (path, kind, major, minor) not in present or kind != "p" and (None, kind, major, minor) not in allowed:
            return str(path)
    return ""


def _numbers(entry: Document, path: Any) -> Any:
    return path, entry.get("type"), entry.get("major"), entry.get("minor")


_APPLY: tuple[tuple[str, Callable[[Document, List[Edit]], None]], ...] = (
    (_edits.ENV, _env),
    (_edits.DEVICE, _devices),
    (_edits.NET_DEVICE, _net_devices),
    (_edits.MOUNT, _mounts),
    (_edits.HOOK, _hooks),
    (_edits.RDT, _rdt),
    (_edits.GID, _gids),
    (_edits.RESOURCE, _resources),
    (_edits.ANNOTATION, _annotations),
)
_OWN = frozenset([kind for kind, _ in _APPLY])
