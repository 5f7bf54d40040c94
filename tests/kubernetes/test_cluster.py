"""What a person does with Chandler on a cluster, with kubectl, on Kubernetes' own programs and two nodes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from lab.cluster import Cluster
from lab.containerd import IMAGE
from lab.engine import read
from lab.kubectl import (
    PATIENT,
    RESOURCE,
    SYSTEM,
    apply,
    end,
    given,
    gpus,
    held,
    inside,
    namespace,
    pod,
    rolled_out,
    run,
    together,
    until,
)
from lab.manifests import DIRECTORY, FILES, one

LABEL = "chandler.oci/runtime"
AT_ONCE = "--timeout=55s"  # less than the kubelet gives our pods that wait, if they did not end when they are told to
Files = dict[str, dict[str, str]]


# --- what the tests say to the cluster --------------------------------------------------------------------------------


def deployment(template: dict[str, Any], replicas: int) -> dict[str, Any]:
    metadata = template["metadata"]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"]},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": metadata["labels"]},
            "template": {
                "metadata": {key: metadata[key] for key in ("labels", "annotations")},
                "spec": template["spec"],
            },
        },
    }


def variables(cluster: Cluster, name: str) -> list[str]:
    """Those of the container's own process; what `kubectl exec` starts does not get a request's."""
    return inside(cluster, name, "tr '\\0' '\\n' </proc/1/environ").splitlines()


def container(cluster: Cluster, name: str) -> dict[str, Any]:
    """The status of the pod's container."""
    found: dict[str, Any] = cluster.get("-n", "team", "pod", name)["status"]["containerStatuses"][0]
    return found


def events(cluster: Cluster, name: str) -> str:
    """What `kubectl describe pod` shows of them."""
    found = cluster.get("-n", "team", "events", f"--field-selector=involvedObject.name={name}")["items"]
    return "\n".join(each["message"] for each in found)


def allocatable(cluster: Cluster) -> list[str]:
    """How many GPUs the scheduler can give on each node."""
    return [node["status"]["allocatable"].get(RESOURCE, "0") for node in cluster.get("nodes")["items"]]


def labelled(cluster: Cluster) -> list[str]:
    """The nodes for which a RuntimeClass sends pods."""
    return [node["metadata"]["name"] for node in cluster.get("nodes", "-l", f"{LABEL}=ready")["items"]]


# --- what the cluster has ---------------------------------------------------------------------------------------------


@pytest.fixture
def team(cluster: Cluster) -> Iterator[str]:
    """A namespace that may ask for GPUs. With its last pod, the last lease ends."""
    apply(cluster, namespace("team", "named"))
    yield "team"
    cluster.kubectl("-n", "team", "delete", "deployments,jobs,pods", "--all", PATIENT)
    until(lambda: not any(map(held, cluster.nodes)), "the end of all leases")


@pytest.fixture
def handler(cluster: Cluster, bare: Files) -> None:
    """Chandler as containerd's handler, as README.md says; it stays for the next test."""
    cluster.kubectl("apply", "-k", DIRECTORY)
    rolled_out(cluster, "chandler-installer")
    rolled_out(cluster, "chandler-device-plugin")
    until(lambda: allocatable(cluster) == ["2", "2"], "the kubelets' GPUs")


@pytest.fixture
def plugin(cluster: Cluster, bare: Files) -> Iterator[None]:
    """The NRI plugin on nodes with nothing of Chandler's on them."""
    if labelled(cluster):
        clean_up(cluster)
    cluster.kubectl("apply", *given("namespace.yaml", "config.yaml", "nri.yaml"))
    rolled_out(cluster, "chandler-nri")
    serving(cluster, len(cluster.nodes))
    yield
    cluster.kubectl("delete", *given("nri.yaml"), PATIENT)


def serving(cluster: Cluster, times: int) -> None:
    """Wait until containerd has registered the plugins of that many pods, of those that are there."""

    def count() -> int:
        log = cluster.kubectl("-n", SYSTEM, "logs", "-l", "app.kubernetes.io/name=chandler-nri", "--tail=-1").stdout
        return log.count("serving containerd")

    until(lambda: count() >= times, "serving containerd")


