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
    from typing import Any, Callable, Dict, List

    from shim.edits import Edit, Edits

    Document = Dict[str, Any]

CPU_PERIOD = 100000  # microseconds: the kernel's default, Documentation/scheduler/sched-bwc.rst


def apply(config: Document, edits: Edits, idmap: bool = True) -> Document:
    """`config` with all edits in it, as a new document; `config` itself is not changed.

    Edits must be complete (host.complete).  Applying twice gives what applying once gives.  `idmap`: bind
    mounts become idmapped ones in a container with a user namespace; the kernel grants that to real root only
    (mount_setattr(2)), so a rootless caller says False.
    Raises BundleError when config.json has another shape than the OCI runtime specification gives it.
    """
    result = dict(config)
    idmap = idmap and in_user_namespace(config)
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
    return {f"{entry.get('type')}{entry.get('major')}:{entry.get('minor')}": str(entry.get("path"))
            for entry in devices or () if isinstance(entry, dict)}


def _net_devices(config: Document, edits: List[Edit]) -> None:
    devices = member(member(config, "linux", dict), "netDevices", dict)
    for _, interface, name, _ in edits:
        devices[interface] = {"name": name}


def in_user_namespace(config: Document) -> bool:
    """Whether config.json gives the container a user namespace."""
    linux = config.get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    return isinstance(namespaces, list) and any(
        isinstance(entry, dict) and entry.get("type") == "user" for entry in namespaces)


def _mounts(config: Document, edits: List[Edit]) -> None:
    mounts = member(config, "mounts", list)
    present = {entry["destination"] for entry in mounts
               if isinstance(entry, dict) and isinstance(entry.get("destination"), str)}
    for _, destination, mount, _ in edits:
        if destination in present:
            for place, entry in enumerate(mounts):
                if isinstance(entry, dict) and entry.get("destination") == destination:
                    del mounts[place]
                    break
        present.add(destination)
        mounts.append(mount)
    # parents before children; equal depths keep their order
    mounts.sort(key=_depth)


def _depth(mount: Any) -> int:
    destination = mount.get("destination") if isinstance(mount, dict) else None
    if not isinstance(destination, str):
        return 0
    if "//" in destination or "/." in destination or destination[-1:] == "/" or destination[:1] != "/":
        destination = clean(destination)
    return destination.count("/")


def clean(path: str) -> str:
    """Go's filepath.Clean, which decides the depth that mounts are sorted by."""
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


def cgroups_path(config: Document, edits: Edits) -> str:
    """linux.cgroupsPath as it will be with some edits, '' for none."""
    linux = config.get("linux")
    path = linux.get("cgroupsPath") if isinstance(linux, dict) else None
    for _, key, value, _ in edits.of(_edits.LINUX):
        path = value if key == "cgroupsPath" else path
    return path if isinstance(path, str) else ""


def device_rules(config: Document) -> List[Any]:
    """linux.resources.devices; [] when there are none."""
    value: Any = config
    for name in ("linux", "resources", "devices"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, list) else []


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
