"""A pod-wide request: all containers of the pod share one lease, which lasts as long as the pod's sandbox.

The bundles lie where containerd puts those of pods, so Chandler knows who calls. tests/kubernetes has the same with a
real kubelet.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import bundle
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node
from lab.runtimes import Runtime

POD_WIDE = {"chandler.oci/resources.gpu.count": "1"}
GPU = "nvidia.com/gpu={}"


class Pods:
    """What containerd does for the kubelet: a sandbox for each pod, then its containers, each with an id of its own."""

    def __init__(self, runtime: Runtime, installation: Installation, workdir: str) -> None:
        self.installation, self.tasks = installation, os.path.join(workdir, "io.containerd.runtime.v2.task/k8s.io")
        self.engine = Engine(
            [*runtime.wrap, installation.program()], os.path.join(workdir, "k8s.io"), hangs=runtime.kind == "youki"
        )

    def create(
        self, id: str, pod: str, annotations: dict[str, str], name: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Without `name`, the pod's sandbox. Both are in the pod's control group, as the kubelet wants it."""
        identity = bundle.pod(name or "x", kind="container" if name else "sandbox")
        identity["io.kubernetes.cri.sandbox-id"] = pod
        if not name:
            del identity["io.kubernetes.cri.container-name"]
        made = bundle.make(os.path.join(self.tasks, id), ["sleep", "600"], {**identity, **annotations})
        config = made.config
        config["linux"]["cgroupsPath"] = f"/{bundle.GROUPS}{pod}/{id}"
        made.config = config
        return self.engine.create(made, id, check=check)

    def start(self, pod: str, annotations: dict[str, str], **names: str) -> None:
        """A pod's sandbox and the containers `id`=`name`."""
        self.create(pod, pod, annotations)
        for id, name in names.items():
            self.create(id, pod, annotations, name)

    def end(self, *ids: str) -> None:
        for id in ids:
            self.engine.delete(id, "--force")

    def granted(self, id: str) -> str:
        with open(os.path.join(self.tasks, id, "config.json"), encoding="utf-8") as file:
            return str(json.load(file)["annotations"].get("chandler.oci/granted", ""))

    def leases(self) -> dict[str, list[str]]:
        return self.installation.leases()


@pytest.fixture
def pods(runtime: Runtime, workdir: str, node: Node) -> Iterator[Pods]:
    installation = Installation(os.path.join(workdir, "installed"))
    installation.configure([runtime.path], [node.cdi], engine="")
    made = Pods(runtime, installation, workdir)
    yield made
    made.engine.clean()


def test_the_containers_of_a_pod_share_its_lease(pods: Pods) -> None:
    pods.start("pod-a", POD_WIDE, a1="main", a2="side")
    assert pods.leases() == {"a1": [GPU.format(0)], "pod-a": [GPU.format(0)], "a2": [GPU.format(0)]}
    pods.start("pod-b", POD_WIDE, b1="main")
    assert pods.granted("a1") == pods.granted("a2") == GPU.format(0) != pods.granted("b1") == GPU.format(1)
    # A restart: the pod still has its GPU, and nobody else gets it.
    pods.end("a1", "a2")
    assert pods.leases()["pod-a"] == [GPU.format(0)]
    pods.start("pod-c", POD_WIDE, c1="main")
    pods.create("a3", "pod-a", POD_WIDE, "main")
    assert (pods.granted("a3"), pods.granted("c1")) == (GPU.format(0), GPU.format(2))
    pods.end("a3", "pod-a")
    assert sorted(pods.leases()) == ["b1", "c1", "pod-b", "pod-c"]
    pods.start("pod-d", POD_WIDE, d1="main")
    assert pods.granted("d1") == GPU.format(0)


