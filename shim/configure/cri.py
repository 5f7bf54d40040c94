"""A pod through the CRI of containerd or CRI-O, the way the kubelet starts one.

Source of the fields' numbers: k8s.io/cri-api, runtime/v1/api.proto.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Dict, List, Tuple, Union

from shim.configure import grpc
from shim.errors import HostError

PATIENCE = 120.0  # seconds for one call: a sandbox's image may have to be fetched
STARTING = 20.0  # seconds for an engine that was just started
TRIES = 3
ENDING = 2.0  # seconds in which a pod that somebody ends is seen to end
_RUNTIME, _IMAGES = "/runtime.v1.RuntimeService/", "/runtime.v1.ImageService/"
_UNAVAILABLE, _UNIMPLEMENTED, _UNKNOWN = 14, 12, 2
_NODE, _POD, _CONTAINER = 2, 0, 1  # namespaces: the node's network, so that no network plugin is needed

Answered = Dict[int, List[Union[int, bytes]]]


class Refused(Exception):
    """An error status: its number, and the words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Ended(Refused):
    """Somebody has ended our pod, as a kubelet does with those that it does not know."""


def ask(engine: str, handler: str, address: str, annotation: Tuple[str, str], mounts: List[Tuple[str, str]], variable: str) -> str:
    """What a container of the handler, in a pod with the annotation, has in a variable; "" when it has none.

    Raises HostError, with the engine's own words.
    """
    path = address.replace("unix://", "", 1)
    try:
        image = _image(engine, path)
        for _ in range(TRIES - 1):
            try:
                return _pod(path, handler, image, annotation, mounts, variable)
            except Ended:
                pass
        return _pod(path, handler, image, annotation, mounts, variable)
    except Refused as error:
        raise HostError(f"{engine} refused the pod: {' '.join(str(error).split())[-900:]}",
                        f"does {engine} know its new configuration (--restart)?") from None
    except (OSError, grpc.Broken) as error:
        raise HostError(f"{engine} does not answer at {path}: {error}", f"start {engine}, or name its socket with --address") from None


def _image(engine: str, path: str) -> str:
    """Some image that the engine has: all that runs in it is the host's."""
    until = time.monotonic() + STARTING
    while True:
        try:
            images = _call(path, _IMAGES + "ListImages", []).get(1, [])
            break
        except (OSError, grpc.Broken):
            if time.monotonic() > until:
                raise
        except Refused as error:  # it is about to start: the socket is there before the service
            if error.status not in (_UNAVAILABLE, _UNIMPLEMENTED, _UNKNOWN) or time.monotonic() > until:
                raise
        time.sleep(0.1)
    for image in images:
        if isinstance(image, bytes):
            return _text(grpc.decode(image), 1)
    raise HostError(f"{engine} has no image, and none is fetched for this", "pull one, or start a pod, and verify again")


def _pod(path: str, handler: str, image: str, annotation: Tuple[str, str], mounts: List[Tuple[str, str]], variable: str) -> str:
    name = f"chandler-verify-{os.urandom(8).hex()}"
    namespaces: List[grpc.Field] = [(1, _NODE), (2, _CONTAINER), (3, _POD)]
    pod: List[grpc.Field] = [(1, [(1, name), (2, name), (3, "chandler-verify")]), (7, [(1, annotation[0]), (2, annotation[1])]),
                             (8, [(2, [(1, namespaces)])])]
    sandbox = _text(_call(path, _RUNTIME + "RunPodSandbox", [(1, pod), (2, handler)]), 1)
    try:
        container: List[grpc.Field] = [(1, [(1, "verify")]), (2, [(1, image)])]
        container += [(3, word) for word in ("/bin/sh", "-c", "exec sleep 120")]
        for inside, outside in mounts:
            container.append((7, [(1, inside), (2, outside), (3, 1)]))
        container.append((15, [(2, [(3, namespaces), (5, [])])]))  # as uid 0, whoever the image's user is
        made = _text(_call(path, _RUNTIME + "CreateContainer", [(1, sandbox), (2, container), (3, pod)]), 1)
        _call(path, _RUNTIME + "StartContainer", [(1, made)])
        said = _call(path, _RUNTIME + "ExecSync", [(1, made), *((2, word) for word in ("/bin/sh", "-c", "cat /proc/1/environ")), (3, 20)])
        return next((entry.partition("=")[2] for entry in _text(said, 1).split("\0") if entry.startswith(variable + "=")), "")
    except Refused as error:
        raise Ended(error.status, str(error)) if _ended(path, sandbox) else error from None
    finally:
        _remove(path, sandbox)


def _ended(path: str, sandbox: str) -> bool:
    """Whether the sandbox is not ours to use any more, or is about to be no more."""
    until = time.monotonic() + ENDING
    while time.monotonic() < until:
        try:
            status = _call(path, _RUNTIME + "PodSandboxStatus", [(1, sandbox)]).get(1, [b""])[0]
            if isinstance(status, int) or grpc.decode(status).get(3, [0])[0]:  # ready is 0
                return True
        except Refused:
            return True
        time.sleep(0.1)
    return False


def _remove(path: str, sandbox: str) -> None:
    """The pod ended; when somebody else is about to end it, too, that may take more than one call."""
    until = time.monotonic() + STARTING
    while True:
        try:
            _call(path, _RUNTIME + "StopPodSandbox", [(1, sandbox)])
            _call(path, _RUNTIME + "RemovePodSandbox", [(1, sandbox)])
            return
        except (Refused, OSError, grpc.Broken) as error:
            if not isinstance(error, Refused) or time.monotonic() > until:
                return  # what is wrong is said already
        time.sleep(0.1)


def _text(answer: Answered, number: int) -> str:
    value = answer.get(number, [b""])[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""


def _call(path: str, method: str, fields: List[grpc.Field]) -> Answered:
    """One call on a connection of its own.  Raises Refused, Broken or OSError."""
    answer = grpc.Answer()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(path)
        connection.sendall(grpc.request(method, grpc.encode(fields)))
        while not answer.done:
            data = connection.recv(1 << 16)
            if not data:
                raise grpc.Broken("the connection ended")
            connection.sendall(answer.feed(data))
    if answer.status:
        raise Refused(answer.status, answer.words or f"status {answer.status}")
    return grpc.decode(answer.message())
