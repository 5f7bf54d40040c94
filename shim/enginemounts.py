"""GPUs that an engine mounts into a container without root, where no control group keeps devices apart.

There a bind mount of a device node, or of a directory with nodes in it, gives the container what the file's mode
gives its caller: rootless podman writes `--device` and `--privileged` as such mounts.  Loaded only when config.json
mounts something from /dev and asks for GPUs.
"""

from __future__ import annotations

import posix

from shim import errors, host
from shim.edits import DEVICE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Iterable, List

    from shim.inventory import Inventory

_TYPES = {0o020000: "c", 0o060000: "b"}
_FORMAT = 0o170000


def check(sources: List[str], others: Dict[str, str], inventory: Inventory, kinds: Iterable[str], source: str) -> None:
    """Raises RequestError when a bind mount's source (`sources`, paths of the host) brings one of `others`, the GPUs
    (device number to name) that the container was not granted."""
    if posix.geteuid() == 0 and host.user_namespace() == host.INITIAL_NAMESPACE:
        return  # the device rules decide, and shim.engine has looked at those
    nodes = _nodes(inventory, kinds)
    for path in sources:
        try:
            found = posix.stat(path)
        except (OSError, ValueError):
            continue  # the runtime will say so
        kind = _TYPES.get(found.st_mode & _FORMAT)
        number = f"{kind}{posix.major(found.st_rdev)}:{posix.minor(found.st_rdev)}" if kind else ""
        below = path.rstrip("/") + "/"
        named = others.get(number) or next((others[each] for each, node in nodes if each in others and node.startswith(below)), None)
        if named is not None:
            raise errors.RequestError(f"{source}: resources.gpu: the engine mounts {path}, and with it {named}, which is not granted",
                                      "ask for GPUs in one way alone")


def _nodes(inventory: Inventory, kinds: Iterable[str]) -> List[tuple[str, str]]:
    """(device number, path on the host) of the nodes of all GPUs of some kinds."""
    paths = []
    for kind in kinds:
        for pick in inventory.picks(kind):
            _, _, edits = inventory.lookup(f"{kind}={pick}") or ("", (), ())
            paths += [node.get("hostPath") or path for each, path, node, _ in edits if each == DEVICE]
    found = []
    for path in paths:
        try:
            kind, major, minor, _ = host.lstat_device(path)
        except errors.HostError:
            continue
        found.append((f"{kind}{major}:{minor}", path))
    return found
