"""The part of libmount's Python module that crun's tests use. Debian has no package of it."""

from __future__ import annotations

from typing import NamedTuple


class Filesystem(NamedTuple):
    vfs_options: str
    fs_options: str


class Table:
    """`path`: a copy of a /proc/PID/mountinfo."""

    def __init__(self, path: str) -> None:
        self.targets = {}
        with open(path, encoding="utf-8") as file:
            for line in file:
                words, _, rest = line.partition(" - ")
                self.targets[words.split()[4]] = Filesystem(words.split()[5], rest.split()[2])

    def find_target(self, target: str) -> Filesystem | None:
        return self.targets.get(target)
