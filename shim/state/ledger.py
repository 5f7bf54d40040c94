"""The ledger: a node's leases in one file of the state directory, one lock, no daemon.

Every change is a rename, so the file is always whole.  It carries a checksum, and a copy of it is written before it
is: the copy has what the file has, or the change that was never finished.  Where both are damaged, it is made anew
from grant records and what runtimes know (shim.state.rebuild).  A lease ends when its token is released: by the
container's poststop hook, by whoever made it when the create fails, or, where both were lost, when devices are short
and the container turns out to be gone.  Part of the create path where the configuration says `allocator = "leases"`.
"""

from __future__ import annotations

import posix

from shim import errors, jsontext, paths
from shim.edits import HOOK, LEASE, Edits
from shim.errors import ChandlerError
from shim.host import files, kernel, runtimes, trust
from shim.state import grants, leases
from shim.state.lock import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Set

    from shim.state.leases import Lease
    from shim.state.rebuild import Rebuilt

    Plan = Any  # has names and keys, the devices that a plan comes to, and sharing, how they are shared or None

MAX_LEDGER = 16 << 20
_VERSION = 1


def parse(data: bytes) -> Optional[List[Lease]]:
    """The leases in a ledger's bytes, None when they are damaged.

    The checksum says that they are what `write` was given.  An older Chandler wrote the list alone, without one, and
    roots as they were spelled.
    """
    try:
        text = files.unseal(data)
        found = jsontext.loads(data if text is None else text)
    except ChandlerError:
        return None
    if text is not None:
        found = found["leases"] if found.get("version") == _VERSION else None
        return found
    from shim.state import records

    if type(found) is not list or not all(records.is_lease(lease) for lease in found):
        return None
    for lease in found:
        if lease.get("root", "").startswith("/"):
            lease["root"] = runtimes.resolved(lease["root"])
    return found


