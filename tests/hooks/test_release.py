"""The poststop hook that ends a lease: its own alone, and never a failure of the container's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lab.hook_world import ENVIRONMENT, HOOK

from shim.state import ledger
from shim.state.ledger import Ledger

LEASES: list[dict[str, Any]] = [
    {**ledger.nri_lease(name, "pod", 1_700_000_000), "names": [f"gpu={n}"], "keys": [f"c195:{n}"]}
    for n, name in enumerate("ab")
]

SHARED = {"mode": "mps", "uid": 0, "words": ", uid 0"}


def release(*words: str, env: dict[str, str] | None = None) -> str:
    """What it says; it must end well whatever it says."""
    done = subprocess.run(
        [HOOK, "release", *words],
        input='{"id": "b", "status": "stopped"}',
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=60,
        env=env or ENVIRONMENT,
    )
    assert done.returncode == 0 and done.stdout == ""
    return done.stderr


def test_by_its_token_alone(tmp_path: Path) -> None:
    (tmp_path / "leases").write_text(json.dumps(LEASES))
    assert release(str(tmp_path), LEASES[0]["token"]) == ""
    assert Ledger(str(tmp_path)).read() == LEASES[1:], "though the state says that b has ended"
    assert release(str(tmp_path), LEASES[0]["token"]) == "", "once more is once"


def test_where_the_interpreter_s_own_modules_are_broken(tmp_path: Path) -> None:
    (tmp_path / "leases").write_text(json.dumps(LEASES))
    for name in ("site", "sitecustomize", "json", "os"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    env = {
        **ENVIRONMENT,
        "PYTHONPATH": str(tmp_path),
        "PYTHONHOME": "/nowhere",
        "PYTHONSTARTUP": str(tmp_path / "site.py"),
    }
    assert release(str(tmp_path), LEASES[0]["token"], env=env) == ""
    assert Ledger(str(tmp_path)).read() == LEASES[1:]


@pytest.mark.parametrize(("text", "words"), [("{", "is damaged"), ("[1]", "is damaged"), (None, "")])
def test_what_cannot_be_read_is_said(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "leases").write_text(text)
    assert words in release(str(tmp_path), "t")
    assert words in release(str(tmp_path / "absent"), "t") or text


def test_a_wrong_call_is_said(tmp_path: Path) -> None:
    assert release().startswith("chandler-hook: release: ") and release("a", "b", "c").startswith(
        "chandler-hook: release: "
    )


def test_a_page_that_is_damaged_is_said(tmp_path: Path) -> None:
    """What was set up for sharing cannot be put back; the lease has ended all the same."""
    (tmp_path / "shared").mkdir()
    for text in ("{", "[]", '{"key": "c195:0", "mode": "mps"}'):
        (tmp_path / "shared/GPU-0").write_text(text)
        (tmp_path / "leases.copy").unlink(missing_ok=True)
        (tmp_path / "leases").write_text(json.dumps([{**LEASES[0], **SHARED}]))
        said = release(str(tmp_path), LEASES[0]["token"])
        assert Ledger(str(tmp_path)).read() == [] and (said or not (tmp_path / "shared").exists())
