"""How a container shares its GPUs: checks `sharing` of a request (mps or time-slice), and makes edits of it.

Decides, from the leases alone, which containers may share a GPU.  shim.sharing.setup sets up the host.
Pure.  Part of the create path only for a request with a key about sharing.
Sources: NVIDIA, "Multi-Process Service"; `nvidia-smi compute-policy`.
"""

from __future__ import annotations

from shim import errors, jsontext
from shim.edits import ENV, MOUNT, Edits
from shim.gpu import vendors
from shim.oci import reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable

    from shim.edits import Edit, Mount
    from shim.gpu.choose import Grant
    from shim.node.inventory import Inventory
    from shim.shapes import Config, Document, SharingConfig
    from shim.state.leases import Lease, Marks

MPS, TIME_SLICE = "mps", "time-slice"
SLICES = ("default", "short", "medium", "long")  # in the order of nvidia-smi's numbers
KIND = vendors.NVIDIA.kind  # only NVIDIA's GPUs have MPS and time slices
PIPE_INSIDE = "/tmp/nvidia-mps"  # in the container: CUDA's default
SLICING_INSIDE = "/etc/nvidia/gpu-time-slicing.yaml"  # in the container
_MPS_DIRECTORIES = ("mps_pipe_dir", "mps_log_dir")
_MPS_LIMITS = ("mps_active_thread_percentage", "mps_pinned_memory")
# The keys of resources.gpu that have a meaning in one mode only.
_OF_MODE = {
    MPS: (*_MPS_DIRECTORIES, *_MPS_LIMITS, "mps_priority"),
    TIME_SLICE: ("time_slice_index", "time_slicing_config_path", "time_slice"),
}
_MIB = 1 << 20
_UUID = frozenset("0123456789abcdefABCDEF-")


class Sharing:
    """How one container shares its GPUs.

    `request`: its resources.gpu; `uid`: the container's user as a uid of the host; `managed`: whether Chandler
    runs the MPS daemon; `devices`: (key, UUID) of its GPUs, the UUID '' where it is not needed; `limits`: the MPS
    limits, by their keys in the request; `marks`: what is added to the container's lease.
    """

    __slots__ = ("mode", "request", "source", "config", "uid", "managed", "devices", "marks", "limits")

    def __init__(self, mode: str, request: Document, source: str, config: SharingConfig, uid: int) -> None:
        self.mode = mode
        self.request = request
        self.source = source
        self.config = config
        self.uid = uid
        self.managed = mode == MPS and config["gpu.mps"] == "managed"
        self.devices: list[tuple[str, str]] = []
        self.limits = {key: request[key] for key in _MPS_LIMITS if key in request}
        self.marks: Marks = {"mode": mode}
        if mode == MPS:
            self.marks["uid"], self.marks["words"] = uid, f", uid {uid}"
            if self.limits:
                self.marks["limits"], self.marks["held"] = self.limits, "enforced" if self.enforced else "advisory"
        else:
            self.marks["slice"] = request.get("time_slice")
            self.marks["words"] = f", {request['time_slice']}" if "time_slice" in request else ""

    @property
    def enforced(self) -> bool:
        """Whether the daemon enforces the limits; otherwise they are only variables of the container."""
        return self.managed and self.config["gpu.mps-limits"] == "enforced"

    def with_shares(self, held: list[Lease]) -> list[Lease]:
        """The leases of other containers, with `shares` (shim.state.leases.holder) where this container may share.

        `shares` leaves out devices that have gpu.max-sharers containers already.
        """
        sharers: dict[str, int] = {}
        for lease in held:
            for key in lease["keys"]:
                sharers[key] = sharers.get(key, 0) + 1
        return [
            {**lease, "shares": [key for key in lease["keys"] if sharers[key] < self.config["gpu.max-sharers"]]}
            if self._fits(lease)
            else lease
            for lease in held
        ]

    def _fits(self, lease: Lease) -> bool:
        """Whether this container may share the devices of a lease."""
        if lease.get("mode") != self.mode:
            return False
        if self.mode == MPS:
            # an MPS server serves one user: another user's clients would wait until all others have ended
            return lease["uid"] == self.uid and (not self.enforced or lease.get("limits", {}) == self.limits)
        return None in (lease["slice"], self.marks["slice"]) or lease["slice"] == self.marks["slice"]

    def choose_gpus(self, grant: Grant, inventory: Inventory, uuid_of: Callable[[str], str]) -> None:
        """Sets `devices` from the grant.  `uuid_of`: gives the UUID of a GPU that has no CDI name with it, or ''.

        Raises RequestError for devices that cannot be shared in this way, HostError for a UUID that is needed and not
        known.
        """
        external = not self.managed and self.mode == MPS  # its daemon serves any device, and needs no UUID
        for name, key in zip(grant.names, grant.keys):
            if name.partition("=")[0] != KIND:
                raise errors.RequestError(
                    f"{self.source}: resources.gpu.sharing = {self.mode!r} is for {KIND}, not for {name}"
                )
            names = inventory.names(KIND, key)
            # A MIG device has names such as MIG-UUID, 0:1 and mig0:1 (shim.generate.nvidia).
            aliases = (name.partition("=")[2], *names)
            mig = any(alias.startswith(("MIG-", "mig")) or ":" in alias for alias in aliases)
            if mig and (not external or len(grant.keys) > 1):
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
        index = self.request.get("time_slice_index", 0)
        if index >= len(grant.keys):
            raise errors.RequestError(
                f"{self.source}: resources.gpu.time_slice_index = {index} is no GPU of the container: it gets "
                f"{len(grant.keys)}, numbered from 0",
                "leave it out",
            )
        if external or self.mode == TIME_SLICE and "time_slice" not in self.request:
            return  # no UUID is needed
        for number, (key, _) in enumerate(self.devices):
            uuids = (name for name in inventory.names(KIND, key) if name.startswith("GPU-"))
            uuid = next(uuids, "") or uuid_of(key)
            if not uuid or not uuid.startswith("GPU-") or set(uuid[4:]) - _UUID:
                raise errors.HostError(
                    f"{self.source}: the UUID of {grant.names[number]} is not known, and resources.gpu.sharing needs "
                    "it",
                    "make a CDI file that names GPUs by UUID, with `chandler cdi generate`",
                )
            self.devices[number] = (key, uuid)

    def edits(self, pipe_dir: str, shm_dir: str) -> Edits:
        """The environment and the mounts that CUDA expects.  `pipe_dir`, `shm_dir`: the MPS daemon's, on the host."""
        origin = f"{self.source} ({self.mode})"
        items: list[Edit] = []
        if self.mode == TIME_SLICE:
            if "time_slice_index" in self.request:
                items.append((ENV, "CUDA_VISIBLE_DEVICES", str(self.request["time_slice_index"]), origin))
            if "time_slicing_config_path" in self.request:
                items.append(_bind(self.request["time_slicing_config_path"], SLICING_INSIDE, "ro", origin))
            return Edits(items)
        items.append((ENV, "CUDA_MPS_PIPE_DIRECTORY", PIPE_INSIDE, origin))
        items.append(_bind(pipe_dir, PIPE_INSIDE, "rw", origin))
        items.append(_bind(shm_dir, "/dev/shm", "rw", origin))
        if "mps_log_dir" in self.request:
            items.append((ENV, "CUDA_MPS_LOG_DIRECTORY", self.request["mps_log_dir"], origin))
            items.append(_bind(self.request["mps_log_dir"], self.request["mps_log_dir"], "rw", origin))
        if "mps_active_thread_percentage" in self.request:
            items.append(
                (ENV, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(self.request["mps_active_thread_percentage"]), origin)
            )
        if "mps_pinned_memory" in self.request:
            limit = f"={self.request['mps_pinned_memory'] // _MIB}M"
            items.append(
                (
                    ENV,
                    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
                    ",".join(f"{n}{limit}" for n in range(len(self.devices))),
                    origin,
                )
            )
        if "mps_priority" in self.request:
            items.append((ENV, "CUDA_MPS_CLIENT_PRIORITY", str(self.request["mps_priority"]), origin))
        return Edits(items)


