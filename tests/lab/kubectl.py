"""What tests say to a cluster with kubectl."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from lab import plugin as nri
from lab.cluster import Cluster, Node
from lab.containerd import IMAGE
from lab.manifests import DIRECTORY

SYSTEM = "chandler-system"
RESOURCE = "chandler.oci/nvidia"
PATIENT = "--timeout=90s"  # how long kubectl waits for what it has asked for
until = functools.partial(nri.until, patience=90.0)


def apply(cluster: Cluster, *objects: dict[str, Any]) -> None:
    cluster.kubectl("apply", "-f", "-", input=together(*objects))


def together(*objects: dict[str, Any]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


def given(*names: str) -> list[str]:
    """kubectl's words for manifests of packaging/kubernetes."""
    return [word for name in names for word in ("-f", os.path.join(DIRECTORY, name))]


def rolled_out(cluster: Cluster, name: str) -> None:
    cluster.kubectl("-n", SYSTEM, "rollout", "status", f"daemonset/{name}", PATIENT)


def namespace(name: str, level: str = "") -> dict[str, Any]:
    labels = {"chandler.oci/requests": level} if level else {}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod(
    name: str, gpus: int = 0, handler: str = "chandler", at: str = "team", limit: int = 0, **more: Any
) -> dict[str, Any]:
    """A pod on node-1, which has two GPUs. `limit`: the GPUs in its limits. `more`: annotations."""
    annotations = {"chandler.oci/" + key.replace("__", "."): value for key, value in more.items()}
    if gpus:
        annotations["chandler.oci/resources.gpu.count"] = str(gpus)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": at, "labels": {"app": name}, "annotations": annotations},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": "node-1"},
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "main",
                    "image": IMAGE,
                    "command": ["sleep", "3600"],
                    "resources": {"limits": {RESOURCE: limit} if limit else {}},
                }
            ],
            **({"runtimeClassName": handler} if handler else {}),
        },
    }


def run(cluster: Cluster, *pods: dict[str, Any]) -> None:
    apply(cluster, *pods)
    names = [f"pod/{each['metadata']['name']}" for each in pods]
    cluster.kubectl("-n", "team", "wait", "--for=condition=Ready", *names, PATIENT)


def end(cluster: Cluster, *names: str) -> None:
    cluster.kubectl("-n", "team", "delete", "pod", *names, PATIENT)


def inside(cluster: Cluster, name: str, script: str, check: bool = True) -> str:
    done = cluster.kubectl("-n", "team", "exec", name, "-c", "main", "--", "sh", "-c", script, check=check)
    return done.stdout if check else done.stdout + done.stderr


def gpus(cluster: Cluster, name: str) -> list[str]:
    """The GPUs that a pod has and can open."""
    return inside(
        cluster, name, "cd /dev; for gpu in nvidia[0-9]*; do [ -e $gpu ] && : <$gpu && echo $gpu; done; true"
    ).split()


def held(node: Node) -> int:
    """How many devices are leased."""
    return len({name for names in node.leases().values() for name in names})
