"""Pods with ResourceClaims on a real cluster: the DRA driver, the scheduler and the kubelets of two nodes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from lab.cluster import Cluster
from lab.kubectl import (
    PATIENT,
    SYSTEM,
    apply,
    end,
    given,
    gpus,
    held,
    namespace,
    pod,
    rolled_out,
    run,
    until,
)

CLASS = "nvidia.gpu.chandler.oci"


@pytest.fixture(scope="module")
def driver(cluster: Cluster, bare: dict[str, dict[str, str]]) -> Iterator[None]:
    cluster.kubectl("apply", *given("namespace.yaml", "config.yaml", "dra.yaml"))
    rolled_out(cluster, "chandler-device-plugin")
    until(lambda: [len(names) for names in offered(cluster).values()] == [2, 2], "ResourceSlices")
    yield
    cluster.kubectl("delete", *given("dra.yaml"), PATIENT)


@pytest.fixture
def team(cluster: Cluster) -> Iterator[str]:
    """A namespace that may ask. With its last pod, the last lease ends."""
    apply(cluster, namespace("team", "named"))
    yield "team"
    cluster.kubectl("-n", "team", "delete", "pods,resourceclaims", "--all", PATIENT)
    until(lambda: not any(map(held, cluster.nodes)), "the end of all leases")
    assert not any(claim_files(node.root) for node in cluster.nodes)


def offered(cluster: Cluster) -> dict[str, list[str]]:
    """By node, the devices that the scheduler may give."""
    found: dict[str, list[str]] = {}
    for each in cluster.get("resourceslices")["items"]:
        free = [device["name"] for device in each["spec"]["devices"] if "taints" not in device]
        found.setdefault(each["spec"]["nodeName"], []).extend(free)
    return found


def claim_files(root: str) -> list[str]:
    directory = root + "/run/cdi"
    return os.listdir(directory) if os.path.isdir(directory) else []


def claim(name: str, count: int = 1, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    config = [{"opaque": {"driver": "gpu.chandler.oci", "parameters": parameters}}] if parameters is not None else []
    request = {"name": "gpu", "exactly": {"deviceClassName": CLASS, "count": count}}
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaim",
        "metadata": {"name": name, "namespace": "team"},
        "spec": {"devices": {"requests": [request], "config": config}},
    }


def with_claim(name: str, of: str, **more: Any) -> dict[str, Any]:
    """A pod on node-1 with a claim."""
    made = pod(name, handler="", **more)
    made["spec"]["resourceClaims"] = [{"name": "mine", "resourceClaimName": of}]
    made["spec"]["containers"][0]["resources"] = {"claims": [{"name": "mine"}]}
    return made


def test_a_claim_gives_its_gpu_and_nothing_else(cluster: Cluster, driver: None, team: str) -> None:
    node = cluster.nodes[0]
    (slice_,) = (each for each in cluster.get("resourceslices")["items"] if each["spec"]["nodeName"] == node.name)
    assert slice_["metadata"]["ownerReferences"][0]["name"] == node.name
    attributes = slice_["spec"]["devices"][0]["attributes"]
    assert attributes["vendor"] == {"string": "nvidia"} and attributes["uuid"]["string"].startswith("GPU-0")
    apply(cluster, claim("first"), claim("second"))
    run(cluster, with_claim("one", "first"), with_claim("two", "second"), pod("plain", handler=""))
    first, second = gpus(cluster, "one"), gpus(cluster, "two")
    assert sorted(first + second) == ["nvidia0", "nvidia1"] and gpus(cluster, "plain") == []
    assert held(node) == 2 and len(claim_files(node.root)) == 2
    # The third claim waits for a GPU, and gets the one of the pod that ends.
    apply(cluster, claim("third"), with_claim("three", "third"))

    def scheduled() -> dict[str, Any]:
        conditions: list[dict[str, Any]] = cluster.get("-n", "team", "pod", "three")["status"].get("conditions", [])
        return next((each for each in conditions if each["type"] == "PodScheduled"), {})

    until(lambda: scheduled().get("status") == "False", "the scheduler's word")
    assert "cannot allocate all claims" in scheduled()["message"]
    end(cluster, "one")
    cluster.kubectl("-n", "team", "delete", "resourceclaim", "first", PATIENT)
    cluster.kubectl("-n", "team", "wait", "--for=condition=Ready", "pod/three", PATIENT)
    assert gpus(cluster, "three") == first


def test_pods_that_share_a_claim_share_one_lease(cluster: Cluster, driver: None, team: str) -> None:
    node = cluster.nodes[0]
    apply(cluster, claim("shared"))
    run(cluster, with_claim("one", "shared"), with_claim("two", "shared"))
    assert gpus(cluster, "one") == gpus(cluster, "two") != []
    assert (len(node.leases()), len(claim_files(node.root))) == (1, 1)
    end(cluster, "one")
    assert gpus(cluster, "two") and len(node.leases()) == 1
    # Another kubelet and another driver know the claim.
    node.services.systemctl("kill", "--signal=KILL", "kubelet")
    cluster.kubectl("-n", SYSTEM, "delete", "pod", "-l", "app.kubernetes.io/name=chandler-device-plugin", PATIENT)
    rolled_out(cluster, "chandler-device-plugin")
    run(cluster, with_claim("three", "shared"))
    assert gpus(cluster, "three") == gpus(cluster, "two") and len(node.leases()) == 1
    end(cluster, "two", "three")
    until(lambda: not node.leases(), "the end of the lease")


def test_claims_need_the_label_of_the_namespace(cluster: Cluster, driver: None, team: str) -> None:
    apply(cluster, namespace("plain"))

    def refusal(made: dict[str, Any], at: str) -> str:
        made["metadata"]["namespace"] = at
        done = cluster.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(made), check=False)
        return done.stderr

    template = {**claim("x"), "kind": "ResourceClaimTemplate"}
    template["spec"] = {"spec": template["spec"]}
    either = claim("x")
    classes = [{"name": name.partition(".")[0], "deviceClassName": name} for name in ("other", CLASS)]
    either["spec"]["devices"]["requests"] = [{"name": "gpu", "firstAvailable": classes}]
    for made in (claim("x"), template, either):
        said = until(functools.partial(refusal, made, "plain"), "the policy")
        assert "namespace plain may not ask anything of Chandler" in said
        assert refusal(made, "team") == ""
    other = claim("x")
    other["spec"]["devices"]["requests"][0]["exactly"]["deviceClassName"] = "other.example"
    assert refusal(other, "plain") == ""


def test_a_driver_writes_the_slices_of_its_own_node_alone(cluster: Cluster, driver: None) -> None:
    def refusal(node: str, name: str = "gpu.chandler.oci") -> str:
        pool = {"name": node, "generation": 1, "resourceSliceCount": 1}
        made = {
            "apiVersion": "resource.k8s.io/v1",
            "kind": "ResourceSlice",
            "metadata": {"name": "x"},
            "spec": {"driver": name, "nodeName": node, "pool": pool, "devices": []},
        }
        account = ("--as", f"system:serviceaccount:{SYSTEM}:chandler-dra")
        extra = ("--as-user-extra", "authentication.kubernetes.io/node-name=node-1")
        words = ("create", "--dry-run=server", "--validate=false", *account, *extra, "-f", "-")
        done = cluster.kubectl(*words, input=json.dumps(made), check=False)
        assert bool(done.returncode) == bool(done.stderr)
        return done.stderr

    assert refusal("node-1") == ""
    assert "may write the ResourceSlices of the node that it runs on alone" in refusal("node-2")
    assert "may write the ResourceSlices of gpu.chandler.oci alone" in refusal("node-1", "other.example")


def test_parameters_are_checked_and_limits_are_enough(cluster: Cluster, driver: None, team: str) -> None:
    node = cluster.nodes[0]
    apply(cluster, claim("odd", parameters={"colour": "red"}), with_claim("odd", "odd"))

    def events() -> str:
        found = cluster.get("-n", "team", "events", "--field-selector=involvedObject.name=odd")["items"]
        return "\n".join(each["message"] for each in found)

    until(lambda: "it has the unknown parameter colour of gpu.chandler.oci" in events(), "the refusal")
    limited = pod("limited", handler="")
    limited["spec"]["containers"][0]["resources"] = {"limits": {"gpu.chandler.oci/nvidia": "1"}}
    run(cluster, limited)
    assert len(gpus(cluster, "limited")) == 1 and held(node) == 1
