"""Leases: who holds which device, by the rules and in the ledger's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lab import REPOSITORY, partial

from shim.errors import HostError, LeaseError, TrustError
from shim.host import kernel
from shim.sharing import terms
from shim.state import leases, ledger, stale
from shim.state.ledger import Ledger

GPUS = [f"c195:{number}" for number in range(4)]


class Taken:
    """The result of a plan."""

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys
        self.names = [f"gpu={key}" for key in keys]
        self.sharing: Any = None


def take(count: int) -> Any:
    """A plan for some free devices."""

    def plan(held: list[Any]) -> Taken:
        free = [key for key in GPUS if leases.holder([key], held) is None]
        if len(free) < count:
            raise LeaseError("short of devices")
        return Taken(free[:count])

    return plan


def lease(root: Path, container: str, alive: bool = False) -> Any:
    """A lease whose wrapper has ended; its container lives as long as its state directory exists."""
    made = ledger.oci_lease(container, str(root), "/bin/false", 1_700_000_000)
    if not alive:
        made["started"] += 1
    return made


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("c195:0", "c195:0", True),
        ("c195:0", "c195:1", False),
        ("c195:1", "c195:10", False),
        ("c195:0", "c195:0+c237:12+c237:13", True),
        ("c195:0+c237:12", "c195:0+c237:21", False),
        ("c226:0+c226:128", "c226:128", True),
        ("nvidia.com/gpu=0", "nvidia.com/gpu=0", True),
    ],
)
def test_clash(one: str, other: str, clash: bool) -> None:
    assert leases.clash(one, other) is leases.clash(other, one) is clash


def test_the_message_says_who_holds_what_since_when() -> None:
    held: Any = {"id": "c1", "names": ["nvidia.com/gpu=0", "nvidia.com/gpu=1"], "since": 1_700_000_000}
    assert leases.describe(held) == "c1 holds nvidia.com/gpu=0, nvidia.com/gpu=1 since 2023-11-14T22:13:20Z"


@given(st.integers(0, 253402300799))
def test_times_are_those_of_the_calendar(seconds: int) -> None:
    assert leases.utc(seconds) == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def test_a_lease_is_kept_until_its_token_is_released(tmp_path: Path) -> None:
    kept = Ledger(str(tmp_path / "state"))
    first, second = lease(tmp_path, "one", alive=True), lease(tmp_path, "two", alive=True)
    assert kept.allocate(first, take(3)).keys == GPUS[:3]
    with pytest.raises(LeaseError, match="short of devices"):
        kept.allocate(second, take(2))
    assert kept.allocate(second, take(1)).keys == GPUS[3:]
    assert [entry["id"] for entry in kept.read()] == ["one", "two"]
    assert kept.release({"another token"}) == 0
    assert kept.release({first["token"]}) == 1 and kept.release({first["token"]}) == 0
    assert [entry["id"] for entry in kept.read()] == ["two"]
    assert os.stat(kept.path).st_mode & 0o777 == 0o600


def test_a_container_without_devices_gets_no_lease(tmp_path: Path) -> None:
    kept = Ledger(str(tmp_path))
    assert kept.allocate(lease(tmp_path, "c"), lambda held: Taken([])).keys == []
    assert kept.read() == []


def test_a_live_container_of_the_same_name_is_refused_before_anything_changes(tmp_path: Path) -> None:
    kept = Ledger(str(tmp_path))
    kept.allocate(lease(tmp_path, "c", alive=True), take(1))
    before = Path(kept.path).read_bytes()
    with pytest.raises(LeaseError, match="c holds gpu=c195:0 since"):
        kept.allocate(lease(tmp_path, "c"), take(1))
    assert Path(kept.path).read_bytes() == before
    other_root = lease(tmp_path / "other", "c")
    assert kept.allocate(other_root, take(1)).keys == [GPUS[1]]


def test_a_create_ends_the_lease_of_a_gone_container_of_the_same_name(tmp_path: Path) -> None:
    kept = Ledger(str(tmp_path))
    old, new = lease(tmp_path, "c"), lease(tmp_path, "c")
    kept.allocate(old, take(1))
    assert kept.allocate(new, take(1)) is not None
    assert kept.release({old["token"]}) == 0, (
        "the old container's hook comes late, and must not end the new one's lease"
    )
    assert [entry["token"] for entry in kept.read()] == [new["token"]]


def test_stale_only_when_certainly_gone(tmp_path: Path) -> None:
    assert stale.is_stale(lease(tmp_path, "gone"))
    assert not stale.is_stale(lease(tmp_path, "gone", alive=True)), (
        "the wrapper, or the runtime that it exec'd, is still running"
    )
    (tmp_path / "there").mkdir()
    assert not stale.is_stale(lease(tmp_path, "there")), "the runtime gives no answer"
    assert not stale.is_stale(partial({"owner": "nri", "id": "gone"})), "only the plugin knows its containers"
    assert not stale.is_stale(lease(tmp_path, "there") | {"runtime": "/nowhere"})


@pytest.mark.parametrize(
    ("runtime", "files"),
    [("runc", ["state.json"]), ("youki", ["youki_config.json", "state.json"]), ("crun", ["config.json", "status"])],
)
def test_a_state_directory_without_a_container_in_it_is_no_container(
    tmp_path: Path, runtime: str, files: list[str]
) -> None:
    """A runtime that was killed leaves it; that runtime will never say anything about the container."""
    found = lease(tmp_path, "half") | {"runtime": f"/nowhere/{runtime}"}
    (tmp_path / "half").mkdir()
    assert not stale.is_stale(found | {"runtime": "/nowhere/kata"}), "an unknown runtime may keep its state there"
    for file in files:
        assert stale.is_stale(found)
        (tmp_path / "half" / file).touch()
    assert not stale.is_stale(found), "the runtime gives no answer"


def test_a_container_of_crun_whose_config_json_is_lost(tmp_path: Path) -> None:
    """crun's delete needs that file, so this is never mended. `status` says which process decides."""
    found = lease(tmp_path, "half") | {"runtime": "/nowhere/crun"}
    status = tmp_path / "half/status"
    status.parent.mkdir()
    own = {"pid": os.getpid(), "process-start-time": kernel.started(os.getpid())}
    for text, gone in (
        (json.dumps(own), False),
        (json.dumps({"pid": own["pid"]}), False),
        (json.dumps(own | {"process-start-time": own["process-start-time"] + 1}), True),
        (json.dumps({"pid": 2**22}), True),
        ('{"pid":', False),
        ("", False),
    ):
        status.write_text(text)
        assert stale.is_stale(found) == gone, text


