"""MPS: daemons of others are checked; our own are started, limited, found again and stopped; all failures."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import REPOSITORY
from lab.sharing_host import UUIDS, Host, env, mounts

from shim.edits import HOOK, Edits
from shim.errors import ChandlerError, HostError, LeaseError, PolicyError, RequestError, TrustError
from shim.host import kernel
from shim.sharing import mps, nvidia_tools, pages, setup
from shim.state.ledger import Ledger

# --- managed --------------------------------------------------------------------------------------------------


def test_the_first_starts_a_daemon_and_the_last_stops_it(host: Host) -> None:
    first = host.create(
        "one", sharing="mps", mps_active_thread_percentage=30, mps_pinned_memory="1.5Gi", mps_priority=1
    )
    base = f"{host.state}/mps/{UUIDS[0]}"
    assert env(first) == {
        "CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=1536M",
        "CUDA_MPS_CLIENT_PRIORITY": "1",
    }
    assert mounts(first) == {"/tmp/nvidia-mps": base + "/pipe", "/dev/shm": "/dev/shm"}
    ((_, stage, hook, _),) = first.of(HOOK)
    assert stage == "createRuntime" and hook["args"] == [
        "chandler-hook",
        "mps-ready",
        base + "/pipe",
        host.commands.control,
    ]
    assert host.mode() == "EXCLUSIVE_PROCESS"
    host.create("two", sharing="mps", mps_active_thread_percentage=50)
    assert len(host.commands.running()) == 1
    assert [lease["held"] for lease in host.ledger.read()] == ["advisory", "advisory"]
    with pytest.raises(LeaseError, match=r"one holds nvidia.com/gpu=0 \(mps, uid 0\) since"):
        host.create("exclusive", devices=["0"])
    host.create("exclusive")
    assert host.ledger.read()[-1]["keys"] == ["c195:1"], "an exclusive request must take a free GPU"
    host.delete("one")
    assert len(host.commands.running()) == 1 and host.mode() == "EXCLUSIVE_PROCESS"
    host.delete("two")
    assert host.commands.running() == [] and host.mode() == "DEFAULT"
    assert (
        not os.path.exists(host.state + "/shared")
        and not os.path.exists(base + "/pipe")
        and os.path.exists(base + "/log/control.log")
    )


def test_a_daemon_inherits_nothing_from_its_caller(host: Host) -> None:
    os.environ["CANARY"] = "1"
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        host.create("c", sharing="mps")
    finally:
        os.close(writer)
        del os.environ["CANARY"]
    (seen,) = host.commands.started()
    assert os.read(reader, 1) == b"", "the daemon does not hold the pipe open"
    os.close(reader)
    assert {seen["fds"][n] for n in ("0", "1", "2")} == {"/dev/null"} and set(seen["fds"]) <= {"0", "1", "2", "3"}
    assert (seen["cwd"], seen["sid"]) == ("/", seen["pid"])
    own = kernel.cgroups_of("self")
    for line in seen["groups"].splitlines():
        _, controllers, path = line.split(":", 2)
        assert own[controllers] == "/" or not (path + "/").startswith(own[controllers] + "/")
    pipe = f"{host.state}/mps/{UUIDS[0]}/pipe"
    assert seen["env"] == {
        **nvidia_tools.ENVIRONMENT,
        "CUDA_VISIBLE_DEVICES": UUIDS[0],
        "CUDA_MPS_PIPE_DIRECTORY": pipe,
        "CUDA_MPS_LOG_DIRECTORY": pipe[:-4] + "log",
    } | {k: v for k, v in seen["env"].items() if k == "LC_CTYPE"}
    assert stat.S_IMODE(os.stat(pipe).st_mode) == 0o755


def test_reading_the_creates_output_to_its_end_waits_for_no_daemon(host: Host) -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]; from lab.sharing_host import Host; "
        "Host(sys.argv[3]).create('c', sharing='mps'); print('made')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, REPOSITORY, os.path.join(REPOSITORY, "tests"), host.directory],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )  # would never end while the daemon had the pipe
    assert done.stdout == "made\n" and len(host.commands.running()) == 1


def test_the_former_compute_mode_is_restored(host: Host) -> None:
    host.commands.set_gpus({UUIDS[0]: {"mode": "PROHIBITED", "slice": 0}})
    host.create("c", sharing="mps")
    (page,) = pages.every(host.state)
    assert page["before"] == "PROHIBITED" and host.mode() == "EXCLUSIVE_PROCESS"
    host.delete("c")
    assert host.mode() == "PROHIBITED"


def test_the_former_compute_mode_is_recorded_before_it_is_changed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt  # the closest to a kill for a process that has to go on

    host.commands.set_gpus({UUIDS[0]: {"mode": "PROHIBITED", "slice": 0}})
    monkeypatch.setattr(nvidia_tools, "set_compute_mode", killed)
    monkeypatch.setattr(setup, "_end", lambda page: None)
    with pytest.raises(KeyboardInterrupt):
        host.create("c", sharing="mps")
    assert pages.every(host.state)[0]["before"] == "PROHIBITED"


def test_a_slow_start_is_waited_for(host: Host) -> None:
    host.commands.mood(host.commands.control, ready=host.directory + "/go")
    done: list[Edits] = []
    thread = threading.Thread(target=lambda: done.append(host.create("c", sharing="mps")))
    thread.start()
    until(lambda: host.commands.started())
    assert not done
    open(host.directory + "/go", "w").close()
    thread.join(30)
    assert len(done) == 1


@pytest.mark.parametrize(
    ("mood", "words"),
    [
        ({"start": "no"}, "gives no answer in 1 seconds"),
        ({"mute": True}, "gives no answer in 1 seconds"),
        ({"start": "dies"}, "has ended; its log ends: .*Failed to start : MPS control daemon cannot use the device"),
    ],
)
def test_a_daemon_that_does_not_start_fails_the_create_and_leaves_nothing(
    host: Host, mood: dict[str, Any], words: str
) -> None:
    host.config["gpu.mps-patience"] = 1
    host.commands.mood(host.commands.control, **mood)
    with pytest.raises(HostError, match=words):
        host.create("c", sharing="mps")
    assert (
        host.commands.running() == []
        and host.mode() == "DEFAULT"
        and host.ledger.read() == []
        and pages.every(host.state) == []
    )
    host.commands.mood(host.commands.control)
    host.create("c", sharing="mps")


def test_a_compute_mode_that_cannot_be_set_fails_the_create(host: Host) -> None:
    host.commands.mood(host.commands.smi, ignores=True)
    with pytest.raises(
        HostError, match="the compute mode of GPU-.* is DEFAULT after .* has set it to EXCLUSIVE_PROCESS"
    ):
        host.create("c", sharing="mps")
    host.commands.mood(host.commands.smi, fails=["-c"])
    with pytest.raises(HostError, match="Insufficient Permissions"):
        host.create("c", sharing="mps")
    assert host.ledger.read() == [] and host.commands.started() == []


def test_the_next_holder_retries_what_could_not_be_restored(host: Host) -> None:
    host.create("c", sharing="mps")
    host.commands.mood(host.commands.smi, fails=["-c"])
    with pytest.raises(HostError):
        host.delete("c")
    assert host.ledger.read() == [] and len(pages.every(host.state)) == 1
    with pytest.raises(HostError, match="Insufficient Permissions"):
        host.create("exclusive", devices=["0"])
    host.commands.mood(host.commands.smi)
    host.create("exclusive", devices=["0"])
    assert host.mode() == "DEFAULT" and pages.every(host.state) == []


def test_a_daemon_that_died_is_started_anew(host: Host) -> None:
    host.create("one", sharing="mps")
    host.commands.end()
    until(lambda: not host.commands.running())
    host.create("two", sharing="mps")
    assert len(host.commands.running()) == 1 and len(host.commands.started()) == 2
    host.delete("one")
    host.delete("two")
    assert host.commands.running() == [] and host.mode() == "DEFAULT"


def test_a_daemon_that_does_not_quit_is_killed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.create("c", sharing="mps")
    host.commands.mood(host.commands.control, mute=True)
    monkeypatch.setattr(mps, "_STOP_PATIENCE", 0.2)
    monkeypatch.setattr(nvidia_tools, "CONTROL_PATIENCE", 0.2)
    host.delete("c")
    assert host.commands.running() == []


def test_limits_that_the_daemon_enforces(host: Host) -> None:
    host.config["gpu.mps-limits"] = "enforced"
    host.create("one", sharing="mps", mps_active_thread_percentage=25, mps_pinned_memory="2Gi")
    pipe = f"{host.state}/mps/{UUIDS[0]}/pipe"
    assert nvidia_tools.percentage(host.commands.control, pipe) == 25
    assert nvidia_tools.control(host.commands.control, pipe, "get_default_device_pinned_mem_limit 0") == "2048M"
    host.create("same", sharing="mps", mps_active_thread_percentage=25, mps_pinned_memory="2Gi")
    host.create("other", sharing="mps", mps_active_thread_percentage=50)
    leases = {lease["id"]: lease for lease in host.ledger.read()}
    assert leases["same"]["keys"] == ["c195:0"] and leases["other"]["keys"] == ["c195:1"], (
        "another limit needs another daemon"
    )
    assert {lease["held"] for lease in leases.values()} == {"enforced"}


def test_a_limit_that_is_not_applied_fails_the_create(host: Host) -> None:
    host.config["gpu.mps-limits"] = "enforced"
    host.commands.mood(host.commands.control, keep=True)
    with pytest.raises(HostError, match="holds mps_active_thread_percentage at 100 after it was set to 25"):
        host.create("c", sharing="mps", mps_active_thread_percentage=25)
    with pytest.raises(HostError, match="holds mps_pinned_memory at '0M' after it was set to 64M"):
        host.create("c", sharing="mps", mps_pinned_memory="64Mi")
    assert host.commands.running() == [] and host.ledger.read() == []


def test_another_user_gets_another_gpu(host: Host) -> None:
    host.create("root", sharing="mps")
    host.create("other", uid=1000, sharing="mps")
    assert host.ledger.read()[-1]["keys"] == ["c195:1"]
    with pytest.raises(LeaseError, match=r"root holds nvidia.com/gpu=0 \(mps, uid 0\)"):
        host.create("named", uid=1000, sharing="mps", devices=["0"])
    mapped: dict[str, Any] = {
        "process": {"user": {"uid": 0}},
        "linux": {"namespaces": [{"type": "user"}], "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}]},
    }
    host.create("mapped", document=mapped, sharing="mps", devices=["1"])
    mapped["linux"]["uidMappings"] = []
    with pytest.raises(ChandlerError, match="does not map the container's uid 0"):
        host.create("unmapped", document=mapped, sharing="mps")


def test_max_sharers(host: Host) -> None:
    host.config["gpu.max-sharers"] = 2
    for name in ("a", "b", "c"):
        host.create(name, sharing="mps")
    assert [lease["keys"] for lease in host.ledger.read()] == [["c195:0"], ["c195:0"], ["c195:1"]]


def test_many_at_once_share_one_daemon(host: Host) -> None:
    failed: list[BaseException] = []

    def live(number: int) -> None:
        try:
            for turn in range(3):
                host.create(f"c{number}-{turn}", sharing="mps", devices=["0"])
                host.delete(f"c{number}-{turn}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(6)]
    host.create("stays", sharing="mps")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and len(host.commands.started()) == 1
    host.delete("stays")
    assert host.commands.running() == [] and host.mode() == "DEFAULT" and host.ledger.read() == []


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (
            {"sharing": "mps", "count": 2},
            RequestError,
            'asks for 2 GPUs with sharing = "mps"; each has an MPS daemon of its own',
        ),
        ({"sharing": "mps", "devices": ["0:1"]}, RequestError, "is a MIG device, which needs an MPS daemon of its own"),
        (
            {"sharing": "mps", "mps_pipe_dir": "/x"},
            RequestError,
            "mps_pipe_dir: this node's MPS daemons are Chandler's own",
        ),
        (
            {"sharing": "mps", "time_slice": "short"},
            RequestError,
            "time_slice is for sharing = 'time-slice', not for 'mps'",
        ),
        ({"mps_priority": 1}, RequestError, "mps_priority is for sharing = 'mps', not for 'exclusive'"),
        ({"sharing": "mps", "mps_active_thread_percentage": 0}, RequestError, "0 is not between 1 and 100"),
        ({"sharing": "mps", "mps_pinned_memory": "1Ki"}, RequestError, "too small"),
        ({"sharing": "all"}, RequestError, "'all' is not one of exclusive, mps, time-slice"),
        ({"sharing": "mps", "mps_log_dir": "../x"}, RequestError, "no absolute path"),
    ],
)
def test_wrong_requests(host: Host, asked: dict[str, Any], error: type[ChandlerError], words: str) -> None:
    with pytest.raises(error) as caught:
        host.create("c", **asked)
    assert words in str(caught.value) and host.ledger.read() == []


def test_nodes_that_refuse_to_share(host: Host) -> None:
    with pytest.raises(PolicyError, match='set allocator = "leases"'):
        host.plan({"sharing": "mps"})
    host.config["gpu.mps"] = "off"
    with pytest.raises(PolicyError, match="this node runs no MPS"):
        host.create("c", sharing="mps")
    host.config["policy.trust"] = "policy"
    host.config["gpu.mps"] = "external"
    for key in ("mps_pipe_dir", "mps_log_dir"):
        with pytest.raises(PolicyError, match=f"resources.gpu.{key} is not allowed"):
            host.plan({"sharing": "mps", key: "/tmp"}, [])
    host.config["policy.deny"] = ["gpu.sharing"]
    with pytest.raises(PolicyError, match="gpu.sharing is refused"):
        host.create("c", sharing="mps")


def test_a_command_that_others_may_change_is_not_run(host: Host) -> None:
    os.chmod(host.commands.control, 0o777)
    with pytest.raises(TrustError, match="can be written by others"):
        host.create("c", sharing="mps")
    os.unlink(host.commands.control)
    with pytest.raises(HostError, match="install it, or name it as mps-control"):
        host.create("c", sharing="mps")
    assert host.mode() == "DEFAULT" and pages.every(host.state) == []


def test_under_systemd_the_unit_runs_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd would start the daemon by the unit; here the test starts it."""
    calls: list[tuple[str, str]] = []
    daemons: list[subprocess.Popen[bytes]] = []

    def unit(verb: str, name: str) -> None:
        if verb == "is-active":
            return
        calls.append((verb, name))
        if verb == "start":
            base = f"{host.directory}/mps/{UUIDS[0]}"
            assert stat.S_IMODE(os.stat(base + "/shm").st_mode) == 0o1777
            daemons.append(
                subprocess.Popen(
                    [host.commands.control, "-f"],
                    stdin=subprocess.DEVNULL,
                    env={"CUDA_MPS_PIPE_DIRECTORY": base + "/pipe", "CUDA_MPS_LOG_DIRECTORY": base + "/log"},
                )
            )
        else:
            nvidia_tools.control(host.commands.control, f"{host.directory}/mps/{UUIDS[0]}/pipe", "quit")

    from shim import paths

    monkeypatch.setattr(nvidia_tools, "has_systemd", lambda: True)
    monkeypatch.setattr(nvidia_tools, "unit", unit)
    monkeypatch.setattr(paths, "STATE_DIR", host.directory)
    made = host.create("c", sharing="mps")
    assert mounts(made)["/dev/shm"] == f"{host.directory}/mps/{UUIDS[0]}/shm", "a unit has shared memory of its own"
    host.delete("c")
    assert calls == [(verb, f"chandler-mps@{UUIDS[0]}.service") for verb in ("start", "stop")]
    assert [daemon.wait(30) for daemon in daemons] == [0]


