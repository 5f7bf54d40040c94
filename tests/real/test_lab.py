"""The lab itself, on the runtimes without Chandler: its own checks must be right before other tests can rely on it."""

from __future__ import annotations

import os

import pytest
from lab import bundle, cgroups, runtimes
from lab.engine import Engine, pid_of
from lab.node import Node, driver

# Tries every path given and says which open.
PROBE = (
    'for d in "$@"; do if (: < $d) 2>/dev/null; then echo "$d opens"; '
    'else (: < $d) 2>&1 | busybox sed "s|.*: ||;s|^|$d |"; fi; done'
)


def granted(node: Node, made: bundle.Bundle, *indexes: int) -> None:
    """Put GPUs of the node into a bundle by hand."""
    config = made.config
    config["linux"]["devices"] = [
        {
            "path": node.gpus[n].inside,
            "type": "c",
            "major": node.gpus[n].major,
            "minor": node.gpus[n].minor,
            "fileMode": 0o666,
        }
        for n in indexes
    ]
    config["linux"]["resources"]["devices"] += [
        {"allow": True, "type": "c", "major": node.gpus[n].major, "minor": node.gpus[n].minor, "access": "rw"}
        for n in indexes
    ]
    made.config = config


def test_a_whole_life(direct: Engine, workdir: str) -> None:
    made = bundle.make(os.path.join(workdir, "b"), ["sh", "-c", "echo out; exec sleep 60"])
    direct.create(made, "c1")
    assert direct.state("c1")["status"] == "created"
    direct.call("start", "c1")
    direct.wait("c1", "running")
    assert direct.exec("c1", "echo", "hello").stdout == "hello\n"
    direct.kill("c1")
    direct.wait("c1", "stopped")
    direct.delete("c1")
    assert made.output() == "out\n"


def test_only_a_granted_device_opens(direct: Engine, workdir: str, node: Node) -> None:
    one, other = node.gpus[2], node.gpus[5]
    make = f"mknod /dev/other c {other.major} {other.minor}; "
    made = bundle.make(os.path.join(workdir, "b"), ["sh", "-c", make + PROBE, "sh", one.inside, "/dev/other"])
    granted(node, made, 2)
    assert direct.run(made, "c1").stdout.splitlines() == [f"{one.inside} opens", "/dev/other Operation not permitted"]


@pytest.mark.parametrize("runtime", [runtime.label for runtime in runtimes.known() if runtime.limits], indirect=True)
def test_limits_are_read_back(direct: Engine, workdir: str) -> None:
    made = bundle.make(os.path.join(workdir, "b"), ["sleep", "60"])
    config = made.config
    config["linux"]["resources"].update(memory={"limit": 64 << 20}, pids={"limit": 40})
    made.config = config
    direct.create(made, "c1")
    pid = pid_of(made)
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", pid) == 64 << 20
    assert cgroups.limit("pids", "pids.max", "pids.max", pid) == 40


def test_a_driver_sized_cdi_file(node: Node) -> None:
    text = driver(node)
    assert text.count("containerPath:") == 60
    assert len({line for line in text.splitlines() if "- path: /dev/" in line.replace('"', "")}) >= 17
    assert len({(gpu.major, gpu.minor) for gpu in node.gpus}) == len(node.gpus)
