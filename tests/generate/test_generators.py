"""Generators on hosts that have nothing, too little, several vendors, or invalid data."""

from __future__ import annotations

import os
import pathlib
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from generate import hosts
from generate.hosts import Host

from shim.cdi import spec
from shim.errors import HostError
from shim.generate import cdi_file, generators, nvmodes, nvproc, pci
from shim.generate.model import Description, Options
from shim.gpu.vendors import VENDORS


def describe(
    host: Host, tmp_path: pathlib.Path, vendor: str = "nvidia", **options: Any
) -> tuple[dict[str, Any] | None, Description]:
    return generators.describe(vendor, host.build(str(tmp_path)), Options(**options), host.ask)


def names(document: dict[str, Any] | None) -> list[str]:
    assert document is not None
    return [device["name"] for device in document["devices"]]


def nodes(block: dict[str, Any]) -> list[str]:
    return [node["path"] for node in block.get("deviceNodes", ())]


# --- nothing --------------------------------------------------------------------------------------------------


def driver_without_gpus() -> Host:
    host = hosts.nvidia(0)
    host.nvml = hosts.nvml(0)
    return host


def kfd_alone() -> Host:
    return hosts.amd(0)


def gpu_without_kfd() -> Host:
    return hosts.amd(1, kfd=False)


def not_in_kfd() -> Host:
    host = hosts.amd(1)
    for path in [path for path in host.files if path.endswith("properties")]:
        del host.files[path]
    return host


def only_other_pci() -> Host:
    return hosts.intel("i915")


@pytest.mark.parametrize("vendor", [vendor.name for vendor in VENDORS])
def test_an_empty_host_has_nothing(vendor: str, tmp_path: pathlib.Path) -> None:
    document, description = describe(Host(), tmp_path, vendor)
    assert document is None and description.notes == []


@pytest.mark.parametrize(
    "vendor, host",
    [
        ("nvidia", driver_without_gpus),
        ("amd", kfd_alone),
        ("amd", gpu_without_kfd),
        ("amd", not_in_kfd),
        ("intel", only_other_pci),
    ],
)
def test_without_a_gpu_there_is_no_file_of_control_nodes(
    vendor: str, host: Callable[[], Host], tmp_path: pathlib.Path
) -> None:
    document, _ = describe(host(), tmp_path, vendor)
    assert document is None


@pytest.mark.parametrize("mode", list(nvmodes.MODES))
def test_no_mode_finds_anything_on_an_empty_host(mode: str, tmp_path: pathlib.Path) -> None:
    document, _ = describe(Host(), tmp_path, mode=mode)
    assert document is None


# --- NVIDIA ---------------------------------------------------------------------------------------------------


def test_a_mig_device_needs_both_capabilities(tmp_path: pathlib.Path) -> None:
    host = hosts.mig(1, {0: 2})
    del host.nodes["/dev/nvidia-caps/nvidia-cap14"]
    with pytest.raises(
        HostError,
        match="nvidia-cap14.*gi8/ci0/access.*MIG device 0:1, is missing; "
        "run `nvidia-modprobe -f .*gpu0/mig/gi8/ci0/access`",
    ):
        describe(host, tmp_path)


def test_a_mig_device_needs_its_line_in_mig_minors(tmp_path: pathlib.Path) -> None:
    host = hosts.mig(1, {0: 2})
    minors = "/proc/driver/nvidia-caps/mig-minors"
    host.file(minors, host.files[minors].replace("gpu0/gi7/access 11\n", ""))
    with pytest.raises(HostError, match="MIG device 0:0 has no capability gpu0/gi7/access"):
        describe(host, tmp_path)


def test_a_capability_of_another_driver_is_not_used(tmp_path: pathlib.Path) -> None:
    host = hosts.mig(1, {0: 1}).node("/dev/nvidia-caps/nvidia-cap11", 10, 11)
    with pytest.raises(HostError, match="does not have the major number of nvidia-caps"):
        describe(host, tmp_path)


def test_mig_without_nvml_is_numbered_by_its_instances(tmp_path: pathlib.Path) -> None:
    host = hosts.mig(2, {1: 2})
    host.nvml = None
    document, description = describe(host, tmp_path)
    assert names(document) == ["0", hosts.uuid(0), "1:0", "1:1", "all"]
    assert any("without NVML" in note for note in description.notes)
    with pytest.raises(HostError, match="has no name by uuid.*choose another"):
        describe(host, tmp_path, strategies=["uuid"])


def test_a_gpu_in_mig_mode_without_instances_is_no_device(tmp_path: pathlib.Path) -> None:
    document, description = describe(hosts.mig(1, {0: 0}), tmp_path)
    assert document is None and any("no MIG device" in note for note in description.notes)


