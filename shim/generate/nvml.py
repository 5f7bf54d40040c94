"""Asks NVIDIA's management library (NVML) in a child process.  No other module uses nvidia-ml-py.

The library opens device nodes, may take seconds, and can hang or crash with a broken driver.  A child that answers
through a pipe within a time limit keeps all of that away from a wrapper that is about to become the runtime.
Source: NVML API reference; nvidia-ml-py (imported as pynvml).
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from functools import partial
from typing import Any, Callable

from shim.errors import HostError
from shim.generate import pci
from shim.generate.model import NvmlUnavailable
from shim.shapes import Document

PATIENCE = 30.0  # seconds; without the persistence daemon each GPU takes one or two seconds to initialise
_MAX_ANSWER = 4 << 20  # bytes
_MAX_GPUS = 256
_MAX_LINKS = 18  # NVML_NVLINK_MAX_LINKS
_ATS = 2  # NVML_DEVICE_ADDRESSING_MODE_ATS


def ask(library: str, question: Callable[[Any], Document] = lambda pynvml: read(pynvml)) -> Document:
    """The result of `question` (`read`, `usage` or `links`) in a child process that loads the library at that path.

    Raises NvmlUnavailable where there is no nvidia-ml-py or no library, and HostError when the library fails or does
    not answer.
    """
    if not library:
        raise NvmlUnavailable("libnvidia-ml.so.1 is not on this host")
    try:
        import pynvml
    except ImportError:
        raise NvmlUnavailable("the Python package nvidia-ml-py is not installed") from None
    return in_child(lambda: _load_and_ask(pynvml, library, question), PATIENCE)


def _load_and_ask(pynvml: Any, library: str, question: Callable[[Any], Document]) -> Document:
    import ctypes

    try:
        pynvml.nvmlLib = ctypes.CDLL(library)
    except OSError as error:
        return {"missing": str(error)}
    return question(pynvml)


def in_child(work: Callable[[], Document], patience: float) -> Document:
    """The result of `work` in a forked child.  Raises HostError when it fails or takes more than `patience` seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):  # the library may print anything, and an engine reads our streams
                os.dup2(null, stream)
            data = json.dumps(work()).encode()
            while data:
                data = data[os.write(writer, data) :]
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        data = _read_until(reader, time.monotonic() + patience)
    finally:
        os.close(reader)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(child, 0)
    try:
        answer: Document = json.loads(data)
    except ValueError:
        raise HostError(
            "NVIDIA's management library crashed or gave no answer in time",
            "look at `dmesg` and `nvidia-smi`, or generate with --mode proc",
        ) from None
    if "missing" in answer:
        raise NvmlUnavailable(answer["missing"])
    if "failed" in answer:
        raise HostError(f"NVIDIA's management library: {answer['failed']}", answer.get("todo", ""))
    return answer


def _read_until(reader: int, deadline: float) -> bytes:
    """All bytes until the end of file; none when the deadline passes before that."""
    data = b""
    while len(data) <= _MAX_ANSWER:
        if not select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return b""
        part = os.read(reader, 65536)
        if not part:
            break
        data += part
    return data


