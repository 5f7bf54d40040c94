"""chandler-nri stopped for longer than containerd waits.

A grant whose answer never arrived holds nothing, and a container that runs without what it asked for does not count as
served.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from lab.containerd import NEWEST_NRI, RELEASES
from lab.cri import CRI, Refused, reason
from lab.engine import read
from lab.install import PYTHON
from lab.node import Node
from lab.plugin import Plugin, until
from lab.scene import Scene, ask, gpus, opened
from lab.workdir import within

# The installed plugin, which stops itself once, at a given point of the first create. SIGSTOP stands for swapping or a
# slow disk.
STALLING = """
import os, signal, sys
sys.argv[0] = "chandler-nri"
sys.path.insert(0, sys.argv.pop(1))
point = sys.argv.pop(1)
from shim import engine
from shim.state import grants
from shim.nri import main, socket

def stop():
    global point
    point = ""
    os.kill(os.getpid(), signal.SIGSTOP)

def patch(module, name, before="", after=""):
    original = getattr(module, name)
    def patched(*arguments, **named):
        if point == before != "":
            stop()
        result = original(*arguments, **named)
        if point == after != "":
            stop()
        return result
    setattr(module, name, patched)

def granted(*arguments, write=grants.write, **named):
    global point
    write(*arguments, **named)
    if point == "recorded":
        stop()
    point = {"answer ready": "sending", "after answering": "sent"}.get(point, point)

grants.write = granted
patch(engine, "check_request", before="read")
patch(socket.Loop, "_send", before="sending", after="sent")
sys.exit(main.main())
"""
STALLS = ["before reading", "read", "recorded", "answer ready"]


class Stage(Scene):
    def stalling(self, point: str) -> Plugin:
        """A plugin that stops itself at `point` of its first create with a request."""
        made = self.plugin()
        made.command[:1] = [PYTHON, "-I", "-B", "-c", STALLING, self.installation.prefix + "/lib/chandler", point]
        return made.start()

    @property
    def fails_requests(self) -> bool:
        """Whether this containerd knows the failure policy of a plugin."""
        return self.containerd.release == NEWEST_NRI


@pytest.fixture(scope="module", params=[*RELEASES, NEWEST_NRI], ids=lambda release: release.label)
def stage(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Stage]:
    if request.param.missing:
        pytest.skip(request.param.missing)
    with within(lab) as directory:
        made = Stage(request.param, directory, node)
        yield made
        made.close()


@pytest.fixture
def cri(stage: Stage) -> Iterator[CRI]:
    """Ends a test's pods and plugins, also stopped plugins."""
    stage.configure(LEASES)
    yield stage.cri
    for plugin in stage.plugins:
        if plugin.process is not None:
            plugin.stop(signal.SIGKILL)
    for pod in list(stage.cri.pods):
        stage.cri.end(pod)
    stage.forget()


LEASES = '[gpu]\nallocator = "leases"\n'
EVICT = LEASES + "[policy]\nevict-unadjusted = true\n"


def stopped(plugin: Plugin) -> bool:
    return read(f"/proc/{plugin.pid}/stat").rpartition(")")[2].split()[0] == "T"


def stall(stage: Stage, point: str) -> Plugin:
    """A plugin that is stopped already, or that stops itself during the next create."""
    plugin = stage.stalling(point)
    if point == "before reading":
        os.kill(plugin.pid, signal.SIGSTOP)
        until(lambda: stopped(plugin), "a stop")
    return plugin


def wake(plugin: Plugin) -> None:
    """Continue the plugin, and wait until it is connected again."""
    times = plugin.times_serving()
    assert stopped(plugin)
    os.kill(plugin.pid, signal.SIGCONT)
    plugin.serving(times)


def nothing_held(stage: Stage) -> None:
    until(lambda: stage.leases() == [] and stage.records() == [], "the end of what was granted")


