"""`chandler ps`: shows containers with their GPUs, how they share them, their limits, and how much they use."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Callable

from shim import paths
from shim.cli import engine_gpus
from shim.errors import ChandlerError
from shim.generate import nvfiles, nvml
from shim.generate.model import NvmlUnavailable, Options
from shim.generate.tree import HostTree
from shim.node import compiler
from shim.node.inventory import Account
from shim.shapes import Document
from shim.sharing import pages
from shim.state import grants, records
from shim.state.leases import is_of_sandbox
from shim.state.ledger import Ledger

if TYPE_CHECKING:
    from shim.state.grants import GrantRecord
    from shim.state.leases import Lease

_PATIENCE = 5.0  # seconds for a runtime's answer
_MINOR = "c195:"  # the device number of an NVIDIA GPU, without the minor
_COLOURS = {"exclusive": "32", "mps": "36", "time-slice": "36", "not leased": "33", "stopped": "31", "gone": "31"}
# The keys that every record of a container with devices has.
_NEEDED = frozenset(("runtime", "devices", "physical", "time"))


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser("ps", help="show containers and their GPUs", description=__doc__)
    command.add_argument("--format", choices=("text", "json"), default="text")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table or JSON.  Returns exit status 0."""
    account = Account(dict(os.environb))
    inventory = compiler.load(account)
    state_dir = account.trusted_state_dir(inventory.config["state-dir"])
    notes: list[str] = []
    rows = containers(Ledger(state_dir, account.rootless).read(), _records(state_dir))
    for row in rows:
        row["pid"], row["status"] = state(row)
    # a container that is gone is shown only while it holds a lease
    rows = [row for row in rows if row["mode"] != "not leased" or row["status"] != "gone"]
    devices = engine_gpus.gpus_of_node(inventory)
    engine_gpus.add_rows(rows, engine_gpus.containers(devices, notes), devices)
    gpus = _usage(notes)
    attribute(rows, gpus)
    answer = {"containers": rows, "gpus": gpus, "shared": pages.every(state_dir), "notes": notes}
    print(
        json.dumps(answer, indent=2)
        if arguments.format == "json"
        else text(answer, sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    )
    return 0


def containers(leases: list[Lease], records: list[GrantRecord]) -> list[Document]:
    """One row for each container that has a lease, or that was granted devices without a lease."""
    rows = []
    leased = set()
    for lease in leases:
        if is_of_sandbox(lease):
            continue
        leased.add((lease.get("root", ""), lease["id"]))
        rows.append(
            {
                "id": lease["id"],
                "by": lease["owner"],
                "root": lease.get("root", ""),
                "runtime": lease.get("runtime", ""),
                "devices": lease["names"],
                "keys": lease["keys"],
                "mode": lease.get("mode", "exclusive"),
                "limits": lease.get("limits", {}),
                "held": lease.get("held", ""),
                "since": lease["since"],
            }
        )
    for record in records:
        if not record["devices"] or (record["root"], record["id"]) in leased:
            continue
        marks = record.get("sharing", {})
        rows.append(
            {
                "id": record["id"],
                "by": record.get("owner", "oci"),
                "root": record["root"],
                "runtime": record["runtime"],
                "devices": record["devices"],
                "keys": record["physical"],
                "mode": "not leased",
                "limits": marks.get("limits", {}),
                "held": marks.get("held", ""),
                "since": record["time"],
            }
        )
    return rows


def _records(state_dir: str) -> list[GrantRecord]:
    """All grant records, of the wrapper and of the NRI plugin."""
    granted = []
    for base in (state_dir, grants.nri_directory(state_dir)):
        for _, record in records.every(base):
            if record is not None and _NEEDED <= record.keys():
                granted.append(record)
    return granted


def utc(seconds: int) -> str:
    """Formats a time in seconds since 1970 for a table."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


def state(row: Document) -> Any:
    """The container's pid (0: unknown) and status, as its runtime reports them.

    The status is "gone" without a state directory, "unknown" without an answer, "" for containers of other front ends.
    """
    if row["by"] != "oci" or not row["runtime"]:
        return 0, ""
    if not os.path.exists(os.path.join(row["root"], row["id"])):
        return 0, "gone"
    try:
        done = subprocess.run(
            [row["runtime"], "--root", row["root"], "state", row["id"]],
            check=False,
            cwd="/",
            stdin=subprocess.DEVNULL,
            env={"PATH": paths.SAFE_PATH},
            capture_output=True,
            timeout=_PATIENCE,
        )
        answer = json.loads(done.stdout)
        return int(answer.get("pid") or 0), str(answer["status"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, subprocess.TimeoutExpired):
        return 0, "unknown"


def _usage(notes: list[str]) -> list[Document]:
    """What NVML reports of each GPU.  When NVML gives no answer, the reason goes to `notes`."""
    try:
        library = nvfiles.driver(HostTree(), Options()).library
        gpus: list[Document] = nvml.ask(library, nvml.usage)["gpus"]
        return gpus
    except (NvmlUnavailable, ChandlerError) as reason:
        notes.append(f"memory and utilisation are not known: {reason}")
        return []


def attribute(
    rows: list[Document], gpus: list[Document], namespace_of: Callable[[int], int] = engine_gpus.namespace
) -> None:
    """Adds to each row the memory of the container's processes (bytes) and the utilisation of its GPUs (percent).

    Adds a row for every process on a GPU that is in no container.  `namespace_of`: the mount namespace of a process,
    which all processes of a container share.
    """
    row_of_namespace: dict[int, Document] = {}
    for row in rows:
        row["memory"] = row["busy"] = None
        its_gpus = [gpu for gpu in gpus if any(f"{_MINOR}{gpu['minor']}" in key.split("+") for key in row["keys"])]
        reported = [gpu["busy"] for gpu in its_gpus if gpu["busy"] is not None]
        if reported:
            row["busy"] = max(reported)
        if its_gpus and row["pid"]:
            row["memory"] = 0
        if row["pid"]:
            row_of_namespace.setdefault(namespace_of(row["pid"]), row)
    row_of_pid: dict[int, Document] = {}
    for gpu in gpus:
        for pid, memory in gpu["processes"]:
            row_of_process = row_of_namespace.get(namespace_of(pid)) or row_of_pid.get(pid)
            if row_of_process is None:
                row_of_process = row_of_pid[pid] = {
                    "id": f"process {pid}",
                    "by": "",
                    "root": "",
                    "runtime": "",
                    "devices": [gpu["uuid"]],
                    "mode": "not leased",
                    "keys": [f"{_MINOR}{gpu['minor']}"],
                    "limits": {},
                    "held": "",
                    "since": None,
                    "pid": pid,
                    "status": "running",
                    "memory": 0,
                    "busy": gpu["busy"],
                }
                rows.append(row_of_process)
            row_of_process["memory"] = (row_of_process["memory"] or 0) + (memory or 0)


def text(answer: Document, coloured: bool) -> str:
    """Formats the answer as a table."""
    head = ("CONTAINER", "DEVICES", "MODE", "LIMITS", "PID", "STATUS", "MEMORY", "BUSY", "SINCE")
    rows = [head]
    for row in answer["containers"]:
        rows.append(
            (
                row["id"],
                ", ".join(row["devices"]),
                row["mode"],
                limits(row),
                str(row["pid"] or "-"),
                row["status"] or "-",
                "-" if row["memory"] is None else f"{row['memory'] >> 20}Mi",
                "-" if row["busy"] is None else f"{row['busy']}%",
                "-" if row["since"] is None else utc(row["since"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        if coloured:
            cells = [
                f"\33[{'1' if not number else _COLOURS[cell.strip()]}m{cell}\33[0m"
                if not number or cell.strip() in _COLOURS
                else cell
                for cell in cells
            ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *(f"note: {note}" for note in answer["notes"])])


def limits(row: Mapping[str, Any]) -> str:
    """The limits of a container or a lease in words, and whether they are enforced or advisory; "-" without limits."""
    words = [
        f"{value}% threads" if key == "mps_active_thread_percentage" else f"{value >> 20}Mi"
        for key, value in row.get("limits", {}).items()
    ]
    return f"{', '.join(words)} ({row['held']})" if words else "-"
