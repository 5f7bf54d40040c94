"""`chandler leases`: which container holds which device, and the mending of leases that were lost."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, Dict, List

from shim import compiler, stale
from shim.cli.ps import limits
from shim.errors import LeaseError
from shim.inventory import Place
from shim.ledger import Ledger


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser("leases", help="show and mend who holds which device", description=__doc__)
    command.add_argument("--format", choices=("text", "json"), default="text")
    command.set_defaults(run=show)
    actions = command.add_subparsers(dest="action", metavar="ACTION")
    release = actions.add_parser("release", help="end leases", description="Ends the leases of a container, or those that nobody holds any longer.")
    which = release.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", help="the container")
    which.add_argument("--stale", action="store_true", help="all whose container is gone")
    release.set_defaults(run=end)


def ledger() -> Ledger:
    """The node's ledger."""
    place = Place(dict(os.environb))
    return Ledger(place.trusted_state_dir(compiler.read_config(place)[0]["state-dir"]), place.rootless)


def show(arguments: argparse.Namespace) -> int:
    """Exit status 0."""
    found = ledger().read()
    if arguments.format == "json":
        print(json.dumps(found, indent=2))
        return 0
    rows = [("CONTAINER", "DEVICES", "MODE", "LIMITS", "SINCE", "BY", "STATE")]
    rows += [(lease["id"], ", ".join(lease["names"]), lease.get("mode", "exclusive") + lease.get("words", ""), limits(lease), _time(lease["since"]), lease["owner"], _state(lease)) for lease in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def end(arguments: argparse.Namespace) -> int:
    """Exit status 0 when a lease was ended, or none was stale.  Raises LeaseError when the container has none."""
    kept = ledger()
    if arguments.stale:
        print(f"{kept.take_back()} stale leases ended")
        kept.settle_all()
        return 0
    held: List[Dict[str, Any]] = [lease for lease in kept.read() if lease["id"] == arguments.id]
    if not held:
        raise LeaseError(f"no container {arguments.id!r} holds a lease", "`chandler leases` lists those that do")
    for lease in held:
        if not stale.is_stale(lease):
            print(f"chandler: {lease['id']} may still be using {', '.join(lease['names'])}", file=sys.stderr)
    kept.release({lease["token"] for lease in held})
    return 0


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


def _state(lease: Dict[str, Any]) -> str:
    return "stale" if stale.is_stale(lease) else "held"
