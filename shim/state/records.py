"""Reading grant records, and the check of their members and of those of leases that have no checksum.

Part of a create only where it has to read one: a restore, or one beside an NRI plugin.
"""

from __future__ import annotations

import posix

from shim import errors, jsontext
from shim.errors import ChandlerError
from shim.host import files
from shim.state import grants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, Optional, Tuple

_LARGEST = 1 << 62
_MARKS = frozenset(("mode", "words", "uid", "slice", "limits", "held"))
# What the members of records and of leases are; a list of one type stands for lists of such items.
MEMBERS: Dict[str, Any] = {
    "id": str,
    "root": str,
    "runtime": str,
    "owner": str,
    "pid": int,
    "started": int,
    "boot": str,
    "pidns": str,
    "timens": str,
    "userns": str,
    "place": list,
    "group": str,
    "token": str,
    "config": str,
    "source": str,
    "devices": [str],
    "physical": [str],
    "before": str,
    "after": str,
    "time": int,
    "rules": [dict],
    "grant": str,
    "sharing": dict,
    "pod": str,
    "namespace": str,
    "name": str,
    "nodes": [list],
    "mark": [str],
    "engine": str,
}
# Of a lease, beyond those of a record.
_OF_LEASES: Dict[str, Any] = {**MEMBERS, "names": [str], "keys": [str], "since": int, "container": str}
_NEEDED = frozenset(("token", "owner", "id", "names", "keys", "since"))
_NEEDED_OF_OCI = frozenset(("root", "runtime", "pid", "started"))
_LAST = 253402300799  # the last second of the year 9999
# What an older Chandler wrote, without a checksum: a name that is not among these is a damaged one.
_UNSEALED = MEMBERS.keys() - {
    "pid",
    "started",
    "boot",
    "pidns",
    "timens",
    "userns",
    "place",
    "group",
    "token",
    "mark",
    "engine",
}


def load(state_dir: str, root: str, container: str, spelled: str = "") -> Optional[Dict[str, Any]]:
    """A container's record, or None when it has none.  Raises HostError for one that is damaged.

    `spelled`: the root as it was given; an older Chandler named records after that.
    """
    for name in (root, spelled) if spelled else (root,):
        path = grants.record_path(state_dir, name, container)
        try:
            data = files.read(path, grants.MAX_RECORD)[0]
        except FileNotFoundError:
            continue
        except (OSError, ChandlerError):
            data = b""
        record = parse(data)
        if record is None:
            raise errors.HostError(f"the grant record {path} is damaged", "delete the container, and create it anew")
        if record["id"] == container and record["root"] == name:  # else the checksums of two roots are the same
            return record
    return None


def read(state_dir: str, root: str, container: str, spelled: str = "") -> Optional[Dict[str, Any]]:
    """A container's record, or None when it has none that can be used.

    `spelled`: the root as it was given; an older Chandler named records after that.
    """
    try:
        return load(state_dir, root, container, spelled)
    except ChandlerError:
        return None


def every(state_dir: str) -> Iterator[Tuple[str, Optional[Dict[str, Any]]]]:
    """The paths of all records with what they say, None for one that is damaged."""
    try:
        names = sorted(posix.listdir(grants.directory(state_dir)))
    except OSError:
        return
    for name in names:
        path = f"{grants.directory(state_dir)}/{name}"
        if not name.endswith(".json"):
            continue  # half a record: there is no container yet
        try:
            yield path, parse(files.read(path, grants.MAX_RECORD)[0])
        except FileNotFoundError:
            continue
        except (OSError, ChandlerError):
            yield path, None


def parse(data: bytes) -> Optional[Dict[str, Any]]:
    """The record in a file's bytes, every member of the type that its readers expect; None when it is damaged."""
    try:
        text = files.unseal(data)
        record = jsontext.loads(data if text is None else text)
    except ChandlerError:
        return None
    if (
        type(record) is not dict
        or not {"id", "root"} <= record.keys()
        or text is None
        and not record.keys() <= _UNSEALED
    ):
        return None
    return record if fits(record, MEMBERS) else None


def fits(value: Dict[str, Any], members: Dict[str, Any]) -> bool:
    """Whether each member that is there has its type; for a list that of its items, too."""
    for key, kind in members.items():
        found = value.get(key)
        if found is None:
            if key in value:
                return False
        elif type(kind) is list:
            if type(found) is not list or any(type(item) is not kind[0] for item in found):
                return False
        elif type(found) is not kind or kind is int and not 0 <= found <= _LARGEST:
            return False
    nodes, place, marks = value.get("nodes", ()), value.get("place", ("", 0, 0)), value.get("sharing", value)
    return (
        all([type(part) for part in node] == [str, str, int, int] for node in nodes)
        and [type(part) for part in place] == [str, int, int]
        and _fit_marks(marks)
    )


def _fit_marks(marks: Dict[str, Any]) -> bool:
    """The same for how a device is shared (shim.sharing.terms), in a record and, beside other members, in a lease."""
    mode = marks.get("mode")
    if mode is None:
        return marks.keys().isdisjoint(_MARKS)
    limits = marks.get("limits", {})
    return (
        type(marks.get("words")) is str
        and type(marks.get("held", "")) is str
        and type(limits) is dict
        and all(type(limit) is int and 0 <= limit <= _LARGEST for limit in limits.values())
        and (
            type(marks.get("uid")) is int
            if mode == "mps"
            else mode == "time-slice" and type(marks.get("slice", 0)) in (str, type(None))
        )
    )


def restorable(record: Dict[str, Any]) -> bool:
    """Whether podman has checkpointed the container of a record into its bundle: `podman container restore` asks what
    it had.  Source: podman-container-checkpoint(1), the directory of its files."""
    return record.get("engine") == "podman" and files.exists(
        record.get("config", "").rpartition("/")[0] + "/checkpoint"
    )


def forget(state_dir: str, root: str, container: str, token: str) -> None:
    """Removes a container's record if it is of the lease with this token, since another container may have the name by
    now, and no restore will ask for it."""
    record = read(state_dir, root, container)
    if record is not None and record.get("token") == token and not restorable(record):
        grants.remove(state_dir, root, container)


def is_lease(lease: Any) -> bool:
    """Whether this is a lease, every member of the type that its readers expect."""
    if type(lease) is not dict or not lease.keys() >= _NEEDED or not fits(lease, _OF_LEASES):
        return False
    owner = lease["owner"]
    return (
        (owner == "oci" and lease.keys() >= _NEEDED_OF_OCI or owner == "nri" and "pod" in lease)
        and bool(lease["keys"])
        and lease["since"] <= _LAST
    )
