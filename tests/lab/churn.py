"""Containers created and deleted in parallel and killed at any time, and a watcher that asks the kernel what each has.

The watcher uses neither the ledger's rules nor the grants nor the runtime's state. A process belongs to the container
in whose control group it is. Its pid, start time and control group identify it. Its GPUs are those that config.json and
the device cgroup give it. While it lives, no other container may have one of them, and the ledger must list them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from lab import bundle
from lab.engine import PATIENCE, Engine
from lab.install import Installation
from lab.node import Node

PARALLEL = 16
# How many creates by default. For a long run: CHANDLER_CHURN=10000 tests/run tests/real/test_leases.py -k churn
COUNT = int(os.environ.get("CHANDLER_CHURN", "150"))
SEED = int(os.environ.get("CHANDLER_CHURN_SEED", "5"))
# A poststop hook is killed, or runs after the next container with its id has started, or does its work.
HOOK = """#!/bin/sh
if [ "$1" = release ]; then
    case $(($$ % {one_in})) in
    0) /bin/cat >/dev/null; kill -9 $$ ;;
    1) sleep 0.4 ;;
    2) exec /usr/bin/timeout -s KILL 0.05 {hook}.real "$@" ;;
    esac
fi
exec {hook}.real "$@"
"""


class Live(NamedTuple):
    """A living process of a container. `request`: the request in the bundle; `gpus`: indexes of the node's GPUs."""

    pid: int
    started: str
    group: str
    request: dict[str, Any]
    gpus: frozenset[int]

    @property
    def mode(self) -> str:
        return str(self.request.get("sharing", "exclusive"))

    def still(self) -> bool:
        return start_of(self.pid) == self.started and group_of(self.pid) == self.group


def start_of(pid: int) -> str:
    """The start time of a process; '' if it is gone or a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if not fields or fields[0] in "ZX" else fields[19]


def group_of(pid: int) -> str:
    """The name of our container's control group that a process is in, '' if it is in none."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            table = file.read()
    except OSError:
        return ""
    at = table.find("/" + bundle.GROUPS)
    return table[at:].split("\n", 1)[0].split("/")[1] if at >= 0 else ""


