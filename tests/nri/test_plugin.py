"""The plugin's connection with a runtime in memory: the order of calls, each call, and errors that end it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab.peer import Peer, container, pod
from lab.served import NVIDIA, Served, inventory, service_of, spec

from shim.errors import ChandlerError
from shim.nri import messages as m
from shim.nri import mux, plugin
from shim.nri.evict import kill
from shim.nri.plugin import CLOSING, READY, REGISTERING, Connection, Refused
from shim.ttrpc import errors, frame
from shim.ttrpc.errors import ProtocolError, RemoteError, TtrpcError

Connect = Callable[..., Peer]
OWN = {"chandler.oci/service.main": json.dumps({"resources": {"gpu": {"count": 2}}})}
TWO = {"chandler.oci/service": json.dumps({"resources": {"gpu": {"count": 2}}})}
EVENTS = (
    1 << m.STOP_POD_SANDBOX - 1
    | 1 << m.CREATE_CONTAINER - 1
    | 1 << m.START_CONTAINER - 1
    | 1 << m.STOP_CONTAINER - 1
    | 1 << m.REMOVE_CONTAINER - 1
)


def new(service: Callable[..., Served], **config: Any) -> Connection:
    return Connection("chandler", "50", service(**config))


# --- the handshake ------------------------------------------------------------------------------------------------


def test_the_handshake(service: Callable[..., Served]) -> None:
    connection = new(service)
    peer = Peer(connection)
    configured = peer.handshake()
    assert [(each.plugin_name, each.plugin_idx, each.NRI_version) for each in peer.registered] == [
        ("chandler", "50", m.VERSION)
    ]
    assert configured.events == EVENTS and configured.events & ~0x7FF == 0
    assert configured.failure_policy.fail_request and not configured.failure_policy.keep_connected
    assert connection.state == READY
    assert str(connection.service.runtime) == "containerd 2.1.9"


def test_a_runtime_that_tells_its_nri_version_knows_the_newest_event(peer: Connect) -> None:
    configured = peer().call(
        "Configure", m.ConfigureRequest(runtime_name="containerd", runtime_version="2.2", NRI_version="v0.11.0")
    )
    assert m.ConfigureResponse.FromString(configured).events == EVENTS | 1 << m.VALIDATE_CONTAINER_ADJUSTMENT - 1


def test_the_runtime_may_configure_before_it_answers_the_registration(service: Callable[..., Served]) -> None:
    connection = new(service)
    peer = Peer(connection)
    connection.open()
    assert connection.state == REGISTERING
    held = connection.take()
    stream = peer.client.call(
        m.PLUGIN_SERVICE,
        "Configure",
        m.ConfigureRequest(runtime_name="containerd", runtime_version="1.7.24").SerializeToString(),
    )
    peer.exchange()
    assert peer.replies.pop(stream).result()
    for _, piece in peer.mux.feed(held):
        peer.serve(piece)
    peer.call("Synchronize", m.SynchronizeRequest())
    assert connection.state == READY


def test_a_refused_registration_is_fatal(service: Callable[..., Served]) -> None:
    connection = new(service)
    peer = Peer(connection)
    peer.refusal = "invalid plugin index"
    connection.open()
    with pytest.raises(Refused, match="invalid plugin index.*--idx"):
        peer.exchange()


def test_synchronize_in_parts(service: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    connection = new(service)
    peer = Peer(connection)
    seen: list[Any] = []
    monkeypatch.setattr(
        connection.service,
        "synchronize",
        lambda pods, containers: seen.append((sorted(pods), [each.id for each in containers])),
    )
    connection.open()
    peer.exchange()
    first = m.SynchronizeResponse.FromString(
        peer.call("Synchronize", m.SynchronizeRequest(pods=[pod(id="a"), pod(id="b")], more=True))
    )
    second = m.SynchronizeResponse.FromString(
        peer.call("Synchronize", m.SynchronizeRequest(containers=[container(id="x")], more=True))
    )
    assert first.more and second.more and not seen and connection.state != READY
    last = m.SynchronizeResponse.FromString(
        peer.call("Synchronize", m.SynchronizeRequest(containers=[container(id="y")]))
    )
    assert not last.more and seen == [(["a", "b"], ["x", "y"])]


def test_more_containers_than_a_node_has_are_refused(peer: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "MAX_CONTAINERS", 2)
    with pytest.raises(RemoteError, match="more than 2"):
        peer().call("Synchronize", m.SynchronizeRequest(containers=[container(), container(), container()]))


# --- calls --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 4096])
def test_a_container_with_a_request(peer: Connect, size: int) -> None:
    connected = peer(size=size)
    made = connected.create(pod(TWO), container())
    assert [device.name for device in made.CDI_devices] == [f"{NVIDIA}=0", f"{NVIDIA}=1"]
    (record,) = service_of(connected).records()
    assert (record["id"], record["owner"], record["devices"]) == ("container-1", "nri", [f"{NVIDIA}=0", f"{NVIDIA}=1"])
    assert record["nodes"] == [
        ["/dev/nvidiactl", "c", 195, 255],
        ["/dev/nvidia0", "c", 195, 0],
        ["/dev/nvidia1", "c", 195, 1],
    ]
    (line,) = service_of(connected).lines
    assert (line["container"], line["pod"], line["name"], line["devices"]) == (
        "container-1",
        "trainer-0",
        "main",
        record["devices"],
    )


def test_a_container_without_a_request_is_left_alone(peer: Connect) -> None:
    connected = peer()
    answer = connected.call(
        "CreateContainer", m.CreateContainerRequest(pod=pod({"other/key": "x"}), container=container())
    )
    assert answer == b"" and not service_of(connected).lines and not service_of(connected).records()


def test_each_container_of_a_pod_has_its_own_request(peer: Connect) -> None:
    connected = peer()
    annotations = {
        "chandler.oci/services": json.dumps({"a": {"resources": {"gpu": {"count": 1}}}, "b": {"env": {"B": "1"}}})
    }
    assert len(connected.create(pod(annotations), container(name="a", id="c-a")).CDI_devices) == 1
    assert [entry.key for entry in connected.create(pod(annotations), container(name="b", id="c-b")).env] == ["B"]
    assert connected.create(pod(annotations), container(name="c", id="c-c")).ByteSize() == 0


def test_the_name_comes_from_nri_and_never_from_an_annotation(peer: Connect) -> None:
    forged = {
        "io.kubernetes.cri.container-name": "a",
        "io.kubernetes.cri.container-type": "sandbox",
        "chandler.oci/service.a": '{"env": {"A": "1"}}',
        "chandler.oci/service.b": '{"env": {"B": "1"}}',
    }
    assert [entry.key for entry in peer().create(pod(forged), container(forged, name="b")).env] == ["B"]


REFUSED = {
    "an unknown key": ({"chandler.oci/service": '{"gpu": 1}'}, "unknown key 'gpu'", errors.INVALID_ARGUMENT),
    "more than there are": (
        {"chandler.oci/service": '{"resources": {"gpu": {"count": 9}}}'},
        "9",
        errors.INVALID_ARGUMENT,
    ),
    "more than the policy allows": (
        {"chandler.oci/service": '{"resources": {"gpu": {"count": 3}}}'},
        "max-gpus",
        errors.PERMISSION_DENIED,
    ),
    "our mark": ({"chandler.oci/granted": f"{NVIDIA}=0"}, "mark", errors.INVALID_ARGUMENT),
    "our mark beside a request": ({**TWO, "chandler.oci/granted": ""}, "mark", errors.INVALID_ARGUMENT),
    "a device that is not there": (
        {"chandler.oci/service": '{"resources": {"gpu": {"devices": ["77"]}}}'},
        "77",
        errors.FAILED_PRECONDITION,
    ),
}


@pytest.mark.parametrize("annotations, words, code", REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_one_sentence_of_chandler(
    peer: Connect, annotations: dict[str, str], words: str, code: int
) -> None:
    connected = peer(policy__max_gpus=2)
    with pytest.raises(RemoteError) as error:
        connected.create(pod(annotations), container())
    assert words in error.value.message and error.value.code == code
    assert not service_of(connected).records()
    (line,) = service_of(connected).lines
    assert words in line["refused"]
    assert connected.create(pod(), container()).ByteSize() == 0, "the plugin serves on"


def test_refusals_are_counted_by_kind_and_rule(peer: Connect) -> None:
    rules = [{"name": 'say "no"', "match": {"namespace": ["default"]}, "policy.max-gpus": 1}]
    for config, rule in (({"policy__max_gpus": 1}, "[policy]"), ({"policy__rule": rules}, "rule 'say \\\"no\\\"'")):
        connected = peer(**config)
        for asked in (TWO, TWO, {"chandler.oci/service": "{"}):
            with pytest.raises(RemoteError):
                connected.create(pod(asked), container())
        lines = [
            line
            for line in service_of(connected).metrics_text().splitlines()
            if line.startswith("chandler_nri_refusals_total")
        ]
        assert lines == [
            f'chandler_nri_refusals_total{{kind="PolicyError",rule="{rule}"}} 2',
            'chandler_nri_refusals_total{kind="RequestError",rule=""} 1',
        ]


@pytest.mark.parametrize("allocator, words", [("fixed", "cannot be recorded"), ("leases", "is not a directory")])
def test_a_grant_that_cannot_be_recorded_is_refused(peer: Connect, allocator: str, words: str) -> None:
    connected = peer(gpu__allocator=allocator)
    state = service_of(connected).account.state_dir
    if allocator == "fixed":
        os.makedirs(state + "/nri", 0o755)
        state += "/nri/grants"
    with open(state, "w", encoding="ascii"):
        pass  # a file where the directory would be
    with pytest.raises(RemoteError, match=words):
        connected.create(pod(TWO), container())


@pytest.mark.parametrize("how", ["event", "call"])
def test_a_grant_ends_when_the_container_is_removed(peer: Connect, how: str) -> None:
    connected = peer()
    connected.create(pod(TWO), container())
    connected.call("StopContainer", m.StopContainerRequest(pod=pod(TWO), container=container()))
    assert len(service_of(connected).records()) == 1
    for _ in range(2):
        if how == "event":
            connected.call("StateChange", m.StateChangeEvent(event=m.REMOVE_CONTAINER, container=container()))
        else:
            connected.call("RemoveContainer", m.RemoveContainerRequest(container=container()))
    assert not service_of(connected).records()


@pytest.mark.parametrize(
    "method",
    [
        "RunPodSandbox",
        "UpdatePodSandbox",
        "PostUpdatePodSandbox",
        "StopPodSandbox",
        "RemovePodSandbox",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "UpdateContainer",
        "PostUpdateContainer",
        "StateChange",
    ],
)
def test_events_are_answered(peer: Connect, method: str) -> None:
    assert (
        peer().call(
            method,
            m.CreateContainerRequest(pod=pod(), container=container())
            if method != "StateChange"
            else m.StateChangeEvent(event=1),
        )
        == b""
    )


def test_an_unknown_method_and_an_unknown_service(peer: Connect) -> None:
    for method, service in (
        ("Surprise", m.PLUGIN_SERVICE),
        ("Configure", "other.Service"),
        ("Log", "nri.pkg.api.v1alpha1.HostFunctions"),
    ):
        with pytest.raises(RemoteError) as error:
            peer().call(method, b"", service)
        assert error.value.code == errors.UNIMPLEMENTED


def test_a_message_that_cannot_be_read(peer: Connect) -> None:
    with pytest.raises(RemoteError, match="cannot be read") as error:
        peer().call("CreateContainer", b"\xff\xff\xff")
    assert error.value.code == errors.INVALID_ARGUMENT


def test_a_defect_of_ours_fails_one_call(peer: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = peer()
    monkeypatch.setattr(service_of(connected), "stop", lambda *_: 1 // 0)
    with pytest.raises(RemoteError, match="internal error in StopContainer, ZeroDivisionError"):
        connected.call("StopContainer", m.StopContainerRequest())
    assert "time" in service_of(connected).lines[-1] and "ZeroDivisionError" in service_of(connected).lines[-1]["error"]
    assert connected.create(pod(TWO), container()).CDI_devices


def test_another_plugin_cannot_remove_granted_devices(peer: Connect) -> None:
    connected = peer()
    made = connected.create(pod(TWO), container())
    request = m.ValidateContainerAdjustmentRequest(container=container(), adjust=made)
    assert connected.call("ValidateContainerAdjustment", request) == b""
    del request.adjust.CDI_devices[0]
    answer = m.ValidateContainerAdjustmentResponse.FromString(connected.call("ValidateContainerAdjustment", request))
    assert answer.reject and f"{NVIDIA}=0" in answer.reason
    assert (
        connected.call(
            "ValidateContainerAdjustment", m.ValidateContainerAdjustmentRequest(container=container(id="other"))
        )
        == b""
    )


def test_shutdown(peer: Connect) -> None:
    connected = peer()
    connected.call("Shutdown", m.Empty())
    assert connected.connection.state == CLOSING


# --- synchronising ------------------------------------------------------------------------------------------------


def synchronized(peer: Peer, containers: list[Any], pods: list[Any]) -> list[dict[str, Any]]:
    lines = service_of(peer).lines
    before = len(lines)
    peer.call("Synchronize", m.SynchronizeRequest(pods=pods, containers=containers))
    peer.exchange()
    return lines[before:]


@pytest.mark.parametrize("evict", [False, True])
def test_an_unserved_container_is_reported(peer: Connect, evict: bool) -> None:
    connected = peer(policy__evict_unadjusted=evict)
    ended: list[str] = []
    service_of(connected).sweeps.evict = lambda container, pid: ended.append(container)
    connected.create(pod(TWO), container(id="served"))
    running = [
        served(connected, "served"),
        container(id="unserved", state=3),
        container(id="ended", state=4),
        container(id="plain", pod_id="pod-2", state=3),
        container({"chandler.oci/granted": "everything"}, id="marked", state=3),
    ]
    lines = synchronized(connected, running, [pod(TWO), pod(id="pod-2")])
    assert [(line["container"], line["evicted"]) for line in lines] == [("unserved", evict), ("marked", evict)]
    assert ended == (["unserved", "marked"] if evict else [])
    assert service_of(connected).metrics.unadjusted == 2


def served(connected: Peer, id: str, state: int = 3) -> Any:
    """A container that the plugin has granted something, as the runtime tells of it when the answer has reached it."""
    record = next(record for record in service_of(connected).records() if record["id"] == id)
    made = container({record["mark"][0]: record["mark"][1]}, id=id, state=state)
    for path, kind, major, minor in record["nodes"]:
        made.linux.devices.add(path=path, type=kind, major=major, minor=minor)
    return made


def test_a_container_that_lacks_the_devices_of_its_record_is_not_served(peer: Connect) -> None:
    """The answer came too late, or another create of the same id left the record.

    A container counts as served only with both the mark and the devices.
    """
    ended: list[str] = []
    connected = peer(policy__evict_unadjusted=True, gpu__allocator="leases")
    service_of(connected).sweeps.evict = lambda container, pid: ended.append(container)
    for n in range(4):
        connected.create(pod(TWO), container(id=f"c-{n}"))
    told = [served(connected, f"c-{n}") for n in range(4)]
    del told[1].annotations["chandler.oci/granted"]
    told[2].annotations["chandler.oci/granted"] = f"{NVIDIA}=0"
    del told[3].linux.devices[0]
    lines = synchronized(connected, told, [pod(TWO)])
    assert ended == ["c-1", "c-2", "c-3"] == [line["container"] for line in lines if "undone" in line]
    assert list(leased(connected)) == ["c-0"] and [record["id"] for record in service_of(connected).records()] == [
        "c-0"
    ]


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff",
        b"{}",
        b"[]",
        b'{"id": "c", "physical": [], "nodes": 7}',
        b'{"id": "c", "physical": 1, "nodes": []}',
        b'{"id": "c", "physical": [], "nodes": [[]], "mark": 3}',
    ],
)
def test_a_served_container_is_not_ended_for_a_damaged_record(peer: Connect, damage: bytes) -> None:
    connected = peer(policy__evict_unadjusted=True)
    ended: list[str] = []
    service_of(connected).sweeps.evict = lambda container, pid: ended.append(container)
    connected.create(pod(TWO), container(id="c"))
    told = served(connected, "c")
    with open(os.path.join(service_of(connected).account.state_dir, "nri/grants/00000000-c.json"), "wb") as file:
        file.write(damage)
    assert synchronized(connected, [told], [pod(TWO)]) == [] and ended == []
    connected.call("StartContainer", m.StartContainerRequest(pod=pod(TWO), container=told))


def test_only_a_process_of_the_container_is_ended() -> None:
    """Numbers of processes are used again."""
    other = "f" * 64
    for pid, words in ((0, "has not told"), (1, "has not told"), (os.getpid(), "not in its control group")):
        with pytest.raises(ChandlerError, match=words):
            kill(other, pid)
    kill(other, 4194305)  # no process has such a number: it has ended


def test_a_container_that_the_wrapper_equipped_counts_as_served(peer: Connect) -> None:
    connected = peer()
    directory = os.path.join(service_of(connected).account.state_dir, "grants")
    os.makedirs(directory)
    with open(os.path.join(directory, "0badcafe-wrapped.json"), "w", encoding="ascii") as file:
        file.write("{}")
    assert synchronized(connected, [container(id="wrapped", state=3)], [pod(TWO)]) == []


def test_grants_of_containers_that_are_gone_end_when_they_are_old_enough(peer: Connect) -> None:
    connected = peer()
    for name in ("gone", "young", "there"):
        connected.create(pod(TWO), container(id=name))
    there = served(connected, "there")
    service_of(connected).granted.clear()  # by an earlier process
    directory = os.path.join(service_of(connected).account.state_dir, "nri/grants")
    os.utime(os.path.join(directory, "00000000-gone.json"), (0, 0))
    with open(os.path.join(directory, "00000000-damaged.json"), "wb") as file:
        file.write(b"\xff")
    synchronized(connected, [there], [pod(TWO)])
    assert sorted(os.listdir(directory)) == ["00000000-damaged.json", "00000000-there.json", "00000000-young.json"]
    os.utime(os.path.join(directory, "00000000-damaged.json"), (0, 0))
    digest = f"00000000-{'5' * 64}.json"  # in place of an id that is no file name
    with open(os.path.join(directory, digest), "wb") as file:
        file.write(b"\xff")
    os.utime(os.path.join(directory, digest), (0, 0))
    synchronized(connected, [there], [pod(TWO)])
    assert sorted(os.listdir(directory)) == ["00000000-there.json", "00000000-young.json"]


# --- leases -------------------------------------------------------------------------------------------------------


def leased(peer: Peer) -> dict[str, list[str]]:
    """By container; a pod's own leases are tested in test_nri_pod_leases.py."""
    held = service_of(peer).ledger.read()
    return {lease["id"]: lease["names"] for lease in held if lease["id"] != lease.get("claim")}


