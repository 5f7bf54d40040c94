"""Which GPUs are neighbours: the memory node, the way through PCI and the direct links of each.  Pure.

Looked up when the inventory is compiled, from the numbers of device nodes; shim.gpu.neighbours reads what comes of it.
Source: Documentation/ABI/testing/sysfs-dev and sysfs-bus-pci; Linux drivers/gpu/drm/amd/amdkfd/kfd_topology.c; the
NVIDIA driver's README, "The /proc interface".
"""

from __future__ import annotations

from shim.generate import amd, nvproc, pci

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Sequence, Tuple

    from shim.generate.tree import HostTree

    Links = Dict[str, List[str]]  # PCI address: those of the GPUs at the other end of NVLink, or of the switches there

_DRM = 226  # DRM_MAJOR
_XGMI = "11"  # HSA_IOLINK_TYPE_XGMI


class Topology:
    """One host's GPUs.  `nvlink` gives the links of NVIDIA's, asked only where there are several."""

    def __init__(self, tree: HostTree, nvlink: Callable[[], Links] = dict) -> None:
        self._tree = tree
        self._nvlink = nvlink
        self._amd = amd.topology(tree)  # by render minor
        self._nvidia = {gpu["minor"]: gpu["bdf"] for gpu in nvproc.read(tree)["gpus"]}
        self._major = nvproc.majors(tree)

    def text(self, keys: Sequence[Tuple[str, ...]]) -> str:
        """A line for each device (a key: the numbers of its nodes, such as c195:0): memory node, way through PCI, and the
        places in this list of those that it is linked with, behind tabs.  '' when nothing is known that tells them apart."""
        places = [self._place(key) for key in keys]
        linked = self._linked(keys, [bdf for _, _, bdf in places])
        lines = [f"{numa}\t{way}\t{' '.join(map(str, links))}" for (numa, way, _), links in zip(places, linked)]
        return "\n".join(lines) + "\n" if len(set(lines)) > 1 or any(linked) else ""

    def _place(self, key: Tuple[str, ...]) -> Tuple[str, str, str]:
        """Memory node, way through PCI and address; each '' where the host does not say."""
        for number in key:
            way = self._way(number)
            if way:
                bdf = way.rpartition("/")[2]
                numa = self._tree.text(f"{pci.DEVICES}/{bdf}/numa_node")
                return (numa if numa.isdigit() else ""), way, bdf
        return "", "", ""

    def _way(self, number: str) -> str:
        """From the host bridge to the device behind a node: pci0000:3a/0000:3a:00.0/0000:3b:00.0."""
        major, _, minor = number[1:].partition(":")
        if not (number.startswith("c") and major.isdigit() and minor.isdigit()):
            return ""
        bdf = ""
        if int(major) in (self._major.get("nvidia"), self._major.get("nvidia-frontend")):
            bdf = self._nvidia.get(int(minor), "")
        elif int(major) == _DRM and int(minor) in self._amd:
            bdf = amd.location(self._amd[int(minor)])  # a partition is no device on the bus
        target = self._tree.link(f"{pci.DEVICES}/{bdf}") if bdf else self._tree.link(f"/sys/dev/char/{major}:{minor}")
        parts = target.split("/")
        starts = [at for at, part in enumerate(parts) if part.startswith("pci") and ":" in part]
        if not starts:
            return ""
        way = [parts[starts[0]]]
        for part in parts[starts[0] + 1 :]:
            if not pci.is_address(part):
                break
            way.append(part)
        return "/".join(way) if len(way) > 1 else ""

    def _linked(self, keys: Sequence[Tuple[str, ...]], bdfs: List[str]) -> List[List[int]]:
        """For each device the places of those with a direct link."""
        own = set(self._nvidia.values())
        ends = self._nvlink() if sum(bdf in own for bdf in bdfs) > 1 else {}
        nodes = [self._node(key) for key in keys]
        found: List[List[int]] = []
        for one, bdf in enumerate(bdfs):
            far = set(ends.get(bdf, ()))
            xgmi = self._xgmi(nodes[one]) if nodes[one] >= 0 else set()
            found.append(
                [
                    other
                    for other, at in enumerate(bdfs)
                    if other != one and (at in far or bool(far & set(ends.get(at, ()))) or nodes[other] in xgmi)
                ]
            )
        return found

    def _node(self, key: Tuple[str, ...]) -> int:
        """The number of the KFD node of an AMD GPU; -1 for any other."""
        for number in key:
            major, _, minor = number[1:].partition(":")
            if major.isdigit() and int(major) == _DRM and minor.isdigit() and int(minor) in self._amd:
                return self._amd[int(minor)][2]
        return -1

    def _xgmi(self, node: int) -> set[int]:
        """The KFD nodes at the other ends of a node's XGMI links."""
        found = set()
        directory = f"{amd.NODES}/{node}/io_links"
        for name in self._tree.names(directory):
            values = dict(
                line.split(" ", 1)
                for line in self._tree.text(f"{directory}/{name}/properties").split("\n")
                if " " in line
            )
            if values.get("type", "").strip() == _XGMI and pci.whole(values.get("node_to", "").strip()) >= 0:
                found.add(int(values["node_to"]))
        return found
