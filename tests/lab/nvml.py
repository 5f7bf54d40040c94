"""NVIDIA's NVML library as a fake that describes any GPUs and fails where the test says so."""

from __future__ import annotations

from typing import Any


class Library:
    """The functions of nvidia-ml-py that Chandler uses.

    The GPUs are given as a list; each has a list of MIG instances, or None.
    """

    NVML_ERROR_INVALID_ARGUMENT, NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND = (
        2,
        3,
        6,
        13,
    )
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

    class NVMLError(Exception):
        def __init__(self, value: int) -> None:
            super().__init__(f"NVML error {value}")
            self.value = value

    def __init__(self, *gpus: list[tuple[int, int]] | None, **moods: Any) -> None:
        self.gpus = gpus
        self.moods = moods
        self.shut = False

    def _mood(self, name: str) -> None:
        if name in self.moods:
            raise self.NVMLError(self.moods[name])

    def nvmlInit(self) -> None:
        self._mood("init")

    def nvmlShutdown(self) -> None:
        self.shut = True

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return b"550.54.15" if self.moods.get("bytes") else "550.54.15"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if self.moods.get("lost") == index:
            raise self.NVMLError(15)
        return (index,)

    def nvmlDeviceGetMinorNumber(self, handle: Any) -> int:
        return 7 - int(handle[0])

    def nvmlDeviceGetUUID(self, handle: Any) -> str | bytes:
        text = f"{'MIG' if len(handle) > 1 else 'GPU'}-{'-'.join(map(str, handle))}"
        return text.encode() if self.moods.get("bytes") else text

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        class Info:
            busId = b"00000000:1B:00.0" if self.moods.get("bytes") else "00000000:1B:00.0"

        return Info

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        self._mood("mig")
        return [0 if self.gpus[handle[0]] is None else 1, 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:
        parts = self.gpus[handle[0]] or []
        if index >= len(parts):
            raise self.NVMLError(self.NVML_ERROR_NOT_FOUND)
        return (*handle, index)

    def nvmlDeviceGetGpuInstanceId(self, handle: Any) -> int:
        parts = self.gpus[handle[0]]
        assert parts is not None
        return int(parts[handle[1]][0])

    def nvmlDeviceGetComputeInstanceId(self, handle: Any) -> int:
        parts = self.gpus[handle[0]]
        assert parts is not None
        return int(parts[handle[1]][1])
