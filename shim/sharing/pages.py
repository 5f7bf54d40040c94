"""The pages of shared GPUs, `shared/UUID` in the state directory, and the directories of MPS daemons.

A page says how the GPU is shared, which daemon runs for it, and what has to be restored afterwards (the compute mode,
noted before it is changed).  It is read and changed under the GPU's own lock.
"""

from __future__ import annotations

import os

from shim import errors, jsontext, paths
from shim.errors import ChandlerError
from shim.host import files, trust, userns
from shim.sharing import nvidia_tools
from shim.state.lock import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypedDict, Unpack

    from shim.sharing.terms import Sharing

    class PageValues(TypedDict, total=False):
        """What a page says."""

        uuid: str
        key: str  # of shim.state.leases
        mode: str  # mps or time-slice
        smi: str  # the path of nvidia-smi
        control: str  # the path of nvidia-cuda-mps-control
        before: str  # the compute mode that has to be restored
        slice: str  # the time slice that was set; '' for the default
        # of the daemon
        base: str  # the parent of its directories
        unit: str  # of systemd; '' without
        pid: int  # 0 under systemd
        started: int  # clock ticks
        ready: bool  # whether it has answered
        failed: bool  # until the daemon has answered: what was begun has to be ended


_MAX_PAGE = 1 << 16  # bytes


class Page:
    """One GPU's page.  `lock`: the descriptor of the GPU's lock, which the caller holds.

    `update` writes the file at once, so that whatever changes on the host afterwards can be undone if we are killed.
    """

    def __init__(self, state_dir: str, uuid: str, values: PageValues, lock: int = -1) -> None:
        self.state_dir = state_dir
        self.lock = lock
        self.values: PageValues = {"uuid": uuid, **values}

    def update(self, **values: Unpack[PageValues]) -> None:
        """Sets values, and writes the page.  Raises OSError."""
        self.values.update(values)
        path = f"{self.state_dir}/shared/{self.values['uuid']}"
        data = jsontext.dumps(self.values) + b"\n"
        try:
            files.replace(path, data, 0o600)
        except FileNotFoundError:
            files.make_directory(self.state_dir + "/shared", 0o700)
            files.replace(path, data, 0o600)

    def set_compute_mode(self, mode: str) -> None:
        """Changes the compute mode.  Raises HostError or OSError.

        The mode from before the first change is noted as `before`, so that it can be restored.
        """
        before = nvidia_tools.compute_mode(self.values["smi"], self.values["uuid"])
        if before == mode:
            return
        if not self.values.get("before"):
            self.update(before=before)
        nvidia_tools.set_compute_mode(self.values["smi"], self.values["uuid"], mode, self.lock)

    def remove(self) -> None:
        """Removes the page.  Raises OSError."""
        os.unlink(f"{self.state_dir}/shared/{self.values['uuid']}")
        try:
            os.rmdir(self.state_dir + "/shared")  # without the directory, other creates need not look for pages
        except OSError:
            pass


def lock(state_dir: str, uuid: str) -> Lock:
    """The lock of a GPU's page.  Raises OSError."""
    files.make_directory(state_dir + "/shared-locks", 0o700)
    return Lock(f"{state_dir}/shared-locks/{uuid}")


def read(state_dir: str, uuid: str, lock: int = -1) -> Page:
    """The page of a GPU, an empty one if it has none.

    Raises OSError, HostError, or TrustError when others could have written it.
    """
    try:
        values = jsontext.loads(trust.read_own(f"{state_dir}/shared/{uuid}", _MAX_PAGE))
    except FileNotFoundError:
        values = {}
    except errors.TrustError:
        raise
    except ChandlerError as error:
        raise errors.HostError(
            f"{state_dir}/shared/{uuid} is damaged: {error.what}", "remove it when nothing shares this GPU"
        ) from None
    return Page(state_dir, uuid, values, lock)


def every(state_dir: str) -> list[PageValues]:
    """The values of all pages, for people.  They are read without locks, up to the first that cannot be read."""
    result = []
    try:
        for uuid in sorted(os.listdir(state_dir + "/shared")):
            result.append(read(state_dir, uuid).values)
    except (OSError, ChandlerError):
        pass
    return result


def directories(share: Sharing, state_dir: str) -> list[str]:
    """The daemon's pipe directory and its shared memory directory, on the host."""
    if not share.managed:
        return [share.request.get("mps_pipe_dir", share.config["gpu.mps-pipe-dir"]), share.config["gpu.mps-shm-dir"]]
    base = f"{mps_base(state_dir)}/{share.devices[0][1]}"
    return [base + "/pipe", base + "/shm" if nvidia_tools.has_systemd() else share.config["gpu.mps-shm-dir"]]


def mps_base(state_dir: str) -> str:
    """The parent of the directories of Chandler's own daemons.  Under systemd the unit file fixes it."""
    return (paths.STATE_DIR if nvidia_tools.has_systemd() else state_dir) + "/mps"


def share_owners() -> dict[int, str]:
    """The owners, by uid, whose files and directories may be given to a container that shares a GPU."""
    return userns.trusted_owners(userns.user_namespace())
