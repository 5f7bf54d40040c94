"""MPS daemons: checks an external one before a container uses it, and runs Chandler's own, one for each shared GPU.

Where systemd is process 1, it runs our daemon as chandler-mps@UUID.service.  Elsewhere this module starts the daemon.
The daemon outlives the process that created the container, so it takes nothing from it: no streams, file descriptors,
session, working directory, environment, control group or mount namespace.  If it cannot leave one of these, the create
is refused.
Sources: NVIDIA, "Multi-Process Service"; nvidia-cuda-mps-control(1); cgroups(7); mount_namespaces(7).
"""

from __future__ import annotations

import os
import shutil
import signal
import time

from shim import errors
from shim.errors import ChandlerError
from shim.host import files, kernel, trust, userns
from shim.sharing import nvidia_tools, pages, terms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from shim.sharing.pages import Page
    from shim.sharing.terms import Sharing

_STOP_PATIENCE = 5.0  # seconds that a daemon has to end after `quit`, or after SIGKILL
_PAUSE = 0.02  # seconds between two checks while we wait
_INITIAL_MOUNTS = 0xEFFFFFF8  # the inode of the initial mount namespace on kernels that fix it (MNT_NS_INIT_INO)
_MAX_PIPE = 107 - len("/control_privileged")  # bytes; the daemon's longest socket path must fit into sun_path (unix(7))
_GROUP = "chandler-mps"
_REMEDY = 'run the host\'s systemd as process 1, or start the daemon yourself and set mps = "external" in [gpu]'


# --- an external daemon ---------------------------------------------------------------------------------------


def check_external(share: Sharing) -> None:
    """Checks that the external daemon answers, that its directories are safe, and that it would serve this user.

    Raises HostError, TrustError or OSError.
    """
    config = share.config
    pipe_dir, shm_dir = pages.directories(share, "")
    control = config["gpu.mps-control"]
    nvidia_tools.check(control, "mps-control")
    for path in (pipe_dir, *([share.request["mps_log_dir"]] if "mps_log_dir" in share.request else [])):
        _check_directory(path)
    _check_shm(shm_dir)
    try:
        nvidia_tools.percentage(control, pipe_dir)
    except errors.HostError as error:
        raise errors.HostError(
            f"no MPS daemon answers in {pipe_dir}: {error.what}", "start it with `nvidia-cuda-mps-control -d`"
        ) from None
    _check_user(share.uid, pipe_dir, control)


def _check_directory(path: str) -> None:
    """Raises HostError or TrustError unless `path` is a directory that only `pages.share_owners` could have made."""
    try:
        trust.check_path(path, pages.share_owners())
    except OSError as error:
        raise errors.HostError(
            f"the MPS directory {path} cannot be used: {error.strerror}",
            "start the daemon with it, or name the right one as mps-pipe-dir in [gpu]",
        ) from None
    if not os.path.isdir(path):
        raise errors.HostError(f"{path} is not a directory")


