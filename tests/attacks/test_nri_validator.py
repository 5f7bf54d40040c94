"""Chandler on a containerd with NRI's validator (2.2 or newer).

An absent plugin fails the create, GPUs that another plugin adds are checked, and leases work without an OCI hook where
plugins may not add hooks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab.containerd import NEWEST_NRI
from lab.cri import CRI, Refused, reason
from lab.install import PYTHON
from lab.node import Node
from lab.plugin import Plugin, until
from lab.scene import Scene, ask, gpus, opened
from lab.workdir import within

from shim.configure.containerd import TOLERATE

LEASES = '[gpu]\nallocator = "leases"\n'
# Somebody else's plugin: gives every container one device.
GIVING = """
import sys
sys.path.insert(0, sys.argv.pop(1))
major, minor = int(sys.argv.pop(1)), int(sys.argv.pop(1))
from shim.nri import main, messages, service

def create(*_):
    made = messages.ContainerAdjustment()
    made.linux.devices.add(path="/dev/theirs", type="c", major=major, minor=minor)
    return made

service.Service.create = create
service.Service.validate = lambda *_: ""
service.Service.synchronize = service.Service.start = lambda *_: None
sys.argv[0] = "theirs"
sys.exit(main.main())
"""


@pytest.fixture(scope="module")
def scene(lab: str, node: Node) -> Iterator[Scene]:
    if NEWEST_NRI.missing:
        pytest.skip(NEWEST_NRI.missing)
    with within(lab) as directory:
        made = Scene(NEWEST_NRI, directory, node)
        yield made
        made.close()


@pytest.fixture
def cri(scene: Scene) -> Iterator[CRI]:
    scene.configure(LEASES)
    yield scene.cri
    for plugin in scene.plugins:
        if plugin.process is not None:
            plugin.stop(signal.SIGKILL)
    scene.restart()
    for pod in list(scene.cri.pods):
        scene.cri.end(pod)
    scene.forget()


def test_nothing_is_created_while_a_required_plugin_is_not_there(scene: Scene, cri: CRI) -> None:
    """With the configuration that `chandler configure` writes."""
    command = [
        scene.installation.program("chandler"),
        "configure",
        "containerd",
        "--config",
        scene.containerd.config,
        "--nri-required",
        "--engine-version",
        "2.4.2",
        "--handler",
        "required",
        "--keep-engine",
    ]
    subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, capture_output=True, env={"PATH": "/usr/sbin:/usr/bin"}
    )
    scene.containerd.stop()
    scene.containerd.start()
    assert cri.ready()
    pods = [cri.pod("asking", ask(resources=gpus(1))), cri.pod("plain")]
    for pod in pods:
        with pytest.raises(Refused) as error:
            cri.create(pod)
        assert 'required plugin "chandler" not present' in reason(error)
    # such as the plugin's own pod
    assert cri.running(cri.run(cri.pod("tolerant", {TOLERATE: "true"})))
    plugin = scene.plugin().start()
    assert [opened(cri, cri.run(pod)) for pod in pods] == [[0], []]
    # a plugin that hangs fails one create; containerd then drops it, and later creates fail because it is missing
    os.kill(plugin.pid, signal.SIGSTOP)
    for words in ("plugin 50-chandler failed to handle", 'required plugin "chandler" not present'):
        with pytest.raises(Refused) as error:
            cri.create(pods[0], "more")
        assert words in reason(error)
    times = plugin.times_serving()
    os.kill(plugin.pid, signal.SIGCONT)
    plugin.serving(times)
    assert opened(cri, cri.run(pods[0], "more")) == [0], "what the pod has"
    plugin.stop(signal.SIGKILL)
    with pytest.raises(Refused):
        cri.create(pods[0], "last")
    subprocess.run(
        [*command[:5], "--remove"],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"PATH": "/usr/sbin:/usr/bin"},
    )


def test_leases_without_a_hook(scene: Scene, cri: CRI) -> None:
    scene.restart(enable=True, reject_oci_hook_adjustment=True)
    unaware = scene.plugin().start()
    services = {name: {"resources": gpus(8)} for name in ("main", "second", "third")}
    pod = cri.pod("holder", {"chandler.oci/services": json.dumps(services)})
    with pytest.raises(Refused) as error:
        cri.create(pod)
    assert "attempted restricted OCI hook injection" in reason(error)
    until(lambda: scene.leases() == [] and scene.records() == [], "the end of what was granted")
    unaware.stop()
    scene.plugin("--no-hooks").start()
    first = cri.run(pod, command=["sh", "-c", "exec sleep 3600"])
    assert opened(cri, first) == list(range(8)) and [lease["id"] for lease in scene.leases()] == [first]
    with pytest.raises(Refused):
        cri.create(pod, "second")
    os.kill(cri.info(first)["pid"], signal.SIGKILL)
    until(lambda: scene.leases() == [], "the end of the lease of a container that has ended")
    assert opened(cri, cri.run(pod, "third")) == list(range(8))
    cri.remove(first)


def giving(scene: Scene, gpu: Any) -> Plugin:
    made = scene.plugin("--name", "theirs", "--idx", "90")
    made.command[:1] = [
        PYTHON,
        "-I",
        "-B",
        "-c",
        GIVING,
        scene.installation.prefix + "/lib/chandler",
        str(gpu.major),
        str(gpu.minor),
    ]
    return made.start()


@pytest.mark.parametrize("allocator", ["fixed", "leases"])
def test_a_gpu_that_another_plugin_adds(scene: Scene, cri: CRI, allocator: str) -> None:
    scene.configure(LEASES if allocator == "leases" else "")
    plugin = scene.plugin().start()
    holder = cri.run(cri.pod("holder", ask(resources=gpus(2))))
    giving(scene, scene.node.gpus[1])
    if allocator == "leases":  # no other container gets what one holds
        with pytest.raises(Refused) as error:
            cri.create(cri.pod("thief"))
        assert f"another NRI plugin adds /dev/theirs (nvidia.com/gpu=1), but {holder} holds" in reason(error)
    with pytest.raises(Refused) as error:  # nor a GPU beside its own
        cri.create(cri.pod("both", ask(resources={"gpu": {"devices": ["5"]}})))
    assert "/dev/theirs" in reason(error)
    scene.plugins[-1].stop()
    giving(scene, scene.node.gpus[7])
    with pytest.raises(Refused) as error:
        cri.create(cri.pod("beside", ask(resources={"gpu": {"devices": ["5"]}})))
    assert "beside the GPUs that Chandler granted" in reason(error)
    # a GPU that no container holds is the other plugin's to give; ours logs it
    theirs = cri.run(cri.pod("theirs"))
    assert "/dev/theirs (nvidia.com/gpu=7)" in plugin.record(container=theirs)["beside"]
    assert cri.exec(theirs, "sh", "-c", "exec 3</dev/theirs").code == 0
    # its own GPU by another name adds nothing
    assert cri.running(cri.run(cri.pod("own", ask(resources={"gpu": {"devices": ["7"]}}))))
    until(lambda: scene.records() and len(scene.records()) == 2, "two grants")
