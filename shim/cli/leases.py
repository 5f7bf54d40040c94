"""`chandler leases`: shows which container holds which device, ends leases, and rebuilds a damaged ledger."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from shim.cli.ps import limits, utc
from shim.errors import HostError, LeaseError
from shim.node import compiler
from shim.node.inventory import Account
from shim.state import stale
from shim.state.leases import of_pod
from shim.state.ledger import Ledger

if TYPE_CHECKING:
    from shim.state.leases import Lease

# Seconds; for grant records of older releases, which do not name the process that creates the container.
_FORGET_AFTER = 3600.0


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "leases", help="show which container holds which device, and repair that", description=__doc__
    )
    command.add_argument("--format", choices=("text", "json"), default="text")
    command.set_defaults(run=show)
    actions = command.add_subparsers(dest="action", metavar="ACTION")
    release = actions.add_parser(
        "release",
        help="end leases",
        description="Ends the leases of a container, or those whose container is gone.",
    )
    which = release.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", help="the container")
    which.add_argument(
        "--stale",
        action="store_true",
        help="all leases whose container is gone, and the grant records of such containers",
    )
    release.add_argument("--quiet", action="store_true", help="print nothing when nothing is wrong")
    release.add_argument("--force", action="store_true", help="even while the container may be using its devices")
    release.set_defaults(run=release_leases)
    rebuild = actions.add_parser(
        "rebuild",
        help="rebuild a damaged ledger",
        description="Rebuilds the ledger from grant records, the state of runtimes and control groups.",
    )
    rebuild.add_argument(
        "--force", action="store_true", help="even where a record is damaged and its container is unknown"
    )
    rebuild.set_defaults(run=rebuild_ledger)


def _state_directory() -> tuple[str, bool]:
    """The node's state directory, and whether it is private to the caller (rootless)."""
    account = Account(dict(os.environb))
    return account.trusted_state_dir(compiler.read_config(account)[0]["state-dir"]), account.rootless


def show(arguments: argparse.Namespace) -> int:
    """Prints all leases.  Returns exit status 0."""
    leases = Ledger(*_state_directory()).read()
    if arguments.format == "json":
        print(json.dumps(leases, indent=2))
        return 0
    rows = [("CONTAINER", "DEVICES", "MODE", "LIMITS", "SINCE", "BY", "STATE")]
    rows += [
        (
            of_pod(lease),
            ", ".join(lease["names"]),
            lease.get("mode", "exclusive") + lease.get("words", ""),
            limits(lease),
            utc(lease["since"]),
            lease["owner"],
            _state(lease),
        )
        for lease in leases
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def release_leases(arguments: argparse.Namespace) -> int:
    """Ends leases.  Returns exit status 0.

    Raises LeaseError when the container has no lease, or may still use its devices.
    """
    state_dir, private = _state_directory()
    ledger = Ledger(state_dir, private)
    if arguments.stale:
        ended, forgotten = ledger.end_stale_leases(), stale.prune(state_dir, _FORGET_AFTER)
        if not arguments.quiet:
            print(f"{ended} stale leases ended, {len(forgotten)} grants of containers that are gone forgotten")
        ledger.restore_all_gpus()
        return 0
    leases = [lease for lease in ledger.read() if lease["id"] == arguments.id]
    if not leases:
        raise LeaseError(f"no container {arguments.id!r} holds a lease", "`chandler leases` lists those that do")
    used = [lease for lease in leases if not stale.is_stale(lease)]
    if used and not arguments.force:
        raise LeaseError(
            f"{arguments.id} may still be using {', '.join(name for lease in used for name in lease['names'])}, "
            "which another container would then get, too",
            "delete the container, or use --force when it is certainly gone",
        )
    ledger.release({lease["token"] for lease in leases})
    return 0


def rebuild_ledger(arguments: argparse.Namespace) -> int:
    """Rebuilds the ledger.  Returns exit status 0; raises HostError when there are doubts and no --force."""
    state_dir, private = _state_directory()
    try:
        rebuilt = Ledger(state_dir, private).rebuild(asked=True, force=arguments.force)
    except OSError as error:
        raise HostError(f"the ledger of leases cannot be rebuilt in {state_dir}: {error.strerror}") from None
    for doubt in rebuilt.doubts:
        print(f"chandler: {doubt}", file=sys.stderr)
    print(f"{len(rebuilt.leases)} leases")
    return 0


def _state(lease: Lease) -> str:
    return "stale" if stale.is_stale(lease) else "held"
