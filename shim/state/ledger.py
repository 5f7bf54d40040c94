"""The ledger: a node's leases in one file of the state directory, changed under one lock, without a daemon.

Every change replaces the file by rename, so a reader never sees half of one.  The file carries a checksum.  A copy is
written before the file, so the copy holds either the same leases or the change that was not finished.  When both are
damaged, the ledger is rebuilt from grant records and from the runtimes' state directories (shim.state.rebuild).

A lease ends when its token is released.  The container's poststop hook does that, or the process that made the lease
when its create fails.  If neither did, the next create that finds too few devices ends the leases of containers that
are gone.  Part of the create path where the configuration says `allocator = "leases"`.
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
    from typing import Callable, List, Optional, Protocol, Set, TypeVar

    from shim.edits import Hook
    from shim.state.leases import Lease, Marks
    from shim.state.rebuild import Rebuilt

    class Marked(Protocol):
        """How the devices are shared (shim.sharing.terms.Sharing)."""

        marks: Marks

    class Chosen(Protocol):
        """A plan (shim.engine.Plan): the chosen devices."""

        names: List[str]
        keys: List[str]

        @property
        def sharing(self) -> Optional[Marked]: ...

    Plan = TypeVar("Plan", bound=Chosen)

MAX_LEDGER = 16 << 20
_VERSION = 1


def parse(data: bytes) -> Optional[List[Lease]]:
    """The leases in a ledger's bytes; None when the bytes are damaged.

    With a checksum the leases are as `write` wrote them, so their members are not checked again.  An older Chandler
    wrote a bare list without a checksum, and each root as the caller spelled it: that list is checked, and its roots
    are resolved.
    """
    try:
        text = files.unseal(data)
        content = jsontext.loads(data if text is None else text)
    except ChandlerError:
        return None
    if text is not None:
        content = content["leases"] if content.get("version") == _VERSION else None
        return content
    from shim.state import records

    if type(content) is not list or not all(records.is_lease(lease) for lease in content):
        return None
    for lease in content:
        if lease.get("root", "").startswith("/"):
            lease["root"] = runtimes.resolved(lease["root"])
    return content


class Ledger:
    """The ledger of one state directory.

    `private`: if the state directory does not exist, it is made with mode 0700 instead of 0755.
    """

    __slots__ = ("path", "_state_dir", "_private", "_creating")

    def __init__(self, state_dir: str, private: bool = False) -> None:
        self.path = state_dir + "/leases"
        self._state_dir = state_dir
        self._private = private
        self._creating: Optional[Lock] = None

    def read(self) -> List[Lease]:
        """All leases, the oldest first.

        Raises LedgerError when neither the file nor its copy can be used, TrustError when others could have written
        it, and HostError when it cannot be read now.
        """
        missing = True
        for path in (self.path, self.path + ".copy"):
            try:
                data = trust.read_own(path, MAX_LEDGER)
                present = parse(data)
            except FileNotFoundError:
                continue
            except errors.TrustError as error:
                raise errors.TrustError(
                    f"the ledger of leases is not believed: {error.what}", "`chandler leases rebuild`"
                ) from None
            except (OSError, ChandlerError) as error:
                if isinstance(error, OSError) and files.cannot_read_now(error):
                    raise errors.HostError(f"the ledger of leases {path} cannot be read: {error.strerror}") from None
                present = None
            missing = False
            if present is not None:
                if data[:1] == b"[" and (files.exists(self.path + ".copy") or self._recorded()):
                    break  # an older Chandler wrote this file, and a newer one has written leases here since
                return present
        if missing and not self._recorded(lost=True):
            return []
        raise errors.LedgerError(
            f"the ledger of leases {self.path} is {'lost' if missing else 'damaged'}", "`chandler leases rebuild`"
        )

    def _recorded(self, lost: bool = False) -> bool:
        """Whether a grant record shows that this Chandler has written a ledger here.

        `lost`: there is no ledger, so a damaged record shows it, too, and so does an older Chandler's.
        """
        bases = [
            base
            for base in (self._state_dir, grants.nri_directory(self._state_dir))
            if files.exists(grants.directory(base) + "/.") and posix.listdir(grants.directory(base))
        ]
        if not bases:
            return False
        from shim.state import records

        # a record without token, pid and owner is an older Chandler's: it had a lease if it names physical devices
        return any(
            lost
            if record is None
            else "token" in record or (lost and not {"pid", "owner"} & record.keys() and bool(record.get("physical")))
            for base in bases
            for _, record in records.every(base)
        )

    def write(self, entries: List[Lease]) -> None:
        """Writes the copy, then the file.  The caller holds the lock.  Raises OSError."""
        data = files.seal(jsontext.dumps({"version": _VERSION, "leases": entries}))
        files.replace(self.path + ".copy", data, 0o600, temporary=self.path + ".new")
        files.replace(self.path, data, 0o600, temporary=self.path + ".new")

    def _failed(self, error: OSError) -> errors.ChandlerError:
        return errors.HostError(f"the ledger of leases {self.path} cannot be changed: {error.strerror}")

    def allocate(self, lease: Lease, plan: Callable[[List[Lease]], Plan], patient: bool = True) -> Plan:
        """Calls `plan` with the leases of all other containers, and writes `lease` for the devices that it chooses.

        Adds names and keys to `lease`, and gives the plan.  When too few devices are free, the leases of containers
        that are gone are ended and `plan` is called once more.  Without `patient` that is left to the caller, since it
        asks runtimes, which may be slow.
        Raises what `plan` raises (LeaseError: too few devices are free), LeaseError when the container holds a lease
        already, and HostError.
        """
        try:
            trust.own_directory(self._state_dir, 0o700 if self._private else 0o755)
            try:
                return self._allocate(lease, plan)
            except errors.LedgerError:
                planned = plan([])
                if not planned.keys:
                    return planned  # a container without devices needs no ledger
                if not patient:
                    raise
                self._rebuild_if_certain()
            except errors.LeaseError:
                if not patient or not self.end_stale_leases():
                    raise
            return self._allocate(lease, plan)
        except OSError as error:
            raise self._failed(error) from None

    def announce(self) -> None:
        """Says that this process creates a container, until it becomes the runtime or ends.  Raises ChandlerError.

        A rebuild of the ledger waits for that, since the container's grant record may not be written yet.
        """
        if self._creating is not None:
            return
        try:
            trust.own_directory(self._state_dir, 0o700 if self._private else 0o755)
            self._announce()
        except OSError as error:
            raise self._failed(error) from None

    def _announce(self) -> None:
        # no `with`: the descriptor is closed by the exec of the runtime, or when this process ends
        self._creating = Lock(self.path + ".creating", shared=True)
        self._creating.__enter__()

    def _rebuild_if_certain(self) -> None:
        """Rebuilds the damaged ledger if there is no doubt about who holds what.  Raises HostError or OSError."""
        if self._creating is not None:
            self._creating.__exit__()  # two creates that rebuild at once would wait for each other's shared lock
        self.rebuild()
        if self._creating is not None:
            self._announce()

    def rebuild(self, asked: bool = False, force: bool = False) -> Rebuilt:
        """Rebuilds the ledger (shim.state.rebuild) and writes it.  First waits for all creates that are going on.

        `asked`: a person asked for it, so a ledger that is not damaged is rebuilt, too.  `force`: writes it also when
        it is not certain who holds which device.  Raises HostError, which leaves the ledger as it was, or OSError.
        """
        from shim.state import rebuild

        with Lock(self.path + ".creating"), Lock(self.path + ".lock"):
            present: List[Lease] = []
            was_there = files.exists(self.path)
            try:
                present = self.read()
                if not asked:
                    return rebuild.Rebuilt(present, [], [])  # another create has rebuilt it while we waited
            except (errors.LedgerError, errors.TrustError):
                pass
            rebuilt = rebuild.gather(self._state_dir, present)
            if not asked:
                rebuilt.doubts.extend(rebuild.reasons_for_doubt(self._state_dir, was_there))
            if rebuilt.doubts and not force:
                raise errors.HostError(
                    f"the ledger of leases {self.path} is damaged, and who holds which GPU is not certain: "
                    f"{'; '.join(rebuilt.doubts)}",
                    "delete these containers, or make the ledger without them: `chandler leases rebuild --force`"
                    if asked
                    else "`chandler leases rebuild`",
                )
            self.write(rebuilt.leases)
            for path in rebuilt.damaged:
                posix.unlink(path)
            return rebuilt

    def _allocate(self, lease: Lease, plan: Callable[[List[Lease]], Plan]) -> Plan:
        unshared: List[str] = []  # keys of devices whose shared lease was replaced by this one
        with Lock(self.path + ".lock"):
            present = self.read()
            existing = leases.of_container(present, lease["owner"], lease.get("root", ""), lease["id"])
            if existing is not None:
                raise errors.LeaseError(
                    f"a container of this name is there already: {leases.describe(existing)}", "delete it first"
                )
            others = [other for other in present if not leases.can_be_taken_over(other, lease)]
            planned = plan(others)
            if planned.keys:
                lease["names"], lease["keys"] = planned.names, planned.keys
                if planned.sharing is not None:
                    lease.update(planned.sharing.marks)  # type: ignore[typeddict-item]  # Lease has all keys of Marks
                self.write([*others, lease] if "claim" not in lease else self._with_sandbox(lease, others))
                unshared = [
                    key for other in present if other not in others and "mode" in other for key in other["keys"]
                ]
        if unshared:
            self.restore_gpus(unshared)  # without the ledger's lock, since an MPS daemon may take seconds to stop
        return planned

    def _with_sandbox(self, lease: Lease, others: List[Lease]) -> List[Lease]:
        """All leases, with that of the pod's sandbox, which is made with the first lease of the pod."""
        for other in others:
            if other["id"] == lease["claim"]:
                if "allocated" in other:
                    lease["allocated"] = True
                return [*others, lease]
        return [*others, lease, leases.of_sandbox(lease)]

    def release(self, tokens: Set[str], undone: bool = False) -> int:
        """Ends the leases with these tokens, and gives their number.  Raises HostError.

        When the last lease of a shared device ends, what was set up for sharing it is undone.
        `undone`: the containers have not got their devices, so the lease of a pod ends, too, if only they had it.
        """
        try:
            with Lock(self.path + ".lock"):
                present = self.read()
                kept = [lease for lease in present if lease["token"] not in tokens]
                if undone:
                    kept = leases.without_lone_sandboxes(kept, [lease for lease in present if lease not in kept])
                if len(kept) < len(present):
                    self.write(kept)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._failed(error) from None
        self.restore_gpus(
            [key for lease in present if lease["token"] in tokens and "mode" in lease for key in lease["keys"]]
        )
        return len(present) - len(kept)

    def restore_gpus(self, keys: List[str]) -> None:
        """Undoes the sharing of these devices, and of their parts, where no lease needs it.  Raises HostError."""
        if keys and files.exists(self._state_dir + "/shared"):
            from shim.sharing import setup

            setup.restore_gpus(self._state_dir, self.read, keys)

    def restore_all_gpus(self) -> None:
        """`restore_gpus` for every device.  Raises HostError.

        A hook that was killed after it had ended its lease leaves the sharing set up.
        """
        if files.exists(self._state_dir + "/shared"):
            from shim.sharing import setup

            setup.restore_gpus(self._state_dir, self.read, None)

    def hook(self, token: str) -> Edits:
        """The poststop hook that releases the lease with this token.  It has an environment of its own, not the
        container's."""
        hook: Hook = {
            "path": runtimes.hook_program(),
            "args": ["chandler-hook", "release", self._state_dir, token],
            "env": ["PATH=" + paths.SAFE_PATH],
        }
        return Edits([(HOOK, "poststop", hook, LEASE)])

    def end_stale_leases(self) -> int:
        """Ends the leases of containers that are gone, and gives their number.  Raises HostError.

        Runtimes are asked without the lock, since they may be slow.  Meanwhile the lease may end, and another container
        may lease the device.  Leases are ended by token, so that container's lease is not touched.
        """
        from shim.state import stale

        gone = [lease for lease in self.read() if stale.is_stale(lease)]
        for lease in gone:
            self.forget(lease)
        return self.release({lease["token"] for lease in gone})

    def forget(self, lease: Lease) -> None:
        """Removes the grant record of a container that is gone.

        Called before its lease ends: after that a new container may have the name, and the record would be its own.
        """
        if lease["owner"] == "oci":
            from shim.state import records

            records.forget(self._state_dir, lease["root"], lease["id"], lease["token"])


