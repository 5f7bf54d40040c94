"""Shared GPUs through NRI: slow work runs in another process, and a retried create finds its result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import install, nvidia, partial
from lab.node import uuid
from lab.peer import Peer, container, pod
from lab.plugin import until
from lab.served import NVIDIA, Served, inventory, node

from shim.nri import messages as m
from shim.nri.holds import PATIENCE_FOR_RETRY
from shim.nri.plugin import Connection
from shim.nri.work import LIMIT, Work
from shim.sharing import pages
from shim.state import ledger
from shim.ttrpc.errors import RemoteError

ENOUGH = 60.0  # seconds, and not what a runtime waits: on a busy machine even a fake daemon may take longer than that
STARTING = f"MPS for {uuid(0)} is starting, retry"


def spec() -> bytes:
    devices = [
        {"name": name, "containerEdits": {"deviceNodes": [node(f"/dev/nvidia{n}", n)]}}
        for n in range(2)
        for name in (str(n), uuid(n))
    ]
    return json.dumps({"cdiVersion": "0.8.0", "kind": NVIDIA, "devices": devices}).encode()


class Scene:
    """A plugin in memory with processes that work for it, and fakes for NVIDIA's commands."""

    def __init__(self, directory: str) -> None:
        self.directory, self.state = directory, directory + "/state"
        self.commands = nvidia.Commands(directory + "/bin")
        self.config: dict[str, Any] = {
            "gpu__allocator": "leases",
            "gpu__mps": "managed",
            "gpu__mps_patience": 20,
            "policy__trust": "all",
            "gpu__mps_control": self.commands.control,
            "gpu__nvidia_smi": self.commands.smi,
        }
        self.services: list[Served] = []
        self.connect()

    def connect(self, version: str = "2.1.9", **config: Any) -> None:
        """Another plugin, or the first."""
        self.service = Served(self.state, inventory(spec(), **{**self.config, **config}))
        self.services.append(self.service)
        self.peer = Peer(Connection("chandler", "50", self.service))
        self.peer.handshake(version=version)
        self.service.patience = ENOUGH  # the handshake has set the runtime's

    def send(self, made: Any, owner: Any) -> int:
        stream = self.peer.client.call(
            m.PLUGIN_SERVICE, "CreateContainer", m.CreateContainerRequest(pod=owner, container=made).SerializeToString()
        )
        self.peer.exchange()
        return stream

    def tick(self, ahead: float = 0.0) -> bool:
        now = time.monotonic() + ahead
        self.service.tick(now)
        self.peer.connection.tick(now)
        self.peer.exchange()
        return True

    def create(self, id: str, owner: str = "pod-1", made: Any = None, **gpu: Any) -> Any:
        """The adjustment, waited for."""
        asked = pod({"chandler.oci/service": json.dumps({"resources": {"gpu": gpu}})} if gpu else None, id=owner)
        stream = self.send(made or container(id=id, pod_id=owner), asked)
        until(lambda: self.tick() and stream in self.peer.replies, "an answer")
        return m.CreateContainerResponse.FromString(self.peer.replies.pop(stream).result()).adjust

    def refused(self, id: str, owner: str = "pod-1", **gpu: Any) -> str:
        with pytest.raises(RemoteError) as error:
            self.create(id, owner, **gpu)
        self.stop(id)  # as containerd does
        return error.value.message

    def stop(self, id: str) -> None:
        self.peer.call("StopContainer", m.StopContainerRequest(container=container(id=id)))
        self.peer.call("StateChange", m.StateChangeEvent(event=m.REMOVE_CONTAINER, container=container(id=id)))

    def lose_leases(self) -> None:
        ledger.Ledger(self.state).write([])

    def leases(self) -> list[str]:
        """The containers that have one; a pod's own is tested in test_nri_pod_leases.py."""
        return [lease["id"] for lease in ledger.Ledger(self.state).read() if lease["id"] != lease.get("claim")]

    def mode(self, number: int = 0) -> str:
        return str(self.commands.gpus().get(uuid(number), {}).get("mode", "DEFAULT"))

    def clean(self) -> bool:
        """Whether nothing is left of any share."""
        self.tick()
        return (
            not self.leases()
            and not pages.every(self.state)
            and not self.commands.running()
            and self.mode() == "DEFAULT"
            and not len(self.service.holds)
            and not self.service.records()
        )

    def ready(self) -> bool:
        """Whether a daemon is up, and whoever started it has ended."""
        return self.idle() and any(page.get("ready") for page in pages.every(self.state))

    def idle(self) -> bool:
        """Whether no process works for any of the plugins."""
        now = time.monotonic()
        for service in self.services:
            service.tick(now)
        return not any(service.holds._busy or service._leftover or service._putting_back for service in self.services)

    def go(self) -> None:
        """Slow daemons come up from now on."""
        open(self.directory + "/go", "w").close()