def test_a_failed_unit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_tools, "SYSTEMCTL", "/bin/false")
    with pytest.raises(HostError, match=r"/bin/false start chandler-mps@x.service failed \(1\)"):
        nvidia_tools.unit("start", "chandler-mps@x.service")


def test_a_group_that_cannot_be_left_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "cgroups_of", lambda pid: {"": "/pod/container"})
    monkeypatch.setattr(mps, "_hierarchies", list)
    with pytest.raises(HostError, match=r"it cannot leave the control group /pod/container .*; run the host's systemd"):
        host.create("c", sharing="mps")
    assert host.commands.started() == [] and pages.every(host.state) == []


def test_a_daemon_does_not_keep_its_callers_mounts(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "_INITIAL_MOUNTS", 0)
    if os.access("/proc/1/ns/mnt", os.R_OK):
        host.create("c", sharing="mps")
        return
    with pytest.raises(HostError, match="it would keep the mounts of whoever creates the container"):
        host.create("c", sharing="mps")


# --- external -------------------------------------------------------------------------------------------------


@pytest.fixture
def external(host: Host) -> Iterator[Host]:
    """A daemon that Chandler does not manage."""
    host.config["gpu.mps"] = "external"
    pipe, log = host.directory + "/pipe", host.directory + "/log"
    host.config["gpu.mps-pipe-dir"] = pipe
    os.mkdir(pipe)
    os.mkdir(log)
    with subprocess.Popen(
        [host.commands.control, "-f"],
        stdin=subprocess.DEVNULL,
        env={"CUDA_MPS_PIPE_DIRECTORY": pipe, "CUDA_MPS_LOG_DIRECTORY": log},
    ) as daemon:
        until(lambda: os.path.exists(pipe + "/control"))
        yield host
        daemon.kill()