def _check_shm(path: str) -> None:
    """Raises HostError or TrustError for a shared memory directory that others own or can change.

    Like /dev/shm it may be writable by all if it is sticky: then nobody can replace what another user has in it.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise errors.HostError(
            f"the shared memory {path} of the MPS daemon cannot be used: {error.strerror}",
            "name the right directory as mps-shm-dir in [gpu]",
        ) from None
    if status.st_uid not in pages.share_owners() or status.st_mode & 0o022 and not status.st_mode & 0o1000:
        raise errors.TrustError(
            f"the shared memory {path} can be changed by others (mode {status.st_mode & 0o7777:04o})",
            f"`chmod +t {path}`",
        )


def _check_user(uid: int, pipe_dir: str, control: str) -> None:
    """Raises HostError if the daemon would not serve clients of `uid` now.

    An MPS server serves one user.  Clients of another user wait, without a message, until it has no clients left.
    """
    others = {owner for owner in nvidia_tools.servers(control, pipe_dir).values() if owner != uid}
    if others:
        raise errors.HostError(
            f"the MPS server in {pipe_dir} serves uid {min(others)}, and this container's processes, uid {uid}, would "
            "wait until all of those have ended",
            f"run the container with uid {min(others)}, or another daemon",
        )
    try:
        daemon = os.stat(pipe_dir + "/control").st_uid
    except OSError:
        return
    if daemon not in (0, uid):
        raise errors.HostError(
            f"the MPS daemon in {pipe_dir} runs as uid {daemon} and serves nobody else, not uid {uid}",
            "run the daemon as root",
        )


# --- our own daemons ------------------------------------------------------------------------------------------


def begin(page: Page, share: Sharing) -> None:
    """Starts the daemon of one GPU, or finds it running, and waits for its first answer.

    Raises HostError, TrustError or OSError.
    """
    control = page.values["control"]
    nvidia_tools.check(control, "mps-control")
    if os.geteuid() or userns.user_namespace() != userns.INITIAL_NAMESPACE:
        raise errors.HostError(
            "only the host's root can run an MPS daemon and set a GPU's compute mode", 'set mps = "external" in [gpu]'
        )
    pipe_dir, shm_dir = pages.directories(share, page.state_dir)
    if len(os.fsencode(pipe_dir)) > _MAX_PIPE:
        raise errors.HostError(
            f"{pipe_dir} is too long for the sockets of an MPS daemon by {len(os.fsencode(pipe_dir)) - _MAX_PIPE} "
            "characters",
            "choose a shorter state-dir",
        )
    if page.values.get("ready") and alive(page):
        try:
            nvidia_tools.percentage(control, pipe_dir)
            _check_user(share.uid, pipe_dir, control)
            return
        except errors.HostError:
            if nvidia_tools.servers(control, pipe_dir):
                raise  # its servers run: a restart would end their clients
    page.values["failed"] = True  # until the daemon answers: setup._begin then knows to end what this begins
    _stop(page)
    page.set_compute_mode("EXCLUSIVE_PROCESS")
    base = os.path.dirname(pipe_dir)
    page.update(base=base, ready=False, pid=0, unit="")
    trust.own_directory(page.state_dir, 0o755)
    trust.check_own_directory(base, {0: "root"})
    shutil.rmtree(base, ignore_errors=True)
    for path in (pipe_dir, base + "/log"):
        files.make_directory(path, 0o755)
        os.chmod(path, 0o755)  # whatever the umask
    if shm_dir.startswith(base):
        files.make_directory(shm_dir)
        os.chmod(shm_dir, 0o1777)
    _check_shm(shm_dir)
    if nvidia_tools.has_systemd():
        page.update(unit=f"chandler-mps@{page.values['uuid']}.service")
        nvidia_tools.unit("start", page.values["unit"])
    else:
        _spawn(
            page,
            [control, "-f"],
            {
                **nvidia_tools.ENVIRONMENT,
                "CUDA_VISIBLE_DEVICES": page.values["uuid"],
                "CUDA_MPS_PIPE_DIRECTORY": pipe_dir,
                "CUDA_MPS_LOG_DIRECTORY": base + "/log",
            },
        )
    _wait_ready(page, pipe_dir, share.config["gpu.mps-patience"])
    if share.enforced:
        _limit(page, pipe_dir, share.limits)
    page.values.pop("failed")
    page.update(ready=True)


def _wait_ready(page: Page, pipe_dir: str, patience: float) -> None:
    """Waits for the daemon's first answer.  Raises HostError when it has ended, or is silent for `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        running = alive(page)  # before the question: if it ends in between, the next round sees that
        try:
            nvidia_tools.percentage(
                page.values["control"],
                pipe_dir,
                max(0.1, min(nvidia_tools.CONTROL_PATIENCE, deadline - time.monotonic())),
            )
            return
        except errors.HostError as error:
            what = (
                "has ended"
                if not running
                else f"gives no answer in {patience} seconds ({error.what})"
                if time.monotonic() > deadline
                else ""
            )
        if what:
            raise errors.HostError(
                f"the MPS daemon of {page.values['uuid']} {what}; {nvidia_tools.log_tail(page.values['base'] + '/log')}"
            )
        time.sleep(_PAUSE)


