"""Reads grant records, and checks the members of records, and of leases without a checksum.

Part of a create only if it reads a record: a restore, or a create on a node with an NRI plugin.
"""

from __future__ import annotations

import posix

from shim import errors, jsontext
from shim.errors import ChandlerError
from shim.host import files, trust
from shim.state import grants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from shim.shapes import Document
    from shim.state.grants import GrantRecord

_LARGEST = 1 << 62  # the largest number that is accepted
_MARKS = frozenset(("mode", "words", "uid", "slice", "limits", "held"))
# The type of each member of records and leases.  [str] stands for a list of strings, and so on.
MEMBERS: dict[str, type | list[type]] = {
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
    "claim": str,
    "called": str,
    "allocated": bool,
}
# The members of a lease: those of a record, and four more.
_OF_LEASES: dict[str, type | list[type]] = {
    **MEMBERS,
    "names": [str],
    "keys": [str],
    "since": int,
    "container": str,
}
_NEEDED = frozenset(("token", "owner", "id", "names", "keys", "since"))
_NEEDED_OF_OCI = frozenset(("root", "runtime", "pid", "started"))
_LAST = 253402300799  # the last second of the year 9999
# The members that an older Chandler wrote, without a checksum.  A record without one is damaged if it has any other.
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
    "claim",
    "called",
    "allocated",
}


def load(state_dir: str, root: str, container: str, spelled: str = "") -> GrantRecord | None:
    """A container's record, or None when it has none.

    Raises HostError for a record that is damaged, TrustError for one that others could have written.

    `spelled`: the root as --root gave it; an older Chandler's records are named after that.
    """
    for name in (root, spelled) if spelled else (root,):
        path = grants.record_path(state_dir, name, container)
        try:
            data = trust.read_own(path, grants.MAX_RECORD)
        except FileNotFoundError:
            continue
        except errors.TrustError:
            raise
        except (OSError, ChandlerError):
            data = b""
        record = parse(data)
        if record is None:
            raise errors.HostError(f"the grant record {path} is damaged", "delete the container, and create it anew")
        if record["id"] == container and record["root"] == name:  # else two roots have the same CRC in the file name
            return record
    return None


def read(state_dir: str, root: str, container: str, spelled: str = "") -> GrantRecord | None:
    """`load`, with None for a record that cannot be used, too."""
    try:
        return load(state_dir, root, container, spelled)
    except ChandlerError:
        return None


def every(state_dir: str) -> Iterator[tuple[str, GrantRecord | None]]:
    """(path, record) of all records; the record is None when it is damaged, or others could have written it.

    Raises HostError when they cannot be read now.
    """
    try:
        names = sorted(posix.listdir(grants.directory(state_dir)))
    except OSError as error:
        if files.cannot_read_now(error):
            raise errors.HostError(f"{grants.directory(state_dir)} cannot be read: {error.strerror}") from None
        return
    for name in names:
        path = f"{grants.directory(state_dir)}/{name}"
        if not name.endswith(".json"):
            continue  # a temporary file of `grants.write`: its container does not exist yet
        try:
            record = parse(trust.read_own(path, grants.MAX_RECORD))
        except FileNotFoundError:
            continue
        except (OSError, ChandlerError) as error:
            if isinstance(error, OSError) and files.cannot_read_now(error):
                raise errors.HostError(f"{path} cannot be read: {error.strerror}") from None
            record = None
        yield path, record


def parse(data: bytes) -> GrantRecord | None:
    """The record in a file's bytes; None when it is damaged, or a member is not of its type."""
    try:
        text = files.unseal(data)
        record = jsontext.loads(data if text is None else text)
    except ChandlerError:
        return None
    return record if _is_record(record, text is not None) else None


def _is_record(record: Any, sealed: bool) -> bool:
    return (
        type(record) is dict
        and {"id", "root"} <= record.keys()
        and (sealed or record.keys() <= _UNSEALED)
        and has_types(record, MEMBERS)
    )


def has_types(value: Document, members: dict[str, type | list[type]]) -> bool:
    """Whether each member of `value` that is listed in `members` has the type given there, and so do its items."""
    for key, kind in members.items():
        member = value.get(key)
        if member is None:
            if key in value:
                return False
        elif type(kind) is list:
            if type(member) is not list or any(type(item) is not kind[0] for item in member):
                return False
        elif type(member) is not kind or type(member) is int and not 0 <= member <= _LARGEST:
            return False
    nodes, place, marks = value.get("nodes", ()), value.get("place", ("", 0, 0)), value.get("sharing", value)
    return (
        all([type(part) for part in node] == [str, str, int, int] for node in nodes)
        and [type(part) for part in place] == [str, int, int]
        and _fit_marks(marks)
    )


def _fit_marks(marks: Document) -> bool:
    """Whether the marks of sharing (shim.sharing.terms) have their types.

    A record has them as its member `sharing`; a lease has them among its other members.
    """
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


def restorable(record: GrantRecord) -> bool:
    """Whether podman has checkpointed the container of a record, so that a restore will read the record.

    Source: podman-container-checkpoint(1), which puts the checkpoint into the directory of the bundle.
    """
    return record.get("engine") == "podman" and files.exists(
        record.get("config", "").rpartition("/")[0] + "/checkpoint"
    )


def forget(state_dir: str, root: str, container: str, token: str) -> None:
    """Removes a container's record, unless a restore may read it.

    The record must have this token: by now another container may have the same name.
    """
    record = read(state_dir, root, container)
    if record is not None and record.get("token") == token and not restorable(record):
        grants.remove(state_dir, root, container)


def is_lease(lease: Any) -> bool:
    """Whether a value is a lease: it has the members that its owner's leases need, each of its type."""
    if type(lease) is not dict or not lease.keys() >= _NEEDED or not has_types(lease, _OF_LEASES):
        return False
    owner = lease["owner"]
    return (
        (owner == "oci" and lease.keys() >= _NEEDED_OF_OCI or owner == "nri" and "pod" in lease or owner == "dra")
        and bool(lease["keys"])
        and lease["since"] <= _LAST
    )
