"""The admission policies, evaluated by CEL's own implementation, on objects as the API server shows them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lab.manifests import FILES, documents, one

from shim.keys import common
from shim.keys.row import DANGEROUS, HOST, NAMED, TIGHTEN
from shim.policy.classes import known_words

cel = pytest.importorskip("cel_expr_python.cel")

ENVIRONMENT = cel.NewEnv(
    variables={name: cel.Type.DYN for name in ("object", "oldObject", "namespaceObject", "request", "variables")}
)


class Policy:
    """A policy as the API server runs it: variables in order, then every validation; an error counts as a refusal."""

    def __init__(self, name: str) -> None:
        spec = one("admission.yaml", "ValidatingAdmissionPolicy", name)["spec"]
        self.rules = spec["matchConstraints"]["resourceRules"]
        self.conditions = [ENVIRONMENT.compile(each["expression"]) for each in spec.get("matchConditions", ())]
        self.variables = [(each["name"], ENVIRONMENT.compile(each["expression"])) for each in spec["variables"]]
        self.validations = [
            (
                ENVIRONMENT.compile(each["expression"]),
                each.get("message"),
                ENVIRONMENT.compile(each["messageExpression"]) if "messageExpression" in each else None,
            )
            for each in spec["validations"]
        ]

    def refusal(self, new: Any, old: Any = None, namespace: Any = None, request: Any = None) -> str:
        """What it says against an object; nothing where it allows it."""
        data = {
            "object": new,
            "oldObject": old,
            "namespaceObject": namespace,
            "request": request or {},
            "variables": {},
        }
        if not all(evaluated(condition, data) for condition in self.conditions):
            return ""
        for name, expression in self.variables:
            data["variables"][name] = evaluated(expression, data)
        for expression, message, worded in self.validations:
            if evaluated(expression, data) is not True:
                return str(evaluated(worded, data)) if worded is not None else str(message)
        return ""


def evaluated(expression: Any, data: dict[str, Any]) -> Any:
    result = expression.eval(data=data)
    assert result.type() != cel.Type.ERROR, result.value()
    return result.plain_value()


REQUESTS = Policy("chandler-requests")
LABEL = Policy("chandler-node-label")


def namespace(level: str = "") -> dict[str, Any]:
    return {
        "metadata": {
            "name": "team",
            "labels": {"kubernetes.io/metadata.name": "team", **({"chandler.oci/requests": level} if level else {})},
        }
    }


def pod(annotations: dict[str, str] | None) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", **({} if annotations is None else {"annotations": annotations})},
        "spec": {"containers": [{"name": "main"}]},
    }


def document(**keys: Any) -> dict[str, str]:
    return {"chandler.oci/service": json.dumps(keys)}


GPU = {"chandler.oci/resources.gpu.count": "2"}
# Request: the lowest level that allows it.
ASKED: dict[str, tuple[str, dict[str, str]]] = {
    "a count": ("named", GPU),
    "a document": (
        "named",
        document(
            resources={"gpu": {"devices": ["0", "GPU-1"], "sharing": "mps"}, "memory": "1Gi"},
            env={"USER": "x", "A": "/tmp"},
        ),
    ),
    "documents by container": (
        "named",
        {"chandler.oci/services": '{"main": {"env": {"A": "b"}}, "side": {"resources": {"gpu": {}}}}'},
    ),
    "a document of one container": ("named", {"chandler.oci/service.main": "env: {A: b}"}),
    "tmpfs": ("named", document(storage=[{"type": "tmpfs", "target": "/scratch"}])),
    "a command": ("named", {"chandler.oci/command.args": "a,b", "chandler.oci/hostname": "h"}),
    "tightening": ("named", {"chandler.oci/cap_drop": "ALL", "chandler.oci/read_only_root_fs": "true"}),
    "a word that counts in a value, too": (
        "host",
        document(resources={"gpu": {"devices": ["0"]}}, env={"A": "/dev/x"}),
    ),
    "such a word in the dotted form": (
        "named",
        {"chandler.oci/resources.gpu.devices": "0", "chandler.oci/env.A": "/dev/x privileged \\"},
    ),
    "a variable of the host": ("host", {"chandler.oci/env.TOKEN": "$E:TOKEN"}),
    "a secret in a document": ("host", document(env={"TOKEN": "$S:token"})),
    "a bind": ("host", document(storage=[{"type": "bind", "source": "/data", "target": "/data"}])),
    "a volume": ("host", document(storage=[{"type": "named", "name": "v", "target": "/data"}])),
    "a device": ("host", document(devices=["/dev/fuse"])),
    "a device in YAML": ("host", {"chandler.oci/service": "devices:\n- path: '/dev/fuse'\n"}),
    "limits of processes": ("host", {"chandler.oci/ulimits.nofile": "1024:4096"}),
    "a daemon's directory": ("host", {"chandler.oci/resources.gpu.mps_pipe_dir": "/tmp/x"}),
    "a daemon's directory in a document": ("host", document(resources={"gpu": {"mps_pipe_dir": "/tmp/x"}})),
    "a control group": ("host", {"chandler.oci/service": "{cgroup_parent: x.slice}"}),
    "privileged": ("all", {"chandler.oci/privileged": "true"}),
    "privileged in a document": ("all", document(privileged=True)),
    "privileged by container": ("all", {"chandler.oci/services": '{"main": {"privileged": true}}'}),
    "privileged in YAML": ("all", {"chandler.oci/service": "? 'privileged'\n: true"}),
    "privileged, hidden": ("all", {"chandler.oci/service": '{"privile\\u0067ed": true}'}),
    "a user": ("all", {"chandler.oci/user": "0"}),
    "a key that is unknown": ("all", {"chandler.oci/hooks": "x"}),
}
LEVELS = ("", "named", "host", "all")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("asked", ASKED)
def test_the_label_of_a_namespace_decides_what_its_pods_may_ask(asked: str, level: str) -> None:
    least, annotations = ASKED[asked]
    refusal = REQUESTS.refusal(pod(annotations), namespace=namespace(level))
    assert bool(refusal) == (LEVELS.index(level) < LEVELS.index(least)), refusal
    if refusal:
        assert any(key in refusal for key in annotations) and "team" in refusal
        assert refusal.endswith(f"needs to be {least}" if level else "chandler.oci/requests=named")


WORDS = {word: trust for word, trust in known_words().items() if word not in ("gpu", "gpu.all", "env", "resources")}


@pytest.mark.parametrize("word", WORDS)
def test_the_classes_are_those_of_the_nodes_policy(word: str) -> None:
    """In both forms. A class that changes in the node's policy has to change here, too."""
    path = word.replace("gpu.", "resources.gpu.").split(".")
    least = {TIGHTEN: "named", NAMED: "named", HOST: "host", DANGEROUS: "all"}[WORDS[word]]
    if common.OWN_WORD in common.GPU.get(path[-1], ()):
        least = "host"  # a path of the host
    if path[0] == "storage":
        values = [{"type": kind, "source": "/x", "target": "/x"} for kind in (path[1:] or ["bind"])]
        forms = [document(storage=values)]
    elif word in ("env.host", "env.secrets"):
        reference = {"env.host": "$E:X", "env.secrets": "$S:x"}[word]
        forms = [document(env={"A": reference}), {"chandler.oci/env.A": reference}]
    else:
        value: Any = ["/dev/x"] if word == "devices" else "x"
        inner: Any = value
        for key in reversed(path):
            inner = {key: inner}
        forms = [document(**inner)]
        forms.append(
            {
                "chandler.oci/"
                + ".".join(path)
                + (
                    ".x" if word in ("command", "ulimits", "sysctls", "gpu.distributed", "resources.hugepages") else ""
                ): "x"
            }
        )
    for form in forms:
        allowed = [level for level in LEVELS if not REQUESTS.refusal(pod(form), namespace=namespace(level))]
        assert allowed == list(LEVELS[LEVELS.index(least) :]), form


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("annotations", [None, {}, {"prometheus.io/scrape": "true", "chandler.ocix/y": "z"}])
def test_pods_without_a_request_are_allowed(annotations: dict[str, str] | None, level: str) -> None:
    assert REQUESTS.refusal(pod(annotations), namespace=namespace(level)) == ""
    assert REQUESTS.refusal(pod(annotations), namespace={"metadata": {"name": "bare"}}) == ""


