"""Finds which GPUs are close to each other: the NUMA node, PCI path and direct links of each.  Pure.

It starts from the numbers of device nodes and runs when the inventory is compiled.  shim.gpu.neighbours reads the
result.
Source: Documentation/ABI/testing/sysfs-dev and sysfs-bus-pci; Linux drivers/gpu/drm/amd/amdkfd/kfd_topology.c; the
NVIDIA driver's README, "The /proc interface".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

from shim.generate import amd, nvproc, pci

if TYPE_CHECKING:
    from shim.generate.tree import HostTree

    Links = dict[str, list[str]]  # PCI address: the addresses of GPUs or switches at the other ends of its NVLinks

_DRM = 226  # DRM_MAJOR
_XGMI = "11"  # HSA_IOLINK_TYPE_XGMI


class Topology:
    """The GPUs of one host.  `nvlink` returns the links of NVIDIA GPUs; it is called only where there are several."""

    def __init__(self, tree: HostTree, nvlink: Callable[[], Links] = dict) -> None:
        self._tree = tree
        self._nvlink = nvlink
        self._amd = amd.topology(tree)  # by render minor
        self._nvidia = {gpu["minor"]: gpu["bdf"] for gpu in nvproc.read(tree)["gpus"]}  # PCI address by minor
        self._majors = nvproc.majors(tree)

    def text(self, keys: Sequence[tuple[str, ...]]) -> str:
        """A line for each device: NUMA node, PCI path, and the indexes in `keys` of linked devices, separated by tabs.

        A key has the numbers of a device's nodes, such as c195:0.  The text is '' when it would not tell the devices
        apart.
        """
        positions = [self._position(key) for key in keys]
        linked = self._linked(keys, [bdf for _, _, bdf in positions])
        lines = [f"{numa}\t{path}\t{' '.join(map(str, links))}" for (numa, path, _), links in zip(positions, linked)]
        return "\n".join(lines) + "\n" if len(set(lines)) > 1 or any(linked) else ""

    def _position(self, key: tuple[str, ...]) -> tuple[str, str, str]:
        """NUMA node, PCI path and PCI address of a device; each '' where the host does not tell it."""
        for number in key:
            path = self._pci_path(number)
            if path:
                bdf = path.rpartition("/")[2]
                numa = self._tree.text(f"{pci.DEVICES}/{bdf}/numa_node")
                return (numa if numa.isdigit() else ""), path, bdf
        return "", "", ""

    def _pci_path(self, number: str) -> str:
        """The PCI path from the host bridge to the device behind a node: pci0000:3a/0000:3a:00.0/0000:3b:00.0."""
        major, _, minor = number[1:].partition(":")
        if not (number.startswith("c") and major.isdigit() and minor.isdigit()):
            return ""
        bdf = ""
        if int(major) in (self._majors.get("nvidia"), self._majors.get("nvidia-frontend")):
            bdf = self._nvidia.get(int(minor), "")
        elif int(major) == _DRM and int(minor) in self._amd:
            bdf = amd.location(self._amd[int(minor)])  # a partition is not a device on the bus, but its GPU is
        target = self._tree.link(f"{pci.DEVICES}/{bdf}") if bdf else self._tree.link(f"/sys/dev/char/{major}:{minor}")
        parts = target.split("/")
        bridges = [index for index, part in enumerate(parts) if part.startswith("pci") and ":" in part]
        if not bridges:
            return ""
        path = [parts[bridges[0]]]
        for part in parts[bridges[0] + 1 :]:
            if not pci.is_address(part):
                break
            path.append(part)
        return "/".join(path) if len(path) > 1 else ""

    def _linked(self, keys: Sequence[tuple[str, ...]], bdfs: list[str]) -> list[list[int]]:
        """For each device the indexes of the devices with a direct link to it."""
        nvidia = set(self._nvidia.values())
        ends = self._nvlink() if sum(bdf in nvidia for bdf in bdfs) > 1 else {}
        nodes = [self._kfd_node(key) for key in keys]
        links: list[list[int]] = []
        for index, bdf in enumerate(bdfs):
            far_ends = set(ends.get(bdf, ()))
            xgmi = self._xgmi(nodes[index]) if nodes[index] >= 0 else set()
            links.append(
                [
                    other
                    for other, other_bdf in enumerate(bdfs)
                    if other != index
                    and (other_bdf in far_ends or bool(far_ends & set(ends.get(other_bdf, ()))) or nodes[other] in xgmi)
                ]
            )
        return links

    def _kfd_node(self, key: tuple[str, ...]) -> int:
        """The number of the KFD node of an AMD GPU; -1 for any other."""
        for number in key:
            major, _, minor = number[1:].partition(":")
            if major.isdigit() and int(major) == _DRM and minor.isdigit() and int(minor) in self._amd:
                return self._amd[int(minor)][2]
        return -1

    def _xgmi(self, node: int) -> set[int]:
        """The KFD nodes at the other ends of a node's XGMI links."""
        peers = set()
        directory = f"{amd.NODES}/{node}/io_links"
        for name in self._tree.names(directory):
            values = dict(
                line.split(" ", 1)
                for line in self._tree.text(f"{directory}/{name}/properties").split("\n")
                if " " in line
            )
            if values.get("type", "").strip() == _XGMI and pci.natural_number(values.get("node_to", "").strip()) >= 0:
                peers.add(int(values["node_to"]))
        return peers
