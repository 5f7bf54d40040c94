"""Creates whose answers have to wait for slow work, and what stays reserved for those that were refused meanwhile.

A create waits for its work for PATIENCE seconds, counted from the first create that wanted the same devices.  The limit
is shared because the runtime asks for one container at a time, so each waiting create delays all others.

A create that is refused because its work takes longer leaves a hold: the work goes on and the lease stays, so that the
devices are neither put back nor given to another container.  The kubelet's retry is another container of the same pod
and name.  It takes the hold's place, or is refused with the error when the work has failed.  A hold ends
PATIENCE_FOR_RETRY seconds after its work when no retry comes, or with its pod.

Nothing here reads a clock: `now` is the caller's time.monotonic, in seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

from shim.errors import ChandlerError
from shim.state import leases

if TYPE_CHECKING:
    from shim.nri.work import Work
    from shim.state.leases import Lease

PATIENCE = 1.5  # seconds that a create waits; the runtime stops waiting after two
PATIENCE_FOR_RETRY = 120.0  # seconds; the kubelet tries a pod again after ten or some tens of seconds


class Starting(ChandlerError):
    """A create is refused because what its container needs is still being set up."""

    def __init__(self, what: str, todo: str = "the kubelet does so by itself") -> None:
        super().__init__(what, todo)


class PendingCreate:
    """The answer to a create that waits for `work`, until the work has ended or the time is `deadline`.

    `answer` gives the adjustment or raises the refusal.  `abandon` is called instead when the runtime no longer waits.
    """

    def __init__(self, work: Work, deadline: float, answer: Callable[[], Any], abandon: Callable[[], None]) -> None:
        self.work = work
        self.deadline = deadline
        self.answer = answer
        self.abandon = abandon

    def due(self, now: float) -> bool:
        """Whether `answer` can be called."""
        return self.work.done or now >= self.deadline


class Hold:
    """What a refused create leaves for its retry.

    `lease`: None where the node keeps no leases.  `work`: None once it has ended.  `words`: the text of the refusal,
    which says what is being set up.  `until`: the time at which the hold ends when no retry comes, set when the
    work ends.  While the work goes on, 0 means that the hold is to end together with its work.
    """

    def __init__(self, lease: Lease | None, work: Work | None, words: str, until: float = 1.0) -> None:
        self.lease = lease
        self.work = work
        self.words = words
        self.until = until
        self.error: ChandlerError | None = None

    @property
    def keys(self) -> list[str]:
        """The keys of the devices that stay reserved."""
        return self.lease["keys"] if self.lease is not None else []

    @property
    def token(self) -> str:
        """The token of the lease; '' where there is none."""
        return self.lease["token"] if self.lease is not None else ""


class Holds:
    """All holds, by pod and container name.  `end` ends the lease of a hold, and undoes what was set up for it."""

    def __init__(self, end: Callable[[Lease], None]) -> None:
        self._end = end
        self._holds: dict[tuple[str, str], Hold] = {}
        # Work that goes on, the keys of its devices, and until when creates wait for it.
        self._busy: list[tuple[Work, list[str], float]] = []

    def __len__(self) -> int:
        return len(self._holds)

    def deadline(self, work: Work, keys: list[str], now: float, patience: float) -> float:
        """Until when a create waits for `work` on the devices `keys`.

        That is `patience` seconds, but no longer than earlier creates wait for other work on the same devices.
        """
        deadline = min(
            [
                now + patience,
                *(until for other, their_keys, until in self._busy if _clash(keys, their_keys) and not other.done),
            ]
        )
        self._busy.append((work, keys, deadline))
        return deadline

    def late(self, keys: list[str], now: float) -> bool:
        """Whether work on these devices, for which earlier creates waited until their deadline, still goes on."""
        return any(
            now >= until and _clash(keys, their_keys) and not work.done for work, their_keys, until in self._busy
        )

    def add(self, pod: str, name: str, hold: Hold) -> None:
        """Keeps a hold for the container `name` of a pod."""
        self._holds[pod, name] = hold

    def claim(self, pod: str, name: str, now: float) -> Hold | None:
        """The hold of an earlier try of this container, after its work has succeeded; None without one.

        The hold stays until `drop`.

        Raises Starting while the work goes on.  Raises the work's error when it has failed, and forgets the hold.
        """
        hold = self._holds.get((pod, name))
        if hold is None:
            return None
        self._check_work(hold, now)
        if hold.error is not None:
            del self._holds[pod, name]
            raise hold.error
        if hold.work is not None:
            raise Starting(hold.words)
        return hold

    def drop(self, pod: str, name: str) -> Hold | None:
        """Forgets a hold and gives it; the caller has to end its lease."""
        return self._holds.pop((pod, name), None)

    def end_pod(self, pod: str) -> None:
        """Ends the holds of a pod: now, or when their work ends."""
        for (owner, _), hold in self._holds.items():
            if owner == pod:
                hold.until = 0.0

    def has(self, container: str) -> bool:
        """Whether a container's lease is held for a retry."""
        return any(hold.lease is not None and hold.lease["id"] == container for hold in self._holds.values())

    def tick(self, now: float) -> None:
        """Notes which work has ended, and ends holds for which no retry came."""
        self._busy = [each for each in self._busy if not each[0].done]
        for key, hold in list(self._holds.items()):
            self._check_work(hold, now)
            if hold.work is None and now >= hold.until:
                del self._holds[key]
                self._give_back(hold)

    def due(self) -> list[float]:
        """The times at which `tick` has something to do, when no work ends before."""
        return [hold.until if hold.work is None else hold.work.until for hold in self._holds.values()]

    def _check_work(self, hold: Hold, now: float) -> None:
        if hold.work is not None and hold.work.done:
            hold.error, hold.work = hold.work.error, None
            if hold.until:
                hold.until = now + PATIENCE_FOR_RETRY
            if hold.error is not None:
                self._give_back(hold)  # nothing was set up; the hold only keeps the error for the retry

    def _give_back(self, hold: Hold) -> None:
        if hold.lease is not None:
            lease, hold.lease = hold.lease, None
            self._end(lease)


def _clash(keys: list[str], others: list[str]) -> bool:
    """Whether two lists of device keys have a device in common (leases.clash)."""
    return any(leases.clash(key, other) for key in keys for other in others)