def test_a_daemon_of_others(external: Host) -> None:
    made = external.create(
        "c", sharing="mps", count=2, mps_pinned_memory="64Mi", mps_log_dir=external.directory + "/log"
    )
    assert env(made) == {
        "CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps",
        "CUDA_MPS_LOG_DIRECTORY": external.directory + "/log",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=64M,1=64M",
    }
    assert mounts(made) == {
        "/tmp/nvidia-mps": external.directory + "/pipe",
        "/dev/shm": "/dev/shm",
        external.directory + "/log": external.directory + "/log",
    }
    external.delete("c")
    assert external.commands.calls(external.commands.smi) == [] and len(external.commands.started()) == 1


def test_external_needs_no_leases(external: Host) -> None:
    made = external.plan({"sharing": "mps", "devices": ["0:1"]})
    assert (
        made.sharing is not None
        and mounts(setup.begin(made.sharing, external.state))["/tmp/nvidia-mps"] == external.directory + "/pipe"
    )
    with pytest.raises(RequestError, match="MIG device"):
        external.plan({"sharing": "mps", "devices": ["0:1", "1"]})


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda pipe: os.chmod(pipe, 0o777), TrustError, "can be written by others"),
        (lambda pipe: os.chown(pipe, 1000, 1000), TrustError, "belongs to uid 1000"),
        (lambda pipe: os.rename(pipe, pipe + ".away"), HostError, "the MPS directory .* cannot be used: No such file"),
        (
            lambda pipe: os.unlink(pipe + "/control"),
            HostError,
            "no MPS daemon answers in .*Cannot find MPS control daemon.*; start it with `nvidia-cuda-mps-control -d`",
        ),
        (
            lambda pipe: os.chown(pipe + "/control", 1000, 0),
            HostError,
            "runs as uid 1000 and serves nobody else, not uid 0",
        ),
    ],
)
def test_unsafe_daemons_of_others_are_refused(
    external: Host, spoil: Callable[[str], None], error: type[ChandlerError], words: str
) -> None:
    spoil(external.directory + "/pipe")
    with pytest.raises(error, match=words):
        external.create("c", sharing="mps")
    assert external.ledger.read() == []


