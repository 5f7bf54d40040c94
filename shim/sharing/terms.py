"""How a container shares its GPUs: `sharing: mps` or `time-slice` of a request, checked, as values and edits.

Who may share with whom is decided here, from the leases alone; what has to be set up on the host for it does
shim.sharing.setup.  Pure.  Not part of the create path unless something about sharing is asked for.
Sources: NVIDIA, "Multi-Process Service"; `nvidia-smi compute-policy`.
"""

from __future__ import annotations

from shim import errors, jsontext
from shim.edits import ENV, MOUNT, Edits
from shim.gpu import vendors
from shim.oci import reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

    from shim.edits import Edit
    from shim.gpu.choose import Grant
    from shim.node.inventory import Inventory
    from shim.state.leases import Lease

MPS, TIME_SLICE = "mps", "time-slice"
SLICES = ("default", "short", "medium", "long")  # in the order of nvidia-smi's numbers
KIND = vendors.NVIDIA.kind  # MPS and time slices are NVIDIA's
PIPE_INSIDE = "/tmp/nvidia-mps"  # where CUDA looks by itself
SLICING_INSIDE = "/etc/nvidia/gpu-time-slicing.yaml"
# keys of resources.gpu that mean something in one mode alone
_OF_MODE = {
    MPS: ("mps_pipe_dir", "mps_log_dir", "mps_active_thread_percentage", "mps_pinned_memory", "mps_priority"),
    TIME_SLICE: ("time_slice_index", "time_slicing_config_path", "time_slice"),
}
_MIB = 1 << 20
_UUID = frozenset("0123456789abcdefABCDEF-")


class Sharing:
    """One container's share.  `devices`: (key, UUID) of its GPUs, the UUID '' where nobody needs it; `marks`: what its
    lease says of it; `managed`: whether Chandler itself runs the MPS daemon; `limits`: in the words of the request."""

    __slots__ = ("mode", "wish", "source", "config", "uid", "managed", "devices", "marks", "limits")

    def __init__(self, mode: str, wish: Dict[str, Any], source: str, config: Dict[str, Any], uid: int) -> None:
        self.mode = mode
        self.wish = wish
        self.source = source
        self.config = config
        self.uid = uid
        self.managed = mode == MPS and config["gpu.mps"] == "managed"
        self.devices: List[Tuple[str, str]] = []
        self.limits = {key: wish[key] for key in _OF_MODE[MPS][2:4] if key in wish}
        self.marks: Dict[str, Any] = {"mode": mode}
        if mode == MPS:
            self.marks.update(uid=uid, words=f", uid {uid}")
            if self.limits:
                self.marks.update(limits=self.limits, held="enforced" if self.enforced else "advisory")
        else:
            self.marks.update(
                slice=wish.get("time_slice"), words=f", {wish['time_slice']}" if "time_slice" in wish else ""
            )

    @property
    def enforced(self) -> bool:
        """Whether the daemon holds the limits, rather than the container's environment."""
        return self.managed and self.config["gpu.mps-limits"] == "enforced"

    def seen(self, held: List[Lease]) -> List[Lease]:
        """The leases of others as they look to this container: those that it may share with say so (`shares`)."""
        number: Dict[str, int] = {}
        for lease in held:
            for key in lease["keys"]:
                number[key] = number.get(key, 0) + 1
        return [
            {**lease, "shares": [key for key in lease["keys"] if number[key] < self.config["gpu.max-sharers"]]}
            if self._fits(lease)
            else lease
            for lease in held
        ]

    def _fits(self, lease: Lease) -> bool:
        if lease.get("mode") != self.mode:
            return False
        if self.mode == MPS:
            # one server at a time: another user's clients would wait until all others have ended
            return lease["uid"] == self.uid and (not self.enforced or lease.get("limits", {}) == self.limits)
        return None in (lease["slice"], self.marks["slice"]) or lease["slice"] == self.marks["slice"]

    def place(self, grant: Grant, inventory: Inventory, uuid_of: Callable[[str], str]) -> None:
        """Takes note of the devices.  `uuid_of` gives the UUID of a GPU without a CDI name that tells it, or ''.

        Raises RequestError for devices that cannot be shared so.
        """
        whole = not self.managed and self.mode == MPS  # any device will do; its UUID is of no interest
        for name, key in zip(grant.names, grant.keys):
            if name.partition("=")[0] != KIND:
                raise errors.RequestError(
                    f"{self.source}: resources.gpu.sharing = {self.mode!r} is for {KIND}, not for {name}"
                )
            names = inventory.names(KIND, key)
            mig = any(each.startswith(("MIG-", "mig")) or ":" in each for each in (name.partition("=")[2], *names))
            if mig and (not whole or len(grant.keys) > 1):
                raise errors.RequestError(
                    f"{self.source}: {name} is a MIG device, which "
                    + (
                        "has no time slices of its own" if self.mode == TIME_SLICE else "needs an MPS daemon of its own"
                    ),
                    "ask for a whole GPU, or leave resources.gpu.sharing out",
                )
            self.devices.append((key, ""))
        if self.managed and len(grant.keys) != 1:
            raise errors.RequestError(
                f'{self.source}: resources.gpu asks for {len(grant.keys)} GPUs with sharing = "mps"; each has an MPS '
                "daemon of its own, and a container can use one alone",
                "ask for one GPU, or leave sharing out",
            )
        index = self.wish.get("time_slice_index", 0)
        if index >= len(grant.keys):
            raise errors.RequestError(
                f"{self.source}: resources.gpu.time_slice_index = {index} is no GPU of the container: it gets "
                f"{len(grant.keys)}, numbered from 0",
                "leave it out",
            )
        if whole or self.mode == TIME_SLICE and "time_slice" not in self.wish:
            return
        for number, (key, _) in enumerate(self.devices):
            uuid = next((each for each in inventory.names(KIND, key) if each.startswith("GPU-")), "") or uuid_of(key)
            if not uuid or not uuid.startswith("GPU-") or set(uuid[4:]) - _UUID:
                raise errors.HostError(
                    f"{self.source}: the UUID of {grant.names[number]} is not known, and resources.gpu.sharing needs it",
                    "make a CDI file that names GPUs by UUID, with `chandler cdi generate`",
                )
            self.devices[number] = (key, uuid)

    def edits(self, pipe_dir: str, shm_dir: str) -> Edits:
        """The environment and the mounts that CUDA expects; the directories are the daemon's on the host."""
        origin = f"{self.source} ({self.mode})"
        items: List[Edit] = []
        if self.mode == TIME_SLICE:
            if "time_slice_index" in self.wish:
                items.append((ENV, "CUDA_VISIBLE_DEVICES", str(self.wish["time_slice_index"]), origin))
            if "time_slicing_config_path" in self.wish:
                items.append(_bind(self.wish["time_slicing_config_path"], SLICING_INSIDE, "ro", origin))
            return Edits(items)
        items.append((ENV, "CUDA_MPS_PIPE_DIRECTORY", PIPE_INSIDE, origin))
        items.append(_bind(pipe_dir, PIPE_INSIDE, "rw", origin))
        items.append(_bind(shm_dir, "/dev/shm", "rw", origin))
        if "mps_log_dir" in self.wish:
            items.append((ENV, "CUDA_MPS_LOG_DIRECTORY", self.wish["mps_log_dir"], origin))
            items.append(_bind(self.wish["mps_log_dir"], self.wish["mps_log_dir"], "rw", origin))
        if "mps_active_thread_percentage" in self.wish:
            items.append(
                (ENV, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(self.wish["mps_active_thread_percentage"]), origin)
            )
        if "mps_pinned_memory" in self.wish:
            each = f"={self.wish['mps_pinned_memory'] // _MIB}M"
            items.append(
                (
                    ENV,
                    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
                    ",".join(f"{n}{each}" for n in range(len(self.devices))),
                    origin,
                )
            )
        if "mps_priority" in self.wish:
            items.append((ENV, "CUDA_MPS_CLIENT_PRIORITY", str(self.wish["mps_priority"]), origin))
        return Edits(items)


