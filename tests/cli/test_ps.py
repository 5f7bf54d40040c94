"""chandler ps: which container has which GPU, how, and how much it uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from lab import REPOSITORY, served

from shim.cli import engine_gpus, ps
from shim.errors import HostError
from shim.generate import nvml
from shim.state import ledger


class Library:
    """nvidia-ml-py over two GPUs; `lacks`: the queries that the first GPU does not support."""

    NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_FUNCTION_NOT_FOUND = 3, 13

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(f"NVML error {value}")
            self.value = value

    def __init__(self, *processes: list[tuple[int, Any]], lacks: tuple[str, ...] = (), broken: bool = False) -> None:
        self.processes, self.lacks, self.broken, self.shut = processes, lacks, broken, False

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlDeviceGetMinorNumber": lambda handle: handle,
            "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}".encode(),
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=5 << 20, total=80 << 30),
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=40 + handle),
            "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
                SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes[handle]
            ],
        }
        if name not in answers:
            raise AttributeError(name)

        def answer(handle: int) -> Any:
            if handle == 0 and name in self.lacks:
                raise self.NVMLError(3)
            return answers[name](handle)

        return answer

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError(9)

    def nvmlShutdown(self) -> None:
        self.shut = True

    def nvmlDeviceGetCount(self) -> int:
        return len(self.processes)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index


def test_what_nvml_is_asked() -> None:
    library = Library([(7, 3 << 20)], [(8, None)])
    assert nvml.usage(library) == {
        "gpus": [
            {"minor": 0, "uuid": "GPU-0", "used": 5 << 20, "total": 80 << 30, "busy": 40, "processes": [(7, 3 << 20)]},
            {"minor": 1, "uuid": "GPU-1", "used": 5 << 20, "total": 80 << 30, "busy": 41, "processes": [(8, None)]},
        ]
    }
    assert library.shut
    silent = nvml.usage(
        Library(
            [],
            [],
            lacks=("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetComputeRunningProcesses"),
        )
    )
    assert silent["gpus"][0] == {
        "minor": 0,
        "uuid": "GPU-0",
        "used": None,
        "total": None,
        "busy": None,
        "processes": [],
    }
    assert nvml.usage(Library(broken=True)) == {"failed": "NVML error 9"}


LEASES: list[Any] = [
    {
        "token": "a",
        "owner": "oci",
        "id": "c1",
        "root": "/r",
        "runtime": "/x",
        "pid": 1,
        "started": 0,
        "names": ["nvidia.com/gpu=0"],
        "keys": ["c195:0"],
        "since": 1_700_000_000,
        "mode": "mps",
        "words": "",
        "uid": 0,
        "limits": {"mps_active_thread_percentage": 30, "mps_pinned_memory": 1 << 30},
        "held": "advisory",
    },
    {
        "token": "b",
        "owner": "nri",
        "id": "c2",
        "pod": "p",
        "root": "",
        "names": ["nvidia.com/gpu=1"],
        "keys": ["c195:1+c237:4"],
        "since": 1_700_000_000,
    },
]
RECORDS: list[Any] = [
    {
        "id": "c1",
        "root": "/r",
        "runtime": "/x",
        "devices": ["nvidia.com/gpu=0"],
        "physical": ["c195:0"],
        "time": 1_700_000_000,
    },
    {
        "id": "c3",
        "root": "/r",
        "runtime": "/x",
        "devices": ["nvidia.com/gpu=1"],
        "physical": ["c195:1"],
        "time": 1_700_000_000,
    },
    {"id": "c4", "root": "/r", "runtime": "/x", "devices": [], "physical": [], "time": 1_700_000_000},
]


def rows(pids: dict[str, int], *processes: list[tuple[int, Any]]) -> list[dict[str, Any]]:
    found = ps.containers(LEASES, RECORDS)
    for row in found:
        row["pid"], row["status"] = pids.get(row["id"], 0), "running"
    family = {100: 7, 101: 7, 102: 7, 300: 1}
    ps.attribute(found, nvml.usage(Library(*processes))["gpus"] if processes else [], lambda pid: family.get(pid, pid))
    return found


def test_leased_and_not_leased() -> None:
    found = {
        row["id"]: row for row in rows({"c1": 100}, [(101, 2 << 20), (102, 3 << 20), (300, 7 << 20)], [(300, 1 << 20)])
    }
    assert list(found) == ["c1", "c2", "c3", "process 300"]
    assert (found["c1"]["mode"], found["c1"]["memory"], found["c1"]["busy"]) == ("mps", 5 << 20, 40)
    assert (found["c2"]["mode"], found["c2"]["memory"], found["c2"]["busy"]) == ("exclusive", None, 41)
    assert found["c3"]["mode"] == "not leased", "this container has a grant without a lease"
    assert (found["process 300"]["mode"], found["process 300"]["memory"]) == ("not leased", 8 << 20), (
        "this process is in none of the listed containers"
    )


def test_the_table() -> None:
    answer = {"containers": rows({"c1": 100}, [(101, 2 << 20)], []), "notes": ["something"]}
    lines = ps.text(answer, False).splitlines()
    assert lines[0].split() == ["CONTAINER", "DEVICES", "MODE", "LIMITS", "PID", "STATUS", "MEMORY", "BUSY", "SINCE"]
    assert (
        lines[1].split("  ")[0] == "c1"
        and "30% threads, 1024Mi (advisory)" in lines[1]
        and "2Mi" in lines[1]
        and "40%" in lines[1]
    )
    assert lines[1].endswith("2023-11-14 22:13:20Z") and lines[-1] == "note: something"
    assert (
        len({line.find("mps") if number == 1 else line.find("exclusive") for number, line in enumerate(lines[1:3], 1)})
        == 1
    ), "the columns must be aligned"
    coloured = ps.text(answer, True)
    assert "\33[36mmps" in coloured and coloured.startswith("\33[1mCONTAINER")


def test_without_nvml() -> None:
    found = rows({"c1": 100})
    assert [(row["memory"], row["busy"]) for row in found] == [(None, None)] * 3
    notes: list[str] = []
    gpus = ps._usage(notes)
    assert gpus or "memory and utilisation are not known" in notes[0]


ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([f"cri-containerd-{ID}.scope", "kubepods.slice"], ID),
        ([f"crio-{ID}.scope"], ID),
        ([ID, "docker"], ID),
        ([f"libpod-{ID}.scope"], ID),
        ([f"system.slice:docker:{ID}"], ID),
        (["web", "own"], "web"),
        ([], "process 5"),
    ],
)
def test_ids_of_containers(names: list[str], wanted: str) -> None:
    assert engine_gpus.container_id(names, 5) == wanted
    assert engine_gpus.is_called(names, wanted) or not names
    assert not engine_gpus.is_called(names, "c1") and not engine_gpus.is_called([f"x-{ID}.scope"], "cdef")


def test_gpus_that_the_engine_gave() -> None:
    """c1 has its own GPUs and one more. c2's lease is the plugin's, without a pid. The last container has no record."""
    found = ps.containers(LEASES, RECORDS[:1])
    for row in found:
        row["pid"], row["status"] = {"c1": 100}.get(row["id"], 0), ""
    found[1]["id"] = ID
    gpus = {"c195:0": "nvidia.com/gpu=0", "c195:1": "nvidia.com/gpu=1", "c226:128": "amd.com/gpu=0"}
    engine_gpus.add_rows(
        found,
        [
            {"pid": 101, "names": ["c1"], "numbers": ["c195:0", "c195:1"]},
            {"pid": 200, "names": [f"crio-{ID}.scope"], "numbers": ["c195:1"]},
            {"pid": 300, "names": ["other"], "numbers": ["c195:0", "c226:128"]},
            {"pid": 400, "names": ["without"], "numbers": []},
        ],
        gpus,
        lambda pid: {101: 100}.get(pid, pid),
    )
    assert [(row["id"], row["pid"], row["mode"], row["devices"]) for row in found] == [
        ("c1", 100, "mps", ["nvidia.com/gpu=0"]),
        (ID, 200, "exclusive", ["nvidia.com/gpu=1"]),
        ("c1", 101, "not leased", ["nvidia.com/gpu=1"]),
        ("other", 300, "not leased", ["amd.com/gpu=0", "nvidia.com/gpu=0"]),
    ]


def test_gpus_are_named_by_cdi_files_or_else_by_their_nodes() -> None:
    nodes = {
        "/dev/nvidia0": (195, 0, ""),
        "/dev/nvidia1": (195, 1, ""),
        "/dev/dri/card0": (226, 0, "0x8086"),
        "/dev/dri/renderD128": (226, 128, "0x8086"),
        "/dev/dri/card2": (226, 2, "0x1002"),
        "/dev/dri/renderD130": (226, 130, "0x1002"),
        "/dev/dri/card3": (226, 3, ""),
        "/dev/dri/renderD131": (226, 131, ""),
    }

    def look(path: str) -> tuple[str, int, int, int, int, str]:
        if path not in nodes:
            raise HostError(path)
        major, minor, vendor = nodes[path]
        return "c", major, minor, 0o666, 0, vendor

    assert engine_gpus.gpus_of_node(served.inventory(served.spec(gpus=1)), look) == {
        "c195:0": "nvidia.com/gpu=0",
        "c195:1": "nvidia.com/gpu=1",
        "c226:2": "amd.com/gpu=2",
        "c226:130": "amd.com/gpu=2",
        "c226:0": "intel.com/gpu=0",
        "c226:128": "intel.com/gpu=0",
    }


def test_missing_psutil_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    notes: list[str] = []
    assert engine_gpus.containers({}, notes) == [] and "install python3-psutil" in notes[0]


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ('echo \'{"pid": 42, "status": "running"}\'', (42, "running")),
        ("exit 1", (0, "unknown")),
        ("echo []", (0, "unknown")),
        ('echo \'{"status": "stopped"}\'', (0, "stopped")),
    ],
)
def test_the_status_comes_from_the_runtime(tmp_path: Any, script: str, wanted: Any) -> None:
    runtime = tmp_path / "runtime"
    runtime.write_text(f"#!/bin/sh\n{script}\n")
    runtime.chmod(0o755)
    (tmp_path / "c1").mkdir()
    row = {"by": "oci", "runtime": str(runtime), "root": str(tmp_path), "id": "c1"}
    assert ps.state(row) == wanted
    assert ps.state({**row, "id": "c2"}) == (0, "gone")
    assert ps.state({**row, "by": "nri"}) == (0, "")


def test_the_command(tmp_path: Any) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'state-dir = "{tmp_path}/state"\n')
    (tmp_path / "state/grants").mkdir(parents=True)
    ledger.Ledger(str(tmp_path / "state")).write(LEASES)
    (tmp_path / "state/grants/x.json").write_text(json.dumps(RECORDS[1]))
    (tmp_path / "state/grants/y.json").write_text("rubbish")
    program = os.path.join(REPOSITORY, "packaging/bin/chandler")
    environment = {"CHANDLER_CONFIG": str(config), "PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(
        [program, "ps", "--format", "json"],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert [row["id"] for row in json.loads(done.stdout)["containers"]] == ["c1", "c2"], "c3 has no lease and is gone"
    done = subprocess.run(
        [program, "ps"], check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    assert "\33" not in done.stdout and done.stdout.startswith("CONTAINER")
    done = subprocess.run(
        [program, "leases"], check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    head, first, second = done.stdout.splitlines()
    assert head.split() == ["CONTAINER", "DEVICES", "MODE", "LIMITS", "SINCE", "BY", "STATE"]
    assert (
        "  mps  " in first
        and "30% threads, 1024Mi (advisory)" in first
        and "exclusive" in second
        and second.endswith("held")
    )