def _bind(source: str, destination: str, access: str, origin: str) -> Edit:
    mount: Mount = {
        "destination": destination,
        "type": "bind",
        "source": source,
        "options": ["rbind", access, "nosuid", "nodev", "rprivate"],
    }
    return MOUNT, destination, mount, origin


def requested_sharing(
    request: Document, document: Document, config: Config, source: str, leased: bool
) -> Sharing | None:
    """How a request wants to share its GPUs; None when it wants them exclusively.

    `request`: its resources.gpu; `document`: config.json; `source`: the request's origin, for errors; `leased`:
    whether this node keeps leases.  Raises RequestError, PolicyError when the node does not share in this way, or
    BundleError when the container's user has no uid of the host.
    """
    mode = request.get("sharing", "exclusive")
    for other, keys in _OF_MODE.items():
        stray = [key for key in keys if key in request]
        if stray and other != mode:
            raise errors.RequestError(
                f"{source}: resources.gpu.{stray[0]} is for sharing = {other!r}, not for {mode!r}",
                f"set resources.gpu.sharing to {other!r}, or leave {stray[0]} out",
            )
    if mode == "exclusive":
        return None
    share = Sharing(mode, request, source, config, _host_uid(document, source))
    if mode == MPS and config["gpu.mps"] == "off":
        raise errors.PolicyError(
            f'{source}: resources.gpu.sharing = "mps": this node runs no MPS', "set mps in [gpu] to external or managed"
        )
    if share.managed:
        for key in _MPS_DIRECTORIES:
            if key in request:
                raise errors.RequestError(
                    f"{source}: resources.gpu.{key}: this node's MPS daemons are Chandler's own, with directories of "
                    "their own",
                    "leave it out",
                )
    if not leased and (share.managed or "time_slice" in request):
        raise errors.PolicyError(
            f"{source}: resources.gpu.{'time_slice' if mode == TIME_SLICE else 'sharing'} changes the GPU for as long "
            "as it is shared, and this node keeps no leases, which would say when that ends",
            'set allocator = "leases" in [gpu]',
        )
    return share


def _host_uid(document: Document, source: str) -> int:
    """The uid that the container's user has on the host, where the MPS daemon runs.  Raises BundleError."""
    uid = reader.process_user(document)["uid"]
    if not reader.in_user_namespace(document):
        return uid
    mappings = document["linux"].get("uidMappings")
    for mapping in mappings if isinstance(mappings, list) else ():
        try:
            if mapping["containerID"] <= uid < mapping["containerID"] + mapping["size"]:
                return int(mapping["hostID"] + uid - mapping["containerID"])
        except (KeyError, TypeError):
            break
    raise errors.BundleError(
        f"{source}: config.json does not map the container's uid {uid}, for which an MPS server would run"
    )


def memory_limit(value: Any) -> int:
    """The bytes of a memory limit in the MPS daemon's notation, such as 512M or 1G; -1 for anything else."""
    text = str(value.text if isinstance(value, jsontext.Number) else value).strip()
    unit = {"K": 1 << 10, "M": _MIB, "G": 1 << 30, "B": 1}.get(text[-1:].upper(), 0)
    digits = text[:-1] if unit else text
    return int(digits) * (unit or 1) if digits.isascii() and digits.isdigit() else -1
