"""Rebuilds the ledger from grant records, from the runtimes' state directories, and from control groups.

A grant record has everything that its lease had.  A container whose record is damaged or lost is found in its runtime's
state directory by our poststop hook, which has the token.  Its new lease holds every device in its config.json.
Not part of the create path.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from shim.errors import ChandlerError
from shim.host import files, kernel, runtimes, userns
from shim.shapes import Document
from shim.state import grants, leases, records, stale

if TYPE_CHECKING:
    from shim.state.grants import GrantRecord
    from shim.state.leases import Lease

_MAX_CONFIG = 16 << 20  # bytes
_KINDS = {99: "c", 98: "b", "c": "c", "u": "c", "b": "b"}  # runc writes the letter's character code
# null, zero, full, random, urandom, tty, console, ptmx: every container has these.
# Source: OCI runtime specification, "Default Devices"
_DEFAULT = frozenset(("c1:3", "c1:5", "c1:7", "c1:8", "c1:9", "c5:0", "c5:1", "c5:2"))


class Rebuilt(NamedTuple):
    """The leases; for people, the reasons why there may be more; the paths of grant records that cannot be used."""

    leases: list[Lease]
    doubts: list[str]
    damaged: list[str]


def gather(state_dir: str, present: list[Lease]) -> Rebuilt:
    """The leases of all containers that are not certainly gone.

    `present`: the leases of the ledger, if it can be read; they are kept as they are.
    """
    by_token = {lease["token"]: lease for lease in present}
    leased = {(lease["owner"], lease.get("root", ""), lease["id"]) for lease in present}
    # Leases by root and id, from records of an older Chandler, which have no token.
    older: dict[tuple[str, str], Lease] = {}
    damaged: list[str] = []
    roots = {runtimes.resolved(f"/run/{kind}") for kind in runtimes.KINDS}
    for base in (state_dir, grants.nri_directory(state_dir)):
        for path, record in records.every(base):
            if record is None:
                damaged.append(path)
                continue
            roots.add(record["root"])
            lease = _of_record(record)
            if not lease["keys"] or (lease["owner"], lease.get("root", ""), lease["id"]) in leased:
                continue
            if "token" not in record and lease["owner"] == "oci":
                older[lease["root"], lease["id"]] = lease
            else:
                by_token[lease["token"]] = lease
    roots.update(lease["root"] for lease in present if lease["owner"] == "oci")
    roots = {root for root in roots if root.startswith("/")}
    known_to_runtimes = set()  # the paths that the records of these containers have
    for root in sorted(roots):
        for container, config in _containers(root):
            known_to_runtimes.add(grants.record_path(state_dir, root, container))
            of_state = _of_state(root, container, config, state_dir)
            if of_state is not None:
                # an older record gives exact devices, the hook its token: both are the same lease
                of_record = older.pop((root, container), of_state)
                by_token.setdefault(of_state["token"], {**of_record, "root": root, "token": of_state["token"]})
    by_token.update((lease["token"], lease) for lease in older.values())
    for lease in [lease for lease in by_token.values() if "claim" in lease]:
        sandbox = leases.of_sandbox(lease)
        by_token.setdefault(sandbox["token"], sandbox)
    # A container that no runtime knows may be in the middle of its create, before its runtime has written anything.
    doubts = [
        f"the grant record {path} is damaged, or others could have written it, and its container is unknown"
        for path in damaged
        if path not in known_to_runtimes
    ]
    return Rebuilt(
        sorted(
            (lease for lease in by_token.values() if not stale.is_stale(lease)), key=lambda lease: int(lease["since"])
        ),
        doubts,
        damaged,
    )


def reasons_for_doubt(state_dir: str, was_there: bool) -> list[str]:
    """The reasons why there may be containers that `gather` does not find.  `was_there`: whether there was a ledger."""
    doubts = []
    if was_there and not any(True for _ in records.every(state_dir)):
        doubts.append("its grant records are lost, too")
    if os.path.exists(grants.nri_directory(state_dir)):
        doubts.append("the NRI plugin may have given GPUs to containers that are not there yet")
    return doubts


def _of_record(record: GrantRecord) -> Lease:
    """The lease that belongs to a grant record; a new token if the record has none, empty keys if it had no lease."""
    copied = (
        "id",
        "root",
        "runtime",
        "pid",
        "started",
        "boot",
        "pidns",
        "timens",
        "userns",
        "place",
        "group",
        "token",
        "pod",
        "claim",
        "called",
        "allocated",
    )
    given: Document = dict(record)
    lease: Document = {
        "token": os.urandom(12).hex(),
        "owner": record.get("owner", "oci"),
        "runtime": "",
        "pid": 0,
        "started": 0,
        **{key: given[key] for key in copied if key in given},
        **record.get("sharing", {}),
    }
    if lease["root"].startswith("/"):
        lease["root"] = runtimes.resolved(lease["root"])
    if lease["owner"] == "nri":
        lease = {
            "pod": "",
            "container": record.get("name", ""),
            **{key: value for key, value in lease.items() if key not in ("runtime", "pid", "started")},
        }
    if lease["owner"] == "dra":
        lease = {
            "namespace": record.get("namespace", ""),
            "name": record.get("name", ""),
            **{key: value for key, value in lease.items() if key not in ("runtime", "pid", "started")},
        }
    result: Any = {
        **lease,
        "since": record.get("time", 0),
        "names": record.get("devices", []),
        "keys": record.get("physical", []),
    }
    rebuilt: Lease = result
    return rebuilt


def _containers(root: str) -> Iterator[tuple[str, Document]]:
    """(id, config.json as the runtime has kept it) of all containers in a runtime's root."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return
    for name in names:
        config = _config(runtimes.kind_of_container(root, [name], False, {}), os.path.join(root, name))
        if config:
            yield name, config


