"""From resources.gpu to devices, with CDI files and without."""

from __future__ import annotations

from typing import Any

import pytest
from lab.gpu_files import NVIDIA, device, granted, inventory, spec

from shim.edits import DEVICE, ENV, GID
from shim.errors import CdiError, ChandlerError, HostError, RequestError
from shim.gpu import choose

# Three GPUs with two names each, and one name for all; numbers out of order on purpose.
FILE = spec(
    NVIDIA,
    device("GPU-b", 1),
    device("10", 10),
    device("1", 1),
    device("0", 0),
    device("GPU-a", 0),
    device("all", 0, 1, 10),
)


def variables(found: choose.Grant) -> dict[str, str]:
    return {key: value for kind, key, value, _ in found.edits.items if kind == ENV}


def paths(found: choose.Grant) -> list[str]:
    return [key for kind, key, _, _ in found.edits.items if kind == DEVICE]


# --- through CDI ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, ["0"]),
        ({"count": 1}, ["0"]),
        ({"count": 2}, ["0", "1"]),
        ({"count": 3}, ["0", "1", "10"]),
        ({"devices": ["1"]}, ["1"]),
        ({"devices": ["GPU-b", "0"]}, ["GPU-b", "0"]),
        ({"devices": ["all"]}, ["all"]),
        ({"devices": ["nvidia.com/gpu=10"]}, ["10"]),
        ({"devices": ["0", "1"], "count": 2}, ["0", "1"]),
        ({"vendor": "nvidia", "count": 1}, ["0"]),
        ({"vendor": NVIDIA}, ["0"]),
    ],
)
def test_names(asked: dict[str, Any], names: list[str]) -> None:
    assert granted(asked, inventory(FILE)).names == [f"{NVIDIA}={name}" for name in names]


def test_nothing_asked_is_nothing_granted() -> None:
    found = granted(None, inventory(FILE))
    assert (found.names, found.keys, found.edits.items) == ([], [], ())


def test_keys_are_the_physical_devices() -> None:
    at = inventory(FILE)
    assert granted({"devices": ["0"]}, at).keys == granted({"devices": ["GPU-a"]}, at).keys == ["c195:0"]
    assert sorted(granted({"devices": ["all"]}, at).keys) == ["c195:0", "c195:1", "c195:10"]


