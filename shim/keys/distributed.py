"""The row of `resources.gpu.distributed`: sets the variables by which the processes of a distributed training find each
other.

Each number comes from the request, else from the container's environment, where an Indexed Job of Kubernetes, a
LeaderWorkerSet, Slurm, or an MPI launcher has set it.  Where neither has the number, its variable is not set.
shim.engine calls `edits`, since these variables come after those of the devices.  Pure.
"""

from __future__ import annotations

from shim import errors
from shim.edits import ENV, Edits
from shim.keys import container
from shim.keys.row import Row
from shim.request import objects, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.shapes import Document

DEFAULT_BACKEND, DEFAULT_PORT, DEFAULT_INTERFACE = "nccl", 29500, "eth0"
# backend: the variable that gives it the network interface
_INTERFACES = {"nccl": "NCCL_SOCKET_IFNAME", "gloo": "GLOO_SOCKET_IFNAME", "mpi": "OMPI_MCA_btl_tcp_if_include"}
# key of the request: the variable that frameworks read
_NUMBERS = {"world_size": "WORLD_SIZE", "rank": "RANK", "local_rank": "LOCAL_RANK"}
# For each launcher, the variable that it sets for a key of the request.  Launchers can be nested, such as mpirun in a
# Slurm job.  The innermost comes first, since it numbers the containers of the outer ones.
# Sources: srun(1), mpirun(1), Hydra's PMI, the Job controller, the LeaderWorkerSet controller.
_LAUNCHERS = (
    {"rank": "OMPI_COMM_WORLD_RANK", "world_size": "OMPI_COMM_WORLD_SIZE", "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK"},
    {"rank": "PMI_RANK", "world_size": "PMI_SIZE", "local_rank": "MPI_LOCALRANKID"},
    {"rank": "SLURM_PROCID", "world_size": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID"},
    {"rank": "LWS_WORKER_INDEX", "world_size": "LWS_GROUP_SIZE", "master_addr": "LWS_LEADER_ADDRESS"},
    {"rank": "JOB_COMPLETION_INDEX"},
)


def edits(request: Document, environment: dict[str, str], source: str, master: str = "") -> Edits:
    """The edits that set the variables.

    `request`: the value of resources.gpu.distributed.  `environment`: the container's variables without these.
    `master`: the address of rank 0 for when neither the request nor the environment has it, '' for none.
    Raises RequestError for a rank that is not below the world size.
    """
    origin = f"{source}: resources.gpu.distributed"
    launcher = next((names for names in _LAUNCHERS if _is_number(environment.get(names["rank"], ""))), {})
    values = {
        "MASTER_ADDR": request.get("master_addr")
        or environment.get("MASTER_ADDR")
        or environment.get(launcher.get("master_addr", ""), master),
        "MASTER_PORT": request.get("master_port", DEFAULT_PORT),
        **_numbers(request, environment, launcher, origin),
    }
    backend = request.get("backend", DEFAULT_BACKEND)
    if backend != "mpi" or "interface" in request:
        values[_INTERFACES[backend]] = request.get("interface", DEFAULT_INTERFACE)
    return Edits([(ENV, variable, str(value), origin) for variable, value in values.items() if value != ""])


def _numbers(request: Document, environment: dict[str, str], launcher: dict[str, str], origin: str) -> dict[str, int]:
    """WORLD_SIZE, RANK and LOCAL_RANK, as far as they are known.

    The request comes first, then the variable of that name in the environment, then the launcher's variable.
    """
    numbers: dict[str, int] = {}
    origins: dict[str, str] = {}  # where each number came from, for the error
    for key, variable in _NUMBERS.items():
        name = variable if variable in environment else launcher.get(key, "")
        if key in request:
            numbers[variable], origins[variable] = request[key], f"{origin}.{key}"
        elif _is_number(environment.get(name, "")):
            numbers[variable] = int(environment[name])
            origins[variable] = f"{origin}: {name} in the container's environment"
    size = numbers.get("WORLD_SIZE")
    for variable in ("RANK", "LOCAL_RANK"):
        if size is not None and numbers.get(variable, 0) >= size:
            raise errors.RequestError(
                f"{origins[variable]}: {numbers[variable]} is not below world_size, {size}",
                f"{origins['WORLD_SIZE']} says how many there are",
            )
    return numbers


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 10


def _interface(value: Any) -> str:
    text = values.text(value, 64)
    if set(text) - objects.LETTERS - set("._-,=^@"):
        raise values.wrong_value(value, "is no network interface")
    return text


_RANK = (values.integer(0, (1 << 31) - 1), values.number_text)

ROWS: dict[str, Row] = {
    "resources.gpu.distributed": Row(
        {
            "backend": (values.word(*_INTERFACES), str),
            "master_addr": (container.hostname, str),
            "master_port": (values.integer(1, 65535), values.number_text),
            "rank": _RANK,
            "world_size": (values.integer(1, (1 << 31) - 1), values.number_text),
            "local_rank": _RANK,
            "interface": (_interface, str),
        }
    ),
}
