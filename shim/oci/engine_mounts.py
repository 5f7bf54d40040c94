"""GPUs that an engine mounts into a container without root, where no control group keeps devices apart.

There a bind mount of a device node, or of a directory with nodes in it, gives the container what the file's mode
gives its caller: rootless podman writes `--device` and `--privileged` as such mounts.  Loaded only when config.json
of such a container has bind mounts, and asks for GPUs.
"""

from __future__ import annotations

import os

from shim import errors
from shim.edits import DEVICE
from shim.host import device_nodes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Iterable, Iterator, List

    from shim.node.inventory import Inventory

_MAX_ENTRIES = 4096  # of a directory that are looked at


def check(
    sources: List[str], others: Dict[str, str], inventory: Inventory, kinds: Iterable[str], bundle: str, source: str
) -> None:
    """Raises RequestError when a bind mount's source (`sources`, paths of the host, or below `bundle`) brings one of
    `others`, the GPUs (device number to name) that the container was not granted."""
    nodes = _nodes(inventory, kinds)
    for path in sources:
        real = os.path.realpath(os.path.join(bundle, path))
        below = real.rstrip("/") + "/"
        numbers = [number for number, node in nodes if node.startswith(below)]
        numbers += map(_number, (real, *_entries(real)))
        named = next((others[number] for number in numbers if number in others), None)
        if named is not None:
            raise errors.RequestError(
                f"{source}: resources.gpu: the engine mounts {path}, and with it {named}, which is not granted",
                "ask for GPUs in one way alone",
            )


def _entries(directory: str) -> Iterator[str]:
    """What is directly in a directory: nodes there need not be those that the inventory knows by another path."""
    try:
        names = os.listdir(directory)
    except OSError:
        return
    yield from (os.path.join(directory, name) for name in names[:_MAX_ENTRIES])


def _number(path: str) -> str:
    """The number of a device node (c195:0), '' where there is none."""
    try:
        kind, major, minor, _ = device_nodes.lstat_device(path)
    except errors.HostError:
        return ""
    return f"{kind}{major}:{minor}"


def _nodes(inventory: Inventory, kinds: Iterable[str]) -> List[tuple[str, str]]:
    """(device number, path on the host, links followed) of the nodes of all GPUs of some kinds."""
    paths = []
    for kind in kinds:
        for pick in inventory.picks(kind):
            _, _, edits = inventory.lookup(f"{kind}={pick}") or ("", (), ())
            paths += [node.get("hostPath") or path for each, path, node, _ in edits if each == DEVICE]
    return [(number, path) for path in map(os.path.realpath, paths) if (number := _number(path))]
