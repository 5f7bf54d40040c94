"""Runs NVIDIA's commands, nvidia-smi and nvidia-cuda-mps-control, and systemctl for the MPS daemon's unit.

Only this module runs them.  Each gets a fixed environment, `/` as its working directory, a time limit, and only the
command for it on standard input.  `check` refuses a command that somebody else than root could have put there.
Sources: `nvidia-smi -h`, `nvidia-smi compute-policy -h`, NVIDIA's "Multi-Process Service", appendix "Tools".
"""

from __future__ import annotations

import os
import subprocess

from shim import errors, paths
from shim.host import trust, userns

ENVIRONMENT = {"PATH": paths.SAFE_PATH, "LC_ALL": "C"}
PATIENCE = 15.0  # seconds; without the persistence daemon nvidia-smi has to initialise every GPU first
CONTROL_PATIENCE = 3.0  # seconds for one answer of an MPS daemon
SYSTEMCTL = "/usr/bin/systemctl"
SYSTEMD = "/run/systemd/system"  # there where systemd is process 1 (sd_booted(3))
_PROC = "/proc/driver/nvidia/gpus"
_MAX_WORDS = 300  # characters of a command's output in an error
# Compute modes: as nvidia-smi prints them, and as its option -c takes them.
_MODES = {
    "Default": "DEFAULT",
    "Exclusive_Thread": "DEFAULT",
    "Prohibited": "PROHIBITED",
    "Exclusive_Process": "EXCLUSIVE_PROCESS",
}


def check(program: str, key: str) -> None:
    """Raises TrustError when somebody else than root could have put the command there, HostError when it is missing.

    `key`: the key in [gpu] of the configuration that names the command, for the error.
    """
    try:
        trust.check_path(program, userns.trusted_owners(userns.user_namespace()))
    except OSError as error:
        raise errors.HostError(
            f"{program} cannot be used: {error.strerror}", f"install it, or name it as {key} in [gpu]"
        ) from None


def _run(argv: list[str], env: dict[str, str], stdin: str = "", patience: float = PATIENCE, lock: int = -1) -> str:
    """Runs a command with `stdin` as its standard input, and gives its output.  Raises HostError.

    `patience`: the time limit in seconds.  `lock`: the descriptor of the GPU's lock, for a command that changes the
    GPU.  The command inherits it: if we are killed the command goes on, and the next create must still wait for it.
    """
    try:
        done = subprocess.run(
            argv,
            check=False,
            cwd="/",
            env=env,
            input=stdin,
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
    """A GPU's compute mode, in the spelling of set_compute_mode.  Raises HostError."""
    mode = _run([smi, "-i", uuid, "--query-gpu=compute_mode", "--format=csv,noheader"], ENVIRONMENT).strip()
    if mode not in _MODES:
        raise errors.HostError(f"{smi} calls the compute mode of {uuid} {mode!r}, which is not a compute mode")
    return _MODES[mode]


def set_compute_mode(smi: str, uuid: str, mode: str, lock: int = -1) -> None:
    """Sets a GPU's compute mode and reads it back.  Raises HostError."""
    _run([smi, "-i", uuid, "-c", mode], ENVIRONMENT, lock=lock)
    actual = compute_mode(smi, uuid)
    if actual != mode:
        raise errors.HostError(f"the compute mode of {uuid} is {actual} after {smi} has set it to {mode}")


def set_time_slice(smi: str, uuid: str, number: int, lock: int = -1) -> None:
    """Sets the length of a GPU's time slices: 0 default, 1 short, 2 medium, 3 long.  Raises HostError."""
    _run([smi, "compute-policy", "-i", uuid, f"--set-timeslice={number}"], ENVIRONMENT, lock=lock)


def uuid_of(key: str) -> str:
    """The UUID of the GPU with the device number `key` (c195:MINOR), from NVIDIA's kernel module; '' if it has none."""
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
    """Sends a command to the MPS daemon of a pipe directory, and gives the answer.

    Raises HostError, also when no daemon runs there.
    """
    return _run([program], {**ENVIRONMENT, "CUDA_MPS_PIPE_DIRECTORY": pipe_dir}, command + "\n", patience).strip()


def percentage(program: str, pipe_dir: str, patience: float = CONTROL_PATIENCE) -> float:
    """The daemon's default active thread percentage.  Raises HostError.

    Every working daemon can answer this, so it also serves to test whether the daemon works.
    """
    answer = control(program, pipe_dir, "get_default_active_thread_percentage", patience)
    try:
        return float(answer)
    except ValueError:
        raise errors.HostError(
            f"the MPS daemon of {pipe_dir} gives {answer[:_MAX_WORDS]!r} instead of a number"
        ) from None


def servers(program: str, pipe_dir: str) -> dict[int, int]:
    """The uid of each of the daemon's servers, by the server's pid.  Raises HostError."""
    uids = {}
    for word in control(program, pipe_dir, "get_server_list").split():
        if word.isdigit():
            try:
                uids[int(word)] = os.stat(f"/proc/{word}").st_uid
            except OSError:
                continue  # this server has ended
    return uids


def log_tail(log_dir: str) -> str:
    """The last lines of a daemon's log, as a clause for an error."""
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
    """Whether systemd calls a unit active."""
    try:
        unit("is-active", name)
    except errors.HostError:
        return False
    return True
