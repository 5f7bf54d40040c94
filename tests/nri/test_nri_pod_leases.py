"""Through NRI: all containers of a pod share what its pod-wide request gets, as long as the pod's sandbox is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from lab.peer import Peer, container, pod
from lab.served import NVIDIA, service_of

from shim.nri import messages as m
from shim.ttrpc.errors import RemoteError

Connect = Callable[..., Peer]
ONE = {"chandler.oci/service": json.dumps({"resources": {"gpu": {"count": 1}}})}


def names(adjustment: Any) -> list[str]:
    return [device.name for device in adjustment.CDI_devices]


def held(peer: Peer) -> dict[str, list[str]]:
    return {lease["id"]: lease["names"] for lease in service_of(peer).ledger.read()}


def start(peer: Peer, id: str) -> None:
    """Tell of a container's start, with what the plugin has granted it."""
    record = next(record for record in service_of(peer).records() if record["id"] == id)
    made = container({record["mark"][0]: record["mark"][1]}, id=id, pod_id="a")
    for path, kind, major, minor in record["nodes"]:
        made.linux.devices.add(path=path, type=kind, major=major, minor=minor)
    peer.call("StartContainer", m.StartContainerRequest(pod=pod(ONE, id="a"), container=made))


def create(peer: Peer, id: str, of: str, **more: Any) -> list[str]:
    return names(peer.create(pod(ONE, id=of), container(id=id, pod_id=of, **more)))


def test_a_pod_keeps_its_gpu_until_its_sandbox_stops(peer: Connect) -> None:
    connected = peer(gpu__allocator="leases")
    first, second = [f"{NVIDIA}=0"], [f"{NVIDIA}=1"]
    assert create(connected, "a1", "a") == create(connected, "a2", "a", name="side") == first
    assert create(connected, "b1", "b") == second
    assert held(connected) == {"a1": first, "a": first, "a2": first, "b1": second, "b": second}
    assert "\nchandler_nri_leases 3\n" in service_of(connected).metrics_text(), "of containers"
    for id in ("a1", "a2"):
        start(connected, id)
    for id in ("a1", "a2"):
        connected.call("StopContainer", m.StopContainerRequest(container=container(id=id)))
    assert sorted(held(connected)) == ["a", "b", "b1"]
    assert create(connected, "a3", "a") == first, "a restart"
    start(connected, "a3")
    connected.call("StopContainer", m.StopContainerRequest(container=container(id="a3")))
    connected.call("StopPodSandbox", m.StopPodSandboxRequest(pod=pod(ONE, id="a")))
    assert sorted(held(connected)) == ["b", "b1"]
    assert create(connected, "c1", "c") == first


def test_a_grant_that_is_taken_back_leaves_no_lease_of_the_pod(peer: Connect) -> None:
    connected = peer(gpu__allocator="leases")
    create(connected, "a1", "a")
    connected.connection.close(1)  # its answer has not left
    assert held(connected) == {}
    again = peer(gpu__allocator="leases")
    create(again, "b1", "b")
    again.connection.all_sent()
    with pytest.raises(RemoteError, match=r"resources\.gpu\.count is 2, and the containers of its pod share"):
        two = {"chandler.oci/resources.gpu.count": "2"}
        again.create(pod(two, id="b"), container(id="b2", pod_id="b"))
    assert sorted(held(again)) == ["b", "b1"]


def test_a_pod_that_ended_unseen(peer: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    connected = peer(gpu__allocator="leases")
    create(connected, "a1", "a")
    create(connected, "b1", "b")
    monkeypatch.setattr("shim.nri.sweeps._MINIMUM_AGE", 0.0)
    connected.call("Synchronize", m.SynchronizeRequest(pods=[pod(ONE, id="b")], containers=[]))
    assert sorted(held(connected)) == ["b"], "its container restarts"