def test_a_server_of_another_user(external: Host) -> None:
    external.commands.mood(external.commands.control, servers=[os.getpid(), 2**22 + 1])
    external.create("same", sharing="mps")
    external.delete("same")
    with pytest.raises(HostError, match="serves uid 0, and this container's processes, uid 7, would wait"):
        external.create("other", uid=7, sharing="mps")


def test_shared_memory_must_be_safe(external: Host) -> None:
    shm = external.directory + "/shm"
    external.config["gpu.mps-shm-dir"] = shm
    with pytest.raises(HostError, match="name the right directory as mps-shm-dir"):
        external.create("c", sharing="mps")
    os.mkdir(shm)
    os.chmod(shm, 0o777)
    with pytest.raises(TrustError, match="chmod \\+t"):
        external.create("c", sharing="mps")
    os.chmod(shm, 0o1777)
    assert mounts(external.create("c", sharing="mps"))["/dev/shm"] == shm


# --- the hook -------------------------------------------------------------------------------------------------


def hook(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = os.path.join(REPOSITORY, "packaging/bin/chandler-hook")
    return subprocess.run(
        [program, "mps-ready", *arguments],
        check=False,
        input="{}",
        capture_output=True,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        timeout=60,
    )


def test_the_hook_proves_that_the_daemon_answers(host: Host) -> None:
    host.create("c", sharing="mps")
    pipe = f"{host.state}/mps/{UUIDS[0]}/pipe"
    assert hook(pipe, host.commands.control).returncode == 0
    host.commands.end()
    until(lambda: not host.commands.running())
    done = hook(pipe, host.commands.control)
    assert (
        done.returncode == 1
        and done.stderr.startswith("chandler-hook: mps-ready: ")
        and "Accepting connection" in done.stderr
    )
    assert done.stderr.count("\n") == 1
    assert hook("x").returncode == 1
    os.chmod(host.commands.control, 0o777)
    assert "can be written by others" in hook(pipe, host.commands.control).stderr


# --- what the commands answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("1G", 1 << 30), ("0", 0), ("64m", 64 << 20), ("", -1), ("x", -1), ("-1M", -1), ("1.5G", -1)],
)
def test_sizes_for_the_daemon(text: str, size: int) -> None:
    from shim.sharing import terms

    assert terms.memory_limit(text) == size


