"""`chandler leases`: which container holds which device, the mending of leases that were lost, and of a damaged ledger."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any, Dict, List, Tuple

from shim.cli.ps import limits, utc
from shim.errors import HostError, LeaseError
from shim.node import compiler
from shim.node.inventory import Place
from shim.state import stale
from shim.state.ledger import Ledger

_FORGET_AFTER = 3600.0  # seconds, for grants of an older Chandler that do not say who makes the container


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser("leases", help="show and mend who holds which device", description=__doc__)
    command.add_argument("--format", choices=("text", "json"), default="text")
    command.set_defaults(run=show)
    actions = command.add_subparsers(dest="action", metavar="ACTION")
    release = actions.add_parser(
        "release",
        help="end leases",
        description="Ends the leases of a container, or those that nobody holds any longer.",
    )
    which = release.add_mutually_exclusive_group(required=True)
    which.add_argument("id", nargs="?", help="the container")
    which.add_argument(
        "--stale", action="store_true", help="all whose container is gone, and the grant records of those that had none"
    )
    release.add_argument("--quiet", action="store_true", help="say nothing when all is well")
    release.add_argument("--force", action="store_true", help="also while the container may be using its devices")
    release.set_defaults(run=end)
    made = actions.add_parser(
        "rebuild",
        help="make a damaged ledger anew",
        description="Makes the ledger anew from grant records, the state of runtimes and control groups.",
    )
    made.add_argument("--force", action="store_true", help="also where a record is damaged and its container unknown")
    made.set_defaults(run=make_anew)


def _place() -> Tuple[str, bool]:
    """The node's state directory, and whether it is for the caller's eyes alone."""
    place = Place(dict(os.environb))
    return place.trusted_state_dir(compiler.read_config(place)[0]["state-dir"]), place.rootless


def show(arguments: argparse.Namespace) -> int:
    """Exit status 0."""
    found = Ledger(*_place()).read()
    if arguments.format == "json":
        print(json.dumps(found, indent=2))
        return 0
    rows = [("CONTAINER", "DEVICES", "MODE", "LIMITS", "SINCE", "BY", "STATE")]
    rows += [
        (
            lease["id"],
            ", ".join(lease["names"]),
            lease.get("mode", "exclusive") + lease.get("words", ""),
            limits(lease),
            utc(lease["since"]),
            lease["owner"],
            _state(lease),
        )
        for lease in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def end(arguments: argparse.Namespace) -> int:
    """Exit status 0 when a lease was ended, or none was stale.  Raises LeaseError when the container has none."""
    state_dir, private = _place()
    kept = Ledger(state_dir, private)
    if arguments.stale:
        ended, forgotten = kept.take_back(), stale.prune(state_dir, _FORGET_AFTER)
        if not arguments.quiet:
            print(f"{ended} stale leases ended, {len(forgotten)} grants of containers that are gone forgotten")
        kept.settle_all()
        return 0
    held: List[Dict[str, Any]] = [lease for lease in kept.read() if lease["id"] == arguments.id]
    if not held:
        raise LeaseError(f"no container {arguments.id!r} holds a lease", "`chandler leases` lists those that do")
    used = [lease for lease in held if not stale.is_stale(lease)]
    if used and not arguments.force:
        raise LeaseError(
            f"{arguments.id} may still be using {', '.join(name for lease in used for name in lease['names'])}, which would be "
            "given to another container, too",
            "delete the container, or say --force when it is certainly gone",
        )
    kept.release({lease["token"] for lease in held})
    return 0


def make_anew(arguments: argparse.Namespace) -> int:
    """Exit status 0.  Raises HostError when there are doubts and no --force."""
    state_dir, private = _place()
    try:
        made = Ledger(state_dir, private).make_anew(asked=True, force=arguments.force)
    except OSError as error:
        raise HostError(f"the ledger of leases cannot be made anew in {state_dir}: {error.strerror}") from None
    for doubt in made.doubts:
        print(f"chandler: {doubt}", file=sys.stderr)
    print(f"{len(made.leases)} leases")
    return 0


def _state(lease: Dict[str, Any]) -> str:
    return "stale" if stale.is_stale(lease) else "held"
