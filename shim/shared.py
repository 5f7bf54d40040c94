"""What is set up on the host for GPUs that are shared: begun with the first container, ended after the last.

Each such GPU has a page in the state directory, `shared/UUID`: who began it, what was there before (the compute mode,
noted before it is changed) and what runs for it.  A page is read and changed under a lock of the GPU's own, which is
held while daemons start and stop; the ledger's lock is never held meanwhile.  Whether a GPU is still shared the ledger
alone knows, so whoever finds a page that no lease stands for may end it: the poststop hook, `chandler leases`, and a
create that takes the GPU for something else.  Part of a create that shares, and of the release of its lease.
"""

from __future__ import annotations

import os

from shim import errors, files, jsontext, leases, ledger, nvtools
from shim.edits import HOOK, Edits, merge
from shim.errors import ChandlerError
from shim.lock import Lock
from shim.sharing import MPS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional

    from shim.leases import Lease
    from shim.sharing import Sharing

_MAX_PAGE = 1 << 16


class Page:
    """One GPU's page; the caller holds the GPU's `lock`, a descriptor.  A value that is set is on the disk before anything
    else happens."""

    def __init__(self, state_dir: str, uuid: str, values: Dict[str, Any], lock: int = -1) -> None:
        self.state_dir = state_dir
        self.lock = lock
        self.values = {"uuid": uuid, **values}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str) -> Any:
        """A value, None where there is none."""
        return self.values.get(key)

    def update(self, **values: Any) -> None:
        """Sets values.  Raises OSError."""
        self.values.update(values)
        path = f"{self.state_dir}/shared/{self.values['uuid']}"
        data = jsontext.dumps(self.values) + b"\n"
        try:
            files.replace(path, data, 0o600)
        except FileNotFoundError:
            files.make_directory(self.state_dir + "/shared", 0o700)
            files.replace(path, data, 0o600)

    def set_compute_mode(self, mode: str) -> None:
        """Changes the compute mode; what it was before is noted first, and only the first time.  Raises HostError or OSError."""
        before = nvtools.compute_mode(self["smi"], self["uuid"])
        if before == mode:
            return
        if not self.get("before"):
            self.update(before=before)
        nvtools.set_compute_mode(self["smi"], self["uuid"], mode, self.lock)

    def end(self) -> None:
        """Puts everything back, and tears the page out.  Raises HostError or OSError; the page then stays."""
        if self.get("mode") == MPS:
            from shim import mps
            mps.end(self)
        else:
            from shim import timeslice
            timeslice.end(self)
        if self.get("before"):
            nvtools.set_compute_mode(self["smi"], self["uuid"], self["before"], self.lock)
        os.unlink(f"{self.state_dir}/shared/{self['uuid']}")
        try:
            os.rmdir(self.state_dir + "/shared")  # a create that takes devices looks for it
        except OSError:
            pass


def _lock(state_dir: str, uuid: str) -> Lock:
    files.make_directory(state_dir + "/shared-locks", 0o700)
    return Lock(f"{state_dir}/shared-locks/{uuid}")


def _page(state_dir: str, uuid: str, lock: int = -1) -> Page:
    """The page of a GPU, an empty one where there is none.  Raises OSError or HostError."""
    try:
        values = jsontext.loads(files.read(f"{state_dir}/shared/{uuid}", _MAX_PAGE)[0])
    except FileNotFoundError:
        values = {}
    except ChandlerError as error:
        raise errors.HostError(f"{state_dir}/shared/{uuid} is damaged: {error.what}", "remove it when nothing shares this GPU") from None
    return Page(state_dir, uuid, values, lock)


def begin(share: Sharing, state_dir: str) -> Edits:
    """Sets up what a container's share needs, or finds it there, and gives the edits that belong to it.

    The container holds its lease already, where leases are kept; whoever ends that ends this, too.
    Raises HostError, TrustError or RequestError; what was begun for this container alone is then put back.
    """
    try:
        if share.mode == MPS and not share.managed:
            from shim import mps
            mps.check_external(share)
        elif share.managed or "time_slice" in share.wish:
            for key, uuid in share.devices:
                _begin(share, state_dir, key, uuid)
        elif "time_slicing_config_path" in share.wish:
            _check_file(share)
    except OSError as error:
        raise errors.HostError(f"{share.source}: what sharing a GPU needs cannot be set up: {error.filename or state_dir}: {error.strerror}") from None
    except ChandlerError as error:
        raise error.within(share.source) from None
    return merge(edits(share, state_dir), hook(share, state_dir))