@pytest.mark.parametrize("name", ["status", "state.json"])
def test_a_runtime_calls_a_container_stopped_whose_first_process_runs(tmp_path: Path, name: str) -> None:
    """As crun on cgroup v1 does when root has renamed the container's group in all hierarchies."""
    runtime = tmp_path / ("crun" if name == "status" else "runc")
    runtime.write_text('#!/bin/sh\necho \'{"status": "stopped"}\'\n')
    runtime.chmod(0o755)
    found = lease(tmp_path, "c") | {"runtime": str(runtime)}
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.json").touch()
    keys = ("pid", "process-start-time") if name == "status" else ("init_process_pid", "init_process_start")
    for started, gone in ((kernel.started(os.getpid()), False), (1, True), (0, True)):
        (tmp_path / "c" / name).write_text(json.dumps(dict(zip(keys, (os.getpid(), started)))))
        assert stale.is_stale(found) == gone


def test_the_wrapper_takes_over_what_the_plugin_held_for_the_same_container(tmp_path: Path) -> None:
    """The plugin's answer came too late. The container is the wrapper's now, and it has only one lease."""
    kept = Ledger(str(tmp_path))
    theirs, other = ledger.nri_lease("c", "pod", 1_700_000_000), ledger.nri_lease("d", "pod", 1_700_000_000)
    kept.allocate(theirs, take(2))
    kept.allocate(other, take(1))
    with pytest.raises(LeaseError):
        kept.allocate(lease(tmp_path, "c", alive=True), take(4))
    assert [entry["token"] for entry in kept.read()] == [theirs["token"], other["token"]], "a refusal changes nothing"
    mine = lease(tmp_path, "c", alive=True)
    assert kept.allocate(mine, take(3)).keys == [GPUS[0], GPUS[1], GPUS[3]]
    assert [entry["token"] for entry in kept.read()] == [other["token"], mine["token"]]
    assert kept.release({theirs["token"]}) == 0, "the plugin's late event finds nothing of its own"
    with pytest.raises(LeaseError):
        kept.allocate(ledger.nri_lease("c", "pod", 1_700_000_000), take(1))


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '[{"token": 1, "keys": []}]', '[{"token": "a"}]', '{"a": 1}', "[null]"]
)
def test_a_damaged_ledger_gives_nobody_a_device(tmp_path: Path, text: str) -> None:
    """With an NRI plugin it cannot be rebuilt reliably. Containers without devices are still created."""
    kept = Ledger(str(tmp_path))
    (tmp_path / "nri").mkdir()
    Path(kept.path).write_text(text)
    for made in (lease(tmp_path, "c"), ledger.nri_lease("c", "pod", 1_700_000_000)):
        with pytest.raises(HostError, match="is damaged"):
            kept.allocate(made, take(1))
        assert kept.allocate(made, take(0)).keys == []
    assert Path(kept.path).read_text() == text


