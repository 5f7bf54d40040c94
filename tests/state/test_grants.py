"""Grant records: contents, names, and when they are removed."""

from __future__ import annotations

import ast
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from shim.errors import TrustError
from shim.host import kernel
from shim.state import grants, leases, records, stale


def record(root: str, container: str) -> Any:
    return {"id": container, "root": root, "devices": ["nvidia.com/gpu=0"], "before": "b", "after": "a"}


def test_write_and_remove(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    grants.write(state, record("/run/runc", "c"))
    path = grants.record_path(state, "/run/runc", "c")
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    assert len(found.pop("checksum")) == 64 and found == record("/run/runc", "c") == records.read(
        state, "/run/runc", "c"
    )
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(grants.directory(state)) == [os.path.basename(path)], "no temporary file"
    grants.write(state, record("/run/runc", "c") | {"after": "x"})
    assert len(os.listdir(grants.directory(state))) == 1
    grants.remove(state, "/run/runc", "c")
    assert os.listdir(grants.directory(state)) == []
    grants.remove(state, "/run/runc", "c")


def test_every_container_of_every_root_has_its_own_record(tmp_path: Path) -> None:
    names = {
        grants.record_path("/s", root, container)
        for root in ("/run/runc", "/run/crun", "")
        for container in ("c", "C", "c.json", "..", "../c", "a/b", "c\udce9", "x" * 250, "x" * 251, "é")
    }
    assert len(names) == 30
    for name in names:
        directory, _, base = name.rpartition("/")
        assert directory == "/s/grants" and len(base) < 255 and base.isascii() and base.endswith(".json")


@pytest.mark.parametrize("container", ["c", "..", "a/b", "x" * 300, "caf\udce9"])
def test_long_and_unsafe_ids(tmp_path: Path, container: str) -> None:
    grants.write(str(tmp_path), record("/run/runc", container))
    assert len(os.listdir(tmp_path / "grants")) == 1
    grants.remove(str(tmp_path), "/run/runc", container)
    assert os.listdir(tmp_path) == ["grants"] and os.listdir(tmp_path / "grants") == []


def test_a_state_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrustError, match="is not a directory"):
        grants.write(str(tmp_path / "file"), record("/run/runc", "c"))


def test_a_state_directory_is_the_caller_s_own(tmp_path: Path) -> None:
    state = tmp_path / "state"
    grants.write(str(state), record("/run/runc", "c"), private=True)
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    state.chmod(0o777)
    with pytest.raises(TrustError, match="can be written by others"):
        grants.write(str(state), record("/run/runc", "d"))
    assert os.listdir(state / "grants") == os.listdir(state / "grants")[:1]


def test_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, root = str(tmp_path / "state"), str(tmp_path / "root")
    os.makedirs(root + "/alive")
    for container in ("alive", "gone", "odd/id"):
        grants.write(state, record(root, container))
    assert stale.prune(state, 3600) == [], "a young record must stay"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 4000)
    assert sorted(stale.prune(state, 3600)) == ["gone", "odd/id"]
    assert os.path.exists(grants.record_path(state, root, "alive"))
    assert len(os.listdir(state + "/grants")) == 1
    assert stale.prune(str(tmp_path / "absent"), 0) == []


def test_a_record_stays_while_podman_may_restore_its_container(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    (tmp_path / "checkpoint").mkdir()
    for engine in ("podman", "docker", "other"):
        grants.write(
            state, record("/nowhere", engine) | {"engine": engine, "token": "t", "config": f"{tmp_path}/config.json"}
        )
        records.forget(state, "/nowhere", engine, "t")
    assert [found and found["id"] for _, found in records.every(state)] == ["podman"] and stale.prune(state, -1) == []
    (tmp_path / "checkpoint").rmdir()
    assert stale.prune(state, -1) == ["podman"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"{}", b'{"root": "/x"}', b"\xff", b'{"root": 1, "id": "a"}', b"x" * ((1 << 20) + 1)],
)
def test_damaged_records_do_not_stop_the_others(tmp_path: Path, content: bytes) -> None:
    grants.write(str(tmp_path), record("/nowhere", "gone"))
    (tmp_path / "grants/00-damaged.json").write_bytes(content)
    (tmp_path / "grants/directory.json").mkdir()
    os.mkfifo(tmp_path / "grants/fifo.json")
    assert "gone" in stale.prune(str(tmp_path), -1)


def test_every_member_of_a_record_is_checked() -> None:
    """The types for mypy, and the table by which records are checked, have the same keys."""
    keys: set[str] = set()
    for module in (kernel, leases, grants):
        with open(str(module.__file__), encoding="utf-8") as file:
            classes = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.ClassDef)]
        for found in classes:
            if found.name in ("Creation", "Started", "Particulars", "_Shared", "GrantRecord"):
                keys.update(ast.unparse(item.target) for item in found.body if isinstance(item, ast.AnnAssign))
    assert keys == records.MEMBERS.keys()
