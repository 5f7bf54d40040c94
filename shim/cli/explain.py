"""`chandler explain`: shows what a create would do with a bundle, without doing it."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from typing import TYPE_CHECKING, Any

from shim import engine, jsontext
from shim.cli import engine_options
from shim.edits import (
    ANNOTATION,
    CAPABILITY,
    DEVICE,
    ENV,
    GID,
    HOOK,
    HUGEPAGES,
    LINUX,
    MOUNT,
    NAMESPACE,
    NET_DEVICE,
    PROCESS,
    RDT,
    RESOURCE,
    RLIMIT,
)
from shim.errors import BundleError, ChandlerError, ChangedError
from shim.host.secrets import HIDDEN, Hidden
from shim.node import compiler
from shim.node.inventory import Account, Stale
from shim.oci import config_file
from shim.sharing import setup
from shim.state.ledger import Ledger

if TYPE_CHECKING:
    from shim.edits import Edit
    from shim.policy.caller import CallFacts
    from shim.shapes import Document

_NOTES = (
    "The environment is that of the container's own process; processes started later by exec get the engine's.",
    "A later update by the engine replaces cpu, memory and cpuset limits; devices stay.",
)


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser("explain", help="show what a create would do with a bundle", description=__doc__)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", metavar="DIR", help="the bundle")
    source.add_argument("--config", metavar="FILE", help="its config.json")
    command.add_argument(
        "--handler",
        default="chandler-runtime",
        metavar="NAME",
        help="how the engine calls the runtime, for the policy's rules",
    )
    engine_options.add_options(command)
    command.add_argument("--format", choices=("text", "json"), default="text")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns exit status 0 when the create would go ahead.  Raises the ChandlerError that would refuse it."""
    path = arguments.config or os.path.join(arguments.bundle, "config.json")
    account = Account(dict(os.environb))
    inventory = compiler.load(account)
    if not config_file.may_ask(path, engine.request_texts(inventory.config)):
        os.stat(path)  # raises for a file that does not exist
        return _show_nothing(arguments.format)
    config_json = config_file.ConfigJson(path, engine.mark(inventory.config))
    try:
        document = jsontext.loads(config_json.engine_bytes)
    except ChandlerError as error:
        raise BundleError(f"{path}: {error.what}") from None
    if type(document) is not dict:
        raise BundleError(f"{path} is not an object")
    leases = None
    if inventory.config["gpu.allocator"] == "leases":
        leases = Ledger(account.trusted_state_dir(inventory.config["state-dir"]), account.rootless).read()
    caller = engine_options.caller(arguments, path, document, config_json.built(document))
    call_facts: CallFacts = {
        "caller": caller,
        "id": "ID",
        "bundle": os.path.dirname(os.path.abspath(path)),
        "handler": arguments.handler,
        "rootless": account.rootless,
    }
    try:
        planned = engine.plan(document, inventory, held=leases, call_facts=call_facts)
    except (Stale, ChangedError):
        # the inventory lost a part while it was read, or a device has changed since it was compiled
        inventory = compiler.refresh(account)
        planned = engine.plan(document, inventory, held=leases, call_facts=call_facts)
    if planned is None:
        return _show_nothing(arguments.format)
    if planned.sharing is not None:
        planned.add(setup.edits(planned.sharing, account.trusted_state_dir(inventory.config["state-dir"])))
    edits = planned.edits.with_values(map(_without_secret, planned.edits.items))
    after = engine.equip(document, edits, account.rootless, call_facts["bundle"])
    shown = {
        "engine": engine_options.caller_facts(caller, inventory.config),
        "source": planned.request.source,
        "request": _plain(planned.request.document),
        "devices": [{"name": name, "physical": inventory.key(name)} for name in planned.names],
        "edits": [
            {"kind": kind, "what": _words(kind, key, value), "value": _plain(value), "origin": origin}
            for kind, key, value, origin in edits.items
        ],
        "diff": _diff(document, after, path),
        "notes": list(_NOTES),
    }
    print(json.dumps(shown, indent=2) if arguments.format == "json" else _text(shown))
    return 0


def _show_nothing(form: str) -> int:
    print(
        json.dumps(
            {"engine": None, "source": None, "request": None, "devices": [], "edits": [], "diff": "", "notes": []}
        )
        if form == "json"
        else "nothing is asked for: the create goes to the runtime as it is"
    )
    return 0


def _without_secret(edit: Edit) -> Edit:
    """An edit with its value replaced when that is secret."""
    return (*edit[:2], HIDDEN, edit[3]) if isinstance(edit[2], Hidden) else edit


def _plain(value: Any) -> Any:
    """A value as plain JSON for people; numbers that are not integers as they were written."""
    return json.loads(jsontext.dumps(value))


def _words(kind: str, key: Any, value: Any) -> str:
    """Describes one edit in a few words."""
    words: Document = {
        ENV: lambda: f"{key}={value}",
        DEVICE: lambda: (
            f"{key} ({value['type']} {value.get('major', 0)}:{value.get('minor', 0)}, "
            f"{value.get('permissions') or 'rwm'})"
        ),
        NET_DEVICE: lambda: f"{key} as {value}",
        MOUNT: lambda: f"{value.get('source', '')} on {key} ({','.join(value.get('options', []))})",
        HOOK: lambda: f"{key}: {' '.join([value['path'], *value.get('args', [])[1:]])}",
        RDT: lambda: json.dumps(value),
        GID: lambda: f"group {key}",
        RESOURCE: lambda: f"{'.'.join(key)} = {value}",
        ANNOTATION: lambda: f"{key} = {value}",
        CAPABILITY: lambda: f"{key}: {' '.join(value) or 'none'}",
        RLIMIT: lambda: f"{key} {value['soft']} to {value['hard']}",
        NAMESPACE: lambda: f"{key}: the host's" if value is None else f"{key}: {value or 'its own'}",
        HUGEPAGES: lambda: f"{key} pages: {value} bytes",
    }
    if kind in words:
        return str(words[kind]())
    name = ".".join(part for part in ("" if kind in (PROCESS, LINUX) else kind, key) if part)
    return (
        f"{name} is taken away"
        if value is None
        else f"{name} = {value if isinstance(value, str) else json.dumps(value)}"
    )


def _diff(before: Any, after: Any, path: str) -> str:
    old, new = (json.dumps(_plain(document), indent=2).splitlines() for document in (before, after))
    return "\n".join(difflib.unified_diff(old, new, path, path + " (equipped)", n=2, lineterm=""))


def _text(shown: Document) -> str:
    lines: list[str] = [
        engine_options.caller_line(shown["engine"]),
        f"asked by    {shown['source']}",
        f"asked for   {json.dumps(shown['request'])}",
    ]
    for device in shown["devices"]:
        lines.append(f"granted     {device['name']}  ({', '.join(device['physical'])})")
    lines += ["", "edits"]
    origin = ""
    for edit in shown["edits"]:
        if edit["origin"] != origin:
            origin = edit["origin"]
            lines.append(f"  from {origin}")
        lines.append(f"    {edit['kind']:<14}{edit['what']}")
    lines += ["", shown["diff"], "", *("note: " + note for note in shown["notes"])]
    return "\n".join(lines)
