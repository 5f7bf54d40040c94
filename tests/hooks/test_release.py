"""The poststop hook that ends a lease: only its own lease, and it never makes the container fail."""

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
    """The hook's output; its exit status must always be 0."""
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


def test_only_the_lease_with_the_token_ends(tmp_path: Path) -> None:
    (tmp_path / "leases").write_text(json.dumps(LEASES))
    assert release(str(tmp_path), LEASES[0]["token"]) == ""
    assert Ledger(str(tmp_path)).read() == LEASES[1:], "only the token counts, not the container in the state"
    assert release(str(tmp_path), LEASES[0]["token"]) == "", "a second release must do nothing"


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
def test_an_unreadable_ledger_is_reported(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "leases").write_text(text)
    assert words in release(str(tmp_path), "t")
    assert words in release(str(tmp_path / "absent"), "t") or text


def test_a_wrong_call_is_reported(tmp_path: Path) -> None:
    assert release().startswith("chandler-hook: release: ") and release("a", "b", "c").startswith(
        "chandler-hook: release: "
    )


def test_a_damaged_page_is_reported(tmp_path: Path) -> None:
    """Settings for sharing cannot be restored then, but the lease ends."""
    (tmp_path / "shared").mkdir()
    for text in ("{", "[]", '{"key": "c195:0", "mode": "mps"}'):
        (tmp_path / "shared/GPU-0").write_text(text)
        (tmp_path / "leases.copy").unlink(missing_ok=True)
        (tmp_path / "leases").write_text(json.dumps([{**LEASES[0], **SHARED}]))
        said = release(str(tmp_path), LEASES[0]["token"])
        assert Ledger(str(tmp_path)).read() == [] and (said or not (tmp_path / "shared").exists())