def test_an_unknown_level_allows_nothing() -> None:
    assert REQUESTS.refusal(pod(GPU), namespace=namespace("most")) and REQUESTS.refusal(
        pod(GPU), namespace=namespace("Named")
    )


def test_nobody_may_set_chandlers_mark() -> None:
    assert "remove it" in REQUESTS.refusal(pod({"chandler.oci/granted": "all"}), namespace=namespace("all"))


def test_an_update_is_judged_by_what_it_changes() -> None:
    bare, labelled = namespace(), namespace("named")
    assert REQUESTS.refusal(pod(GPU), pod(GPU), bare) == "", "a change of the status, or of another annotation"
    assert REQUESTS.refusal(pod({}), pod(GPU), bare) == "", "an annotation was removed"
    assert REQUESTS.refusal(pod(GPU), pod({}), bare)
    assert REQUESTS.refusal(pod(GPU), pod(None), bare)
    assert REQUESTS.refusal(pod({**GPU, "chandler.oci/privileged": "true"}), pod(GPU), labelled)
    assert REQUESTS.refusal(pod(document(user="0")), pod(document(env={})), labelled)


def test_templates_and_bindings() -> None:
    """What a person sees who applies a Deployment, and other ways to set a pod's annotations."""
    template = {"metadata": {"annotations": GPU}, "spec": {"containers": []}}
    deployment = {"kind": "Deployment", "metadata": {"name": "d"}, "spec": {"template": template}}
    job = {
        "kind": "CronJob",
        "metadata": {"name": "c", "annotations": {}},
        "spec": {"jobTemplate": {"spec": {"template": template}}},
    }
    binding = {
        "kind": "Binding",
        "metadata": {"name": "p", "annotations": GPU},
        "target": {"kind": "Node", "name": "n"},
    }
    for manifest in (deployment, job, binding):
        assert REQUESTS.refusal(manifest, namespace=namespace())
        assert REQUESTS.refusal(manifest, namespace=namespace("named")) == ""
        assert REQUESTS.refusal(manifest, manifest, namespace()) == ""
    bare = {"kind": "Deployment", "metadata": {"name": "d", "annotations": GPU}, "spec": {"template": {"spec": {}}}}
    assert REQUESTS.refusal(bare, namespace=namespace()) == "", (
        "an annotation of the Deployment itself asks for nothing"
    )


