"""The kubelet's side of the APIs for device plugins and DRA drivers: registrations, devices, allocations and claims.

tests/kubernetes has the same with a real kubelet. This one can be killed, restarted and asked in any order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc

from lab.plugin import until
from shim.kubelet import dra
from shim.kubelet import dra_messages as d
from shim.kubelet import messages as m

PATIENCE = 30.0


class Kubelet:
    """Listens in `directory`, as a kubelet does in /var/lib/kubelet/device-plugins."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        self.registered: list[Any] = []  # the requests to register, in order
        self.health: dict[str, dict[str, str]] = {}  # by resource: a device's health by its ID
        self.numa: dict[str, list[int]] = {}  # by device
        self.lists = 0  # how many lists have come
        self._channels: dict[str, grpc.Channel] = {}
        self._server: Any = None

    def start(self) -> Kubelet:
        """As a kubelet that starts, it first removes all sockets of plugins."""
        for name in os.listdir(self.directory):
            os.unlink(os.path.join(self.directory, name))
        handler = grpc.unary_unary_rpc_method_handler(
            self._register, m.RegisterRequest.FromString, m.Empty.SerializeToString
        )
        server = grpc.server(futures.ThreadPoolExecutor(2))
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(m.REGISTRATION_SERVICE, {"Register": handler}),)
        )
        assert server.add_insecure_port(f"unix:{self.directory}/kubelet.sock")
        server.start()
        self._server = server
        return self

    def stop(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self.health.clear()
        if self._server is not None:
            self._server.stop(0).wait()

    def _register(self, request: Any, context: Any) -> Any:
        channel = grpc.insecure_channel(f"unix:{self.directory}/{request.endpoint}")
        watch = channel.unary_stream(
            f"/{m.PLUGIN_SERVICE}/ListAndWatch", m.Empty.SerializeToString, m.ListAndWatchResponse.FromString
        )
        self._channels[request.resource_name] = channel
        threading.Thread(target=self._watch, args=(request.resource_name, watch(m.Empty())), daemon=True).start()
        self.registered.append(request)
        return m.Empty()

    def _watch(self, resource: str, lists: Iterator[Any]) -> None:
        try:
            for each in lists:
                self.numa.update({device.ID: [node.ID for node in device.topology.nodes] for device in each.devices})
                self.health[resource] = {device.ID: device.health for device in each.devices}
                self.lists += 1
        except grpc.RpcError:
            pass  # the plugin has ended, or this kubelet has

    def healthy(self, resource: str) -> list[str]:
        return sorted(name for name, health in self.health.get(resource, {}).items() if health == m.HEALTHY)

    def until_healthy(self, resource: str, names: Sequence[str]) -> None:
        until(lambda: self.healthy(resource) == list(names), f"{resource}: {', '.join(names)}")

    def ask(self, resource: str, method: str, request: Any, response: Any) -> Any:
        call = self._channels[resource].unary_unary(
            f"/{m.PLUGIN_SERVICE}/{method}", type(request).SerializeToString, response.FromString
        )
        return call(request, timeout=PATIENCE, wait_for_ready=True)

    def allocate(self, resource: str, *names: str) -> dict[str, str]:
        """The annotations of a container that gets these devices."""
        request = m.AllocateRequest()
        request.container_requests.add(devices_ids=names)
        (response,) = self.ask(resource, "Allocate", request, m.AllocateResponse).container_responses
        return dict(response.annotations)

    def preferred(self, resource: str, available: Sequence[str], included: Sequence[str], count: int) -> list[str]:
        request = m.PreferredAllocationRequest()
        request.container_requests.add(
            available_deviceIDs=available, must_include_deviceIDs=included, allocation_size=count
        )
        response = self.ask(resource, "GetPreferredAllocation", request, m.PreferredAllocationResponse)
        return list(response.container_responses[0].deviceIDs)


class ClaimingKubelet:
    """The kubelet's side of the DRA API, for the driver at a socket in `directory`."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(directory, exist_ok=True)
        self.path = os.path.join(directory, dra.SOCKET)

    def _call(self, service: str, method: str, request: Any, response: Any) -> Any:
        with grpc.insecure_channel("unix:" + self.path) as channel:
            call = channel.unary_unary(f"/{service}/{method}", type(request).SerializeToString, response.FromString)
            return call(request, timeout=PATIENCE, wait_for_ready=True)

    def register(self) -> Any:
        """What the driver says of itself."""
        until(lambda: os.path.exists(self.path), "the driver's socket")
        info = self._call(d.REGISTRATION_SERVICE, "GetInfo", d.InfoRequest(), d.PluginInfo)
        status = d.RegistrationStatus(plugin_registered=True)
        self._call(d.REGISTRATION_SERVICE, "NotifyRegistrationStatus", status, d.RegistrationStatusResponse)
        return info

    def prepare(self, name: str, uid: str) -> Any:
        """The answer for a claim of the namespace `team`: devices, or an error."""
        request = d.NodePrepareResourcesRequest(claims=[d.Claim(namespace="team", name=name, uid=uid)])
        answer = self._call(d.DRA_SERVICE, "NodePrepareResources", request, d.NodePrepareResourcesResponse)
        assert list(answer.claims) == [uid]
        return answer.claims[uid]

    def unprepare(self, name: str, uid: str) -> str:
        """The error; '' where there is none."""
        request = d.NodeUnprepareResourcesRequest(claims=[d.Claim(namespace="team", name=name, uid=uid)])
        answer = self._call(d.DRA_SERVICE, "NodeUnprepareResources", request, d.NodeUnprepareResourcesResponse)
        error: str = answer.claims[uid].error
        return error