def test_a_state_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(TrustError):
        Ledger(str(tmp_path)).allocate(lease(tmp_path, "c"), take(1))


def test_release_where_nothing_was_ever_leased(tmp_path: Path) -> None:
    assert Ledger(str(tmp_path / "absent")).release({"a"}) == 0


def test_many_processes_never_share_a_device(tmp_path: Path) -> None:
    """Each process takes a device, and every fourth dies before it gives it back."""
    program = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + '/tests', {tests!r}]
from pathlib import Path
from test_ledger import Ledger, LeaseError, lease, take
kept = Ledger({state!r})
for turn in range(12):
    mine = lease(Path({state!r}), f"{{sys.argv[1]}}-{{turn}}", alive=True)
    try:
        key = kept.allocate(mine, take(1)).keys[0]
    except LeaseError:
        continue
    path = {state!r} + "/" + key
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    os.unlink(path)
    if turn % 4 == 3 and int(sys.argv[1]) % 2:
        os._exit(9)
    kept.release({{mine["token"]}})
"""
    text = program.format(root=REPOSITORY, tests=os.path.dirname(os.path.abspath(__file__)), state=str(tmp_path))

    def run(number: int) -> int:
        return subprocess.run(
            [sys.executable, "-c", text, str(number)], check=False, stdin=subprocess.DEVNULL
        ).returncode

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(run, range(8))) <= {0, 9}
    kept = Ledger(str(tmp_path))
    left = len(kept.read())
    assert kept.end_stale_leases() == left, "the leases of killed processes must be reclaimed"
    assert kept.read() == []


PARTS = ["c195:0+c237:1", "c195:0+c237:2"]  # of the first GPU
SHARES: dict[str, tuple[str, dict[str, Any], int]] = {
    "short": (terms.TIME_SLICE, {"time_slice": "short"}, 0),
    "long": (terms.TIME_SLICE, {"time_slice": "long"}, 0),
    "any": (terms.TIME_SLICE, {}, 0),
    "mps": (terms.MPS, {}, 0),
    "mps of another": (terms.MPS, {}, 1),
}
MOST = 2  # sharers of a device


def share(how: str) -> Any:
    mode, request, uid = SHARES[how]
    return terms.Sharing(
        mode,
        request,
        "a test",
        partial({"gpu.mps": "external", "gpu.max-sharers": MOST, "gpu.mps-limits": "advisory"}),
        uid,
    )


def exactly(keys: list[str], how: str = "") -> Any:
    """A plan for exactly these devices, shared in one way or not."""

    def plan(held: list[Any]) -> Taken:
        found = Taken(keys)
        if how:
            found.sharing = share(how)
            held = found.sharing.with_shares(held)
        if leases.holder(keys, held) is not None:
            raise LeaseError("not free")
        return found

    return plan


class Held(NamedTuple):
    """What a container has, according to the model."""

    owner: str
    name: str
    keys: list[str]
    how: str

    def allows(self, key: str, how: str) -> bool:
        """Whether another container may have `key` as well."""
        together = "" not in (how, self.how) and (
            how == self.how or "any" in (how, self.how) and not {"mps", "mps of another"} & {how, self.how}
        )
        return not any(
            not together if own == key else own.startswith(key + "+") or key.startswith(own + "+") for own in self.keys
        )


class Model(RuleBasedStateMachine):
    """The ledger compared with a simple model of who has what and which containers live.

    Containers of the wrapper and of the NRI plugin, whole GPUs and parts of one, shared and not, hooks that are lost or
    late.
    """

    names = st.sampled_from(["a", "b", "c"])
    ways = st.sampled_from(["", "", *SHARES])

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.kept = Ledger(str(self.root / "state"))
        self.holding: dict[str, Held] = {}  # by token
        self.live: dict[tuple[str, str], str] = {}  # owner and container: token
        self.ended: list[str] = []  # tokens whose hook has not come yet
        self.had: dict[str, list[str]] = {}  # what a container of the wrapper's had last

    def teardown(self) -> None:
        self.directory.cleanup()

    def others(self, owner: str, name: str) -> list[Held]:
        """The holdings that a new container of that name must not touch."""
        gone = ("nri", name) if owner == "oci" else ("", "")
        return [self.holding[token] for who, token in self.live.items() if who != gone]

    def free(self, key: str, how: str, others: list[Held]) -> bool:
        return all(one.allows(key, how) for one in others) and (
            not how or sum(key in one.keys for one in others) < MOST
        )

    def attempt(self, owner: str, name: str, plan: Any, possible: bool, how: str) -> None:
        made = lease(self.root, name) if owner == "oci" else ledger.nri_lease(name, "pod", 1_700_000_000)
        others = self.others(owner, name)
        before = self.kept.read()
        try:
            keys = self.kept.allocate(made, plan).keys
        except LeaseError:
            assert (owner, name) in self.live or not possible, "refused though there were devices"
            assert {entry["token"] for entry in self.kept.read()} <= {entry["token"] for entry in before}
            self.sweep_model()
            return
        assert (
            (owner, name) not in self.live and possible and all(one.allows(key, how) for one in others for key in keys)
        )
        if owner == "oci":
            (self.root / name).mkdir()
            self.had[name] = keys
            self.live.pop(("nri", name), None)  # taken over
        tokens = {entry["token"] for entry in self.kept.read()}
        self.holding = {token: held for token, held in self.holding.items() if token in tokens}
        self.holding[made["token"]] = Held(owner, name, keys, how)
        self.live[owner, name] = made["token"]

    def sweep_model(self) -> None:
        self.holding = {token: held for token, held in self.holding.items() if token in self.live.values()}

    @rule(owner=st.sampled_from(["oci", "oci", "nri"]), name=names, count=st.integers(1, 3))
    def take_a_count(self, owner: str, name: str, count: int) -> None:
        others = self.others(owner, name)
        self.attempt(owner, name, take(count), sum(self.free(key, "", others) for key in GPUS) >= count, "")

    @rule(owner=st.sampled_from(["oci", "oci", "nri"]), name=names, key=st.sampled_from([*GPUS[:2], *PARTS]), how=ways)
    def take_one_by_name(self, owner: str, name: str, key: str, how: str) -> None:
        self.attempt(owner, name, exactly([key], how), self.free(key, how, self.others(owner, name)), how)

    @precondition(lambda self: self.had)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Restore a container: it gets exactly what it had, or nothing."""
        name = data.draw(st.sampled_from(sorted(self.had)))
        others = self.others("oci", name)
        self.attempt(
            "oci", name, exactly(self.had[name]), all(self.free(key, "", others) for key in self.had[name]), ""
        )

    @precondition(lambda self: any(owner == "oci" for owner, _ in self.live))
    @rule(data=st.data(), with_hook=st.booleans())
    def delete(self, data: st.DataObject, with_hook: bool) -> None:
        name = data.draw(st.sampled_from(sorted(name for owner, name in self.live if owner == "oci")))
        token = self.live.pop(("oci", name))
        (self.root / name).rmdir()
        if with_hook:
            assert self.kept.release({token}) == 1
            del self.holding[token]
        else:
            self.ended.append(token)

    @precondition(lambda self: self.ended)
    @rule()
    def late_hook(self) -> None:
        token = self.ended.pop()
        self.kept.release({token})
        self.holding.pop(token, None)

    @rule(name=names)
    def the_plugin_is_told_that_a_container_is_gone(self, name: str) -> None:
        """The container may be one that the wrapper has taken over, or not the plugin's at all."""
        found = leases.of_container(self.kept.read(), "nri", "", name)
        token = self.live.pop(("nri", name), None)
        assert (found and found["token"]) == token
        if token:
            assert self.kept.release({token}) == 1
            del self.holding[token]

    @rule()
    def end_stale_leases(self) -> None:
        self.kept.end_stale_leases()
        self.sweep_model()

    @invariant()
    def the_same(self) -> None:
        entries = self.kept.read()
        assert {entry["token"]: entry["keys"] for entry in entries} == {
            token: held.keys for token, held in self.holding.items()
        }
        assert set(self.live.values()) <= self.holding.keys(), "no lease of a container that lives is lost"
        everybody = list(self.holding.values())
        assert all(
            one.allows(key, other.how)
            for at, one in enumerate(everybody)
            for other in everybody[:at]
            for key in other.keys
        )


TestModel = Model.TestCase


def test_the_file_is_json_for_people(tmp_path: Path) -> None:
    kept = Ledger(str(tmp_path))
    kept.allocate(lease(tmp_path, "c", alive=True), take(1))
    written = json.loads(Path(kept.path).read_text())
    (entry,) = written["leases"]
    assert len(written["checksum"]) == 64
    assert entry["owner"] == "oci" and entry["pid"] == os.getpid() and entry["names"] == ["gpu=c195:0"]
