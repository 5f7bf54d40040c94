"""The plugin's end of one connection to a runtime: it registers, is configured and synchronised, and answers calls.

    connection = Connection("chandler", "10", service, hung_up)
    connection.open()
    send(connection.take())
    while …:
        connection.receive(data)  # or, at the times of due() and when work of the service has ended,
        connection.tick(now)
        send(connection.take())
        connection.all_sent()     # when nothing is left to send
    connection.close(left)        # bytes that were taken and not sent

Sans-IO.  MuxError, ttrpc's ProtocolError and Refused end the connection.  Any other error is the answer to the call
that caused it: in CreateContainer it refuses the container with our sentence.

When the connection breaks, the runtime creates the container unadjusted.  It does the same when it has waited longer
than the call's timeout.  It then closes the connection, and a create that is still unread in the socket has been given
up long ago (containerd 1.7.24, 2.1.9 and 2.4.2).  Therefore a create is granted only while the runtime waits for it,
and a grant is taken back when its answer did not leave.

Source: NRI, pkg/api/api.proto and pkg/adaptation/plugin.go.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any, Callable

from google.protobuf.message import DecodeError

from shim import report
from shim.errors import ChandlerError, PolicyError, RequestError
from shim.nri import messages, mux
from shim.nri.adjust import Runtime
from shim.nri.holds import PendingCreate
from shim.nri.service import Service
from shim.ttrpc import errors as ttrpc
from shim.ttrpc.client import Client, Reply
from shim.ttrpc.server import Call, Server

MAX_CONTAINERS = 100_000  # containers and pods of one Synchronize, in all its parts

# The states of a connection, in order.
NEW, REGISTERING, CONFIGURED, READY, CLOSING = "new", "registering", "configured", "ready", "closing"

_EVENTS = (
    messages.STOP_POD_SANDBOX,
    messages.CREATE_CONTAINER,
    messages.START_CONTAINER,
    messages.STOP_CONTAINER,
    messages.REMOVE_CONTAINER,
)
_SECOND = 1_000_000_000  # in nanoseconds, the unit of ttrpc's timeouts


class Refused(ChandlerError):
    """The runtime has refused the registration; another attempt with the same options would be refused, too."""


class Connection:
    """One connection, from its registration to its end.

    `hung_up` tells whether the runtime has closed its end, even while there are unread bytes.
    """

    def __init__(self, name: str, index: str, service: Service, hung_up: Callable[[], bool] = lambda: False) -> None:
        self.name = name
        self.index = index
        self.service = service
        self.hung_up = hung_up
        self.state = NEW
        self._deadline = math.inf  # until when the runtime waits for the answer to the call that is being served
        self._taken = 0  # bytes that `take` has given in all
        # Containers with grants whose answers `take` has not given yet; and those whose answers it has given and that
        # may not have been sent, each with the count of bytes taken up to the end of its answer.
        self._granted: list[str] = []
        self._sending: list[tuple[int, str]] = []
        self._mux = mux.MuxDecoder()
        self._server = Server()
        self._client = Client()
        self._pods: dict[str, Any] = {}
        self._containers: list[Any] = []
        self._pending: list[tuple[Call, str, PendingCreate]] = []  # call, container id, answer

    def open(self) -> None:
        """Begins the registration.  The runtime may make calls before it answers."""
        request = messages.RegisterPluginRequest(
            plugin_name=self.name, plugin_idx=self.index, NRI_version=messages.VERSION
        )
        self._client.call(messages.RUNTIME_SERVICE, "RegisterPlugin", request.SerializeToString(), timeout=5 * _SECOND)
        self.state = REGISTERING

    def receive(self, data: bytes, now: float | None = None) -> None:
        """Takes bytes from the socket, and handles the calls and answers that are complete with them.

        `now`: a time (time.monotonic) at which the bytes had arrived.  Raises MuxError, ProtocolError or Refused.
        """
        if now is None:
            now = time.monotonic()
        for connection, piece in self._mux.feed(data):
            if connection == mux.PLUGIN:
                for call in self._server.receive(piece):
                    self._deadline = now + call.timeout / _SECOND if call.timeout > 0 else math.inf
                    self._serve(call)
            elif connection == mux.RUNTIME:
                for reply in self._client.receive(piece):
                    self._replied(reply)
            else:
                raise mux.MuxError(f"the runtime sends on connection {connection}, which neither end opened")

    def take(self) -> bytes:
        """The bytes to send."""
        data = mux.encode(mux.PLUGIN, self._server.take()) + mux.encode(mux.RUNTIME, self._client.take())
        self._taken += len(data)
        if self._granted:
            self._sending += [(self._taken, container) for container in self._granted]
            self._granted.clear()
        return data

    def all_sent(self) -> None:
        """Notes that all bytes from `take` have been sent."""
        self._sending.clear()

    def tick(self, now: float) -> None:
        """Answers the waiting calls whose answers are due.  `now`: time.monotonic."""
        waiting, self._pending = self._pending, []
        for call, container, pending in waiting:
            if pending.due(now):
                self._answer(call, partial(self._created, container, pending.answer))
            else:
                self._pending.append((call, container, pending))

    def due(self) -> list[float]:
        """The times (time.monotonic) at which `tick` has to be called."""
        return [pending.deadline for _, _, pending in self._pending]

    def close(self, left: int = 0) -> None:
        """The connection has ended: takes back the grants whose answers did not leave.

        `left`: how many of the bytes from `take`, counted from the last, have not been sent.
        """
        for _, _, pending in self._pending:
            pending.abandon()
        self._pending.clear()
        lost = self._granted + [container for end, container in self._sending if end > self._taken - left]
        self._granted, self._sending = [], []
        for container in lost:
            self.service.undo(container, "the connection to the runtime ended before the answer had left")

    # --- calls to the runtime -----------------------------------------------------------------------------------

    def _replied(self, reply: Reply) -> None:
        """Handles the answer to the registration, the only call that the plugin makes."""
        try:
            reply.result()
        except ttrpc.RemoteError as error:
            raise Refused(
                f"the runtime refuses the plugin {self.index}-{self.name}: {error.message}",
                "give --name and --idx other values",
            ) from None

    # --- calls from the runtime ---------------------------------------------------------------------------------

    def _serve(self, call: Call) -> None:
        method = _METHODS.get(call.method) if call.service == messages.PLUGIN_SERVICE else None
        if method is None:
            self._server.unimplemented(call)
            return
        kind, handle = method
        self._answer(call, lambda: handle(self, kind.FromString(call.payload), call))

    def _answer(self, call: Call, handle_call: Callable[[], Any]) -> None:
        try:
            response = handle_call()
            if response is not None:  # else `tick` answers
                self._server.answer(call, response.SerializeToString())
        except DecodeError:
            self._server.refuse(call, ttrpc.INVALID_ARGUMENT, f"chandler: the message of {call.method} cannot be read")
        except ChandlerError as error:
            self._server.refuse(call, _code(error), f"chandler: {error}")
        except Exception as error:  # a defect in Chandler fails this call only
            self.service.log(
                {
                    "time": report.now(),
                    "level": "error",
                    "error": f"internal error in {call.method}, {type(error).__name__}: {error}",
                }
            )
            self._server.refuse(
                call, ttrpc.INTERNAL, f"chandler: internal error in {call.method}, {type(error).__name__}: {error}"
            )

    def _configure(self, request: Any, _: Call) -> Any:
        self.service.configure(Runtime(request.runtime_name, request.runtime_version), request.request_timeout / 1000)
        self.state = CONFIGURED
        # A runtime closes the connection when the plugin asks for an event that it does not know.  Runtimes that tell
        # their NRI version know ValidateContainerAdjustment.
        events = _EVENTS + ((messages.VALIDATE_CONTAINER_ADJUSTMENT,) if request.NRI_version else ())
        # `fail_request`: with NRI 0.12.4 and newer, a create that the plugin does not answer in time fails.  Older
        # versions skip the field.  `keep_connected` stays off: otherwise every container of the node would have to wait
        # while the plugin hangs, and the end of the connection would no longer say that a create has been given up.
        return messages.ConfigureResponse(
            events=sum(1 << event - 1 for event in events), failure_policy={"fail_request": True}
        )

    def _synchronize(self, request: Any, _: Call) -> Any:
        """Collects the parts of a Synchronize, and handles them together with the last one."""
        if len(self._containers) + len(request.containers) + len(self._pods) > MAX_CONTAINERS:
            raise ChandlerError(f"the runtime lists more than {MAX_CONTAINERS} containers")
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
        answer = self.service.create(
            request.pod, request.container, lambda: time.monotonic() < deadline and not hung_up()
        )
        if isinstance(answer, PendingCreate):
            self._pending.append((call, request.container.id, answer))
            return None
        return self._created(request.container.id, lambda: answer)

    def _created(self, container: str, answer: Callable[[], Any]) -> Any:
        adjustment = answer()
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
        """Gives up the waiting create of a container that has ended: the runtime no longer waits for its answer."""
        for waiting in [waiting for waiting in self._pending if waiting[1] == container]:
            self._pending.remove(waiting)
            call, _, pending = waiting
            pending.abandon()
            self._server.refuse(
                call, ttrpc.FAILED_PRECONDITION, "chandler: the container was ended before it was created"
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
        """An event that changes nothing here.  Its answer has no fields, or none that must be set."""
        return messages.Empty()


def _code(error: ChandlerError) -> int:
    if isinstance(error, PolicyError):
        return ttrpc.PERMISSION_DENIED
    return ttrpc.INVALID_ARGUMENT if isinstance(error, RequestError) else ttrpc.FAILED_PRECONDITION


_METHODS: dict[str, tuple[Any, Callable[[Connection, Any, Call], Any]]] = {
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
