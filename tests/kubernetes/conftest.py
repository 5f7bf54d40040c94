"""The node image's files, built once, and a cluster, started once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from lab import REPOSITORY, kubenode
from lab import cluster as kubernetes
from lab.workdir import within


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


@pytest.fixture(scope="session")
def cluster(
    lab: str, tree: str, needs_mounts: None, needs_devices: None, needs_kmsg: None
) -> Iterator[kubernetes.Cluster]:
    """Two nodes with two GPUs each, and nothing of Chandler's yet but the image."""
    if reason := kubernetes.missing():
        pytest.skip(reason)
    with within(lab) as workdir:
        made = kubernetes.Cluster(workdir)
        try:
            made.start(tree)
            yield made
        finally:
            made.close()


@pytest.fixture(scope="session")
def bare(cluster: kubernetes.Cluster) -> dict[str, dict[str, str]]:
    """By node, the files in which it differs from this machine before anything of Chandler's is installed."""
    return {node.name: node.files() for node in cluster.nodes}