def test_a_request_of_its_own_is_a_lease_of_its_own(pods: Pods) -> None:
    own = {"chandler.oci/service.side": json.dumps({"resources": {"gpu": {"count": 1}}})}
    pods.start("pod-a", {**POD_WIDE, **own}, a1="main", a2="side")
    assert pods.leases() == {"a1": [GPU.format(0)], "pod-a": [GPU.format(0)], "a2": [GPU.format(1)]}
    pods.end("a2")
    assert sorted(pods.leases()) == ["a1", "pod-a"]
    # Without a pod-wide document the sandbox is left as the engine made it.
    pods.start("pod-b", own, b1="side")
    assert pods.leases()["b1"] == [GPU.format(1)] and "pod-b" not in pods.leases()
    assert not os.path.exists(os.path.join(pods.tasks, "pod-b/config.json.chandler-edited"))


def test_a_document_that_has_changed_meanwhile(pods: Pods) -> None:
    """An annotation of a pod can be changed while the pod runs."""
    pods.start("pod-a", POD_WIDE, a1="main")
    two = {"chandler.oci/resources.gpu.count": "2"}
    done = pods.create("a2", "pod-a", two, "side", check=False)
    assert done.returncode and "resources.gpu.count is 2, and the containers of its pod share" in done.stdout
    assert sorted(pods.leases()) == ["a1", "pod-a"]


def test_a_create_that_is_refused_leaves_nothing(pods: Pods) -> None:
    wrong = {**POD_WIDE, "chandler.oci/resources.memory": "1"}
    pods.create("pod-a", "pod-a", wrong)
    done = pods.create("a1", "pod-a", {**wrong, "chandler.oci/resources.gpu.count": "99"}, "main", check=False)
    assert done.returncode and pods.leases() == {}
    done = pods.create("a2", "pod-a", {**POD_WIDE, "chandler.oci/hostname": "x"}, "main", check=False)
    assert pods.leases() == ({} if done.returncode else {"a2": [GPU.format(0)], "pod-a": [GPU.format(0)]})


def test_a_pod_whose_hook_did_not_run(pods: Pods) -> None:
    """It ends like every stale lease, also after the ledger was lost."""
    pods.start("pod-a", POD_WIDE, a1="main")
    for name in ("leases", "leases.copy"):
        os.unlink(os.path.join(pods.installation.state, name))
    chandler = pods.installation.program("chandler")

    def call(*words: str) -> Any:
        return subprocess.run([chandler, *words], stdin=subprocess.DEVNULL, capture_output=True, check=True, env={})

    call("leases", "rebuild")
    assert pods.leases() == {"a1": [GPU.format(0)], "pod-a": [GPU.format(0)]}
    call("leases", "release", "--stale")
    assert sorted(pods.leases()) == ["a1", "pod-a"]
    pods.end("a1")
    config = os.path.join(pods.tasks, "pod-a/config.json")
    subprocess.run(["mv", pods.installation.program("chandler-hook"), config + ".hook"], check=True)
    pods.engine.call("delete", "--force", "pod-a", check=False)
    subprocess.run(["mv", config + ".hook", pods.installation.program("chandler-hook")], check=True)
    assert sorted(pods.leases()) == ["pod-a"]
    call("leases", "release", "--stale")
    assert pods.leases() == {}


def test_a_refusal_names_pods_of_the_same_namespace_only(pods: Pods) -> None:
    eight = {"chandler.oci/resources.gpu.count": "8"}
    pods.start("pod-a", eight, a1="main")
    done = pods.create("b1", "pod-b", POD_WIDE, "main", check=False)
    assert "pod default/trainer-0 (main) holds nvidia.com/gpu=0" in done.stdout and "a1" not in done.stdout
    assert "chandler.oci/nvidia: 1" in done.stdout and "`kubectl get pods`" in done.stdout
    other = {**POD_WIDE, "io.kubernetes.cri.sandbox-namespace": "team-b"}
    done = pods.create("c1", "pod-c", other, "main", check=False)
    assert "another namespace holds nvidia.com/gpu=0" in done.stdout and "trainer-0" not in done.stdout
    listed = subprocess.run(
        [pods.installation.program("chandler"), "leases"], capture_output=True, text=True, check=True, env={}
    ).stdout
    assert "pod default/trainer-0 (main)" in listed and "pod default/trainer-0  " in listed
