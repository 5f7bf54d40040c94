"""An engine's update keeps the devices that Chandler gave.

podman, and containerd for Kubernetes, hand a runtime the container's whole resources anew, as they themselves know
them. crun and youki then set the control group's device rules to those, and so take away what is ours; runc leaves
devices alone.  So the rules that we gave, as the grant record has them, are added to such a list, too.  (config.json
itself is not asked: podman writes it anew at an update.)
"""

from __future__ import annotations

import posix

from shim import jsontext
from shim.errors import ChandlerError
from shim.host import files
from shim.state import records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List, Optional, Tuple

MAX_RESOURCES = 4 << 20  # bytes


def with_devices(
    rest: List[str], first: int, state_dir: str, root: str, container: str, spelled: str = ""
) -> List[str]:
    """The arguments for the runtime, `rest` as it is or with new resources on standard input; `first`: the verb's
    place; `spelled`: the root as it was given.

    What cannot be read is the runtime's to complain of.  Raises OSError.
    """
    place, start = _option(rest, first + 1)
    record = records.read(state_dir, root, container, spelled) if place else None
    ours = record.get("rules", []) if record is not None else []
    data = _read(rest[place][start:]) if ours else None
    if data is None:
        return rest
    descriptor = posix.memfd_create("resources", 0)
    files.write_all(descriptor, _joined(data, ours))
    posix.lseek(descriptor, 0, 0)
    posix.dup2(descriptor, 0)
    posix.close(descriptor)
    return [*rest[:place], rest[place][:start] + "-", *rest[place + 1 :]]


def _option(words: List[str], at: int) -> Tuple[int, int]:
    """The place of the value of --resources among the words, and where in that word it begins; (0, 0) when it is not
    there."""
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


def _read(source: str) -> Optional[bytes]:
    try:
        if source == "-":
            return files.read_all(0, 65535, MAX_RESOURCES, "standard input")
        return files.read(source, MAX_RESOURCES, follow=True)[0]
    except (OSError, ChandlerError):
        return None


def _joined(data: bytes, ours: List[Any]) -> bytes:
    """The same resources; a list of device rules in them has ours at its end."""
    try:
        resources = jsontext.loads(data)
    except ChandlerError:
        return data
    theirs = resources.get("devices") if isinstance(resources, dict) else None
    if not isinstance(theirs, list) or not theirs:
        return data
    resources["devices"] = [*theirs, *(rule for rule in ours if rule not in theirs)]
    return jsontext.dumps(resources)
