"""Creates whose answer has to wait, and what is held for those that were refused because it took too long.

A create waits for its work until PATIENCE is over, counted from the first one that wanted the same devices: the
runtime asks for one container after the other, so waiting costs all others.  A create that is refused then leaves a
hold: the work goes on, and its lease stays, so that what was begun is neither ended nor given to somebody else.  The
kubelet's retry, another container of the same pod and name, takes the hold's place, or is told why the work has
failed.  A hold that nobody comes for ends PATIENCE_FOR_RETRY after its work, or with its pod.  No clock here but for
`now`, in seconds of time.monotonic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Tuple

from shim.errors import ChandlerError
from shim.state import leases

if TYPE_CHECKING:
    from shim.nri.work import Work
    from shim.state.leases import Lease

PATIENCE = 1.5  # seconds that a create waits; the runtime gives up after two
PATIENCE_FOR_RETRY = 120.0  # seconds; the kubelet tries a pod again after ten to some tens


class Starting(ChandlerError):
    """What the container needs is on its way."""

    def __init__(self, what: str, todo: str = "the kubelet does so by itself") -> None:
        super().__init__(what, todo)


class Later:
    """The answer to a create that waits for `work`: until that is done, or `deadline`.

    `answer` gives it, or raises the refusal; `abandon` is for when nobody waits for it any more.
    """

    def __init__(self, work: Work, deadline: float, answer: Callable[[], Any], abandon: Callable[[], None]) -> None:
        self.work = work
        self.deadline = deadline
        self.answer = answer
        self.abandon = abandon

    def due(self, now: float) -> bool:
        """Whether there is an answer."""
        return self.work.done or now >= self.deadline


class Hold:
    """What a refused create has left.  `lease`: None where none are kept; `work`: None once it has ended; `words`:
    what is on its way; `until`: when it ends if no retry comes, counted from the end of its work, 0 for then."""

    def __init__(self, lease: Optional[Lease], work: Optional[Work], words: str, until: float = 1.0) -> None:
        self.lease = lease
        self.work = work
        self.words = words
        self.until = until
        self.error: Optional[ChandlerError] = None

    @property
    def keys(self) -> List[str]:
        """The devices that are held."""
        return self.lease["keys"] if self.lease is not None else []

    @property
    def token(self) -> str:
        """The lease's."""
        return self.lease["token"] if self.lease is not None else ""


class Holds:
    """All holds, by pod and container name.  `end` gives back the lease of one, with what was begun for it."""

    def __init__(self, end: Callable[[Lease], None]) -> None:
        self._end = end
        self._holds: Dict[Tuple[str, str], Hold] = {}
        self._busy: List[Tuple[Work, List[str], float]] = []

    def __len__(self) -> int:
        return len(self._holds)

    def deadline(self, work: Work, keys: List[str], now: float, patience: float) -> float:
        """Until when a create waits for its work on some devices."""
        deadline = min(
            [now + patience, *(until for other, theirs, until in self._busy if _clash(keys, theirs) and not other.done)]
        )
        self._busy.append((work, keys, deadline))
        return deadline

    def late(self, keys: List[str], now: float) -> bool:
        """Whether others have waited for these devices long enough, and what they waited for still goes on."""
        return any(now >= until and _clash(keys, theirs) and not work.done for work, theirs, until in self._busy)

    def add(self, pod: str, name: str, hold: Hold) -> None:
        """Keeps a hold."""
        self._holds[pod, name] = hold

    def claim(self, pod: str, name: str, now: float) -> Optional[Hold]:
        """What an earlier try of this container has left, with its work well done; it stays until `drop`.

        Raises Starting while the work goes on, or once the error with which it has ended.
        """
        hold = self._holds.get((pod, name))
        if hold is None:
            return None
        self._look(hold, now)
        if hold.error is not None:
            del self._holds[pod, name]
            raise hold.error
        if hold.work is not None:
            raise Starting(hold.words)
        return hold

    def drop(self, pod: str, name: str) -> Optional[Hold]:
        """Forgets a hold; its lease is its taker's to end."""
        return self._holds.pop((pod, name), None)

    def end_pod(self, pod: str) -> None:
        """Nobody will come for the holds of a pod any more."""
        for (holder, _), hold in self._holds.items():
            if holder == pod:
                hold.until = 0.0

    def has(self, container: str) -> bool:
        """Whether a container's lease is held for a retry."""
        return any(hold.lease is not None and hold.lease["id"] == container for hold in self._holds.values())

    def tick(self, now: float) -> None:
        """Takes note of work that has ended, and ends what nobody came for."""
        self._busy = [each for each in self._busy if not each[0].done]
        for key, hold in list(self._holds.items()):
            self._look(hold, now)
            if hold.work is None and now >= hold.until:
                del self._holds[key]
                self._give_back(hold)

    def due(self) -> List[float]:
        """When `tick` has something to do, unless work ends before."""
        return [hold.until if hold.work is None else hold.work.until for hold in self._holds.values()]

    def _look(self, hold: Hold, now: float) -> None:
        if hold.work is not None and hold.work.done:
            hold.error, hold.work = hold.work.error, None
            if hold.until:
                hold.until = now + PATIENCE_FOR_RETRY
            if hold.error is not None:
                self._give_back(hold)  # nothing was set up; the words are for the retry

    def _give_back(self, hold: Hold) -> None:
        if hold.lease is not None:
            lease, hold.lease = hold.lease, None
            self._end(lease)


def _clash(some: List[str], others: List[str]) -> bool:
    return any(leases.clash(one, other) for one in some for other in others)
