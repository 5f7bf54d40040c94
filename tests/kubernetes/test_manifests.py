"""Every manifest against Kubernetes' own schemas, without unknown keys, and our further requirements on pods."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
from lab.manifests import DIRECTORY, FILES, documents, one, pod_spec

from shim import paths
from shim.gpu import vendors
from shim.node import config
from shim.request import parse

kubernetes_validate = pytest.importorskip("kubernetes_validate")

# The oldest with ValidatingAdmissionPolicy v1, and the newest that the package has.
VERSIONS = ("1.30", "1.37")
OBJECTS = [(name, number) for name in FILES if name != "kustomization.yaml" for number in range(len(documents(name)))]
PODS = [
    (name, manifest["metadata"]["name"])
    for name in FILES
    for manifest in documents(name)
    if manifest["kind"] in ("Pod", "Deployment", "DaemonSet")
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name, number", [each for each in OBJECTS if each[0] != "mutation.yaml"])
def test_every_manifest_is_valid_by_kubernetes_schemas(name: str, number: int, version: str) -> None:
    if name == "dra.yaml" and version == VERSIONS[0]:
        version = "1.34"  # the first with resource.k8s.io/v1
    kubernetes_validate.validate(documents(name)[number], version, strict=True)


def test_the_mutation_is_valid_by_kubernetes_schemas() -> None:
    """It needs an API that Kubernetes 1.30 does not have; test_cluster.py has the API server's own word."""
    for manifest in documents("mutation.yaml"):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


