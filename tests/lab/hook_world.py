"""A hostile image beside a host tree that must not change, and a way to run a hook as a runtime does.

Hooks run in a mount namespace of their own, as in createContainer, so tests may mount what they like.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
import subprocess
from collections.abc import Sequence
from typing import Any

from lab import REPOSITORY

HOOK = os.path.join(REPOSITORY, "packaging/bin/chandler-hook")
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class World:
    """`host` is the tree that must not change; `root` the container's root file system."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.host = os.path.join(directory, "host")
        self.bundle = os.path.join(directory, "bundle")
        self.root = os.path.join(self.bundle, "rootfs")
        self.config: dict[str, Any] = {"root": {"path": "rootfs"}, "mounts": [], "linux": {"devices": []}}
        self.mounts: list[str] = []
        for path in (self.host, self.root):
            os.makedirs(path)
        self.put(self.host + "/secret", "the host's")
        os.mkdir(self.host + "/lib")
        self.put(self.host + "/lib/libcuda.so.1", "the host's own")

    def put(self, path: str, text: str | bytes = "") -> str:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
        return path

    def image(self, path: str, text: str | bytes = "") -> str:
        return self.put(self.root + path, text)

    def link(self, path: str, target: str) -> None:
        os.makedirs(os.path.dirname(self.root + path), exist_ok=True)
        os.symlink(target, self.root + path)

    def bind(self, source: str, path: str) -> None:
        """Bind-mount a path of the host in the container, in the hook's mount namespace."""
        if os.path.isdir(source):
            os.makedirs(self.root + path, exist_ok=True)
        else:
            self.image(path)
        self.mounts.append(f"mount --bind {shlex.quote(source)} {shlex.quote(self.root + path)}")

    def run(
        self,
        *arguments: str,
        state: str | None = None,
        after: str = "",
        env: dict[str, str] | None = None,
        command: Sequence[str] = (HOOK,),
    ) -> subprocess.CompletedProcess[str]:
        """Run the hook as a runtime does: state on standard input, container root as directory, empty environment.

        `after`: a shell command that runs afterwards in the hook's mount namespace, to look at what the hook mounted.
        """
        with open(os.path.join(self.bundle, "config.json"), "w", encoding="utf-8") as file:
            json.dump(self.config, file)
        if state is None:
            state = json.dumps(
                {"ociVersion": "1.0.2", "id": "c1", "status": "created", "pid": 1, "bundle": self.bundle}
            )
        script = " && ".join(
            [*self.mounts, f"cd {shlex.quote(self.root)}", '"$@"' + (f" && {{ {after}; }}" if after else "")]
        )
        return subprocess.run(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh", *command, *arguments],
            input=state,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
            env=env or ENVIRONMENT,
        )

    def snapshot(self) -> list[tuple[str, int, str]]:
        """Everything about the host tree that a hook could have changed."""
        found = []
        for directory, names, files in sorted(os.walk(self.host)):
            for name in sorted([".", *names, *files]):
                path = os.path.join(directory, name)
                status = os.lstat(path)
                content = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
                if stat.S_ISREG(status.st_mode):
                    with open(path, "rb") as file:
                        content = hashlib.sha256(file.read()).hexdigest()
                found.append((path, status.st_mode, content))
        return found