@pytest.mark.parametrize("point", STALLS)
@pytest.mark.parametrize("evict", [False, True], ids=["named", "ended"])
def test_a_running_container_whose_create_was_not_answered(stage: Stage, cri: CRI, point: str, evict: bool) -> None:
    stage.configure(EVICT if evict else LEASES)
    plugin = stall(stage, point)
    pod = cri.pod("unserved", ask(resources=gpus(8)))
    if stage.fails_requests:
        with pytest.raises(Refused) as error:
            cri.create(pod)
        assert "chandler failed to handle CreateContainer" in reason(error)
        wake(plugin)
        nothing_held(stage)
    else:
        container = cri.run(pod)
        assert opened(cri, container) == []
        wake(plugin)
        assert plugin.record(container=container, evicted=evict)["unadjusted"].startswith(
            "it runs without what it asked for"
        )
        nothing_held(stage)
        until(lambda: cri.running(container) != evict, "what the policy says")
    # a new request is served, on every device
    again = cri.run(cri.pod("again", ask(resources=gpus(8))))
    assert opened(cri, again) == list(range(8))


@pytest.mark.parametrize("point", STALLS)
def test_a_container_that_is_started_after_the_plugin_woke(stage: Stage, cri: CRI, point: str) -> None:
    """The container has no process yet that could be ended, so its start fails."""
    if stage.fails_requests:
        pytest.skip("this containerd creates no such container")
    stage.configure(EVICT)
    plugin = stall(stage, point)
    container = cri.create(cri.pod("unserved", ask(resources=gpus(2))))
    wake(plugin)
    plugin.record(container=container, evicted=False)
    nothing_held(stage)
    with pytest.raises(Refused) as error:
        cri.start(container)
    assert "it runs without what it asked for" in reason(error) and "evict-unadjusted" in reason(error)
    plugin.record(container=container, evicted=True)


def test_a_container_that_was_served_stays(stage: Stage, cri: CRI) -> None:
    """The plugin stops after its answer has left: containerd closes the connection, and the grant stays valid."""
    stage.configure(EVICT)
    plugin = stage.stalling("after answering")
    pod = cri.pod("served", ask(resources=gpus(2)))
    if stage.fails_requests:
        # containerd also asks the plugin to validate the adjustment, and a validator that hangs fails the create
        with pytest.raises(Refused) as error:
            cri.create(pod)
        assert "validator plugin 50-chandler failed" in reason(error)
        wake(plugin)
        return
    container = cri.run(pod)
    assert stopped(plugin) and opened(cri, container) == [0, 1]
    wake(plugin)
    assert cri.running(container) and stage.records() == [container]
    assert not any("unadjusted" in line or "undone" in line for line in plugin.records())


def test_a_short_stall_harms_nothing(stage: Stage, cri: CRI) -> None:
    plugin = stall(stage, "recorded")
    pid = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", f"until grep -q '^State:.T' /proc/{plugin.pid}/status; do :; done; kill -CONT {plugin.pid}"],
        {"PATH": "/usr/bin:/bin"},
    )
    container = cri.run(cri.pod("served", ask(resources=gpus(2))))
    os.waitpid(pid, 0)
    assert opened(cri, container) == [0, 1] and stage.records() == [container]
    assert plugin.times_serving() == 1


def test_a_plugin_killed_before_its_answer(stage: Stage, cri: CRI) -> None:
    """The next plugin finds a record, and a container without Chandler's mark."""
    stage.configure(EVICT)
    plugin = stall(stage, "recorded")
    made: list[str] = []
    pod = cri.pod("unserved", ask(resources=gpus(8)))
    pid = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", f"until grep -q '^State:.T' /proc/{plugin.pid}/status; do :; done; kill -KILL {plugin.pid}"],
        {"PATH": "/usr/bin:/bin"},
    )
    if stage.fails_requests:
        with pytest.raises(Refused):
            cri.create(pod)
    else:
        made.append(cri.create(pod))
    os.waitpid(pid, 0)
    plugin.stop(signal.SIGKILL)
    after = stage.plugin().start()
    for container in made:
        after.record(container=container, evicted=False)
        with pytest.raises(Refused):
            cri.start(container)
        nothing_held(stage)
