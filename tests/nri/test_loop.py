"""The plugin as a process, with a socket in the place of a runtime: connections, signals, metrics, systemd."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab.engine import read
from lab.install import Installation
from lab.node import Node
from lab.peer import container, pod
from lab.plugin import Plugin, until

from shim.nri import messages as m
from shim.nri import mux
from shim.ttrpc.client import Client
from shim.ttrpc.server import Server

PATIENCE = 30


class Runtime:
    """A listening NRI socket, and the one connection that it has."""

    def __init__(self, path: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        os.chmod(path, 0o600)
        self.listener.listen()
        self.listener.settimeout(PATIENCE)
        self.channel: socket.socket | None = None

    def accept(self) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel, _ = self.listener.accept()
        self.channel.settimeout(PATIENCE)
        self.client, self.server, self.mux = Client(), Server(), mux.MuxDecoder()

    def handshake(self, refuse: str = "") -> None:
        self.accept()
        registered = False
        while not registered:
            for _, piece in self.mux.feed(self.read()):
                for call in self.server.receive(piece):
                    if refuse:
                        self.server.refuse(call, 2, refuse)
                    else:
                        self.server.answer(call, b"")
                    registered = True
        self.write(mux.encode(mux.RUNTIME, self.server.take()))
        if not refuse:
            self.call("Configure", m.ConfigureRequest(runtime_name="containerd", runtime_version="2.1.9"))
            self.call("Synchronize", m.SynchronizeRequest())

    def read(self) -> bytes:
        assert self.channel is not None
        data = self.channel.recv(1 << 16)
        assert data, "the plugin has closed the connection"
        return data

    def write(self, data: bytes) -> None:
        assert self.channel is not None
        self.channel.sendall(data)

    def call(self, method: str, message: Any) -> bytes:
        self.client.call(m.PLUGIN_SERVICE, method, message.SerializeToString())
        self.write(mux.encode(mux.PLUGIN, self.client.take()))
        while True:
            for _, piece in self.mux.feed(self.read()):
                for reply in self.client.receive(piece):
                    return reply.result()

    def hang_up(self) -> None:
        assert self.channel is not None
        self.channel.close()
        self.channel = None

    def close(self) -> None:
        self.listener.close()
        if self.channel is not None:
            self.channel.close()


class Stage:
    def __init__(self, workdir: str, installation: Installation) -> None:
        self.workdir, self.installation = workdir, installation
        self.path = os.path.join(workdir, "nri.sock")
        self.runtimes: list[Runtime] = []
        self.plugin = Plugin(installation.program("chandler-nri"), os.path.join(workdir, "log"), self.path)

    def runtime(self) -> Runtime:
        if os.path.exists(self.path):
            os.unlink(self.path)
        self.runtimes.append(Runtime(self.path))
        return self.runtimes[-1]

    def start(self, *options: str) -> Plugin:
        self.plugin.command += options
        return self.plugin.start(serving=False)

    def wait_for_log(self, words: str) -> None:
        until(lambda: words in read(self.plugin.log) or self.plugin.ended(), words)


@pytest.fixture
def stage(workdir: str, installation: Installation, node: Node) -> Iterator[Stage]:
    installation.configure(["/usr/sbin/runc"], [node.cdi])
    made = Stage(workdir, installation)
    yield made
    if made.plugin.process is not None:
        made.plugin.stop(signal.SIGKILL)
    for runtime in made.runtimes:
        runtime.close()
    installation.forget()


def test_it_waits_for_the_runtime_and_connects_again(stage: Stage) -> None:
    stage.start()
    stage.wait_for_log("no runtime at")
    runtime = stage.runtime()
    for _ in range(3):
        runtime.handshake()
        runtime.hang_up()
        stage.wait_for_log("the runtime closed the connection")
    runtime.handshake()
    assert stage.plugin.stop() == 0


@pytest.mark.parametrize(
    "data",
    [b"\0\0\0\1\xff\xff\xff\xff", mux.encode(9, b"x"), mux.encode(1, b"\xff" * 10), mux.encode(2, b"\0" * 10)],
    ids=["an oversize frame", "another connection", "an oversize message", "a type that is none"],
)
def test_invalid_bytes_end_the_connection_and_not_the_process(stage: Stage, data: bytes) -> None:
    runtime = stage.runtime()
    stage.start()
    runtime.handshake()
    runtime.write(data)
    assert runtime.channel is not None and runtime.channel.recv(1) == b""
    runtime.handshake()
    assert runtime.call("UpdateContainer", m.Empty()) == b""


def test_an_unread_create_is_dropped_when_the_runtime_hangs_up(stage: Stage) -> None:
    runtime = stage.runtime()
    pid = stage.start().pid
    runtime.handshake()
    os.kill(pid, signal.SIGSTOP)
    until(lambda: read(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] == "T", "a stop")
    asked = {"chandler.oci/service": '{"resources": {"gpu": {"count": 1}}}'}
    runtime.client.call(
        m.PLUGIN_SERVICE,
        "CreateContainer",
        m.CreateContainerRequest(pod=pod(asked), container=container()).SerializeToString(),
    )
    runtime.write(mux.encode(mux.PLUGIN, runtime.client.take()))
    runtime.hang_up()
    os.kill(pid, signal.SIGCONT)
    stage.wait_for_log("no longer waits for the answer to this create")
    runtime.handshake()
    assert stage.installation.leases() == {} and not os.path.exists(
        os.path.join(stage.installation.state, "nri/grants")
    )


def test_a_refused_registration_ends_it_with_the_reason(stage: Stage) -> None:
    runtime = stage.runtime()
    process = stage.start().process
    runtime.handshake(refuse="plugin already registered")
    assert process is not None and process.wait(PATIENCE) == 1
    assert "plugin already registered" in read(stage.plugin.log).splitlines()[-1]
    stage.plugin.process = None


def test_a_socket_that_others_can_write_is_not_trusted(stage: Stage) -> None:
    stage.runtime()
    os.chmod(stage.path, 0o666)
    stage.start()
    stage.wait_for_log("can be written by others")


def test_shutdown_is_answered_and_the_next_runtime_found(stage: Stage) -> None:
    runtime = stage.runtime()
    stage.start()
    runtime.handshake()
    assert runtime.call("Shutdown", m.Empty()) == b""
    runtime.handshake()


def test_a_reload_keeps_the_connection_and_causes_no_further_reload(stage: Stage) -> None:
    address = os.path.join(stage.workdir, "metrics.sock")
    runtime = stage.runtime()
    plugin = stage.start("--metrics", "unix:" + address)
    runtime.handshake()

    def reloads() -> int:
        return int(metrics(address)['chandler_nri_reloads_total{result="done"}'])

    until(lambda: reloads() >= 1, "the first look after the watch")
    before = until(lambda: quiet(reloads), "quiet")
    os.kill(plugin.pid, signal.SIGHUP)
    until(lambda: reloads() == before + 1, "a reload by signal")
    file = os.path.join(stage.installation.etc, "config.toml")
    with open(file, encoding="utf-8") as old, open(file + ".new", "w", encoding="utf-8") as new:
        new.write(old.read() + "[policy]\nmax-gpus = 1\n")
    os.rename(file + ".new", file)
    until(lambda: reloads() == before + 2, "a reload by inotify")
    assert quiet(reloads) == before + 2
    assert runtime.call("UpdateContainer", m.Empty()) == b""
    assert metrics(address)["chandler_nri_connections_total"] == "1"


def quiet(count: Any) -> int:
    """The count, if it stays for a hundred scrapes."""
    first: int = count()
    return first if all(count() == first for _ in range(100)) else 0


def scrape(address: str) -> str:
    family = socket.AF_UNIX if address.startswith("/") else socket.AF_INET
    with socket.socket(family) as channel:
        # With a timeout a full queue would be an error at once.
        channel.connect(address if family == socket.AF_UNIX else ("127.0.0.1", int(address)))
        channel.settimeout(PATIENCE)
        channel.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        text = b""
        while data := channel.recv(1 << 16):
            text += data
    return text.decode()


def metrics(address: str) -> dict[str, str]:
    head, body = scrape(address).split("\r\n\r\n")
    assert head.startswith("HTTP/1.0 200") and f"Content-Length: {len(body)}" in head
    return dict(line.rsplit(" ", 1) for line in body.splitlines() if not line.startswith("#"))


def test_metrics_on_a_port_of_the_loopback(stage: Stage) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    runtime = stage.runtime()
    stage.start("--metrics", "127.0.0.1:" + port)
    runtime.handshake()
    found = metrics(port)
    assert found["chandler_nri_connected"] == "1" and found['chandler_nri_requests_total{result="refused"}'] == "0"
    assert found["chandler_nri_create_seconds_count"] == "0"


def test_a_metrics_socket_is_the_owners_and_goes_with_the_process(stage: Stage) -> None:
    address = os.path.join(stage.workdir, "metrics.sock")
    runtime = stage.runtime()
    stage.start("--metrics", "unix:" + address)
    runtime.handshake()
    assert os.stat(address).st_mode & 0o777 == 0o700
    for _ in range(40):  # scrapers that say nothing
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(address)
        channel.close()
    assert metrics(address)["chandler_nri_connected"] == "1"
    stage.plugin.stop()
    assert not os.path.exists(address)


def test_systemd_is_notified(stage: Stage) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = os.path.join(stage.workdir, "notify")
        manager.bind(path)
        manager.settimeout(PATIENCE)
        runtime = stage.runtime()
        process = subprocess.Popen(
            stage.plugin.command, env={"NOTIFY_SOCKET": path}, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            runtime.handshake()
            until(lambda: manager.recv(4096) == b"READY=1\nSTATUS=serving containerd 2.1.9", "the start")
            process.send_signal(signal.SIGHUP)
            until(lambda: manager.recv(4096) == b"RELOADING=1", "the reload")
            until(lambda: manager.recv(4096) == b"READY=1", "its end")
            process.send_signal(signal.SIGTERM)
            until(lambda: manager.recv(4096) == b"STOPPING=1", "the end")
            assert process.wait(PATIENCE) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def test_a_configuration_that_is_wrong_stops_the_start(stage: Stage) -> None:
    stage.installation.configure(["/usr/sbin/runc"], [], "[policy]\nmax-gpu = 1\n")
    done = subprocess.run(
        stage.plugin.command,
        env={},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "max-gpu" in line and line.startswith("chandler-nri: ")


def test_without_protobuf_it_says_what_to_install(stage: Stage) -> None:
    program = (
        f"import sys; sys.path.insert(0, {stage.installation.prefix + '/lib/chandler'!r})\n"
        "sys.modules['google'] = None\n"
        "from shim.nri.main import main; sys.exit(main())"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", program],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (
        done.returncode == 1
        and done.stderr == "chandler-nri: the Python package protobuf is not installed; install python3-protobuf\n"
    )
