"""The `chandler` command: errors are one sentence and a status."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

import pytest

from shim import paths
from shim.cli import main
from shim.errors import HostError


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run(_: Any) -> NoReturn:
        raise error

    parser = argparse.ArgumentParser()
    parser.set_defaults(run=run)
    monkeypatch.setattr(main, "parser", lambda: parser)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (HostError("it is\nwrong", "mend it"), 1, "chandler: it is wrong; mend it\n"),
        (FileNotFoundError(2, "No such file or directory", "/x"), 1, "chandler: /x: No such file or directory\n"),
        (OSError(28, "No space left on device"), 1, "chandler: : No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, message: str
) -> None:
    failing(monkeypatch, error)
    assert main.main([]) == status
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["explain"],
        ["explain", "--bundle", "a", "--config", "b"],
        ["explain", "--format", "xml", "--bundle", "a"],
        ["--nonsense"],
    ],
)
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 2 and "usage: chandler" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"chandler {paths.VERSION}\n"


@pytest.mark.parametrize("command", ["explain", "refresh", "cdi"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main([command, "--help"])
    assert ended.value.code == 0 and f"usage: chandler {command}" in capsys.readouterr().out


def test_an_option_is_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    """--runtime would match --runtime-arg, and the runtime would get a word that it does not know."""
    with pytest.raises(SystemExit):
        main.main(["bundle", "run", "--spec", "f", "--runtime", "runc", "b"])
    assert "unrecognized arguments: --runtime" in capsys.readouterr().err
