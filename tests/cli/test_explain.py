"""`chandler explain`: what a create would do, without doing it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lab.local_node import CONFIG, NVIDIA, Node, P, service

from shim.cli import explain, main
from shim.node import inventory


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(tmp_path, monkeypatch)
    monkeypatch.setattr(explain, "Account", lambda _: made.account())
    return made


def bundle(node: Node, annotations: dict[str, Any]) -> Path:
    path = node.directory / "bundle/config.json"
    path.write_text(json.dumps({**CONFIG, "annotations": annotations}))
    return path


def ran(node: Node, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main.main(["explain", *(arguments or ("--bundle", str(node.directory / "bundle")))])
    out, err = capsys.readouterr()
    return status, out, err


def test_nothing_is_done(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle(node, service({"resources": {"gpu": {"count": 2}}, "env": {"A": "b"}}))
    before = path.read_bytes()
    status, out, err = ran(node, capsys)
    assert (status, err) == (0, "")
    assert path.read_bytes() == before and os.listdir(path.parent) == ["config.json"]
    assert not (node.directory / "state/grants").exists()
    for words in (
        "asked by    annotation chandler.oci/service",
        f"granted     {NVIDIA}=1  (c195:1)",
        "from annotation chandler.oci/service",
        f"{node.directory}/etc/cdi/nvidia.json {NVIDIA}=0",
        "from vendor table, nvidia.com/gpu",
        "A=b",
        "/dev/nvidia1 (c 195:1, rwm)",
        "CUDA_VISIBLE_DEVICES=0,1",
        '+        "path": "/dev/nvidia0"',
        "note: The environment",
        "note: A later update",
    ):
        assert words in out, words


def test_json(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle(node, service({"resources": {"gpu": {"devices": ["GPU-1"]}, "memory": "1Mi"}}))
    status, out, _ = ran(node, capsys, "--config", str(path), "--format", "json")
    shown = json.loads(out)
    assert status == 0
    assert shown["request"] == {"resources": {"gpu": {"devices": ["GPU-1"]}, "memory": 1 << 20}}
    assert shown["devices"] == [{"name": f"{NVIDIA}=GPU-1", "physical": ["c195:1"]}]
    assert {edit["kind"] for edit in shown["edits"]} == {"env", "resource", "device", "mount", "hook", "annotation"}
    assert all(edit["origin"] and edit["what"] for edit in shown["edits"])
    assert "+++" in shown["diff"] and len(shown["notes"]) == 2


def test_the_diff_is_what_a_create_writes(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    asked = service({"env": {"A": "b"}})
    bundle(node, asked)
    _, out, _ = ran(node, capsys, "--bundle", str(node.directory / "bundle"), "--format", "json")
    added = [
        line[1:].strip().rstrip(",")
        for line in json.loads(out)["diff"].splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    assert '"A=b"' in added and f'"{P}granted": ""' in added


@pytest.mark.parametrize(
    "annotations",
    [
        {},
        {"other": "x"},
        {
            P + "services": '{"side": {}}',
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.container-name": "main",
        },
    ],
)
def test_nothing_asked(node: Node, capsys: pytest.CaptureFixture[str], annotations: dict[str, Any]) -> None:
    bundle(node, annotations)
    assert ran(node, capsys)[:2] == (0, "nothing is asked for: the create goes to the runtime as it is\n")
    assert (
        json.loads(ran(node, capsys, "--bundle", str(node.directory / "bundle"), "--format", "json")[1])["request"]
        is None
    )


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        (service({"x": 1}), "annotation chandler.oci/service: unknown key 'x'"),
        (service({"resources": {"gpu": {"count": 9}}}), "this node has 4"),
        (service({"env": {"LD_PRELOAD": "x"}}), "env.LD_PRELOAD"),
    ],
)
def test_a_refusal_is_that_of_the_create(
    node: Node, capsys: pytest.CaptureFixture[str], annotations: dict[str, Any], words: str
) -> None:
    bundle(node, annotations)
    status, out, err = ran(node, capsys)
    assert (status, out) == (1, "")
    assert err.startswith("chandler: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("text", ['["chandler.oci/"]', '"chandler.oci"', "{chandler.oci", "\udcff chandler.oci"])
def test_a_file_that_is_no_config_json_is_an_error(node: Node, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (node.directory / "bundle/config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    status, out, err = ran(node, capsys)
    assert (status, out) == (1, "") and "config.json" in err


def test_no_bundle(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = ran(node, capsys)
    assert status == 1 and "config.json: No such file" in err


def test_half_a_surrogate_pair_is_refused(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    bundle(node, {P + "service": '{"env": {"A": "\\ud800"}}'})
    status, _, err = ran(node, capsys)
    assert status == 1 and r"'\ud800' is no Unicode text" in err


def test_a_part_of_the_inventory_that_was_lost(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.later()
    bundle(node, service({"resources": {"gpu": {}}}))
    ran(node, capsys)
    directory = Path(node.account().directory)
    inventory.load(node.account(), lambda names: pytest.fail())
    for name in os.listdir(directory):
        if name.endswith(".part"):
            os.unlink(directory / name)
    status, out, _ = ran(node, capsys)
    assert status == 0 and f"granted     {NVIDIA}=0" in out
