"""Intel's GPUs, Gaudi accelerators and NPUs, through sysfs alone.  Pure.

A device is named after its node (`card0`, `accel0`), and after its PCI address and model (`0000-03-00-0-0x56a0`).
Source: Intel resource drivers for Kubernetes; Linux, Documentation/ABI/testing/sysfs-driver-habanalabs.
"""

from __future__ import annotations

from shim.generate import pci
from shim.generate.answers import Device, Found, merged, node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List

    from shim.generate.answers import Block, Options
    from shim.generate.tree import HostTree
    from shim.gpu.vendors import Vendor

_DISPLAY = ("0x0300", "0x0380")  # VGA controller, other display controller
_FOLDERS = {"accel": "accel", "infiniband_verbs": "infiniband"}  # class in sysfs: folder in /dev


def gpus(vendor: Vendor, tree: HostTree, options: Options) -> Found:
    """The GPUs that the vendor's modules drive, with nodes in /dev/dri alone; a physical function passes its virtual functions on as devices of their own."""
    devices: List[Device] = []
    notes: List[str] = []
    for bdf in filter(pci.is_address, tree.names(pci.DEVICES)):
        directory = f"{pci.DEVICES}/{bdf}"
        if tree.text(directory + "/vendor") != vendor.pci or not tree.text(directory + "/class").startswith(_DISPLAY):
            continue
        driver = tree.link(directory + "/driver").rpartition("/")[2]
        cards = pci.numbered(tree.names(directory + "/drm"), "card")
        if driver not in vendor.modules or not cards:
            continue  # passed to a virtual machine, or not in use
        edits, missing = pci.drm(tree, options, directory, bdf)
        _add(devices, notes, tree, bdf, cards[0], "gpu", edits, missing, driver)
    return Found(
        vendor.kind, devices, notes=notes, watch=["/dev/dri", *(f"/sys/module/{name}" for name in vendor.modules)]
    )


def accelerators(vendor: Vendor, tree: HostTree, options: Options) -> Found:
    """Devices with nodes in /dev/accel, such as Gaudi accelerators and the NPUs of Intel's processors; each with its control
    node, if it has one, and, where its network is in use, its verbs node."""
    driver = vendor.modules[0]
    devices: List[Device] = []
    notes: List[str] = []
    for bdf in filter(pci.is_address, tree.names(f"/sys/bus/pci/drivers/{driver}")):
        directory = f"/sys/bus/pci/drivers/{driver}/{bdf}"
        found = tree.names(directory + "/accel")
        blocks: List[Block] = []
        missing: List[str] = []
        wanted = [("accel", name) for name in pci.numbered(found, "accel") + pci.numbered(found, "accel_controlD")]
        wanted += [
            ("infiniband_verbs", name) for name in pci.numbered(tree.names(directory + "/infiniband_verbs"), "uverbs")
        ]
        for class_, name in wanted:
            path = f"/dev/{_FOLDERS[class_]}/{name}"
            made = node(tree, options, path, pci.numbers(tree, f"{directory}/{class_}/{name}"))
            if made is None:
                missing.append(path)
            else:
                blocks.append(made)
        accel = pci.numbered(found, "accel")
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
    return Found(vendor.kind, devices, notes=notes, watch=["/dev/accel", f"/sys/module/{driver}"])


def _add(
    devices: List[Device],
    notes: List[str],
    tree: HostTree,
    bdf: str,
    name: str,
    class_: str,
    edits: Block,
    missing: List[str],
    driver: str,
    more: str = "",
) -> None:
    """One device, unless the very node that it is named after is missing."""
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
    devices.append(Device(names, edits, f"{name} {bdf} {model} {driver}{more}".replace("  ", " ")))