def clean_up(cluster: Cluster) -> None:
    """As cleanup.yaml says."""
    begin_clean_up(cluster)
    end_clean_up(cluster)


def begin_clean_up(cluster: Cluster) -> None:
    cluster.kubectl("delete", *given("installer.yaml"), PATIENT)
    cluster.kubectl("apply", *given("namespace.yaml", "installer-rbac.yaml", "cleanup.yaml"))


def end_clean_up(cluster: Cluster) -> None:
    rolled_out(cluster, "chandler-cleanup")
    cluster.kubectl("delete", *given("cleanup.yaml"), PATIENT)
    cluster.kubectl("delete", "-k", DIRECTORY, "--ignore-not-found", AT_ONCE)


# --- the handler ------------------------------------------------------------------------------------------------------


def test_the_installer_prepares_each_node(cluster: Cluster, handler: None) -> None:
    assert labelled(cluster) == [node.name for node in cluster.nodes]
    for node in cluster.nodes:
        assert "# the administrator's own words" in read(node.root + "/etc/containerd/config.toml")
        ours = read(node.root + "/etc/containerd/conf.d/99-chandler.toml")
        assert 'BinaryName = "/opt/chandler/bin/chandler-runtime"' in ours
        policy = read(node.root + "/etc/chandler/config.d/50-kubernetes.toml")
        assert policy == one("config.yaml", "ConfigMap")["data"]["config.toml"]


def test_admission_answers_in_kubectl(cluster: Cluster, handler: None, team: str) -> None:
    apply(cluster, namespace("plain"))

    def refusal(*objects: dict[str, Any]) -> str:
        done = cluster.kubectl("create", "--dry-run=server", "-f", "-", input=together(*objects), check=False)
        assert bool(done.returncode) == ("denied" in done.stderr), done.stderr
        return done.stderr

    # A policy is in force some moments after it has been applied.
    said = until(lambda: refusal(pod("one", 1, at="plain")), "the policy")
    assert "namespace plain may not ask anything of Chandler" in said
    assert "an administrator can label it chandler.oci/requests=named" in said
    assert "namespace plain may not ask anything" in refusal(deployment(pod("one", 1, at="plain"), 1))
    assert refusal(pod("one", 1)) == refusal(pod("one", at="plain")) == ""
    assert "is labelled chandler.oci/requests=named, which needs to be all" in refusal(pod("one", privileged="true"))
    bind = json.dumps({"storage": [{"type": "bind", "source": "/etc", "target": "/x"}]})
    assert "which needs to be host" in refusal(pod("one", service=bind))
    examples = given(*(name for name in FILES if name.startswith("examples/")))
    cluster.kubectl("create", "--dry-run=server", "-n", team, *examples)
    # The installer's own right. Its role lets it patch a node, but not read one, so no other verb of kubectl can try.
    account = ("--server-side", f"--as=system:serviceaccount:{SYSTEM}:chandler-node")
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1", "labels": {"other": "x"}}}
    done = cluster.kubectl("apply", *account, "-f", "-", input=json.dumps(node), check=False)
    assert "chandler-node may change the node that it runs on alone" in done.stderr


def wide(**gpu: Any) -> dict[str, str]:
    return {"service": json.dumps({"resources": {"gpu": gpu}})}