def test_no_two_containers_hold_one_device(peer: Connect) -> None:
    connected = peer(gpu__allocator="leases")
    names = [
        [device.name for device in connected.create(pod(OWN), container(id=f"c-{n}")).CDI_devices] for n in range(4)
    ]
    assert names == [[f"{NVIDIA}={2 * n}", f"{NVIDIA}={2 * n + 1}"] for n in range(4)]
    with pytest.raises(RemoteError, match="2 devices"):
        connected.create(pod(OWN), container(id="c-4"))
    connected.call("StopContainer", m.StopContainerRequest(container=container(id="c-2")))
    assert sorted(leased(connected)) == ["c-0", "c-1", "c-3"]
    assert "\nchandler_nri_leases 3\n" in service_of(connected).metrics_text()
    assert [device.name for device in connected.create(pod(OWN), container(id="c-5")).CDI_devices] == names[2]
    for n in (0, 1, 2, 3, 5):
        connected.call("StateChange", m.StateChangeEvent(event=m.REMOVE_CONTAINER, container=container(id=f"c-{n}")))
    assert leased(connected) == {} and service_of(connected).records() == []


def test_a_lost_ledger_is_noticed(peer: Connect) -> None:
    """The plugin's grants say that there were leases: nobody takes the devices for free ones."""
    connected = peer(gpu__allocator="leases")
    connected.create(pod(TWO), container(id="c-0"))
    for name in ("", ".copy"):
        os.unlink(service_of(connected).ledger.path + name)
    with pytest.raises(RemoteError, match="is lost; `chandler leases rebuild`"):
        connected.create(pod(TWO), container(id="c-1"))


