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
from shim.state import records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_RESOURCES = 4 << 20  # bytes of the resources' JSON text


def with_devices(
    rest: list[str], first: int, state_dir: str, root: str, container: str, spelled: str = ""
) -> list[str]:
    """The runtime's arguments for an update: `rest`, or `rest` with the changed resources on standard input.

    `first`: the index of the verb in `rest`; `root`: the runtime's root directory; `spelled`: that directory as the
    command line gives it.  Resources that cannot be opened are left to the runtime, which reports them.
    Raises OSError, and HostError for resources that are too large: the runtime would apply them without our rules.
    """
    index, start = _option(rest, first + 1)
    record = records.read(state_dir, root, container, spelled) if index else None
    our_rules = record.get("rules", []) if record is not None else []
    data = _read(rest[index][start:]) if our_rules else None
    if data is None:
        return rest
    # The runtime inherits the changed resources as its standard input, and reads them through `--resources -`.
    descriptor = posix.memfd_create("resources", 0)
    files.write_all(descriptor, _with_rules(data, our_rules))
    posix.lseek(descriptor, 0, 0)
    posix.dup2(descriptor, 0)
    posix.close(descriptor)
    return [*rest[:index], rest[index][:start] + "-", *rest[index + 1 :]]


def _option(words: list[str], at: int) -> tuple[int, int]:
    """Where the value of --resources is: (index of its word, offset in that word); (0, 0) without that option.

    `at`: the index of the first word after the verb.
    """
    while at < len(words):
        word = words[at]
        if word in ("--resources", "-r"):
            return (at + 1, 0) if at + 1 < len(words) else (0, 0)
        if word.startswith("--resources="):
            return at, len("--resources=")
        if word.startswith("-r"):
            return at, 2
        at += 1
    return 0, 0


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