def test_every_kind_of_object_with_pod_annotations_is_matched() -> None:
    matched = {
        (group, resource)
        for rule in REQUESTS.rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        if rule["operations"] == ["CREATE", "UPDATE"]
    }
    assert {
        ("", "pods"),
        ("", "pods/status"),
        ("", "pods/binding"),
        ("", "bindings"),
        ("", "pods/resize"),
        ("", "pods/ephemeralcontainers"),
        ("apps", "deployments"),
        ("apps", "replicasets"),
        ("apps", "statefulsets"),
        ("apps", "daemonsets"),
        ("batch", "jobs"),
        ("batch", "cronjobs"),
        ("", "replicationcontrollers"),
    } == matched


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("examples/")])
def test_the_examples_need_the_first_label(name: str) -> None:
    (manifest,) = documents(name)
    refusal = REQUESTS.refusal(manifest, namespace=namespace())
    assert "may not ask anything of Chandler" in refusal
    assert ("resources.limits chandler.oci/nvidia" in refusal) == (name == "examples/limits.yaml")
    assert REQUESTS.refusal(manifest, manifest, namespace()) == "", "what is there already is left alone"
    assert REQUESTS.refusal(manifest, namespace=namespace("named")) == ""


# --- the installer's right to label its node --------------------------------------------------------------------------

INSTALLER = {
    "username": "system:serviceaccount:chandler-system:chandler-node",
    "extra": {"authentication.kubernetes.io/node-name": ["n1"]},
}


def node(name: str = "n1", labels: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/os": "linux", **(labels or {})}, **more},
        "spec": {"podCIDR": "10.0.0.0/24"},
    }


READY = {"chandler.oci/runtime": "ready"}


def test_the_installer_labels_its_own_node_and_no_more() -> None:
    by = {"userInfo": INSTALLER}
    assert LABEL.refusal(node(labels=READY), node(), request=by) == ""
    assert LABEL.refusal(node(), node(labels=READY), request=by) == ""
    assert "alone" in LABEL.refusal(node("n2", READY), node("n2"), request=by)
    assert "alone" in LABEL.refusal(
        node(labels=READY), node(), request={"userInfo": {"username": INSTALLER["username"]}}
    )
    for changed in (
        node(labels={"other": "x"}),
        node(labels={"kubernetes.io/os": "windows"}),
        node(annotations={"a": "b"}),
        {**node(), "spec": {"unschedulable": True}},
        node(finalizers=["x"]),
    ):
        assert "alone" in LABEL.refusal(changed, node(), request=by)
    fewer = node()
    fewer["metadata"]["labels"].clear()
    assert "alone" in LABEL.refusal(fewer, node(), request=by)


def test_the_label_policy_allows_other_users_and_other_labels() -> None:
    assert LABEL.refusal(node(labels={"other": "x"}), node(), request={"userInfo": {"username": "admin"}}) == ""
