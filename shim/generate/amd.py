"""AMD's GPUs and their partitions, from amdgpu's sysfs and the topology of KFD.  Pure.

Source: AMD Container Toolkit; Linux drivers/gpu/drm/amd/amdkfd/kfd_topology.c for the properties.
"""

from __future__ import annotations

from shim.generate import pci
from shim.generate.answers import Device, Found, merged, node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Tuple

    from shim.generate.answers import Options
    from shim.generate.tree import HostTree
    from shim.gpu.vendors import Vendor

    # render minor -> (domain, location, KFD node, unique id)
    Topology = Dict[int, Tuple[int, int, int, int]]

_DRIVER = "/sys/module/amdgpu/drivers"
_PLATFORM = "/sys/devices/platform"
NODES = "/sys/class/kfd/kfd/topology/nodes"
_WANTED = ("drm_render_minor", "domain", "location_id", "unique_id")


def gpus(vendor: Vendor, tree: HostTree, options: Options) -> Found:
    """Every GPU or partition that the compute driver knows, in its order: 0 to n, partitions one after another."""
    empty = Found(vendor.kind, [], watch=["/dev/dri", "/dev/kfd", "/sys/module/amdgpu"])
    if not tree.names(_DRIVER):
        return empty
    known_to_kfd = topology(tree)
    places = [
        (f"{_DRIVER}/pci:amdgpu/{bdf}", bdf) for bdf in filter(pci.is_address, tree.names(_DRIVER + "/pci:amdgpu"))
    ]
    # The first partition of a GPU is the PCI device itself, the others are platform devices.
    places += [(f"{_PLATFORM}/{name}", "") for name in pci.numbered(tree.names(_PLATFORM), "amdgpu_xcp_")]
    known: List[Tuple[Tuple[int, int, int, int], str, str, str]] = []
    notes: List[str] = []
    for directory, bdf in places:
        renders = pci.numbered(tree.names(directory + "/drm"), "renderD")
        if not renders:
            continue
        minor = pci.number(renders[0], "renderD")
        if minor in known_to_kfd:
            known.append((known_to_kfd[minor], directory, bdf, renders[0]))
        elif bdf:
            notes.append(f"the GPU at {bdf} ({renders[0]}) is none that the compute driver (KFD) knows and is left out")
    control = node(tree, options, "/dev/kfd")
    if known and control is None:
        notes.append("/dev/kfd is missing, without which no GPU computes; nothing is generated for AMD")
        known = []
    known.sort(key=lambda one: one[0])
    parts: Dict[Tuple[int, int], int] = {}
    for place, *_ in known:
        parts[place[:2]] = parts.get(place[:2], 0) + 1
    devices: List[Device] = []
    for index, (place, directory, bdf, render) in enumerate(known):
        edits, missing = pci.drm(tree, options, directory, bdf)
        if missing:
            notes.append(f"{', '.join(missing)} of GPU {index} is not in /dev")
        whole = parts[place[:2]] == 1
        # partitions of one GPU share its unique id, so that it names none of them
        names = {
            "index": str(index),
            "type-index": f"gpu{index}",
            "uuid": f"GPU-{place[3]:016x}" if whole and place[3] else "",
        }
        layout = f"{index} {location(place)} {render}" + ("" if whole else " partition")
        if edits.get("deviceNodes"):
            devices.append(Device(names, edits, layout))
    return Found(
        vendor.kind, devices, merged(control or {}), tree.text("/sys/module/amdgpu/version"), notes, empty.watch
    )


def location(place: Tuple[int, int, int, int]) -> str:
    """KFD's location_id is the bus, device and function of PCI."""
    domain, where = place[:2]
    return f"{domain:04x}:{where >> 8 & 0xFF:02x}:{where >> 3 & 0x1F:02x}.{where & 7}"


def topology(tree: HostTree) -> Topology:
    found: Topology = {}
    for name in pci.numbered(tree.names(NODES), ""):
        values: Dict[str, int] = {}
        for line in tree.text(f"{NODES}/{name}/properties").split("\n"):
            key, _, value = line.partition(" ")
            if key in _WANTED and pci.whole(value) >= 0:
                values[key] = pci.whole(value)
        minor = values.get("drm_render_minor", 0)
        if minor > 0:  # 0 is a processor
            found[minor] = (
                values.get("domain", 0),
                values.get("location_id", 0),
                int(name),
                values.get("unique_id", 0),
            )
    return found