def _bind(source: str, destination: str, access: str, origin: str) -> Edit:
    return (
        MOUNT,
        destination,
        {
            "destination": destination,
            "type": "bind",
            "source": source,
            "options": ["rbind", access, "nosuid", "nodev", "rprivate"],
        },
        origin,
    )


def wished(
    wish: Dict[str, Any], document: Dict[str, Any], config: Dict[str, Any], source: str, leased: bool
) -> Optional[Sharing]:
    """What a request says of sharing; None when its GPUs are exclusive.  `leased`: whether this node keeps leases.

    Raises RequestError, or PolicyError when the node does not share in this way.
    """
    mode = wish.get("sharing", "exclusive")
    for other, keys in _OF_MODE.items():
        stray = [key for key in keys if key in wish]
        if stray and other != mode:
            raise errors.RequestError(
                f"{source}: resources.gpu.{stray[0]} is for sharing = {other!r}, not for {mode!r}",
                f"set resources.gpu.sharing to {other!r}, or leave {stray[0]} out",
            )
    if mode == "exclusive":
        return None
    made = Sharing(mode, wish, source, config, _host_uid(document, source))
    if mode == MPS and config["gpu.mps"] == "off":
        raise errors.PolicyError(
            f'{source}: resources.gpu.sharing = "mps": this node runs no MPS', "set mps in [gpu] to external or managed"
        )
    if made.managed:
        for key in _OF_MODE[MPS][:2]:
            if key in wish:
                raise errors.RequestError(
                    f"{source}: resources.gpu.{key}: this node's MPS daemons are Chandler's own, with directories of "
                    "their own",
                    "leave it out",
                )
    if not leased and (made.managed or "time_slice" in wish):
        raise errors.PolicyError(
            f"{source}: resources.gpu.{'time_slice' if mode == TIME_SLICE else 'sharing'} changes the GPU for as long as it "
            "is shared, and this node does not keep who shares it",
            'set allocator = "leases" in [gpu]',
        )
    return made


def _host_uid(document: Dict[str, Any], source: str) -> int:
    """The container's user as the MPS daemon sees it: a uid of the host."""
    uid = reader.process_user(document)["uid"]
    if not reader.in_user_namespace(document):
        return uid
    mappings = document["linux"].get("uidMappings")
    for one in mappings if isinstance(mappings, list) else ():
        try:
            if one["containerID"] <= uid < one["containerID"] + one["size"]:
                return int(one["hostID"] + uid - one["containerID"])
        except (KeyError, TypeError):
            break
    raise errors.BundleError(
        f"{source}: config.json does not map the container's uid {uid}, for which an MPS server would run"
    )


def pinned(value: Any) -> int:
    """The bytes of a limit as the MPS daemon writes it, such as 512M or 1G; -1 for anything else."""
    text = str(value.text if isinstance(value, jsontext.Number) else value).strip()
    unit = {"K": 1 << 10, "M": _MIB, "G": 1 << 30, "B": 1}.get(text[-1:].upper(), 0)
    digits = text[:-1] if unit else text
    return int(digits) * (unit or 1) if digits.isascii() and digits.isdigit() else -1
