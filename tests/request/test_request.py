"""Requests: every key with valid and invalid values, and every form in which a request may come."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shim.errors import RequestError
from shim.jsontext import Number
from shim.keys import common
from shim.request.parse import MAX_ANNOTATIONS, Request, from_annotations, parse_document
from shim.request.schema import check
from shim.request.values import MAX_INT

P = "chandler.oci/"


def parsed(annotations: dict[str, Any], container: str | None = "main") -> Request | None:
    return from_annotations(annotations, P, container)


def service(text: str, container: str | None = "main") -> dict[str, Any]:
    found = parsed({P + "service": text}, container)
    assert found is not None
    return found.document


def refused(annotations: dict[str, Any], container: str | None = "main") -> str:
    with pytest.raises(RequestError) as caught:
        parsed(annotations, container)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the keys -------------------------------------------------------------------------------------------------

RESOURCES: dict[str, list[tuple[Any, Any]]] = {
    "cpu": [("1", 1000), (1, 1000), ("500m", 500), (Number("1.5"), 1500), (Number("1e0"), 1000), ("0.0001", 1)],
    "memory": [("1Gi", 1 << 30), (4096, 4096), ("1", 1), ("1.5Gi", 3 << 29), (Number("1e9"), 10**9)],
    "memory_swap": [("1Gi", 1 << 30), (-1, -1), ("-1", -1), (1, 1)],
    "memory_reservation": [("512Mi", 1 << 29)],
    "cpu_shares": [(2, 2), (262144, 262144)],
    "cpuset": [("0", "0"), ("0-3,8", "0-3,8"), ("0, 2", "0, 2"), ("8191", "8191")],
    "pids_limit": [(1, 1), (-1, -1), (MAX_INT, MAX_INT)],
}
NOT_RESOURCES: dict[str, list[Any]] = {
    "cpu": [
        MAX_INT,
        "9223372036854776",
        0,
        "0",
        "-1",
        -1,
        "",
        None,
        True,
        [],
        {},
        "NaN",
        "inf",
        "1Z",
        "9223372036854775808",
        1 << 64,
        "1e300",
        Number("1e400"),
        Number("-0.5"),
        " 1",
        "x" * 5000,
    ],
    "memory": [0, "0", "-1", -1, "-1Gi", "", None, False, [1], {}, "1TiB", "8Ei", 1 << 63, "lots"],
    "memory_swap": [0, -2, "-2", "", None, True, "8Ei", [], Number("-1.0")],
    "memory_reservation": [0, -1, None, "x"],
    "cpu_shares": [1, 0, -1, 262145, "1024", Number("2.0"), None, True, [], 1 << 70],
    "cpuset": [
        "",
        "a",
        "0-",
        "-1",
        "3-1",
        "0,,1",
        "0,",
        ",",
        "8192",
        "0-99999",
        "0-3:2",
        0,
        None,
        True,
        [0],
        "\u0663",
        "\u00b2",
        "0-\u00b2",
        "0 - 3",
        "0\n-1",
        "9" * 5000,
    ],
    "pids_limit": [-2, "100", Number("100.0"), None, True, [], MAX_INT + 1, 10**30],
}
GPU: dict[str, list[tuple[Any, Any]]] = {
    "count": [(1, 1), (4096, 4096)],
    "vendor": [("nvidia", "nvidia"), ("example.com/gpu", "example.com/gpu")],
    "devices": [
        (["0"], ["0"]),
        ([0, 1], ["0", "1"]),
        (["all"], ["all"]),
        (["GPU-1-2", "nvidia.com/gpu=3"], ["GPU-1-2", "nvidia.com/gpu=3"]),
        (["0:1"], ["0:1"]),
    ],
    "sharing": [("exclusive", "exclusive"), ("mps", "mps"), ("time-slice", "time-slice")],
    "mps_pipe_dir": [("/tmp/nvidia-mps", "/tmp/nvidia-mps")],
    "mps_log_dir": [("/var/log/nvidia-mps", "/var/log/nvidia-mps")],
    "mps_active_thread_percentage": [(1, 1), (100, 100)],
    "mps_pinned_memory": [("1Mi", 1 << 20), ("1.5Gi", 3 << 29)],
    "mps_priority": [(0, 0), (1, 1)],
    "time_slice_index": [(0, 0), (4095, 4095)],
    "time_slicing_config_path": [("/etc/slices.yaml", "/etc/slices.yaml")],
    "time_slice": [("default", "default"), ("long", "long")],
    "prefer": [("numa", "numa"), ("link", "link")],
}
NOT_GPU: dict[str, list[Any]] = {
    "count": [0, -1, 4097, "1", Number("1.0"), None, True, [], {}, 1 << 64],
    "vendor": ["", None, 1, True, [], {}],
    "devices": [
        [],
        "0",
        0,
        None,
        True,
        {},
        [None],
        [True],
        [[]],
        [{}],
        [""],
        [" 0"],
        ["0 "],
        ["a,b"],
        ["a\nb"],
        ["\0"],
        ["\x1b[31m"],
        ["\u202e0"],
        ["\ud800"],
        ["x" * 513],
    ],
    "sharing": ["", "MPS", None, True, 1, ["mps"], {}],
    "mps_pipe_dir": ["", "tmp", "/a/../b", "/a\n", "/\u202e", None, 1, [], "/" + "x" * 1024],
    "mps_log_dir": ["", "tmp", "/a/..", "/\0"],
    "mps_active_thread_percentage": [0, 101, -1, "50", Number("50.0"), None, True, []],
    "mps_pinned_memory": [0, "1Ki", 1048575, "-1Gi", "", None, True, [], "8Ei"],
    "mps_priority": [-1, 2, "0", None, True],
    "time_slice_index": [-1, 4096, "0", None, True, [0]],
    "time_slicing_config_path": ["", "slices.yaml", "/../etc/shadow", None, []],
    "time_slice": ["", "tiny", 0, None, True, ["short"]],
    "prefer": ["", "pci", 0, None, True, ["numa"]],
}


@pytest.mark.parametrize(
    ("key", "value", "normal"), [(key, *case) for key, cases in RESOURCES.items() for case in cases]
)
def test_resources(key: str, value: Any, normal: Any) -> None:
    assert check({"resources": {key: value}}) == {"resources": {key: normal}}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NOT_RESOURCES.items() for value in values])
def test_wrong_resources_are_named(key: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^resources.{key}: "):
        check({"resources": {key: value}})


@pytest.mark.parametrize(("key", "value", "normal"), [(key, *case) for key, cases in GPU.items() for case in cases])
def test_gpu(key: str, value: Any, normal: Any) -> None:
    assert check({"resources": {"gpu": {key: value}}}) == {"resources": {"gpu": {key: normal}}}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NOT_GPU.items() for value in values])
def test_wrong_gpu_is_named(key: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^resources.gpu.{key}: "):
        check({"resources": {"gpu": {key: value}}})


def test_every_key_of_the_table_is_tried() -> None:
    assert set(common.LIMITS) == set(RESOURCES) == set(NOT_RESOURCES)
    assert set(common.GPU) == set(GPU) == set(NOT_GPU)
    assert set(common.ENTRIES) == {"env", "resources"}, "tests/keys/test_reference.py must have the other keys"


def test_env() -> None:
    env = {"A": "", "a.b-c": "x=y\nz", "É": "\u202e"}
    assert check({"env": env}) == {"env": env}


@pytest.mark.parametrize(
    "env",
    [
        None,
        [],
        "A=1",
        1,
        {"": "x"},
        {"A=B": "x"},
        {"A B": "x"},
        {"A\n": "x"},
        {"A\0": "x"},
        {"A": 1},
        {"A": None},
        {"A": True},
        {"A": ["x"]},
        {"A": {}},
        {"A": "\0"},
        {"A": "b\0c"},
        {"A": Number("1.5")},
        {"\ud800": "x"},
    ],
)
def test_wrong_env(env: Any) -> None:
    with pytest.raises(RequestError, match="^env: "):
        check({"env": env})


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"x": 1}, "unknown key 'x'; known here: cap_drop, capabilities, "),
        ({"resources": {"gpus": 1}}, "unknown key 'resources.gpus'; known here: blkio_weight, cpu, "),
        ({"resources": {"gpu": {"model": "A100"}}}, "unknown key 'resources.gpu.model'"),
        ({"resources.gpu": {}}, "unknown key 'resources.gpu'"),
        ({"": 1}, "unknown key ''"),
        ({"Env": {}}, "unknown key 'Env'"),
        ({"resources": None}, "resources: None is not an object"),
        ({"resources": []}, "resources: [] is not an object"),
        ({"resources": {"gpu": 1}}, "resources.gpu: 1 is not an object"),
        ({"resources": {"gpu": None}}, "resources.gpu: None is not an object"),
        (None, "the document: None is not an object"),
        ([1], "the document: [1] is not an object"),
        ("x", "the document: 'x' is not an object"),
    ],
)
def test_what_is_wrong_is_named(document: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        check(document)
    assert str(caught.value).startswith(words)


def test_what_is_shown_of_a_value_is_short() -> None:
    with pytest.raises(RequestError) as caught:
        check({"resources": {"cpuset": ["x" * 100000]}})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), (" 1 , 2", {1, 2}), ("3-3", {3}), ("0-8191", set(range(8192)))],
)
def test_cpus(text: str, numbers: set[int]) -> None:
    assert common.cpus(text) == numbers


# --- where it comes from --------------------------------------------------------------------------------------


def test_no_annotation_is_no_request() -> None:
    assert parsed({}) is None
    assert parsed({"io.kubernetes.cri.container-name": "main", "chandler.ocix/service": "{", "chandler": "x"}) is None


def test_the_whole_document() -> None:
    found = parsed({P + "service": '{"resources": {"gpu": {"count": 2}, "memory": "1Gi"}, "env": {"A": "b"}}'})
    assert found is not None
    assert found.document == {"resources": {"gpu": {"count": 2}, "memory": 1 << 30}, "env": {"A": "b"}}
    assert (found.gpu, found.resources["memory"], found.env) == ({"count": 2}, 1 << 30, {"A": "b"})
    assert found.source == "annotation chandler.oci/service"


def test_an_empty_document_asks_for_nothing() -> None:
    found = parsed({P + "service": "{}"})
    assert found is not None
    assert (found.document, found.gpu, found.resources, found.env) == ({}, None, {}, {})


@pytest.mark.parametrize(
    "text",
    [
        "resources: {gpu: {count: 2}}",
        "resources:\n  gpu:\n    count: 2\n",
        "---\nresources:\n  gpu: {count: 0x2}\n",
        "# words\nresources: {gpu: {count: 2}}",
        "resources: &r\n  gpu: {count: 2}\n",
        '  \n{"resources": {"gpu": {"count": 2}}}\n',
        "resources:\n  gpu:\n    <<: {count: 2}\n",
    ],
)
def test_yaml(text: str) -> None:
    assert service(text) == {"resources": {"gpu": {"count": 2}}}


@pytest.mark.parametrize(
    ("text", "document"),
    [
        ("resources: {cpu: 1.5}", {"resources": {"cpu": 1500}}),
        ("resources: {cpu: 500m, memory: 1.5Gi}", {"resources": {"cpu": 500, "memory": 3 << 29}}),
        ("resources: {cpu: 1e-3}", {"resources": {"cpu": 1}}),
        ("resources: {gpu: {devices: [0, 1]}}", {"resources": {"gpu": {"devices": ["0", "1"]}}}),
        ("resources: {memory_swap: -1}", {"resources": {"memory_swap": -1}}),
        ("env: {A: 'yes', B: \"1\"}", {"env": {"A": "yes", "B": "1"}}),
    ],
)
def test_yaml_values(text: str, document: Any) -> None:
    assert service(text) == document


@pytest.mark.parametrize(
    "text",
    [
        "",
        "~",
        "x",
        "- 1",
        "[1]",
        "1",
        "env: {A: yes}",
        "env: {A: 1}",
        "resources: {cpu: .nan}",
        "resources: {cpu: .inf}",
        "resources: {cpu: -.inf}",
        "env: {A: b, A: c}",
        "env: {? {a: b} : c}",
        "a: b: c",
        "\tenv: {}",
        "env: *x",
        "!!python/object:os.system {}",
        "env: !!python/name:os.system x",
        "&a [*a]",
        "resources: {gpu: {count: 2.0}}",
        "env: {A: !!binary aGk=}",
        "%TAG x",
        "resources: {pids_limit: 1_0.0}",
        "resources: {gpu: {count: yes}}",
        "env: 2001-01-01",
        "\x00",
        "\x07",
        "resources: {cpu: 1e400}",
        "\ufeff",
        "@",
        "`",
        "{env: {}}",
        "{'env': {}}",
        '{"env": {},}',
        '{"env": {}} x',
        '{"env": {}}{}',
        "{",
        "\ud800",
        '{"\ud800": 1}',
    ],
)
def test_damaged_documents(text: str) -> None:
    assert refused({P + "service": text}).startswith("annotation chandler.oci/service")


@pytest.mark.parametrize(
    "text",
    [
        '{"env": {"A": "1", "A": "2"}}',
        '{"env": {}, "env": {}}',
        '{"resources": {"gpu": {"count": 1, "\\u0063ount": 2}}}',
    ],
)
def test_a_key_that_stands_twice(text: str) -> None:
    assert "stands twice" in refused({P + "service": text})


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_invalid_numbers_in_documents(text: str) -> None:
    assert f"{text} is not JSON" in refused({P + "service": '{"resources": {"cpu": ' + text + "}}"})


def nested(depth: int) -> str:
    return '{"env": ' + '{"a": ' * depth + '"x"' + "}" * depth + "}"


@pytest.mark.parametrize(
    "text",
    [
        nested(65),
        nested(500),
        nested(20000),
        '{"a": ' * 30000,
        "[" * 30000,
        "a: " + "[" * 30000,
        "{a: " * 70 + "1" + "}" * 70,
        "- " * 30000,
        "a: " + "{a: " * 70 + "1" + "}" * 70,
        "? " * 30000,
    ],
)
def test_too_deep(text: str) -> None:
    assert len(refused({P + "service": text})) < 400


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)),
        "x: &x " + "y" * 100_000 + "\nz: [" + ",".join(["*x"] * 50_000) + "]",
        "env: &e {A: b}\n<<: [" + ",".join(["*e"] * 40_000) + "]",
        "resources: &r {gpu: &g {count: 1}}\nb: [" + "*r," * 60_000 + "]",
        "a: " + "&a " * 80_000,
        "!!str " * 40_000,
        "k: " + "'" * 200_000,
        "a: |\n" + " \n" * 100_000,
        "\n" * 250_000,
        "- " + "{} " * 80_000,
        "[" + "1," * 120_000 + "]",
        "{" + '"a":1,' * 40_000 + "}",
        '{"env": {"A": "' + "\\u0041" * 40_000 + '"}',
        '{"resources": {"cpu": ' + "9" * 260_000 + "}}",
        "resources: {cpu: " + "9" * 260_000 + "}",
        '{"resources": {"cpuset": "' + "0-8191," * 37_000 + '"}}',
        '{"resources": {"memory": "' + "1" * 260_000 + '"}}',
    ],
)
def test_bombs_are_refused_in_time(text: str) -> None:
    started = time.process_time()
    refused({P + "service": text})
    assert time.process_time() - started < 5


def test_too_large_in_all() -> None:
    half = json.dumps({"env": {"A": "x" * (MAX_ANNOTATIONS // 2)}})
    assert service(half)
    words = refused({P + "service": half, P + "other": half})
    assert f"more than {MAX_ANNOTATIONS}" in words
    assert "more than" in refused({P + "x" * MAX_ANNOTATIONS: "y"})
    assert parsed({"other/" + "x" * MAX_ANNOTATIONS: "y"}) is None, "annotations with another prefix must not count"


# --- single values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "document"),
    [
        ("resources.gpu.count", "2", {"resources": {"gpu": {"count": 2}}}),
        ("resources.gpu.devices", "0, GPU-1,all", {"resources": {"gpu": {"devices": ["0", "GPU-1", "all"]}}}),
        ("resources.gpu.vendor", "amd", {"resources": {"gpu": {"vendor": "amd"}}}),
        ("resources.memory", "1Gi", {"resources": {"memory": 1 << 30}}),
        ("resources.memory_swap", "-1", {"resources": {"memory_swap": -1}}),
        ("resources.memory_reservation", "1k", {"resources": {"memory_reservation": 1000}}),
        ("resources.cpu", "1.5", {"resources": {"cpu": 1500}}),
        ("resources.cpu_shares", "1024", {"resources": {"cpu_shares": 1024}}),
        ("resources.cpuset", "0-3,8", {"resources": {"cpuset": "0-3,8"}}),
        ("resources.pids_limit", "-1", {"resources": {"pids_limit": -1}}),
        ("env.A", "2", {"env": {"A": "2"}}),
        ("env.A.B", "", {"env": {"A.B": ""}}),
        ("env.A", '{"x": 1}', {"env": {"A": '{"x": 1}'}}),
    ],
)
def test_single_values(key: str, text: str, document: Any) -> None:
    found = parsed({P + key: text})
    assert found is not None
    assert found.document == document
    assert found.source == f"annotation {P}{key}"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("", "x"),
        ("x", "1"),
        ("resources", "1"),
        ("resources.gpu", "1"),
        ("resources.gpu.count.x", "1"),
        ("resources.memory.x", "1Gi"),
        ("env", "A=1"),
        ("env.", "x"),
        (".env", "x"),
        ("resources.", "x"),
        ("resources..gpu", "1"),
        ("resources.gpu.", "1"),
        ("Resources.gpu.count", "1"),
        ("env.A=B", "x"),
        ("env.A", "\0"),
        ("resources.gpu.count", ""),
        ("resources.gpu.count", "two"),
        ("resources.gpu.count", "1.0"),
        ("resources.gpu.count", "-"),
        ("resources.gpu.count", "+1"),
        ("resources.gpu.count", " 1"),
        ("resources.gpu.count", "\u0661"),
        ("resources.gpu.count", "\u00b2"),
        ("resources.gpu.count", "9" * 30),
        ("resources.gpu.devices", ""),
        ("resources.gpu.devices", "0,,1"),
        ("resources.cpu_shares", "1e3"),
        ("resources.memory", ""),
        ("resources.cpu", "-1"),
        ("services.x", "{}"),
        ("granted.x", "1"),
    ],
)
def test_wrong_single_values(key: str, text: str) -> None:
    assert P + key in refused({P + key: text})


def test_single_values_and_the_document_together() -> None:
    found = parsed({P + "service": '{"resources": {"cpu": 1}}', P + "resources.gpu.count": "2", P + "env.A": "b"})
    assert found is not None
    assert found.document == {"resources": {"cpu": 1000, "gpu": {"count": 2}}, "env": {"A": "b"}}
    assert found.source == f"annotation {P}service, {P}resources.gpu.count, {P}env.A"


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("document", "key"),
    [
        ({"resources": {"gpu": {"count": 2}}}, "resources.gpu.count"),
        ({"env": {"A": "b"}}, "env.A"),
        ({"env": {"A.B": "b"}}, "env.A.B"),
        ({"resources": {"cpu": None}}, "resources.cpu"),
    ],
)
def test_a_value_that_the_document_sets_too(document: Any, key: str, order: int) -> None:
    annotations = {P + "service": json.dumps(document), P + key: "2"}
    words = refused(dict(list(annotations.items())[::order]))
    assert f"annotation {P}{key}: the document sets {key!r}, too" in words


@pytest.mark.parametrize("value", [None, 1, "x", [], True])
def test_a_value_below_something_that_is_no_object(value: Any) -> None:
    assert refused({P + "service": json.dumps({"resources": value}), P + "resources.cpu": "1"})
    assert refused({P + "service": json.dumps({"env": value}), P + "env.A": "1"})


# --- the containers of a pod ----------------------------------------------------------------------------------

WIDE = {P + "service": '{"env": {"A": "pod"}}'}


@pytest.mark.parametrize(
    ("annotations", "container", "env"),
    [
        ({P + "services": '{"main": {"env": {"A": "1"}}, "side": {"env": {"A": "2"}}}'}, "main", "1"),
        ({P + "services": '{"main": {"env": {"A": "1"}}, "side": {"env": {"A": "2"}}}'}, "side", "2"),
        ({P + "services": "main: {env: {A: '1'}}"}, "main", "1"),
        ({P + "service.main": '{"env": {"A": "1"}}'}, "main", "1"),
        ({**WIDE, P + "service.main": '{"env": {"A": "1"}}'}, "main", "1"),
        ({**WIDE, P + "service.main": '{"env": {"A": "1"}}'}, "side", "pod"),
        ({**WIDE, P + "services": '{"main": {"env": {"A": "1"}}}'}, "main", "1"),
        ({**WIDE, P + "services": '{"main": {"env": {"A": "1"}}}'}, "side", "pod"),
        (
            {**WIDE, P + "services": '{"main": {"env": {"A": "1"}}}', P + "service.side": '{"env": {"A": "2"}}'},
            "side",
            "2",
        ),
        ({**WIDE, P + "service.side": "damaged {"}, "main", "pod"),
        (WIDE, None, "pod"),
    ],
)
def test_own_entries_replace_what_is_pod_wide(annotations: dict[str, Any], container: str | None, env: str) -> None:
    found = parsed(annotations, container)
    assert found is not None
    assert found.document == {"env": {"A": env}}


def test_an_own_entry_does_not_merge() -> None:
    found = parsed({P + "resources.gpu.count": "2", P + "service.main": "{}"})
    assert found is not None
    assert found.document == {}
    assert found.source == f"annotation {P}service.main"


def test_sources_name_the_container() -> None:
    found = parsed({P + "services": '{"main": {}}'})
    assert found is not None
    assert found.source == f"annotation {P}services (main)"


def test_no_entry_for_this_container() -> None:
    assert parsed({P + "services": '{"side": {}}'}) is None
    assert parsed({P + "service.side": "{}"}) is None


@pytest.mark.parametrize(
    "annotations",
    [
        {P + "services": '{"main": {}}', P + "service.main": "{}"},
        {P + "service.main": "{}", P + "services": "main: {}"},
    ],
)
def test_two_forms_for_one_container(annotations: dict[str, Any]) -> None:
    assert "both ask for main" in refused(annotations)


@pytest.mark.parametrize(
    "annotations", [{P + "services": "{}"}, {P + "service.main": "{}"}, {**WIDE, P + "service.other": "{}"}]
)
def test_an_engine_that_does_not_say_which_container(annotations: dict[str, Any]) -> None:
    words = refused(annotations, None)
    assert "does not say which container" in words
    assert f"use the annotation {P}service" in words


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "x",
        "1",
        '"main"',
        "{",
        '{"main": 1}',
        '{"main": null}',
        '{"main": []}',
        '{"main": {"x": 1}}',
        '{"main": {}, "main": {}}',
    ],
)
def test_wrong_maps_of_services(text: str) -> None:
    assert refused({P + "services": text}).startswith(f"annotation {P}services")


@pytest.mark.parametrize("annotations", [{P + "granted": ""}, {P + "granted": "nvidia.com/gpu=0", P + "service": "{}"}])
def test_the_mark_is_reserved(annotations: dict[str, Any]) -> None:
    assert f"annotation {P}granted is Chandler's own mark" in refused(annotations)


@pytest.mark.parametrize("value", [None, 1, True, [], {}, Number("1.5")])
def test_an_annotation_that_is_no_string(value: Any) -> None:
    for key in ("service", "services", "service.main", "resources.cpu", "x"):
        assert f"{P}{key}" in refused({P + key: value})


def test_another_prefix() -> None:
    found = from_annotations({"example.com/service": '{"env": {"A": "b"}}', P + "service": "{"}, "example.com/", None)
    assert found is not None
    assert found.source == "annotation example.com/service"


# --- properties -----------------------------------------------------------------------------------------------


def documents() -> st.SearchStrategy[Any]:
    """Documents in normal form: cpu in thousandths, as the table says, everything else as a person may write it."""
    names = st.text("ABCabc._-", min_size=1, max_size=4)
    positive = st.integers(1, MAX_INT)
    gpu = st.fixed_dictionaries(
        {},
        optional={
            "count": st.integers(1, 4096),
            "vendor": st.sampled_from(["nvidia", "a.com/b"]),
            "devices": st.lists(st.sampled_from(["0", "all", "GPU-1", "a.com/b=c"]), min_size=1),
        },
    )
    resources = st.fixed_dictionaries(
        {},
        optional={
            "cpu": st.integers(1, 10**9),
            "memory": positive,
            "memory_swap": st.one_of(st.just(-1), positive),
            "memory_reservation": positive,
            "cpu_shares": st.integers(2, 262144),
            "cpuset": st.sampled_from(["0", "0-3,8"]),
            "pids_limit": st.one_of(st.just(-1), positive),
            "gpu": gpu,
        },
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "env": st.dictionaries(
                names, st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]))
            ),
            "resources": resources,
        },
    )


def written(document: Any) -> Any:
    """A normal form as a person would write it: thousandths of a CPU with the suffix m."""
    document = copy.deepcopy(document)
    if "cpu" in document.get("resources", {}):
        document["resources"]["cpu"] = f"{document['resources']['cpu']}m"
    return document


@given(documents())
def test_a_normal_form_gives_itself(document: Any) -> None:
    text = written(document)
    before = copy.deepcopy(text)
    assert check(text) == document
    assert text == before, "the input is not changed"
    assert service(json.dumps(text)) == document


@given(documents())
@settings(max_examples=50)
def test_yaml_means_the_same_as_json(document: Any) -> None:
    """JSON is YAML except for some escapes; after a document marker it is read as YAML."""
    document["env"] = {"A": "b", "C.d": 'é " \\ \n'}
    assert parse_document("--- " + json.dumps(written(document))) == parse_document(json.dumps(written(document)))


KEYS = [
    "service",
    "services",
    "service.main",
    "service.side",
    "granted",
    "resources.gpu.count",
    "resources.memory",
    "env.A",
    "env",
    "resources",
    "",
]
TEXTS = [
    "{}",
    "{",
    '{"main": {}}',
    '{"env": {"A": "b"}}',
    '{"resources": {"gpu": {"count": 1}}}',
    "1",
    "1Gi",
    "main: {}",
    "- 1",
    "a: *b",
    "",
    "\0",
    "\ud800",
    "\u00b2",
]


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(KEYS), st.text(max_size=5)),
        st.one_of(st.sampled_from(TEXTS), st.text(max_size=20), st.none(), st.integers()),
        max_size=4,
    ),
    st.one_of(st.none(), st.just("main"), st.text(max_size=3)),
)
@example({"service": "1e\u00b2"}, None)
@settings(max_examples=400)
def test_any_annotations_give_a_request_or_a_request_error(annotations: dict[str, Any], container: str | None) -> None:
    annotations = {P + key: value for key, value in annotations.items()}
    before = copy.deepcopy(annotations)
    try:
        found = parsed(annotations, container)
    except RequestError as error:
        assert str(error)
    else:
        assert found is None or isinstance(found.document, dict)
    assert annotations == before


@given(st.text(st.sampled_from("{}[]:,-'\"&*!|>%@`#? \n\tabA1.0<~\\\x00\u2028\ud800")))
@settings(max_examples=400)
def test_any_text_is_a_document_or_a_request_error(text: str) -> None:
    try:
        parse_document(text)
    except RequestError as error:
        assert str(error)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.builds(Number, st.sampled_from(["1.5", "-1e5", "1e999"])),
)
json_like = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "env",
                    "resources",
                    "gpu",
                    "cpu",
                    "memory",
                    "count",
                    "devices",
                    "vendor",
                    "cpuset",
                    "pids_limit",
                    "memory_swap",
                    "x",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=10,
)


@given(json_like)
@settings(max_examples=400)
def test_any_value_is_a_document_or_a_request_error(value: Any) -> None:
    try:
        assert isinstance(check(value), dict)
    except RequestError as error:
        assert str(error)