@pytest.fixture
def scene(needs_root: None) -> Iterator[Scene]:
    directory = tempfile.mkdtemp(
        prefix="mps-", dir="/var/lib"
    )  # short: the path of a socket; root's own all the way up
    os.chmod(directory, 0o755)
    made = Scene(directory)
    yield made
    made.go()
    until(made.idle, "the end of all work")
    made.commands.end()
    shutil.rmtree(directory)


@pytest.fixture
def slow(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """With a daemon that takes its time, and little patience."""
    monkeypatch.setattr(scene.service, "patience", 0.05)
    scene.commands.mood(scene.commands.control, ready=scene.directory + "/go")
    return scene


def env(made: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in made.env}


def test_the_first_container_starts_the_daemon_and_the_last_ends_it(scene: Scene) -> None:
    first = scene.create("c-1", sharing="mps", mps_active_thread_percentage=30)
    base = f"{scene.state}/mps/{uuid(0)}"
    assert (env(first)["CUDA_MPS_PIPE_DIRECTORY"], env(first)["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"]) == (
        "/tmp/nvidia-mps",
        "30",
    )
    assert {mount.destination: mount.source for mount in first.mounts} == {
        "/tmp/nvidia-mps": base + "/pipe",
        "/dev/shm": "/dev/shm",
    }
    (ready,), (release,) = first.hooks.create_runtime, first.hooks.poststop
    assert list(ready.args) == ["chandler-hook", "mps-ready", base + "/pipe", scene.commands.control, "0"]
    assert list(release.args[:3]) == ["chandler-hook", "release", scene.state]
    assert scene.mode() == "EXCLUSIVE_PROCESS" and len(scene.commands.running()) == 1
    (record,) = scene.service.records()
    assert record["sharing"]["mode"] == "mps" and scene.service.lines[-1]["sharing"]["held"] == "advisory"
    scene.create("c-2", owner="pod-2", sharing="mps")
    assert len(scene.commands.running()) == 1 and scene.leases() == ["c-1", "c-2"]
    scene.stop("c-1")
    until(lambda: scene.tick() and scene.service._putting_back is None, "the look at what is left")
    assert len(scene.commands.running()) == 1
    scene.stop("c-2")
    until(scene.clean, "the end of it all")


def test_a_slow_daemon_refuses_once_and_the_retry_finds_it_ready(slow: Scene) -> None:
    scene = slow
    assert STARTING in scene.refused("c-1", sharing="mps") and "kubelet" in scene.service.lines[-1]["refused"]
    assert scene.leases() == ["c-1"], "what is started is nobody else's"
    assert STARTING in scene.refused("c-2", sharing="mps"), "still starting"
    assert STARTING in scene.refused("c-3", owner="pod-2", sharing="mps", devices=["0"]), (
        "others do not wait for it again"
    )
    assert "pod default/trainer-0 (main) holds nvidia.com/gpu=0" in scene.refused("c-4", owner="pod-3", devices=["0"])
    assert scene.leases() == ["c-1"]
    assert [device.name for device in scene.create("c-5", owner="pod-4", count=1).CDI_devices] == [f"{NVIDIA}=1"], (
        "who does not share does not wait"
    )
    scene.stop("c-5")
    scene.go()
    until(scene.ready, "the daemon")
    scene.service.patience = ENOUGH
    assert scene.create("c-6", sharing="mps").hooks.create_runtime
    assert scene.leases() == ["c-6"] and len(scene.commands.started()) == 1
    assert (
        'requests_total{result="refused"} 4' in scene.service.metrics_text()
        and 'refusals_total{kind="Starting",rule=""} 3' in scene.service.metrics_text()
    )
    scene.stop("c-6")
    until(scene.clean, "the end of it all")


@pytest.mark.parametrize("how", ["time", "pod"])
def test_a_daemon_that_no_retry_asks_for_is_ended(slow: Scene, how: str) -> None:
    scene = slow
    scene.refused("c-1", sharing="mps")
    assert "\nchandler_nri_holds 1\n" in scene.service.metrics_text()
    scene.tick(PATIENCE_FOR_RETRY + 10)
    assert scene.leases() == ["c-1"], "it still starts"
    scene.go()
    until(scene.ready, "the daemon")
    scene.tick(PATIENCE_FOR_RETRY - 10)
    assert scene.leases() == ["c-1"] and len(scene.commands.running()) == 1
    if how == "time":
        until(lambda: scene.tick(PATIENCE_FOR_RETRY + 10) and not scene.leases(), "the end of the hold")
    else:
        scene.peer.call("StateChange", m.StateChangeEvent(event=m.STOP_POD_SANDBOX, pod=pod(id="pod-1")))
    until(scene.clean, "the end of it all")


def test_a_retry_is_told_why_the_daemon_failed(slow: Scene) -> None:
    scene = slow
    scene.service.inventory.config["gpu.mps-patience"] = 1
    scene.refused("c-1", sharing="mps")
    until(lambda: scene.tick() and not scene.leases(), "the daemon's failure")
    said = scene.refused("c-2", sharing="mps")
    assert "gives no answer in 1 seconds" in said and "its log ends: " in said and "Starting control daemon" in said
    until(scene.clean, "the end of it all")
    scene.go()
    scene.service.patience = ENOUGH
    scene.create("c-3", sharing="mps")
    scene.stop("c-3")
    until(scene.clean, "the end of it all")


def test_a_daemon_that_dies_at_once_is_reported_at_once(scene: Scene) -> None:
    scene.commands.mood(scene.commands.control, start="dies")
    assert "Failed to start : MPS control daemon cannot use the device" in scene.refused("c-1", sharing="mps")
    until(scene.clean, "the end of it all")


def test_a_connection_that_is_lost_while_a_create_waits_leaves_a_hold(slow: Scene) -> None:
    scene = slow
    scene.service.patience = ENOUGH
    scene.send(container(id="c-1"), pod({"chandler.oci/service": '{"resources": {"gpu": {"sharing": "mps"}}}'}))
    scene.peer.connection.close()
    assert not scene.peer.connection.due() and scene.leases() == ["c-1"]
    scene.go()
    until(scene.ready, "the daemon")
    scene.create("c-2", sharing="mps")
    assert scene.leases() == ["c-2"]


@pytest.mark.parametrize("how", ["stop", "time"])
def test_a_create_that_is_given_up_while_it_waits_leaves_a_hold(scene: Scene, how: str) -> None:
    """Its container is ended first, or the runtime's time is over when the work is done: the retry is served."""
    asked = pod({"chandler.oci/service": json.dumps({"resources": {"gpu": {"sharing": "mps"}}})})
    gone: list[bool] = []
    scene.peer.connection.hung_up = lambda: bool(gone)
    stream = scene.send(container(id="given-up"), asked)
    if how == "time":
        gone.append(True)
    if how == "stop":
        scene.stop("given-up")
    until(lambda: scene.tick() and stream in scene.peer.replies, "an answer")
    with pytest.raises(RemoteError, match="ended before it was created" if how == "stop" else "no longer"):
        scene.peer.replies.pop(stream).result()
    assert scene.leases() == ["given-up"] and scene.service.records() == [] and len(scene.service.holds) == 1
    gone.clear()
    until(scene.ready, "the daemon")
    assert scene.create("retry", sharing="mps").mounts and scene.leases() == ["retry"]


def test_a_plugin_that_starts_takes_over_what_another_began(slow: Scene) -> None:
    scene = slow
    scene.refused("c-1", sharing="mps")
    scene.go()
    until(scene.ready, "the daemon")
    scene.connect()
    assert scene.leases() == ["c-1"] and len(scene.service.holds) == 1
    scene.create("c-2", sharing="mps")
    assert scene.leases() == ["c-2"]
    scene.stop("c-2")
    until(scene.clean, "the end of it all")
    scene.create("c-3", sharing="mps")


def test_a_shared_gpu_without_a_lease_is_restored(scene: Scene) -> None:
    scene.create("c-1", sharing="mps")
    scene.lose_leases()
    scene.connect()
    scene.peer.call("StateChange", m.StateChangeEvent(event=m.REMOVE_CONTAINER, container=container(id="c-1")))
    until(scene.clean, "the end of it all")


def test_an_exclusive_grant_ends_leftover_sharing(scene: Scene) -> None:
    scene.create("c-1", sharing="mps")
    scene.lose_leases()
    assert scene.create("c-3", owner="pod-3", devices=["1"]).CDI_devices and scene.commands.running(), (
        "another GPU is none of its business"
    )
    scene.commands.mood(scene.commands.smi, fails=["-c DEFAULT"])
    assert "-c DEFAULT failed (4): Insufficient Permissions" in scene.refused("c-2", devices=["0"])
    assert scene.leases() == ["c-3"]
    scene.commands.mood(scene.commands.smi)
    assert scene.create("c-4", devices=["0"]).CDI_devices
    assert scene.mode() == "DEFAULT" and not scene.commands.running() and scene.leases() == ["c-3", "c-4"]


def test_an_exclusive_grant_does_not_wait_long_for_the_restore(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.create("c-1", sharing="mps")
    scene.lose_leases()
    scene.service.patience = 0.0
    with pages.lock(scene.state, uuid(0)):
        assert f"{NVIDIA}=0 is being put back after it was shared, retry" in scene.refused("c-2", devices=["0"])
    until(scene.idle, "the daemon's end")
    assert not scene.commands.running()
    scene.service.patience = ENOUGH
    assert scene.create("c-3", devices=["0"]).CDI_devices and scene.leases() == ["c-3"]


def test_time_slices(scene: Scene) -> None:
    scene.create("c-1", sharing="time-slice", time_slice="short")
    scene.create("c-2", sharing="time-slice")
    assert scene.commands.gpus()[uuid(0)]["slice"] == 1
    assert "pod default/trainer-0 (main) holds nvidia.com/gpu=0 (time-slice, short)" in scene.refused(
        "c-3", sharing="time-slice", time_slice="long", devices=["0"]
    )
    for name in ("c-1", "c-2"):
        scene.stop(name)
    until(scene.clean, "the end of it all")
    assert scene.commands.gpus()[uuid(0)]["slice"] == 0


def test_an_unserved_sharing_container_is_reported(scene: Scene) -> None:
    asked = pod({"chandler.oci/service": '{"resources": {"gpu": {"sharing": "mps"}}}'})
    scene.peer.call("Synchronize", m.SynchronizeRequest(pods=[asked], containers=[container(state=3)]))
    assert scene.service.lines[-1]["unadjusted"].endswith("it was created while chandler-nri did not answer")


class Daemon:
    """Somebody else's."""

    def __init__(self, scene: Scene) -> None:
        self.pipe, self.log = scene.directory + "/pipe", scene.directory + "/log"
        os.makedirs(self.pipe, 0o755)
        os.makedirs(self.log, 0o755)
        environment = {"CUDA_MPS_PIPE_DIRECTORY": self.pipe, "CUDA_MPS_LOG_DIRECTORY": self.log}
        self.process = subprocess.Popen([scene.commands.control, "-f"], stdin=subprocess.DEVNULL, env=environment)
        until(lambda: os.path.exists(self.pipe + "/control"), "the daemon")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("allocator", ["fixed", "leases"])
def test_a_daemon_of_others_is_checked_first(scene: Scene, allocator: str) -> None:
    daemon = Daemon(scene)
    try:
        scene.connect(gpu__mps="external", gpu__mps_pipe_dir=daemon.pipe, gpu__allocator=allocator)
        made = scene.create("c-1", sharing="mps")
        assert {mount.destination: mount.source for mount in made.mounts}["/tmp/nvidia-mps"] == daemon.pipe
        scene.commands.mood(scene.commands.control, servers=[os.getpid()])
        assert len(scene.create("c-2", sharing="mps").mounts) == 2
        os.chmod(daemon.pipe, 0o777)
        assert daemon.pipe in scene.refused("c-3", sharing="mps")
        os.chmod(daemon.pipe, 0o755)
        scene.service.patience = 0.0
        scene.commands.mood(scene.commands.control, mute=True)
        assert "MPS for nvidia.com/gpu=0 is starting, retry" in scene.refused("c-4", sharing="mps")
    finally:
        daemon.end()
    assert "no MPS daemon answers in" in until(lambda: failure(scene), "the reason")


def failure(scene: Scene) -> str:
    said = scene.refused("c-5", sharing="mps")
    return "" if "starting" in said else said


USERS: dict[str, tuple[Callable[[Any], None], int, list[str]]] = {
    "nothing told": (lambda made: None, 0, ["0"]),
    "told": (lambda made: setattr(made.user, "uid", 1000), 1000, []),
}


@pytest.mark.parametrize(("tell", "uid", "more"), USERS.values(), ids=USERS)
def test_the_user_is_known_or_checked_when_the_container_starts(
    scene: Scene, tell: Any, uid: int, more: list[str]
) -> None:
    made = container(id="c-1")
    tell(made)
    (hook,) = scene.create("c-1", made=made, sharing="mps").hooks.create_runtime
    assert list(hook.args[4:]) == more and ledger.Ledger(scene.state).read()[0]["uid"] == uid


def test_the_hook_stops_a_container_of_another_user_than_assumed(
    scene: Scene, lab: str, installation: install.Installation
) -> None:
    made = scene.create("c-1", sharing="mps")
    for uid, code in ((0, 0), (1000, 1)):
        bundle = os.path.join(scene.directory, f"bundle-{uid}")
        os.mkdir(bundle)
        with open(bundle + "/config.json", "w", encoding="ascii") as file:
            json.dump({"process": {"user": {"uid": uid}}}, file)
        done = subprocess.run(
            [installation.program("chandler-hook"), *made.hooks.create_runtime[0].args[1:]],
            check=False,
            env={},
            input=json.dumps({"bundle": bundle}),
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == code, done.stderr
    assert "runs as uid 1000" in done.stderr and "runtime handler" in done.stderr


def test_a_user_namespace_without_its_mappings_is_refused_with_a_remedy(scene: Scene) -> None:
    made = container(id="c-1")
    made.linux.namespaces.add(type="user")
    with pytest.raises(RemoteError, match="does not map the container's uid 0.*runtimeClassName"):
        scene.create("c-1", made=made, sharing="mps")
    assert scene.clean()


def test_background_work_that_fails_or_never_ends(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Work(partial({}))
    until(lambda: broken.done, "its end")
    assert "has ended with status 1" in str(broken.error)
    with pages.lock(scene.state, uuid(0)):
        scene.create("c-1")
        page = pages.Page(scene.state, uuid(0), {"key": "c195:0", "mode": "mps"})
        page.update()
        endless = Work({"state-dir": scene.state, "private": False, "restore": ["c195:0"], "share": None})
        assert not endless.done
        endless.until -= LIMIT
        assert endless.done and "has not ended within" in str(endless.error)
    monkeypatch.setattr("sys.executable", "/nonexistent")
    assert "cannot be started" in str(Work({}).error)
