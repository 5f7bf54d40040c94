"""Sets up shared GPUs on the host for the first container that shares them, and restores them after the last.

What was set up for a GPU is on its page (shim.sharing.pages).  The page is locked while daemons start and stop; the
ledger's lock is not held meanwhile, since that takes seconds.  Only the ledger knows whether a GPU is still shared.  So
whoever finds a page without a lease may end it: the poststop hook, `chandler leases`, or a create that takes the GPU
for something else.  Part of a create that shares, and of the release of its lease.
"""

from __future__ import annotations

import os

from shim import errors, paths
from shim.edits import HOOK, Edits, merge
from shim.errors import ChandlerError
from shim.host import runtimes, trust
from shim.sharing import nvidia_tools, pages
from shim.sharing.terms import MPS
from shim.state import leases

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

    from shim.edits import Hook
    from shim.sharing.pages import Page
    from shim.sharing.terms import Sharing
    from shim.state.leases import Lease


def begin(share: Sharing, state_dir: str) -> Edits:
    """Sets up what a container needs to share its GPUs, unless it is there already, and gives the container's edits.

    On a node with leases the container holds its lease already, and the end of the lease undoes this.
    Raises HostError, TrustError or RequestError; what was set up only for this container is then undone.
    """
    try:
        if share.mode == MPS and not share.managed:
            from shim.sharing import mps

            mps.check_external(share)
        elif share.managed or "time_slice" in share.request:
            for key, uuid in share.devices:
                _begin(share, state_dir, key, uuid)
        elif "time_slicing_config_path" in share.request:
            _check_file(share)
    except OSError as error:
        raise errors.HostError(
            f"{share.source}: what sharing a GPU needs cannot be set up: "
            f"{error.filename or state_dir}: {error.strerror}"
        ) from None
    except ChandlerError as error:
        raise error.within(share.source) from None
    return container_edits(share, state_dir)


def container_edits(share: Sharing, state_dir: str) -> Edits:
    """All edits of a container that shares GPUs."""
    return merge(edits(share, state_dir), hook(share, state_dir))


def edits(share: Sharing, state_dir: str) -> Edits:
    """The environment variables and mounts of a container that shares GPUs."""
    return share.edits(*pages.directories(share, state_dir)) if share.mode == MPS else share.edits("", "")


def _check_file(share: Sharing) -> None:
    path = share.request["time_slicing_config_path"]
    trust.read_trusted(path, 1 << 20, pages.share_owners())


def _begin(share: Sharing, state_dir: str, key: str, uuid: str) -> None:
    """Sets up the sharing of one GPU.  Raises HostError, TrustError or OSError."""
    config = share.config
    nvidia_tools.check(config["gpu.nvidia-smi"], "nvidia-smi")
    if "time_slicing_config_path" in share.request:
        _check_file(share)
    with pages.lock(state_dir, uuid) as lock:
        page = pages.read(state_dir, uuid, lock.descriptor)
        if page.values.get("mode") not in (None, share.mode):
            _end(page)  # left over: our lease excludes any lease for the other mode
            page = pages.Page(state_dir, uuid, {}, lock.descriptor)
        fresh = page.values.get("mode") is None
        if fresh:
            page.update(key=key, mode=share.mode, smi=config["gpu.nvidia-smi"], control=config["gpu.mps-control"])
        try:
            if share.mode == MPS:
                from shim.sharing import mps

                mps.begin(page, share)
            else:
                from shim.sharing import timeslice

                timeslice.begin(page, share)
        except BaseException:
            if fresh or page.values.get("failed"):
                try:
                    _end(page)
                except (OSError, ChandlerError):
                    pass  # the page stays, and the next container with this GPU tries again
            raise


def _end(page: Page) -> None:
    """Undoes everything that is on the page, then removes it.  Raises HostError or OSError; the page then stays."""
    if page.values.get("mode") == MPS:
        from shim.sharing import mps

        mps.end(page)
    else:
        from shim.sharing import timeslice

        timeslice.end(page)
    if page.values.get("before"):
        nvidia_tools.set_compute_mode(page.values["smi"], page.values["uuid"], page.values["before"], page.lock)
    page.remove()


def restore_gpus(state_dir: str, read: Callable[[], list[Lease]], keys: list[str] | None) -> None:
    """Undoes the sharing of GPUs that no lease shares any more.

    `keys`: only GPUs with a key that clashes with one of these (shim.state.leases); None for all GPUs.  `read` gives
    the leases.  Raises HostError.
    """
    try:
        for uuid in sorted(os.listdir(state_dir + "/shared")):
            if ".chandler-" in uuid:
                continue  # a temporary file of `files.replace`
            with pages.lock(state_dir, uuid) as lock:
                page = pages.read(state_dir, uuid, lock.descriptor)
                key, mode = page.values.get("key", ""), page.values.get("mode")
                if mode is None or keys is not None and not any(leases.clash(key, other) for other in keys):
                    continue
                if not any(lease.get("mode") == mode and key in lease["keys"] for lease in read()):
                    _end(page)
    except FileNotFoundError:
        pass  # the last page was removed, and the directory with it
    except OSError as error:
        raise errors.HostError(
            f"{state_dir}/shared: a GPU that is no longer shared cannot be put back: {error.strerror}"
        ) from None


def hook(share: Sharing, state_dir: str) -> Edits:
    """The hook that checks, before the container starts, that the MPS daemon still answers; no hook for time slices.

    Without a daemon CUDA runs all the same, and nothing says that the GPU is not shared.
    """
    if share.mode != MPS:
        return Edits()
    pipe_dir = pages.directories(share, state_dir)[0]
    check: Hook = {
        "path": runtimes.hook_program(),
        "args": ["chandler-hook", "mps-ready", pipe_dir, share.config["gpu.mps-control"]],
        "env": ["PATH=" + paths.SAFE_PATH],
    }
    return Edits([(HOOK, "createRuntime", check, share.source)])
