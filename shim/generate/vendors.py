"""The vendors whose devices Chandler can describe, as a table.  Pure."""

from __future__ import annotations

from shim.errors import HostError
from shim.generate import amd, document, intel, nvidia
from shim.generate.model import Found, Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional, Tuple

    from shim.generate.nvidia import Ask
    from shim.generate.tree import Tree

# vendor: (kind of its devices, generator)
VENDORS: Dict[str, Tuple[str, Callable[[Tree, Options, Ask], Found]]] = {
    "nvidia": ("nvidia.com/gpu", nvidia.gpus),
    "amd": ("amd.com/gpu", lambda tree, options, ask: amd.gpus(tree, options)),
    "intel": ("intel.com/gpu", lambda tree, options, ask: intel.gpus(tree, options)),
    "gaudi": ("intel.com/gaudi", lambda tree, options, ask: intel.gaudi(tree, options)),
    "npu": ("intel.com/npu", lambda tree, options, ask: intel.npu(tree, options)),
}


def of_kind(kind: str) -> str:
    """The vendor that a kind belongs to; HostError for a kind that we do not make."""
    for vendor, (own, _) in VENDORS.items():
        if kind == own:
            return vendor
    if kind.startswith(("nvidia.com/", "management.nvidia.com/")):
        return "nvidia"
    raise HostError(f"Chandler does not describe devices of kind {kind}", f"known vendors: {', '.join(VENDORS)}")


def describe(vendor: str, tree: Tree, options: Options, ask: Ask) -> Tuple[Optional[Dict[str, Any]], Found]:
    """The CDI document for a vendor's devices on this host, None where there are none, and what was found.

    Raises HostError for hardware that is there and cannot be described.
    """
    found = VENDORS[vendor][1](tree, options, ask)
    return (document.document(found, options) if found.devices else None), found
