"""Tells whether the SELinux policy lets containers use devices."""

from __future__ import annotations

ROOT = "/sys/fs/selinux"
_BOOLEAN = "container_use_devices"


def notes(root: str = ROOT) -> list[str]:
    """A note with the command that allows devices in containers.  Empty when they are allowed, or without SELinux."""
    try:
        with open(f"{root}/enforce", encoding="ascii") as file:
            enforcing = file.read().strip() == "1"
        with open(f"{root}/booleans/{_BOOLEAN}", encoding="ascii") as file:
            allowed = file.read().split()[:1] == ["1"]
    except OSError:
        return []  # no SELinux, or a policy without that boolean
    if allowed:
        return []
    when = "" if enforcing else " once SELinux is enforcing"
    return [f"SELinux keeps containers from devices{when}: `setsebool -P {_BOOLEAN} on` lets them"]
