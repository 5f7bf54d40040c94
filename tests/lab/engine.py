"""Calls an OCI runtime, or Chandler in its place, the way containerd's shim does."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lab.bundle import Bundle

# What containerd's shim passes: its own variables, and a PATH that ends in the working directory.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:",
    "GOMAXPROCS": "2",
    "NAMESPACE": "k8s.io",
    "GRPC_ADDRESS": "/run/containerd/containerd.sock",
    "TTRPC_ADDRESS": "/run/containerd/containerd.sock.ttrpc",
}
PATIENCE = 60.0


class Failed(AssertionError):
    """A call that should have succeeded did not."""


class Engine:
    """`hangs`: whether the runtime's `run` may hang without Chandler's doing, see call()."""

    def __init__(
        self, command: Sequence[str], root: str, env: Mapping[str, str] | None = None, hangs: bool = False
    ) -> None:
        self.command = list(command)
        self.hangs = hangs
        self.root = root
        self.env = {**ENVIRONMENT, **(env or {})}
        self.started: dict[str, Bundle | None] = {}

    def argv(self, *arguments: str, log: str = "") -> list[str]:
        options = ["--root", self.root]
        if log:
            options += ["--log", log, "--log-format", "json"]
        return [*self.command, *options, *arguments]

    def call(
        self, *arguments: str, log: str = "", check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """A verb whose output is not a container's."""
        options = {"env": self.env, "text": True, "capture_output": True, "timeout": PATIENCE, "cwd": "/", **options}
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        # youki 0.7 misses the end of a container that ends before youki waits for it (one of twenty on a busy machine),
        # with or without Chandler. Such a run is killed and repeated.
        for patience in (5.0,) * 8 if self.hangs and "run" in arguments else ():
            try:
                done = subprocess.run(self.argv(*arguments, log=log), check=False, **{**options, "timeout": patience})
                break
            except subprocess.TimeoutExpired:
                for name in self.started:
                    subprocess.run(self.argv("delete", "--force", name), check=False, env=self.env, capture_output=True)
        else:
            done = subprocess.run(self.argv(*arguments, log=log), check=False, **options)
        if check and done.returncode:
            raise Failed(f"{done.args} gave {done.returncode}: {done.stdout}{done.stderr}{read(log)}")
        return done

    def create(
        self, bundle: Bundle, name: str, *options: str, check: bool = True, verb: str = "create", **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Create a container. Its output goes to the file bundle.out, because the container keeps the streams open."""
        self.started[name] = bundle
        arguments = [verb, "--bundle", bundle.directory, "--pid-file", bundle.pid_file, *options, name]
        with open(bundle.out, "ab") as out:
            start = out.tell()
            # A pipe as standard input: with a user namespace some crun versions change the owner of /dev/null.
            done = subprocess.run(
                self.argv(*arguments, log=bundle.log),
                check=False,
                **{
                    "env": self.env,
                    "cwd": "/",
                    "input": b"",
                    "stdout": out,
                    "stderr": out,
                    "timeout": PATIENCE,
                    **more,
                },
            )
        with open(bundle.out, "rb") as out:
            out.seek(start)
            text = out.read().decode(errors="replace")
        if check and done.returncode:
            raise Failed(f"{done.args} gave {done.returncode}: {text}{read(bundle.log)}")
        return subprocess.CompletedProcess(done.args, done.returncode, text, text)

    def run(
        self, bundle: Bundle, name: str, *options: str, check: bool = True, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a container in the foreground; returns its output and exit code."""
        self.started[name] = bundle
        return self.call("run", "--bundle", bundle.directory, *options, name, log=bundle.log, check=check, **more)

    def state(self, name: str) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.call("state", name).stdout)
        return result

    def wait(self, name: str, status: str) -> dict[str, Any]:
        """The container's state, as soon as its status is `status`."""
        until = time.monotonic() + PATIENCE
        while (state := self.state(name))["status"] != status:
            if time.monotonic() > until:
                raise Failed(f"{name} is {state['status']}, not {status}")
            time.sleep(0.02)
        return state

    def exec(self, name: str, *command: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.call("exec", name, *command, check=check, **more)

    def kill(self, name: str, signal: str = "KILL") -> None:
        self.call("kill", name, signal)

    def delete(self, name: str, *options: str) -> None:
        self.call("delete", *options, name)
        self.started.pop(name, None)

    def clean(self) -> None:
        """Remove what a failed test left running."""
        for name in list(self.started):
            self.call("delete", "--force", name, check=False)
        self.started.clear()


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def records(path: str) -> list[dict[str, Any]]:
    """The records of a --log file in JSON."""
    return [json.loads(line) for line in read(path).splitlines()]


def pid_of(bundle: Bundle) -> int:
    with open(bundle.pid_file, encoding="ascii") as file:
        return int(file.read())


def descriptors(pid: int) -> dict[int, str]:
    """The open files of a process, as far as they can be read."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except OSError:
            continue
    return found
