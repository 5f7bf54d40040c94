"""The runtime's end of an NRI connection, in memory: it can do what containerd does, and break the protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shim.nri import messages as m
from shim.nri import mux
from shim.nri.plugin import Connection
from shim.ttrpc.client import Client, Reply
from shim.ttrpc.server import Server


def pod(annotations: Mapping[str, str] | None = None, name: str = "trainer-0", id: str = "pod-1") -> Any:
    return m.PodSandbox(id=id, name=name, uid=name + "-uid", namespace="default", annotations=annotations)


def container(
    annotations: Mapping[str, str] | None = None,
    name: str = "main",
    id: str = "container-1",
    pod_id: str = "pod-1",
    state: int = 0,
    env: tuple[str, ...] = ("PATH=/bin",),
) -> Any:
    """A container as containerd 1.7 and 2.1 describe it: without a user."""
    made = m.Container(
        id=id, pod_sandbox_id=pod_id, name=name, annotations=annotations, args=["sleep", "9"], env=env, state=state
    )
    made.mounts.add(destination="/proc", type="proc", source="proc", options=["nosuid"])
    for kind in ("pid", "ipc", "uts", "mount", "network"):
        made.linux.namespaces.add(type=kind)
    made.linux.cgroups_path = "/kubepods/" + id
    return made


class Peer:
    """`send` and `call` move all pending bytes, in pieces of `size` if that is given."""

    def __init__(self, connection: Connection, size: int = 0) -> None:
        self.connection = connection
        self.size = size
        self.client = Client()
        self.server = Server()
        self.mux = mux.MuxDecoder()
        self.replies: dict[int, Reply] = {}
        self.registered: list[Any] = []
        self.refusal = ""
        self.sent = 0

    def handshake(
        self,
        name: str = "containerd",
        version: str = "2.1.9",
        nri: str = "",
        pods: tuple[Any, ...] = (),
        containers: tuple[Any, ...] = (),
    ) -> Any:
        """Everything up to Synchronize; returns the answer to Configure."""
        self.connection.open()
        self.exchange()
        configured = m.ConfigureResponse.FromString(
            self.call("Configure", m.ConfigureRequest(runtime_name=name, runtime_version=version, NRI_version=nri))
        )
        self.call("Synchronize", m.SynchronizeRequest(pods=pods, containers=containers))
        return configured

    def call(self, method: str, message: Any, service: str = m.PLUGIN_SERVICE) -> bytes:
        """The payload of the answer. Raises RemoteError."""
        stream = self.client.call(
            service, method, message if isinstance(message, bytes) else message.SerializeToString()
        )
        self.exchange()
        return self.replies.pop(stream).result()

    def create(self, pod: Any, container: Any) -> Any:
        """The adjustment; one without a field when there is none."""
        return m.CreateContainerResponse.FromString(
            self.call("CreateContainer", m.CreateContainerRequest(pod=pod, container=container))
        ).adjust

    def exchange(self) -> None:
        while True:
            out = mux.encode(mux.PLUGIN, self.client.take()) + mux.encode(mux.RUNTIME, self.server.take())
            for at in range(0, len(out), self.size or len(out) or 1):
                self.connection.receive(out[at : at + (self.size or len(out))])
            data = self.connection.take()
            if not data and not out:
                return
            self.sent += len(data)
            for number, piece in self.mux.feed(data):
                if number == mux.PLUGIN:
                    self.replies.update((reply.stream, reply) for reply in self.client.receive(piece))
                else:
                    self.serve(piece)

    def serve(self, piece: bytes) -> None:
        for call in self.server.receive(piece):
            assert call.service == m.RUNTIME_SERVICE
            if self.refusal:
                self.server.refuse(call, 2, self.refusal)
            else:
                assert call.method == "RegisterPlugin"
                self.registered.append(m.RegisterPluginRequest.FromString(call.payload))
                self.server.answer(call, b"")
