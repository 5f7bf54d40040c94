"""Containers of a real dockerd with annotations, on each low-level runtime, after `chandler configure docker`."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import cgroups, runtimes
from lab.docker import RELEASES, Docker, Release
from lab.install import Installation
from lab.node import KIND, Node
from lab.workdir import within

LOW = {f"chandler-{kind}": label for kind, label in (("runc", "runc"), ("crun", "newer-crun"), ("youki", "youki"))}
# For tests that are not repeated on youki.
BOTH = ["chandler-crun", "chandler-runc"]
PREFIX = "chandler.oci/"


class Scene:
    """One daemon, and Chandler with a handler for each low-level runtime."""

    def __init__(self, release: Release, workdir: str, node: Node) -> None:
        self.node = node
        self.docker = Docker(release, os.path.join(workdir, "docker"))
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.low = {handler: found for handler, label in LOW.items() if not (found := runtimes.named(label)).missing}
        self.configure()
        with open(self.docker.config, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "runtimes": {f"{found.kind}-direct": {"path": found.path} for found in self.low.values()},
                    "cdi-spec-dirs": [node.cdi],
                },
                file,
            )
        subprocess.run(
            [
                self.installation.program("chandler"),
                "configure",
                "docker",
                "--config",
                self.docker.config,
                "--cdi",
                *(f"--runtime={found.kind}" for found in self.low.values()),
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            env={},
        )
        self.docker.start()

    def configure(self, more: str = "") -> None:
        self.installation.configure(
            [found.path for found in self.low.values()],
            [self.node.cdi],
            f'[gpu]\nallocator = "leases"\n{more}',
            engine="",
        )
        self.installation.refresh()

    def left(self) -> list[str]:
        """What runtimes and shims have left of any container (names of crun's own files begin with a dot)."""
        return [
            name
            for directory in (self.docker.root, self.docker.tasks)
            if os.path.isdir(directory)
            for name in os.listdir(directory)
            if not name.startswith(".")
        ]


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.label)
def scene(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Scene]:
    if request.param.missing:
        pytest.skip(request.param.missing)
    with within(lab) as directory:
        made = Scene(request.param, directory, node)
        yield made
        made.docker.stop()


@pytest.fixture
def docker(scene: Scene) -> Iterator[Docker]:
    yield scene.docker
    scene.docker.clean()


@pytest.fixture(params=sorted(LOW))
def handler(request: pytest.FixtureRequest) -> str:
    missing = runtimes.named(LOW[request.param]).missing
    if missing:
        pytest.skip(missing)
    return str(request.param)


def ask(**document: Any) -> dict[str, str]:
    return {PREFIX + "service": json.dumps(document)}


def test_a_container_s_life(scene: Scene, docker: Docker, handler: str) -> None:
    """The container's process has what it requested.

    A process that exec starts can open only that GPU, and an update does not change this.
    """
    asked = ask(resources={"gpu": {"count": 2}, "memory": "64Mi", "pids_limit": 64}, env={"EPOCHS": "3"})
    container = docker.run(
        handler, "--detach", annotations=asked, command=["sh", "-c", "env; echo END; sleep 3600"]
    ).stdout.strip()
    assert scene.installation.leases() == {container: [f"{KIND}=0", f"{KIND}=1"]}
    assert {"EPOCHS=3", "CUDA_VISIBLE_DEVICES=0,1"} <= set(docker.logs(container, "END"))
    pid = docker.inspect(container)["State"]["Pid"]
    third = scene.node.gpus[2]

    def opened() -> None:
        for gpu in scene.node.gpus[:2]:
            docker.cli("exec", container, "sh", "-c", f"exec 3<{gpu.inside}")
        other = docker.cli(
            "exec",
            container,
            "sh",
            "-c",
            f"test -e /tmp/g || mknod /tmp/g c {third.major} {third.minor}; exec 3</tmp/g",
            check=False,
        )
        assert other.returncode and "not permitted" in other.stderr

    opened()
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", pid) == 64 << 20
    assert cgroups.limit("pids", "pids.max", "pids.max", pid) == 64
    docker.cli("update", "--memory=128m", "--memory-swap=256m", "--cpus=0.5", container)
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", pid) == 128 << 20
    opened()
    docker.cli("pause", container)
    docker.cli("unpause", container)
    opened()
    docker.cli("stop", "--time=0", container)
    assert scene.installation.leases() == {}
    # it takes what is free when it starts again
    docker.cli("start", container)
    assert scene.installation.leases() == {container: [f"{KIND}=0", f"{KIND}=1"]}
    opened()
    docker.cli("rm", "--force", container)
    assert scene.installation.leases() == {} and scene.left() == []


@pytest.mark.parametrize("handler", BOTH, indirect=True)
def test_a_container_without_a_request_is_unchanged(scene: Scene, docker: Docker, handler: str) -> None:
    """config.json is what docker's own runc gets, except for names that differ for each container."""
    seen = []
    for runtime in (handler, "runc"):
        container = docker.run(
            runtime, "--detach", "--hostname=h", "--annotation=example.com/note=chandler"
        ).stdout.strip()
        bundle = os.path.join(docker.tasks, container)
        assert not [name for name in os.listdir(bundle) if "chandler" in name]
        with open(os.path.join(bundle, "config.json"), encoding="utf-8") as file:
            text = file.read().replace(container, "ID")
        config = json.loads(text)
        config["root"].pop("path")  # a layer of its own
        seen.append(config)
    assert seen[0] == seen[1]
    assert scene.installation.leases() == {}


