"""The plugin's end of one connection to a runtime: registered, configured, synchronised, then called.

    connection = Connection("chandler", "10", service, hung_up)
    connection.open()
    send(connection.take())
    while …:
        connection.receive(data)  # or, when it is time (due), or the service's work has ended,
        connection.tick(now)
        send(connection.take())
        connection.all_sent()     # when nothing is left to send
    connection.close(left)        # bytes that were taken and not sent

Sans-IO.  Fatal for the connection is MuxError, ttrpc's ProtocolError and Refused; everything that is wrong with one
call is the answer to that call.  An error in CreateContainer refuses the container with our sentence; a connection
that breaks lets it be created unadjusted.  So does a runtime that has waited longer than the call's timeout: it closes
the connection, and what lies unread in the socket then is a create that is long past (containerd 1.7.24, 2.1.9 and
2.4.2).  Therefore a create is granted only while the runtime waits for it, and a grant whose answer did not leave is
taken back.  Source: NRI, pkg/api/api.proto and pkg/adaptation/plugin.go.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Tuple

from google.protobuf.message import DecodeError

from shim.errors import ChandlerError, PolicyError, RequestError
from shim.nri import messages, mux
from shim.nri.adjust import Runtime
from shim.nri.holds import Later
from shim.nri.service import Service
from shim.ttrpc import errors as ttrpc
from shim.ttrpc.client import Client, Reply
from shim.ttrpc.server import Call, Server

MAX_CONTAINERS = 100_000  # of one Synchronize, in all its parts

# What the connection has reached, in order.
NEW, REGISTERING, CONFIGURED, READY, CLOSING = "new", "registering", "configured", "ready", "closing"

_EVENTS = (
    messages.STOP_POD_SANDBOX,
    messages.CREATE_CONTAINER,
    messages.START_CONTAINER,
    messages.STOP_CONTAINER,
    messages.REMOVE_CONTAINER,
)
_SECONDS = 1_000_000_000  # in ttrpc's nanoseconds


class Refused(ChandlerError):
    """The runtime does not want this plugin; trying again as it is would come to the same."""


class Connection:
    """One socket's life.  `hung_up` tells whether the runtime has closed its end, unread bytes or not."""

    def __init__(self, name: str, index: str, service: Service, hung_up: Callable[[], bool] = lambda: False) -> None:
        self.name = name
        self.index = index
        self.service = service
        self.hung_up = hung_up
        self.state = NEW
        self._deadline = math.inf  # of the call that is being served: until when the runtime waits for its answer
        self._taken = 0  # bytes
        self._granted: List[str] = []  # containers whose answers have not been taken
        self._sending: List[
            Tuple[int, str]
        ] = []  # containers whose answers have, with the bytes taken up to their ends
        self._mux = mux.MuxDecoder()
        self._server = Server()
        self._client = Client()
        self._pods: Dict[str, Any] = {}
        self._containers: List[Any] = []
        self._later: List[Tuple[Call, str, Later]] = []  # with the container

    def open(self) -> None:
        """Registers.  The runtime may call before it answers."""
        request = messages.RegisterPluginRequest(
            plugin_name=self.name, plugin_idx=self.index, NRI_version=messages.VERSION
        )
        self._client.call(messages.RUNTIME_SERVICE, "RegisterPlugin", request.SerializeToString(), timeout=5 * _SECONDS)
        self.state = REGISTERING

    def receive(self, data: bytes, now: Optional[float] = None) -> None:
        """Takes bytes from the socket and does what they say.  `now`: a time (time.monotonic) at which they were there.

        Raises MuxError, ProtocolError or Refused.
        """
        if now is None:
            now = time.monotonic()
        for connection, piece in self._mux.feed(data):
            if connection == mux.PLUGIN:
                for call in self._server.receive(piece):
                    self._deadline = now + call.timeout / _SECONDS if call.timeout > 0 else math.inf
                    self._serve(call)
            elif connection == mux.RUNTIME:
                for reply in self._client.receive(piece):
                    self._replied(reply)
            else:
                raise mux.MuxError(f"the runtime sends on connection {connection}, which nobody opened")

    def take(self) -> bytes:
        """What is to be sent."""
        data = mux.encode(mux.PLUGIN, self._server.take()) + mux.encode(mux.RUNTIME, self._client.take())
        self._taken += len(data)
        if self._granted:
            self._sending += [(self._taken, container) for container in self._granted]
            self._granted.clear()
        return data

    def all_sent(self) -> None:
        """All that was taken has left."""
        self._sending.clear()

    def tick(self, now: float) -> None:
        """Answers the calls whose answer had to wait, as far as it is there.  `now`: time.monotonic."""
        waiting, self._later = self._later, []
        for call, container, later in waiting:
            if later.due(now):
                self._answer(call, partial(self._created, container, later.answer))
            else:
                self._later.append((call, container, later))

    def due(self) -> List[float]:
        """When `tick` is to be called at the latest."""
        return [later.deadline for _, _, later in self._later]

    def close(self, left: int = 0) -> None:
        """Nobody waits for answers any more.  `left`: the last bytes of those taken that have not been sent."""
        for _, _, later in self._later:
            later.abandon()
        self._later.clear()
        lost = self._granted + [container for end, container in self._sending if end > self._taken - left]
        self._granted, self._sending = [], []
        for container in lost:
            self.service.undo(container, "the connection to the runtime ended before the answer had left")

    # --- we called ----------------------------------------------------------------------------------------------

    def _replied(self, reply: Reply) -> None:
        """The only call of ours is the registration."""
        try:
            reply.result()
        except ttrpc.RemoteError as error:
            raise Refused(
                f"the runtime refuses the plugin {self.index}-{self.name}: {error.message}",
                "give --name and --idx other values",
            ) from None

    # --- we are called ------------------------------------------------------------------------------------------

    def _serve(self, call: Call) -> None:
        known = _METHODS.get(call.method) if call.service == messages.PLUGIN_SERVICE else None
        if known is None:
            self._server.unimplemented(call)
            return
        kind, handle = known
        self._answer(call, lambda: handle(self, kind.FromString(call.payload), call))

    def _answer(self, call: Call, make: Callable[[], Any]) -> None:
        try:
            made = make()
            if made is not None:  # else it comes later
                self._server.answer(call, made.SerializeToString())
        except DecodeError:
            self._server.refuse(call, ttrpc.INVALID_ARGUMENT, f"chandler: the message of {call.method} cannot be read")
        except ChandlerError as error:
            self._server.refuse(call, _code(error), f"chandler: {error}")
        except Exception as error:  # a defect of ours: this call fails, the plugin stays
            self.service.log(
                {"level": "error", "error": f"internal error in {call.method}, {type(error).__name__}: {error}"}
            )
            self._server.refuse(
                call, ttrpc.INTERNAL, f"chandler: internal error in {call.method}, {type(error).__name__}: {error}"
            )

    def _configure(self, request: Any, _: Call) -> Any:
        self.service.configure(Runtime(request.runtime_name, request.runtime_version), request.request_timeout / 1000)
        self.state = CONFIGURED
        # A runtime closes the connection when it sees an event that it does not know; those that tell their
        # NRI version know this one.
        events = _EVENTS + ((messages.VALIDATE_CONTAINER_ADJUSTMENT,) if request.NRI_version else ())
        # A create that we do not answer in time fails, with NRI 0.12.4 and newer; an older one skips the field.
        # `keep_connected` stays off: every container of the node would wait while we hang, and the connection's end
        # would no longer say that a create is past.
        return messages.ConfigureResponse(
            events=sum(1 << event - 1 for event in events), failure_policy={"fail_request": True}
        )

    def _synchronize(self, request: Any, _: Call) -> Any:
        """May come in parts; only the last one tells all."""
        if len(self._containers) + len(request.containers) + len(self._pods) > MAX_CONTAINERS:
            raise ChandlerError(f"the runtime tells of more than {MAX_CONTAINERS} containers")
        self._pods.update((pod.id, pod) for pod in request.pods)
        self._containers.extend(request.containers)
        if request.more:
            return messages.SynchronizeResponse(more=True)
        pods, containers = self._pods, self._containers
        self._pods, self._containers = {}, []
        self.state = READY
        self.service.synchronize(pods, containers)
        return messages.SynchronizeResponse()

    def _create(self, request: Any, call: Call) -> Any:
        deadline, hung_up = self._deadline, self.hung_up
        made = self.service.create(
            request.pod, request.container, lambda: time.monotonic() < deadline and not hung_up()
        )
        if isinstance(made, Later):
            self._later.append((call, request.container.id, made))
            return None
        return self._created(request.container.id, lambda: made)

    def _created(self, container: str, make: Callable[[], Any]) -> Any:
        adjustment = make()
        if adjustment is None:
            return messages.CreateContainerResponse()
        self._granted.append(container)
        return messages.CreateContainerResponse(adjust=adjustment)

    def _start(self, request: Any, _: Call) -> Any:
        self.service.start(request.pod, request.container)
        return messages.Empty()

    def _stop(self, request: Any, _: Call) -> Any:
        self._abandon(request.container.id)
        self.service.stop(request.container.id, request.container.pid)
        return messages.StopContainerResponse()

    def _remove(self, request: Any, _: Call) -> Any:
        self._abandon(request.container.id)
        self.service.remove(request.container.id)
        return messages.Empty()

    def _abandon(self, container: str) -> None:
        """A container that ends before its create has been answered: the runtime has given that create up."""
        for each in [each for each in self._later if each[1] == container]:
            self._later.remove(each)
            each[2].abandon()
            self._server.refuse(
                each[0], ttrpc.FAILED_PRECONDITION, "chandler: the container was ended before it was created"
            )

    def _changed(self, event: Any, call: Call) -> Any:
        if event.event == messages.START_CONTAINER:
            self.service.start(event.pod, event.container)
        elif event.event == messages.REMOVE_CONTAINER:
            self._remove(event, call)
        elif event.event == messages.STOP_POD_SANDBOX:
            self.service.end_pod(event.pod.id)
        return messages.Empty()

    def _end_pod(self, request: Any, _: Call) -> Any:
        self.service.end_pod(request.pod.id)
        return messages.Empty()

    def _validate(self, request: Any, _: Call) -> Any:
        reason = self.service.validate(request.container, request.adjust)
        return messages.ValidateContainerAdjustmentResponse(reject=bool(reason), reason=reason)

    def _shut_down(self, _: Any, __: Call) -> Any:
        self.state = CLOSING
        return messages.Empty()

    def _nothing(self, _: Any, __: Call) -> Any:
        """An event that changes nothing for us, with an answer that has no fields, or none that must be set."""
        return messages.Empty()