def _of_state(root: str, container: str, config: Document, state_dir: str) -> Lease | None:
    """The lease of a container by its poststop hook; None if it has no hook for this ledger, or no devices.

    The wrapper's pid is not known, so pid and started are 0: such a create counts as ended.
    """
    devices = _devices(config)
    for hook in _hooks(config):
        words = hook.get("args") if isinstance(hook, dict) else None
        if (
            isinstance(words, list)
            and len(words) == 4
            and words[:3] == ["chandler-hook", "release", state_dir]
            and isinstance(words[3], str)
            and devices
        ):
            kind = runtimes.kind_of_container(root, [container], False, {})
            try:
                runtime = runtimes.find(kind, userns.trusted_owners(userns.user_namespace()))[1]
            except ChandlerError:
                runtime = kind
            return {
                "token": words[3],
                "owner": "oci",
                "id": container,
                "root": root,
                "runtime": runtime,
                "pid": 0,
                "started": 0,
                # Elsewhere (in a pod of the plugin's) its processes may not be seen.
                "pidns": kernel.namespace("pid"),
                "since": int(time.time()),
                "names": devices,
                "keys": devices,
            }
    return None


def _config(kind: str, directory: str) -> Document:
    """The part of a container's config.json that its runtime has kept in `directory`, {} if there is none.

    crun keeps the whole file; runc keeps its own form of it; youki names the bundle, and keeps the hooks.
    """
    if kind == "runc":
        config = _object(os.path.join(directory, "state.json")).get("config")
        return config if isinstance(config, dict) else {}
    if kind == "crun":
        return _object(os.path.join(directory, "config.json"))
    bundle = _object(os.path.join(directory, "state.json")).get("bundle")
    return {
        **_object(os.path.join(str(bundle), "config.json")),
        **_object(os.path.join(directory, "youki_config.json")),
    }


def _object(path: str) -> Document:
    try:
        content = json.loads(files.read(path, _MAX_CONFIG)[0])
    except (OSError, ValueError, RecursionError, ChandlerError):
        return {}
    return content if isinstance(content, dict) else {}


def _hooks(config: Document) -> list[Any]:
    """The poststop hooks of a container.  runc's own form of config.json writes Hooks with a capital letter."""
    hooks = config.get("Hooks") or config.get("hooks")
    poststop = hooks.get("poststop") if isinstance(hooks, dict) else None
    return poststop if isinstance(poststop, list) else []


def _devices(config: Document) -> list[str]:
    """A key for each device node that is not a default one.

    A partition of a GPU may have several nodes.  The new lease holds each node by itself, which clashes with more than
    the partition.
    """
    linux = config.get("linux")
    listed = config.get("devices") or (linux.get("devices") if isinstance(linux, dict) else None)
    keys: dict[str, None] = {}
    for device in listed if isinstance(listed, list) else ():
        if isinstance(device, dict) and device.get("type") in _KINDS:
            keys[f"{_KINDS[device['type']]}{device.get('major')}:{device.get('minor')}"] = None
    return [key for key in keys if key not in _DEFAULT]
