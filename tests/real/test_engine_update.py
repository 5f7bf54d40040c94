"""Updates in which an engine sends all resources that it knows, without the devices that Chandler gave."""

from __future__ import annotations

import json
import os

import pytest
from lab import bundle, runtimes
from lab.engine import Engine
from lab.node import Node

# What containerd and podman send: all default device rules, and the new limit.
DEFAULTS = [
    {"allow": False, "access": "rwm"},
    *({"allow": True, "type": "c", "major": 1, "minor": minor, "access": "rwm"} for minor in (3, 5, 7, 8, 9)),
]


@pytest.mark.parametrize("way", ["input", "file"])
def test_a_gpu_stays_open(runtime: runtimes.Runtime, chandler: Engine, node: Node, workdir: str, way: str) -> None:
    made = bundle.make(os.path.join(workdir, "b"), ["sleep", "60"], bundle.request(resources={"gpu": {"count": 1}}))
    name = bundle.GROUPS + way
    chandler.create(made, name)
    chandler.call("start", name)
    other = node.gpus[1]
    command = [
        "sh",
        "-c",
        f"(exec 3</dev/nvidia0) && echo open; test -e /other || mknod /other c {other.major} {other.minor}; "
        "(exec 3</other) || echo shut",
    ]
    assert chandler.exec(name, *command).stdout == "open\nshut\n"
    for limit in (64 << 20, 128 << 20):  # the second update comes after the rules of the first
        data = json.dumps({"devices": DEFAULTS, **({"memory": {"limit": limit}} if runtime.limits else {})})
        if way == "input":
            chandler.call("update", "--resources=-", name, input=data)
        else:
            file = os.path.join(workdir, "resources.json")
            with open(file, "w", encoding="ascii") as out:
                out.write(data)
            chandler.call("update", "--resources", file, name)
        assert chandler.exec(name, *command).stdout == "open\nshut\n"
    chandler.kill(name)
    chandler.delete(name, "--force")
