"""shim.generate.nvml with a library that answers like NVIDIA's, in every state."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import subprocess
import time
from typing import Any

import pytest
from lab.nvml import Library

from shim.errors import HostError
from shim.generate import nvml
from shim.generate.model import NvmlUnavailable

UUID = "GPU-5eed0000-0000-0000-0000-000000000000"


def test_gpus_and_their_instances() -> None:
    library = Library(None, [(7, 0), (9, 1)], [])
    answer = nvml.read(library)
    assert answer["driver"] == "550.54.15" and library.shut
    assert answer["gpus"][0] == {
        "index": 0,
        "minor": 7,
        "uuid": "GPU-0",
        "bdf": "00000000:1B:00.0",
        "name": "NVIDIA H100 80GB HBM3",
        "mig": False,
        "coherent": False,
        "parts": [],
    }
    assert answer["gpus"][1]["parts"] == [
        {"index": 0, "uuid": "MIG-1-0", "gi": 7, "ci": 0},
        {"index": 1, "uuid": "MIG-1-1", "gi": 9, "ci": 1},
    ]
    assert answer["gpus"][2]["mig"] and answer["gpus"][2]["parts"] == []


def test_an_older_library_gives_bytes() -> None:
    answer = nvml.read(Library([(7, 0)], bytes=True))
    assert answer["gpus"][0]["uuid"] == "GPU-0" and answer["gpus"][0]["parts"][0]["uuid"] == "MIG-0-0"


@pytest.mark.parametrize("number", [3, 13])
def test_no_mig_is_no_error(number: int) -> None:
    assert nvml.read(Library(None, mig=number))["gpus"][0]["mig"] is False


@pytest.mark.parametrize("mode, coherent", [(0, False), (1, False), (2, True), (3, None)])
def test_coherent_memory(mode: int, coherent: bool | None) -> None:
    class Newer(Library):
        def nvmlDeviceGetAddressingMode(self, handle: Any) -> Any:
            if mode == 3:
                raise self.NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
            return type("Mode", (), {"value": mode})

    assert nvml.read(Newer(None))["gpus"][0]["coherent"] is bool(coherent)


def test_failures_are_sentences() -> None:
    assert (
        nvml.read(Library(init=18))["failed"]
        == "the driver's libraries and its kernel module are of different versions"
    )
    assert nvml.read(Library(init=9))["failed"] == "NVML error 9"
    lost = Library(None, None, lost=1)
    assert nvml.read(lost)["failed"] == "NVML error 15" and lost.shut
    assert nvml.read(Library(None, mig=15))["failed"] == "NVML error 15"


def test_the_child_answers() -> None:
    library = Library(None, [(7, 0)])
    assert nvml.in_child(lambda: nvml.read(library), 10) == nvml.read(library)


def test_a_failed_child_is_an_error() -> None:
    with pytest.raises(HostError, match="different versions; reboot"):
        nvml.in_child(lambda: nvml.read(Library(init=18)), 10)
    with pytest.raises(NvmlUnavailable, match="no such library"):
        nvml.in_child(lambda: {"missing": "no such library"}, 10)


def crash() -> dict[str, Any]:
    os.kill(os.getpid(), 9)
    return {}


def wait() -> dict[str, Any]:
    time.sleep(60)
    return {}


def chatter() -> dict[str, Any]:
    os.write(1, b"noise")
    os.write(2, b"noise")
    raise RuntimeError("a defect")


@pytest.mark.parametrize("work", [crash, wait, chatter, lambda: {"x": "y" * (5 << 20)}])
def test_a_child_that_misbehaves(work: Any, capfd: pytest.CaptureFixture[str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="crashed or gave no answer in time"):
        nvml.in_child(work, 0.3)
    assert len(os.listdir("/proc/self/fd")) == before
    assert capfd.readouterr().out == ""
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_without_a_library_there_is_no_answer() -> None:
    with pytest.raises(NvmlUnavailable, match="libnvidia-ml.so.1 is not on this host"):
        nvml.ask("")


# --- nvidia-ml-py itself, over a library of our own ------------------------------------------------------------

SOURCE = r"""
#include <stdio.h>
#include <string.h>
typedef void *handle;   /* the GPU's number + 1; 100 more for each of its instances */
int nvmlInitWithFlags(unsigned f) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *v, unsigned n) { strcpy(v, "550.54.15"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, handle *h) { *h = (handle)(long)(i + 1); return 0; }
int nvmlDeviceGetMinorNumber(handle h, unsigned *n) { *n = (long)h - 1; return 0; }
int nvmlDeviceGetUUID(handle h, char *v, unsigned n) {
    snprintf(v, n, "%s-%ld", (long)h > 100 ? "MIG" : "GPU", (long)h); return 0; }
int nvmlDeviceGetName(handle h, char *v, unsigned n) { strcpy(v, "NVIDIA H100 80GB HBM3"); return 0; }
struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
int nvmlDeviceGetPciInfo_v3(handle h, struct pci *p) {
    memset(p, 0, sizeof *p); sprintf(p->bus_id, "00000000:%02lX:00.0", 0x1a + (long)h); return 0; }
int nvmlDeviceGetMigMode(handle h, unsigned *now, unsigned *then) {
    if ((long)h == 1) return 3; *now = *then = 1; return 0; }
int nvmlDeviceGetMaxMigDeviceCount(handle h, unsigned *n) { *n = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(handle h, unsigned i, handle *m) {
    if (i != 0 && i != 3) return 6; *m = (handle)((long)h + 100 * (i + 1)); return 0; }
int nvmlDeviceGetGpuInstanceId(handle h, unsigned *n) { *n = (long)h / 100; return 0; }
int nvmlDeviceGetComputeInstanceId(handle h, unsigned *n) { *n = 0; return 0; }
"""


@pytest.mark.parametrize("init", [0, 9, 18])
def test_the_real_package_over_a_library_of_ours(init: int, tmp_path: pathlib.Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("not installed: gcc")
    if importlib.util.find_spec("pynvml") is None:
        pytest.skip("nvidia-ml-py is optional, and not here")
    (tmp_path / "nvml.c").write_text(SOURCE)
    library = str(tmp_path / "libnvidia-ml.so.1")
    subprocess.run(
        [gcc, "-shared", "-fPIC", "-w", f"-DINIT={init}", "-o", library, str(tmp_path / "nvml.c")], check=True
    )
    if init:
        with pytest.raises(HostError, match="different versions" if init == 18 else "Driver Not Loaded"):
            nvml.ask(library)
        return
    answer = nvml.ask(library)
    assert answer["driver"] == "550.54.15"
    assert [(gpu["minor"], gpu["uuid"], gpu["bdf"], gpu["mig"], gpu["coherent"]) for gpu in answer["gpus"]] == [
        (0, "GPU-1", "00000000:1B:00.0", False, False),
        (1, "GPU-2", "00000000:1C:00.0", True, False),
    ]
    assert answer["gpus"][1]["parts"] == [
        {"index": 0, "uuid": "MIG-102", "gi": 1, "ci": 0},
        {"index": 3, "uuid": "MIG-402", "gi": 4, "ci": 0},
    ]
    with pytest.raises(NvmlUnavailable, match="No such file|cannot open"):
        nvml.ask(str(tmp_path / "absent.so"))
