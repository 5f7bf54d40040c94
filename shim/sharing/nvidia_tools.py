"""NVIDIA's commands, nvidia-smi and nvidia-cuda-mps-control, and systemctl for the daemon's unit: called here alone.

Each with a fixed environment, nothing on its standard input but what it is told, `/` as its directory and a bounded
time.  A command counts only when nobody but root could have put it there.
Sources: `nvidia-smi -h`, `nvidia-smi compute-policy -h`, NVIDIA's "Multi-Process Service", appendix "Tools".
"""

from __future__ import annotations

import os
import subprocess

from shim import errors, paths
from shim.host import trust, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List

ENVIRONMENT = {"PATH": paths.SAFE_PATH, "LC_ALL": "C"}
PATIENCE = 15.0  # seconds: without the persistence daemon every GPU has to wake first
CONTROL_PATIENCE = 3.0  # for one answer of an MPS daemon
SYSTEMCTL = "/usr/bin/systemctl"
SYSTEMD = "/run/systemd/system"  # there where systemd is process 1 (sd_booted(3))
_PROC = "/proc/driver/nvidia/gpus"
_MAX_WORDS = 300
# as nvidia-smi shows them: as its option -c takes them
_MODES = {
    "Default": "DEFAULT",
    "Exclusive_Thread": "DEFAULT",
    "Prohibited": "PROHIBITED",
    "Exclusive_Process": "EXCLUSIVE_PROCESS",
}


def check(program: str, key: str) -> None:
    """Raises TrustError when somebody else than root could have put a command there, HostError when it is missing."""
    try:
        trust.check_way(program, userns.trusted_owners(userns.user_namespace()))
    except OSError as error:
        raise errors.HostError(
            f"{program} cannot be used: {error.strerror}", f"install it, or name it as {key} in [gpu]"
        ) from None


def _run(argv: List[str], env: Dict[str, str], said: str = "", patience: float = PATIENCE, lock: int = -1) -> str:
    """What a command prints.  Raises HostError.

    A command that changes a GPU is given the descriptor of its `lock`: when we are killed it goes on, and whoever comes
    next must wait for it.
    """
    try:
        done = subprocess.run(
            argv,
            check=False,
            cwd="/",
            env=env,
            input=said,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=patience,
            start_new_session=True,
            pass_fds=(lock,) if lock >= 0 else (),
        )
    except OSError as error:
        raise errors.HostError(f"{argv[0]} cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise errors.HostError(f"{' '.join(argv)} gave no answer in {patience:g} seconds") from None
    if done.returncode:
        words = " ".join((done.stderr + " " + done.stdout).split())[:_MAX_WORDS]
        raise errors.HostError(f"{' '.join(argv)} failed ({done.returncode}): {words}")
    return done.stdout


# --- nvidia-smi -----------------------------------------------------------------------------------------------


def compute_mode(smi: str, uuid: str) -> str:
    """A GPU's compute mode, as set_compute_mode takes it.  Raises HostError."""
    found = _run([smi, "-i", uuid, "--query-gpu=compute_mode", "--format=csv,noheader"], ENVIRONMENT).strip()
    if found not in _MODES:
        raise errors.HostError(f"{smi} calls the compute mode of {uuid} {found!r}, which is none")
    return _MODES[found]


def set_compute_mode(smi: str, uuid: str, mode: str, lock: int = -1) -> None:
    """Sets a GPU's compute mode and reads it back.  Raises HostError."""
    _run([smi, "-i", uuid, "-c", mode], ENVIRONMENT, lock=lock)
    found = compute_mode(smi, uuid)
    if found != mode:
        raise errors.HostError(f"the compute mode of {uuid} is {found} after {smi} has set it to {mode}")


def set_time_slice(smi: str, uuid: str, number: int, lock: int = -1) -> None:
    """Sets the length of a GPU's time slices: 0 default, 1 short, 2 medium, 3 long.  Raises HostError."""
    _run([smi, "compute-policy", "-i", uuid, f"--set-timeslice={number}"], ENVIRONMENT, lock=lock)


def uuid_of(key: str) -> str:
    """The UUID of the GPU with the device number `key` (c195:MINOR), as the kernel module tells it; '' if it does
    not."""
    minor = key.partition("+")[0].partition(":")[2]
    try:
        for name in os.listdir(_PROC):
            with open(f"{_PROC}/{name}/information", encoding="ascii", errors="replace") as file:
                fields = {word.strip(): value.strip() for word, _, value in (line.partition(":") for line in file)}
            if fields.get("Device Minor") == minor:
                return fields.get("GPU UUID", "")
    except OSError:
        pass
    return ""


# --- nvidia-cuda-mps-control ----------------------------------------------------------------------------------


def control(program: str, pipe_dir: str, command: str, patience: float = CONTROL_PATIENCE) -> str:
    """The answer of the MPS daemon behind a pipe directory.  Raises HostError, also when no daemon is there."""
    return _run([program], {**ENVIRONMENT, "CUDA_MPS_PIPE_DIRECTORY": pipe_dir}, command + "\n", patience).strip()


def percentage(program: str, pipe_dir: str, patience: float = CONTROL_PATIENCE) -> float:
    """The daemon's default active thread percentage: the question that any daemon that works can answer."""
    answer = control(program, pipe_dir, "get_default_active_thread_percentage", patience)
    try:
        return float(answer)
    except ValueError:
        raise errors.HostError(f"the MPS daemon of {pipe_dir} gives no number but {answer[:_MAX_WORDS]!r}") from None


def servers(program: str, pipe_dir: str) -> Dict[int, int]:
    """The uid of each of the daemon's servers, by its pid.  Raises HostError."""
    found = {}
    for word in control(program, pipe_dir, "get_server_list").split():
        if word.isdigit():
            try:
                found[int(word)] = os.stat(f"/proc/{word}").st_uid
            except OSError:
                continue  # it has ended
    return found


def log_tail(log_dir: str) -> str:
    """The last words of a daemon's log, for an error."""
    try:
        with open(log_dir + "/control.log", "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 2048))
            text = file.read().decode(errors="replace")
    except OSError:
        return "it has left no log"
    return "its log ends: " + (" | ".join(text.split("\n")[-6:]).strip(" |") or "(empty)")[-600:]


# --- systemd --------------------------------------------------------------------------------------------------


def has_systemd() -> bool:
    """Whether systemd is process 1."""
    return os.path.isdir(SYSTEMD)


def unit(verb: str, name: str) -> None:
    """`systemctl VERB NAME`.  Raises HostError."""
    _run([SYSTEMCTL, verb, name], ENVIRONMENT, patience=30.0)


def active(name: str) -> bool:
    """Whether systemd says that a unit runs."""
    try:
        unit("is-active", name)
    except errors.HostError:
        return False
    return True