def test_all_means_every_device_where_no_device_is_named_all() -> None:
    at = inventory(spec(NVIDIA, device("1", 1), device("0", 0), device("GPU-a", 0)))
    assert granted({"devices": ["all"]}, at).names == [f"{NVIDIA}=0", f"{NVIDIA}=1"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"count": 4},
            "asks for 4 devices of nvidia.com/gpu; this node has 3; "
            "they are nvidia.com/gpu=0, nvidia.com/gpu=1, nvidia.com/gpu=10",
        ),
        ({"count": 1, "devices": ["0", "1"]}, "asks for 1 devices and names 2"),
        ({"devices": ["0", "0"]}, "nvidia.com/gpu=0 asks for a device that another"),
        ({"devices": ["0", "GPU-a"]}, "nvidia.com/gpu=GPU-a asks for a device that another"),
        ({"devices": ["all", "1"]}, "nvidia.com/gpu=1 asks for a device that another"),
        ({"devices": ["1", "all"]}, "nvidia.com/gpu=all asks for a device that another"),
        ({"devices": ["nvidia.com/gpu=0", "0"]}, "nvidia.com/gpu=0 asks for a device that another"),
        ({"vendor": "nvdia"}, "unknown vendor 'nvdia'; known: nvidia, amd, intel, gaudi, habana, or a CDI kind"),
        ({"vendor": "\u202e"}, "unknown vendor"),
    ],
)
def test_wrong_requests(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        granted(asked, inventory(FILE))
    assert words in str(caught.value)
    assert str(caught.value).startswith("annotation a: ")


@pytest.mark.parametrize(
    "name",
    [
        "2",
        "GPU-",
        "x.com/y=0",
        "=",
        "a=b",
        "nvidia.com/gpu=",
        "nvidia.com/gpu=0\t",
        "nvidia.com/gpu=0 ",
        "..",
        "0\n",
        "/",
        "\u0660",
        "nvidia.com/gpu=0=1",
        " ",
    ],
)
def test_unknown_names_are_errors(name: str) -> None:
    with pytest.raises(ChandlerError):
        granted({"devices": [name]}, inventory(FILE))


def test_all_missing_names_are_reported_at_once() -> None:
    with pytest.raises(CdiError) as caught:
        granted({"devices": ["7", "0", "8"]}, inventory(FILE))
    assert "nvidia.com/gpu=7, nvidia.com/gpu=8" in str(caught.value)


def test_the_engines_names_come_first_and_count_as_well() -> None:
    at = inventory(FILE)
    found = granted({"devices": ["1"]}, at, (f"{NVIDIA}=0",))
    assert found.names == [f"{NVIDIA}=0", f"{NVIDIA}=1"]
    assert variables(found)["CUDA_VISIBLE_DEVICES"] == "0,1"
    with pytest.raises(RequestError, match="another of the names"):
        granted({"count": 1}, at, (f"{NVIDIA}=GPU-a",))
    assert granted(None, at, (f"{NVIDIA}=10",)).keys == ["c195:10"]


def test_devices_without_nodes_are_told_apart_by_kind() -> None:
    """Two devices that only set variables have no numbers; one name in two kinds is two devices."""
    at = inventory(
        *(
            spec(kind, {"name": "0", "containerEdits": {"env": [f"{name}=1"]}})
            for name, kind in (("A", "a.com/x"), ("B", "b.com/x"))
        )
    )
    found = granted({"devices": ["a.com/x=0", "b.com/x=0"]}, at)
    assert variables(found) == {"A": "1", "B": "1"}
    assert len(set(found.keys)) == 2


def test_common_edits_come_once() -> None:
    found = granted({"count": 2}, inventory(spec(NVIDIA, device("0", 0), device("1", 1), env=("X=1",))))
    assert [key for kind, key, _, _ in found.edits.items if kind == ENV][0] == "X"
    assert paths(found) == ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia1", "/dev/nvidiactl"]


@pytest.mark.parametrize(
    ("kind", "vendor", "expected"),
    [
        (NVIDIA, "nvidia", {"NVIDIA_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}),
        ("amd.com/gpu", "amd", {"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "0,1"}),
        ("intel.com/gpu", "intel", {"ZE_AFFINITY_MASK": "0,1"}),
        ("intel.com/gaudi", "habana", {}),
        ("example.com/gpu", "example.com/gpu", {}),
    ],
)
def test_visible_devices_count_from_zero(kind: str, vendor: str, expected: dict[str, str]) -> None:
    at = inventory(spec(kind, device("5", 5), device("6", 6), device("0", 0)))
    assert variables(granted({"vendor": vendor, "devices": ["6", "5"]}, at)) == expected


def test_variables_of_the_cdi_file_are_kept() -> None:
    at = inventory(
        spec(
            NVIDIA,
            device("0", 0),
            device("1", 1, env=("CUDA_VISIBLE_DEVICES=x",)),
            env=("NVIDIA_VISIBLE_DEVICES=void",),
        )
    )
    assert variables(granted({"devices": ["1"]}, at)) == {"NVIDIA_VISIBLE_DEVICES": "void", "CUDA_VISIBLE_DEVICES": "x"}
    assert variables(granted({"devices": ["0"]}, at)) == {"NVIDIA_VISIBLE_DEVICES": "void", "CUDA_VISIBLE_DEVICES": "0"}


def test_an_aggregate_shows_every_device() -> None:
    assert variables(granted({"devices": ["all"]}, inventory(FILE)))["CUDA_VISIBLE_DEVICES"] == "0,1,2"


# --- without CDI ----------------------------------------------------------------------------------------------


class Host:
    """A fake `look`: device nodes by path, each (major, minor, permission bits, group).

    `vendors`: the vendor by path, where the host knows it.
    """

    vendors: dict[str, str] = {}

    def __init__(self, **nodes: tuple[int, int, int, int]) -> None:
        self.nodes = {"/dev/" + name.replace("_", "/"): found for name, found in nodes.items()}
        self.asked: list[str] = []

    def __call__(self, path: str) -> tuple[str, int, int, int, int, str]:
        self.asked.append(path)
        if path not in self.nodes:
            raise HostError(f"{path} is not on this host")
        return ("c", *self.nodes[path], self.vendors.get(path, ""))


class Nvidia(Host):
    def __init__(self) -> None:
        super().__init__()
        names = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia0", "nvidia1", "nvidia2")
        self.nodes = {f"/dev/{name}": (500, n, 0o666, 0) for n, name in enumerate(names)}


@pytest.mark.parametrize(
    ("asked", "own"),
    [({}, ["0"]), ({"count": 2}, ["0", "1"]), ({"devices": ["2"]}, ["2"]), ({"devices": ["2", "0"]}, ["2", "0"])],
)
def test_nvidia_nodes(asked: dict[str, Any], own: list[str]) -> None:
    found = granted(asked, inventory(), look=Nvidia())
    assert paths(found) == ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"] + [
        f"/dev/nvidia{number}" for number in own
    ]
    assert found.names == [f"{NVIDIA}={number}" for number in own]
    assert found.keys == [f"c500:{3 + int(number)}" for number in own], (
        "what a CDI file with the same nodes would call them"
    )
    assert variables(found)["CUDA_VISIBLE_DEVICES"] == ",".join(str(number) for number in range(len(own)))
    assert found.edits.of(DEVICE)[1][2] == {
        "path": "/dev/nvidia-uvm",
        "type": "c",
        "major": 500,
        "minor": 1,
        "fileMode": 0o666,
    }, "numbers are the host's"
    assert found.edits.of(GID) == []


@pytest.mark.parametrize(
    ("mode", "group", "joins"),
    [
        (0o660, 44, True),
        (0o666, 44, False),
        (0o660, 0, False),
        (0o600, 44, False),
        (0o640, 44, False),
        (0o664, 44, True),
        (0o662, 44, True),
    ],
)
def test_groups_where_others_may_not_open(mode: int, group: int, joins: bool) -> None:
    look = Host(kfd=(234, 0, 0o666, 0), dri_renderD128=(226, 128, mode, group), dri_card0=(226, 0, 0o666, 0))
    found = granted({"vendor": "amd"}, inventory(), look=look)
    assert paths(found) == ["/dev/kfd", "/dev/dri/renderD128", "/dev/dri/card0"]
    assert [key for _, key, _, _ in found.edits.of(GID)] == ([44] if joins else [])
    assert found.edits.of(DEVICE)[1][2].get("gid") == (44 if joins else None)


def test_a_node_of_another_vendor_is_never_taken() -> None:
    look = Host(dri_renderD128=(226, 128, 0o666, 0), dri_card0=(226, 0, 0o666, 0))
    look.vendors = {"/dev/dri/renderD128": "0x1002", "/dev/dri/card0": "0x1002"}
    with pytest.raises(HostError, match="/dev/dri/renderD128 is a device of the PCI vendor 0x1002, not 0x8086"):
        granted({"vendor": "intel"}, inventory(), look=look)
    look.vendors = dict.fromkeys(look.vendors, "0x8086")
    assert granted({"vendor": "intel"}, inventory(), look=look).names == ["intel.com/gpu=0"]


@pytest.mark.parametrize(
    ("vendor", "asked"),
    [
        ("intel", ["/dev/dri/renderD131", "/dev/dri/card3"]),
        ("habana", ["/dev/accel/accel3", "/dev/accel/accel_controlD3"]),
    ],
)
def test_nodes_of_other_vendors(vendor: str, asked: list[str]) -> None:
    look = Host()
    look.nodes = {path: (1, 2, 0o666, 0) for path in asked}
    assert paths(granted({"vendor": vendor, "devices": ["3"]}, inventory(), look=look)) == asked


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"count": 4},
            "asks for 4 devices of nvidia.com/gpu, but /dev/nvidia3 is not on this host, "
            "and no CDI file describes nvidia.com/gpu; load the driver",
        ),
        ({"devices": ["9" * 500]}, "is not on this host"),
    ],
)
def test_a_device_that_the_host_lacks(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(HostError) as caught:
        granted(asked, inventory(), look=Nvidia())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (["GPU-1"], "without a CDI file for nvidia.com/gpu a device is a number, not 'GPU-1'"),
        (["all"], "a device is a number"),
        (["\u00b2"], "a device is a number"),
        (["\u0661"], "a device is a number"),
        (["-1"], "a device is a number"),
        (["../x"], "a device is a number"),
        (["0", "00"], "names one device twice"),
        (["0", "0"], "names one device twice"),
    ],
)
def test_wrong_devices_without_cdi(devices: list[str], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        granted({"devices": devices}, inventory(), look=Nvidia())
    assert words in str(caught.value)


def test_no_fallback_when_the_configuration_says_off() -> None:
    with pytest.raises(CdiError, match="nvidia.com/gpu=0"):
        granted({}, inventory(**{"gpu.fallback": "off"}), look=Nvidia())


@pytest.mark.parametrize("broken", [b"{", b"", spec(NVIDIA), spec("x", device("0", 0))])
def test_no_fallback_while_a_cdi_file_is_broken(broken: bytes) -> None:
    """It may be the file that describes the GPUs."""
    at = inventory(broken)
    assert at.problems
    with pytest.raises(CdiError, match="0.json"):
        granted({}, at, look=Nvidia())


def test_no_fallback_for_a_kind_that_has_no_table() -> None:
    with pytest.raises(CdiError, match="example.com/gpu=0"):
        granted({"vendor": "example.com/gpu"}, inventory(), look=Nvidia())


def test_no_fallback_where_cdi_describes_the_kind() -> None:
    look = Nvidia()
    with pytest.raises(ChandlerError):
        granted({"devices": ["2"]}, inventory(FILE), look=look)
    assert look.asked == []


def test_a_cdi_file_for_another_kind_does_not_stop_the_fallback() -> None:
    at = inventory(spec("example.com/x", device("0", 7)))
    found = granted({}, at, ("example.com/x=0",), Nvidia())
    assert found.names == ["example.com/x=0", f"{NVIDIA}=0"]
    assert "/dev/nvidia7" in paths(found) and "/dev/nvidia0" in paths(found)
