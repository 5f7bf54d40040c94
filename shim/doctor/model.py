"""What a check of doctor reads, and its result."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from typing import Any, NamedTuple

from shim import paths
from shim.cdi.registry import Registry
from shim.errors import ChandlerError
from shim.host import cgroups
from shim.node import compiler
from shim.node import config as _config
from shim.node.inventory import Account

PATIENCE = 10.0  # seconds for a program to say its version


class Check(NamedTuple):
    """The result of one check: what was found, as a line (`text`) and for JSON (`data`), and its problems."""

    name: str
    text: str
    data: Any
    problems: list[dict[str, str]]


class HostReader(cgroups.CgroupTree):
    """Reads the host for doctor.  Tests pass one with another root directory."""

    def names(self, directory: str) -> list[str]:
        """The sorted entries of a directory; none when it cannot be read."""
        try:
            return sorted(os.listdir(self._root + directory))
        except OSError:
            return []

    def program(self, name: str) -> str:
        """The path of a program in the usual directories; '' when it is not there."""
        return next(
            (f"{directory}/{name}" for directory in paths.BINARY_DIRS if self.exists(f"{directory}/{name}")), ""
        )

    def version(self, path: str) -> str:
        """The first line that a program prints for --version; '' when it fails or takes longer than PATIENCE."""
        try:
            done = subprocess.run(
                [self._root + path, "--version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE,
                check=False,
                env={"PATH": paths.SAFE_PATH},
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.partition("\n")[0].strip()


def problem(what: str, remedy: str) -> dict[str, str]:
    """A problem and what to do about it."""
    return {"problem": what, "remedy": remedy}


def problem_of(error: ChandlerError, remedy: str) -> dict[str, str]:
    """An error as a problem; `remedy` is for an error that names none."""
    return problem(error.what, error.todo or remedy)


class Subject:
    """What the checks read: the host, and the node's configuration, control groups and CDI files."""

    def __init__(self, host: HostReader, account: Account) -> None:
        self.host, self.account = host, account
        self.config_error = self.cdi_error = None
        try:
            self.config, _ = compiler.read_config(account)
        except ChandlerError as error:  # the other checks use the defaults
            self.config_error = error
            self.config = _config.compile_config([])
        self.cgroups = cgroups.survey(host)
        try:
            self.cdi = compiler.read_registry(account, self.config)
        except ChandlerError as error:
            self.cdi_error = error
            self.cdi = Registry([])
        # How many names of devices each CDI kind has.
        self.kinds = Counter(name.partition("=")[0] for name in self.cdi.devices)