def read(pynvml: Any) -> Document:
    """{"driver": version, "gpus": [GPU]} with the GPUs in NVML's order, or {"failed": sentence}.

    GPU: {index, minor, uuid, bdf, name, mig, coherent, parts: [{index, uuid, gi, ci}]}.  `bdf`: its PCI address.
    `mig`: whether MIG is on.  `parts`: its MIG devices, with the numbers of their GPU instance and compute instance.
    `coherent`: whether its addressing mode is ATS.
    `pynvml` is nvidia-ml-py or something that answers like it.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if getattr(error, "value", None) == getattr(pynvml, "NVML_ERROR_LIB_RM_VERSION_MISMATCH", 18):
            return {
                "failed": "the driver's libraries and its kernel module are of different versions",
                "todo": "reboot, or load the new kernel module",
            }
        return {"failed": _words(error)}
    try:
        count = min(pynvml.nvmlDeviceGetCount(), _MAX_GPUS)
        return {
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "gpus": [_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index), index) for index in range(count)],
        }
    except pynvml.NVMLError as error:
        return {"failed": _words(error)}
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            pass


def usage(pynvml: Any) -> Document:
    """{"gpus": [{minor, uuid, used, total, busy, processes: [[pid, bytes]]}]}, or {"failed": sentence}.

    `used`, `total`: bytes of memory.  `busy`: the percentage of the last moments in which the GPU computed.  Each is
    None where the GPU does not report it.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"failed": _words(error)}
    try:
        count = min(pynvml.nvmlDeviceGetCount(), _MAX_GPUS)
        return {"gpus": [_usage(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]}
    except pynvml.NVMLError as error:
        return {"failed": _words(error)}
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            pass


def links(pynvml: Any) -> Document:
    """{"links": {PCI address of a GPU: [PCI addresses at the other ends]}}, or {"failed": sentence}.

    The other ends of its active NVLinks are GPUs or switches.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"failed": _words(error)}
    try:
        count = min(pynvml.nvmlDeviceGetCount(), _MAX_GPUS)
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        return {
            "links": {
                pci.address(_text(pynvml.nvmlDeviceGetPciInfo(handle).busId)): _far_ends(pynvml, handle)
                for handle in handles
            }
        }
    except pynvml.NVMLError as error:
        return {"failed": _words(error)}
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError:
            pass


def _far_ends(pynvml: Any, handle: Any) -> list[str]:
    addresses = []
    for number in range(_MAX_LINKS):
        try:
            if pynvml.nvmlDeviceGetNvLinkState(handle, number) == 1:
                addresses.append(pci.address(_text(pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, number).busId)))
        except pynvml.NVMLError:
            continue  # this GPU has no link with that number, or cannot tell its other end
    return sorted(set(addresses))


def _usage(pynvml: Any, handle: Any) -> Document:
    memory = _unless_unsupported(pynvml, lambda: pynvml.nvmlDeviceGetMemoryInfo(handle), None)
    busy = _unless_unsupported(pynvml, lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu, None)
    processes: dict[int, Any] = {}
    for name in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses"):
        question = getattr(pynvml, name, None)  # older versions of nvidia-ml-py know only one of them
        if question is not None:
            for process in _unless_unsupported(pynvml, partial(question, handle), []):
                processes[process.pid] = process.usedGpuMemory
    return {
        "minor": pynvml.nvmlDeviceGetMinorNumber(handle),
        "uuid": _text(pynvml.nvmlDeviceGetUUID(handle)),
        "used": memory and memory.used,
        "total": memory and memory.total,
        "busy": busy,
        "processes": list(processes.items()),
    }


def _words(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)  # older versions return bytes


def _gpu(pynvml: Any, handle: Any, index: int) -> Document:
    mig = _unless_unsupported(pynvml, lambda: pynvml.nvmlDeviceGetMigMode(handle)[0] == 1, False)
    return {
        "index": index,
        "minor": pynvml.nvmlDeviceGetMinorNumber(handle),
        "uuid": _text(pynvml.nvmlDeviceGetUUID(handle)),
        "bdf": _text(pynvml.nvmlDeviceGetPciInfo(handle).busId),
        "name": _text(pynvml.nvmlDeviceGetName(handle)),
        "mig": mig,
        "coherent": _unless_unsupported(pynvml, lambda: _addressing(pynvml, handle) == _ATS, False),
        "parts": _parts(pynvml, handle) if mig else [],
    }


def _addressing(pynvml: Any, handle: Any) -> Any:
    ask_mode = getattr(pynvml, "nvmlDeviceGetAddressingMode", None)
    mode = ask_mode(handle) if ask_mode else 0
    return getattr(mode, "value", mode)


def _parts(pynvml: Any, handle: Any) -> list[Document]:
    instances = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            device = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except pynvml.NVMLError as error:
            if error.value in (pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                continue  # the GPU has fewer instances than it could have
            raise
        instances.append(
            {
                "index": index,
                "uuid": _text(pynvml.nvmlDeviceGetUUID(device)),
                "gi": pynvml.nvmlDeviceGetGpuInstanceId(device),
                "ci": pynvml.nvmlDeviceGetComputeInstanceId(device),
            }
        )
    return instances


def _unless_unsupported(pynvml: Any, question: Callable[[], Any], otherwise: Any) -> Any:
    """The answer to `question`, or `otherwise` for two errors.

    NOT_SUPPORTED: the GPU does not have the feature; FUNCTION_NOT_FOUND: the driver is older than the function.
    """
    try:
        return question()
    except pynvml.NVMLError as error:
        if error.value in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND):
            return otherwise
        raise
