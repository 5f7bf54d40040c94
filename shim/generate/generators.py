"""The generators of CDI files, by the `generator` key of the vendor table.  Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from shim.errors import HostError
from shim.generate import amd, cdi_file, intel, nvidia
from shim.generate.model import Description, Options
from shim.gpu.vendors import NVIDIA, VENDORS, Vendor, of_kind

if TYPE_CHECKING:
    from shim.generate.nvidia import Ask
    from shim.generate.tree import HostTree
    from shim.shapes import Document

# Vendor.generator: the function that finds the vendor's devices.
GENERATORS: dict[str, Callable[[Vendor, HostTree, Options, Ask], Description]] = {
    "nvidia": nvidia.gpus,
    "amd": lambda vendor, tree, options, ask: amd.gpus(vendor, tree, options),
    "drm": lambda vendor, tree, options, ask: intel.gpus(vendor, tree, options),
    "accel": lambda vendor, tree, options, ask: intel.accelerators(vendor, tree, options),
}


def vendor_name(kind: str) -> str:
    """The vendor that a kind belongs to.  Raises HostError for a kind that we do not generate."""
    # also the kinds of shim.generate.nvmodes, which the vendor table does not have
    if kind.startswith(("nvidia.com/", "management.nvidia.com/")):
        return NVIDIA.name
    vendor = of_kind(kind)
    if not vendor.name:
        raise HostError(
            f"Chandler does not describe devices of kind {kind}",
            f"known vendors: {', '.join(each.name for each in VENDORS)}",
        )
    return vendor.name


def describe(name: str, tree: HostTree, options: Options, ask: Ask) -> tuple[Document | None, Description]:
    """The CDI document for a vendor's devices on this host (None where there are none), and what the generator found.

    Raises HostError for hardware that is there and cannot be described.
    """
    vendor = next(each for each in VENDORS if name in each.names)
    description = GENERATORS[vendor.generator](vendor, tree, options, ask)
    return (cdi_file.document(description, options) if description.devices else None), description