BROKEN: dict[str, Callable[[Any], Any]] = {
    "an unknown key": lambda pod: pod["containers"][0].update(comand=["x"]),
    "a key at the wrong place": lambda pod: pod["containers"][0].update(hostPID=True),
    "a wrong type": lambda pod: pod.update(terminationGracePeriodSeconds="10"),
    "a missing key": lambda pod: pod["containers"][0].pop("name"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_manifest_is_noticed(damage: str) -> None:
    manifest = copy.deepcopy(one("installer.yaml", "DaemonSet"))
    BROKEN[damage](pod_spec(manifest))
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name, called", PODS)
def test_images_and_limits(name: str, called: str) -> None:
    manifest = next(each for each in documents(name) if each["metadata"]["name"] == called and "spec" in each)
    pod = pod_spec(manifest)
    for container in pod["containers"] + pod.get("initContainers", []):
        assert re.fullmatch(r"[a-z0-9./-]+:[0-9][0-9.]*", container["image"]), "an image with a version"
        assert "memory" in container["resources"]["limits"]
    if manifest["kind"] != "Pod":
        assert (
            manifest["spec"]["selector"]["matchLabels"].items()
            <= manifest["spec"]["template"]["metadata"]["labels"].items()
        )


@pytest.mark.parametrize("name", ["installer.yaml", "cleanup.yaml", "nri.yaml", "device-plugin.yaml", "dra.yaml"])
def test_our_own_pods_have_no_more_rights_than_they_say(name: str) -> None:
    pod = pod_spec(one(name, "DaemonSet"))
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert (
        pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        and pod["automountServiceAccountToken"] is False
    )
    for container in pod["containers"] + pod.get("initContainers", []):
        context = container["securityContext"]
        assert (
            "privileged" not in context
            and context["allowPrivilegeEscalation"] is False
            and context["readOnlyRootFilesystem"] is True
        )
        assert context["capabilities"]["drop"] == ["ALL"]
        assert set(context["capabilities"].get("add", ())) <= {"SYS_CHROOT", "DAC_OVERRIDE", "DAC_READ_SEARCH"}
        assert container["image"] == f"registry.example/chandler-node:{paths.VERSION}"
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= {
            volume["name"] for volume in pod["volumes"]
        }
        writable = {mount["mountPath"] for mount in container.get("volumeMounts", ()) if not mount.get("readOnly")}
        kubelet = {f"/var/lib/kubelet/{name}" for name in ("device-plugins", "plugins_registry")}
        assert writable <= {"/host", "/run/chandler", "/run/cdi", "/var/lib/chandler"} | kubelet
        # The kubelet mounts a file there, and no runtime can make the place for it below a mount that is read-only.
        log = container.get("terminationMessagePath", "/dev/termination-log")
        assert not any(
            log.startswith(mount["mountPath"].rstrip("/") + "/")
            for mount in container.get("volumeMounts", ())
            if mount.get("readOnly")
        )
        # What holds mounts of the node's lets go of them when the node does.
        assert all(
            mount.get("mountPropagation") == "HostToContainer"
            for mount in container.get("volumeMounts", ())
            if mount["mountPath"] in ("/host", "/run", "/usr")
        )
    if name not in ("nri.yaml", "device-plugin.yaml", "dra.yaml"):  # what stays has no rights at all
        (kept,) = pod["containers"]
        assert kept["securityContext"]["runAsNonRoot"] and "volumeMounts" not in kept and kept["args"] == ["wait"]


def test_names_agree_between_manifests() -> None:
    (kustomization,) = documents("kustomization.yaml")
    assert all(os.path.exists(os.path.join(DIRECTORY, name)) for name in kustomization["resources"])
    assert kustomization["images"][0]["newTag"] == paths.VERSION
    handlers = [each["handler"] for each in documents("runtimeclass.yaml")]
    assert handlers == ["chandler", "chandler-youki", "chandler-crun"]
    account = one("installer-rbac.yaml", "ServiceAccount")["metadata"]
    binding = one("installer-rbac.yaml", "ClusterRoleBinding")
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]
    policy = one("admission.yaml", "ValidatingAdmissionPolicy", "chandler-node-label")
    assert (
        f"system:serviceaccount:{account['namespace']}:{account['name']}"
        in policy["spec"]["matchConditions"][0]["expression"]
    )
    for name in ("installer.yaml", "cleanup.yaml"):
        assert pod_spec(one(name, "DaemonSet"))["serviceAccountName"] == account["name"]
    policies = {
        each["metadata"]["name"] for each in documents("admission.yaml") if each["kind"] == "ValidatingAdmissionPolicy"
    }
    assert {
        each["spec"]["policyName"]
        for each in documents("admission.yaml")
        if each["kind"] == "ValidatingAdmissionPolicyBinding"
    } == policies


def test_the_policy_is_a_configuration() -> None:
    text = one("config.yaml", "ConfigMap")["data"]["config.toml"]
    assert config.compile_config([("config.toml", text.encode())])["gpu.allocator"] == "leases"
    # and so is the text in the comments
    rule = text[text.index("#[[policy.rule]]") :].replace("#", "")
    assert config.compile_config([("config.toml", rule.encode())])["policy.rule"][0]["name"] == "training"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("examples/")])
def test_each_example_asks_for_something(name: str) -> None:
    (manifest,) = documents(name)
    metadata = manifest["metadata"] if manifest["kind"] == "Pod" else manifest["spec"]["template"]["metadata"]
    resources = {"chandler.oci/" + vendor.name for vendor in vendors.with_gpus()}
    for container in pod_spec(manifest)["containers"]:
        asked = parse.from_annotations(metadata.get("annotations", {}), "chandler.oci/", container["name"])
        assert resources & container["resources"]["limits"].keys() or asked is not None and asked.gpu is not None
    assert pod_spec(manifest)["runtimeClassName"] == "chandler"


def test_the_containerfile_installs_what_the_build_needs() -> None:
    with open(os.path.join(DIRECTORY, "Containerfile"), encoding="utf-8") as file:
        words = set(file.read().split())
    with open(os.path.join(DIRECTORY, "build.py"), encoding="utf-8") as file:
        assert set(re.findall(r'"(python3-[a-z]+)"', file.read())) | {"python3", "patchelf"} <= words
