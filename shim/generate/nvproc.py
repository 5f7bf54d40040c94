"""Reads NVIDIA's GPUs from /proc/driver/nvidia, where the kernel module lists them, in NVML's terms.  Pure.

Like NVML, it numbers GPUs by PCI address.  The UUID of a MIG device stays empty, since only NVML knows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.generate import pci

if TYPE_CHECKING:
    from shim.generate.tree import HostTree
    from shim.shapes import Document

_ROOT = "/proc/driver/nvidia"


def read(tree: HostTree) -> Document:
    """The GPUs in the shape of nvml.read."""
    gpus: list[Document] = []
    for name in tree.names(_ROOT + "/gpus"):
        fields = _fields(tree.text(f"{_ROOT}/gpus/{name}/information"))
        minor = pci.natural_number(fields.get("Device Minor", ""))
        if minor < 0:
            continue
        uuid = fields.get("GPU UUID", "")
        parts = _parts(tree, minor)
        gpus.append(
            {
                "index": 0,
                "minor": minor,
                "uuid": "" if "?" in uuid else uuid,
                "bdf": pci.address(name),
                "name": fields.get("Model", ""),
                "mig": bool(parts),
                "coherent": False,
                "parts": parts,
            }
        )
    gpus.sort(key=lambda gpu: str(gpu["bdf"]))
    for index, gpu in enumerate(gpus):
        gpu["index"] = index
    return {"driver": kernel_version(tree), "gpus": gpus}


def _fields(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.split("\n"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _parts(tree: HostTree, minor: int) -> list[Document]:
    """The compute instances of a GPU, in the order of their GPU instances."""
    folder = f"{_ROOT}/capabilities/gpu{minor}/mig"
    instances: list[Document] = []
    for gpu_instance in pci.numbered(tree.names(folder), "gi"):
        for compute_instance in pci.numbered(tree.names(f"{folder}/{gpu_instance}"), "ci"):
            instances.append(
                {
                    "index": len(instances),
                    "uuid": "",
                    "gi": pci.number(gpu_instance, "gi"),
                    "ci": pci.number(compute_instance, "ci"),
                }
            )
    return instances


def kernel_version(tree: HostTree) -> str:
    """The version of the loaded kernel module, such as 550.54.15; "" when none is loaded."""
    first = tree.text(_ROOT + "/version").partition("\n")[0]
    return next((word for word in first.split() if is_version(word)), "")


def is_version(word: str) -> bool:
    """Whether a word is a driver's version: two or three numbers joined by dots, the first of three or more digits."""
    parts = word.split(".")
    return 2 <= len(parts) <= 3 and all(part.isascii() and part.isdigit() for part in parts) and len(parts[0]) >= 3


def majors(tree: HostTree) -> dict[str, int]:
    """The character device majors of /proc/devices by the name of the driver."""
    by_driver: dict[str, int] = {}
    for line in tree.text("/proc/devices").partition("Block devices")[0].split("\n"):
        number, _, name = line.strip().partition(" ")
        if 0 < pci.natural_number(number) < 1 << 12:
            by_driver.setdefault(name, int(number))
    return by_driver


def params(tree: HostTree) -> dict[str, str]:
    """The module's parameters: mode, owner and group of its nodes, and whether libraries may create nodes."""
    return _fields(tree.text(_ROOT + "/params"))
