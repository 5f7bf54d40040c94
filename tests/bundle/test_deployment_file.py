"""Deployment files: which keys belong to a service, which to an orchestrator, and which are errors."""

from __future__ import annotations

import pytest

from shim.bundle import deployment
from shim.errors import RequestError
from shim.keys import common, table
from shim.request import schema

ONE = """
version: v1
deployment: test
services:
  web:
    rtype: service
    image: {name: test:latest}
    env: {A: b}
    resources: {cpu: 0.5, memory: 512Mi}
    endpoints: [{name: http, protocol: http, port: 8080}]
"""


def test_a_service() -> None:
    found = deployment.service(ONE, "d.yaml", "web")
    assert found.deployment == "test" and found.name == "web" and found.source == "d.yaml: service web"
    assert found.document == {"env": {"A": "b"}, "resources": {"cpu": 0.5, "memory": "512Mi"}}
    assert found.ignored == ["services.web.rtype", "services.web.image", "services.web.endpoints"]
    assert schema.check(found.document) == {"env": {"A": "b"}, "resources": {"cpu": 500, "memory": 512 << 20}}


def test_the_only_service_needs_no_name() -> None:
    assert deployment.service(ONE, "d.yaml", "").name == "web"
    assert deployment.service('{"services": {"a": {}}}', "d.yaml", "").document == {}


@pytest.mark.parametrize(
    "key",
    [
        "depends",
        "dns",
        "endpoints",
        "errors",
        "extra_hosts",
        "health",
        "init",
        "logs",
        "network",
        "node_mode",
        "node_selector",
        "replicas",
        "restart_policy",
        "scale",
        "schedule",
        "service_type",
        "wasm",
    ],
)
def test_keys_for_an_orchestrator_are_ignored(key: str) -> None:
    found = deployment.service(f"services: {{a: {{{key}: [1, {{b: c}}]}}}}", "d.yaml", "a")
    assert found.document == {} and found.ignored == [f"services.a.{key}"]
    assert key not in common.ENTRIES and key not in table.ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "d.yaml is empty"),
        ("[]", "d.yaml is not an object"),
        ("7", "d.yaml is not an object"),
        ("a: [", "d.yaml: line"),
        ("services: {a: {}}\nservices: {a: {}}", "d.yaml: line"),
        ("version: v2\nservices: {a: {}}", "version: 'v2'"),
        ("deployment: 7\nservices: {a: {}}", "deployment: 7 is not a string"),
        ("version: v1", "services is empty"),
        ("services: []", "services is not an object"),
        ("services: {b: {}}", "no service 'a'; it has b"),
        ("services: {}", "no service 'a'; it has none"),
        ("services: {a: {}}\nsrvices: {}", "unknown key 'srvices'"),
        ("services: {a: {imgae: {}}}", "d.yaml: service a: unknown key 'imgae'"),
        ("services: {a: 7}", "service a is not an object"),
        ("services: {a: null}", "service a is empty"),
        ("services: {a: {env: {}, env: {}}}", "d.yaml: line"),
    ],
)
def test_invalid_files(text: str, message: str) -> None:
    with pytest.raises(RequestError) as failed:
        deployment.service(text, "d.yaml", "a")
    assert message in str(failed.value)


def test_several_services_need_a_choice() -> None:
    with pytest.raises(RequestError, match="several services; it has a, b; choose one with --service"):
        deployment.service("services: {a: {}, b: {}}", "d.yaml", "")
