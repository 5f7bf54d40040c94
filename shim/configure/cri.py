"""Starts a pod through the CRI of containerd or CRI-O, as the kubelet does.

Only `chandler configure --verify` uses this module.  It needs grpcio and protobuf.
Source of the field numbers: k8s.io/cri-api, runtime/v1/api.proto.
"""

from __future__ import annotations

import os
import time
from typing import Any

from shim.errors import HostError

PATIENCE = 120.0  # seconds for one call: the engine may have to pull the sandbox's image
STARTING = 20.0  # seconds for an engine that was just started
TRIES = 3  # pods to start, since another program may stop one (Ended)
ENDING = 2.0  # seconds in which a pod ends that another program, such as the kubelet, has begun to stop
# NamespaceMode.  The pod uses the node's network, so it needs no network plugin.
_NODE, _POD, _CONTAINER = 2, 0, 1
_READY = 0  # SANDBOX_READY

# Message: {field: (number, type)}; *Type is a repeated field, {Type} a map from strings.
TABLE: dict[str, dict[str, tuple[int, str]]] = {
    "ListImagesRequest": {},
    "ListImagesResponse": {"images": (1, "*Image")},
    "Image": {"id": (1, "string")},
    "ImageSpec": {"image": (1, "string")},
    "RunPodSandboxRequest": {"config": (1, "PodSandboxConfig"), "runtime_handler": (2, "string")},
    "RunPodSandboxResponse": {"pod_sandbox_id": (1, "string")},
    "PodSandboxConfig": {
        "metadata": (1, "PodSandboxMetadata"),
        "annotations": (7, "{string}"),
        "linux": (8, "LinuxPodSandboxConfig"),
    },
    "PodSandboxMetadata": {"name": (1, "string"), "uid": (2, "string"), "namespace": (3, "string")},
    "LinuxPodSandboxConfig": {"security_context": (2, "LinuxSandboxSecurityContext")},
    "LinuxSandboxSecurityContext": {"namespace_options": (1, "NamespaceOption")},
    "NamespaceOption": {"network": (1, "int32"), "pid": (2, "int32"), "ipc": (3, "int32")},
    "PodSandboxStatusRequest": {"pod_sandbox_id": (1, "string")},
    "PodSandboxStatusResponse": {"status": (1, "PodSandboxStatus")},
    "PodSandboxStatus": {"state": (3, "int32")},
    "StopPodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "StopPodSandboxResponse": {},
    "RemovePodSandboxRequest": {"pod_sandbox_id": (1, "string")},
    "RemovePodSandboxResponse": {},
    "CreateContainerRequest": {
        "pod_sandbox_id": (1, "string"),
        "config": (2, "ContainerConfig"),
        "sandbox_config": (3, "PodSandboxConfig"),
    },
    "CreateContainerResponse": {"container_id": (1, "string")},
    "ContainerConfig": {
        "metadata": (1, "ContainerMetadata"),
        "image": (2, "ImageSpec"),
        "command": (3, "*string"),
        "mounts": (7, "*Mount"),
        "linux": (15, "LinuxContainerConfig"),
    },
    "ContainerMetadata": {"name": (1, "string")},
    "Mount": {"container_path": (1, "string"), "host_path": (2, "string"), "readonly": (3, "bool")},
    "LinuxContainerConfig": {"security_context": (2, "LinuxContainerSecurityContext")},
    "LinuxContainerSecurityContext": {"namespace_options": (3, "NamespaceOption"), "run_as_user": (5, "Int64Value")},
    "Int64Value": {"value": (1, "int64")},
    "StartContainerRequest": {"container_id": (1, "string")},
    "StartContainerResponse": {},
    "ExecSyncRequest": {"container_id": (1, "string"), "cmd": (2, "*string"), "timeout": (3, "int64")},
    "ExecSyncResponse": {"stdout": (1, "bytes")},
}


class Ended(Exception):
    """Another program stopped our pod, as a kubelet does with pods that it does not know.

    `cause` is the engine's error.
    """

    def __init__(self, cause: Any) -> None:
        super().__init__()
        self.cause = cause


def ask(
    engine: str, handler: str, address: str, annotation: tuple[str, str], mounts: list[tuple[str, str]], variable: str
) -> str:
    """Starts a container of the handler in a pod with the annotation, and returns one variable of its environment.

    Returns "" when the variable is not set.  `mounts`: path in the container, path on the host.  Raises
    HostError, with the engine's own message.
    """
    try:
        import grpc

        from shim.ttrpc import proto
    except ImportError as error:
        raise HostError(
            f"--verify calls {engine} through CRI, and the Python package of {error.name} is not installed",
            "install python3-grpcio and python3-protobuf, or leave --verify out",
        ) from None
    path = address.replace("unix://", "", 1)
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]
    with grpc.insecure_channel(f"unix://{path}", options) as channel:
        cri = Cri(channel, proto.build("runtime.v1", TABLE), grpc)
        try:
            return cri.verified(engine, handler, annotation, mounts, variable)
        except grpc.RpcError as error:
            words = " ".join(str(error.details()).split())[-900:]
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise HostError(
                    f"{engine} does not answer at {path}: {words}", f"start {engine}, or name its socket with --address"
                ) from None
            raise HostError(
                f"{engine} refused the pod: {words}", f"does {engine} know its new configuration (--restart)?"
            ) from None


