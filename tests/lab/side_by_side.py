"""Run pytest over all tests in several processes, one file or folder at a time, and print each result at once.

    python tests/lab/side_by_side.py PROCESSES [PYTEST OPTION...]

It prints known skips before the first test runs. The whole output of failed tests, and the reasons of skips, come at
the end. The exit status is 0 only if everything passed.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Each of these files runs by itself. Other folders run as one part, because their files share what is built or booted,
# or because they are quick.
FILE_BY_FILE = ("tests/attacks", "tests/real", "tests/runtime", "tests/nri/test_containerd.py")
# These wait for engines and machines more than they compute, and need memory: they run one after the other, first.
WAITING = ("tests/vm", "tests/engines", "tests/kubernetes", "tests/nri/test_containerd.py")
# The longest of the others, so that none of them is begun last.
LONG = ("tests/attacks", "tests/runtime", "tests/state", "tests/real", "tests/packages")
REPORT = 60.0  # seconds without output after which the running parts are printed

NOTHING_SELECTED = 5  # pytest's exit status


def collect(options: Sequence[str]) -> dict[str, int]:
    """Test files and how many tests of each will run. Prints what will be skipped."""
    done = pytest("--collect-only", "-qq", *options)
    found = {name: int(count) for name, count in re.findall(r"^(tests/\S+\.py): (\d+)$", done.stdout, re.M)}
    if done.returncode not in (0, NOTHING_SELECTED):
        sys.exit(done.stdout)
    for line in done.stdout.splitlines():
        if "tests will be skipped: " in line:
            say(line)
    return found


def parts(files: Iterable[str]) -> dict[str, list[str]]:
    """Name of a file or folder to the files that one process runs together. Order: WAITING, LONG, the rest."""
    found: dict[str, list[str]] = {}
    for name in files:
        found.setdefault(name if name.startswith(FILE_BY_FILE) else os.path.dirname(name), []).append(name)
    return dict(sorted(found.items(), key=lambda part: (part[0] not in WAITING, not part[0].startswith(LONG))))


class Runs:
    """Runs the parts one by one; only the first process takes those of WAITING."""

    def __init__(self, parts: dict[str, list[str]], options: Sequence[str]) -> None:
        self.parts, self.options, self.total = dict(parts), options, len(parts)
        self.lock = threading.Lock()
        self.running: dict[str, float] = {}
        self.ended: dict[str, subprocess.CompletedProcess[str]] = {}
        self.said = time.monotonic()

    def take(self, first: bool) -> tuple[str, list[str]]:
        """The next part; '' if there is none."""
        with self.lock:
            name = next((name for name in self.parts if first or name not in WAITING), "")
            if name:
                self.running[name] = time.monotonic()
            return name, self.parts.pop(name, [])

    def work(self, first: bool) -> None:
        while (part := self.take(first))[0]:
            name, files = part
            done = pytest("-rs", *files, *self.options)
            with self.lock:
                del self.running[name]
                self.ended[name] = done
                lines = done.stdout.strip().splitlines()
                result = lines[-1].strip("= ") if lines else f"status {done.returncode}"
                self.tell(f"[{len(self.ended)} of {self.total}] {name}: {result}")

    def tell(self, text: str) -> None:
        self.said = time.monotonic()
        say(text)

    def all(self, processes: int) -> bool:
        """Run everything; returns whether all passed."""
        threads = [threading.Thread(target=self.work, args=(number == 0,), daemon=True) for number in range(processes)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            with self.lock:
                if time.monotonic() - self.said > REPORT and self.running:
                    self.tell(
                        "running "
                        + ", ".join(
                            f"{name} for {time.monotonic() - since:.0f} s" for name, since in self.running.items()
                        )
                    )
        return len(self.ended) == self.total and all(
            done.returncode in (0, NOTHING_SELECTED) for done in self.ended.values()
        )

    def summary(self) -> None:
        skipped: collections.Counter[str] = collections.Counter()
        for name, done in self.ended.items():
            for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+ (.*)$", done.stdout, re.M):
                skipped[reason] += int(count)
            if done.returncode not in (0, NOTHING_SELECTED):
                say(f"\n{name} failed (status {done.returncode}):\n{done.stdout}")
        for reason, count in skipped.most_common():
            say(f"{count} skipped: {reason}")
        failed = [name for name, done in self.ended.items() if done.returncode not in (0, NOTHING_SELECTED)]
        say(f"failed: {' '.join(failed)}" if failed else "all passed")


def pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--color=no", *arguments],
        check=False,
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def say(text: str) -> None:
    print(text, flush=True)


def main(processes: int, options: Sequence[str]) -> int:
    files = collect(options)
    runs = Runs(parts(files), options)
    say(f"{sum(files.values())} tests of {len(files)} files in {runs.total} parts, {processes} at a time")
    passed = runs.all(processes)
    runs.summary()
    return 0 if passed and files else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
