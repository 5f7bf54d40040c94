"""A private dockerd with its own data, state, socket and containerd, and without any network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lab import cgroups, image
from lab.plugin import until
from lab.runtimes import CACHE

PATIENCE = 60.0
IMAGE = "docker.io/local/busybox:1"
ENVIRONMENT = {"HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class Release(NamedTuple):
    label: str
    directory: str

    @property
    def missing(self) -> str:
        return "" if os.access(self.binary("sbin/dockerd"), os.X_OK) else f"not installed: {self.label}"

    def binary(self, name: str) -> str:
        return os.path.join(self.directory, "root/usr", name)


RELEASES = (Release("docker-26", f"{CACHE}/docker-26"), Release("docker-28", f"{CACHE}/docker-28"))


class Docker:
    """`config`: the path of its daemon.json, which the tests write."""

    def __init__(self, release: Release, directory: str) -> None:
        self.release = release
        self.directory = directory
        self.config = os.path.join(directory, "daemon.json")
        self.log = os.path.join(directory, "log")
        self.process: subprocess.Popen[bytes] | None = None
        os.makedirs(directory)

    @property
    def tasks(self) -> str:
        """The directory of running containers' bundles."""
        return os.path.join(self.directory, "exec/containerd/daemon/io.containerd.runtime.v2.task/moby")

    @property
    def root(self) -> str:
        """The directory that every runtime gets as --root."""
        return os.path.join(self.directory, "exec/runtime-runc/moby")

    def start(self) -> None:
        """Start the daemon; returns when it answers and has loaded the image."""
        d = self.directory
        # crun does not work with a hybrid host's control groups; shims and runtimes inherit the daemon's namespace.
        wrap = cgroups.LEGACY if cgroups.mode() == "hybrid" else cgroups.HOST
        path = ":".join([*(self.release.binary(name) for name in ("sbin", "bin")), ENVIRONMENT["PATH"]])
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *wrap,
                    self.release.binary("sbin/dockerd"),
                    "--config-file",
                    self.config,
                    "--data-root",
                    f"{d}/data",
                    "--exec-root",
                    f"{d}/exec",
                    "--pidfile",
                    f"{d}/pid",
                    "--host",
                    f"unix://{d}/d.sock",
                    "--bridge",
                    "none",
                    "--iptables=false",
                    "--ip6tables=false",
                    # vfs works on every file system that the tests may run on.
                    "--storage-driver",
                    "vfs",
                ],
                env={**ENVIRONMENT, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while self.cli("version", check=False).returncode:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"dockerd does not answer: {self.said()[-2000:]}")
            time.sleep(0.02)
        if self.cli("image", "inspect", IMAGE, check=False).returncode:
            self.cli("load", "--input", image.make(os.path.join(d, "image.tar"), IMAGE))

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [
            self.release.binary("bin/docker"),
            "--config",
            f"{self.directory}/cli",
            "--host",
            f"unix://{self.directory}/d.sock",
            *arguments,
        ]
        done = subprocess.run(
            command,
            check=False,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(arguments)} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def run(
        self,
        runtime: str,
        *options: str,
        annotations: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        asked = [f"--annotation={key}={value}" for key, value in (annotations or {}).items()]
        return self.cli("run", "--network=none", f"--runtime={runtime}", *asked, *options, IMAGE, *command, check=check)

    def inspect(self, container: str) -> Any:
        return json.loads(self.cli("inspect", container).stdout)[0]

    def info(self) -> Any:
        return json.loads(self.cli("info", "--format", "{{json .}}").stdout)

    def logs(self, container: str, end: str) -> list[str]:
        """The lines that a container has written, as soon as `end` is one of them."""
        lines: list[str] = until(
            lambda: end in (found := self.cli("logs", container).stdout.splitlines()) and found,
            f"{end} from {container}",
        )
        return lines

    def clean(self) -> None:
        """Remove every container."""
        names = self.cli("ps", "--all", "--quiet").stdout.split()
        if names:
            self.cli("rm", "--force", "--volumes", *names)

    def stop(self) -> None:
        """End the daemon and its containerd."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(PATIENCE)
            self.process = None

    def said(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()