def _limit(page: Page, pipe_dir: str, limits: dict[str, int]) -> None:
    """Sets the limits in the daemon, which holds the servers that it starts to them, and reads them back.

    The daemon accepts values that it does not understand, so only the answer shows whether a limit was set.
    """
    control = page.values["control"]
    if "mps_active_thread_percentage" in limits:
        wanted = limits["mps_active_thread_percentage"]
        nvidia_tools.control(control, pipe_dir, f"set_default_active_thread_percentage {wanted}")
        actual = nvidia_tools.percentage(control, pipe_dir)
        if actual != wanted:
            raise errors.HostError(
                f"the MPS daemon of {page.values['uuid']} holds mps_active_thread_percentage at {actual:g} after it "
                f"was set to {wanted}"
            )
    if "mps_pinned_memory" in limits:
        mib = limits["mps_pinned_memory"] >> 20
        nvidia_tools.control(control, pipe_dir, f"set_default_device_pinned_mem_limit 0 {mib}M")
        answer = nvidia_tools.control(control, pipe_dir, "get_default_device_pinned_mem_limit 0")
        if terms.memory_limit(answer.split()[-1] if answer.split() else "") != mib << 20:
            raise errors.HostError(
                f"the MPS daemon of {page.values['uuid']} holds mps_pinned_memory at {answer[:80]!r} after it was set "
                f"to {mib}M"
            )


def alive(page: Page) -> bool:
    """Whether the daemon that we started runs."""
    if page.values.get("unit"):
        return nvidia_tools.active(page.values["unit"])
    pid = page.values.get("pid", 0)
    return bool(pid) and kernel.started(pid) == page.values["started"] and not _zombie(pid)


def end(page: Page) -> None:
    """Stops the daemon.  Raises HostError or OSError."""
    _stop(page)
    if page.values.get("base"):
        for name in ("pipe", "shm"):
            shutil.rmtree(f"{page.values['base']}/{name}", ignore_errors=True)  # the log is kept


def _stop(page: Page) -> None:
    if page.values.get("unit"):
        nvidia_tools.unit("stop", page.values["unit"])
        return
    if not page.values.get("pid") or not alive(page):
        return
    patience = _STOP_PATIENCE
    try:
        nvidia_tools.control(page.values["control"], page.values["base"] + "/pipe", "quit")
    except ChandlerError:
        patience = 0.0  # it did not take `quit`, so it will not end by itself
    if not _ended(page, patience):
        # the daemon leads a session of its own (_become), so its process group has the daemon and its servers
        os.killpg(page.values["pid"], signal.SIGKILL)
        if not _ended(page, _STOP_PATIENCE):
            raise errors.HostError(
                f"the MPS daemon of {page.values['uuid']}, process {page.values['pid']}, does not end"
            )


def _ended(page: Page, patience: float) -> bool:
    """Waits up to `patience` seconds for the daemon to end; whether it has."""
    deadline = time.monotonic() + patience
    while alive(page):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_PAUSE)
    return True


def _zombie(pid: int) -> bool:
    """Whether a process has ended, be it a zombie.

    Our daemon's parent is process 1, which in a container may never reap it.
    """
    fields = kernel.stat(pid)
    return not fields or fields[0] in "ZX"


# --- starting it without systemd ------------------------------------------------------------------------------


