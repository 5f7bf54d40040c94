"""A request in YAML, whose library the create path finds whether the inventory is compiled already or not."""

from __future__ import annotations

import os

import pytest
from lab import bundle, runtimes
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node

YAML = "resources:\n  gpu: {count: 1}\nenv:\n  A: b\n"


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_a_request_in_yaml(runtime: runtimes.Runtime, node: Node, workdir: str, warm: bool) -> None:
    installation = Installation(os.path.join(workdir, "installed"))
    installation.configure([runtime.path], [node.cdi])
    if warm:
        installation.refresh()
    engine = Engine([*runtime.wrap, installation.program()], os.path.join(workdir, "root"))
    made = bundle.make(os.path.join(workdir, "b"), ["sh", "-c", "echo A=$A"], {"chandler.oci/service": YAML})
    try:
        assert "A=b" in engine.run(made, "c1").stdout.splitlines()
        linux = made.config["linux"]
        assert node.gpus[0].inside in [device["path"] for device in linux["devices"]]
    finally:
        engine.clean()
