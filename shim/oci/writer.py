"""Puts edits into config.json (OCI runtime specification).

`apply` follows the CDI Go library, category by category (CDI SPEC.md, "OCI Edits"; pkg/cdi/container-edits.go);
comments say where it differs and why.  Keys that are unknown here survive.  Pure; part of the create path.
"""

from __future__ import annotations

from shim import edits as _edits
from shim import errors, pathtext
from shim.oci.reader import maps_owners, member, process_user

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List

    from shim.edits import Edit, Edits

    Document = Dict[str, Any]


def apply(config: Document, edits: Edits, idmap: bool = True) -> Document:
    """`config` with all edits in it, as a new document; `config` itself is not changed.

    Edits must be complete (host.complete).  Applying twice gives what applying once gives.  `idmap`: bind mounts
    become idmapped ones where maps_owners() says so; the kernel grants that to real root only (mount_setattr(2)), so
    a rootless caller says False, as does one whose runtime refuses such mounts. Raises BundleError when config.json
    has another shape than the OCI runtime specification gives it.
    """
    result = dict(config)
    idmap = idmap and maps_owners(config)
    by_kind: Dict[str, List[Edit]] = {}
    for edit in edits.items:
        if idmap and edit[0] == _edits.MOUNT:
            edit = (edit[0], edit[1], idmapped(edit[2]), edit[3])
        by_kind.setdefault(edit[0], []).append(edit)
    if by_kind.keys() - _OWN:
        from shim.oci import rare_edits

        rare_edits.apply(result, by_kind)  # before devices, whose owner is the process' user
    for kind, change in _APPLY:
        if kind in by_kind:
            change(result, by_kind[kind])
    return result


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
            if rule not in rules:  # the CDI Go library appends it a second time, to no effect
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


def _net_devices(config: Document, edits: List[Edit]) -> None:
    devices = member(member(config, "linux", dict), "netDevices", dict)
    for _, interface, name, origin in edits:
        devices[interface] = {"name": name}
        for other, device in devices.items():
            if other != interface and (device.get("name") if isinstance(device, dict) else None) == name:
                raise errors.BundleError(
                    f"config.json gives the container the network interface {other} as {name}, which {interface} "
                    f"is to be as well ({origin})",
                    "give one of them another name",
                )


def _mounts(config: Document, edits: List[Edit]) -> None:
    """Mounts are made in the order of the list, so the engine's keep theirs and each of ours goes where it has to be.

    In the place of the engine's mount of the same destination, if that is the last at or above it; else as late as
    possible: at the end, or before the first later mount that lies below it.  After what lies above it, it is not
    covered; before what lies below it, it covers nothing.  (A mount below that comes before the last one above is
    covered by that one anyway, so the two never conflict.)  Late, since a link in the image may lead into a later
    mount: /var/run/x into that of /run.  The reference sorts all mounts by depth, which uncovers what an engine
    covered.
    """
    mounts = member(config, "mounts", list)
    ours: Dict[str, Any] = {}
    for _, path, mount, _ in edits:
        if path[:1] != "/" or "/." in path or "//" in path or path[-1] == "/":
            path = pathtext.absolute(path)
        if path in ours:
            del ours[path]
        ours[path] = mount
    last: Dict[str, int] = {}  # path of a mount of the engine's: its place, the last of several
    below: Dict[str, List[int]] = {}  # path of one of ours: the places of the engine's mounts below it
    for place, mount in enumerate(mounts):
        destination = mount.get("destination") if isinstance(mount, dict) else None
        if isinstance(destination, str):
            path = pathtext.absolute(destination)
            last[path] = place
            while path != "/":
                path = path[: path.rindex("/")] or "/"
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
            parent = parent[: parent.rindex("/")] or "/"
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


def idmapped(mount: Document) -> Document:
    """A bind mount with the option idmap, so that its owners are right in the container's user namespace.

    Only an option: a mount type of that name does not exist (CDI Go library, withIDMapForBindMount).
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
            hooks[stage].insert(
                0, hook
            )  # runc stops at a hook that fails, and a lease must not depend on others' hooks
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
