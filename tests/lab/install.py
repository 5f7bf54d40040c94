"""Chandler installed for tests under a prefix of its own, with its own configuration and state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence

from lab import REPOSITORY

PYTHON = "/usr/bin/python3"


class Installation:
    """`directory` and every directory above it must belong to root, or Chandler refuses the configuration in it.

    `beside`: another installation, whose configuration and state this one shares.
    """

    def __init__(self, directory: str, python: str = PYTHON, beside: Installation | None = None) -> None:
        self.prefix = os.path.join(directory, "usr")
        self.etc: str = beside.etc if beside else os.path.join(directory, "etc/chandler")
        self.state: str = beside.state if beside else os.path.join(directory, "run/chandler")
        self.keep: str = beside.keep if beside else os.path.join(directory, "var/lib/chandler")
        os.makedirs(directory, mode=0o755, exist_ok=True)
        subprocess.run(
            [os.path.join(REPOSITORY, "packaging/install")],
            check=True,
            stdin=subprocess.DEVNULL,
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "PREFIX": self.prefix,
                "SYSCONFDIR": os.path.dirname(self.etc),
                "STATEDIR": self.state,
                "KEEPDIR": self.keep,
                "PYTHON": python,
            },
        )

    @classmethod
    def placed(cls, prefix: str, etc: str, state: str) -> Installation:
        """One that is there already."""
        made = cls.__new__(cls)
        made.prefix, made.etc, made.state = prefix, etc, state
        return made

    def program(self, name: str = "chandler-runtime") -> str:
        return os.path.join(self.prefix, "bin", name)

    def configure(
        self, runtimes: Sequence[str], spec_dirs: Sequence[str] = (), more: str = "", engine: str = "containerd"
    ) -> None:
        """Write config.toml: the runtimes in order, the engine, the CDI directories, and then `more` as it is.

        The default engine lets anybody ask who calls by hand, which most tests do. With "" only a known engine may ask.
        """
        os.makedirs(self.etc, exist_ok=True)
        who = f"engines = {toml([engine, 'other'])}\n" if engine else ""
        text = f"runtimes = {toml(runtimes)}\n{who}[cdi]\nspec-dirs = {toml(spec_dirs)}\n{more}"
        file = os.path.join(self.etc, "config.toml")
        with open(file + ".new", "w", encoding="utf-8") as new:
            new.write(text)
        os.rename(file + ".new", file)

    def refresh(self) -> None:
        """Compile configuration and CDI files, as a person does after a change."""
        subprocess.run([self.program("chandler"), "refresh", "--quiet"], check=True, stdin=subprocess.DEVNULL, env={})

    def leases(self) -> dict[str, list[str]]:
        """Container to devices."""
        done = subprocess.run(
            [self.program("chandler"), "leases", "--format", "json"],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
        )
        return {lease["id"]: lease["names"] for lease in json.loads(done.stdout)}

    def forget(self) -> None:
        """Remove the state directory, as a reboot or a mistake does."""
        shutil.rmtree(self.state, ignore_errors=True)


def toml(words: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{word}"' for word in words) + "]"
