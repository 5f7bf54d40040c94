"""Which driver a CDI file was made for, and which one runs, for the sentence of a create that meets a stale file."""

from __future__ import annotations

from shim.generate import nvproc
from shim.generate.tree import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional


def drivers(missing: str, tree: Optional[Tree] = None) -> str:
    """`it was made for driver 550.54.15 and this host runs 560.35.03`, from the path that a file names in vain.

    Nothing when the path carries no version, or the very version that runs.
    """
    words = [missing.partition(".so.")[2], *missing.split("/")]  # lib….so.VERSION, or a firmware folder
    old = next((word for word in words if nvproc.is_version(word)), "")
    now = nvproc.kernel_version(tree or Tree())
    if not old or old == now:
        return ""
    return f"it was made for driver {old} and this host " + (f"runs {now}" if now else "runs no NVIDIA driver")
