"""Keeps the devices that Chandler gave a container when an engine updates the container's resources.

For an update, podman, and containerd for Kubernetes, pass the container's whole resources to the runtime, as the engine
knows them: without our device rules.  crun and youki then replace the control group's device rules by those, which
takes our devices away; runc leaves device rules alone.  So this module adds the rules that we gave to such a list.  It
reads them from the grant record, not from config.json, which podman writes again at an update.
"""

from __future__ import annotations

import posix

from shim import jsontext
from shim.errors import ChandlerError
from shim.host import files
from shim.runtime import args as _args
from shim.state import records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_RESOURCES = 4 << 20  # bytes of the resources' JSON text
_RESOURCES = frozenset(("resources", "r"))


def with_devices(
    rest: list[str], call: _args.Invocation, kind: str, state_dir: str, root: str, container: str
) -> list[str]:
    """The runtime's arguments for an update: `rest`, or `rest` with the changed resources on standard input.

    `call`: what `rest` says to the runtime of this kind; `root`: the runtime's root directory.  Resources that cannot
    be opened are left to the runtime, which reports them.
    Raises OSError, and HostError for resources that are too large: the runtime would apply them without our rules.
    """
    options = _args.options_of(kind, _args.OPTIONS[kind]["update"])
    given, arguments, certain = _args.READERS[kind](rest[call.index + 1 :], options)
    sources = [value for name, value in given if name in _RESOURCES]
    record = records.read(state_dir, root, container, call.root) if sources and certain else None
    our_rules = record.get("rules", []) if record is not None else []
    # crun takes the last one; youki refuses a second one
    data = _read(sources[-1]) if our_rules and (len(sources) == 1 or kind == "crun") else None
    if data is None:
        return rest
    # The runtime inherits the changed resources as its standard input, and reads them through `--resources -`.
    descriptor = posix.memfd_create("resources", 0)
    files.write_all(descriptor, _with_rules(data, our_rules))
    posix.lseek(descriptor, 0, 0)
    posix.dup2(descriptor, 0)
    posix.close(descriptor)
    others = [_word(name, value, options[name]) for name, value in given if name not in _RESOURCES]
    end = ["--"] if arguments and arguments[0][:1] == "-" else []
    return [*rest[: call.index + 1], *others, "--resources=-", *end, *arguments]


def _word(name: str, value: str, takes: str) -> str:
    """An option as one word.  Those of one letter, but -r, have no value."""
    return f"-{name}" if len(name) == 1 else f"--{name}={value}" if takes else f"--{name}"


def _read(source: str) -> bytes | None:
    """The bytes of a file, or of standard input for "-"; None when they cannot be read.  Raises HostError.

    The file may be a pipe, too: the runtime gets what was read from it.
    """
    try:
        descriptor = 0 if source == "-" else posix.open(source, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NOCTTY)
        try:
            data = files.read_all(descriptor, 0, MAX_RESOURCES, "standard input" if source == "-" else source)
        finally:
            if descriptor:
                posix.close(descriptor)
    except (OSError, ValueError):
        return None
    return data


def _with_rules(data: bytes, our_rules: list[Any]) -> bytes:
    """The resources with our rules beside their device rules; unchanged where they have no device rules."""
    try:
        resources = jsontext.loads(data)
    except ChandlerError:
        return data
    engine_rules = resources.get("devices") if isinstance(resources, dict) else None
    if not isinstance(engine_rules, list) or not engine_rules:
        return data
    added = [rule for rule in our_rules if rule not in engine_rules]
    # A rule that denies everything cancels those before it.
    denials = [rule for rule in added if not rule["allow"]]
    resources["devices"] = [*denials, *engine_rules, *(rule for rule in added if rule["allow"])]
    return jsontext.dumps(resources)
