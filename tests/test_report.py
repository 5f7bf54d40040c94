"""How a refusal reaches a person, and the log of edited creates."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from shim import report
from shim.errors import TrustError


def test_a_record_in_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text('{"level":"info"}\n')
    report.report_refusal('the key "x" is wrong', str(log), "json")
    assert capfd.readouterr().err == 'chandler-runtime: the key "x" is wrong\n'
    first, last = log.read_text().splitlines()
    record = json.loads(last)
    assert first == '{"level":"info"}', "the record must be appended"
    assert (record["level"], record["msg"]) == ("error", 'the key "x" is wrong')
    assert len(record["time"]) == 20 and record["time"].endswith("Z")


@pytest.mark.parametrize("form", ["text", ""])
def test_a_record_in_text(tmp_path: Path, form: str) -> None:
    report.report_refusal('it is "wrong"', str(tmp_path / "log"), form)
    line = (tmp_path / "log").read_text()
    assert line.startswith('time="20') and line.endswith(' level=error msg="it is \\"wrong\\""\n')


def test_no_log_was_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report.report_refusal("x", "", "json")
    assert capfd.readouterr().err == "chandler-runtime: x\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("message", ["\ud800", "caf\udce9", "\U0001f600 é", "\0\x1b[31m", "x" * 100_000])
@pytest.mark.parametrize("form", ["json", "text"])
def test_any_message_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], message: str, form: str) -> None:
    report.report_refusal(message, str(tmp_path / "log"), form)
    assert capfd.readouterr().err.startswith("chandler-runtime: ")
    (line,) = (tmp_path / "log").read_text().splitlines()
    if form == "json":
        assert json.loads(line)["level"] == "error"


@pytest.mark.parametrize("name", ["", "directory", "absent/log", "file/log", "fifo", "a\0b"])
def test_a_log_that_cannot_be_written_is_ignored(tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")  # nobody reads: an open that blocked would hang here
    report.report_refusal("x", str(tmp_path / name) if name else "", "json")
    assert capfd.readouterr().err == "chandler-runtime: x\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk() -> None:
    report.append("/dev/full", b"x")


def test_a_closed_stderr_is_ignored(tmp_path: Path) -> None:
    """A closed stderr does not keep the record out of the log."""
    kept = os.dup(2)
    try:
        os.close(2)
        report.report_refusal("x", str(tmp_path / "log"), "json")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert json.loads((tmp_path / "log").read_text())["msg"] == "x"


def test_lines_of_the_log(tmp_path: Path) -> None:
    for n in range(2):
        report.write_log(str(tmp_path / "log"), {"n": n})
    assert [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()] == [{"n": 0}, {"n": 1}]


def test_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import _socket

    sent: list[Any] = []

    class Channel(_socket.socket):
        def sendto(self, data: bytes, to: str) -> int:  # type: ignore[override]
            sent.append((data, to))
            return super().sendto(data, str(tmp_path / "journal"))

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        monkeypatch.setattr(_socket, "socket", Channel)
        report.write_log("journal", {"container": "c"})
        assert journal.recv(1000) == b'PRIORITY=6\nSYSLOG_IDENTIFIER=chandler\nMESSAGE={"container":"c"}\n'
    assert sent[0][1] == "/run/systemd/journal/socket"
    report.write_log("journal", {})  # and one that is not there


# --- Chandler's own log -------------------------------------------------------------------------------------------


def test_our_own_log_is_appended_to(tmp_path: Path) -> None:
    for number in range(2):
        report.write_log(str(tmp_path / "log"), {"number": number})
    assert [json.loads(line)["number"] for line in (tmp_path / "log").read_text().splitlines()] == [0, 1]


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize("trick", ["link", "second name", "fifo", "directory of others", "way of others"])
def test_a_log_where_others_may_write_changes_no_other_file(tmp_path: Path, trick: str) -> None:
    """A user may have write access to the log's directory, as a group may have to /var/log."""
    logs, victim = tmp_path / "way/logs", tmp_path / "victim"
    logs.mkdir(parents=True)
    log = logs / "log"
    victim.write_text("before")
    logs.chmod(0o775)
    if trick == "link":
        log.symlink_to(victim)
    elif trick == "second name":
        os.link(victim, log)
    elif trick == "fifo":
        os.mkfifo(log)
    else:
        os.chown(logs if trick == "directory of others" else logs.parent, 1000, -1)
    report.write_log(str(log), {"a": 1})
    assert victim.read_text() == "before" and not (trick.endswith("others") and log.exists())
    with pytest.raises((OSError, TrustError)):
        os.close(report.open_own(str(log)))