def _code(error: ChandlerError) -> int:
    if isinstance(error, PolicyError):
        return ttrpc.PERMISSION_DENIED
    return ttrpc.INVALID_ARGUMENT if isinstance(error, RequestError) else ttrpc.FAILED_PRECONDITION


_METHODS: Dict[str, Tuple[Any, Callable[[Connection, Any, Call], Any]]] = {
    "Configure": (messages.ConfigureRequest, Connection._configure),
    "Synchronize": (messages.SynchronizeRequest, Connection._synchronize),
    "Shutdown": (messages.Empty, Connection._shut_down),
    "StopPodSandbox": (messages.StopPodSandboxRequest, Connection._end_pod),
    "CreateContainer": (messages.CreateContainerRequest, Connection._create),
    "StartContainer": (messages.StartContainerRequest, Connection._start),
    "StopContainer": (messages.StopContainerRequest, Connection._stop),
    "RemoveContainer": (messages.RemoveContainerRequest, Connection._remove),
    "StateChange": (messages.StateChangeEvent, Connection._changed),
    "ValidateContainerAdjustment": (messages.ValidateContainerAdjustmentRequest, Connection._validate),
    **{
        method: (messages.Empty, Connection._nothing)
        for method in (
            "RunPodSandbox",
            "UpdatePodSandbox",
            "PostUpdatePodSandbox",
            "RemovePodSandbox",
            "PostCreateContainer",
            "PostStartContainer",
            "UpdateContainer",
            "PostUpdateContainer",
        )
    },
}
