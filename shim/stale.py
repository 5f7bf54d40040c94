"""Which leases nobody holds any longer.  Asks runtimes, which takes its time: not part of the create path."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, Dict

from shim import ledger, runtimes

_PATIENCE = 10.0  # seconds


def is_stale(lease: Dict[str, Any]) -> bool:
    """Whether the container of a lease is certainly gone; in doubt it is not.

    The lease of an NRI plugin is ended by that plugin alone: its container exists before any runtime knows it.  That
    of the wrapper is stale when the process that creates the container has ended and the runtime does not know the
    container, or says that it is stopped.  A state directory without the file that makes it a container's is what a
    runtime left that was killed early: it does not know that either.
    """
    if lease["owner"] != "oci":
        return False
    if ledger.started(lease["pid"]) == lease["started"]:
        return False
    state = os.path.join(lease["root"], lease["id"])
    if not os.path.exists(os.path.join(state, _file(lease["runtime"]))):
        return True
    return _status(lease) == "stopped"


def _file(runtime: str) -> str:
    """The file in a state directory without which a runtime knows no container; '' for one that we do not know."""
    name = os.path.basename(runtime)
    return next((file for file, kind in runtimes.STATE_FILES if kind == name), "")


def _status(lease: Dict[str, Any]) -> str:
    """What the runtime says of the container, '' when it gives no answer."""
    try:
        done = subprocess.run([lease["runtime"], "--root", lease["root"], "state", lease["id"]], check=False, cwd="/",
                              env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=_PATIENCE)
        return str(json.loads(done.stdout)["status"]) if done.returncode == 0 else ""
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired):
        return ""
