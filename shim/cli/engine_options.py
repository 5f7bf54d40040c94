"""Options that name the calling engine, for commands that see only a bundle, and what Chandler knows of the engine."""

from __future__ import annotations

import argparse
import os

from shim.policy import caller as _caller
from shim.policy import engines
from shim.shapes import Config, Document


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds --engine and --root."""
    command.add_argument(
        "--engine",
        choices=sorted(engines.ENGINES),
        help="the engine that calls (default: as recognised by --root and the bundle's path)",
    )
    command.add_argument(
        "--root",
        metavar="DIR",
        help="the --root that the engine gives the runtime (default: the one that fits the bundle's path)",
    )


def caller(arguments: argparse.Namespace, path: str, document: Document, built: bool) -> _caller.Caller:
    """The caller that a create with the config.json at `path` would have.  `built` is as in shim.policy.caller."""
    if arguments.engine:
        return _caller.Caller(arguments.engine, "--engine says so")
    return _caller.recognise(arguments.root, os.path.dirname(os.path.abspath(path)), "", document, built)


def caller_facts(who: _caller.Caller, config: Config) -> Document:
    """What Chandler knows of a caller, for JSON: its name and the reason, and whether its identity is believed."""
    return {
        "name": who.engine,
        "why": who.why,
        "identity": bool(who.believed_engine(config)),
        "from_image": engines.ENGINES[who.engine][1],
    }


def caller_line(engine: Document) -> str:
    """The result of `caller_facts` in one line."""
    names = "its identity annotations are believed" if engine["identity"] else "no identity annotation is believed"
    return f"engine      {engine['name']} ({engine['why']}); {names}; taken from the image: {engine['from_image']}"
