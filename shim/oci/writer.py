"""Puts edits into config.json (OCI runtime specification).

`apply` does what the CDI Go library does for each category of edits (CDI SPEC.md, "OCI Edits";
pkg/cdi/container-edits.go).  Comments say where it differs and why.  Keys that this module does not know stay as they
are. Pure; part of the create path.
"""

from __future__ import annotations

from shim import edits as _edits
from shim import errors, pathtext
from shim.oci.reader import maps_owners, member, process_user

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Tuple

    from shim.edits import Edit, Edits, Mount
    from shim.shapes import Document


def apply(config: Document, edits: Edits, idmap: bool = True) -> Document:
    """A new document: `config` with all edits in it.  `config` itself is not changed.

    Edits must be complete (host.complete).  Applying the same edits twice gives the same result as applying them once.
    `idmap`: turn bind mounts into idmapped ones where maps_owners() says so.  The kernel allows that only to real root
    (mount_setattr(2)), so rootless callers pass False, and so do callers whose runtime refuses such mounts.
    Raises BundleError when a part of config.json has not the type that the OCI runtime specification gives it.
    """
    result = dict(config)
    idmap = idmap and maps_owners(config)
    by_kind: Dict[str, List[Edit]] = {}
    for edit in edits.items:
        if idmap and edit[0] == _edits.MOUNT:
            edit = (edit[0], edit[1], idmapped(edit[2]), edit[3])
        by_kind.setdefault(edit[0], []).append(edit)
    if by_kind.keys() - _COMMON:
        from shim.oci import rare_edits

        rare_edits.apply(result, by_kind)  # before devices, which take their owner from process.user
    for kind, change in _APPLY:
        if kind in by_kind:
            change(result, by_kind[kind])
    return result


def _env(config: Document, edits: List[Edit]) -> None:
    env = member(member(config, "process", dict), "env", list)
    # When a variable is there twice, the last one counts, so that is the one to replace.
    indexes = {entry.partition("=")[0]: index for index, entry in enumerate(env) if isinstance(entry, str)}
    for _, name, value, _ in edits:
        entry = f"{name}={value}"
        if name in indexes:
            env[indexes[name]] = entry
        else:
            indexes[name] = len(env)
            env.append(entry)


def _devices(config: Document, edits: List[Edit]) -> None:
    """Puts every device into linux.devices and, as a device rule, into linux.resources.devices.

    A device in only one of the two cannot be opened, or is lost when the control group is updated the next time.
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
            # A container that does not run as root can open the node only when it owns it.
            value = node[owner] if node.get(owner) is not None else user[owner] or None
            if value is not None:
                device[owner] = value
        _replace_device(devices, path, device)
        if kind in ("b", "c"):
            access = node.get("permissions") or "rwm"
            rule = {"allow": True, "type": kind, "major": device["major"], "minor": device["minor"]}
            if access != "none":
                rule["access"] = access
            if rule not in rules:  # the CDI Go library appends it once more, which has no effect
                rules.append(rule)


def _replace_device(devices: List[Any], path: str, device: Document) -> None:
    """Puts a device into the list in the CDI Go library's order.

    Removes the first entry of that path, and replaces all further ones where they are; if there are none, appends the
    device.
    """
    indexes = [index for index, entry in enumerate(devices) if isinstance(entry, dict) and entry.get("path") == path]
    if len(indexes) > 1:
        for index in indexes[1:]:
            devices[index] = device
    else:
        devices.append(device)
    if indexes:
        del devices[indexes[0]]


def _net_devices(config: Document, edits: List[Edit]) -> None:
    devices = member(member(config, "linux", dict), "netDevices", dict)
    for _, interface, name, origin in edits:
        devices[interface] = {"name": name}
        for other, device in devices.items():
            if other != interface and (device.get("name") if isinstance(device, dict) else None) == name:
                raise errors.BundleError(
                    f"config.json gives the container the network interface {other} as {name}, and {origin} gives it "
                    f"{interface} under the same name",
                    "give one of them another name",
                )


def _mounts(config: Document, edits: List[Edit]) -> None:
    """Puts mounts into the engine's list, whose own mounts keep their order.

    The runtime mounts in the order of the list, so a later mount can cover an earlier one.  A mount of ours replaces
    the engine's mount of the same destination, unless the engine later mounts something on a directory above it.
    Otherwise it comes after all mounts on directories above it, which would cover it, and before those of the engine's
    that follow these on paths below it, which it would cover.  (An earlier mount on a path below is covered by the one
    above anyway, so the two demands never conflict.)

    Within these limits it comes as late as possible, since a link in the image may lead into a later mount:
    /var/run/x into the mount on /run.  The CDI Go library sorts all mounts by depth instead, which can uncover what the
    engine has covered.
    """
    mounts = member(config, "mounts", list)
    ours: Document = {}
    for _, path, mount, _ in edits:
        if path[:1] != "/" or "/." in path or "//" in path or path[-1] == "/":
            path = pathtext.absolute(path)
        if path in ours:
            del ours[path]
        ours[path] = mount
    last: Dict[str, int] = {}  # destination of an engine's mount -> its index, the last one of several
    below: Dict[str, List[int]] = {}  # destination of a mount of ours -> the indexes of the engine's mounts below it
    for index, mount in enumerate(mounts):
        destination = mount.get("destination") if isinstance(mount, dict) else None
        if isinstance(destination, str):
            path = pathtext.absolute(destination)
            last[path] = index
            while path != "/":
                path = path[: path.rindex("/")] or "/"
                if path in ours:
                    below.setdefault(path, []).append(index)
    before: Dict[int, List[Any]] = {}  # index in the engine's list -> our mounts that go before it
    after: List[Any] = []  # our mounts that go to the end: nearly all
    # Parents before children; mounts of the same depth keep their order.
    for _, _, path in sorted([(path != "/" and path.count("/"), number, path) for number, path in enumerate(ours)]):
        if path not in last and path not in below:
            after.append(ours[path])
            continue
        above = -1
        parent = path
        while parent != "/":
            parent = parent[: parent.rindex("/")] or "/"
            above = max(above, last.get(parent, -1))
        same = last.get(path, -1)
        later = [index for index in below.get(path, ()) if index > above]
        if same > above:
            mounts[same] = ours[path]
        elif later:
            before.setdefault(later[0], []).append(ours[path])
        else:
            after.append(ours[path])
    mounts += after
    for index in sorted(before, reverse=True):
        mounts[index:index] = before[index]


def idmapped(mount: Mount) -> Mount:
    """A bind mount with the option idmap or ridmap, so that files show their owners in the container's user namespace.

    Other mounts are returned as they are.  Only the option is added: there is no mount type of that name (CDI Go
    library, withIDMapForBindMount).
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
        if hook in present:  # put there when the same edits were applied before
            present.remove(hook)
            continue
        if stage not in copied:
            copied.add(stage)
            member(hooks, stage, list)
        if origin == _edits.LEASE:
            # First, since runc stops at a hook that fails, and the end of a lease must not depend on others' hooks.
            hooks[stage].insert(0, hook)
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


_APPLY: Tuple[Tuple[str, Callable[[Document, List[Edit]], None]], ...] = (
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


_COMMON = frozenset([kind for kind, _ in _APPLY])
