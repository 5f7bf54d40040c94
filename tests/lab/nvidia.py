"""NVIDIA's commands as fakes in a directory of a test's own, whose behaviour the test can change."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from typing import Any

FAKES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fakes")


class Commands:
    """`directory` and every directory above it must belong to root."""

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        self.control, self.smi = (os.path.join(directory, name) for name in ("nvidia-cuda-mps-control", "nvidia-smi"))
        for path in (self.control, self.smi):
            if not os.path.exists(path):
                shutil.copy(os.path.join(FAKES, os.path.basename(path)), path)
                os.chmod(path, 0o755)

    def config(self, **more: Any) -> dict[str, Any]:
        return {"gpu.mps-control": self.control, "gpu.nvidia-smi": self.smi, **more}

    def toml(self, mps: str, **more: Any) -> str:
        lines = [
            "[gpu]",
            'allocator = "leases"',
            f'mps = "{mps}"',
            f'mps-control = "{self.control}"',
            f'nvidia-smi = "{self.smi}"',
        ]
        return (
            "\n".join(lines + [f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in more.items()]) + "\n"
        )

    def mood(self, program: str, **mood: Any) -> None:
        """Set how a command behaves from now on."""
        with open(program + ".mood.new", "w", encoding="utf-8") as file:
            json.dump(mood, file)
        os.rename(program + ".mood.new", program + ".mood")

    def gpus(self) -> dict[str, dict[str, Any]]:
        """Compute mode and time slice of every GPU that was ever changed."""
        try:
            with open(self.smi + ".state", encoding="utf-8") as file:
                found: dict[str, dict[str, Any]] = json.load(file)
                return found
        except OSError:
            return {}

    def set_gpus(self, state: dict[str, Any]) -> None:
        with open(self.smi + ".state", "w", encoding="utf-8") as file:
            json.dump(state, file)

    def calls(self, program: str) -> list[str]:
        try:
            with open(program + ".calls", encoding="utf-8") as file:
                return file.read().splitlines()
        except OSError:
            return []

    def started(self) -> list[dict[str, Any]]:
        """What each daemon saw at its start."""
        return [json.loads(line.partition(" ")[2]) for line in self.calls(self.control) if line.startswith("start ")]

    def running(self) -> list[int]:
        """The pids of the living daemons."""
        return [seen["pid"] for seen in self.started() if self._lives(seen["pid"])]

    def _lives(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                if file.read().rpartition(")")[2].split()[0] in "ZX":
                    return False
            with open(f"/proc/{pid}/cmdline", encoding="ascii") as file:
                return self.control in file.read().split("\0")
        except OSError:
            return False

    def forget(self) -> None:
        """Reset the commands, as if they had never been called."""
        for path in (self.control, self.smi):
            for kept in (".mood", ".calls", ".state"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + kept)

    def end(self) -> None:
        """End the daemons that a failed test left."""
        for pid in self.running():
            os.kill(pid, signal.SIGKILL)
