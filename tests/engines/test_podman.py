"""Containers of a real podman with annotations, on each low-level runtime, after `chandler configure podman`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from lab import cgroups, runtimes
from lab.install import Installation
from lab.node import KIND, Node
from lab.podman import RELEASES, Podman, Release
from lab.workdir import within

# The crun of each podman's distribution: podman 5 writes config.json of a version that an old crun rejects.
LOW = {
    "podman-4": {"chandler-runc": "runc", "chandler-crun": "crun", "chandler-youki": "youki"},
    "podman-5": {"chandler-runc": "newer-runc", "chandler-crun": "newer-crun", "chandler-youki": "youki"},
}
HANDLERS = sorted(LOW["podman-5"])
# For tests that are not repeated on youki.
BOTH = ["chandler-crun", "chandler-runc"]
PREFIX = "chandler.oci/"


class Scene:
    """One podman, and Chandler with a handler for each low-level runtime."""

    def __init__(self, release: Release, workdir: str, node: Node) -> None:
        self.node = node
        self.podman = Podman(release, os.path.join(workdir, "podman"))
        self.installation = Installation(os.path.join(workdir, "installed"))
        low = {handler: runtimes.named(label) for handler, label in LOW[release.label].items()}
        self.low = {handler: found for handler, found in low.items() if not found.missing}
        self.configure()
        kinds = [f"--runtime={found.kind}" for found in self.low.values()]
        self.podman.call(self.installation.program("chandler"), "configure", "podman", *kinds)
        self.podman.load()

    def configure(self, more: str = "") -> None:
        self.installation.configure(
            [found.path for found in self.low.values()],
            [self.node.cdi],
            f'[gpu]\nallocator = "leases"\n{more}',
            engine="",
        )
        self.installation.refresh()


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.label)
def scene(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Scene]:
    if request.param.missing:
        pytest.skip(request.param.missing)
    with within(lab) as directory:
        made = Scene(request.param, directory, node)
        yield made
        made.podman.close()


@pytest.fixture
def podman(scene: Scene) -> Iterator[Podman]:
    yield scene.podman
    scene.podman.clean()


@pytest.fixture(params=HANDLERS)
def handler(request: pytest.FixtureRequest, scene: Scene) -> str:
    name = str(request.param)
    if name not in scene.low:
        pytest.skip(runtimes.named(LOW[scene.podman.release.label][name]).missing)
    return name


def ask(**document: Any) -> dict[str, str]:
    return {PREFIX + "service": json.dumps(document)}


def left(container: str) -> list[str]:
    """The runtimes' state directories of a container, which podman leaves in the default place."""
    return [path for path in (f"/run/{kind}/{container}" for kind in ("runc", "crun", "youki")) if os.path.exists(path)]


