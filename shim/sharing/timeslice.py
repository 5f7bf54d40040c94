"""The length of a GPU's time slices, set for those who share it and put back after the last of them.

What was set is noted on the page of the GPU (shim.sharing.pages).
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
    """Sets compute mode DEFAULT, without which nobody shares, and the length.  Raises HostError."""
    wanted = share.wish["time_slice"]
    if page.get("slice") == wanted:
        return
    page.set_compute_mode("DEFAULT")
    before = page.get("slice")
    page.update(slice=wanted)  # before it is true, so that it is put back whatever happens
    try:
        nvidia_tools.set_time_slice(page["smi"], page["uuid"], SLICES.index(wanted), page.lock)
    except errors.HostError:
        if before:
            page.update(slice=before)
        raise


def end(page: Page) -> None:
    """Puts back the default length.  Raises HostError."""
    if page.get("slice"):
        nvidia_tools.set_time_slice(page["smi"], page["uuid"], 0, page.lock)
        page.update(slice="")
