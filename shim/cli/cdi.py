"""`chandler cdi`: what CDI files say, what is wrong with them, and what they would do to a container.

Each command takes the parsed arguments, returns the exit status, and raises ChandlerError or OSError.  Warnings go to
standard error, one sentence on each line.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
from typing import TYPE_CHECKING, Any, Callable

from shim import jsontext
from shim.cdi import devices as physical
from shim.cdi import spec, versions
from shim.cdi.decoder import MAX_SIZE
from shim.cdi.registry import Registry
from shim.cdi.resolve import resolve
from shim.cli import generate
from shim.edits import Edits
from shim.errors import BundleError, CdiError, ChandlerError, HostError
from shim.host import device_nodes, files
from shim.node import cdi_check, cdi_files, compiler
from shim.node.inventory import Account
from shim.oci import writer

if TYPE_CHECKING:
    from shim.cdi.devices import Key
    from shim.shapes import Document

    Arguments = argparse.Namespace
    Command = Callable[[Arguments], int]
    Rows = list[tuple[str, ...]]

MAX_CONFIG = 16 << 20  # bytes of a config.json


def add_parser(subparsers: Any) -> None:
    """Adds `cdi` and its commands.  Each sets `run`, a function from the parsed arguments to the exit status."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--spec-dir", action="append", metavar="DIR", help="a CDI directory, instead of those configured"
    )
    common.add_argument(
        "--format", choices=("text", "json"), default="text", help="the format of the output (default: text)"
    )
    cdi = subparsers.add_parser("cdi", help="CDI devices: list, check and inject them", description=__doc__)
    commands = cdi.add_subparsers(dest="cdi_command", metavar="COMMAND", required=True)
    for name, (command, words, arguments) in _COMMANDS.items():
        parser = commands.add_parser(name, parents=[common], help=words, description=words)
        for argument, options in arguments:
            parser.add_argument(argument, **options)
        parser.set_defaults(run=command)
    generate.add_parsers(commands)


def _warn(sentence: str) -> None:
    print(f"chandler: {sentence}", file=sys.stderr)


# --- commands -------------------------------------------------------------------------------------------------


def list_devices(args: Arguments) -> int:
    """Lists all devices, the file that defines each, the files that it shadows, and names for the same hardware."""
    registry = _registry(args)
    devices: list[Document] = []
    for kind, keys in _keys_by_kind(registry).items():
        aggregates = physical.aggregates(keys.values())
        for key, names in physical.groups(keys):
            for name in names:
                qualified = f"{kind}={name}"
                devices.append(
                    {
                        "name": qualified,
                        "file": registry.devices[qualified].path,
                        "physical": list(key),
                        "sameAs": [f"{kind}={other}" for other in names if other != name],
                        "aggregate": key in aggregates,
                        "shadows": registry.shadowed.get(qualified, []),
                    }
                )
    problems = _problems(registry)
    if args.format == "json":
        return _json({"devices": devices, "conflicts": registry.conflicts, "problems": problems})
    _table([("DEVICE", "FILE", "NOTE"), *((device["name"], device["file"], _note(device)) for device in devices)])
    for name, paths in registry.conflicts.items():
        _warn(f"{name} cannot be used: it is defined by {' and '.join(paths)}")
    _warn_of_problems(problems, registry)
    return 0


def _note(device: Document) -> str:
    notes = [
        "several devices" if device["aggregate"] else "",
        f"same as {', '.join(name.partition('=')[2] for name in device['sameAs'])}" if device["sameAs"] else "",
        f"shadows {', '.join(device['shadows'])}" if device["shadows"] else "",
    ]
    return "; ".join(note for note in notes if note)


def list_directories(args: Arguments) -> int:
    """Lists the CDI directories, from low to high priority, and the state of each."""
    directories = _read_directories(args)
    registry = Registry.build(directories)
    entries: list[Document] = []
    for priority, path in enumerate(registry.directories):
        valid = [file.path for file in registry.files if file.priority == priority]
        unusable = [bad for bad in registry.problems if bad not in valid and os.path.dirname(bad) == path]
        errors = [str(error) for error in registry.problems.get(path, [])]
        state = errors[0] if errors else "" if os.path.isdir(path) else "does not exist"
        entries.append({"path": path, "priority": priority, "files": valid, "unusable": unusable, "state": state})
    if args.format == "json":
        return _json({"directories": entries, "problems": _problems(registry)})
    rows = [
        (entry["path"], str(entry["priority"]), str(len(entry["files"])), str(len(entry["unusable"])), entry["state"])
        for entry in entries
    ]
    _table([("DIRECTORY", "PRIORITY", "VALID", "UNUSABLE", "NOTE"), *rows])
    _warn_of_problems(_problems(registry), registry)
    return 0


def show(args: Arguments) -> int:
    """Shows everything that one device does to a container, and which part of the file each edit comes from."""
    registry = _registry(args)
    edits = _resolve(registry, [args.name])
    file = registry.devices[args.name]
    kind, _, device = args.name.partition("=")
    keys = registry.device_keys(kind, device_nodes.lstat_device)
    same_hardware = [f"{kind}={name}" for name, key in keys.items() if key == keys[device] and name != device]
    stale = _stale(edits)
    if args.format == "json":
        shown = [dict(zip(("kind", "key", "value", "origin"), edit)) for edit in edits.items]
        return _json(
            {
                "name": args.name,
                "file": file.path,
                "physical": list(keys[device]),
                "sameAs": same_hardware,
                "edits": shown,
                "stale": stale,
            }
        )
    print(f"{args.name} from {file.path}")
    print(f"hardware: {', '.join(keys[device])}" + (f" (also {', '.join(same_hardware)})" if same_hardware else ""))
    _table([("EDIT", "OF", "VALUE", "FROM"), *(_edit_row(edit, file.path) for edit in edits.items)])
    for sentence in stale:
        _warn(sentence)
    return 0