def test_a_container_s_life(scene: Scene, podman: Podman, handler: str) -> None:
    """The container's process has what it requested.

    A process that exec starts can open only that GPU, and an update does not change this.
    """
    asked = ask(resources={"gpu": {"count": 2}, "memory": "64Mi", "pids_limit": 64}, env={"EPOCHS": "3"})
    container = podman.run(
        handler, "--detach", annotations=asked, command=["sh", "-c", "env; echo END; sleep 3600"]
    ).stdout.strip()
    assert scene.installation.leases() == {container: [f"{KIND}=0", f"{KIND}=1"]}
    assert {"EPOCHS=3", "CUDA_VISIBLE_DEVICES=0,1"} <= set(podman.logs(container, "END"))
    pid = podman.inspect(container)["State"]["Pid"]
    third = scene.node.gpus[2]

    def opened() -> None:
        for gpu in scene.node.gpus[:2]:
            podman.cli("exec", container, "sh", "-c", f"exec 3<{gpu.inside}")
        # podman's containers may not make nodes
        other = podman.cli(
            "exec",
            "--privileged",
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
    podman.cli("update", "--memory=128m", "--memory-swap=256m", "--cpus=0.5", container)
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", pid) == 128 << 20
    opened()
    podman.cli("pause", container)
    podman.cli("unpause", container)
    opened()
    podman.cli("stop", "--time=0", container)
    assert scene.installation.leases() == {}
    # it takes what is free when it starts again
    podman.cli("start", container)
    assert scene.installation.leases() == {container: [f"{KIND}=0", f"{KIND}=1"]}
    opened()
    podman.cli("rm", "--force", "--time=0", container)
    assert scene.installation.leases() == {} and left(container) == []


@pytest.mark.parametrize("handler", BOTH, indirect=True)
def test_a_container_without_a_request_is_unchanged(scene: Scene, podman: Podman, handler: str) -> None:
    """config.json is what the runtime gets without Chandler, except for names that differ for each container."""
    seen = []
    for runtime in (handler, scene.low[handler].path):
        container = podman.run(
            runtime, "--detach", "--hostname=h", "--annotation=example.com/note=chandler"
        ).stdout.strip()
        bundle = podman.bundle(container)
        assert not [name for name in os.listdir(bundle) if "chandler" in name]
        with open(os.path.join(bundle, "config.json"), encoding="utf-8") as file:
            config = json.loads(file.read().replace(container, "ID"))
        config["root"].pop("path")  # a layer of its own
        config["annotations"].pop("io.kubernetes.cri-o.Created", None)
        config["process"]["env"].sort()  # podman has them in no order
        config["mounts"].sort(key=lambda mount: str(mount["destination"]))
        seen.append(config)
    assert seen[0] == seen[1]
    assert scene.installation.leases() == {}


@pytest.mark.parametrize("handler", BOTH, indirect=True)
def test_a_refused_container(scene: Scene, podman: Podman, handler: str) -> None:
    """The caller gets one sentence, nothing is left, and the container starts once enough GPUs are free."""
    first = podman.run(handler, "--detach", annotations={PREFIX + "resources.gpu.count": "1"}).stdout.strip()
    second = podman.run(
        handler, "--detach", "--name=second", annotations={PREFIX + "resources.gpu.count": "8"}, check=False
    )
    message = (
        f"annotation {PREFIX}resources.gpu.count: resources.gpu asks for 8 devices of {KIND}; "
        f"7 of 8 are free: {first} holds {KIND}=0 since "
    )
    assert second.returncode == 126 and second.stderr.startswith(f"Error: OCI runtime error: {handler}: {message}")
    assert list(scene.installation.leases()) == [first] and left(podman.inspect("second")["Id"]) == []
    podman.cli("stop", "--time=0", first)
    podman.cli("start", "second")
    assert list(scene.installation.leases()) == [podman.inspect("second")["Id"]]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("resources.gpu.cound=1", "unknown key 'resources.gpu.cound'"),
        ("privileged=true", "privileged"),
        ("resources.gpu.devices=nvidia.com/gpu=99", "unresolvable CDI devices nvidia.com/gpu=99"),
    ],
)
def test_errors_reach_the_caller(scene: Scene, podman: Podman, annotation: str, message: str) -> None:
    done = podman.run("chandler-runc", "--rm", podman.annotation(PREFIX + annotation), check=False)
    assert done.returncode == 126 and message in done.stderr and "command that was not found" not in done.stderr
    assert podman.cli("ps", "--all", "--quiet").stdout == "" and scene.installation.leases() == {}


def test_podman_calls_an_unconfigured_chandler_by_its_path(scene: Scene, podman: Podman) -> None:
    """As in README's first command: podman is not configured for Chandler, so refusals come on standard error."""
    taken = podman.call(scene.installation.program("chandler"), "configure", "podman", "--remove")
    assert "removed" in taken.stdout
    try:
        program = scene.installation.program()
        served = podman.run(program, "--rm", annotations={PREFIX + "resources.gpu.count": "1"}, command=["env"])
        assert "CUDA_VISIBLE_DEVICES=0" in served.stdout
        refused = podman.run(program, "--rm", annotations={PREFIX + "resources.gpu.count": "9"}, check=False)
        assert refused.returncode == 126 and "resources.gpu asks for 9 devices" in refused.stderr
    finally:
        kinds = [f"--runtime={found.kind}" for found in scene.low.values()]
        podman.call(scene.installation.program("chandler"), "configure", "podman", *kinds)


