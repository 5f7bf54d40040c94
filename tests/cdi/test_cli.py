"""`chandler cdi`."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from shim.cli.main import main
from shim.host import trust

GPUS = """cdiVersion: 0.5.0
kind: v.com/gpu
containerEdits:
  env: [COMMON=1]
devices:
- {name: "0", containerEdits: {deviceNodes: [{path: /dev/null}]}}
- {name: GPU-a, containerEdits: {deviceNodes: [{path: /dev/null}]}}
- {name: "1", containerEdits: {deviceNodes: [{path: /dev/zero}], mounts: [{hostPath: /nowhere/x, containerPath: /x}]}}
- {name: all, containerEdits: {deviceNodes: [{path: /dev/null}, {path: /dev/zero}]}}
"""


@pytest.fixture
def specs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    # Other tests cover trust; pytest's directories may be below one that anybody may write.
    monkeypatch.setattr(trust, "check_path", lambda path, owners: trust.path_steps(path))
    monkeypatch.setattr(trust, "check_trust", lambda *args, **kwargs: None)
    directory = tmp_path / "cdi"
    directory.mkdir()
    (directory / "gpus.yaml").write_text(GPUS)
    return directory


def run(*arguments: Any) -> int:
    return main(["cdi", *map(str, arguments)])


def test_list_shows_names_of_the_same_hardware(specs: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--spec-dir", specs) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [
        "DEVICE",
        *(f"v.com/gpu={n}" for n in ("0", "GPU-a", "1", "all")),
    ]
    assert "same as GPU-a" in out
    assert "several devices" in out
    assert err == ""


def test_list_as_json_with_a_conflict_a_shadow_and_a_bad_file(
    specs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    above = tmp_path / "above"
    above.mkdir()
    one = GPUS.splitlines()[:3]
    (above / "x.yaml").write_text(
        "\n".join(
            [*one[:2], 'devices: [{name: "0", containerEdits: {env: [A=1]}}, {name: z, containerEdits: {env: [A=1]}}]']
        )
    )
    (above / "y.yaml").write_text("\n".join([*one[:2], "devices: [{name: z, containerEdits: {env: [A=1]}}]"]))
    (above / "bad.yaml").write_text("kind: [")
    assert run("list", "--spec-dir", specs, "--spec-dir", above, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    (zero,) = [device for device in found["devices"] if device["name"] == "v.com/gpu=0"]
    assert (zero["file"], zero["shadows"]) == (str(above / "x.yaml"), [str(specs / "gpus.yaml")])
    assert found["conflicts"] == {"v.com/gpu=z": [str(above / "x.yaml"), str(above / "y.yaml")]}
    assert set(found["problems"]) == {str(above / name) for name in ("bad.yaml", "x.yaml", "y.yaml")}
    assert run("list", "--spec-dir", specs, "--spec-dir", above) == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert "v.com/gpu=z cannot be used" in err[0]
    assert f"{above}/bad.yaml: line " in err[1]


def test_dirs(specs: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (specs / "bad.json").write_text("{")
    assert run("dirs", "--spec-dir", "/nowhere", "--spec-dir", specs, "--format", "json") == 0
    nowhere, here = json.loads(capsys.readouterr().out)["directories"]
    assert (nowhere["path"], nowhere["priority"], nowhere["state"]) == ("/nowhere", 0, "does not exist")
    assert (here["files"], here["unusable"]) == ([str(specs / "gpus.yaml")], [str(specs / "bad.json")])
    assert run("dirs", "--spec-dir", specs) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split() == [str(specs), "0", "1", "1"]
    assert "bad.json" in err


def test_show(specs: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "v.com/gpu=1", "--spec-dir", specs, "--format", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(edit["kind"], edit["key"]) for edit in found["edits"]] == [
        ("env", "COMMON"),
        ("device", "/dev/zero"),
        ("mount", "/x"),
    ]
    assert found["physical"] == ["c1:5"]
    assert "/nowhere/x" in found["stale"][0]
    assert run("show", "v.com/gpu=0", "--spec-dir", specs) == 0
    out = capsys.readouterr().out
    assert "also v.com/gpu=GPU-a" in out
    assert "COMMON" in out


def test_show_of_an_unknown_name_is_one_sentence(specs: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "v.com/gpu=10", "--spec-dir", specs) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"unresolvable CDI devices v.com/gpu=10 (read {specs}); the nearest known: v.com/gpu=1" in err


def test_validate_shows_every_problem(specs: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = specs / "bad.yaml"
    bad.write_text("cdiVersion: 0.3.0\nkind: v/c\nfoo: 1\ndevices: [{name: 0}]\n")
    broken = specs / "broken.yaml"
    broken.write_text("a: 1\na: 2\n")
    assert run("validate", specs / "gpus.yaml") == 0
    assert capsys.readouterr().out == f"{specs}/gpus.yaml: valid\n"
    assert run("validate", specs / "gpus.yaml", bad, broken, specs / "none.yaml") == 1
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in out[:4]] == ["valid", "foo", "cdiVersion", "devices[0].containerEdits"]
    assert out[4] == f'{broken}: line 2: key "a" comes twice'
    assert out[5].startswith(f"{specs}/none.yaml: ")
    assert run("validate", "--format", "json", broken) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {"file": str(broken), "problems": [{"place": "line 2", "problem": 'key "a" comes twice'}]}


def test_inject(specs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"process": {"env": ["A=1"]}, "unknown": 1.50}')
    assert run("inject", "--spec-dir", specs, "--config", config, "--", "v.com/gpu=0") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["process"]["env"] == ["A=1", "COMMON=1"]
    assert result["linux"]["devices"][0]["path"] == "/dev/null"
    assert "1.50" in out
    assert err == ""
    output = tmp_path / "out.json"
    assert run("inject", "--spec-dir", specs, "--config", config, "--output", output, "v.com/gpu=0") == 0
    assert json.loads(output.read_text()) == result
    assert json.loads(config.read_text()) == {"process": {"env": ["A=1"]}, "unknown": 1.5}


def test_inject_warns_of_missing_devices(
    specs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert run("inject", "--spec-dir", specs, "--config", config, "v.com/gpu=1") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["mounts"] == [{"destination": "/x", "source": "/nowhere/x"}]
    assert f"{specs}/gpus.yaml" in err
    assert "/nowhere/x" in err


@pytest.mark.parametrize("text", ["[]", "{", "", "nope"])
def test_inject_changes_nothing_on_error(
    text: str, specs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text)
    assert run("inject", "--spec-dir", specs, "--config", config, "--output", config, "v.com/gpu=0") == 1
    assert config.read_text() == text
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_inject_of_an_unknown_device_writes_nothing(
    specs: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert (
        run("inject", "--spec-dir", specs, "--config", config, "--output", tmp_path / "o", "v.com/gpu=0", "gpu=9", "x")
        == 1
    )
    assert "unresolvable CDI devices gpu=9, x" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert run("inject", "--spec-dir", specs, "--config", tmp_path / "none", "v.com/gpu=0") == 1


def test_migrate(specs: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = specs / "new.yaml"
    path.write_text(GPUS.replace("0.5.0", "1.1.0"))
    assert run("migrate", path) == 0
    lowest = json.loads(capsys.readouterr().out)
    assert lowest["cdiVersion"] == "0.5.0"
    assert lowest["devices"][0] == {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}}
    assert run("migrate", path, "--to", "v0.8.0") == 0
    assert json.loads(capsys.readouterr().out) == {**lowest, "cdiVersion": "0.8.0"}
    for version, sentence in (("0.4.0", "needs 0.5.0"), ("7", "unknown CDI version"), ("0.1.0", "unknown CDI version")):
        assert run("migrate", path, "--to", version) == 1
        assert sentence in capsys.readouterr().err
