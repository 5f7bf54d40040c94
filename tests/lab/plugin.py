"""chandler-nri as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

from lab.cri import lines
from lab.engine import read

PATIENCE = 30.0


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Evaluate `condition` again and again, until it is true; returns its value."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come about within {patience:.0f} s"
        time.sleep(0.01)
    return value


class Plugin:
    def __init__(self, program: str, log: str, socket: str, *options: str) -> None:
        self.command = [program, "--socket", socket, *options]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, serving: bool = True) -> Plugin:
        """Start the plugin; returns when the runtime has registered it."""
        before = self.times_serving()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, env={"PATH": "/usr/bin:/bin"}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if serving:
            self.serving(before)
        return self

    def times_serving(self) -> int:
        return sum(str(record.get("msg", "")).startswith("serving ") for record in self.records())

    def serving(self, before: int) -> None:
        """Wait until the runtime has registered it once more than `before` times."""
        until(lambda: self.times_serving() > before or self.ended(), "serving")

    def ended(self) -> bool:
        assert self.process is None or self.process.poll() is None, f"the plugin has ended: {read(self.log)[-2000:]}"
        return False

    def records(self) -> list[dict[str, Any]]:
        return list(lines(read(self.log)))

    def record(self, **wanted: Any) -> dict[str, Any]:
        """Wait for the first log record with these values."""

        def find() -> dict[str, Any] | None:
            return next(
                (record for record in self.records() if all(record.get(key) == value for key, value in wanted.items())),
                None,
            )

        found: dict[str, Any] = until(find, f"a log record with {wanted}")
        return found

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop the plugin; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        self.process = None
        return code

    def resident(self) -> int:
        """Resident memory in kilobytes."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))


def launcher(directory: str, program: str, name: str, options: Sequence[str] = ()) -> str:
    """Write an executable that the runtime launches as the plugin `name` (NN-name)."""
    path = os.path.join(directory, name)
    with open(path, "w", encoding="utf-8") as script:
        script.write(f"#!/bin/sh\nexec {program} {' '.join(options)}\n")
    os.chmod(path, 0o755)
    return path
