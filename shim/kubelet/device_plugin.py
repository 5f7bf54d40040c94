"""One resource of the kubelet: a gRPC server that lists its devices and answers the kubelet's allocations.

The kubelet finds the server by its socket, after `register` has named it.  Calls are served by threads of the server;
the process's own thread calls `update`.
Source: Kubernetes, "Device Plugins"; staging/src/k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import grpc

from shim.errors import ChandlerError, HostError
from shim.kubelet import messages as m
from shim.kubelet import sockets
from shim.kubelet.devices import Device

KUBELET = "kubelet.sock"  # the kubelet's own socket, in the same directory
_THREADS = 8  # one for each ListAndWatch, of which the kubelet has one, and for calls beside it
_PATIENCE = 5.0  # seconds for a call of the kubelet

Allocate = Callable[[Sequence[str]], "dict[str, str]"]
Prefer = Callable[[Sequence[str], Sequence[str], int], "list[str]"]


class DevicePlugin:
    """The server of one resource.

    `directory`: the kubelet's directory of sockets; `endpoint`: the name of this server's socket in it.
    `allocate`: the annotations for a container that gets these devices; raises ChandlerError.
    `prefer`: from the available devices, those that must be included and a number, the devices that fit best.
    """

    def __init__(self, resource: str, directory: str, endpoint: str, allocate: Allocate, prefer: Prefer) -> None:
        self.resource = resource
        self.path = os.path.join(directory, endpoint)
        self._kubelet = os.path.join(directory, KUBELET)
        self._endpoint = endpoint
        self._allocate = allocate
        self._prefer = prefer
        self._devices: list[Device] = []
        self._changed = threading.Condition()
        self._version = 0  # of the list of devices
        self._server: Any = None

    def start(self) -> None:
        """Serves.  Raises HostError where the socket cannot be made."""
        self._server = sockets.listen(self.path, {m.PLUGIN_SERVICE: self._methods()}, _THREADS)

    def register(self) -> None:
        """Tells the kubelet of this resource.  Raises HostError."""
        request = m.RegisterRequest(
            version=m.VERSION,
            endpoint=self._endpoint,
            resource_name=self.resource,
            options=m.DevicePluginOptions(get_preferred_allocation_available=True),
        )
        with grpc.insecure_channel("unix:" + self._kubelet) as channel:
            call = channel.unary_unary(
                f"/{m.REGISTRATION_SERVICE}/Register",
                request_serializer=m.RegisterRequest.SerializeToString,
                response_deserializer=m.Empty.FromString,
            )
            try:
                call(request, timeout=_PATIENCE)
            except grpc.RpcError as error:
                raise HostError(
                    f"the kubelet at {self._kubelet} does not take {self.resource}: {error.details()}"
                ) from None

    def update(self, devices: list[Device]) -> list[tuple[Device, Device | None]]:
        """Replaces the list of devices; a list that differs is sent to the kubelet.

        Gives each device that is new or has changed, with what it was before.
        """
        with self._changed:
            before = {device.name: device for device in self._devices}
            changes = [(device, before.get(device.name)) for device in devices if before.get(device.name) != device]
            if devices != self._devices:
                self._devices = devices
                self._version += 1
                self._changed.notify_all()
        return changes

    def stop(self) -> None:
        """Ends the server and all its calls; its socket goes with it."""
        server, self._server = self._server, None
        if server is not None:
            with self._changed:
                self._version += 1
                self._changed.notify_all()
            server.stop(0).wait()

    # --- the kubelet's calls --------------------------------------------------------------------------------------

    def _methods(self) -> dict[str, Any]:
        return {
            "GetDevicePluginOptions": sockets.unary(self._options, m.Empty, m.DevicePluginOptions),
            "ListAndWatch": grpc.unary_stream_rpc_method_handler(
                self._list_and_watch, m.Empty.FromString, m.ListAndWatchResponse.SerializeToString
            ),
            "GetPreferredAllocation": sockets.unary(
                self._preferred, m.PreferredAllocationRequest, m.PreferredAllocationResponse
            ),
            "Allocate": sockets.unary(self._allocated, m.AllocateRequest, m.AllocateResponse),
            "PreStartContainer": sockets.unary(self._started, m.PreStartContainerRequest, m.PreStartContainerResponse),
        }

    def _options(self, request: Any, context: Any) -> Any:
        return m.DevicePluginOptions(get_preferred_allocation_available=True)

    def _started(self, request: Any, context: Any) -> Any:
        return m.PreStartContainerResponse()  # never called: the options do not ask for it

    def _list_and_watch(self, request: Any, context: Any) -> Iterator[Any]:
        """Sends the devices now, and after each change until the kubelet or this server ends the call."""

        def ended() -> None:
            with self._changed:
                self._changed.notify_all()

        sent = -1
        if not context.add_callback(ended):
            return
        while True:
            with self._changed:
                while self._version == sent and context.is_active():
                    self._changed.wait()
                if not context.is_active() or self._server is None:
                    return
                sent, devices = self._version, self._devices
            yield m.ListAndWatchResponse(devices=[_device(device) for device in devices])

    def _preferred(self, request: Any, context: Any) -> Any:
        response = m.PreferredAllocationResponse()
        for each in request.container_requests:
            chosen = self._prefer(each.available_deviceIDs, each.must_include_deviceIDs, each.allocation_size)
            response.container_responses.add(deviceIDs=chosen)
        return response

    def _allocated(self, request: Any, context: Any) -> Any:
        response = m.AllocateResponse()
        try:
            for each in request.container_requests:
                response.container_responses.add(annotations=self._allocate(each.devices_ids))
        except ChandlerError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return response


def _device(device: Device) -> Any:
    message = m.Device(ID=device.name, health=m.UNHEALTHY if device.problem else m.HEALTHY)
    if device.numa is not None:
        message.topology.nodes.add(ID=device.numa)
    return message