@pytest.mark.usefixtures("strict")
def test_names_in_annotations_of_podman_are_not_believed(podman: Podman) -> None:
    """A caller of podman can set any annotation.

    So those of Kubernetes do not identify a container here, neither for a policy rule nor as a sandbox.
    """
    forged = {
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-namespace": "prod",
        "io.kubernetes.cri.container-name": "main",
        "io.kubernetes.cri-o.ContainerType": "container",
        "io.kubernetes.pod.namespace": "prod",
    }
    done = podman.run(
        "chandler-runc", "--rm", annotations={**forged, **ask(env={"A": "b"})}, command=["env"], check=False
    )
    assert done.returncode == 126 and "policy" in done.stderr and "'env'" in done.stderr
    forged["io.kubernetes.cri-o.ContainerType"] = "sandbox"
    done = podman.run(
        "chandler-runc", "--rm", annotations={**forged, **ask(resources={"gpu": {"count": 1}})}, command=["env"]
    )
    assert "CUDA_VISIBLE_DEVICES=0" in done.stdout


@pytest.mark.parametrize("way", ["device", "cdi"])  # podman 4 reads CDI files only from the machine's own directories
def test_a_gpu_from_podman_itself_beside_a_request(scene: Scene, podman: Podman, way: str) -> None:
    """Under leases a GPU that podman gives has no lease.

    A container that gets GPUs both ways is refused, in a sentence that names the GPU.
    """
    gpu = scene.node.gpus[3]
    option = f"--device={gpu.host}:{gpu.inside}" if way == "device" else f"--device={KIND}=3"
    if podman.release.label == "podman-5":
        podman.cdi = scene.node.cdi
    elif way == "cdi":
        return
    alone = podman.run("chandler-runc", "--rm", option, command=["sh", "-c", f"exec 3<{gpu.inside}"], check=False)
    assert alone.returncode == 0, alone.stderr
    done = podman.run("chandler-runc", "--rm", option, annotations={PREFIX + "resources.gpu.count": "1"}, check=False)
    assert done.returncode == 126 and f"config.json has a GPU already, {gpu.inside}, from the engine" in done.stderr
    assert scene.installation.leases() == {}


@pytest.mark.parametrize("handler", BOTH, indirect=True)  # youki fails by itself
def test_a_pod_of_kube_play(scene: Scene, podman: Podman, handler: str) -> None:
    """Each container of the pod gets its own GPU; the pod's infra container gets none."""
    file = os.path.join(podman.directory, "pod.yaml")
    container = {"image": "docker.io/local/busybox:1", "command": ["sleep", "3600"]}
    with open(file, "w", encoding="utf-8") as out:
        json.dump(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "trainer", "annotations": {PREFIX + "resources.gpu.count": "1"}},
                "spec": {"hostNetwork": True, "containers": [{"name": name, **container} for name in ("main", "side")]},
            },
            out,
        )
    podman.cli(f"--runtime={handler}", "kube", "play", "--network=host", file)
    ids = {podman.inspect(f"trainer-{name}")["Id"] for name in ("main", "side")}
    assert len(podman.cli("ps", "--quiet").stdout.split()) == 3
    assert set(scene.installation.leases()) == ids and sorted(sum(scene.installation.leases().values(), [])) == [
        f"{KIND}=0",
        f"{KIND}=1",
    ]
    podman.cli("pod", "rm", "--force", "--time=0", "trainer")
    assert scene.installation.leases() == {}


@pytest.mark.parametrize("handler", BOTH, indirect=True)
def test_a_user_namespace_of_root_s_container(scene: Scene, podman: Podman, handler: str) -> None:
    """No device can be made there: the host's nodes are mounted, and the control group blocks all others."""
    command = f"exec 3<{scene.node.gpus[0].inside} && cat /proc/self/uid_map && env"
    done = podman.run(
        handler,
        "--rm",
        "--uidmap=0:200000:65536",
        annotations={PREFIX + "resources.gpu.count": "1"},
        command=["sh", "-c", command],
    )
    assert done.stdout.split()[:3] == ["0", "200000", "65536"] and "CUDA_VISIBLE_DEVICES=0" in done.stdout
    assert scene.installation.leases() == {}
