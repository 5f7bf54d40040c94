"""`resources.gpu.distributed`: the variables by which the processes of a distributed training find each other.

A number comes from the request, or else from what started the container: an Indexed Job of Kubernetes, a
LeaderWorkerSet, Slurm, or an MPI launcher leave theirs in the container's own environment.  Where nobody knows it none
is made up, and what the environment has already stays.  Pure; loaded by requests that have the key.
"""

from __future__ import annotations

from shim import errors
from shim.edits import ENV, Edits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict

DEFAULT_BACKEND, DEFAULT_PORT, DEFAULT_INTERFACE = "nccl", 29500, "eth0"
# backend: the variable that names the network interface
_INTERFACES = {"nccl": "NCCL_SOCKET_IFNAME", "gloo": "GLOO_SOCKET_IFNAME", "mpi": "OMPI_MCA_btl_tcp_if_include"}
# key of the request: the variable that frameworks read
_PLACES = {"world_size": "WORLD_SIZE", "rank": "RANK", "local_rank": "LOCAL_RANK"}
# What starts containers of one training: the key of the request, and its variable for it.  The innermost first, since it
# numbers the containers of those around it.  Sources: srun(1), mpirun(1), Hydra's PMI, the Job controller, the
# LeaderWorkerSet controller.
_LAUNCHERS = (
    {"rank": "OMPI_COMM_WORLD_RANK", "world_size": "OMPI_COMM_WORLD_SIZE", "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK"},
    {"rank": "PMI_RANK", "world_size": "PMI_SIZE", "local_rank": "MPI_LOCALRANKID"},
    {"rank": "SLURM_PROCID", "world_size": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID"},
    {"rank": "LWS_WORKER_INDEX", "world_size": "LWS_GROUP_SIZE", "master_addr": "LWS_LEADER_ADDRESS"},
    {"rank": "JOB_COMPLETION_INDEX"},
)


def edits(wish: Dict[str, Any], environment: Dict[str, str], source: str, master: str = "") -> Edits:
    """The variables; `environment` is what the container has without them, `master` where rank 0 is when nobody else says.

    Raises RequestError for a rank that is not below the size.
    """
    origin = f"{source}: resources.gpu.distributed"
    launcher = next((each for each in _LAUNCHERS if _is_number(environment.get(each["rank"], ""))), {})
    values = {
        "MASTER_ADDR": wish.get("master_addr")
        or environment.get("MASTER_ADDR")
        or environment.get(launcher.get("master_addr", ""), master),
        "MASTER_PORT": wish.get("master_port", DEFAULT_PORT),
        **_places(wish, environment, launcher, origin),
    }
    backend = wish.get("backend", DEFAULT_BACKEND)
    if backend != "mpi" or "interface" in wish:
        values[_INTERFACES[backend]] = wish.get("interface", DEFAULT_INTERFACE)
    return Edits([(ENV, variable, str(value), origin) for variable, value in values.items() if value != ""])


def _places(wish: Dict[str, Any], environment: Dict[str, str], launcher: Dict[str, str], origin: str) -> Dict[str, int]:
    """WORLD_SIZE, RANK and LOCAL_RANK as far as they are known: from the request, from the container's own, from the launcher."""
    found: Dict[str, int] = {}
    said: Dict[str, str] = {}
    for key, variable in _PLACES.items():
        name = variable if variable in environment else launcher.get(key, "")
        if key in wish:
            found[variable], said[variable] = wish[key], f"{origin}.{key}"
        elif _is_number(environment.get(name, "")):
            found[variable], said[variable] = int(environment[name]), f"{origin}: {name} in the container's environment"
    size = found.get("WORLD_SIZE")
    for variable in ("RANK", "LOCAL_RANK"):
        if size is not None and found.get(variable, 0) >= size:
            raise errors.RequestError(
                f"{said[variable]}: {found[variable]} is not below world_size, {size}",
                f"{said['WORLD_SIZE']} says how many there are",
            )
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10