def test_a_create_that_fails_holds_no_lease(peer: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = peer("1.7.24", gpu__allocator="leases")
    with pytest.raises(RemoteError, match="pids_limit"):
        connected.create(
            pod({"chandler.oci/service": '{"resources": {"gpu": {"count": 1}, "pids_limit": 5}}'}), container()
        )
    assert leased(connected) == {}
    monkeypatch.setattr(
        "shim.state.grants.write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(RemoteError, match="No space left"):
        connected.create(pod(TWO), container())
    assert leased(connected) == {}


def test_a_container_that_still_runs_keeps_its_lease(peer: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = peer(gpu__allocator="leases")
    connected.create(pod(TWO), container(id="c"))
    monkeypatch.setattr("shim.nri.evict.runs", lambda container, pid: True)
    connected.call("StopContainer", m.StopContainerRequest(container=container(id="c")))
    assert list(leased(connected)) == ["c"]


def test_leases_of_containers_that_ended_unseen_are_ended(peer: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = peer(gpu__allocator="leases")
    for name in ("live", "ended", "gone"):
        connected.create(pod(TWO), container(id=name))
    now = [served(connected, "live"), served(connected, "ended", 4)]
    synchronized(connected, now, [pod(TWO)])
    assert sorted(leased(connected)) == ["ended", "gone", "live"], "they are younger than a create may last"
    monkeypatch.setattr("shim.nri.sweeps._MINIMUM_AGE", 0.0)
    synchronized(connected, now, [pod(TWO)])
    assert list(leased(connected)) == ["live"]


# --- what breaks a connection -------------------------------------------------------------------------------------


def test_data_for_an_unopened_connection_is_an_error(peer: Connect) -> None:
    with pytest.raises(mux.MuxError, match="connection 7"):
        peer().connection.receive(mux.encode(7, b"x"))


def test_an_oversize_message_ends_the_connection(peer: Connect) -> None:
    with pytest.raises(ProtocolError):
        peer().connection.receive(mux.encode(mux.PLUGIN, frame.HEADER.pack(frame.MAX_MESSAGE + 1, 1, frame.REQUEST, 0)))


def test_a_large_answer_leaves_in_small_frames(peer: Connect) -> None:
    connected = peer("1.7.24", spec({"env": [f"VARIABLE_{n}={'x' * 100}" for n in range(400)]}))
    assert len(connected.create(pod(TWO), container()).env) == 402
    assert connected.sent > 40_000


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from((mux.PLUGIN, mux.RUNTIME)), st.binary(max_size=120)), max_size=5))
def test_arbitrary_bytes_are_answered_or_end_the_connection(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, bytes]]
) -> None:
    connection = Connection("chandler", "50", Served(str(tmp_path_factory.getbasetemp() / "nri"), inventory()))
    connection.open()
    try:
        for number, data in pieces:
            connection.receive(mux.encode(number, data))
            connection.take()
    except (TtrpcError, ChandlerError):
        pass


