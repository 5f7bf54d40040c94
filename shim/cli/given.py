"""Containers whose GPUs came from their engine: seen by the device nodes that their processes find in /dev.

A container is a mount namespace with a root directory of its own; its first process stands for it.  What is in its /dev is
looked up inside its root (shim.host.inroot), by a child process with a bounded time: it may have mounted anything there.
Source: namespaces(7), proc_pid_root(5), cgroups(7).
"""

from __future__ import annotations

import os
import stat
from typing import Any, Callable, Dict, List

from shim.errors import HostError
from shim.generate import nvml
from shim.generate.answers import Unanswered
from shim.gpu import choose, vendors
from shim.host import device_nodes, kernel
from shim.host.inroot import Root
from shim.node.inventory import Inventory

_PATIENCE = 10.0  # seconds for all containers
_DIRECTORIES = dict.fromkeys(
    ["/dev", *(directory for vendor in vendors.with_gpus() for directory in vendors.node_directories(vendor))]
)
_MAX_GPUS = 64  # of each vendor, without a CDI file
_MAX_NODES = 4096  # entries of one directory
_HEX = frozenset("0123456789abcdef")


def namespace(pid: int) -> int:
    """The mount namespace of a process; 0 when it is gone or not ours to ask."""
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino
    except OSError:
        return 0


def known(inventory: Inventory, look: choose.Look = device_nodes.look_at_gpu) -> Dict[str, str]:
    """The node's GPUs: device number (c195:0) to name, CDI's where a file has one."""
    found = choose.numbers(inventory.config["policy.kinds"], inventory, look)
    for vendor in vendors.with_gpus():
        for place in range(_MAX_GPUS):
            for number in _numbers_of(
                [template.format(place, 128 + place) for template in vendor.gpu_nodes], vendor.pci, look
            ):
                found.setdefault(number, f"{vendor.kind}={place}")
    return found


def _numbers_of(paths: List[str], vendor: str, look: choose.Look) -> List[str]:
    """The numbers of a GPU's nodes; none when one is missing or is another vendor's.  A node of /dev/dri or /dev/accel does
    not show by its name whose it is."""
    found = []
    for path in paths:
        try:
            kind, major, minor, _, _, whose = look(path)
        except HostError:
            return []
        if whose != vendor and (whose or path.count("/") > 2):
            return []
        found.append(f"{kind}{major}:{minor}")
    return found


def containers(gpus: Dict[str, str], notes: List[str]) -> List[Dict[str, Any]]:
    """{pid, names: of its control groups, numbers: of the GPUs in its /dev} of every container on the host.

    Why there is no answer goes to `notes`.
    """
    try:
        import psutil
    except ImportError:
        notes.append("containers whose GPUs came from their engine are not looked for: install python3-psutil")
        return []
    pids = [process.pid for process in psutil.process_iter()]
    try:
        found: List[Dict[str, Any]] = nvml.in_child(lambda: {"containers": _looked_at(pids, gpus)}, _PATIENCE)[
            "containers"
        ]
        return found
    except (HostError, Unanswered):
        notes.append(f"what containers have in /dev could not be seen in {_PATIENCE:g} seconds")
        return []


def _looked_at(pids: List[int], gpus: Dict[str, str]) -> List[Dict[str, Any]]:
    here = os.stat("/")
    seen = {namespace(os.getpid()), 0}
    found = []
    for pid in sorted(pids):
        own = namespace(pid)
        if own in seen:
            continue
        seen.add(own)
        try:
            root = os.stat(f"/proc/{pid}/root/")
            if (root.st_dev, root.st_ino) != (here.st_dev, here.st_ino):
                found.append({"pid": pid, "names": _names(pid), "numbers": sorted(_numbers(pid) & gpus.keys())})
        except OSError:
            continue  # it has ended
    return found


def _numbers(pid: int) -> set[str]:
    """The character devices that a process finds in /dev."""
    found = set()
    root = Root(f"/proc/{pid}/root")
    try:
        for directory in _DIRECTORIES:
            try:
                place = root.find(directory, cross=True)
            except OSError:
                continue
            try:
                with os.scandir(f"/proc/self/fd/{place}") as entries:
                    for _, entry in zip(range(_MAX_NODES), entries):
                        is_at = entry.stat(follow_symlinks=False)
                        if stat.S_ISCHR(is_at.st_mode):
                            found.add(f"c{os.major(is_at.st_rdev)}:{os.minor(is_at.st_rdev)}")
            except OSError:
                continue
            finally:
                os.close(place)
    finally:
        root.close()
    return found


def _names(pid: int) -> List[str]:
    """The parts of its control groups' paths, the innermost first."""
    paths = sorted(kernel.cgroups_of(pid).values(), key=len, reverse=True)
    return [part for path in paths for part in reversed(path.split("/")) if part]


def called(names: List[str], pid: int) -> str:
    """What to call a container: the id that its control group is named after."""
    for name in names:
        last = name.removesuffix(".scope").rpartition("-")[2].rpartition(":")[2]
        if len(last) == 64 and not set(last) - _HEX:
            return last
    return names[0] if names else f"process {pid}"


def is_called(names: List[str], container: str) -> bool:
    """Whether one of a container's control groups is named after that id."""
    return any(
        name == container or len(container) > 11 and name.removesuffix(".scope").endswith(container) for name in names
    )


def add(
    rows: List[Dict[str, Any]],
    seen: List[Dict[str, Any]],
    gpus: Dict[str, str],
    inside: Callable[[int], int] = namespace,
) -> None:
    """Tells rows without a pid theirs, and adds a row for every container with GPUs that it has no lease or grant for."""
    by_namespace = {inside(row["pid"]): row for row in rows if row["pid"]}
    for one in seen:
        row = by_namespace.get(inside(one["pid"]))
        if row is None:
            row = next((each for each in rows if not each["pid"] and is_called(one["names"], each["id"])), None)
            if row is not None:
                row["pid"], row["status"] = one["pid"], "running"
        own = {number for key in row["keys"] for number in key.split("+")} if row is not None else set()
        more = [number for number in one["numbers"] if number not in own]
        if more:
            rows.append(
                {
                    "id": row["id"] if row is not None else called(one["names"], one["pid"]),
                    "by": "engine",
                    "root": "",
                    "runtime": "",
                    "devices": sorted({gpus[number] for number in more}),
                    "keys": more,
                    "mode": "not leased",
                    "limits": {},
                    "held": "",
                    "since": None,
                    "pid": one["pid"],
                    "status": "running",
                }
            )
