"""A CDI file as long as a real driver's, all of it in real containers: 60 mounts, 17 nodes, 5 hooks, 8 GPUs."""

from __future__ import annotations

import os

import pytest
from lab import bundle, runtimes
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node, driver

LOOK = """
for node in /dev/nvidia*; do [ -c $node ] && : <$node && echo open $node; done
for node in /dev/nvidia-caps/*; do [ -c $node ] && : <$node && echo open $node; done
grep -c libnvidia-part /proc/mounts
for library in /usr/lib/x86_64-linux-gnu/libnvidia-part*; do
  ( echo x >$library ) 2>/dev/null && echo written $library
done
echo $NVIDIA_VISIBLE_DEVICES $CUDA_VISIBLE_DEVICES
"""


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_everything_of_the_file_is_in_the_container(runtime: runtimes.Runtime, node: Node, workdir: str) -> None:
    cdi = os.path.join(workdir, "cdi")
    os.mkdir(cdi)
    with open(os.path.join(cdi, "nvidia.yaml"), "w", encoding="utf-8") as file:
        file.write(driver(node))
    installation = Installation(os.path.join(workdir, "installed"))
    installation.configure([runtime.path], [cdi])
    made = bundle.make(
        os.path.join(workdir, "b"), ["sh", "-c", LOOK], bundle.request(resources={"gpu": {"count": len(node.gpus)}})
    )
    before = made.config
    engine = Engine([*runtime.wrap, installation.program()], os.path.join(workdir, "root"))
    try:
        seen = engine.run(made, "c1").stdout.splitlines()
    finally:
        engine.clean()
    opened = {line.split()[1] for line in seen if line.startswith("open ")}
    assert len(opened) == 17 and {gpu.inside for gpu in node.gpus} | {one.inside for one in node.controls} <= opened
    assert "60" in seen and not [line for line in seen if line.startswith("written")]
    assert seen[-1] == "void " + ",".join(str(n) for n in range(len(node.gpus)))
    after = made.config
    assert len(after["mounts"]) - len(before["mounts"]) == 60
    assert len(after["linux"]["devices"]) - len(before["linux"].get("devices", [])) == 17
    assert len(after["hooks"]["createContainer"]) == 5
