"""Which GPUs are neighbours according to /proc and /sys, and how a create uses that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generate import hosts
from lab import served
from lab.gpu_files import NVIDIA, device, granted, nowhere, spec
from lab.nvml import Library

from shim.cdi.registry import Registry
from shim.errors import RequestError
from shim.generate import nvml, topology
from shim.generate.tree import HostTree
from shim.gpu import choose
from shim.node.compiler import Compiled
from shim.node.inventory import Inventory


def pci(host: hosts.Host, bdf: str, way: str, numa: str = "") -> hosts.Host:
    """A device on the bus, behind `way`."""
    host.link(f"/sys/bus/pci/devices/{bdf}", f"../../../devices/{way}/{bdf}")
    directory = f"/sys/devices/{way}/{bdf}"
    return host.file(f"{directory}/numa_node", numa + "\n") if numa else host.file(f"{directory}/vendor")


def server(count: int = 4) -> hosts.Host:
    """NVIDIA's GPUs, two for each processor: 0 and 2, 1 and 3."""
    host = hosts.nvidia(count)
    host.files = {path: text for path, text in host.files.items() if not path.startswith("/sys/bus/pci/")}
    for n in range(count):
        pci(host, hosts.address(n), f"pci0000:{n % 2}0/0000:{n % 2}0:01.0", str(n % 2))
    return host


def keys(*minors: int) -> list[tuple[str, ...]]:
    return [(f"c195:{minor}",) for minor in minors]


def test_nvidia(tmp_path: Path) -> None:
    tree = server(3).build(str(tmp_path))
    assert topology.Topology(tree).text(keys(0, 1, 2)).split("\n") == [
        f"0\tpci0000:00/0000:00:01.0/{hosts.address(0)}\t",
        f"1\tpci0000:10/0000:10:01.0/{hosts.address(1)}\t",
        f"0\tpci0000:00/0000:00:01.0/{hosts.address(2)}\t",
        "",
    ]


def test_a_mig_device_is_where_its_gpu_is(tmp_path: Path) -> None:
    found = topology.Topology(server().build(str(tmp_path))).text(
        [("c195:1", "c237:12"), ("c195:1", "c237:21"), ("c195:0",)]
    )
    first, second, third, _ = found.split("\n")
    assert first == second and hosts.address(1) in first and hosts.address(0) in third


def test_links_of_nvlink_to_each_other_and_to_switches(tmp_path: Path) -> None:
    bdf = [hosts.address(n) for n in range(4)]
    ends = {bdf[0]: [bdf[3]], bdf[3]: [bdf[0]], bdf[1]: ["0000:c1:00.0"], bdf[2]: ["0000:c1:00.0"]}
    lines = topology.Topology(server().build(str(tmp_path)), lambda: ends).text(keys(0, 1, 2, 3)).split("\n")
    assert [line.split("\t")[2] for line in lines[:4]] == ["3", "2", "1", "0"]


def test_nvml_is_asked_only_where_there_are_several(tmp_path: Path) -> None:
    def never() -> Any:
        raise AssertionError

    tree = server().build(str(tmp_path))
    assert topology.Topology(tree, never).text([("c195:0",), ("c226:200",)])


