"""The length of a GPU's time slices, set for those who share it and put back after the last of them.

On a page of shim.shared.  Source: reference/gpu-sharing, "Time-slicing".
"""

from __future__ import annotations

from shim import errors, nvtools
from shim.sharing import SLICES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.shared import Page
    from shim.sharing import Sharing


def begin(page: Page, share: Sharing) -> None:
    """Sets compute mode DEFAULT, without which nobody shares, and the length.  Raises HostError."""
    wanted = share.wish["time_slice"]
    if page.get("slice") == wanted:
        return
    page.set_compute_mode("DEFAULT")
    before = page.get("slice")
    page.update(slice=wanted)  # before it is true, so that it is put back whatever happens
    try:
        nvtools.set_time_slice(page["smi"], page["uuid"], SLICES.index(wanted), page.lock)
    except errors.HostError:
        if before:
            page.update(slice=before)
        raise


def end(page: Page) -> None:
    """Puts back the default length.  Raises HostError."""
    if page.get("slice"):
        nvtools.set_time_slice(page["smi"], page["uuid"], 0, page.lock)
        page.update(slice="")
