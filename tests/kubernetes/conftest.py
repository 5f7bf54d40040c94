"""The node image's files, built once."""
from __future__ import annotations

import os

import pytest
from lab import kubenode


@pytest.fixture(scope="session")
def tree(lab: str) -> str:
    if not os.path.exists("/usr/bin/patchelf"):
        pytest.skip("not installed: patchelf")
    return kubenode.build(os.path.join(lab, "node-image"))