class Churn:
    """`ledger`: the file of leases; `wishes`: makes the request of each container."""

    def __init__(
        self,
        engine: Engine,
        installation: Installation,
        ledger: str,
        node: Node,
        workdir: str,
        wishes: Callable[[random.Random], dict[str, Any]],
        seed: int,
    ) -> None:
        self.engine, self.installation, self.ledger, self.workdir, self.seed = (
            engine,
            installation,
            ledger,
            workdir,
            seed,
        )
        self.wishes = wishes
        self.gpus = {(gpu.major, gpu.minor): number for number, gpu in enumerate(node.gpus)}
        self.root = bundle.rootfs(os.path.join(workdir, "image"))
        self.wrong: list[str] = []
        self.lives = 0  # creates that have begun: each has a number of its own
        self.bundles: dict[str, bundle.Bundle] = {}  # by control group
        self.created = self.seen = self.together = 0

    def spoil_hooks(self, one_in: int = 6) -> None:
        hook = self.installation.program("chandler-hook")
        os.rename(hook, hook + ".real")
        with open(hook, "w", encoding="ascii") as file:
            file.write(HOOK.format(hook=hook, one_in=one_in))
        os.chmod(hook, 0o755)

    # --- what happens -----------------------------------------------------------------------------------------

    def run(self, count: int) -> None:
        """`count` creates with their deletes, PARALLEL at a time; then every container that is left is deleted."""
        over = threading.Event()
        watching = threading.Thread(target=self._watch, args=(over,))
        watching.start()
        try:
            with ThreadPoolExecutor(PARALLEL) as pool:
                list(pool.map(self._life, range(self.lives, self.lives + count)))
            self.lives += count
            with ThreadPoolExecutor(PARALLEL) as pool:
                list(
                    pool.map(
                        lambda name: self.engine.call("delete", "--force", name, check=False), list(self.engine.started)
                    )
                )
        finally:
            over.set()
            watching.join()
        self.engine.started.clear()
        self._end_left()

    def _processes(self) -> list[Live]:
        """All living processes of our containers."""
        return [one for one in map(self._live, filter(str.isdigit, os.listdir("/proc"))) if one]

    def _end_left(self, group: str = "") -> None:
        """End containers that a killed runtime left without state of its own.

        They hold their GPUs rightly, and in the end none would be free for others. `group`: only in this control group.
        """
        until = time.monotonic() + PATIENCE
        while left := [one for one in self._processes() if not group or one.group == group]:
            for one in left:
                try:
                    os.kill(one.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            assert time.monotonic() < until, f"{left} do not end"

    def _life(self, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        name = f"again{number % 5}" if number % 2 else f"c{number}"
        made = bundle.make(
            os.path.join(self.workdir, f"b{number}"),
            ["sleep", "60"],
            bundle.request(resources={"gpu": self.wishes(rng)}),
            root=self.root,
        )
        group = made.config["linux"]["cgroupsPath"].strip("/")
        self.bundles[group] = made
        self.engine.started[name] = None
        create = self._call(
            rng if rng.random() < 0.3 else None, "create", "--bundle", made.directory, "--pid-file", made.pid_file, name
        )
        self.created += create == 0
        if create == 0 and number % 4 == 0:
            self._call(None, "start", name)
        self._call(rng if rng.random() < 0.3 else None, "delete", "--force", name)
        if create:
            self._end_left(group)

    def _call(self, kill: random.Random | None, *words: str) -> int:
        """The exit status. `kill`: kill the call at a random moment, alone or with all its children."""
        with subprocess.Popen(
            self.engine.argv(*words),
            env=self.engine.env,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                process.communicate(timeout=kill.random() * 0.5 if kill else PATIENCE)
            except subprocess.TimeoutExpired:
                if kill and kill.random() < 0.5:
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
        return process.returncode

    # --- what is seen -----------------------------------------------------------------------------------------

    def _watch(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                self._look()
            except Exception as error:  # an exception in a thread would go unnoticed
                self.wrong.append(repr(error))
                return
            time.sleep(0.02)

    def _look(self) -> None:
        live = self._processes()
        held = {lease["group"].strip("/"): len(lease["keys"]) for lease in self._leases()}
        for at, one in enumerate(live):
            self.seen += 1
            for other in live[:at]:
                # Both were alive when they were read. If both are alive now, the first was alive while the second was
                # read.
                if one.group != other.group and one.gpus & other.gpus and one.still() and other.still():
                    self.together += 1
                    if one.mode != other.mode or one.mode == "exclusive":
                        self.wrong.append(f"{one} and {other} have one GPU")
            if one.gpus and held.get(one.group) != len(one.gpus) and one.still():
                self.wrong.append(f"{one} has no lease among {held}")
            allowed = self._allowed(one.pid)
            if allowed is not None and not allowed <= one.gpus and one.still():
                self.wrong.append(f"{one} may open {sorted(allowed)}")

    def _leases(self) -> list[dict[str, Any]]:
        try:
            with open(self.ledger, encoding="utf-8") as file:
                found: list[dict[str, Any]] = json.load(file)["leases"]
                return found
        except FileNotFoundError:
            return []

    def _live(self, name: str) -> Live | None:
        """The process with this pid, if it is a living one of our containers.

        Bundles are written before their processes start.
        """
        pid = int(name)
        group, started = group_of(pid), start_of(pid)
        made = self.bundles.get(group)
        if made is None or not started:
            return None
        try:
            config = made.config
        except OSError:
            return None  # the bundle was removed, so the process has ended
        given = frozenset(
            self.gpus[numbers]
            for device in config["linux"].get("devices", [])
            if (numbers := (device["major"], device["minor"])) in self.gpus
        )
        found = Live(
            pid, started, group, json.loads(config["annotations"]["chandler.oci/service"])["resources"]["gpu"], given
        )
        return found if found.still() else None

    def _allowed(self, pid: int) -> set[int] | None:
        """The GPUs that the device cgroup lets a process open; None where that cannot be read or is not set up yet."""
        try:
            with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
                group = next((line.rstrip("\n").split(":", 2)[2] for line in file if ":devices:" in line), "")
            with open(f"/sys/fs/cgroup/devices{group}/devices.list", encoding="ascii") as file:
                lines = file.read().splitlines()
        except OSError:
            return None
        if not group.strip("/") or any(line.startswith("a ") for line in lines):
            return None
        numbers = [line.split()[1].split(":") for line in lines if line.startswith("c ")]
        return {
            self.gpus[int(major), int(minor)]
            for major, minor in numbers
            if "*" not in major + minor and (int(major), int(minor)) in self.gpus
        }
