"""What the kubelet says to a container runtime, over the Container Runtime Interface."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grpc
from cri_api.v1 import api_pb2 as pb
from cri_api.v1 import api_pb2_grpc

from lab.containerd import IMAGE, PATIENCE

Refused = grpc.RpcError


class Pod(NamedTuple):
    id: str
    config: Any


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class CRI:
    """Pods that were started here end with it."""

    def __init__(self, socket: str) -> None:
        self.channel = grpc.insecure_channel("unix://" + socket)
        stubs: Any = api_pb2_grpc
        self.runtime = stubs.RuntimeServiceStub(self.channel)
        self.pods: list[Pod] = []

    def __enter__(self) -> CRI:
        return self

    def __exit__(self, *_: object) -> None:
        for pod in list(self.pods):
            self.end(pod)
        self.channel.close()

    def ready(self) -> bool:
        """True once the service is there; after a start of the daemon it takes a moment longer than its socket."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self.runtime.ListPodSandbox(pb.ListPodSandboxRequest(), timeout=PATIENCE, wait_for_ready=True)
                return True
            except grpc.RpcError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def pod(
        self,
        name: str,
        annotations: Mapping[str, str] | None = None,
        handler: str = "",
        namespace: str = "default",
        cgroup_parent: str = "",
    ) -> Pod:
        # The node's own network: no CNI plugin is needed.
        namespaces = pb.NamespaceOption(network=pb.NODE, pid=pb.CONTAINER, ipc=pb.POD)
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=name + "-uid", namespace=namespace),
            annotations=annotations,
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=cgroup_parent,
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=namespaces),
            ),
        )
        made = self.runtime.RunPodSandbox(
            pb.RunPodSandboxRequest(config=config, runtime_handler=handler), timeout=PATIENCE, wait_for_ready=True
        )
        self.pods.append(Pod(made.pod_sandbox_id, config))
        return self.pods[-1]

    def create(
        self,
        pod: Pod,
        name: str = "main",
        command: Sequence[str] = ("sleep", "3600"),
        annotations: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        user: int | None = None,
        mounts: Mapping[str, str] | None = None,
        **resources: Any,
    ) -> str:
        """CreateContainer: where NRI adjusts. `mounts`: paths inside to those of the host."""
        security = pb.LinuxContainerSecurityContext(
            namespace_options=pod.config.linux.security_context.namespace_options
        )
        if user is not None:
            security.run_as_user.value = user
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=IMAGE),
            command=command,
            annotations=annotations,
            envs=[pb.KeyValue(key=k, value=v) for k, v in (env or {}).items()],
            mounts=[pb.Mount(container_path=inside, host_path=host) for inside, host in (mounts or {}).items()],
            linux=pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(**resources), security_context=security),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        container: str = self.runtime.CreateContainer(request, timeout=PATIENCE).container_id
        return container

    def start(self, container: str) -> str:
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container), timeout=PATIENCE)
        return container

    def run(self, pod: Pod, name: str = "main", **more: Any) -> str:
        return self.start(self.create(pod, name, **more))

    def update(self, container: str, **resources: Any) -> None:
        self.runtime.UpdateContainerResources(
            pb.UpdateContainerResourcesRequest(container_id=container, linux=pb.LinuxContainerResources(**resources)),
            timeout=PATIENCE,
        )

    def exec(self, container: str, *command: str) -> Ran:
        done = self.runtime.ExecSync(
            pb.ExecSyncRequest(container_id=container, cmd=command, timeout=20), timeout=PATIENCE
        )
        return Ran(done.exit_code, done.stdout.decode(), done.stderr.decode())

    def env(self, container: str) -> dict[str, str]:
        """The environment of the container's own process."""
        text = self.exec(container, "cat", "/proc/1/environ").out
        return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)

    def info(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container: `pid`, `runtimeSpec`, …"""
        status = self.runtime.ContainerStatus(
            pb.ContainerStatusRequest(container_id=container, verbose=True), timeout=PATIENCE
        )
        found: dict[str, Any] = json.loads(status.info["info"])
        return found

    def spec(self, container: str) -> dict[str, Any]:
        """The container's config.json as the engine wrote it."""
        spec: dict[str, Any] = self.info(container)["runtimeSpec"]
        return spec

    def running(self, container: str) -> bool:
        state = self.runtime.ContainerStatus(
            pb.ContainerStatusRequest(container_id=container), timeout=PATIENCE
        ).status.state
        return bool(state == pb.CONTAINER_RUNNING)

    def remove(self, container: str) -> None:
        self.runtime.StopContainer(pb.StopContainerRequest(container_id=container, timeout=0), timeout=PATIENCE)
        self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=PATIENCE)

    def end(self, pod: Pod) -> None:
        self.runtime.StopPodSandbox(
            pb.StopPodSandboxRequest(pod_sandbox_id=pod.id), timeout=PATIENCE, wait_for_ready=True
        )
        self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id), timeout=PATIENCE)
        self.pods.remove(pod)


def reason(error: Any) -> str:
    """What a person sees of a refused call."""
    return str(error.value.details())


def lines(text: str) -> Iterator[dict[str, Any]]:
    """The records of a log in JSON."""
    return (json.loads(line) for line in text.splitlines() if line.startswith("{"))
