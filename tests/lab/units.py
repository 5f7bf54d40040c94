"""systemd's units, asked and told by systemctl."""

from __future__ import annotations

import os
import subprocess


def systemctl(*words: str) -> None:
    subprocess.run(["systemctl", *words], check=True, stdin=subprocess.DEVNULL, capture_output=True)


class Unit:
    def __init__(self, name: str) -> None:
        self.name = name

    def shown(self, name: str) -> str:
        """A property, as systemd knows it."""
        done = subprocess.run(
            ["systemctl", "show", "--value", "-p", name, self.name],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    @property
    def state(self) -> str:
        return self.shown("ActiveState")

    @property
    def active(self) -> bool:
        return self.state == "active"

    @property
    def pid(self) -> int:
        """Of its main process; 0 while there is none."""
        return int(self.shown("MainPID"))

    def log(self) -> str:
        """What it, and systemd of it, has said until now."""
        subprocess.run(["journalctl", "--sync"], check=True, stdin=subprocess.DEVNULL)
        return subprocess.run(
            ["journalctl", "--output=cat", "--quiet", "--unit", self.name],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        ).stdout

    def sockets(self) -> set[str]:
        """Those that its main process has open."""
        directory = f"/proc/{self.pid}/fd"
        return {
            link
            for link in (os.readlink(f"{directory}/{name}") for name in os.listdir(directory))
            if link.startswith("socket:")
        }
