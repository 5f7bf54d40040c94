"""Makes the edits for the rarer keys of a request: command, user, capabilities, storage, devices, namespaces…

It serves requests for an engine's bundle, and those of `chandler bundle`.  Pure: `facts` (shim.keys.host_facts.Facts)
looks up what only the host or the image knows.  Loaded only when a request has one of these keys.

Each maker takes the value of its key, the whole request, config.json, the origin for its edits, and the facts.
"""

from __future__ import annotations

from shim import edits as _edits
from shim import errors
from shim.edits import DEVICE, GID, MOUNT, RESOURCE, Edits
from shim.oci import reader
from shim.policy.classes import volume
from shim.request.rare_keys import sysctl_namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List

    from shim.edits import Edit, Mount
    from shim.keys.host_facts import Facts
    from shim.shapes import Document


UNLIMITED = (1 << 64) - 1  # RLIM_INFINITY: setrlimit(2)


def edits(request: Document, document: Document, source: str, facts: Facts) -> Edits:
    """The edits for the rarer keys of a request.

    `request`: the document of the request in normal form.  `document`: the config.json that the edits are for.
    `source`: where the request came from, for errors.  Raises RequestError or HostError, which name the key.
    """
    items: List[Edit] = []
    resources = request.get("resources", {})
    for key in (*request, *(f"resources.{key}" for key in resources)):
        make = _MAKERS.get(key)
        if make is not None:
            value = resources[key[len("resources.") :]] if key.startswith("resources.") else request[key]
            try:
                items += make(value, request, document, f"{source}: {key}", facts)
            except errors.ChandlerError as error:
                raise error.within(f"{source}: {key}") from None
    return Edits(items)


# --- the process ----------------------------------------------------------------------------------------------