@pytest.mark.parametrize(
    ("annotations", "limits"),
    [
        ({"resources__gpu__count": "2"}, {"main": {"chandler.oci/nvidia": "2"}}),
        ({"resources__gpu__vendor": "amd"}, {"main": {"chandler.oci/amd": "1"}}),
        (wide(), {"main": {"chandler.oci/nvidia": "1"}}),
        (wide(count=2, vendor="habana", prefer="link"), {"main": {"chandler.oci/gaudi": "2"}}),
        ({"service": "resources:\n  gpu:\n    count: 3\n    vendor: intel\n"}, {"main": {"chandler.oci/intel": "3"}}),
        ({"service__main": wide(count=2)["service"]}, {"main": {"chandler.oci/nvidia": "2"}}),
        ({"service__other": wide(count=2)["service"]}, {}),
        ({"env__A": "b", "resources__memory": "1Gi"}, {}),
        (wide(devices=["0"]), {}),
        (wide(count=1, sharing="mps"), {}),
        (wide(count=1, sharing="exclusive"), {"main": {"chandler.oci/nvidia": "1"}}),
        ({"resources__gpu__mps_priority": "1"}, {}),
    ],
)
def test_an_annotation_becomes_a_limit(
    cluster: Cluster, handler: None, team: str, annotations: dict[str, Any], limits: dict[str, dict[str, str]]
) -> None:
    """Tried with and without limits of its own, and with an init container, which starts first."""

    def admitted(annotations: dict[str, Any], first: bool = False, **resources: Any) -> dict[str, dict[str, str]]:
        """The limits of each container that has any, as the API server has admitted them."""
        asking = pod("one", **annotations)
        asking["spec"]["containers"][0]["resources"] = resources
        if first:
            asking["spec"]["initContainers"] = [{"name": "first", "image": IMAGE}]
        done = cluster.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", input=together(asking))
        spec = json.loads(done.stdout)["spec"]
        found = {each["name"]: each["resources"] for each in [*spec.get("initContainers", ()), *spec["containers"]]}
        for each in found.values():
            assert each.get("requests", {}).items() >= each.get("limits", {}).items()
        return {name: each["limits"] for name, each in found.items() if "limits" in each}

    until(lambda: admitted(wide()), "the policy")
    assert admitted(annotations) == limits
    with_cpu = admitted(annotations, limits={"cpu": "1"}, requests={"memory": "1Mi"})
    assert with_cpu == {"main": {"cpu": "1", **limits.get("main", {})}}
    mine = {"chandler.oci/nvidia": "7"}
    assert admitted(annotations, limits=mine) == {"main": mine}
    starts_first = "main" if "service__main" in annotations else "first"
    assert admitted(annotations, first=True) == ({starts_first: limits["main"]} if limits else {})


def test_a_pod_opens_its_own_gpu_alone(cluster: Cluster, handler: None, team: str) -> None:
    node, other = cluster.nodes
    run(cluster, pod("one", 1, env__A="b"), pod("two", 1), pod("plain"))
    first, second = gpus(cluster, "one"), gpus(cluster, "two")
    assert sorted(first + second) == ["nvidia0", "nvidia1"] and "A=b" in variables(cluster, "one")
    assert gpus(cluster, "plain") == [] and (held(node), held(other)) == (2, 0)
    numbers = inside(cluster, "two", f"stat -c '%t %T' /dev/{second[0]}").split()
    script = f"mknod /tmp/gpu c {' '.join(str(int(number, 16)) for number in numbers)}; : </tmp/gpu"
    assert "Operation not permitted" in inside(cluster, "one", script, check=False)
    # The GPU of a pod that has ended is the next pod's.
    end(cluster, "one")
    until(lambda: held(node) == 1, "the end of the lease")
    run(cluster, pod("three", 1))
    assert gpus(cluster, "three") == first


