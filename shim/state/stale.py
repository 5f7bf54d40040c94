"""Tells which containers are gone, so that their leases can be ended and their grant records removed.

It asks runtimes, which may be slow.  Not part of the create path.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import TYPE_CHECKING

from shim import paths
from shim.errors import ChandlerError
from shim.host import files, runtimes
from shim.shapes import Document
from shim.state import liveness, records
from shim.state.leases import is_of_sandbox

if TYPE_CHECKING:
    from shim.state.leases import Entry, Lease

_PATIENCE = 10.0  # seconds
_MAX_STATE = 16 << 20  # bytes
# Source: container.c of crun (libcrun_container_state); youki 0.7 and runc 1.1 were tried.
_NEEDED = {"crun": ("status", "config.json"), "youki": ("youki_config.json", "state.json"), "runc": ("state.json",)}
_NAMES_INIT = "status"  # crun's, which always names the container's first process
_CREATOR = frozenset(("boot", "pid", "started", "runtime"))  # a record with these says which process made the container


def is_stale(lease: Lease) -> bool:
    """Whether the container of a lease is certainly gone; False when that is not certain.

    Only the NRI plugin ends its own leases, since its containers exist before any runtime knows them.  A pod's sandbox
    is there before its containers, so one without a process is gone.  The lease of a ResourceClaim (`dra`) ends when
    the kubelet says so; after a restart of the machine the kubelet asks for each claim anew.
    """
    if lease["owner"] == "dra":
        return liveness.of_another_boot(lease)
    if lease["owner"] == "nri" and is_of_sandbox(lease):
        return liveness.sees_every_process(lease) and not liveness.occupants(lease)
    return bool(lease["owner"] == "oci") and is_gone(lease)


def is_gone(entry: Entry) -> bool:
    """Whether a container that the wrapper created is certainly gone.  `entry`: its lease or grant record.

    It is gone when three things are true: the process that created it has ended, its control group has no processes,
    and the runtime does not know it or calls it stopped.  `stopped` alone is not enough, since a container without a
    PID namespace of its own can leave processes behind.

    A state directory may lack some of the runtime's files: its create was killed early, or its delete was killed, or
    an earlier delete of the same id came so late that it took them from a new container.  Then the runtime never says
    anything about the container again, nor can it delete it.  What decides is the first process, if a file names it.
    """
    if liveness.of_another_boot(entry):
        return True
    if not entry["root"].startswith("/"):
        return False  # an older Chandler's: relative to a working directory that was not recorded
    if not liveness.sees_all_processes(entry) or liveness.creator_runs(entry):
        return False
    state = os.path.join(entry["root"], entry["id"])
    pid, started = _init(state)
    if liveness.occupants(entry, groups(state)) or liveness.has_other_threads(pid):
        return False
    if all(os.path.exists(os.path.join(state, name)) for name in _needed(entry["runtime"])):
        if not liveness.in_our_time_namespace(entry) or _status(entry) != "stopped":
            return False
        # crun says so of a running container whose group was renamed.  Without the start time, the pid may be another
        # process's by now; and the runtime has looked at the process itself.
        return not (started and liveness.runs(entry, pid, started))
    if pid and liveness.runs(entry, pid, started) or not pid and os.path.exists(os.path.join(state, _NAMES_INIT)):
        return False
    # Without a control group nothing shows whether processes are left.
    return liveness.has_group(entry) and liveness.sees_root(entry)


def _needed(runtime: str) -> tuple[str, ...]:
    """The files in a container's state directory that its runtime needs to tell the status: it fails if one is missing.

    For a runtime that we do not know: ('',), the directory itself.
    """
    return _NEEDED.get(os.path.basename(runtime), ("",))


def state_file(directory: str) -> Document:
    """The JSON that a runtime has written about a container into its state directory; {} when none can be read."""
    return next(filter(None, (_object(os.path.join(directory, name)) for name, _ in runtimes.STATE_FILES)), {})


def _object(path: str) -> Document:
    """The JSON object in a file; {} when there is none, or it cannot be read."""
    try:
        content = json.loads(files.read(path, _MAX_STATE)[0])
    except (OSError, ValueError, RecursionError, ChandlerError):
        return {}
    return content if isinstance(content, dict) else {}


def _init(directory: str) -> tuple[int, int]:
    """(pid, start time in clock ticks) of the container's first process; 0 for what its runtime does not name.

    Source: what crun (status), youki (state.json, without the time) and runc (state.json) write.
    """
    for state in (state_file(directory), _object(os.path.join(directory, "state.json"))):
        for pid, started in (("pid", "process-start-time"), ("init_process_pid", "init_process_start")):
            if type(state.get(pid)) is int:
                time_of_start = state.get(started)
                return state[pid], time_of_start if type(time_of_start) is int else 0
    return 0, 0


def groups(directory: str) -> list[str]:
    """The paths of a container's control groups, as its runtime has written them into its state directory.

    Source: what crun (status), youki (youki_config.json) and runc (state.json) write.
    """
    state = state_file(directory)
    paths = state.get("cgroup_paths")
    values = [state.get("cgroup-path"), state.get("cgroup_path"), *(paths.values() if isinstance(paths, dict) else ())]
    return list(dict.fromkeys(path for path in values if isinstance(path, str)))


def _status(entry: Entry) -> str:
    """The status that the runtime gives for the container (`stopped` and so on), '' when it gives none."""
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


def prune(state_dir: str, minimum_age: float) -> list[str]:
    """Removes the grant records of containers that are gone, and gives the containers' ids.

    `minimum_age`: in seconds.  An older Chandler's record does not say which process made the container, so it is
    removed only when it is older than that and the container has no state directory.
    """
    removed = []
    for path, record in records.every(state_dir):
        if record is None or record.get("owner") in ("nri", "dra"):
            continue  # a damaged one is for `chandler leases rebuild`; plugin and DRA driver remove their own
        if records.restorable(record):
            continue
        try:
            if _CREATOR <= record.keys():
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
