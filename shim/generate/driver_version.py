"""Which driver a CDI file was made for, and which one runs, for the sentence of a create that meets a stale file.

Imported when that has happened, and never before.
"""

from __future__ import annotations

from shim.generate import nvproc
from shim.generate.tree import HostTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional


def remedy(missing: str, tree: Optional[HostTree] = None) -> str:
    """What to do about a file that names the path `missing` in vain, with both driver versions where they differ."""
    words = [missing.partition(".so.")[2], *missing.split("/")]  # lib….so.VERSION, or a folder of firmware
    old = next((word for word in words if nvproc.is_version(word)), "")
    now = nvproc.kernel_version(tree or HostTree())
    why = "the file is older than the driver"
    if old and old != now:
        why = f"the file was made for driver {old} and this host " + (f"runs {now}" if now else "runs no NVIDIA driver")
    return f"{why}: generate it anew (`chandler cdi generate`), then run `chandler refresh`"