@pytest.mark.parametrize("handler", BOTH, indirect=True)
def test_a_refused_container(scene: Scene, docker: Docker, handler: str) -> None:
    """The caller gets one sentence, nothing is left, and the container starts once enough GPUs are free."""
    first = docker.run(handler, "--detach", annotations={PREFIX + "resources.gpu.count": "1"}).stdout.strip()
    before = scene.left()
    second = docker.run(
        handler, "--detach", "--name=second", annotations={PREFIX + "resources.gpu.count": "8"}, check=False
    )
    message = (
        f"annotation {PREFIX}resources.gpu.count: resources.gpu asks for 8 devices of {KIND}; "
        f"7 of 8 are free: {first} holds {KIND}=0 since "
    )
    assert second.returncode == 125 and message in second.stderr and "retrieve OCI runtime error" not in second.stderr
    assert message in docker.inspect("second")["State"]["Error"]
    assert scene.left() == before and list(scene.installation.leases()) == [first]
    docker.cli("kill", first)
    docker.cli("wait", first)
    docker.cli("start", "second")
    assert list(scene.installation.leases()) == [docker.inspect("second")["Id"]]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("resources.gpu.cound=1", "unknown key 'resources.gpu.cound'"),
        ("privileged=true", "privileged"),
        ("resources.gpu.devices=nvidia.com/gpu=99", "unresolvable CDI devices nvidia.com/gpu=99"),
    ],
)
def test_errors_reach_the_caller(scene: Scene, docker: Docker, annotation: str, message: str) -> None:
    done = docker.run("chandler-runc", "--rm", f"--annotation={PREFIX}{annotation}", check=False)
    assert (
        done.returncode == 125 and message in done.stderr and scene.left() == [] and scene.installation.leases() == {}
    )


@pytest.mark.usefixtures("strict")
def test_names_in_annotations_of_docker_are_not_believed(docker: Docker) -> None:
    """A caller of docker can set any annotation.

    So those of Kubernetes do not identify a container here, neither for a policy rule nor as a sandbox.
    """
    forged = {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-namespace": "prod",
        "io.kubernetes.cri.container-name": "main",
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.pod.namespace": "prod",
    }
    done = docker.run(
        "chandler-runc", "--rm", annotations={**forged, **ask(env={"A": "b"})}, command=["env"], check=False
    )
    assert done.returncode == 125 and "policy" in done.stderr and "'env'" in done.stderr
    forged["io.kubernetes.cri.container-type"] = "sandbox"
    done = docker.run(
        "chandler-runc", "--rm", annotations={**forged, **ask(resources={"gpu": {"count": 1}})}, command=["env"]
    )
    assert "CUDA_VISIBLE_DEVICES=0" in done.stdout


@pytest.mark.parametrize("way", ["device", "cdi"])
def test_a_gpu_from_docker_itself_beside_a_request(scene: Scene, docker: Docker, way: str) -> None:
    """Under leases a GPU that docker gives has no lease.

    A container that gets GPUs both ways is refused, in a sentence that names the GPU.
    """
    gpu = scene.node.gpus[3]
    option = f"--device={gpu.host}:{gpu.inside}" if way == "device" else f"--device={KIND}=3"
    alone = docker.run("chandler-runc", "--rm", option, command=["sh", "-c", f"exec 3<{gpu.inside}"], check=False)
    assert alone.returncode == 0, alone.stderr
    done = docker.run("chandler-runc", "--rm", option, annotations={PREFIX + "resources.gpu.count": "1"}, check=False)
    assert done.returncode == 125 and f"config.json has a GPU already, {gpu.inside}, from the engine" in done.stderr
    assert scene.installation.leases() == {} and scene.left() == []


def test_features_of_the_runtimes_are_passed_through(scene: Scene, docker: Docker, handler: str) -> None:
    """dockerd asks each runtime for its features at the start, through Chandler, and shows the answer."""
    through_us, direct = (
        docker.info()["Runtimes"][name].get("status")
        for name in (handler, handler.removeprefix("chandler-") + "-direct")
    )
    assert (through_us is None) == (direct is None)
    for key in direct or ():
        assert unordered(json.loads(through_us[key])) == unordered(
            json.loads(direct[key])
        )  # youki's lists have no order


def unordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: unordered(item) for key, item in value.items()}
    return sorted(map(repr, value)) if isinstance(value, list) else value


def test_a_daemon_that_ends_takes_its_containers_along(scene: Scene, docker: Docker) -> None:
    container = docker.run(
        "chandler-runc", "--detach", "--stop-signal=KILL", annotations={PREFIX + "resources.gpu.count": "1"}
    ).stdout.strip()
    pid = docker.inspect(container)["State"]["Pid"]
    assert list(scene.installation.leases()) == [container]
    docker.stop()
    docker.start()
    assert not os.path.exists(f"/proc/{pid}") and scene.installation.leases() == {}
    docker.cli("start", container)
    assert list(scene.installation.leases()) == [container]