def _edit_row(edit: Any, path: str) -> tuple[str, ...]:
    kind, key, value, origin = edit
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return kind, str(key), text, "the file" if origin == path else "the device"


def validate(args: Arguments) -> int:
    """Checks CDI files.  Prints every problem of each file, with its line or JSON path."""
    results = []
    for path in args.files:
        try:
            data = files.read(path, MAX_SIZE, follow=True)[0]
            problems = spec.problems(data, path)
        except (ChandlerError, OSError) as error:
            problems = [("", str(error) if isinstance(error, ChandlerError) else error.strerror or "cannot be read")]
        results.append((path, problems))
    if args.format == "json":
        _json(
            [
                {"file": path, "problems": [{"place": at, "problem": what} for at, what in problems]}
                for path, problems in results
            ]
        )
    else:
        for path, problems in results:
            for at, what in problems:
                print(": ".join(part for part in (path, at, what) if part))
            if not problems:
                print(f"{path}: valid")
    return 1 if any(problems for _, problems in results) else 0


def inject(args: Arguments) -> int:
    """Puts devices into a copy of a config.json, on standard output or in a file."""
    data, _ = files.read(args.config, MAX_CONFIG, follow=True)
    config = jsontext.loads(data)
    if not isinstance(config, dict):
        raise BundleError(f"{args.config} is not a JSON object")
    edits = device_nodes.complete(_resolve(_registry(args), args.devices))
    for sentence in _stale(edits):
        _warn(sentence)
    result = jsontext.dumps(writer.apply(config, edits, idmap=not _account().rootless)) + b"\n"
    if args.output is None:
        sys.stdout.buffer.write(result)
        sys.stdout.flush()
    else:
        files.replace(args.output, result, _mode(args.output))
    return 0


def _mode(path: str) -> int:
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return 0o644


def migrate(args: Arguments) -> int:
    """Prints the same file with another CDI version.  It prints JSON, which is YAML, too."""
    document = spec.parse(files.read(args.file, MAX_SIZE, follow=True)[0], args.file).document
    minimum, reason = versions.minimum(document)
    version = minimum if args.to is None else versions.normal(args.to)
    if version is None or versions.older(version, versions.FLOOR):
        raise CdiError(f'unknown CDI version "{args.to}"', f"known are {versions.FLOOR} to {versions.KNOWN[-1]}")
    if versions.older(version, minimum):
        raise CdiError(f"{args.file} cannot be of version {version}: {reason} needs {minimum}")
    return _json({**document, "cdiVersion": version})


_NAME = ("name", {"metavar": "NAME", "help": "a qualified name: vendor/class=device"})
_COMMANDS: dict[str, tuple[Command, str, tuple[tuple[str, Document], ...]]] = {
    "list": (list_devices, "list devices and the files that define them", ()),
    "dirs": (list_directories, "list the CDI directories", ()),
    "show": (show, "show what a device does to a container", (_NAME,)),
    "validate": (validate, "check CDI files", (("files", {"metavar": "FILE", "nargs": "+"}),)),
    "inject": (
        inject,
        "put devices into a config.json",
        (
            ("--config", {"metavar": "FILE", "required": True, "help": "the config.json; it is not changed"}),
            ("--output", {"metavar": "FILE", "help": "write the result here instead of to standard output"}),
            ("devices", {"metavar": "DEVICE", "nargs": "+"}),
        ),
    ),
    "migrate": (
        migrate,
        "declare another CDI version",
        (
            ("file", {"metavar": "FILE"}),
            ("--to", {"metavar": "VERSION", "help": "by default the lowest that the content needs"}),
        ),
    ),
}


# --- shared by the commands ------------------------------------------------------------------------------------------


def _account() -> Account:
    return Account(dict(os.environb))


def _read_directories(args: Arguments) -> list[Any]:
    account = _account()
    directories: list[str] | None = args.spec_dir
    if directories is None:
        directories = compiler.read_config(account)[0]["cdi.spec-dirs"]
    return list(cdi_files.read_spec_dirs([os.path.abspath(path) for path in directories], account.owners))


def _registry(args: Arguments) -> Registry:
    return Registry.build(_read_directories(args))


def _resolve(registry: Registry, names: list[str]) -> Edits:
    missing = [name for name in dict.fromkeys(names) if registry.lookup(name) is None]
    if missing:
        raise registry.diagnose(missing)
    return resolve(names, registry.lookup)


def _keys_by_kind(registry: Registry) -> dict[str, dict[str, Key]]:
    kinds = sorted({file.spec.kind for file in registry.files})
    return {kind: registry.device_keys(kind, device_nodes.lstat_device) for kind in kinds}


def _problems(registry: Registry) -> dict[str, list[str]]:
    return {path: [str(error) for error in errors] for path, errors in registry.problems.items()}


def _warn_of_problems(problems: dict[str, list[str]], registry: Registry) -> None:
    # The problems of valid files are conflicts, which the list shows by device.
    valid = {file.path for file in registry.files}
    for path, errors in problems.items():
        for error in errors if path not in valid else ():
            _warn(error if path in error else f"{path}: {error}")


def _stale(edits: Edits) -> list[str]:
    """A sentence for each path in the edits that this host does not have."""
    sentences = []
    for edit in edits.items:
        try:
            cdi_check.check_paths(device_nodes.complete(Edits([edit])))
        except HostError as error:
            sentences.append(str(error))
    return sentences


def _table(rows: Rows) -> None:
    """Prints rows in aligned columns.  The first row has the headings."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _json(value: Any) -> int:
    print(json.dumps(value, indent=2))
    return 0
