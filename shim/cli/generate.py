"""`chandler cdi generate` and `chandler cdi diff`: CDI files for this host's devices, made without a vendor's tools."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from shim.cdi import spec
from shim.cdi.decoder import MAX_SIZE
from shim.errors import HostError
from shim.generate import cdi_file, generators, managed, nvml
from shim.generate.model import DEFAULT_STRATEGIES, MODES, STRATEGIES, Options
from shim.generate.tree import HostTree
from shim.gpu.vendors import VENDORS, by_name
from shim.host import files
from shim.node import compiler
from shim.node.inventory import Account

if TYPE_CHECKING:
    from shim.generate.model import Description
    from shim.shapes import Document


def add_parsers(commands: Any) -> None:
    """Adds both to the commands of `chandler cdi`."""
    parser = commands.add_parser(
        "generate", help="describe this host's devices in a CDI file", description=generate.__doc__
    )
    parser.add_argument(
        "--vendor",
        type=_vendor,
        choices=(*(vendor.name for vendor in VENDORS), "all"),
        default="all",
        help="whose devices (default: all that this host has)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write here instead of to standard output; a directory takes a file chandler-VENDOR.json for each vendor",
    )
    parser.add_argument(
        "--device-name-strategy",
        action="append",
        choices=STRATEGIES,
        metavar="STRATEGY",
        help=f"one of {', '.join(STRATEGIES)}; may be given again (default: {' and '.join(DEFAULT_STRATEGIES)})",
    )
    parser.add_argument("--driver-root", metavar="DIR", default="", help="where the driver is installed (default: /)")
    parser.add_argument(
        "--dev-root", metavar="DIR", help="the directory that holds the driver's dev (default: the driver root)"
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="auto",
        help="how to find NVIDIA's devices, or which of their other device classes (default: auto)",
    )
    parser.add_argument(
        "--format", choices=("json", "yaml"), default="json", help="the format of the file (default: json)"
    )
    parser.add_argument("--no-all", action="store_true", help="leave out the device that stands for all of them")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    parser.set_defaults(run=generate)
    parser = commands.add_parser(
        "diff", help="show what changed on this host since a CDI file was made", description=diff.__doc__
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="the format of the output (default: text)"
    )
    parser.set_defaults(run=diff)


def _vendor(text: str) -> str:
    """The name of a vendor for a name or alias of it.  Unknown text stays, so that argparse refuses it."""
    vendor = by_name(text)
    return text if vendor is None else vendor.name


def generate(arguments: argparse.Namespace) -> int:
    """Describe this host's GPUs and accelerators in a CDI file.  Nothing is written where there is none."""
    options = Options(
        arguments.driver_root,
        arguments.dev_root,
        arguments.device_name_strategy or DEFAULT_STRATEGIES,
        arguments.mode,
        not arguments.no_all,
        _hook(),
    )
    vendors = [vendor.name for vendor in VENDORS] if arguments.vendor == "all" else [arguments.vendor]
    if options.mode != "auto":
        if arguments.vendor not in ("all", "nvidia"):
            raise HostError(f"--mode {options.mode} is a mode of NVIDIA's devices", "leave --vendor out")
        vendors = ["nvidia"]
    results = [(vendor, *generators.describe(vendor, HostTree(), options, nvml.ask)) for vendor in vendors]
    for _, _, description in results:
        for note in description.notes:
            print(f"chandler: {note}", file=sys.stderr)
    described = [(vendor, file, description) for vendor, file, description in results if file is not None]
    if not described:
        looked = ", ".join(description.kind for _, _, description in results)
        raise HostError(f"this host has no device of kind {looked}; nothing was generated")
    targets = _targets(arguments.output, [vendor for vendor, _, _ in described])
    for (_, file, description), path in zip(described, targets):
        _deliver(path, cdi_file.render(file, arguments.format), file, description, arguments.dry_run)
    return 0


def _hook() -> str:
    """The hook program that the configuration names (cdi.hook).  Raises ConfigError or TrustError."""
    return str(compiler.read_config(Account(dict(os.environb)))[0]["cdi.hook"])


def _targets(output: str | None, vendors: list[str]) -> list[str]:
    """The path of each vendor's file, "" for standard output.  Raises HostError for several files and no directory."""
    if output is not None and (os.path.isdir(output) or output.endswith("/")):
        return [os.path.join(output, managed.file_name(vendor)) for vendor in vendors]
    if len(vendors) > 1:
        raise HostError(
            f"this host has devices of {', '.join(vendors)}, and one CDI file describes only one kind",
            "choose with --vendor, or give --output a directory",
        )
    return [output or ""]


def _deliver(path: str, data: bytes, file: Document, description: Description, dry: bool) -> None:
    """Writes a CDI file, or prints it for the path "", and says on standard error what was done."""
    if not path:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    try:
        same = files.read(path, MAX_SIZE, follow=True)[0] == data
    except OSError:
        same = False
    number = len(description.devices)
    count = f"{number} device{'s' if number != 1 else ''} of {description.kind}, CDI {file['cdiVersion']}"
    if same:
        words = "is up to date"
    elif dry:
        words = "would be written"
    else:
        managed.write(path, data)
        words = "written"
    print(f"{path}: {words} ({count})", file=sys.stderr)


def diff(arguments: argparse.Namespace) -> int:
    """Show what changed on this host since a CDI file was made: exit status 0 when nothing did, 1 otherwise.

    A file from another tool is compared with what Chandler would generate, so it shows differences in style, too.
    """
    data, _ = files.read(arguments.file, MAX_SIZE, follow=True)
    before = spec.parse(data, arguments.file).document
    ours = managed.read(arguments.file, data)
    options = ours.options(_hook()) if ours else Options(strategies=_strategies(before), hook=_hook())
    after, _ = generators.describe(generators.vendor_name(before["kind"]), HostTree(), options, nvml.ask)
    lines = managed.differences(before, after or {"kind": before["kind"]})
    if after is None:
        lines.insert(0, f"this host has no device of kind {before['kind']} at present")
    edited = ours is not None and not cdi_file.is_untouched(before)
    if arguments.format == "json":
        print(
            json.dumps({"file": arguments.file, "ours": ours is not None, "edited": edited, "changes": lines}, indent=2)
        )
        return 1 if lines else 0
    if edited:
        print(f"chandler: {arguments.file} was changed since Chandler made it", file=sys.stderr)
    for line in lines or ["nothing changed"]:
        print(line)
    return 1 if lines else 0


def _strategies(document: Document) -> tuple[str, ...]:
    """The naming strategies that another tool's file seems to follow, so that the comparison uses the same names."""
    names = [str(device["name"]) for device in document["devices"]]
    follows = {
        "uuid": any(name.startswith(("GPU-", "MIG-")) for name in names),
        "type-index": any(name.startswith(("gpu", "mig")) for name in names),
        "index": any(name[:1].isdigit() or name.startswith(("card", "accel")) for name in names),
    }
    return tuple(strategy for strategy in STRATEGIES if follows[strategy]) or DEFAULT_STRATEGIES
