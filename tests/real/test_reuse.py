"""One bundle used again and again: each create starts from the engine's config.json, not from the last result."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab import bundle, runtimes
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node

ONCE = ["runc", "crun", "youki"]


def gpus(config: dict[str, Any]) -> list[str]:
    return sorted(
        device["path"]
        for device in config["linux"].get("devices", [])
        if device["path"].startswith("/dev/nvidia") and device["path"][-1].isdigit()
    )


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_ten_creates_of_a_bundle_with_other_gpus_each_time(chandler: Engine, workdir: str, node: Node) -> None:
    made = bundle.make(os.path.join(workdir, "b"), ["ls", "/dev"])
    original = made.config
    for turn in range(10):
        count = turn % 3 + 1
        wanted = [(turn + n) % len(node.gpus) for n in range(count)]
        # As an engine does: config.json is written anew, or only looked at again.
        original["annotations"] = bundle.request(resources={"gpu": {"devices": [str(n) for n in wanted]}})
        made.config = original
        chandler.create(made, f"c{turn}")
        assert gpus(made.config) == sorted(node.gpus[n].inside for n in wanted)
        rules = [
            (rule.get("major"), rule.get("minor"))
            for rule in made.config["linux"]["resources"]["devices"]
            if rule["allow"]
        ]
        allowed = {(gpu.major, gpu.minor) for gpu in node.gpus} & set(rules)
        assert allowed == {(node.gpus[n].major, node.gpus[n].minor) for n in wanted}
        chandler.delete(f"c{turn}", "--force")


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_the_same_bundle_created_ten_times_as_it_was_left(chandler: Engine, workdir: str, node: Node) -> None:
    """A create that finds Chandler's own result starts from the original, so edits do not pile up."""
    made = bundle.make(
        os.path.join(workdir, "b"), ["ls", "/dev"], bundle.request(resources={"gpu": {"count": 2}}, env={"A": "b"})
    )
    original, results = made.bytes, set()
    for turn in range(10):
        chandler.create(made, "c1")
        results.add(re.sub(rb'"[0-9a-f]{24}"', b'"the token of the lease"', made.bytes))
        assert gpus(made.config) == [gpu.inside for gpu in node.gpus[:2]]
        assert made.config["process"]["env"].count("A=b") == 1
        with open(made.path + ".chandler-original", "rb") as kept:
            assert kept.read() == original
        chandler.delete("c1", "--force")
    assert len(results) == 1


@pytest.mark.parametrize("runtime", ONCE[:1], indirect=True)
def test_an_edited_config_that_was_changed_since_is_refused(chandler: Engine, workdir: str) -> None:
    made = bundle.make(os.path.join(workdir, "b"), ["ls", "/dev"], bundle.request(resources={"gpu": {"count": 2}}))
    chandler.create(made, "c1")
    chandler.delete("c1", "--force")
    config = made.config
    config["process"]["args"] = ["true"]
    made.config = config
    before = made.bytes
    done = chandler.create(made, "c2", check=False)
    assert done.returncode == 1 and made.bytes == before
    assert "config.json" in done.stderr and len(done.stderr.splitlines()) == 1


def test_two_hundred_creates_in_parallel(workdir: str, installation: Installation, node: Node) -> None:
    runtime = runtimes.named("runc")
    if runtime.missing:
        pytest.skip(runtime.missing)
    installation.configure([runtime.path], [node.cdi], '[gpu]\nallocator = "fixed"\n')  # all of them live at once
    installation.forget()
    engine = Engine([installation.program()], os.path.join(workdir, "root"))
    root = bundle.rootfs(os.path.join(workdir, "rootfs"))
    made = [
        bundle.make(
            os.path.join(workdir, f"b{n}"), ["true"], bundle.request(resources={"gpu": {"count": n % 8 + 1}}), root=root
        )
        for n in range(200)
    ]
    try:
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(lambda n: engine.create(made[n], f"c{n}"), range(200)))
        for n, one in enumerate(made):
            assert gpus(one.config) == [gpu.inside for gpu in node.gpus[: n % 8 + 1]]
            assert set(os.listdir(one.directory)) - {"log.json"} == {
                "config.json",
                "config.json.chandler-original",
                "config.json.chandler-edited",
                "init.pid",
                "out.log",
            }
    finally:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: engine.call("delete", "--force", f"c{n}", check=False), range(200)))
