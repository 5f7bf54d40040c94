"""Options that say which engine calls, since a bundle alone does not, and what it would be taken for."""

from __future__ import annotations

import argparse
import os
from typing import Any, Dict

from shim.policy import caller as _caller
from shim.policy import engines


def add_options(command: argparse.ArgumentParser) -> None:
    """--engine and --root."""
    command.add_argument(
        "--engine",
        choices=sorted(engines.ENGINES),
        help="the engine that calls; otherwise it is known by --root and the bundle's path",
    )
    command.add_argument(
        "--root",
        metavar="DIR",
        help="the --root that the engine gives the runtime; otherwise the one that fits the bundle's path is taken",
    )


def caller(arguments: argparse.Namespace, path: str, document: Dict[str, Any], built: bool) -> _caller.Caller:
    """Who calls for the config.json at `path`; `built` as in shim.policy.caller."""
    if arguments.engine:
        return _caller.Caller(arguments.engine, "--engine says so")
    return _caller.of_call(arguments.root, os.path.dirname(os.path.abspath(path)), "", document, built)


def shown(who: _caller.Caller, config: Dict[str, Any]) -> Dict[str, Any]:
    """What there is to say of it."""
    return {
        "name": who.engine,
        "why": who.why,
        "identity": bool(who.believed(config)),
        "from_image": engines.ENGINES[who.engine][1],
    }


def line(engine: Dict[str, Any]) -> str:
    """The same in a line."""
    names = "its identity annotations are believed" if engine["identity"] else "no identity annotation is believed"
    return f"engine      {engine['name']} ({engine['why']}); {names}; from an image comes: {engine['from_image']}"