METHODS = [
    "Configure",
    "Synchronize",
    "CreateContainer",
    "StopContainer",
    "RemoveContainer",
    "UpdateContainer",
    "StateChange",
    "ValidateContainerAdjustment",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(METHODS), st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_damaged_messages_never_end_a_connection(
    tmp_path_factory: pytest.TempPathFactory, method: str, garbage: bytes, workdir: int, byte: int
) -> None:
    peer = Peer(Connection("chandler", "50", Served(str(tmp_path_factory.getbasetemp() / "nri"), inventory())))
    peer.handshake()
    whole = m.CreateContainerRequest(pod=pod(TWO), container=container()).SerializeToString()
    damaged = whole[:workdir] + bytes([byte]) + whole[workdir + 1 :]
    for message in (garbage, damaged):
        try:
            peer.call(method, message)
        except RemoteError as error:
            assert "Traceback" not in error.message
    peer.call("UpdateContainer", m.Empty())


# --- creates that nobody waits for --------------------------------------------------------------------------------


def timed(peer: Peer, seconds: float, now: float, asked: Any, of: Any) -> None:
    """A create as the runtime sends it, with how long it waits; the plugin reads it at `now`."""
    stream = peer.client.call(
        m.PLUGIN_SERVICE,
        "CreateContainer",
        m.CreateContainerRequest(pod=asked, container=of).SerializeToString(),
        timeout=int(seconds * 1_000_000_000),
    )
    peer.connection.receive(mux.encode(mux.PLUGIN, peer.client.take()), now)
    peer.exchange()
    peer.replies.pop(stream).result()


@pytest.mark.parametrize("allocator", ["fixed", "leases"])
def test_a_create_whose_time_is_over_is_not_granted(peer: Connect, allocator: str) -> None:
    connected = peer(gpu__allocator=allocator)
    with pytest.raises(RemoteError, match="no longer waits for the answer to this create"):
        timed(connected, 2.0, time.monotonic() - 2.0, pod(TWO), container())
    assert not service_of(connected).records() and leased(connected) == {}
    timed(connected, 2.0, time.monotonic() - 2.0, pod(), container(id="plain"))
    timed(connected, 60.0, time.monotonic() - 2.0, pod(TWO), container(id="in time"))
    assert [record["id"] for record in service_of(connected).records()] == ["in time"]


@pytest.mark.parametrize("looks", [0, 1])
def test_a_create_whose_runtime_has_hung_up_is_not_granted(peer: Connect, looks: int) -> None:
    """Before the work, and after it."""
    connected = peer(gpu__allocator="leases")
    seen: list[bool] = []
    connected.connection.hung_up = lambda: seen.append(True) or len(seen) > looks  # type: ignore[func-returns-value]
    with pytest.raises(RemoteError, match="no longer"):
        connected.create(pod(TWO), container())
    assert not service_of(connected).records() and leased(connected) == {} and not service_of(connected).granted
    connected.connection.hung_up = lambda: False
    assert len(connected.create(pod(TWO), container()).CDI_devices) == 2


@pytest.mark.parametrize("left", [0, 1])
def test_a_grant_whose_answer_did_not_leave_is_taken_back(peer: Connect, left: int) -> None:
    connected = peer(gpu__allocator="leases")
    connected.create(pod(TWO), container(id="sent"))
    connected.connection.all_sent()
    connected.create(pod(TWO), container(id="last"))
    connected.connection.close(left)
    assert sorted(leased(connected)) == (["sent"] if left else ["last", "sent"])
    assert [line["container"] for line in service_of(connected).lines if "undone" in line] == ["last"] * left


@pytest.mark.parametrize("method", ["StateChange", "StartContainer"])
@pytest.mark.parametrize("evict", [False, True])
def test_an_unserved_container_is_named_or_refused_at_its_start(peer: Connect, method: str, evict: bool) -> None:
    connected = peer(policy__evict_unadjusted=evict)
    connected.create(pod(TWO), container(id="served"))

    def start(of: Any, asked: Any) -> None:
        more = {"event": m.START_CONTAINER} if method == "StateChange" else {}
        kind = m.StateChangeEvent if more else m.StartContainerRequest
        connected.call(method, kind(pod=asked, container=of, **more))

    start(served(connected, "served"), pod(TWO))
    start(container(id="plain"), pod())
    synchronized(connected, [served(connected, "served"), container(id="unserved", state=1)], [pod(TWO)])
    if evict:
        with pytest.raises(RemoteError, match="evict-unadjusted is set"):
            start(container(id="unserved"), pod(TWO))
    else:
        start(container(id="unserved"), pod(TWO))
    lines = [line for line in service_of(connected).lines if "unadjusted" in line]
    assert [(line["container"], line["evicted"]) for line in lines] == [("unserved", False)] + [
        ("unserved", True)
    ] * evict
    assert service_of(connected).metrics.unadjusted == 1 and service_of(connected).records()


def test_a_young_grant_that_the_runtime_does_not_list_ends_later(
    peer: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A create may still be under way (containerd 1.7 lists containers meanwhile), or have failed unseen.

    The time of day tells nothing.
    """
    connected = peer(gpu__allocator="leases")
    for name in ("created", "failed"):
        connected.create(pod(TWO), container(id=name))
    told = served(connected, "created")
    monkeypatch.setattr("shim.nri.sweeps.time.time", lambda: 0.0)
    synchronized(connected, [], [])
    assert sorted(leased(connected)) == ["created", "failed"]
    connected.call("StartContainer", m.StartContainerRequest(pod=pod(TWO), container=told))
    (at,) = service_of(connected).unlisted.values()
    assert at in service_of(connected).due()
    service_of(connected).tick(at)
    assert list(leased(connected)) == ["created"]


# --- GPUs of other plugins ----------------------------------------------------------------------------------------


def with_node(minor: int, base: Any = None) -> Any:
    made = m.ContainerAdjustment()
    if base is not None:
        made.CopyFrom(base)
    made.linux.devices.add(path="/dev/other", type="c", major=195, minor=minor)
    return made


def judged(peer: Peer, adjustment: Any, id: str) -> str:
    request = m.ValidateContainerAdjustmentRequest(container=container(id=id), adjust=adjustment)
    return str(
        m.ValidateContainerAdjustmentResponse.FromString(peer.call("ValidateContainerAdjustment", request)).reason
    )


@pytest.mark.parametrize("version", ["1.7.24", "2.2.0"])
def test_gpus_that_other_plugins_add(peer: Connect, version: str) -> None:
    connected = peer(version, gpu__allocator="leases")
    ours = connected.create(pod(TWO), container(id="ours"))
    named = m.ContainerAdjustment()
    named.CDI_devices.add(name=f"{NVIDIA}=1")
    assert f"adds {NVIDIA}=1, but ours holds" in judged(connected, named, "other")
    assert "adds /dev/other" in judged(connected, with_node(0), "other")
    assert judged(connected, with_node(0, ours), "ours") == "", "what it has already"
    assert "beside the GPUs that Chandler granted" in judged(connected, with_node(5, ours), "ours")
    before = len(service_of(connected).lines)
    assert (
        judged(connected, with_node(5), "other") == ""
        and "of which Chandler keeps no lease" in service_of(connected).lines[-1]["beside"]
    )
    for base, words in ((None, "but ours holds"), (ours, "beside the GPUs that Chandler granted")):
        for rule in ({"type": "c"}, {"type": "a", "access": "rwm"}, {"access": "r"}):
            opening = m.ContainerAdjustment()
            if base is not None:
                opening.CopyFrom(base)
            opening.linux.resources.devices.add(allow=True, **rule)
            assert words in judged(connected, opening, "other" if base is None else "ours")
    for harmless in (with_node(255), with_node(77), m.ContainerAdjustment()):
        assert judged(connected, harmless, "other") == ""
    assert len(service_of(connected).lines) == before + 1


def test_a_leased_create_without_hooks(peer: Connect) -> None:
    """Where the runtime's validator rejects them."""
    connected = peer(gpu__allocator="leases")
    assert connected.create(pod(TWO), container(id="a")).HasField("hooks")
    service_of(connected)._rejects_hooks = lambda: True
    connected.call("Configure", m.ConfigureRequest(runtime_name="containerd", runtime_version="2.2.0"))
    assert not connected.create(pod(TWO), container(id="b")).HasField("hooks")
    connected.call("StopContainer", m.StopContainerRequest(container=container(id="b")))
    assert list(leased(connected)) == ["a"]
    # with a file whose hooks have to be told
    other = peer(
        "1.7.24", spec({"hooks": [{"hookName": "createContainer", "path": "/bin/true"}]}), gpu__allocator="leases"
    )
    service_of(other).hooks = False
    with pytest.raises(RemoteError, match="reject_oci_hook_adjustment"):
        other.create(pod(TWO), container(id="c"))
    assert "c" not in leased(other)
