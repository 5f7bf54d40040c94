"""The packages, built once for all tests of this directory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lab import REPOSITORY


def build(kind: str, out: Path, **environment: str) -> Path:
    """The package that packaging/build-deb or build-rpm makes."""
    tool = {"deb": "dh", "rpm": "rpmbuild"}[kind]
    if not shutil.which(tool):
        pytest.skip(f"not installed: {tool}")
    done = subprocess.run(
        [f"{REPOSITORY}/packaging/build-{kind}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(out), "OUT": str(out), **environment},
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.glob(f"*.{kind}")
    return made


@pytest.fixture(scope="session")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("deb", tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="session")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("rpm", tmp_path_factory.mktemp("rpm"))
