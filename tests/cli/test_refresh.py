"""`chandler refresh` compiles what the next create needs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from lab import partial
from lab.local_node import Node, cdi

from shim.cli import main, refresh
from shim.node import inventory
from shim.state import grants


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(tmp_path, monkeypatch)
    made.later()
    monkeypatch.setattr(refresh, "Account", lambda _: made.account())
    return made


def test_refresh(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.spec("x.json", cdi(2, "x.com/y"))
    assert main.main(["refresh"]) == 0
    assert capsys.readouterr().out == "devices: 6, kinds: 2, old grants forgotten: 0\n"
    assert inventory.load(node.account(), lambda names: pytest.fail()).picks("x.com/y") == ["0", "1"]
    assert main.main(["refresh", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_remove_undoes_refresh(node: Node) -> None:
    def files() -> list[str]:
        return sorted(str(path) for path in node.directory.rglob("*"))

    before = files()
    assert main.main(["refresh", "--quiet"]) == 0
    assert any(path.endswith("/launch") for path in files()) and any(path.endswith("/index") for path in files())
    assert main.main(["refresh", "--remove"]) == 0
    assert files() == before
    assert main.main(["refresh", "--remove"]) == 0


def test_remove_names_containers_that_still_run(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lives", "gone"):
        grants.write(f"{node.directory}/state", partial({"root": f"{node.directory}/root", "id": name}))
    (node.directory / "root/lives").mkdir(parents=True)
    assert main.main(["refresh", "--remove"]) == 1
    err = capsys.readouterr().err
    assert "lives is still there" in err and "gone" not in err


def test_problems_are_named(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.spec("broken.json", "{")
    assert main.main(["refresh", "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"{node.directory}/etc/cdi/broken.json" in err
    assert inventory.load(node.account(), lambda names: pytest.fail()).problems


def test_a_wrong_configuration(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.configure("zzz = 1")
    assert main.main(["refresh"]) == 1
    assert "unknown key 'zzz'" in capsys.readouterr().err


def test_refresh_waits_for_young_sources(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.later(0)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        node.later(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    assert main.main(["refresh", "--quiet"]) == 0
    assert len(waited) == 1 and 0 < waited[0] <= 2.1
    inventory.load(node.account(), lambda names: pytest.fail())


def test_refresh_does_not_wait_long_for_a_source_from_the_future(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock was set back after the file was written."""
    node.later(-100_000)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    main.main(["refresh", "--quiet"])
    assert sum(waited) < 5


def test_old_grants_are_forgotten(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(node.directory / "state")
    grants.write(state, partial({"id": "gone", "root": str(node.directory / "absent")}))
    path = grants.record_path(state, str(node.directory / "absent"), "gone")
    old = time.time() - 7200
    os.utime(path, (old, old))
    assert main.main(["refresh"]) == 0
    assert "old grants forgotten: 1" in capsys.readouterr().out
    assert not os.path.exists(path) and json.dumps(os.listdir(state + "/grants")) == "[]"