class Ledger:
    """The ledger of one state directory."""

    __slots__ = ("path", "_state_dir", "_private", "_creating")

    def __init__(self, state_dir: str, private: bool = False) -> None:
        self.path = state_dir + "/leases"
        self._state_dir = state_dir
        self._private = private
        self._creating: Optional[Lock] = None

    def read(self) -> List[Lease]:
        """All leases, the oldest first.  Raises LedgerError when neither the file nor its copy can be read as ours."""
        missing = True
        for path in (self.path, self.path + ".copy"):
            try:
                data = files.read(path, MAX_LEDGER)[0]
                found = parse(data)
            except FileNotFoundError:
                continue
            except (OSError, ChandlerError):
                found = None
            missing = False
            if found is not None:
                if data[:1] == b"[" and (files.exists(self.path + ".copy") or self._recorded()):
                    break  # an older Chandler's, and it was not the last to write here
                return found
        if missing and not self._recorded(damaged=True):
            return []
        raise errors.LedgerError(
            f"the ledger of leases {self.path} is {'lost' if missing else 'damaged'}", "`chandler leases rebuild`"
        )

    def _recorded(self, damaged: bool = False) -> bool:
        """Whether grant records tell of leases that a ledger of ours has; `damaged`: or may do so."""
        bases = [
            base
            for base in (self._state_dir, grants.nri(self._state_dir))
            if files.exists(grants.directory(base) + "/.") and posix.listdir(grants.directory(base))
        ]
        if not bases:
            return False
        from shim.state import records

        # an older Chandler's records have no token, and do not say which process made the container
        return any(
            damaged
            if record is None
            else "token" in record or not {"pid", "owner"} & record.keys() and bool(record.get("physical"))
            for base in bases
            for _, record in records.every(base)
        )

    def write(self, found: List[Lease]) -> None:
        """Writes the copy, then the file; whoever calls holds the lock.  Raises OSError."""
        data = files.seal(jsontext.dumps({"version": _VERSION, "leases": found}))
        files.replace(self.path + ".copy", data, 0o600, temporary=self.path + ".new")
        files.replace(self.path, data, 0o600, temporary=self.path + ".new")

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
            trust.own_directory(self._state_dir, 0o700 if self._private else 0o755)
            try:
                return self._allocate(lease, plan)
            except errors.LedgerError:
                made = plan([])
                if not made.keys:
                    return made  # who needs no device needs no ledger
                if not patient:
                    raise
                self._rebuild()
            except errors.LeaseError:
                if not patient or not self.take_back():
                    raise
            return self._allocate(lease, plan)
        except OSError as error:
            raise self._failed(error) from None

    def announce(self) -> None:
        """From now until this process becomes the runtime, or ends, it makes a container: who makes the ledger anew
        waits for that, since the container's grant record may not be there yet.  Raises ChandlerError."""
        if self._creating is not None:
            return
        try:
            trust.own_directory(self._state_dir, 0o700 if self._private else 0o755)
            self._announce()
        except OSError as error:
            raise self._failed(error) from None

    def _announce(self) -> None:
        self._creating = Lock(self.path + ".creating", shared=True)
        self._creating.__enter__()

    def _rebuild(self) -> None:
        """Makes the ledger anew where that is certain.  Raises HostError or OSError."""
        if self._creating is not None:
            self._creating.__exit__()  # else two would wait for each other
        self.make_anew()
        if self._creating is not None:
            self._announce()

    def make_anew(self, asked: bool = False, force: bool = False) -> Rebuilt:
        """Writes the ledger anew from what else is known (shim.state.rebuild), once every create has ended that goes
        on now.

        `asked`: by a person, who may want it for a ledger that is not damaged; `force`: also where there are doubts.
        Raises HostError, the ledger then being as it was, or OSError.
        """
        from shim.state import rebuild

        with Lock(self.path + ".creating"), Lock(self.path + ".lock"):
            present: List[Lease] = []
            was_there = files.exists(self.path)
            try:
                present = self.read()
                if not asked:
                    return rebuild.Rebuilt(present, [], [])  # by another create
            except errors.LedgerError:
                pass
            made = rebuild.gather(self._state_dir, present)
            if not asked:
                made.doubts.extend(rebuild.unknown(self._state_dir, was_there))
            if made.doubts and not force:
                raise errors.HostError(
                    f"the ledger of leases {self.path} is damaged, and who holds which GPU is not certain: {'; '.join(made.doubts)}",
                    "delete these containers, or make the ledger without them: `chandler leases rebuild --force`"
                    if asked
                    else "`chandler leases rebuild`",
                )
            self.write(made.leases)
            for path in made.damaged:
                posix.unlink(path)
            return made

    def _allocate(self, lease: Lease, plan: Callable[[List[Lease]], Plan]) -> Plan:
        left: List[str] = []
        with Lock(self.path + ".lock"):
            present = self.read()
            own = leases.of_container(present, lease["owner"], lease.get("root", ""), lease["id"])
            if own is not None:
                raise errors.LeaseError(
                    f"a container of this name is there already: {leases.words(own)}", "delete it first"
                )
            others = [one for one in present if not leases.gives_way(one, lease)]
            made = plan(others)
            if made.keys:
                lease["names"], lease["keys"] = made.names, made.keys
                if made.sharing is not None:
                    lease.update(made.sharing.marks)
                self.write([*others, lease])
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
                    self.write(kept)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._failed(error) from None
        self.settle([key for lease in present if lease["token"] in tokens and "mode" in lease for key in lease["keys"]])
        return len(present) - len(kept)

    def settle(self, keys: List[str]) -> None:
        """Ends what was set up for sharing these devices, or parts of them, and nobody needs any more.  Raises
        HostError."""
        if keys and files.exists(self._state_dir + "/shared"):
            from shim.sharing import setup

            setup.settle(self._state_dir, self.read, keys)

    def settle_all(self) -> None:
        """The same for any device: a hook that was killed after it had ended its lease leaves some.  Raises
        HostError."""
        if files.exists(self._state_dir + "/shared"):
            from shim.sharing import setup

            setup.settle(self._state_dir, self.read, None)

    def hook(self, lease: Lease) -> Edits:
        """The poststop hook that releases a lease; the environment is its own, never the container's."""
        return Edits(
            [
                (
                    HOOK,
                    "poststop",
                    {
                        "path": runtimes.hook_program(),
                        "args": ["chandler-hook", "release", self._state_dir, lease["token"]],
                        "env": ["PATH=" + paths.SAFE_PATH],
                    },
                    LEASE,
                )
            ]
        )

    def take_back(self) -> int:
        """Ends the leases that nobody holds any longer; how many there were.  Raises HostError.

        Runtimes are asked without the lock, since that takes its time.  Meanwhile a lease may have been released, and
        its device taken again under another token; by its token none but the lease that was asked about is ended.
        """
        from shim.state import stale

        gone = [lease for lease in self.read() if stale.is_stale(lease)]
        for lease in gone:
            self.forget(lease)
        return self.release({lease["token"] for lease in gone})

    def forget(self, lease: Lease) -> None:
        """Removes the grant record of a container that is gone; before its lease ends, since then its name is free."""
        if lease["owner"] == "oci":
            from shim.state import records

            records.forget(self._state_dir, lease["root"], lease["id"], lease["token"])


def oci_lease(container: str, root: str, runtime: str, now: int, creation: Optional[Dict[str, Any]] = None) -> Lease:
    """A lease for a container that this process creates; it becomes the runtime, so its pid stays.  Raises OSError.

    `creation`: what host.creation said of that.
    """
    return {
        "token": posix.urandom(12).hex(),
        "owner": "oci",
        "id": container,
        "root": root,
        "runtime": runtime,
        **(kernel.creation(root) if creation is None else creation),
        "since": now,
    }


def nri_lease(container: str, pod: str, now: int) -> Lease:
    """A lease for a container that the NRI plugin equips, and whose end the plugin is told."""
    return {"token": posix.urandom(12).hex(), "owner": "nri", "id": container, "root": "", "pod": pod, "since": now}
