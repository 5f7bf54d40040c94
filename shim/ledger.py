"""The ledger: a node's leases in one file of the state directory, one lock, no daemon.

Every change is a rename, so the file is always whole.  A lease ends when its token is released: by the container's
poststop hook, by whoever made it when the create fails, or, where both were lost, when devices are short and the
container turns out to be gone.  Part of the create path where the configuration says `allocator = "leases"`.
"""

from __future__ import annotations

import posix
import sys

from shim import errors, files, host, jsontext, leases, paths
from shim.edits import HOOK, Edits
from shim.errors import ChandlerError
from shim.lock import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List, Set

    from shim.leases import Lease

    Plan = Any  # has names and keys, the devices that a plan comes to, and sharing, how they are shared or None

MAX_LEDGER = 16 << 20


class Ledger:
    """The ledger of one state directory."""

    __slots__ = ("path", "_state_dir", "_private")

    def __init__(self, state_dir: str, private: bool = False) -> None:
        self.path = state_dir + "/leases"
        self._state_dir = state_dir
        self._private = private

    def read(self) -> List[Lease]:
        """All leases, the oldest first.  Raises HostError when the file cannot be read as ours."""
        try:
            found: List[Lease] = jsontext.loads(files.read(self.path, MAX_LEDGER)[0])
            if all(type(lease["token"]) is str and type(lease["keys"]) is list for lease in found):
                return found
        except FileNotFoundError:
            return []
        except (OSError, ChandlerError, KeyError, TypeError):
            pass
        raise errors.HostError(f"the ledger of leases {self.path} is damaged",
                               "remove it when no container with a GPU runs")

    def _write(self, found: List[Lease]) -> None:
        files.replace(self.path, jsontext.dumps(found) + b"\n", 0o600)

    def _failed(self, error: OSError) -> errors.ChandlerError:
        return errors.HostError(f"the ledger of leases {self.path} cannot be changed: {error.strerror}")

    def allocate(self, lease: Lease, plan: Callable[[List[Lease]], Plan], patient: bool = True) -> Plan:
        """What `plan` makes of the leases of all others; what it takes is then held by `lease`, to which names and
        keys are added.

        A plan for which devices are short is made once more after leases that nobody holds any longer are taken back;
        without `patient` that is left to the caller, since runtimes may take their time to answer.
        Raises what `plan` raises (LeaseError: devices are short), LeaseError when the container holds a lease
        already, and HostError.
        """
        try:
            files.own_directory(self._state_dir, 0o700 if self._private else 0o755)
            try:
                return self._allocate(lease, plan)
            except errors.LeaseError:
                if not patient or not self.take_back():
                    raise
            return self._allocate(lease, plan)
        except OSError as error:
            raise self._failed(error) from None

    def _allocate(self, lease: Lease, plan: Callable[[List[Lease]], Plan]) -> Plan:
        left: List[str] = []
        with Lock(self.path + ".lock"):
            present = self.read()
            own = leases.of_container(present, lease["owner"], lease.get("root", ""), lease["id"])
            if own is not None:
                raise errors.LeaseError(f"a container of this name is there already: {leases.words(own)}", "delete it first")
            others = [one for one in present if not leases.gives_way(one, lease)]
            made = plan(others)
            if made.keys:
                lease["names"], lease["keys"] = made.names, made.keys
                if made.sharing is not None:
                    lease.update(made.sharing.marks)
                self._write([*others, lease])
                left = [key for one in present if one not in others and "mode" in one for key in one["keys"]]
        if left:
            self.settle(left)
        return made

    def release(self, tokens: Set[str]) -> int:
        """Ends the leases with these tokens; how many there were.  Raises HostError.

        What was set up for sharing a device ends with the last lease of those who share it.
        """
        try:
            with Lock(self.path + ".lock"):
                present = self.read()
                kept = [lease for lease in present if lease["token"] not in tokens]
                if len(kept) < len(present):
                    self._write(kept)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._failed(error) from None
        self.settle([key for lease in present if lease["token"] in tokens and "mode" in lease for key in lease["keys"]])
        return len(present) - len(kept)

    def settle(self, keys: List[str]) -> None:
        """Ends what was set up for sharing these devices, or parts of them, and nobody needs any more.  Raises HostError."""
        if keys and host.exists(self._state_dir + "/shared"):
            from shim import shared
            shared.settle(self._state_dir, self.read, keys)

    def settle_all(self) -> None:
        """The same for any device: a hook that was killed after it had ended its lease leaves some.  Raises HostError."""
        if host.exists(self._state_dir + "/shared"):
            from shim import shared
            shared.settle(self._state_dir, self.read, None)

    def hook(self, lease: Lease) -> Edits:
        """The poststop hook that releases a lease; the environment is its own, never the container's."""
        return Edits([(HOOK, "poststop", {"path": hook_program(), "args": ["chandler-hook", "release", self._state_dir, lease["token"]],
                                          "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}, "lease")])

    def take_back(self) -> int:
        """Ends the leases that nobody holds any longer; how many there were.  Raises HostError.

        Runtimes are asked without the lock, since that takes its time.  Meanwhile a lease may have been released, and
        its device taken again under another token; by its token none but the lease that was asked about is ended.
        """
        from shim import stale
        return self.release({lease["token"] for lease in self.read() if stale.is_stale(lease)})


def hook_program() -> str:
    """chandler-hook."""
    return paths.HOOK if host.exists(paths.HOOK) else sys.path[0] + "/packaging/bin/chandler-hook"  # the latter in a checkout


def oci_lease(container: str, root: str, runtime: str, now: int) -> Lease:
    """A lease for a container that this process creates; it becomes the runtime, so its pid stays.  Raises OSError."""
    pid = posix.getpid()
    return {"token": posix.urandom(12).hex(), "owner": "oci", "id": container, "root": root, "runtime": runtime,
            "pid": pid, "started": started(pid), "since": now}


def nri_lease(container: str, pod: str, now: int) -> Lease:
    """A lease for a container that the NRI plugin equips, and whose end the plugin is told."""
    return {"token": posix.urandom(12).hex(), "owner": "nri", "id": container, "root": "", "pod": pod, "since": now}


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when there is none.  Source: proc(5), /proc/pid/stat."""
    try:
        descriptor = posix.open(f"/proc/{pid}/stat", posix.O_RDONLY | posix.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return int(posix.read(descriptor, 4096).rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0
    finally:
        posix.close(descriptor)