def test_uuids_from_the_kernel_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "0000:01:00.0"
    folder.mkdir()
    (folder / "information").write_text("Model: \t\t NVIDIA A100\nGPU UUID: \t GPU-0000abcd\nDevice Minor: \t 3\n")
    monkeypatch.setattr(nvidia_tools, "_PROC", str(tmp_path))
    assert (nvidia_tools.uuid_of("c195:3"), nvidia_tools.uuid_of("c195:0")) == ("GPU-0000abcd", "")


def until(true: Callable[[], object]) -> None:
    """Wait for a condition, with a limit."""
    waiter, end = threading.Event(), 3000
    while not true():
        end -= 1
        assert end, "it never came to be"
        waiter.wait(0.01)


def test_a_state_directory_too_long_for_sockets_is_refused(host: Host) -> None:
    """The path of a socket has at most 107 characters (unix(7)); that of the default state directory fits."""
    assert len(f"/run/chandler/mps/{UUIDS[0]}/pipe") <= mps._MAX_PIPE
    host.state += "/" + "x" * 100
    host.ledger = Ledger(host.state)
    with pytest.raises(
        HostError, match="is too long for the sockets of an MPS daemon by .*; choose a shorter state-dir"
    ):
        host.create("c", sharing="mps")
    assert host.mode() == "DEFAULT" and pages.every(host.state) == []
