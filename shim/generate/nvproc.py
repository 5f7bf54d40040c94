"""NVIDIA's GPUs as the kernel module tells them in /proc/driver/nvidia, in NVML's terms.  Pure.

NVML numbers GPUs by PCI address; so does this.  What NVML alone knows is left empty: the UUID of a MIG device.
"""

from __future__ import annotations

from shim.generate import pci

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

    from shim.generate.tree import HostTree

_ROOT = "/proc/driver/nvidia"


def read(tree: HostTree) -> Dict[str, Any]:
    """The same shape as nvml.read."""
    gpus: List[Dict[str, Any]] = []
    for name in tree.names(_ROOT + "/gpus"):
        fields = _fields(tree.text(f"{_ROOT}/gpus/{name}/information"))
        minor = pci.whole(fields.get("Device Minor", ""))
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


def _fields(text: str) -> Dict[str, str]:
    pairs = (line.partition(":") for line in text.split("\n"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def _parts(tree: HostTree, minor: int) -> List[Dict[str, Any]]:
    """Compute instances that exist, in the order of their GPU instances."""
    folder = f"{_ROOT}/capabilities/gpu{minor}/mig"
    found: List[Dict[str, Any]] = []
    for instance in pci.numbered(tree.names(folder), "gi"):
        for compute in pci.numbered(tree.names(f"{folder}/{instance}"), "ci"):
            found.append(
                {"index": len(found), "uuid": "", "gi": pci.number(instance, "gi"), "ci": pci.number(compute, "ci")}
            )
    return found


def kernel_version(tree: HostTree) -> str:
    """The version of the kernel module that is loaded, such as 550.54.15; nothing when there is none."""
    first = tree.text(_ROOT + "/version").partition("\n")[0]
    return next((word for word in first.split() if is_version(word)), "")


def is_version(word: str) -> bool:
    """Whether a word is a driver's version: two or three numbers joined by dots."""
    parts = word.split(".")
    return 2 <= len(parts) <= 3 and all(part.isascii() and part.isdigit() for part in parts) and len(parts[0]) >= 3


def majors(tree: HostTree) -> Dict[str, int]:
    """The character device majors of /proc/devices by the name of the driver."""
    found: Dict[str, int] = {}
    for line in tree.text("/proc/devices").partition("Block devices")[0].split("\n"):
        number, _, name = line.strip().partition(" ")
        if 0 < pci.whole(number) < 1 << 12:
            found.setdefault(name, int(number))
    return found


def params(tree: HostTree) -> Dict[str, str]:
    """The module's parameters: mode, owner and group of its nodes, and whether libraries may make nodes."""
    return _fields(tree.text(_ROOT + "/params"))
