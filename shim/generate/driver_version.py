"""Tells which driver version a CDI file was made for and which one runs, for a create that meets a stale CDI file.

A create imports this module only then.
"""

from __future__ import annotations

from shim.generate import nvproc
from shim.generate.tree import HostTree


def remedy(missing: str, tree: HostTree | None = None) -> str:
    """What to do about a CDI file that names `missing`, a path that does not exist.

    The sentence has both driver versions where they differ.
    """
    # The version is in lib….so.VERSION, or is the name of a firmware directory.
    words = [missing.partition(".so.")[2], *missing.split("/")]
    old = next((word for word in words if nvproc.is_version(word)), "")
    now = nvproc.kernel_version(tree or HostTree())
    why = "the file is older than the driver"
    if old and old != now:
        why = f"the file was made for driver {old} and this host " + (f"runs {now}" if now else "runs no NVIDIA driver")
    return f"{why}: generate it anew (`chandler cdi generate`), then run `chandler refresh`"