def _spawn(page: Page, argv: list[str], env: dict[str, str]) -> None:
    """Starts a daemon, and writes its pid to the page before it runs.  Raises HostError or OSError.

    So no daemon runs that no page names, even if we are killed.  Two forks, so that the daemon is not our child.  It
    waits for a byte from `go`, which we send when the page is written.  From `tell` we read its pid, and then the error
    if it cannot start.
    """
    go, tell = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(go[1])
            os.close(tell[0])
            if os.fork() == 0:
                _become(argv, env, go[0], tell[1])
            os._exit(0)
        finally:
            os._exit(1)
    os.close(go[0])
    os.close(tell[1])
    try:
        os.waitpid(child, 0)
        pid = int(os.read(tell[0], 32) or b"0")
        page.update(pid=pid, started=kernel.started(pid))
        os.write(go[1], b"g")
        problem = os.read(tell[0], 4096).decode()  # empty at the end of file, when the exec has closed the pipe
    finally:
        os.close(go[1])
        os.close(tell[0])
    if problem:
        raise errors.HostError(f"the MPS daemon of {page.values['uuid']} cannot be started: {problem}", _REMEDY)


def _become(argv: list[str], env: dict[str, str], go: int, tell: int) -> NoReturn:
    """Drops everything that came from the caller, then becomes the daemon.  An error is written to `tell`."""
    try:
        os.setsid()
        os.write(tell, str(os.getpid()).encode())
        if os.read(go, 1) != b"g":
            os._exit(1)  # the starter was killed before it wrote our pid to the page
        _enter_initial_mounts()
        _leave_groups()
        for number in range(1, signal.NSIG):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o022)
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (0, 1, 2, tell):
                try:
                    os.close(int(name))
                except OSError:
                    pass  # the descriptor that listdir had open
        os.execve(argv[0], argv, env)
    except BaseException as error:
        os.write(tell, str(error).encode()[:1000] or type(error).__name__.encode())
    os._exit(1)


def _enter_initial_mounts() -> None:
    """Enters process 1's mount namespace.  In the caller's, the daemon would keep its mounts for as long as it runs.

    Raises RuntimeError.
    """
    current = os.stat("/proc/self/ns/mnt").st_ino
    if current == _INITIAL_MOUNTS:
        return
    try:
        if os.stat("/proc/1/ns/mnt").st_ino == current:
            return
        import ctypes

        descriptor = os.open("/proc/1/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x00020000):  # CLONE_NEWNS
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        raise RuntimeError(
            "it would keep the mounts of whoever creates the container; process 1's mount namespace cannot be entered: "
            f"{error.strerror}"
        ) from None


def _leave_groups() -> None:
    """Leaves the caller's control groups.  In a pod's group the daemon would count against its limits, and end with it.

    Raises RuntimeError.
    """
    before = {controllers: path for controllers, path in kernel.cgroups_of("self").items() if path != "/"}
    if not before:
        return
    for mounted, kind, options in _hierarchies():
        if not any(
            kind == "cgroup2" if not controllers else kind == "cgroup" and set(controllers.split(",")) <= options
            for controllers in before
        ):
            continue
        try:
            # With v1 it goes to the root group: a new cpuset group would first need CPUs and memory.
            target = mounted
            if kind == "cgroup2":
                target = f"{mounted}/{_GROUP}"
                os.makedirs(target, exist_ok=True)
            with open(target + "/cgroup.procs", "w", encoding="ascii") as file:
                file.write("0")
        except OSError:
            pass  # the check below decides
    now = kernel.cgroups_of("self")
    for controllers, path in before.items():
        if now[controllers] == path or now[controllers].startswith(path.rstrip("/") + "/"):
            raise RuntimeError(f"it cannot leave the control group {path} of whoever creates the container")


def _hierarchies() -> list[tuple[str, str, set[str]]]:
    """(mount point, cgroup or cgroup2, mount options) of each hierarchy that is mounted with its root group."""
    hierarchies = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            fields, (kind, _, options) = left.split(), right.split()[:3]
            if kind in ("cgroup", "cgroup2") and fields[3] == "/":
                hierarchies.append((fields[4], kind, set(options.split(","))))
    return hierarchies
