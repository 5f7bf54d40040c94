"""Front end 4: the `chandler` command."""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import Any, List, Optional

from shim import paths
from shim.cli import bundle, cdi, configure, doctor, explain, leases, policy, ps, refresh
from shim.errors import ChandlerError
from shim.node import compiler
from shim.node.inventory import Place, Stale


class Parser(argparse.ArgumentParser):
    """Options are written out: an abbreviation would change its meaning when an option is added.  So are those of the commands,
    which argparse makes with the same class."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)


def parser() -> argparse.ArgumentParser:
    """The command line; every command sets `run`, a function from the parsed arguments to the exit status."""
    top = Parser(prog="chandler", description="Equips containers with GPUs and CDI devices.")
    top.add_argument("--version", action="version", version=f"chandler {paths.VERSION}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (explain, policy, cdi, bundle, leases, ps, refresh, configure, doctor):
        module.add_parser(commands)
    return top


def main(argv: Optional[List[str]] = None) -> int:
    """Runs one command; errors are one sentence on stderr and exit status 1."""
    arguments = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # JSON may hold half a character
    try:
        try:
            status: int = arguments.run(arguments)
        except Stale:  # a part of the stored inventory is gone or damaged
            compiler.refresh(Place(dict(os.environb)))
            status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except ChandlerError as error:
        print(f"chandler: {error}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on; nothing to say at the exit
    except OSError as error:
        print(f"chandler: {error.filename or ''}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
