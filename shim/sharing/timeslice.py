"""Sets the length of a GPU's time slices for the containers that share it, and restores it after the last of them.

The length that was set is noted on the page of the GPU (shim.sharing.pages).
Source: `nvidia-smi compute-policy -h` (--set-timeslice).
"""

from __future__ import annotations

from shim import errors
from shim.sharing import nvidia_tools
from shim.sharing.terms import SLICES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.sharing.pages import Page
    from shim.sharing.terms import Sharing


def begin(page: Page, share: Sharing) -> None:
    """Sets compute mode DEFAULT, which lets several processes use the GPU, and the length of time slices.

    Raises HostError or OSError.
    """
    wanted = share.request["time_slice"]
    if page.values.get("slice") == wanted:
        return
    page.set_compute_mode("DEFAULT")
    before = page.values.get("slice")
    page.update(slice=wanted)  # noted before it is set, so that it is restored even if we are killed
    try:
        nvidia_tools.set_time_slice(page.values["smi"], page.values["uuid"], SLICES.index(wanted), page.lock)
    except errors.HostError:
        if before:
            page.update(slice=before)
        raise


def end(page: Page) -> None:
    """Sets the default length again.  Raises HostError or OSError."""
    if page.values.get("slice"):
        nvidia_tools.set_time_slice(page.values["smi"], page.values["uuid"], 0, page.lock)
        page.update(slice="")
