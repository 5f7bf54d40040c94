"""Leases: which container holds which physical device.  Values and rules; shim.state.ledger stores them.

A device's key is made of device numbers (`c195:0`, or several joined by `+`).  Two keys clash when one has all the
numbers of the other.  So a device clashes with itself, and a MIG device or partition with its parent.  Two partitions
of one parent do not clash.  A device that is shared, by MPS or time-slicing, is shared as a whole, and only among
containers that share it in the same way (shim.sharing.terms).
Pure; part of the create path where the configuration says `allocator = "leases"`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Iterable, List, Optional, TypedDict

    from shim.host.kernel import Creation

    class Started(Creation, total=False):
        """The create of a container that the wrapper equips."""

        runtime: str  # its path
        group: str  # linux.cgroupsPath

    class Entry(Started):
        """What leases and grant records share: a container (shim.state.liveness)."""

        id: str
        root: str  # the runtime's --root; '' through NRI

    class Marks(TypedDict, total=False):
        """How a container shares its devices (shim.sharing.terms)."""

        mode: str  # mps or time-slice
        words: str  # for people
        uid: int  # of mps
        limits: Dict[str, int]  # of mps
        held: str  # whether the limits are "enforced" or "advisory"
        slice: Optional[str]  # of time-slice

    class Devices(Marks, total=False):
        """What a lease holds, which shim.state.ledger adds."""

        names: List[str]  # CDI names
        keys: List[str]
        shares: List[str]  # never stored: see `holder`
        allocated: bool  # whether the kubelet chose the devices; absent where it did not
        claim: str  # the id of the pod's sandbox, where all containers of the pod share the devices
        called: str  # NAMESPACE/POD/CONTAINER, in Kubernetes

    class _OfNri(Devices, total=False):
        pod: str  # its id
        container: str  # the container's name in the pod
        namespace: str  # of a ResourceClaim, with the next
        name: str

    class Lease(Entry, _OfNri):
        """What one container holds."""

        token: str
        owner: str  # oci, nri, or dra: then the id is the uid of a ResourceClaim
        since: int  # seconds since 1970


def clash(first: str, second: str) -> bool:
    """Whether two keys cannot be held by two containers at once."""
    if first == second:
        return True
    numbers, others = set(first.split("+")), set(second.split("+"))
    return numbers <= others or others <= numbers


def holder(keys: Iterable[str], leases: List[Lease]) -> Optional[Lease]:
    """The first lease with a key that clashes with any of `keys`, or None.

    A lease may have `shares`, the keys that the asking container may share (shim.sharing.terms.Sharing.with_shares).
    Such a key does not clash with itself, only with the device's parts and its parent.
    """
    for lease in leases:
        shares = lease.get("shares", ())
        for leased in lease["keys"]:
            for key in keys:
                if clash(key, leased) and not (key == leased and key in shares):
                    return lease
    return None


def of_container(leases: List[Lease], owner: str, root: str, container: str) -> Optional[Lease]:
    """The lease of one container, or None."""
    for lease in leases:
        if lease["id"] == container and lease["owner"] == owner and lease.get("root", "") == root:
            return lease
    return None


def of_sandbox(lease: Lease) -> Lease:
    """The lease of a pod's sandbox, which holds what `lease` shares with the pod for as long as the pod exists."""
    claim = lease["claim"]
    sandbox: Lease = {**lease, "id": claim, "token": sandbox_token(claim)}
    if "group" in lease:
        sandbox["group"] = lease["group"].replace(lease["id"], claim)  # the engine puts both into the pod's group
    return sandbox


def is_of_sandbox(lease: Lease) -> bool:
    """Whether a lease is that of a pod's sandbox (`of_sandbox`), which uses no device itself."""
    return lease["id"] == lease.get("claim")


def without_lone_sandboxes(kept: List[Lease], ended: List[Lease]) -> List[Lease]:
    """The leases in `kept`, except those of sandboxes whose pod had no container but those in `ended`."""
    claims = {lease.get("claim") for lease in ended}
    claims -= {lease.get("claim") for lease in kept if not is_of_sandbox(lease)}
    return [lease for lease in kept if not (is_of_sandbox(lease) and lease["id"] in claims)]


def sandbox_token(sandbox: str) -> str:
    """The token of a sandbox's lease, known before there is one.  An engine never uses the id of a sandbox again."""
    return f"pod-{sandbox}"


def can_be_taken_over(lease: Lease, to: Lease) -> bool:
    """Whether `lease` is the NRI plugin's, and `to` the wrapper's, for one container.

    Then the plugin's answer came too late, or its edits did not reach the runtime, and the wrapper does the work.
    """
    return bool(lease["owner"] == "nri" and to["owner"] == "oci" and lease["id"] == to["id"])


def describe(lease: Lease) -> str:
    """For people: which container or ResourceClaim holds which devices, how they are shared, and since when."""
    who = f"ResourceClaim {lease['id']}" if lease.get("owner") == "dra" else lease["id"]
    how = f" ({lease['mode']}{lease['words']})" if "mode" in lease else ""
    return f"{who} holds {', '.join(lease['names'])}{how} since {utc(lease['since'])}"


def of_pod(lease: Lease) -> str:
    """For people: the container, pod or ResourceClaim in Kubernetes that holds a lease; its id where it has no name."""
    if lease["owner"] == "dra":
        return f"ResourceClaim {lease['namespace']}/{lease['name']}"
    namespace, _, rest = lease.get("called", "").partition("/")
    pod, _, container = rest.partition("/")
    if not pod:
        return lease["id"]
    return f"pod {namespace}/{pod}" + ("" if is_of_sandbox(lease) else f" ({container})")


def utc(seconds: int) -> str:
    """A time in seconds since 1970 as RFC 3339, UTC.  A time after the year 9999 is shown as the end of that year."""
    from time import gmtime, strftime  # only a refusal needs them

    return strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(min(seconds, 253402300799)))