def oci_lease(container: str, root: str, runtime: str, now: int, creation: Optional[kernel.Creation] = None) -> Lease:
    """A lease for a container that this process creates.  Raises OSError.

    The pid in it stays right, since this process becomes the runtime by exec.
    `creation`: the result of shim.host.kernel.creation, if the caller has it already.
    """
    lease: Lease = {
        "token": posix.urandom(12).hex(),
        "owner": "oci",
        "id": container,
        "root": root,
        "runtime": runtime,
        "since": now,
    }
    created = kernel.creation(root) if creation is None else creation
    lease.update(created)  # type: ignore[typeddict-item]  # Lease has all keys of Creation
    return lease


def dra_lease(uid: str, namespace: str, name: str, now: int) -> Lease:
    """A lease for a ResourceClaim, which the kubelet has prepared and tells when to unprepare."""
    return {
        "token": posix.urandom(12).hex(),
        "owner": "dra",
        "id": uid,
        "root": "",
        "namespace": namespace,
        "name": name,
        "boot": kernel.boot(),
        "since": now,
    }


def nri_lease(container: str, pod: str, now: int) -> Lease:
    """A lease for a container that gets its devices from the NRI plugin, which also learns of the container's end."""
    return {"token": posix.urandom(12).hex(), "owner": "nri", "id": container, "root": "", "pod": pod, "since": now}