def test_nodes_that_are_missing_at_the_moment_come_from_the_kernel(tmp_path: pathlib.Path) -> None:
    host = hosts.nvidia(1)
    host.nodes = {}
    document, _ = describe(host, tmp_path)
    assert document is not None
    assert nodes(document["devices"][0]["containerEdits"]) == ["/dev/nvidia0", "/dev/dri/card1", "/dev/dri/renderD129"]
    assert [(node["major"], node["minor"]) for node in document["containerEdits"]["deviceNodes"]] == [
        (195, 254),
        (510, 1),
        (510, 0),
        (195, 255),
    ]


def test_a_node_without_a_known_number(tmp_path: pathlib.Path) -> None:
    host = hosts.nvidia(1).file("/proc/devices", "")
    del host.nodes["/dev/nvidia-uvm"]
    _, description = describe(host, tmp_path)
    assert any("/dev/nvidia-uvm is missing" in note and "nvidia-modprobe" in note for note in description.notes)
    del host.nodes["/dev/nvidia0"]
    os.unlink(str(tmp_path) + "/dev/nvidia0")
    with pytest.raises(HostError, match="/dev/nvidia0 of GPU 0 .* is missing"):
        describe(host, tmp_path)


def test_libraries_of_another_version_than_the_module(tmp_path: pathlib.Path) -> None:
    document, description = describe(
        hosts.libraries(hosts.nvidia(1, "/opt/nowhere"), "/usr/lib64", version="560.35.03"), tmp_path
    )
    assert (
        document is not None
        and "the kernel module is version 550.54.15 and the libraries are 560.35.03" in description.notes[0]
    )


def test_of_several_drivers_the_one_that_runs(tmp_path: pathlib.Path) -> None:
    host = hosts.libraries(hosts.nvidia(1), "/usr/lib/x86_64-linux-gnu", version="470.1.2")
    document, description = describe(host, tmp_path)
    assert document is not None and description.notes == []
    assert not any("470" in mount["containerPath"] for mount in document["containerEdits"]["mounts"])


def test_a_driver_without_libraries_still_has_nodes(tmp_path: pathlib.Path) -> None:
    document, description = describe(hosts.nvidia(1, "/opt/nowhere"), tmp_path)
    assert document is not None and "libraries were not found" in description.notes[0]


def test_links_in_a_driver_container_never_leave_it(tmp_path: pathlib.Path) -> None:
    host = hosts.container_driver().file("/etc/alternatives/libnvidia-ml.so.real", "the host's")
    document, _ = describe(host, tmp_path, driver_root="/run/nvidia/driver")
    assert document is not None
    assert all(mount["hostPath"].startswith("/run/nvidia/driver/") for mount in document["containerEdits"]["mounts"])


def test_nodes_of_a_dev_root(tmp_path: pathlib.Path) -> None:
    host = hosts.nvidia(1)
    host.nodes = {"/run/nvidia/driver" + path: numbers for path, numbers in host.nodes.items()}
    document, _ = describe(host, tmp_path, dev_root="/run/nvidia/driver")
    assert document is not None
    assert document["devices"][0]["containerEdits"]["deviceNodes"][0]["hostPath"] == "/run/nvidia/driver/dev/nvidia0"


def test_an_unreadable_uuid_is_not_used_as_a_name(tmp_path: pathlib.Path) -> None:
    host = hosts.nvidia(1)
    path = f"/proc/driver/nvidia/gpus/{hosts.address(0)}/information"
    host.file(path, host.files[path].replace(hosts.uuid(0), "GPU-????????-????-????-????-????????????"))
    document, _ = describe(host, tmp_path)
    assert names(document) == ["0", "all"]


def test_the_mode_nvml_needs_nvml(tmp_path: pathlib.Path) -> None:
    with pytest.raises(HostError, match="NVML cannot be asked: this host has no NVML; generate with --mode proc"):
        describe(hosts.nvidia(1), tmp_path, mode="nvml")


def test_two_devices_of_one_name_are_an_error(tmp_path: pathlib.Path) -> None:
    host = hosts.nvidia(2)
    host.nvml = hosts.nvml(2)
    host.nvml["gpus"][1]["uuid"] = hosts.uuid(0)
    with pytest.raises(HostError, match="two devices of this host are both called GPU-"):
        describe(host, tmp_path)


@pytest.mark.parametrize(
    "text, version",
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (dvs-builder@U22)",
            "570.86.10",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  390.12", "390.12"),
        ("", ""),
        ("no number 1.2.3 here", ""),
    ],
)
def test_the_version_of_the_module(text: str, version: str, tmp_path: pathlib.Path) -> None:
    assert nvproc.kernel_version(Host().file("/proc/driver/nvidia/version", text).build(str(tmp_path))) == version


# --- others ---------------------------------------------------------------------------------------------------


