"""The node image's files, built once."""

from __future__ import annotations

import os
import shutil

import pytest
from lab import REPOSITORY, kubenode


@pytest.fixture(scope="session")
def tree(lab: str) -> str:
    if not os.path.exists("/usr/bin/patchelf"):
        pytest.skip("not installed: patchelf")
    return kubenode.build(os.path.join(lab, "node-image"))


@pytest.fixture(scope="session")
def newer(lab: str) -> str:
    """The image of another version."""
    checkout = os.path.join(lab, "checkout")
    for name in ("shim", "hooks", "packaging", "systemd"):
        shutil.copytree(
            os.path.join(REPOSITORY, name), os.path.join(checkout, name), ignore=shutil.ignore_patterns("__pycache__")
        )
    with open(os.path.join(checkout, "shim/paths.py"), "r+", encoding="utf-8") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace('VERSION = "', 'VERSION = "9.'))
    return kubenode.build(os.path.join(lab, "newer-image"), checkout)
