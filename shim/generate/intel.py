"""Describes Intel's GPUs, Gaudi accelerators and NPUs, from sysfs alone.  Pure.

A device is named after its node (`card0`, `accel0`), and after its PCI address and model (`0000-03-00-0-0x56a0`).
Source: Intel resource drivers for Kubernetes; Linux, Documentation/ABI/testing/sysfs-driver-habanalabs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.generate import pci
from shim.generate.model import Description, Device, merged, node

if TYPE_CHECKING:
    from shim.generate.model import Block, Options
    from shim.generate.tree import HostTree
    from shim.gpu.vendors import Vendor

_DISPLAY = ("0x0300", "0x0380")  # VGA controller, other display controller
_FOLDERS = {"accel": "accel", "infiniband_verbs": "infiniband"}  # class in sysfs: folder in /dev


def gpus(vendor: Vendor, tree: HostTree, options: Options) -> Description:
    """Finds the GPUs that the vendor's kernel modules drive, and that have nodes only in /dev/dri.

    An SR-IOV virtual function that has a driver is a device of its own.
    """
    devices: list[Device] = []
    notes: list[str] = []
    for bdf in filter(pci.is_address, tree.names(pci.DEVICES)):
        directory = f"{pci.DEVICES}/{bdf}"
        if tree.text(directory + "/vendor") != vendor.pci or not tree.text(directory + "/class").startswith(_DISPLAY):
            continue
        driver = tree.link(directory + "/driver").rpartition("/")[2]
        cards = pci.numbered(tree.names(directory + "/drm"), "card")
        if driver not in vendor.modules or not cards:
            continue  # bound to another driver, for instance for a virtual machine, or to none
        edits, missing = pci.drm(tree, options, directory, bdf)
        _add(devices, notes, tree, bdf, cards[0], "gpu", edits, missing, driver)
    return Description(
        vendor.kind, devices, notes=notes, watch=["/dev/dri", *(f"/sys/module/{name}" for name in vendor.modules)]
    )


def accelerators(vendor: Vendor, tree: HostTree, options: Options) -> Description:
    """Finds devices with nodes in /dev/accel, such as Gaudi accelerators and the NPUs of Intel's processors.

    A device also gets its control node, if it has one, and its InfiniBand verbs node, where its network is in use.
    """
    driver = vendor.modules[0]
    devices: list[Device] = []
    notes: list[str] = []
    for bdf in filter(pci.is_address, tree.names(f"/sys/bus/pci/drivers/{driver}")):
        directory = f"/sys/bus/pci/drivers/{driver}/{bdf}"
        names = tree.names(directory + "/accel")
        blocks: list[Block] = []
        missing: list[str] = []
        wanted = [("accel", name) for name in pci.numbered(names, "accel") + pci.numbered(names, "accel_controlD")]
        wanted += [
            ("infiniband_verbs", name) for name in pci.numbered(tree.names(directory + "/infiniband_verbs"), "uverbs")
        ]
        for class_, name in wanted:
            path = f"/dev/{_FOLDERS[class_]}/{name}"
            block = node(tree, options, path, pci.numbers(tree, f"{directory}/{class_}/{name}"))
            if block is None:
                missing.append(path)
            else:
                blocks.append(block)
        accel = pci.numbered(names, "accel")
        if accel:
            module = tree.text(directory + "/module_id")[:32]
            _add(
                devices,
                notes,
                tree,
                bdf,
                accel[0],
                vendor.kind.rpartition("/")[2],
                merged(*blocks),
                missing,
                driver,
                f" module {module}" if module else "",
            )
    return Description(vendor.kind, devices, notes=notes, watch=["/dev/accel", f"/sys/module/{driver}"])


def _add(
    devices: list[Device],
    notes: list[str],
    tree: HostTree,
    bdf: str,
    name: str,
    class_: str,
    edits: Block,
    missing: list[str],
    driver: str,
    extra: str = "",
) -> None:
    """Adds one device, unless the node that it is named after is missing.  Missing nodes go to `notes`."""
    if missing:
        notes.append(f"{', '.join(missing)} of the {class_} at {bdf} is not in /dev")
    if not any(item["path"].endswith("/" + name) for item in edits.get("deviceNodes", ())):
        return
    model = (tree.text(f"{pci.DEVICES}/{bdf}/device") or tree.text(f"/sys/bus/pci/drivers/{driver}/{bdf}/device"))[:32]
    names = {
        "index": name,
        "uuid": f"{bdf.replace(':', '-').replace('.', '-')}-{model}" if model else "",
        "type-index": f"{class_}{len(devices)}",
    }
    devices.append(Device(names, edits, f"{name} {bdf} {model} {driver}{extra}".replace("  ", " ")))