class Cri:
    """Makes the CRI calls that a pod with one container needs.  Each raises grpc.RpcError."""

    def __init__(self, channel: Any, messages: dict[str, Any], grpc: Any) -> None:
        self.channel = channel
        self.messages = messages
        self.grpc = grpc

    def call(self, method: str, service: str = "RuntimeService", **fields: Any) -> Any:
        """Makes one call, with the fields of its request."""
        invoke = self.channel.unary_unary(
            f"/runtime.v1.{service}/{method}",
            self.messages[method + "Request"].SerializeToString,
            self.messages[method + "Response"].FromString,
        )
        return invoke(self.messages[method + "Request"](**fields), timeout=PATIENCE)

    def verified(
        self, engine: str, handler: str, annotation: tuple[str, str], mounts: list[tuple[str, str]], variable: str
    ) -> str:
        """See `ask`.  Starts another pod when another program stops the first.  Raises HostError without an image."""
        image = self._image(engine)
        last_end = None
        for _ in range(TRIES):
            try:
                return self._pod(handler, image, annotation, mounts, variable)
            except Ended as error:
                last_end = error
        assert last_end is not None
        raise last_end.cause

    def _image(self, engine: str) -> str:
        """The id of any image that the engine has.  Any will do, since the container runs only programs of the host."""
        until = time.monotonic() + STARTING
        while True:
            try:
                images = self.call("ListImages", "ImageService").images
                break
            except self.grpc.RpcError as error:
                # while the engine starts, its socket accepts calls before its service does
                code = self.grpc.StatusCode
                if error.code() not in (code.UNAVAILABLE, code.UNIMPLEMENTED, code.UNKNOWN) or time.monotonic() > until:
                    raise
            time.sleep(0.1)
        if not images:
            raise HostError(
                f"{engine} has no image, and --verify pulls none", "pull an image, or start a pod, and verify again"
            )
        return str(images[0].id)

    def _pod(
        self, handler: str, image: str, annotation: tuple[str, str], mounts: list[tuple[str, str]], variable: str
    ) -> str:
        pod_name = f"chandler-verify-{os.urandom(8).hex()}"
        namespaces = {"network": _NODE, "pid": _CONTAINER, "ipc": _POD}
        pod = {
            "metadata": {"name": pod_name, "uid": pod_name, "namespace": "chandler-verify"},
            "annotations": dict([annotation]),
            "linux": {"security_context": {"namespace_options": namespaces}},
        }
        sandbox = self.call("RunPodSandbox", config=pod, runtime_handler=handler).pod_sandbox_id
        try:
            container = {
                "metadata": {"name": "verify"},
                "image": {"image": image},
                "command": ["/bin/sh", "-c", "exec sleep 120"],
                "mounts": [
                    {"container_path": inside, "host_path": outside, "readonly": True} for inside, outside in mounts
                ],
                # an empty Int64Value is 0: run as uid 0, whichever user the image names
                "linux": {"security_context": {"namespace_options": namespaces, "run_as_user": {}}},
            }
            created_id = self.call(
                "CreateContainer", pod_sandbox_id=sandbox, config=container, sandbox_config=pod
            ).container_id
            self.call("StartContainer", container_id=created_id)
            answer = self.call(
                "ExecSync", container_id=created_id, cmd=["/bin/sh", "-c", "cat /proc/1/environ"], timeout=20
            )
            entries = answer.stdout.decode("utf-8", "replace").split("\0")
            return next((entry.partition("=")[2] for entry in entries if entry.startswith(variable + "=")), "")
        except self.grpc.RpcError as error:
            raise Ended(error) if self._ended(sandbox) else error from None
        finally:
            self._remove(sandbox)

    def _ended(self, sandbox: str) -> bool:
        """Whether the sandbox is stopped or removed now, or within ENDING seconds."""
        until = time.monotonic() + ENDING
        while time.monotonic() < until:
            try:
                if self.call("PodSandboxStatus", pod_sandbox_id=sandbox).status.state != _READY:
                    return True
            except self.grpc.RpcError:
                return True
            time.sleep(0.1)
        return False

    def _remove(self, sandbox: str) -> None:
        """Stops and removes the pod.  While another program does the same, that may take several calls."""
        until = time.monotonic() + STARTING
        while True:
            try:
                self.call("StopPodSandbox", pod_sandbox_id=sandbox)
                self.call("RemovePodSandbox", pod_sandbox_id=sandbox)
                return
            except self.grpc.RpcError as error:
                if error.code() == self.grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    return  # the pod stays; the failure that led here is the one to report
            time.sleep(0.1)