def test_several_vendors_on_one_host(tmp_path: pathlib.Path) -> None:
    intel = hosts.intel("i915", ("0000:00:02.0", "0x4680", 20))
    host = hosts.nvidia(2).add(hosts.amd(1)).add(intel).add(hosts.npu())
    kinds = {}
    for vendor in (each.name for each in VENDORS):
        document, _ = describe(host, tmp_path, vendor)
        if document is not None:
            kinds[document["kind"]] = names(document)[0::2]
    assert list(kinds) == ["nvidia.com/gpu", "amd.com/gpu", "intel.com/gpu", "intel.com/npu"]
    assert kinds["intel.com/gpu"] == ["card20", "all"]


def test_partitions_share_no_name_by_unique_id(tmp_path: pathlib.Path) -> None:
    document, _ = describe(hosts.amd(2, 4), tmp_path, "amd")
    assert names(document) == [*map(str, range(8)), "all"]
    assert document is not None and [nodes(device["containerEdits"]) for device in document["devices"]][7] == [
        "/dev/dri/card7",
        "/dev/dri/renderD135",
    ]


@pytest.mark.parametrize(
    "text, expected",
    [("00000000:1B:00.0", "0000:1b:00.0"), ("0000:1b:00.0", "0000:1b:00.0"), ("00010000:1B:00.0", "00010000:1b:00.0")],
)
def test_a_pci_address_is_as_sysfs_writes_it(text: str, expected: str) -> None:
    assert pci.address(text) == expected and pci.is_address(expected)


def test_invalid_pci_addresses() -> None:
    for text in ("", "module", "bind", "0000:1b:00", "0000:1b:00.x", "000:1b:00.0", "0000:1b:000", "new_id"):
        assert not pci.is_address(text)


# --- nonsense -------------------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[], Host]] = {
    "nvidia": lambda: hosts.mig(2, {1: 2}),
    "amd": lambda: hosts.amd(2, 2),
    "gaudi": lambda: hosts.gaudi(2),
    "intel": lambda: hosts.intel("xe", ("0000:03:00.0", "0xe20b", 1)),
}
NONSENSE = [
    "",
    "\0\0",
    "9" * 5000,
    "x" * 200,
    "-1",
    "1 2 3\n" * 50,
    "é\ufffd",
    "drm_render_minor -5\nlocation_id x",
    "gpu0/gi7/access -3",
    "4294967296:1",
]


@pytest.mark.parametrize("vendor", WHOLE)
def test_a_broken_tree_gives_a_valid_file_or_a_sentence(vendor: str, tmp_path: pathlib.Path) -> None:
    for seed in range(60):
        chance = random.Random(seed)
        host = WHOLE[vendor]()
        if seed % 2:
            host.nvml = None
        for path in chance.sample(sorted(host.files), min(len(host.files), chance.randrange(1, 8))):
            if chance.random() < 0.5:
                host.files[path] = chance.choice(NONSENSE)
            else:
                del host.files[path]
        for path in chance.sample(sorted(host.nodes), min(len(host.nodes), chance.randrange(3))):
            del host.nodes[path]
        for path in chance.sample(sorted(host.links), min(len(host.links), 2)):
            host.links[path] = chance.choice([path.rpartition("/")[2], "/", "..", "/nowhere", "x" * 200])
        try:
            document, _ = describe(host, tmp_path / f"{vendor}{seed}", vendor)
        except HostError as error:
            assert "\n" not in str(error)
            continue
        if document is not None:
            assert spec.problems(cdi_file.render(document), "x") == [], seed
            assert all(nodes(device["containerEdits"]) for device in document["devices"]), seed


def test_files_that_are_no_files(tmp_path: pathlib.Path) -> None:
    host = hosts.nvidia(1)
    tree = host.build(str(tmp_path))
    for path in ("/proc/driver/nvidia/params", "/proc/devices", "/etc/ld.so.cache"):
        if os.path.exists(tree.at(path)):
            os.unlink(tree.at(path))
        os.makedirs(os.path.dirname(tree.at(path)), exist_ok=True)
        os.mkfifo(tree.at(path))
    document, _ = generators.describe("nvidia", tree, Options(), host.ask)
    assert document is not None


def test_eight_gpus_take_little_time_and_memory(tmp_path: pathlib.Path) -> None:
    host = hosts.nvidia(8)
    host.nvml = hosts.nvml(8)
    for number in range(3000):  # a workstation's library folder
        host.file(f"/usr/lib/x86_64-linux-gnu/libother{number}.so.{number}.0.1")
    tree = host.build(str(tmp_path))
    started = time.perf_counter()
    document, _ = generators.describe("nvidia", tree, Options(), host.ask)
    assert document is not None
    cdi_file.render(document)
    assert time.perf_counter() - started < 0.5
    tracemalloc.start()
    generators.describe("nvidia", tree, Options(), host.ask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
