"""gRPC servers at Unix sockets, which the kubelet calls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent import futures
from typing import Any, Callable

import grpc

from shim.errors import HostError


def listen(path: str, services: Mapping[str, Mapping[str, Any]], threads: int) -> Any:
    """A server with the methods of some services, which has started.  Raises HostError."""
    try:
        os.unlink(path)  # left by a process that was killed
    except FileNotFoundError:
        pass
    except OSError as error:
        raise HostError(f"{path} cannot be replaced: {error.strerror}") from None
    server = grpc.server(futures.ThreadPoolExecutor(threads, thread_name_prefix="kubelet"))
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in services.items())
    )
    try:
        bound = server.add_insecure_port("unix:" + path)
    except RuntimeError:  # grpcio before 1.60 gives 0
        bound = 0
    if not bound:
        raise HostError(f"{path} cannot be listened on", "see that its directory is there and can be written")
    server.start()
    return server


def unary(method: Callable[[Any, Any], Any], request: Any, response: Any) -> Any:
    """A method that takes one message and gives one."""
    return grpc.unary_unary_rpc_method_handler(method, request.FromString, response.SerializeToString)


def status(path: str) -> tuple[int, ...] | None:
    """What changes when a file or socket is replaced or written; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_ctime_ns
