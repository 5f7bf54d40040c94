"""The `chandler` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import Any

from shim import paths
from shim.cli import bundle, cdi, configure, doctor, explain, leases, policy, ps, refresh
from shim.errors import ChandlerError
from shim.node import compiler
from shim.node.inventory import Account, Stale


class Parser(argparse.ArgumentParser):
    """A parser that accepts no abbreviated options, since a new option would change the meaning of an abbreviation.

    argparse makes the parsers of the commands with the same class.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line.

    Every command sets `run`, a function from the parsed arguments to the exit status.
    """
    top = Parser(prog="chandler", description="Equips containers with GPUs and CDI devices.")
    top.add_argument("--version", action="version", version=f"chandler {paths.VERSION}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (explain, policy, cdi, bundle, leases, ps, refresh, configure, doctor):
        module.add_parser(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command.  An error is one sentence on standard error and exit status 1."""
    arguments = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # JSON may hold a lone surrogate, which UTF-8 cannot encode
    try:
        try:
            status: int = arguments.run(arguments)
        except Stale:  # a part of the stored inventory is gone or damaged
            compiler.refresh(Account(dict(os.environb)))
            status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except ChandlerError as error:
        print(f"chandler: {error}", file=sys.stderr)
    except BrokenPipeError:
        # the reader closed the pipe: without this, Python would fail again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        print(f"chandler: {error.filename or ''}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
