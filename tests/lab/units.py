"""Queries and commands to systemd's units, by systemctl."""

from __future__ import annotations

import os
import subprocess


def systemctl(*words: str) -> None:
    subprocess.run(["systemctl", *words], check=True, stdin=subprocess.DEVNULL, capture_output=True)


class Unit:
    def __init__(self, name: str) -> None:
        self.name = name

    def shown(self, name: str) -> str:
        """A property of a unit, as systemd shows it."""
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
        """The pid of its main process; 0 while there is none."""
        return int(self.shown("MainPID"))

    def log(self) -> str:
        """What the unit, and systemd about the unit, have logged so far."""
        subprocess.run(["journalctl", "--sync"], check=True, stdin=subprocess.DEVNULL)
        return subprocess.run(
            ["journalctl", "--output=cat", "--quiet", "--unit", self.name],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        ).stdout

    def sockets(self) -> set[str]:
        """The sockets that its main process has open."""
        directory = f"/proc/{self.pid}/fd"
        return {
            link
            for link in (os.readlink(f"{directory}/{name}") for name in os.listdir(directory))
            if link.startswith("socket:")
        }
