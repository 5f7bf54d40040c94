"""Each kind of host with its expected file in `expected/`, which a person has read once.

python tests/generate/test_expected.py     writes them all anew
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

if __name__ == "__main__":
    sys.path[:0] = [
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
    ]

from generate import hosts
from generate.hosts import Host

from shim.cdi import decoder as text
from shim.cdi import spec
from shim.generate import cdi_file, generators
from shim.generate.model import Options

EXPECTED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "expected")
CONTAINER_ROOT = "/run/nvidia/driver"


class Case(NamedTuple):
    vendor: str
    host: Callable[[], Host]
    options: dict[str, Any] = {}


def with_nvml(host: Host, count: int) -> Host:
    host.nvml = hosts.nvml(count)
    return host


def socketed() -> Host:
    host = with_nvml(hosts.nvidia(8), 8)
    host.sockets += ["/run/nvidia-persistenced/socket", "/run/nvidia-fabricmanager/socket"]
    return host


def coherent() -> Host:
    host = with_nvml(hosts.nvidia(1), 1)
    assert host.nvml is not None
    host.nvml["gpus"][0]["coherent"] = True
    return host


def wsl() -> Host:
    store = "/usr/lib/wsl/drivers/nv_dispi.inf_amd64_0123456789abcdef"
    host = Host().node("/dev/dxg", 10, 125)
    for name in (
        "libcuda.so.1.1",
        "libcuda_loader.so",
        "libnvidia-ml.so.1",
        "nvidia-smi",
        "nvcubins.bin",
        "readme.txt",
    ):
        host.file(f"{store}/{name}")
    return host.file("/usr/lib/wsl/lib/libdxcore.so").file("/usr/lib/wsl/drivers/other.inf/x.dll")


def tegra() -> Host:
    lists = "/etc/nvidia-container-runtime/host-files-for-container.d"
    host = Host().file("/etc/nv_tegra_release", "# R36 (release), REVISION: 3.0, GCID: 36191598, BOARD: generic\n")
    host.file(f"{lists}/devices.csv", "dev, /dev/nvhost-ctrl\ndev, /dev/nvmap\ndev, /dev/absent\n")
    host.file(
        f"{lists}/drivers.csv",
        "dir, /lib/firmware/tegra19x\nlib, /usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1.1\n"
        "lib, /usr/lib/absent.so\nsym, /usr/lib/aarch64-linux-gnu/tegra/libcuda.so\n# a comment\n",
    )
    host.file(f"{lists}/readme.txt", "lib, /etc/passwd\n")
    host.file("/lib/firmware/tegra19x/x").file("/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1.1").link(
        "/usr/lib/aarch64-linux-gnu/tegra/libcuda.so", "libcuda.so.1.1"
    )
    return host.node("/dev/nvhost-ctrl", 505, 0, 0o660, 44).node("/dev/nvmap", 10, 60)


def other_classes() -> Host:
    host = hosts.nvidia(1)
    host.node("/dev/nvidia-nvswitchctl", 500, 255).node("/dev/nvidia-nvswitch0", 500, 0).node(
        "/dev/nvidia-nvswitch1", 500, 1
    )
    host.node("/dev/nvidia-fs0", 501, 0).node("/dev/nvidia-fs1", 501, 1).node("/dev/gdrdrv", 502, 0)
    host.file("/etc/cufile.json").file("/run/udev/data/x")
    host.node("/dev/infiniband/uverbs0", 231, 192).node("/dev/infiniband/rdma_cm", 10, 58).node(
        "/dev/infiniband/issm0", 231, 64, 0o600
    )
    for channel in (0, 1, 10, 2):
        host.node(f"/dev/nvidia-caps-imex-channels/channel{channel}", 503, channel)
    return host


CASES = {
    "nvidia-1-nvml": Case("nvidia", lambda: with_nvml(hosts.nvidia(1), 1)),
    "nvidia-1-proc": Case("nvidia", lambda: hosts.nvidia(1)),
    "nvidia-8": Case("nvidia", socketed),
    "nvidia-8-names": Case(
        "nvidia", lambda: with_nvml(hosts.nvidia(2), 2), {"strategies": ["type-index"], "all": False}
    ),
    "nvidia-coherent": Case("nvidia", coherent),
    "nvidia-mig": Case("nvidia", lambda: hosts.mig(2, {1: 2})),
    "nvidia-mig-one-gpu": Case("nvidia", lambda: hosts.mig(1, {0: 3})),
    "nvidia-rhel": Case("nvidia", lambda: hosts.nvidia(1, "/usr/lib64")),
    "nvidia-debian-current": Case("nvidia", lambda: hosts.nvidia(1, "/usr/lib/x86_64-linux-gnu/nvidia/current")),
    "nvidia-nixos": Case("nvidia", hosts.nixos),
    "nvidia-container-driver": Case("nvidia", hosts.container_driver, {"driver_root": CONTAINER_ROOT}),
    "nvidia-ld-cache": Case("nvidia", hosts.cached),
    "nvidia-own-hooks": Case("nvidia", lambda: hosts.nvidia(1), {"hook": "/usr/bin/nvidia-ctk"}),
    "nvidia-management": Case("nvidia", lambda: hosts.mig(1, {0: 1}), {"mode": "management"}),
    "nvidia-wsl": Case("nvidia", wsl),
    "nvidia-csv": Case("nvidia", tegra),
    "nvidia-gds": Case("nvidia", other_classes, {"mode": "gds"}),
    "nvidia-gdrcopy": Case("nvidia", other_classes, {"mode": "gdrcopy"}),
    "nvidia-mofed": Case("nvidia", other_classes, {"mode": "mofed"}),
    "nvidia-nvswitch": Case("nvidia", other_classes, {"mode": "nvswitch"}),
    "nvidia-imex": Case("nvidia", other_classes, {"mode": "imex"}),
    "amd-1": Case("amd", lambda: hosts.amd(1)),
    "amd-8": Case("amd", lambda: hosts.amd(8)),
    "amd-partitioned": Case("amd", lambda: hosts.amd(2, 4)),
    "intel-i915": Case(
        "intel", lambda: hosts.intel("i915", ("0000:03:00.0", "0x56a0", 1), ("0000:00:02.0", "0x4680", 0))
    ),
    "intel-xe": Case(
        "intel", lambda: hosts.intel("xe", ("0000:03:00.0", "0xe20b", 1), ("10000:83:00.0", "0xe20b", 12))
    ),
    "gaudi": Case("gaudi", lambda: hosts.gaudi(2)),
    "npu": Case("npu", hosts.npu),
}


def built(name: str, directory: str) -> dict[str, Any]:
    """The document of one case."""
    case = CASES[name]
    host = case.host()
    result, _ = generators.describe(case.vendor, host.build(directory), Options(**case.options), host.ask)
    assert result is not None
    return result


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_the_expected_one(name: str, tmp_path: pathlib.Path) -> None:
    data = cdi_file.render(built(name, str(tmp_path)))
    with open(os.path.join(EXPECTED, name + ".json"), "rb") as file:
        assert json.loads(data) == json.loads(file.read())


@pytest.mark.parametrize("name", CASES)
def test_it_is_valid_and_no_path_of_the_fixture_is_in_it(name: str, tmp_path: pathlib.Path) -> None:
    one = built(name, str(tmp_path))
    for form in ("json", "yaml"):
        data = cdi_file.render(one, form)
        assert spec.problems(data, "x") == []
        assert text.load(data) == one
        assert str(tmp_path).encode() not in data
    assert cdi_file.is_untouched(one)


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_are_the_same_each_time(name: str, tmp_path: pathlib.Path) -> None:
    assert cdi_file.render(built(name, str(tmp_path / "a"))) == cdi_file.render(built(name, str(tmp_path / "b")))


@pytest.mark.parametrize("name", CASES)
def test_every_node_and_hook_is_described_in_full(name: str, tmp_path: pathlib.Path) -> None:
    one = built(name, str(tmp_path))
    for block in [one.get("containerEdits", {}), *(device["containerEdits"] for device in one["devices"])]:
        for node in block.get("deviceNodes", ()):
            assert node["type"] == "c" and node["major"] > 0 and "minor" in node and node["permissions"] == "rwm"
            assert (node["fileMode"] & 0o006 == 0o006) or "gid" in node or node["fileMode"] & 0o444 == 0o444
        for hook in block.get("hooks", ()):
            assert hook["env"] and hook["path"].startswith("/") and hook["hookName"] == "createContainer"


def main() -> None:
    os.makedirs(EXPECTED, exist_ok=True)
    for name in CASES:
        with tempfile.TemporaryDirectory() as directory, open(os.path.join(EXPECTED, name + ".json"), "wb") as file:
            file.write(cdi_file.render(built(name, directory)))


if __name__ == "__main__":
    main()