def amd_host(partitions: int = 1) -> hosts.Host:
    """Four GPUs; XGMI joins 0 with 2."""
    host = hosts.amd(4, partitions)
    for n in range(4):
        bdf = f"0000:{0x0C + n * 0x10:02x}:00.0"
        pci(host, bdf, f"pci0000:{n // 2}0/0000:{n // 2}0:03.1", str(n // 2))
        host.link(
            f"/sys/dev/char/226:{128 + n * partitions}",
            f"../../devices/pci0000:{n // 2}0/0000:{n // 2}0:03.1/{bdf}/drm/renderD{128 + n * partitions}",
        )
    nodes = "/sys/class/kfd/kfd/topology/nodes"
    for one, other, kind in ((0, 2, 11), (2, 0, 11), (1, 3, 2)):
        host.file(
            f"{nodes}/{one * partitions + 2}/io_links/0/properties",
            f"type {kind}\nversion_major 0\nnode_from {one * partitions + 2}\n"
            f"node_to {other * partitions + 2}\nweight 15\n",
        )
    return host


def test_amd(tmp_path: Path) -> None:
    lines = (
        topology.Topology(amd_host().build(str(tmp_path)))
        .text([("c226:0", "c226:128"), ("c226:129",), ("c226:130",), ("c226:131",)])
        .split("\n")
    )
    assert lines[0] == "0\tpci0000:00/0000:00:03.1/0000:0c:00.0\t2"
    assert [line.split("\t")[2] for line in lines[:4]] == ["2", "", "0", ""]


def test_partitions_are_where_their_gpu_is(tmp_path: Path) -> None:
    """Only the first partition is a device on the bus; the compute driver says to which GPU the others belong."""
    lines = (
        topology.Topology(amd_host(2).build(str(tmp_path))).text([(f"c226:{128 + n}",) for n in range(8)]).split("\n")
    )
    assert [line.split("\t")[1].rpartition("/")[2] for line in lines[:8:2]] == [
        line.split("\t")[1].rpartition("/")[2] for line in lines[1:8:2]
    ]
    assert lines[1].split("\t")[0] == "0"


@pytest.mark.parametrize(
    "found", [[], [("c7:1",), ("c7:2",)], [("/dev/x",), ("b8:0",)], [("c195:0",)], [("c195:0",), ("c195:0",)]]
)
def test_a_host_without_topology_gives_no_text(tmp_path: Path, found: Any) -> None:
    host = server().link("/sys/dev/char/7:1", "../../devices/virtual/vc/vcs1")
    assert topology.Topology(host.build(str(tmp_path))).text(found) == ""


@pytest.mark.parametrize("numa", ["-1", "nonsense", "", "99999999999999999999999"])
def test_an_invalid_memory_node(tmp_path: Path, numa: str) -> None:
    host = server(2)
    host.files = {path: numa if path.endswith("numa_node") else text for path, text in host.files.items()}
    found = topology.Topology(host.build(str(tmp_path))).text(keys(0, 1))
    assert all(not line.partition("\t")[0] or numa.startswith("9") for line in found.split("\n"))


# --- NVML -----------------------------------------------------------------------------------------------------


class Linked(Library):
    """GPU 0 has links to 1 and to nothing known, the others are older than the question."""

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        return type("Info", (), {"busId": f"00000000:0{handle[0]}:00.0"})

    def nvmlDeviceGetNvLinkState(self, handle: Any, link: int) -> int:
        if handle[0] or link > 3:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return int(link != 2)

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: Any, link: int) -> Any:
        if link == 3:
            raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return type("Info", (), {"busId": b"00000000:01:00.0"})


def test_nvml_reports_the_other_ends_of_links() -> None:
    library = Linked(None, None)
    assert nvml.links(library) == {"links": {"0000:00:00.0": ["0000:01:00.0"], "0000:01:00.0": []}} and library.shut
    assert "failed" in nvml.links(Linked(None, init=9)) and "failed" in nvml.links(Linked(None, lost=0))


# --- what a create makes of it --------------------------------------------------------------------------------

FILE = spec(NVIDIA, *(device(str(n), n) for n in range(4)), device("all", 0, 1, 2, 3))


def inventory(tree: HostTree) -> Inventory:
    config = served.inventory().config
    return Compiled(
        config, Registry.build([("/cdi", None, [("nvidia.json", FILE)])]), topology.Topology(tree).text
    ).inventory()


def names(request: dict[str, Any], at: Inventory, held: Any) -> list[str]:
    found = choose.grant(request, [], at, "annotation a", nowhere, held)
    return [name.partition("=")[2] for name in found.names]


def test_a_count_takes_neighbours_where_that_is_preferred(tmp_path: Path) -> None:
    at = inventory(server().build(str(tmp_path)))
    assert names({"count": 2}, at, []) == ["0", "1"]
    assert names({"count": 2, "prefer": "numa"}, at, []) == names({"count": 2, "prefer": "link"}, at, []) == ["0", "2"]
    held = [{"id": "c", "owner": "nri", "names": ["0"], "keys": ["c195:0"], "since": 0}]
    assert names({"count": 2, "prefer": "numa"}, at, held) == ["1", "3"]
    assert names({"count": 3, "prefer": "numa"}, at, held) == ["1", "2", "3"], "`prefer` must not make a request fail"
    assert names({"count": 2, "prefer": "numa"}, at, None) == ["0", "1"], "without leases a count takes the first"
    assert at.kinds() == [NVIDIA] and at.picks(NVIDIA) == ["0", "1", "2", "3"]


def test_a_node_without_topology_takes_devices_in_order(tmp_path: Path) -> None:
    at = inventory(HostTree(str(tmp_path)))
    assert at.near(NVIDIA) == "" and names({"count": 2, "prefer": "link"}, at, []) == ["0", "1"]
    assert names({"count": 1, "prefer": "link", "vendor": "nvidia"}, at, []) == ["0"]


def test_prefer_needs_a_count(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="resources.gpu.prefer says which devices a count takes"):
        granted({"devices": ["0"], "prefer": "numa"}, inventory(HostTree(str(tmp_path))))


def test_topology_is_read_only_for_requests_that_prefer(tmp_path: Path) -> None:
    """The topology is a part of its own in the inventory."""
    at = inventory(server().build(str(tmp_path)))
    read: list[str] = []
    part = at._part

    def noted(name: str) -> bytes:
        read.append(name)
        return part(name)

    at._part = noted
    names({"count": 2}, at, [])
    without = len(read)
    names({"count": 2, "prefer": "numa"}, at, [])
    assert len(read) == without + 1