def edits(share: Sharing, state_dir: str) -> Edits:
    """The environment and the mounts of a container's share."""
    return share.edits(*directories(share, state_dir)) if share.mode == MPS else share.edits("", "")


def _check_file(share: Sharing) -> None:
    path = share.wish["time_slicing_config_path"]
    files.read_trusted(path, 1 << 20, share_owners())


def share_owners() -> Dict[int, str]:
    """Whose files and directories may be given to a container."""
    from shim import host
    return host.trusted_owners(host.user_namespace())


def _begin(share: Sharing, state_dir: str, key: str, uuid: str) -> None:
    config = share.config
    nvtools.check(config["gpu.nvidia-smi"], "nvidia-smi")
    if "time_slicing_config_path" in share.wish:
        _check_file(share)
    with _lock(state_dir, uuid) as lock:
        page = _page(state_dir, uuid, lock.descriptor)
        if page.get("mode") not in (None, share.mode):
            page.end()  # nobody has a lease for that any more, or we had none
            page = Page(state_dir, uuid, {}, lock.descriptor)
        fresh = page.get("mode") is None
        if fresh:
            page.update(key=key, mode=share.mode, smi=config["gpu.nvidia-smi"], control=config["gpu.mps-control"])
        try:
            if share.mode == MPS:
                from shim import mps
                mps.begin(page, share)
            else:
                from shim import timeslice
                timeslice.begin(page, share)
        except BaseException:
            if fresh or page.get("failed"):
                try:
                    page.end()
                except (OSError, ChandlerError):
                    pass  # the page stays, and whoever takes the GPU next tries again
            raise


def settle(state_dir: str, read: Callable[[], List[Lease]], keys: Optional[List[str]]) -> None:
    """Ends what was begun for GPUs that nobody shares any more, of those that `keys` are or are parts of; None: of all.

    `read` gives the leases.  Raises HostError.
    """
    try:
        for uuid in sorted(os.listdir(state_dir + "/shared")):
            if ".chandler-" in uuid:
                continue  # half a page
            with _lock(state_dir, uuid) as lock:
                page = _page(state_dir, uuid, lock.descriptor)
                key, mode = page.get("key"), page.get("mode")
                if mode is None or keys is not None and not any(leases.clash(key, one) for one in keys):
                    continue
                if not any(lease.get("mode") == mode and key in lease["keys"] for lease in read()):
                    page.end()
    except FileNotFoundError:
        pass  # the last page is gone, and the directory with it
    except OSError as error:
        raise errors.HostError(f"{state_dir}/shared: a GPU that is no longer shared cannot be put back: {error.strerror}") from None


def pages(state_dir: str) -> List[Dict[str, Any]]:
    """What all pages say, for people."""
    found = []
    try:
        for uuid in sorted(os.listdir(state_dir + "/shared")):
            found.append(_page(state_dir, uuid).values)
    except (OSError, ChandlerError):
        pass
    return found


def directories(share: Sharing, state_dir: str) -> List[str]:
    """The daemon's directory of pipes and that of its shared memory, on the host."""
    if not share.managed:
        return [share.wish.get("mps_pipe_dir", share.config["gpu.mps-pipe-dir"]), share.config["gpu.mps-shm-dir"]]
    base = f"{mps_base(state_dir)}/{share.devices[0][1]}"
    return [base + "/pipe", base + "/shm" if nvtools.has_systemd() else share.config["gpu.mps-shm-dir"]]


def mps_base(state_dir: str) -> str:
    """Where daemons of Chandler's own have their directories; those of the unit are fixed in it."""
    from shim import paths
    return (paths.STATE_DIR if nvtools.has_systemd() else state_dir) + "/mps"


def hook(share: Sharing, state_dir: str) -> Edits:
    """Before the container starts the daemon must still answer: without it CUDA would run, and not say that it does not share."""
    if share.mode != MPS:
        return Edits()
    pipe_dir = directories(share, state_dir)[0]
    return Edits([(HOOK, "createRuntime", {
        "path": ledger.hook_program(), "args": ["chandler-hook", "mps-ready", pipe_dir, share.config["gpu.mps-control"]],
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}, share.source)])
