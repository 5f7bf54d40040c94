"""Finds containers whose GPUs came from their engine, by the device nodes that their processes see in /dev.

A container is a mount namespace with a root directory of its own.  Its process with the lowest pid stands for it.  The
container may have mounted anything on its /dev, so a child process with a time limit looks there, inside the
container's root (shim.host.inroot).
Source: namespaces(7), proc_pid_root(5), cgroups(7).
"""

from __future__ import annotations

import os
import stat
from typing import Callable

from shim.errors import HostError
from shim.generate import nvml
from shim.generate.model import NvmlUnavailable
from shim.gpu import choose, vendors
from shim.host import device_nodes, kernel
from shim.host.inroot import Root
from shim.node.inventory import Inventory
from shim.shapes import Document

_PATIENCE = 10.0  # seconds for all containers
_DIRECTORIES = dict.fromkeys(
    ["/dev", *(directory for vendor in vendors.with_gpus() for directory in vendors.node_directories(vendor))]
)
_MAX_GPUS = 64  # of each vendor, that no CDI file describes
_MAX_NODES = 4096  # entries of one directory
_HEX = frozenset("0123456789abcdef")


def namespace(pid: int) -> int:
    """The inode of a process's mount namespace; 0 when the process is gone or we may not look at it."""
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino
    except OSError:
        return 0


def gpus_of_node(inventory: Inventory, read_node: choose.ReadNode = device_nodes.read_gpu_node) -> dict[str, str]:
    """The node's GPUs, as {device number (c195:0): name}.  The name is from CDI where a CDI file has the device."""
    names = choose.gpu_names_by_number(inventory.config["policy.kinds"], inventory, read_node)
    for vendor in vendors.with_gpus():
        for index in range(_MAX_GPUS):
            for number in _gpu_numbers(
                [template.format(index, 128 + index) for template in vendor.gpu_nodes], vendor.pci, read_node
            ):
                names.setdefault(number, f"{vendor.kind}={index}")
    return names


def _gpu_numbers(paths: list[str], vendor: str, read_node: choose.ReadNode) -> list[str]:
    """The device numbers of a GPU's nodes; none when a node is missing or belongs to another vendor.

    The name of a node in /dev/dri or /dev/accel does not tell the vendor, so the driver must.
    """
    numbers = []
    for path in paths:
        try:
            kind, major, minor, _, _, node_vendor = read_node(path)
        except HostError:
            return []
        if node_vendor != vendor and (node_vendor or path.count("/") > 2):
            return []
        numbers.append(f"{kind}{major}:{minor}")
    return numbers


def containers(gpus: dict[str, str], notes: list[str]) -> list[Document]:
    """Every container on the host, as {pid, names: of its control groups, numbers: of the GPUs in its /dev}.

    When they cannot be found, the list is empty and the reason goes to `notes`.
    """
    try:
        import psutil
    except ImportError:
        notes.append("containers whose GPUs came from their engine are not looked for: install python3-psutil")
        return []
    pids = [process.pid for process in psutil.process_iter()]
    try:
        seen: list[Document] = nvml.in_child(lambda: {"containers": _look_at_all(pids, gpus)}, _PATIENCE)["containers"]
        return seen
    except (HostError, NvmlUnavailable):
        notes.append(f"the /dev of containers could not be read within {_PATIENCE:g} seconds")
        return []


def _look_at_all(pids: list[int], gpus: dict[str, str]) -> list[Document]:
    """Looks at the first process of each mount namespace, and keeps those with a root directory of their own."""
    host_root = os.stat("/")
    seen = {namespace(os.getpid()), 0}
    containers = []
    for pid in sorted(pids):
        mount_namespace = namespace(pid)
        if mount_namespace in seen:
            continue
        seen.add(mount_namespace)
        try:
            root = os.stat(f"/proc/{pid}/root/")
            if (root.st_dev, root.st_ino) != (host_root.st_dev, host_root.st_ino):
                containers.append(
                    {"pid": pid, "names": _cgroup_names(pid), "numbers": sorted(_device_numbers(pid) & gpus.keys())}
                )
        except OSError:
            continue  # the process has ended
    return containers


def _device_numbers(pid: int) -> set[str]:
    """The numbers of the character devices that a process sees in /dev."""
    numbers = set()
    root = Root(f"/proc/{pid}/root")
    try:
        for directory in _DIRECTORIES:
            try:
                descriptor = root.find(directory, cross=True)
            except OSError:
                continue
            try:
                with os.scandir(f"/proc/self/fd/{descriptor}") as entries:
                    for _, entry in zip(range(_MAX_NODES), entries):
                        status = entry.stat(follow_symlinks=False)
                        if stat.S_ISCHR(status.st_mode):
                            numbers.add(f"c{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}")
            except OSError:
                continue
            finally:
                os.close(descriptor)
    finally:
        root.close()
    return numbers


def _cgroup_names(pid: int) -> list[str]:
    """The parts of the paths of a process's control groups, the innermost first."""
    paths = sorted(kernel.cgroups_of(pid).values(), key=len, reverse=True)
    return [part for path in paths for part in reversed(path.split("/")) if part]


def container_id(names: list[str], pid: int) -> str:
    """A container's id: 64 hexadecimal digits in the name of a control group, else the innermost group's name."""
    for name in names:
        last = name.removesuffix(".scope").rpartition("-")[2].rpartition(":")[2]
        if len(last) == 64 and not set(last) - _HEX:
            return last
    return names[0] if names else f"process {pid}"


def is_called(names: list[str], container: str) -> bool:
    """Whether one of a container's control groups is named after the id `container`."""
    return any(
        name == container or len(container) > 11 and name.removesuffix(".scope").endswith(container) for name in names
    )


def add_rows(
    rows: list[Document],
    seen: list[Document],
    gpus: dict[str, str],
    namespace_of: Callable[[int], int] = namespace,
) -> None:
    """Adds the pid to rows that have none, and rows for containers with GPUs that no row records.

    `seen`: from `containers`; `gpus`: from `gpus_of_node`; `namespace_of`: the mount namespace of a pid.
    """
    by_namespace = {namespace_of(row["pid"]): row for row in rows if row["pid"]}
    for container in seen:
        row = by_namespace.get(namespace_of(container["pid"]))
        if row is None:
            row = next((each for each in rows if not each["pid"] and is_called(container["names"], each["id"])), None)
            if row is not None:
                row["pid"], row["status"] = container["pid"], "running"
        recorded = {number for key in row["keys"] for number in key.split("+")} if row is not None else set()
        unrecorded = [number for number in container["numbers"] if number not in recorded]
        if unrecorded:
            rows.append(
                {
                    "id": row["id"] if row is not None else container_id(container["names"], container["pid"]),
                    "by": "engine",
                    "root": "",
                    "runtime": "",
                    "devices": sorted({gpus[number] for number in unrecorded}),
                    "keys": unrecorded,
                    "mode": "not leased",
                    "limits": {},
                    "held": "",
                    "since": None,
                    "pid": container["pid"],
                    "status": "running",
                }
            )
