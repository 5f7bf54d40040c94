"""`chandler doctor`: checks what this host has for containers with GPUs, and prints a remedy for each problem."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import Any

from shim.doctor import engines, kernel, node, runtimes, state
from shim.doctor.model import Check, HostReader, Subject
from shim.node.inventory import Account

# Every check, in the order in which they are printed.
CHECKS: tuple[Callable[[Subject], Check], ...] = (
    node.configuration,
    node.caller,
    kernel.control_groups,
    runtimes.installed_runtimes,
    node.cdi_files,
    kernel.drivers,
    engines.nri,
    engines.configured_engines,
    state.state_directory,
    state.leases,
)


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser("doctor", help="check this host, with a remedy for each problem", description=__doc__)
    command.add_argument("--format", choices=("text", "json"), default="text")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints every check.  Returns exit status 0 when nothing is wrong, else 1."""
    checks = examine(HostReader(), Account(dict(os.environb)))
    problems = sum(len(check.problems) for check in checks)
    if arguments.format == "json":
        print(
            json.dumps(
                {
                    "checks": {check.name: check.data for check in checks},
                    "problems": [{"check": check.name, **problem} for check in checks for problem in check.problems],
                },
                indent=2,
            )
        )
    else:
        print("\n".join(_lines(checks)))
    return 1 if problems else 0


def _lines(checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.name:<{width}}  {check.text}")
        for problem in check.problems:
            lines += [f"{'':<{width}}  problem: {problem['problem']}", f"{'':<{width}}  remedy:  {problem['remedy']}"]
    problems = sum(len(check.problems) for check in checks)
    total = f"{problems} problem{'' if problems == 1 else 's'}" if problems else "nothing is wrong"
    return [*lines, "", total]


def examine(host: HostReader, account: Account) -> list[Check]:
    """Makes every check."""
    subject = Subject(host, account)
    return [check(subject) for check in CHECKS]
