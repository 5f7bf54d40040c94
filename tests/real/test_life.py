"""A container's whole life through Chandler on each real runtime: requests arrive, everything else passes through."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import time

import pytest
from lab import bundle, cgroups, runtimes
from lab.engine import Engine, pid_of
from lab.node import Node, uuid
from lab.runtimes import Runtime

WITH_LIMITS = [runtime.label for runtime in runtimes.known() if runtime.limits]
WITH_AND_WITHOUT = pytest.mark.parametrize("asks", [{}, {"env": {"A": "b"}}], ids=["plain", "edited"])
# Tries every path given and says which open.
PROBE = (
    'for d in "$@"; do if (: < $d) 2>/tmp/why; then echo "$d opens"; else busybox sed "s|.*: |$d |" /tmp/why; fi; done'
)


def make(workdir: str, script: str, *arguments: str, **document: object) -> bundle.Bundle:
    """A bundle that runs `script` and asks for `document`, if anything."""
    annotations = {**bundle.pod(), **(bundle.request(**document) if document else {})}
    return bundle.make(os.path.join(workdir, "b"), ["sh", "-c", script, "sh", *arguments], annotations)


def test_create_start_state_exec_kill_delete(chandler: Engine, workdir: str, runtime: Runtime) -> None:
    made = make(workdir, "echo out; exec sleep 60", resources={"gpu": {"count": 2}}, env={"A": "b"})
    chandler.create(made, "c1")
    assert chandler.state("c1")["status"] == "created"
    assert made.output() == "", "create wrote into the container's log"
    assert chandler.call("start", "c1").stdout == ""
    state = chandler.wait("c1", "running")
    assert state["pid"] == pid_of(made)
    assert chandler.exec("c1", "echo", "hello").stdout == "hello\n"
    assert chandler.exec("c1", "sh", "-c", "exit 9", check=False).returncode == 9
    killed = chandler.exec("c1", "sh", "-c", "kill -9 $$", check=False)
    assert killed.returncode == (signal.SIGKILL if runtime.kind == "youki" else 128 + signal.SIGKILL)
    chandler.kill("c1")
    chandler.wait("c1", "stopped")
    chandler.delete("c1")
    assert chandler.call("state", "c1", check=False).returncode != 0
    assert made.output() == "out\n"


def test_run_gives_what_was_asked(chandler: Engine, workdir: str) -> None:
    made = make(workdir, "env; exit 3", resources={"gpu": {"count": 2}}, env={"NCCL_DEBUG": "INFO", "SPACED": "a b=c"})
    done = chandler.run(made, "c1", check=False)
    assert done.returncode == 3, done.stderr
    seen = done.stdout.splitlines()
    assert "NCCL_DEBUG=INFO" in seen and "SPACED=a b=c" in seen
    assert any(line.startswith("NVIDIA_VISIBLE_DEVICES=") for line in seen)
    assert done.stderr == ""


def test_the_short_form_asks_the_same(chandler: Engine, workdir: str, node: Node) -> None:
    made = bundle.make(
        os.path.join(workdir, "b"),
        ["sh", "-c", PROBE + "; env", "sh", node.gpus[0].inside, node.gpus[1].inside],
        {"chandler.oci/resources.gpu.count": "2", "chandler.oci/env.A": "b"},
    )
    seen = chandler.run(made, "c1").stdout.splitlines()
    assert seen[:2] == [f"{gpu.inside} opens" for gpu in node.gpus[:2]]
    assert "A=b" in seen


@pytest.mark.parametrize(
    "asked",
    [
        {"count": 2},
        {"devices": ["0", "1"]},
        {"devices": [uuid(0), uuid(1)]},
        {"devices": ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]},
    ],
    ids=["count", "index", "uuid", "qualified"],
)
def test_granted_devices_open_and_others_do_not(
    chandler: Engine, workdir: str, node: Node, asked: dict[str, object]
) -> None:
    nodes = "".join(f"mknod /dev/made{n} c {gpu.major} {gpu.minor}; " for n, gpu in enumerate(node.gpus))
    paths = [device.inside for device in node.gpus[:2] + node.controls]
    made = make(
        workdir,
        "ls -d /dev/nvidia[0-9]*; " + nodes + PROBE,
        *paths,
        *(f"/dev/made{n}" for n in range(len(node.gpus))),
        resources={"gpu": asked},
    )
    seen = chandler.run(made, "c1").stdout.splitlines()
    assert seen[:2] == [gpu.inside for gpu in node.gpus[:2]]
    assert seen[2:] == (
        [f"{path} opens" for path in paths]
        + [f"/dev/made{n} opens" for n in range(2)]
        + [f"/dev/made{n} Operation not permitted" for n in range(2, len(node.gpus))]
    )


def test_every_device_has_a_node_and_a_cgroup_rule(chandler: Engine, workdir: str, node: Node) -> None:
    """Otherwise a later update, or a reload of systemd, takes the device away."""
    made = make(workdir, "true", resources={"gpu": {"count": 3}})
    chandler.run(made, "c1")
    linux = made.config["linux"]
    devices = {(device["path"], device["major"], device["minor"]) for device in linux["devices"]}
    assert devices == {(device.inside, device.major, device.minor) for device in node.gpus[:3] + node.controls}
    rules = {(rule.get("major"), rule.get("minor")) for rule in linux["resources"]["devices"] if rule["allow"]}
    assert {device[1:] for device in devices} <= rules


@pytest.mark.parametrize("runtime", WITH_LIMITS, indirect=True)
def test_limits_are_read_back_from_the_kernel(chandler: Engine, workdir: str) -> None:
    made = make(workdir, "exec sleep 60", resources={"memory": "256Mi", "pids_limit": 64})
    chandler.create(made, "c1")
    pid = pid_of(made)
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", pid) == 256 << 20
    assert cgroups.limit("pids", "pids.max", "pids.max", pid) == 64


@pytest.mark.parametrize("runtime", WITH_LIMITS, indirect=True)
def test_devices_outlive_an_update(chandler: Engine, workdir: str, node: Node) -> None:
    gpu, other = node.gpus[0], node.gpus[4]
    made = make(workdir, "exec sleep 60", resources={"gpu": {"count": 1}})
    chandler.create(made, "c1")
    chandler.call("start", "c1")
    chandler.wait("c1", "running")
    done = chandler.call("update", "--resources", "-", "c1", input='{"memory": {"limit": 134217728}}', check=False)
    if done.returncode and "youki" in str(chandler.command):
        pytest.skip("this youki does not read an update from its standard input")
    assert done.returncode == 0, done.stderr
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", pid_of(made)) == 134217728
    script = f"mknod /dev/other c {other.major} {other.minor}; " + PROBE
    assert chandler.exec("c1", "sh", "-c", script, "sh", gpu.inside, "/dev/other").stdout.splitlines() == [
        f"{gpu.inside} opens",
        "/dev/other Operation not permitted",
    ]


@WITH_AND_WITHOUT
@pytest.mark.parametrize("script, code", [("exit 0", 0), ("exit 37", 37)])
def test_exit_codes_pass_through(
    chandler: Engine, workdir: str, script: str, code: int, asks: dict[str, object]
) -> None:
    made = make(workdir, script, **asks)
    assert chandler.run(made, "c1", check=False).returncode == code


@WITH_AND_WITHOUT
def test_signals_pass_through(chandler: Engine, workdir: str, asks: dict[str, object]) -> None:
    """A signal to the process that the caller started reaches the container's process."""
    made = make(workdir, 'trap "exit 7" TERM; echo ready; while :; do sleep 0.05; done', **asks)
    chandler.started["c1"] = made
    process = subprocess.Popen(
        chandler.argv("run", "--bundle", made.directory, "c1"),
        env=chandler.env,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # some runtimes forward signals only after the container has started
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 7


@WITH_AND_WITHOUT
def test_preserved_descriptors_reach_the_container(chandler: Engine, workdir: str, asks: dict[str, object]) -> None:
    note = os.path.join(workdir, "note")
    with open(note, "w", encoding="ascii") as file:
        file.write("from outside\n")
    made = make(workdir, "cat <&3", **asks)
    chandler.command = ["sh", "-c", f'exec 3<{note}; exec "$@"', "sh", *chandler.command]
    assert chandler.run(made, "c1", "--preserve-fds", "1").stdout == "from outside\n"


@WITH_AND_WITHOUT
def test_the_console_socket_gets_the_terminal(chandler: Engine, workdir: str, asks: dict[str, object]) -> None:
    made = make(workdir, "test -t 0 && test -t 1 && echo a terminal; exec sleep 60", **asks)
    config = made.config
    config["process"]["terminal"] = True
    made.config = config
    path = os.path.join(workdir, "tty.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        server.settimeout(20)
        chandler.create(made, "c1", "--console-socket", path)
        with server.accept()[0] as connection:
            numbers = array.array("i")
            _, control, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(numbers.itemsize))
    numbers.frombytes(control[0][2][: numbers.itemsize])
    with os.fdopen(numbers[0], "rb", buffering=0) as terminal:
        chandler.call("start", "c1")
        assert terminal.read(100) == b"a terminal\r\n"


@pytest.mark.parametrize("name", ["create", "run", "restore", "delete"])
def test_a_container_can_have_the_name_of_a_verb(chandler: Engine, workdir: str, name: str) -> None:
    made = make(workdir, "exec sleep 60", env={"A": "b"})
    chandler.create(made, name)
    chandler.call("start", name)
    chandler.wait(name, "running")
    assert "A=b" in made.config["process"]["env"]
    chandler.delete(name, "--force")


def test_the_sandbox_is_never_edited(chandler: Engine, workdir: str) -> None:
    annotations = {**bundle.pod(kind="sandbox"), **bundle.request(resources={"gpu": {"count": 2}})}
    made = bundle.make(os.path.join(workdir, "b"), ["ls", "/dev"], annotations)
    before = made.bytes
    assert "nvidia" not in chandler.run(made, "c1").stdout
    assert made.bytes == before


def test_another_container_of_the_pod_is_not_edited(chandler: Engine, workdir: str) -> None:
    wanted = '{"env": {"A": "b"}}'
    for name, expected in (("main", True), ("sidecar", False)):
        made = bundle.make(
            os.path.join(workdir, name), ["env"], {**bundle.pod(name), "chandler.oci/service.main": wanted}
        )
        assert ("A=b" in chandler.run(made, name).stdout.splitlines()) is expected
