"""Describes AMD's GPUs and their partitions, from amdgpu's sysfs and the topology of KFD.  Pure.

Source: AMD Container Toolkit; Linux drivers/gpu/drm/amd/amdkfd/kfd_topology.c for the properties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.generate import pci
from shim.generate.model import Description, Device, merged, node

if TYPE_CHECKING:
    from shim.generate.model import Options
    from shim.generate.tree import HostTree
    from shim.gpu.vendors import Vendor

    # render minor -> (domain, location, KFD node, unique id)
    Topology = dict[int, tuple[int, int, int, int]]

_DRIVER = "/sys/module/amdgpu/drivers"
_PLATFORM = "/sys/devices/platform"
NODES = "/sys/class/kfd/kfd/topology/nodes"
_WANTED = ("drm_render_minor", "domain", "location_id", "unique_id")


def gpus(vendor: Vendor, tree: HostTree, options: Options) -> Description:
    """Finds every GPU or partition that the compute driver (KFD) knows, and numbers them by PCI address from 0 on.

    The partitions of one GPU follow one another.
    """
    empty = Description(vendor.kind, [], watch=["/dev/dri", "/dev/kfd", "/sys/module/amdgpu"])
    if not tree.names(_DRIVER):
        return empty
    known_to_kfd = topology(tree)
    candidates = [
        (f"{_DRIVER}/pci:amdgpu/{bdf}", bdf) for bdf in filter(pci.is_address, tree.names(_DRIVER + "/pci:amdgpu"))
    ]
    # The first partition of a GPU is the PCI device itself, the others are platform devices.
    candidates += [(f"{_PLATFORM}/{name}", "") for name in pci.numbered(tree.names(_PLATFORM), "amdgpu_xcp_")]
    in_topology: list[tuple[tuple[int, int, int, int], str, str, str]] = []
    notes: list[str] = []
    for directory, bdf in candidates:
        renders = pci.numbered(tree.names(directory + "/drm"), "renderD")
        if not renders:
            continue
        minor = pci.number(renders[0], "renderD")
        if minor in known_to_kfd:
            in_topology.append((known_to_kfd[minor], directory, bdf, renders[0]))
        elif bdf:
            notes.append(f"the GPU at {bdf} ({renders[0]}) is left out: the compute driver (KFD) does not know it")
    control = node(tree, options, "/dev/kfd")
    if in_topology and control is None:
        notes.append("nothing is generated for AMD: /dev/kfd is missing, and no GPU computes without it")
        in_topology = []
    in_topology.sort(key=lambda item: item[0])
    partitions: dict[tuple[int, int], int] = {}
    for entry, *_ in in_topology:
        partitions[entry[:2]] = partitions.get(entry[:2], 0) + 1
    devices: list[Device] = []
    for index, (entry, directory, bdf, render) in enumerate(in_topology):
        edits, missing = pci.drm(tree, options, directory, bdf)
        if missing:
            notes.append(f"{', '.join(missing)} of GPU {index} is not in /dev")
        unpartitioned = partitions[entry[:2]] == 1
        # The partitions of a GPU share its unique id, so it cannot name one of them.
        names = {
            "index": str(index),
            "type-index": f"gpu{index}",
            "uuid": f"GPU-{entry[3]:016x}" if unpartitioned and entry[3] else "",
        }
        layout = f"{index} {location(entry)} {render}" + ("" if unpartitioned else " partition")
        if edits.get("deviceNodes"):
            devices.append(Device(names, edits, layout))
    return Description(
        vendor.kind, devices, merged(control or {}), tree.text("/sys/module/amdgpu/version"), notes, empty.watch
    )


def location(entry: tuple[int, int, int, int]) -> str:
    """The PCI address of an entry of `topology`.  KFD's location_id holds the bus, device and function."""
    domain, where = entry[:2]
    return f"{domain:04x}:{where >> 8 & 0xFF:02x}:{where >> 3 & 0x1F:02x}.{where & 7}"


def topology(tree: HostTree) -> Topology:
    """The GPUs and partitions that KFD knows, by render minor."""
    by_minor: Topology = {}
    for name in pci.numbered(tree.names(NODES), ""):
        values: dict[str, int] = {}
        for line in tree.text(f"{NODES}/{name}/properties").split("\n"):
            key, _, value = line.partition(" ")
            if key in _WANTED and pci.natural_number(value) >= 0:
                values[key] = pci.natural_number(value)
        minor = values.get("drm_render_minor", 0)
        if minor > 0:  # a CPU has 0
            by_minor[minor] = (
                values.get("domain", 0),
                values.get("location_id", 0),
                int(name),
                values.get("unique_id", 0),
            )
    return by_minor