def test_the_containers_of_a_pod_share_its_gpus(cluster: Cluster, handler: None, team: str) -> None:
    """The pod's document is one lease, for init, main, sidecar and debug containers, as long as there is the pod."""
    node = cluster.nodes[0]
    one = pod("one", 1)
    sees = "ls /dev | grep '^nvidia[0-9]' >/shared/init; : </dev/$(cat /shared/init)"
    mounts = [{"name": "shared", "mountPath": "/shared"}]
    main = {**one["spec"]["containers"][0], "volumeMounts": mounts}
    init = {"name": "first", "image": IMAGE, "command": ["sh", "-c", sees], "volumeMounts": mounts}
    one["spec"].update(
        initContainers=[init], containers=[main, {**main, "name": "side"}], volumes=[{"name": "shared", "emptyDir": {}}]
    )
    run(cluster, one, pod("two", 1))
    (gpu,) = gpus(cluster, "one")
    assert inside(cluster, "one", "cat /shared/init").split() == [gpu]
    script = "cd /dev; ls | grep '^nvidia[0-9]' && : <$(ls | grep '^nvidia[0-9]')"
    assert cluster.kubectl("-n", "team", "exec", "one", "-c", "side", "--", "sh", "-c", script).stdout.split() == [gpu]
    assert held(node) == 2 and gpus(cluster, "two") != [gpu]
    debug = ("debug", "one", f"--image={IMAGE}", "--image-pull-policy=IfNotPresent", "--container=debugger", "--quiet")
    cluster.kubectl("-n", "team", *debug, "--", "sh", "-c", f"{script}; sleep 3600")

    def debugger() -> str:
        return cluster.kubectl("-n", "team", "logs", "one", "-c", "debugger", check=False).stdout.strip()

    until(lambda: debugger() == gpu, "the debug container's GPU")
    # The pod keeps its GPU while its containers restart, although another pod waits for one.
    apply(cluster, pod("three", 1))
    statuses = cluster.get("-n", "team", "pod", "one")["status"]
    for each in [*statuses["containerStatuses"], *statuses["ephemeralContainerStatuses"]]:
        node.ctr("tasks", "kill", "--signal", "KILL", each["containerID"].rpartition("/")[2])
    until(lambda: container(cluster, "one")["restartCount"] and container(cluster, "one")["ready"], "the restart")
    assert gpus(cluster, "one") == [gpu]
    end(cluster, "one")
    cluster.kubectl("-n", "team", "wait", "--for=condition=Ready", "pod/three", PATIENT)
    assert gpus(cluster, "three") == [gpu]


def test_a_refusal_is_an_event_of_the_pod(cluster: Cluster, handler: None, team: str) -> None:
    """The ConfigMap turns leases on."""
    apply(cluster, pod("seven", resources__gpu__devices="7"))
    until(lambda: "nvidia.com/gpu=7" in events(cluster, "seven"), "the refusal")


def test_pods_outlive_kubelet_containerd_and_device_plugin(cluster: Cluster, handler: None, team: str) -> None:
    """All killed at once: nothing is leaked, and nothing is given twice."""
    node = cluster.nodes[0]
    run(cluster, pod("one", 1))
    before, leases = gpus(cluster, "one"), node.leases()

    def pids() -> list[str]:
        return [node.services.pid(name) for name in node.services.names]

    killed = pids()
    selector = ("-l", "app.kubernetes.io/name=chandler-device-plugin", f"--field-selector=spec.nodeName={node.name}")
    (device_plugin,) = cluster.get("-n", SYSTEM, "pods", *selector)["items"]
    (status,) = device_plugin["status"]["containerStatuses"]
    node.ctr("tasks", "kill", "--signal", "KILL", status["containerID"].rpartition("/")[2])
    node.services.systemctl("kill", "--signal=KILL", *node.services.names)
    until(lambda: not {"0", *killed} & set(pids()), "another kubelet and containerd")
    until(lambda: inside(cluster, "one", "echo lives", check=False) == "lives\n", "exec")
    assert gpus(cluster, "one") == before and node.leases() == leases
    assert container(cluster, "one")["restartCount"] == 0
    rolled_out(cluster, "chandler-device-plugin")
    until(lambda: allocatable(cluster) == ["2", "2"], "the kubelets' GPUs")
    run(cluster, pod("two", 1))
    assert gpus(cluster, "two") != before and held(node) == 2
    end(cluster, "one", "two")
    until(lambda: held(node) == 0, "the end of the leases")


