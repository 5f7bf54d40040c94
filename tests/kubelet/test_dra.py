"""The DRA driver at a kubelet and an API server that this test plays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import bundle
from lab.apiserver import ApiServer
from lab.engine import Engine, read
from lab.install import PYTHON, Installation
from lab.kubelet import ClaimingKubelet
from lab.node import Node, make, uuid
from lab.plugin import Plugin, until

from shim.host import files
from shim.kubelet import api_server, dra, slices
from shim.node import compiler
from shim.node.inventory import Account
from shim.state import grants

UID = "5a7b9c1d-0000-4000-8000-000000000001"
OTHER = "5a7b9c1d-0000-4000-8000-000000000002"
pytestmark = pytest.mark.skipif(
    subprocess.run([PYTHON, "-c", "import grpc, google.protobuf"], capture_output=True, check=False).returncode != 0,
    reason="not installed: python3-grpcio, python3-protobuf",
)


def gpu(number: int) -> str:
    return f"nvidia.com/gpu={number}"


class Stage:
    def __init__(self, workdir: str, gpus: int = 3) -> None:
        self.workdir = workdir
        self.node: Node = make(os.path.join(workdir, "node"), gpus)
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.claims = os.path.join(workdir, "claims")  # the CDI directory of claims, after that of the node's own file
        self.configure()
        self.api = ApiServer(os.path.join(workdir, "account"))
        self.kubelet = ClaimingKubelet(os.path.join(workdir, "registry"))
        self.plugin = Plugin(self.installation.program("chandler-kubelet-plugin"), os.path.join(workdir, "log"), "")
        words = ["--directory", workdir, "--registry", self.kubelet.directory, "--account", self.api.account]
        # A program of a launcher has no environment but this.
        self.plugin.command = ["env", *(f"{key}={value}" for key, value in self.api.environment.items())]
        self.plugin.command += [self.installation.program("chandler-kubelet-plugin"), "--dra", "--node", "here", *words]

    def configure(self, more: str = "") -> None:
        self.installation.configure(["runc"], [self.node.cdi, self.claims], more)

    def start(self) -> ClaimingKubelet:
        self.plugin.start(serving=False)
        until(lambda: os.path.exists(self.kubelet.path) or self.plugin.ended(), "the driver's socket")
        self.kubelet.register()
        return self.kubelet

    def file(self, uid: str) -> Any:
        with open(os.path.join(self.claims, f"gpu.chandler.oci-claim_{uid}.json"), encoding="ascii") as file:
            return json.load(file)

    def left(self) -> tuple[dict[str, list[str]], list[str], list[str]]:
        """Leases, files of claims and grant records."""
        records = os.path.join(self.installation.state, "grants")
        listed = [sorted(os.listdir(each)) if os.path.isdir(each) else [] for each in (self.claims, records)]
        return self.installation.leases(), listed[0], listed[1]

    def close(self) -> None:
        if self.plugin.process is not None:
            self.plugin.stop(signal.SIGKILL)
        self.api.close()


@pytest.fixture
def stage(workdir: str, needs_devices: None) -> Iterator[Stage]:
    made = Stage(workdir)
    yield made
    made.close()


def test_a_claim_is_prepared_and_unprepared(stage: Stage) -> None:
    kubelet = stage.start()
    info = kubelet.register()
    assert (info.type, info.name, info.endpoint) == ("DRAPlugin", "gpu.chandler.oci", "")
    assert list(info.supported_versions) == ["v1.DRAPlugin"]
    stage.api.add_claim("one", UID, "nvidia-2", "nvidia-0")
    answer = kubelet.prepare("one", UID)
    assert answer.error == ""
    assert [
        (list(device.request_names), device.pool_name, device.device_name, list(device.cdi_device_ids))
        for device in answer.devices
    ] == [
        (["gpu-0"], "here", "nvidia-2", [f"gpu.chandler.oci/claim={UID}-nvidia-2"]),
        (["gpu-1"], "here", "nvidia-0", [f"gpu.chandler.oci/claim={UID}-nvidia-0"]),
    ]
    assert stage.installation.leases() == {UID: [gpu(2), gpu(0)]}
    (name,) = os.listdir(stage.claims)
    assert stat.S_IMODE(os.stat(os.path.join(stage.claims, name)).st_mode) == 0o600
    made = stage.file(UID)
    assert made["kind"] == "gpu.chandler.oci/claim"
    assert "NVIDIA_VISIBLE_DEVICES=void" in made["containerEdits"]["env"]
    paths = {device["name"]: device["containerEdits"]["deviceNodes"] for device in made["devices"]}
    (third,) = paths[f"{UID}-nvidia-2"]
    simulated = stage.node.gpus[2]
    assert (third["path"], third["hostPath"], third["type"]) == (simulated.inside, simulated.host, "c")
    assert (third["major"], third["minor"]) == (simulated.major, simulated.minor)
    done = subprocess.run(
        [stage.installation.program("chandler"), "cdi", "validate", os.path.join(stage.claims, name)],
        capture_output=True,
        text=True,
        check=False,
        env={},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # Once more is the same, and the token that the kubelet has replaced meanwhile does not matter.
    before = stage.left(), made
    stage.api.renew("second")
    assert kubelet.prepare("one", UID) == answer and (stage.left(), stage.file(UID)) == before
    # No other claim gets one of these, whatever the scheduler says, nor does an annotation name a claim's file.
    stage.api.add_claim("two", OTHER, "nvidia-0")
    refusal = kubelet.prepare("two", OTHER).error
    assert f"{gpu(0)} is not free: ResourceClaim {UID} holds" in refusal  # whose it is, others need not know
    assert list(stage.installation.leases()) == [UID]
    listed = subprocess.run([stage.installation.program("chandler"), "leases"], capture_output=True, text=True, env={})
    assert "ResourceClaim team/one" in listed.stdout and " dra " in listed.stdout
    assert kubelet.unprepare("one", UID) == kubelet.unprepare("one", UID) == ""
    assert stage.left() == ({}, [], [])
    assert kubelet.prepare("two", OTHER).error == "" and stage.installation.leases() == {OTHER: [gpu(0)]}


def test_the_slices_are_true(stage: Stage, needs_mounts: None) -> None:
    stage.start()
    until(lambda: len(stage.api.devices()) == 3, "slices")
    (first,) = stage.api.slices()
    assert first["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Node", "name": "here", "uid": "node-uid"}
    ]
    assert first["spec"]["pool"] == {"name": "here", "resourceSliceCount": 1, "generation": 1}
    assert first["spec"]["devices"][1]["attributes"] == {
        "vendor": {"string": "nvidia"},
        "kind": {"string": "nvidia.com/gpu"},
        "name": {"string": "1"},
        "uuid": {"string": uuid(1)},
    }

    def tainted() -> list[str]:
        return [name for name, device in stage.api.devices().items() if device.get("taints")]

    node = stage.node.gpus[1].host
    os.rename(node, node + ".gone")
    until(lambda: tainted() == ["nvidia-1"], "a taint")
    assert stage.api.slices()[0]["spec"]["pool"]["generation"] == 2
    os.rename(node + ".gone", node)
    until(lambda: tainted() == [], "the end of the taint")
    # A device that a claim has is the scheduler's business; one that a container has got otherwise is not free.
    stage.api.add_claim("one", UID, "nvidia-0")
    assert stage.kubelet.prepare("one", UID).error == ""
    engine = Engine([stage.installation.program()], os.path.join(stage.workdir, "root"))
    asks = {**bundle.pod("x"), "chandler.oci/resources.gpu.count": "1"}
    bundle_of_x = bundle.make(os.path.join(stage.workdir, "x"), ["sleep", "600"], asks)
    engine.create(bundle_of_x, "x")
    until(lambda: tainted() == ["nvidia-1"], "a taint")
    engine.clean()
    until(lambda: tainted() == [], "the end of the taint")
    # The kubelet deletes slices when it starts; a driver that starts writes its own.
    stage.api.objects.pop(slices_path(stage))
    until(lambda: len(stage.api.devices()) == 3, "slices again")
    # A cluster without taints does not see such a device at all.
    stage.api.knows_taints = False
    os.rename(node, node + ".gone")
    until(lambda: list(stage.api.devices()) == ["nvidia-0", "nvidia-2"], "two devices")
    os.unlink(stage.node.spec)
    until(lambda: not stage.api.slices(), "no slice")


def slices_path(stage: Stage) -> str:
    return f"/apis/resource.k8s.io/v1/resourceslices/{stage.api.slices()[0]['metadata']['name']}"


def opaque(parameters: Any, source: str = "FromClaim") -> dict[str, Any]:
    return {"config": [{"source": source, "opaque": {"driver": "gpu.chandler.oci", "parameters": parameters}}]}


def test_what_is_refused(stage: Stage) -> None:
    kubelet = stage.start()
    add = stage.api.add_claim

    def refusal() -> str:
        error: str = kubelet.prepare("one", UID).error
        assert error and stage.left() == ({}, [], []), error
        return error

    assert "resourceclaims/one" in refusal()
    add("one", OTHER, "nvidia-0")
    assert f"another one than the kubelet's, which has the uid {UID}" in refusal()
    add("one", UID, "nvidia-9")
    assert "nvidia-9 of the pool here is no device of this node" in refusal()
    add("one", UID)
    assert "no device of gpu.chandler.oci is allocated" in refusal()
    add("one", UID, "nvidia-0", **opaque({"x": 1}))
    assert "ResourceClaim team/one: it has the unknown parameter x" in refusal()
    add("one", UID, "nvidia-0", **opaque({"sharing": {}}, "FromClass"))
    assert "its DeviceClass asks for sharing, which gpu.chandler.oci does not have yet" in refusal()
    add("one", UID, "nvidia-0", **opaque([]))
    assert "no object" in refusal()
    add("one", UID, "nvidia-0")
    claim = stage.api.objects["/apis/resource.k8s.io/v1/namespaces/team/resourceclaims/one"]
    claim["status"]["allocation"]["devices"]["results"][0]["adminAccess"] = True
    assert "adminAccess" in refusal()
    add("one", UID, "nvidia-0", "nvidia-1")
    stage.configure("[policy]\nmax-gpus = 1\n")
    until(lambda: "max-gpus" in kubelet.prepare("one", UID).error, "the policy")
    kubelet.unprepare("one", UID)  # it may have been prepared before that
    assert stage.left() == ({}, [], [])
    # Parameters of another driver are not ours.
    stage.configure()
    add("one", UID, "nvidia-0", config=[{"opaque": {"driver": "other", "parameters": {"x": 1}}}])
    until(lambda: not kubelet.prepare("one", UID).error, "the policy")
    stage.api.token = "another"
    assert "Unauthorized" in kubelet.prepare("one", UID).error


class Killed(BaseException):
    pass


class Drivers:
    """Each call is another process's, which ends with it."""

    def __init__(self, stage: Stage) -> None:
        self.account = Account({b"CHANDLER_CONFIG": os.fsencode(os.path.join(stage.installation.etc, "config.toml"))})
        self.inventory = compiler.compile_now(self.account, store=False)
        self.server = api_server.ApiServer(stage.api.environment, stage.api.account)

    def driver(self) -> dra.Driver:
        said: list[str] = []
        made = dra.Driver(
            self.account, lambda: self.inventory, self.server, "here", "/nowhere", lambda *_: None, said.append
        )
        made._names = {slices.device_name(name): name for name in slices.survey(self.inventory, [])}
        return made

    def prepare(self) -> None:
        self.driver().prepare(UID, "team", "one")

    def unprepare(self) -> None:
        self.driver().unprepare(UID)


