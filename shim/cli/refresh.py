"""`chandler refresh`: makes Chandler's own CDI files true again, compiles the inventory, so that no create has to, and
forgets containers that are gone."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from typing import Any, Dict

from shim.generate import managed
from shim.node import compiler, launch_line
from shim.node.inventory import Place
from shim.state import grants, stale

_FORGET_AFTER = 3600.0  # seconds; a grant is older than its container by the time that a create takes
_WAITS = 2  # a file may be written while another is waited for, which no path unit tells then


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "refresh", help="compile configuration and CDI files for the next create", description=__doc__
    )
    command.add_argument("--quiet", action="store_true", help="say nothing when all is well")
    command.add_argument(
        "--remove",
        action="store_true",
        help="take away what it makes, before Chandler is removed: its CDI "
        "files that nobody changed, the inventory, the launcher's line",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when all was read and stored, 1 when a file could not be used (it is named on stderr)."""
    place = Place(dict(os.environb))
    config, _ = compiler.read_config(place)
    if arguments.remove:
        return _remove(place, config, arguments.quiet)
    done, old = ([], []) if place.rootless else managed.refresh(config, place.owners)
    for sentence in old if arguments.quiet else done + old:
        print(f"chandler: {sentence}", file=sys.stderr)
    for _ in range(_WAITS):
        wait = compiler.unsettled(place, time.time_ns())
        if wait <= 0:
            break
        time.sleep(wait)  # a file that has just been written is believed two seconds later
    made = compiler.refresh(place)
    removed = stale.prune(place.trusted_state_dir(config["state-dir"]), _FORGET_AFTER)
    problems = compiler.read_registry(place, config).problems
    for path, errors in problems.items():
        for error in errors:
            print(f"chandler: {path}: {error}", file=sys.stderr)
    if not arguments.quiet:
        devices = sum(len(made.picks(kind)) for kind in made.kinds())
        print(f"{devices} devices of {len(made.kinds())} kinds; {len(removed)} old grants forgotten")
    return 1 if problems or old else 0


def _remove(place: Place, config: Dict[str, Any], quiet: bool) -> int:
    """Exit status 0 when nothing of ours is left."""
    done, left = ([], []) if place.rootless else managed.remove(config, place.owners)
    state_dir = place.trusted_state_dir(config["state-dir"])
    stale.prune(state_dir, 0.0)
    try:
        there = [name[9:].rpartition(".")[0] for name in sorted(os.listdir(grants.directory(state_dir)))]
    except FileNotFoundError:
        there = []
    if there:
        left.append(
            f"{', '.join(there)} {'is' if len(there) == 1 else 'are'} still there: an engine that calls chandler-runtime cannot end "
            "them without it"
        )
    for sentence in left if quiet else done + left:
        print(f"chandler: {sentence}", file=sys.stderr)
    if place.state_dir:
        shutil.rmtree(os.path.dirname(place.directory), ignore_errors=True)
    if launch_line.is_ours(place):
        launch_line.remove()
    return 1 if left else 0