def test_an_update_disturbs_no_pod(cluster: Cluster, newer: str, handler: None, team: str) -> None:
    node = cluster.nodes[0]
    cluster.load_tree("registry.example/chandler-node:9", newer)
    run(cluster, pod("one", 1))
    before, version = gpus(cluster, "one"), os.readlink(node.root + "/opt/chandler/bin")
    cluster.kubectl("-n", SYSTEM, "set", "image", "daemonset/chandler-installer", "*=registry.example/chandler-node:9")
    rolled_out(cluster, "chandler-installer")
    for each in cluster.nodes:
        assert os.readlink(each.root + "/opt/chandler/bin") != version
        assert "chandler 9." in each.run("/opt/chandler/bin/chandler", "--version").stdout
    assert gpus(cluster, "one") == before and container(cluster, "one")["restartCount"] == 0
    # The old version's pods end with the new one's hook.
    end(cluster, "one")
    until(lambda: held(node) == 0, "the end of the lease")
    run(cluster, pod("two", 2))


def test_a_pod_for_which_there_is_no_gpu_is_pending(cluster: Cluster, handler: None, team: str) -> None:
    apply(cluster, deployment(pod("trainer", limit=1), 3))
    cluster.kubectl("-n", "team", "wait", "--for=jsonpath={.status.readyReplicas}=2", "deployment/trainer", PATIENT)

    def third() -> dict[str, Any] | None:
        """The condition PodScheduled of the pod that is not ready, once the scheduler has seen it."""
        for each in cluster.get("-n", "team", "pods", "-l", "app=trainer")["items"]:
            conditions = {condition["type"]: condition for condition in each["status"].get("conditions", ())}
            if conditions.get("Ready", {"status": "False"})["status"] == "False" and "PodScheduled" in conditions:
                found: dict[str, Any] = conditions["PodScheduled"]
                return found
        return None

    scheduled = until(third, "the scheduler's word about the third pod")
    assert scheduled["status"] == "False" and f"Insufficient {RESOURCE}" in scheduled["message"]


def test_pods_go_where_gpus_are(cluster: Cluster, handler: None, team: str) -> None:
    """By annotation alone: two nodes with two GPUs each, and a fifth pod that waits for one of four to end."""
    pods = [pod(f"any-{number}", 1) for number in range(5)]
    for each in pods:
        del each["spec"]["nodeSelector"]
    run(cluster, *pods[:4])
    assert list(map(held, cluster.nodes)) == [2, 2]
    apply(cluster, pods[4])

    def waits() -> bool:
        conditions = cluster.get("-n", "team", "pod", "any-4")["status"].get("conditions", ())
        return any(f"Insufficient {RESOURCE}" in each.get("message", "") for each in conditions)

    until(waits, "the scheduler's word")
    end(cluster, "any-2")
    cluster.kubectl("-n", "team", "wait", "--for=condition=Ready", "pod/any-4", PATIENT)
    assert list(map(held, cluster.nodes)) == [2, 2]


def test_a_job_larger_than_the_node_completes(cluster: Cluster, handler: None, team: str) -> None:
    """Its pods wait for GPUs and never fail, so its backoffLimit of zero ends nothing."""
    template = pod("work", 1)
    template["spec"]["containers"][0]["command"] = ["sh", "-c", "ls /dev | grep '^nvidia[0-9]'; sleep 1"]
    template["spec"]["restartPolicy"] = "Never"
    metadata = {key: template["metadata"][key] for key in ("labels", "annotations")}
    spec: dict[str, Any] = {"completions": 6, "parallelism": 6, "backoffLimit": 0}
    spec["template"] = {"metadata": metadata, "spec": template["spec"]}
    apply(
        cluster,
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "work", "namespace": "team"}, "spec": spec},
    )
    cluster.kubectl("-n", "team", "wait", "--for=condition=Complete", "job/work", PATIENT)
    status = cluster.get("-n", "team", "job", "work")["status"]
    assert (status["succeeded"], status.get("failed", 0)) == (6, 0)
    printed = cluster.kubectl("-n", "team", "logs", "-l", "app=work", "--tail=-1").stdout.split()
    assert len(printed) == 6 and set(printed) == {"nvidia0", "nvidia1"}