def test_it_may_be_killed_between_any_two_steps(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    config = os.path.join(stage.installation.etc, "config.toml")
    text = f'state-dir = "{stage.installation.state}"\n' + read(config)
    with open(config, "w", encoding="utf-8") as file:
        file.write(text)
    stage.api.add_claim("one", UID, "nvidia-2", "nvidia-0")
    left = 0  # until the kill; each step counts twice, before and after it

    def stepwise(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*words: Any, **more: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            done = real(*words, **more)
            left -= 1
            if left == 0:
                raise Killed
            return done

        return step

    for module, name in ((files, "replace"), (os, "unlink"), (grants, "remove")):
        monkeypatch.setattr(module, name, stepwise(getattr(module, name)))
    drivers = Drivers(stage)
    prepared = ({UID: [gpu(2), gpu(0)]}, [f"gpu.chandler.oci-claim_{UID}.json"], [f"00000000-{UID}.json"])
    nothing: Any = ({}, [], [])
    states = (
        (drivers.prepare, prepared, drivers.unprepare, nothing),
        (drivers.unprepare, nothing, drivers.prepare, prepared),
    )
    for call, then, back, before in states:
        left = 0
        back()
        for number in range(1, 100):
            assert stage.left() == before
            left = number
            try:
                call()
                break
            except Killed:
                pass
            for again in (call, call, back):
                left = 0
                again()
                if again is call:
                    assert stage.left() == then
        assert 8 <= number < 99
    drivers.server.close()


def test_restart_reboot_and_a_lost_ledger(stage: Stage) -> None:
    kubelet = stage.start()
    stage.api.add_claim("one", UID, "nvidia-1")
    answer = kubelet.prepare("one", UID)
    before = stage.left()
    # Only the kubelet ends a claim's lease.
    chandler = stage.installation.program("chandler")
    subprocess.run([chandler, "leases", "release", "--stale"], check=True, capture_output=True, env={})
    assert stage.left() == before
    stage.plugin.stop(signal.SIGKILL)  # leaves its socket
    os.unlink(os.path.join(stage.installation.state, "leases"))
    os.unlink(os.path.join(stage.installation.state, "leases.copy"))
    subprocess.run([chandler, "leases", "rebuild"], check=True, capture_output=True, env={})
    assert stage.left() == before
    stage.plugin.start(serving=False)
    kubelet.register()
    assert kubelet.prepare("one", UID) == answer and stage.left() == before
    # After a reboot /run is empty, and the kubelet asks again for what its checkpoint has.
    stage.plugin.stop(signal.SIGKILL)
    stage.installation.forget()
    shutil.rmtree(stage.claims)
    stage.plugin.start(serving=False)
    kubelet.register()
    assert kubelet.unprepare("other", OTHER) == ""
    assert kubelet.prepare("one", UID) == answer and stage.left() == before
    os.unlink(kubelet.path)  # somebody has cleaned up
    assert kubelet.register().name == "gpu.chandler.oci"
    assert stage.plugin.stop() == 0 and not os.path.exists(kubelet.path)


def test_a_container_with_a_claim_is_left_alone(stage: Stage, needs_mounts: None) -> None:
    kubelet = stage.start()
    stage.api.add_claim("one", UID, "nvidia-1")
    assert kubelet.prepare("one", UID).error == ""
    engine = Engine([stage.installation.program()], os.path.join(stage.workdir, "root"))
    device = stage.node.gpus[1]
    given = {"path": device.inside, "type": "c", "major": device.major, "minor": device.minor}
    for asks in (False, True):
        made = bundle.make(os.path.join(stage.workdir, f"x{asks}"), ["sleep", "600"], bundle.pod("x"))
        config = made.config
        config["linux"]["devices"] = [given]
        if asks:
            config["annotations"]["chandler.oci/resources.gpu.count"] = "1"
        made.config = config
        done = engine.create(made, f"x{asks}", check=False)
        assert bool(done.returncode) == asks, done.stdout
        assert not asks or "config.json has a GPU already" in done.stdout
    engine.clean()


def test_it_stays_small(workdir: str, needs_devices: None) -> None:
    stage = Stage(workdir, 8)
    try:
        kubelet = stage.start()
        until(lambda: len(stage.api.devices()) == 8, "slices")
        for number in range(100):
            stage.api.add_claim("one", UID, f"nvidia-{number % 8}")
            assert kubelet.prepare("one", UID).error == kubelet.unprepare("one", UID) == ""
        assert stage.plugin.resident() < 64 << 10
    finally:
        stage.close()


@pytest.mark.parametrize(
    "name",
    ["nvidia.com/gpu=0:1", "nvidia.com/gpu=0-1", "nvidia.com/gpu=A", "x.y/z=" + "a" * 80, "x.y/z=_", "amd.com/gpu=0"],
)
def test_names_of_devices_are_labels(name: str) -> None:
    made = slices.device_name(name)
    assert slices._LABEL.fullmatch(made) and made != slices.device_name(name + "1")


def test_what_a_person_can_meet(stage: Stage) -> None:
    def run(*words: str, **environment: str) -> str:
        done = subprocess.run(
            [stage.installation.program("chandler-kubelet-plugin"), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode and "Traceback" not in done.stderr
        return done.stderr

    assert "KUBERNETES_SERVICE_HOST" in run("--dra", "--node", "here")
    assert "set NODE_NAME" in run("--dra", **stage.api.environment)
    assert "--registry x is not an absolute path" in run("--dra", "--registry", "x")
