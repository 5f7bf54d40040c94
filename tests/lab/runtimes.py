"""The low-level runtimes that tests run containers with, each with control groups that suit it."""

from __future__ import annotations

import os
from typing import NamedTuple

from lab import cgroups

CACHE = os.environ.get("CHANDLER_TEST_CACHE", "/var/cache/chandler-tests")


class Runtime(NamedTuple):
    """`wrap`: precedes every command, whether Chandler's or the runtime's own.

    `limits`: whether the memory and pids controllers are available.
    """

    label: str
    kind: str
    path: str
    wrap: tuple[str, ...] = cgroups.HOST
    limits: bool = True

    @property
    def missing(self) -> str:
        return "" if os.access(self.path, os.X_OK) else f"not installed: {self.label}"


def known() -> list[Runtime]:
    hybrid, unified = cgroups.mode() == "hybrid", cgroups.mode() == "unified"
    plain = cgroups.LEGACY if hybrid else cgroups.HOST
    result = [
        Runtime("runc", "runc", "/usr/sbin/runc"),
        Runtime("crun", "crun", "/usr/bin/crun", plain),
        Runtime("youki", "youki", f"{CACHE}/youki/bin/youki"),
        Runtime("newer-runc", "runc", f"{CACHE}/newer/bin/runc"),
        Runtime("newer-crun", "crun", f"{CACHE}/newer/bin/crun", plain),
    ]
    if not unified:
        result += [
            Runtime("crun-on-v2", "crun", f"{CACHE}/newer/bin/crun", cgroups.UNIFIED, limits=False),
            Runtime("runc-on-v2", "runc", "/usr/sbin/runc", cgroups.UNIFIED, limits=False),
        ]
    return result


def named(label: str) -> Runtime:
    return next(runtime for runtime in known() if runtime.label == label)