def test_the_clean_up_waits_for_pods_and_leaves_nothing(
    cluster: Cluster, bare: Files, handler: None, team: str
) -> None:
    node = cluster.nodes[0]
    run(cluster, pod("one", 1), pod("plain"))
    ids = [container(cluster, name)["containerID"].rpartition("/")[2] for name in ("one", "plain")]
    begin_clean_up(cluster)

    def waits() -> str:
        selector = ("-l", "app.kubernetes.io/name=chandler-cleanup", "-c", "cleanup")
        return cluster.kubectl("-n", SYSTEM, "logs", *selector, check=False).stdout

    until(lambda: all(each in waits() for each in ids), "a message about the containers")
    assert labelled(cluster) == [], "the label must go first"
    # A container of a pod that is there can still be started again.
    node.ctr("tasks", "kill", "--signal", "KILL", ids[0])
    until(lambda: container(cluster, "one")["restartCount"] and container(cluster, "one")["ready"], "the restart")
    assert len(gpus(cluster, "one")) == 1
    end(cluster, "one", "plain")
    end_clean_up(cluster)
    for each in cluster.nodes:
        assert each.files() == bare[each.name]
        assert not os.path.exists(each.root + "/opt/chandler") and not os.path.exists(each.root + "/run/chandler")


# --- the NRI plugin ---------------------------------------------------------------------------------------------------


def test_the_plugin_serves_pods_of_any_handler(cluster: Cluster, bare: Files, plugin: None, team: str) -> None:
    node = cluster.nodes[0]
    run(cluster, pod("one", 1, handler="", env__A="b"))
    first = gpus(cluster, "one")
    assert len(first) == 1 and "A=b" in variables(cluster, "one") and held(node) == 1
    apply(cluster, pod("seven", 7, handler=""))
    until(lambda: "nvidia.com/gpu" in events(cluster, "seven"), "the refusal")
    # Another plugin knows the leases of the one before, and hears of a container's end.
    cluster.kubectl("-n", SYSTEM, "delete", "pod", "-l", "app.kubernetes.io/name=chandler-nri", PATIENT)
    rolled_out(cluster, "chandler-nri")
    serving(cluster, len(cluster.nodes))
    run(cluster, pod("two", 1, handler=""))
    assert sorted(first + gpus(cluster, "two")) == ["nvidia0", "nvidia1"]
    end(cluster, "one")
    until(lambda: held(node) == 1, "the end of the lease")
    assert node.files() == bare[node.name], "nothing on the node but in /run"


def test_the_scheduler_counts_gpus_of_nri_pods(cluster: Cluster, plugin: None, team: str) -> None:
    cluster.kubectl("apply", *given("admission.yaml", "mutation.yaml", "device-plugin.yaml"))
    rolled_out(cluster, "chandler-device-plugin")
    until(lambda: allocatable(cluster) == ["2", "2"], "the kubelets' GPUs")
    apply(cluster, deployment(pod("trainer", 1, handler=""), 3))
    cluster.kubectl("-n", "team", "wait", "--for=jsonpath={.status.readyReplicas}=2", "deployment/trainer", PATIENT)
    names = [each["metadata"]["name"] for each in cluster.get("-n", "team", "pods", "-l", "app=trainer")["items"]]
    phases = [each["status"]["phase"] for each in cluster.get("-n", "team", "pods", "-l", "app=trainer")["items"]]
    assert sorted(phases) == ["Pending", "Running", "Running"]
    running = [name for name, phase in zip(names, phases) if phase == "Running"]
    assert sorted(gpu for name in running for gpu in gpus(cluster, name)) == ["nvidia0", "nvidia1"]
    # The plugin, killed and restarted, still knows what the kubelet has allocated.
    cluster.kubectl("-n", SYSTEM, "delete", "pod", "-l", "app.kubernetes.io/name=chandler-device-plugin", PATIENT)
    rolled_out(cluster, "chandler-device-plugin")
    until(lambda: allocatable(cluster) == ["2", "2"], "the kubelets' GPUs")
    end(cluster, running[0])
    cluster.kubectl("-n", "team", "wait", "--for=jsonpath={.status.readyReplicas}=2", "deployment/trainer", PATIENT)
    cluster.kubectl("delete", *given("device-plugin.yaml", "mutation.yaml", "admission.yaml"), PATIENT)
