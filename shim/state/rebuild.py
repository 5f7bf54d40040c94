"""The ledger made anew, from grant records, from what runtimes have written of their containers, and from control
groups.

A grant record has all that its lease had.  A container whose record is damaged or lost is found in its runtime's
state directory: it has our poststop hook, with the token in it, and holds every device that it was given.  Not part
of the create path.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from shim.errors import ChandlerError
from shim.host import files, runtimes, userns
from shim.state import grants, records, stale

_MAX_CONFIG = 16 << 20  # bytes
_KINDS = {99: "c", 98: "b", "c": "c", "u": "c", "b": "b"}  # runc writes a letter's number
# null, zero, full, random, urandom, tty, console, ptmx: every container has these.  Source: OCI runtime
# specification, "Default Devices"
_DEFAULT = frozenset(("c1:3", "c1:5", "c1:7", "c1:8", "c1:9", "c5:0", "c5:1", "c5:2"))


class Rebuilt(NamedTuple):
    """The leases, why there may be more, and the grant records that are damaged."""

    leases: List[Dict[str, Any]]
    doubts: List[str]
    damaged: List[str]


def gather(state_dir: str, present: List[Dict[str, Any]]) -> Rebuilt:
    """The leases of all containers that are not certainly gone; `present`: those of a ledger that can be read."""
    found = {lease["token"]: lease for lease in present}
    held = {(lease["owner"], lease.get("root", ""), lease["id"]) for lease in present}
    older: Dict[Tuple[str, str], Dict[str, Any]] = {}  # leases of records that an older Chandler wrote, without a token
    damaged: List[str] = []
    roots = {runtimes.resolved(f"/run/{kind}") for kind in runtimes.KINDS}
    for base in (state_dir, grants.nri(state_dir)):
        for path, record in records.every(base):
            if record is None:
                damaged.append(path)
                continue
            roots.add(record["root"])
            lease = _of_record(record)
            if not lease["keys"] or (lease["owner"], lease.get("root", ""), lease["id"]) in held:
                continue
            if "token" not in record and lease["owner"] == "oci":
                older[lease["root"], lease["id"]] = lease
            else:
                found[lease["token"]] = lease
    roots.update(lease["root"] for lease in present if lease["owner"] == "oci")
    roots = {root for root in roots if root.startswith("/")}
    known = set()
    for root in sorted(roots):
        for container, config in _containers(root):
            known.add(grants.record_path(state_dir, root, container))
            of_state = _of_state(root, container, config, state_dir)
            if of_state is not None:
                of_record = older.pop((root, container), of_state)
                found.setdefault(of_state["token"], {**of_record, "root": root, "token": of_state["token"]})
    found.update((lease["token"], lease) for lease in older.values())
    # one that is not known may be on its way: its runtime has written nothing yet
    doubts = [
        f"the grant record {path} is damaged, and its container is unknown" for path in damaged if path not in known
    ]
    return Rebuilt(
        sorted((lease for lease in found.values() if not stale.is_stale(lease)), key=lambda lease: int(lease["since"])),
        doubts,
        damaged,
    )


def unknown(state_dir: str, was_there: bool) -> List[str]:
    """Why there may be containers that `gather` cannot know of; `was_there`: whether there was a ledger."""
    doubts = []
    if was_there and not any(True for _ in records.every(state_dir)):
        doubts.append("its grant records are lost, too")
    if os.path.exists(grants.nri(state_dir)):
        doubts.append("the NRI plugin may have given GPUs to containers that are not there yet")
    return doubts


def _of_record(record: Dict[str, Any]) -> Dict[str, Any]:
    """The lease that a grant record tells of."""
    kept = (
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
    )
    lease = {
        "token": os.urandom(12).hex(),
        "owner": record.get("owner", "oci"),
        "runtime": "",
        "pid": 0,
        "started": 0,
        **{key: record[key] for key in kept if key in record},
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
    return {
        **lease,
        "since": record.get("time", 0),
        "names": record.get("devices", []),
        "keys": record.get("physical", []),
    }


def _containers(root: str) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """All containers in a runtime's root, with what the runtime has kept of config.json."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return
    for name in names:
        config = _config(runtimes.owner(root, [name], False, {}), os.path.join(root, name))
        if config:
            yield name, config


def _of_state(root: str, container: str, config: Dict[str, Any], state_dir: str) -> Optional[Dict[str, Any]]:
    """The lease of a container that has our hook for this ledger."""
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
            kind = runtimes.owner(root, [container], False, {})
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
                "since": int(time.time()),
                "names": devices,
                "keys": devices,
            }
    return None


def _config(kind: str, directory: str) -> Dict[str, Any]:
    """What a runtime has kept of a container's config.json."""
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


def _object(path: str) -> Dict[str, Any]:
    try:
        found = json.loads(files.read(path, _MAX_CONFIG)[0])
    except (OSError, ValueError, RecursionError, ChandlerError):
        return {}
    return found if isinstance(found, dict) else {}


def _hooks(config: Dict[str, Any]) -> List[Any]:
    hooks = config.get("Hooks") or config.get("hooks")
    found = hooks.get("poststop") if isinstance(hooks, dict) else None
    return found if isinstance(found, list) else []


def _devices(config: Dict[str, Any]) -> List[str]:
    """A key for each device node; the node of a part of a GPU holds that alone, which is more than the container
    has."""
    linux = config.get("linux")
    listed = config.get("devices") or (linux.get("devices") if isinstance(linux, dict) else None)
    keys: Dict[str, None] = {}
    for device in listed if isinstance(listed, list) else ():
        if isinstance(device, dict) and device.get("type") in _KINDS:
            keys[f"{_KINDS[device['type']]}{device.get('major')}:{device.get('minor')}"] = None
    return [key for key in keys if key not in _DEFAULT]
