"""Refuses GPUs that an engine mounts into a container without root, where no control group keeps devices apart.

In such a container, a bind mount of a device node, or of a directory with device nodes, lets the container do what the
mode of the node lets the caller do.  Rootless podman turns `--device` and `--privileged` into such mounts.
Loaded only when config.json of such a container has bind mounts and the container asks for GPUs; and for a container of
root's in a user namespace for which the engine has written no device rules.
"""

from __future__ import annotations

import os

from shim import errors
from shim.edits import DEVICE, DEVICE_RULE, Edits
from shim.host import device_nodes
from shim.oci import reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shim.node.inventory import Inventory
    from shim.shapes import Document

_MAX_ENTRIES = 4096  # entries of one directory that are checked


def check(
    sources: list[str], ungranted: dict[str, str], inventory: Inventory, kinds: Iterable[str], bundle: str, source: str
) -> None:
    """Raises RequestError when a bind mount brings a GPU that the container was not granted.

    `sources`: the sources of the bind mounts, absolute or relative to `bundle`; `ungranted`: the GPUs that were not
    granted, device number (c195:0) to name; `kinds`: the CDI kinds of GPUs; `source`: where the request came from, for
    the error.
    """
    nodes = _gpu_nodes(inventory, kinds)
    for path in sources:
        real = os.path.realpath(os.path.join(bundle, path))
        below = real.rstrip("/") + "/"
        numbers = [number for number, node in nodes if node.startswith(below)]
        numbers += map(_device_number, (real, *_entries(real)))
        name = next((ungranted[number] for number in numbers if number in ungranted), None)
        if name is not None:
            raise errors.RequestError(
                f"{source}: resources.gpu: the engine mounts {path}, and with it {name}, which is not granted",
                "ask for GPUs in one way alone",
            )


def closing_rules(document: Document, bundle: str, source: str) -> tuple[Edits, list[str]]:
    """Device rules that allow only the devices that the engine gives, and the bind mounts among these.

    podman writes no device rules for a user namespace, since no container can make a device node there.  crun and youki
    then let the container open every device, also by a node that its image has.  `source`: where the request came from.
    """
    sources = reader.bind_sources(document)
    numbers = {path: _device_number(os.path.realpath(os.path.join(bundle, path))) for path in sources}
    bound = {path: number for path, number in numbers.items() if number}
    rules: list[Document] = [{"allow": False, "access": "rwm"}]
    for number in dict.fromkeys([*reader.device_numbers(document), *bound.values()]):
        major, _, minor = number[1:].partition(":")
        if number[0] in "bc" and major.isdecimal() and minor.isdecimal():
            rules.append({"allow": True, "type": number[0], "major": int(major), "minor": int(minor), "access": "rwm"})
    origin = f"{source}: the engine has no rule that denies devices"
    return Edits([(DEVICE_RULE, str(index), rule, origin) for index, rule in enumerate(rules)]), list(bound)


def _entries(directory: str) -> Iterator[str]:
    """The paths of a directory's entries.  A GPU may have a node there besides the one that the inventory knows."""
    try:
        names = os.listdir(directory)
    except OSError:
        return
    yield from (os.path.join(directory, name) for name in names[:_MAX_ENTRIES])


def _device_number(path: str) -> str:
    """The number of a device node (c195:0); '' for anything else."""
    try:
        kind, major, minor, _ = device_nodes.lstat_device(path)
    except errors.HostError:
        return ""
    return f"{kind}{major}:{minor}"


def _gpu_nodes(inventory: Inventory, kinds: Iterable[str]) -> list[tuple[str, str]]:
    """The device nodes of all GPUs of these kinds, as (device number, path on the host with links followed)."""
    paths = []
    for kind in kinds:
        for pick in inventory.picks(kind):
            _, _, edits = inventory.lookup(f"{kind}={pick}") or ("", (), ())
            paths += [node.get("hostPath") or path for edit_kind, path, node, _ in edits if edit_kind == DEVICE]
    return [(number, path) for path in map(os.path.realpath, paths) if (number := _device_number(path))]