def _command(value: Document, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    """The program and its arguments, and the working directory.

    As with Docker, entrypoint and args together replace the image's whole command.
    """
    args = value.get("entrypoint", []) + value.get("args", [])
    items: List[Edit] = []
    if args:
        if not args[0]:
            raise errors.RequestError("the program's name is empty")
        items.append((_edits.PROCESS, "args", args, origin))
    if "workdir" in value:
        if facts.root:
            # Raises when a link of the image leads below /proc, where a directory of the host may be (CVE-2024-21626).
            facts.target(value["workdir"], "workdir")
        items.append((_edits.PROCESS, "cwd", value["workdir"], origin))
    return items


def _user(value: str, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    """The user: uid[:gid], where gid is by default the uid, or names, which are looked up in the image."""
    name, _, group = value.partition(":")
    groups: List[int] = []
    if name.isdigit():
        uid = gid = int(name)
    else:
        uid, gid = facts.account(name)
        if not group:
            groups = facts.memberships(name)
    if group:
        gid = int(group) if group.isdigit() else facts.group(group)
    items: List[Edit] = [(_edits.USER, "uid", uid, origin), (_edits.USER, "gid", gid, origin)]
    return items + [(GID, number, None, origin) for number in groups if number != gid]


def _extra_groups(value: List[Any], request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    return [(GID, group if type(group) is int else facts.group(group), None, origin) for group in value]


def _oom_score(value: int, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    return [(_edits.PROCESS, "oomScoreAdj", value, origin)]


def _ulimits(value: Document, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    return [
        (
            _edits.RLIMIT,
            f"RLIMIT_{name.upper()}",
            {key: limit if limit >= 0 else UNLIMITED for key, limit in pair.items()},
            origin,
        )
        for name, pair in value.items()
    ]


def capability_sets(
    present: Dict[str, List[str]], add: List[str], drop: List[str], all_of_them: List[str]
) -> Dict[str, List[str]]:
    """The capability sets after some are dropped and then some are added.

    ALL means what it means to Docker: to add ALL gives all but those dropped; to drop ALL leaves only those added.
    `all_of_them`: the capabilities that ALL gives.
    """
    result: Dict[str, List[str]] = {}
    every = "ALL" in add
    added = [name for name in (all_of_them if every else add) if not (every and name in drop)]
    for key in ("bounding", "effective", "permitted"):
        kept = [name for name in present.get(key, []) if name not in drop and "ALL" not in drop]
        result[key] = list(dict.fromkeys(kept + added))
    for key in ("inheritable", "ambient"):
        if present.get(key):
            result[key] = [name for name in present[key] if name not in drop and "ALL" not in drop]
    return result


def _capabilities(value: Any, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    """The capability sets for `capabilities` and `cap_drop` together."""
    if request.get("privileged"):
        return []  # _privileged makes these edits
    present = reader.capabilities(document)
    add, drop = request.get("capabilities", []), request.get("cap_drop", [])
    if not add and not present:
        return []  # there are none to drop
    available = facts.capabilities() if add else []
    for name in add:
        if name != "ALL" and name not in available:
            raise errors.HostError(f"{name} is not available on this host")
    sets = capability_sets(present, add, drop, available)
    return [(_edits.CAPABILITY, key, names, origin) for key, names in sets.items()]


def _privileged(value: bool, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    """All capabilities of the host, no seccomp filter and AppArmor profile, every device, /proc and /sys unmasked."""
    if not value:
        return []
    present: Dict[str, List[str]] = {key: [] for key in reader.capabilities(document)}
    every = capability_sets(
        present, ["ALL"], [name for name in request.get("cap_drop", []) if name != "ALL"], facts.capabilities()
    )
    items: List[Edit] = [(_edits.CAPABILITY, key, names, origin) for key, names in every.items()]
    items += [
        (_edits.PROCESS, "noNewPrivileges", False, origin),
        (_edits.PROCESS, "apparmorProfile", None, origin),
        (_edits.LINUX, "maskedPaths", [], origin),
        (_edits.LINUX, "readonlyPaths", [], origin),
        (_edits.LINUX, "seccomp", None, origin),
        (_edits.DEVICE_RULE, "all", {"allow": True, "access": "rwm"}, origin),
    ]
    for mount in reader.kernel_mounts(document):
        options = mount.get("options") or []
        if "ro" in options and isinstance(mount.get("destination"), str):
            items.append(
                (
                    MOUNT,
                    mount["destination"],
                    {**mount, "options": [option for option in options if option != "ro"]},
                    origin,
                )
            )
    return items


# --- the container --------------------------------------------------------------------------------------------


def _hostname(value: str, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    if reader.namespace(document, "uts") is None:
        raise errors.RequestError("the container shares the host's name: config.json has no UTS namespace")
    return [(_edits.HOSTNAME, "", value, origin)]


def _host_network(value: bool, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    if not value:
        return []
    items: List[Edit] = [(_edits.NAMESPACE, "network", None, origin)]
    linux = document.get("linux")
    sysctls = linux.get("sysctl") if isinstance(linux, dict) else None
    # The engine's net.* sysctls are for a network of the container's own.  They must not change the host's network.
    return items + [
        (_edits.SYSCTL, name, None, origin)
        for name in (sysctls if isinstance(sysctls, dict) else ())
        if name.startswith("net.")
    ]


def _sysctls(value: Dict[str, str], request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    for name in value:
        kind = sysctl_namespace(name)
        if reader.namespace(document, kind) is None or kind == "network" and request.get("host_network"):
            raise errors.RequestError(
                f"{name} would be set for the whole host: the container has no {kind} namespace of its own"
            )
    return [(_edits.SYSCTL, name, text, origin) for name, text in value.items()]


def _read_only_root_fs(value: bool, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    return [(_edits.ROOT, "readonly", value, origin)]


def _cgroup_parent(value: str, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    """The engine's cgroupsPath moved below another parent, in the form that the engine uses.

    Runtimes know two forms: slice:prefix:name with systemd, and a path.
    """
    present = reader.text(document, "linux", "cgroupsPath")
    slices = present.count(":") == 2
    if slices != value.endswith(".slice") and (present or slices):
        raise errors.RequestError(
            f"{value!r} does not fit the engine's cgroupsPath {present!r}",
            "write a systemd slice, name.slice" if slices else "write a path, /name",
        )
    if slices:
        return [(_edits.LINUX, "cgroupsPath", f"{value}:{present.partition(':')[2]}", origin)]
    name = present.rstrip("/").rpartition("/")[2] or facts.container
    if not name or value.endswith(".slice"):
        raise errors.RequestError("config.json has no cgroupsPath to put below it")
    return [(_edits.LINUX, "cgroupsPath", f"{value.rstrip('/')}/{name}", origin)]


def _devices(value: List[Document], request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    items: List[Edit] = []
    for device in value:
        access = "".join(letter for letter, key in (("r", "read"), ("w", "write"), ("m", "mknod")) if device[key])
        node = facts.device(device["path"])
        node["permissions"] = access
        items.append((DEVICE, device["path"], node, origin))
    return items


def _storage(value: List[Document], request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    items: List[Edit] = []
    targets: Dict[str, str] = {}  # path in the container, links followed: the target in the request
    for storage in value:
        target = facts.target(storage["target"], storage["type"])
        if target in targets:
            raise errors.RequestError(
                f"{storage['target']} and {targets[target]} are the same path in the image, {target}", "mount it once"
            )
        targets[target] = storage["target"]
        if storage["type"] == "tmpfs":
            options = ["nosuid", "nodev"]
            options += [f"{key}={storage[key]}" for key in ("size", "mode") if key in storage]
            mount: Mount = {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": options}
        else:
            directory = (
                facts.bind(storage["source"]) if storage["type"] == "bind" else facts.volume(volume(storage), storage)
            )
            options = ["rbind", "rprivate", "ro" if storage.get("readonly") else "rw"]
            mount = {"destination": target, "type": "bind", "source": directory, "options": options}
        items.append((MOUNT, target, mount, origin))
    # a target inside another bind mount is a path of the host that others may change
    for _, outer, mount, _ in items:
        if mount["type"] == "bind":
            for target, requested in targets.items():
                if target.startswith(outer + "/"):
                    facts.within(mount["source"], target[len(outer) :], f"{requested} lies in {targets[outer]}")
    return items


# --- limits ---------------------------------------------------------------------------------------------------


def _blkio_weight(value: int, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    return [(RESOURCE, ("blockIO", "weight"), value, origin)]


def _hugepages(value: Dict[str, int], request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    return [(_edits.HUGEPAGES, size, limit, origin) for size, limit in value.items()]


def _drop(value: Any, request: Document, document: Document, origin: str, facts: Facts) -> List[Edit]:
    # with `capabilities` in the request, that key's maker also drops
    return [] if request.get("capabilities") else _capabilities(value, request, document, origin, facts)


_MAKERS: Dict[str, Callable[[Any, Document, Document, str, Facts], List[Edit]]] = {
    "command": _command,
    "user": _user,
    "extra_groups": _extra_groups,
    "capabilities": _capabilities,
    "cap_drop": _drop,
    "privileged": _privileged,
    "hostname": _hostname,
    "host_network": _host_network,
    "sysctls": _sysctls,
    "ulimits": _ulimits,
    "read_only_root_fs": _read_only_root_fs,
    "cgroup_parent": _cgroup_parent,
    "devices": _devices,
    "storage": _storage,
    "resources.oom_score_adj": _oom_score,
    "resources.blkio_weight": _blkio_weight,
    "resources.hugepages": _hugepages,
}
