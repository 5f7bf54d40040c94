"""`chandler refresh`: renews Chandler's own CDI files, compiles the inventory and forgets containers that are gone.

A create reads the compiled inventory, and compiles it itself only when it is out of date.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from typing import Any

from shim.generate import managed
from shim.node import compiler, launch_line
from shim.node.inventory import Account
from shim.shapes import Config
from shim.state import grants, stale

_FORGET_AFTER = 3600.0  # seconds; a create writes its grant before its container exists, so young grants stay
_WAITS = 2  # a file may be written while this waits for another, and systemd's path unit does not start it again then


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "refresh", help="compile configuration and CDI files for the next create", description=__doc__
    )
    command.add_argument("--quiet", action="store_true", help="print nothing when nothing is wrong")
    command.add_argument(
        "--remove",
        action="store_true",
        help="remove what it makes, before Chandler itself is removed: its CDI files that nobody changed, the "
        "inventory, the launcher's line",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns exit status 0 when all was read and stored, 1 when a file could not be used (stderr names it)."""
    account = Account(dict(os.environb))
    config, _ = compiler.read_config(account)
    if arguments.remove:
        return _remove(account, config, arguments.quiet)
    done, failures = ([], []) if account.rootless else managed.refresh(config, account.owners)
    for sentence in failures if arguments.quiet else done + failures:
        print(f"chandler: {sentence}", file=sys.stderr)
    for _ in range(_WAITS):
        wait = compiler.seconds_until_settled(account, time.time_ns())
        if wait <= 0:
            break
        time.sleep(wait)  # only a file that has not changed for two seconds counts as completely written
    inventory = compiler.refresh(account)
    forgotten = stale.prune(account.trusted_state_dir(config["state-dir"]), _FORGET_AFTER)
    problems = compiler.read_registry(account, config).problems
    for path, errors in problems.items():
        for error in errors:
            print(f"chandler: {path}: {error}", file=sys.stderr)
    if not arguments.quiet:
        devices = sum(len(inventory.picks(kind)) for kind in inventory.kinds())
        print(f"devices: {devices}, kinds: {len(inventory.kinds())}, old grants forgotten: {len(forgotten)}")
    return 1 if problems or failures else 0


def _remove(account: Account, config: Config, quiet: bool) -> int:
    """Removes what `refresh` makes.  Returns exit status 0 when nothing of ours is left, else 1."""
    done, left = ([], []) if account.rootless else managed.remove(config, account.owners)
    state_dir = account.trusted_state_dir(config["state-dir"])
    stale.prune(state_dir, 0.0)
    try:
        # a grant is in CHECKSUM-ID.json, and the checksum has eight digits
        containers = [name[9:].rpartition(".")[0] for name in sorted(os.listdir(grants.directory(state_dir)))]
    except FileNotFoundError:
        containers = []
    if containers:
        left.append(
            f"{', '.join(containers)} {'is' if len(containers) == 1 else 'are'} still there: "
            "an engine that calls chandler-runtime cannot end them without it"
        )
    for sentence in left if quiet else done + left:
        print(f"chandler: {sentence}", file=sys.stderr)
    if account.state_dir:
        shutil.rmtree(os.path.dirname(account.directory), ignore_errors=True)
    if launch_line.is_ours(account):
        launch_line.remove()
    return 1 if left else 0
