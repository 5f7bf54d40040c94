"""The DaemonSets' own pods, as a kubelet makes them from the manifests, on a containerd 2 without Chandler."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from lab import cgroups, image
from lab import node as gpu_node
from lab.containerd import IMAGE, RELEASES
from lab.cri import Refused, reason
from lab.engine import read
from lab.kubenode import API, NODE_IMAGE, Containerd, Kubelet, Node, replace_image
from lab.plugin import until

PYTHONS = sorted(f"/usr/bin/{name}" for name in os.listdir("/usr/bin") if name.startswith("python3"))


@pytest.fixture(scope="module")
def node(lab: str, tree: str) -> Iterator[Node]:
    """Without Python, and with simulated GPUs, whose CDI file is where drivers' tools write theirs."""
    if RELEASES[1].missing:
        pytest.skip(RELEASES[1].missing)
    place = tempfile.mkdtemp(dir=lab)
    os.chmod(place, 0o755)
    made = Node(place, tree, without=PYTHONS)
    simulated = gpu_node.make(made.root + "/usr/lib/simulated")
    made.write("/etc/cdi/nvidia.yaml", read(simulated.spec).replace(made.root, ""))
    yield made
    made.close()
    cgroups.end(place)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def api(node: Node) -> Iterator[API]:
    made = API(node)
    yield made
    made.close()


@pytest.fixture(scope="module")
def containerd(node: Node, tree: str) -> Iterator[Containerd]:
    made = Containerd(node)
    made.start()
    made.load(IMAGE)
    made.load(NODE_IMAGE, image.packed(tree), Entrypoint=["/python3", "-I", "-B", "/node.py"], Cmd=["wait"])
    yield made
    made.stop()


@pytest.fixture
def kubelet(node: Node, containerd: Containerd, api: API) -> Iterator[Kubelet]:
    made = Kubelet(node, containerd, api.port)
    yield made
    made.cri.__exit__()


def ask(count: int) -> dict[str, str]:
    return {"chandler.oci/service": json.dumps({"resources": {"gpu": {"count": count}}, "env": {"A": "b"}})}


def gpus(kubelet: Kubelet, container: str) -> list[str]:
    return kubelet.cri.exec(container, "sh", "-c", "cd /dev; echo nvidia[0-9]").out.split()


def leases(node: Node) -> int:
    """The number of leased devices."""
    held = json.loads(read(node.root + "/run/chandler/leases"))["leases"]
    return sum(len(each["keys"]) for each in held)


def patch(value: str | None) -> tuple[str, str, str, Any]:
    return (
        "/api/v1/nodes/node-1",
        "Bearer the-token",
        "application/merge-patch+json",
        {"metadata": {"labels": {"chandler.oci/runtime": value}}},
    )


def test_the_installers_pod_serves_other_pods_and_the_cleanup_takes_it_away(
    kubelet: Kubelet, node: Node, containerd: Containerd, api: API, newer: str
) -> None:
    cri, before = kubelet.cri, node.changed()
    with pytest.raises(Refused):
        cri.pod("early", ask(1), handler="chandler")
    pod, spec = kubelet.pod("installer.yaml")
    (install,) = spec["initContainers"]
    status = kubelet.result(kubelet.start(pod, spec, install))
    assert status == 0, kubelet.log(pod, "install")
    assert "is in force" in kubelet.log(pod, "install") and api.asked == [patch("ready")]
    waits = kubelet.start(pod, spec, spec["containers"][0])

    # systemd's part: the restart that was requested.
    with open(node.root + "/run/systemctl.log", encoding="ascii") as file:
        assert file.read() == "restart containerd\n"
    containerd.stop()
    containerd.start()
    assert cri.ready() and cri.running(waits)

    served = cri.pod("served", ask(2), handler="chandler")
    container = cri.run(served)
    assert gpus(kubelet, container) == ["nvidia0", "nvidia1"] and cri.env(container)["A"] == "b"
    plain = cri.run(cri.pod("plain", handler="chandler"))
    with pytest.raises(Refused) as refused:  # the ConfigMap turns leases on
        cri.run(cri.pod("ninth", ask(7), handler="chandler"))
    assert "7" in reason(refused) and "nvidia.com/gpu" in reason(refused)
    cri.end(cri.pods[-1])

    # The update and the end of the DaemonSet disturb no container; those of the old version end with the new one's
    # hook.
    replace_image(node, newer)
    node.image("install")
    cri.end(pod)
    assert cri.running(container) and leases(node) == 2
    cri.remove(container)
    assert leases(node) == 0
    container = cri.run(served, "by-the-new-one")
    assert gpus(kubelet, container) == ["nvidia0", "nvidia1"] and leases(node) == 2

    pod, spec = kubelet.pod("cleanup.yaml")
    cleaning = kubelet.start(pod, spec, spec["initContainers"][0])
    until(lambda: container in kubelet.log(pod, "cleanup"), "a message about the container")
    assert plain in kubelet.log(pod, "cleanup") and cri.running(cleaning)
    assert api.asked[1:] == [patch(None)], "the node's label must go first"
    assert cri.running(cri.run(served, "restarted")), "a container of a pod that is there can still be started again"
    for each in [each for each in cri.pods if each != pod]:
        cri.end(each)
    assert kubelet.result(cleaning) == 0, kubelet.log(pod, "cleanup")
    assert node.changed() == before
    assert not os.path.exists(node.root + "/opt/chandler") and not os.path.exists(node.root + "/run/chandler")


def test_the_plugins_pod_serves_pods_of_any_handler(kubelet: Kubelet, node: Node) -> None:
    cri, before = kubelet.cri, node.changed()
    pod, spec = kubelet.pod("nri.yaml")
    plugin = kubelet.start(pod, spec, spec["containers"][0])
    until(lambda: "serving containerd" in kubelet.log(pod, "plugin") or not cri.running(plugin), "the plugin")
    assert cri.running(plugin), kubelet.log(pod, "plugin")
    container = cri.run(cri.pod("served", ask(2)))
    assert gpus(kubelet, container) == ["nvidia0", "nvidia1"] and cri.env(container)["A"] == "b"
    with pytest.raises(Refused) as refused:
        cri.create(cri.pod("too-many", ask(7)))
    assert "7" in reason(refused)
    other = cri.run(cri.pod("other", ask(6)))
    assert len(gpus(kubelet, other)) == 6 and "nvidia0" not in gpus(kubelet, other)
    # The plugin hears of the container's end, and a new plugin knows all leases.
    cri.remove(container)
    cri.remove(plugin)
    again = kubelet.start(pod, spec, {**spec["containers"][0], "name": "again"})
    until(lambda: "serving containerd" in kubelet.log(pod, "again"), "the second plugin")
    assert len(gpus(kubelet, cri.run(cri.pod("third", ask(2))))) == 2
    assert cri.running(again)
    assert {path: text for path, text in node.changed().items() if path not in before} == {}, (
        "nothing on the node but in /run"
    )
