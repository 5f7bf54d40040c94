"""Which containers are gone: their leases are ended, their grants forgotten.  Asks runtimes, which takes its time: not
part of the create path."""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any, Dict, List

from shim import paths
from shim.errors import ChandlerError
from shim.host import files, runtimes
from shim.state import liveness, records

_PATIENCE = 10.0  # seconds
_MAX_STATE = 16 << 20  # bytes
_KNOWN = frozenset(("boot", "pid", "started", "runtime"))  # what a record has that says who makes the container


def is_stale(lease: Dict[str, Any]) -> bool:
    """Whether the container of a lease is certainly gone; in doubt it is not.

    The lease of an NRI plugin is ended by that plugin alone: its container exists before any runtime knows it.
    """
    return bool(lease["owner"] == "oci") and is_gone(lease)


def is_gone(entry: Dict[str, Any]) -> bool:
    """Whether a container of the wrapper's, by its lease or grant record, is certainly gone.

    So it is when the process that makes it has ended, nobody is in its control group, and the runtime does not know
    it, or says that it is stopped.  A stopped container alone may have left processes, where it has no PID namespace
    of its own. A state directory without the file that makes it a container's is what a runtime left that was killed
    early: it does not know that either.
    """
    if liveness.of_another_boot(entry):
        return True
    if not entry["root"].startswith("/"):
        return False  # of an older Chandler: relative to a directory that nobody knows any more
    if not liveness.sees(entry) or liveness.creating(entry):
        return False
    state = os.path.join(entry["root"], entry["id"])
    if liveness.occupants(entry, groups(state)) or liveness.goes_on_in_threads(_init(state)):
        return False
    if os.path.exists(os.path.join(state, _file(entry["runtime"]))):
        return liveness.in_our_time(entry) and _status(entry) == "stopped"
    # nothing else tells of a container without a control group
    return entry.get("group") != liveness.NO_GROUP and liveness.visible(entry)


def _file(runtime: str) -> str:
    """The file in a state directory without which a runtime knows no container; '' for one that we do not know."""
    name = os.path.basename(runtime)
    return next((file for file, kind in runtimes.STATE_FILES if kind == name), "")


def state_file(directory: str) -> Dict[str, Any]:
    """What a runtime has written of a container into its state directory; {} when there is nothing to read."""
    return next(filter(None, (_object(os.path.join(directory, name)) for name, _ in runtimes.STATE_FILES)), {})


def _object(path: str) -> Dict[str, Any]:
    """A file's JSON object, {} when there is none to read."""
    try:
        found = json.loads(files.read(path, _MAX_STATE)[0])
    except (OSError, ValueError, RecursionError, ChandlerError):
        return {}
    return found if isinstance(found, dict) else {}


def _init(directory: str) -> int:
    """The container's first process, which has threads where a runtime sees one that has ended; 0 when its runtime
    names none.

    Source: what crun (status), youki (state.json) and runc (state.json) write.
    """
    pids = [
        state.get(key)
        for state in (state_file(directory), _object(os.path.join(directory, "state.json")))
        for key in ("pid", "init_process_pid")
    ]
    return next((pid for pid in pids if type(pid) is int), 0)


def groups(directory: str) -> List[str]:
    """The control groups of a container, as its runtime has written them into its state directory.

    Source: what crun (status), youki (youki_config.json) and runc (state.json) write.
    """
    state = state_file(directory)
    paths = state.get("cgroup_paths")
    found = [state.get("cgroup-path"), state.get("cgroup_path"), *(paths.values() if isinstance(paths, dict) else ())]
    return list(dict.fromkeys(path for path in found if isinstance(path, str)))


def _status(entry: Dict[str, Any]) -> str:
    """What the runtime says of the container, '' when it gives no answer."""
    try:
        done = subprocess.run(
            [entry["runtime"], "--root", entry["root"], "state", entry["id"]],
            check=False,
            cwd="/",
            env={"PATH": paths.SAFE_PATH},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
        )
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else ""
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired):
        return ""


def prune(state_dir: str, minimum_age: float) -> List[str]:
    """Removes the grant records of containers that are gone and hold no lease; the ids of these.

    `minimum_age`: in seconds, for records of an older Chandler, which do not say who makes the container.
    """
    removed = []
    for path, record in records.every(state_dir):
        if record is None or record.get("owner") == "nri":
            continue  # damaged: chandler leases rebuild; the plugin's are ended by the plugin
        if records.restorable(record):
            continue
        try:
            if _KNOWN <= record.keys():
                gone = is_gone(record)
            else:
                age = time.time() - os.stat(path).st_mtime
                gone = (
                    record["root"].startswith("/")
                    and not os.path.exists(f"{record['root']}/{record['id']}")
                    and age > minimum_age
                )
            if gone:
                os.unlink(path)
                removed.append(record["id"])
        except OSError:
            continue
    return removed
