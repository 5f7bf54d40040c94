"""Time-slicing: who may share, what is set on the GPU and restored, and what the container gets."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lab import REPOSITORY
from lab.sharing_host import UUIDS, Host, env, mounts

from shim.errors import ChandlerError, HostError, LeaseError, PolicyError, RequestError
from shim.sharing import pages, setup


def slices(host: Host) -> list[int]:
    return [host.commands.gpus().get(uuid, {}).get("slice", 0) for uuid in UUIDS]


def test_the_slice_is_set_for_the_first_and_restored_after_the_last(host: Host) -> None:
    host.commands.set_gpus({UUIDS[0]: {"mode": "EXCLUSIVE_PROCESS", "slice": 0}})
    made = host.create("one", sharing="time-slice", time_slice="short")
    assert made.items == (), "the container gets nothing for it"
    assert slices(host)[0] == 1 and host.mode() == "DEFAULT", "sharing needs the default compute mode"
    host.create("two", sharing="time-slice")
    host.create("three", sharing="time-slice", time_slice="short")
    assert {lease["keys"][0] for lease in host.ledger.read()} == {"c195:0"}
    host.delete("one")
    host.delete("three")
    assert slices(host)[0] == 1
    host.delete("two")
    assert slices(host)[0] == 0 and host.mode() == "EXCLUSIVE_PROCESS" and not os.path.exists(host.state + "/shared")
    assert f"compute-policy -i {UUIDS[0]} --set-timeslice=1" in host.commands.calls(host.commands.smi)


def test_conflicting_demands(host: Host) -> None:
    host.create("short", sharing="time-slice", time_slice="short", devices=["0"])
    with pytest.raises(LeaseError, match=r"short holds nvidia.com/gpu=0 \(time-slice, short\) since"):
        host.create("long", sharing="time-slice", time_slice="long", devices=["0"])
    host.create("long", sharing="time-slice", time_slice="long")
    assert slices(host)[:2] == [1, 3], "a count takes a GPU without a conflicting demand"
    with pytest.raises(LeaseError):
        host.create("mps", sharing="mps", devices=["0"])
    with pytest.raises(LeaseError):
        host.create("exclusive", devices=["0"])


def test_several_gpus(host: Host) -> None:
    made = host.create("c", sharing="time-slice", time_slice="medium", count=2, time_slice_index=1)
    assert slices(host) == [2, 2, 0, 0] and env(made) == {"CUDA_VISIBLE_DEVICES": "1"}
    host.delete("c")
    assert slices(host) == [0, 0, 0, 0]


def test_the_configuration_file_is_mounted(host: Host) -> None:
    path = host.directory + "/slices.yaml"
    with pytest.raises(ChandlerError, match="slices.yaml"):
        host.create("c", sharing="time-slice", time_slicing_config_path=path)
    with open(path, "w", encoding="ascii") as file:
        file.write("version: v1\n")
    os.chmod(path, 0o644)
    made = host.create("c", sharing="time-slice", time_slicing_config_path=path, time_slice="long")
    assert mounts(made) == {"/etc/nvidia/gpu-time-slicing.yaml": path}
    os.chmod(path, 0o666)
    for request in ({}, {"time_slice": "long"}):
        with pytest.raises(ChandlerError, match="can be written by others"):
            host.create("d", sharing="time-slice", time_slicing_config_path=path, **request)  # type: ignore[arg-type]
    assert len(host.ledger.read()) == 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"sharing": "time-slice", "devices": ["0:1"], "time_slice": "short"},
            "is a MIG device, which has no time slices of its own",
        ),
        (
            {"sharing": "time-slice", "time_slice_index": 1},
            "time_slice_index = 1 is no GPU of the container: it gets 1, numbered from 0",
        ),
        ({"sharing": "time-slice", "mps_priority": 0}, "mps_priority is for sharing = 'mps'"),
        ({"time_slice": "short"}, "time_slice is for sharing = 'time-slice'"),
        ({"sharing": "time-slice", "vendor": "amd"}, "amd.com/gpu"),
    ],
)
def test_wrong_requests(host: Host, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ChandlerError) as caught:
        host.create("c", **asked)
    assert words in str(caught.value) and host.ledger.read() == []


def test_sharing_needs_leases_to_restore_the_gpu(host: Host) -> None:
    with pytest.raises(PolicyError, match='time_slice changes the GPU .*; set allocator = "leases"'):
        host.plan({"sharing": "time-slice", "time_slice": "short"})
    made = host.plan({"sharing": "time-slice", "time_slice_index": 0})
    assert made.sharing is not None and env(setup.begin(made.sharing, host.state)) == {"CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(RequestError):
        host.plan({"sharing": "time-slice", "time_slice": "tiny"})


def test_a_command_that_fails(host: Host) -> None:
    host.commands.mood(host.commands.smi, fails=["--set-timeslice=1"])
    with pytest.raises(HostError, match="Insufficient Permissions"):
        host.create("c", sharing="time-slice", time_slice="short")
    assert host.ledger.read() == [] and pages.every(host.state) == []
    host.create("none", sharing="time-slice", time_slice="default")
    host.commands.mood(host.commands.smi, fails=["--set-timeslice=3"])
    host.delete("none")
    host.create("free", sharing="time-slice", time_slice="medium")
    with pytest.raises(LeaseError):
        host.create("other", sharing="time-slice", time_slice="long", devices=["0"])
    assert pages.every(host.state)[0]["slice"] == "medium" and slices(host)[0] == 2


class Sharers(RuleBasedStateMachine):
    """Sharing compared with a simple model: the mode of each GPU, and the time slice of each container."""

    names = st.sampled_from("abcdef")
    wishes = st.sampled_from(
        [
            {},
            {"sharing": "time-slice"},
            {"sharing": "time-slice", "time_slice": "short"},
            {"sharing": "time-slice", "time_slice": "long"},
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="model-", dir="/var/lib")
        os.chmod(self.directory, 0o755)
        self.host = Host(self.directory)
        self.holding: dict[str, tuple[str, Any, int]] = {}  # name: mode, slice, GPU

    def teardown(self) -> None:
        import shutil

        shutil.rmtree(self.directory)

    @rule(name=names, request=wishes, gpu=st.integers(0, 1))
    def create(self, name: str, request: dict[str, Any], gpu: int) -> None:
        mode, length = request.get("sharing", "exclusive"), request.get("time_slice")
        others = [held for held in self.holding.values() if held[2] == gpu]
        allowed = name not in self.holding and all(
            held[0] == mode != "exclusive" and (None in (held[1], length) or held[1] == length) for held in others
        )
        try:
            self.host.create(name, devices=[str(gpu)], **request)
        except LeaseError:
            assert not allowed
            return
        assert allowed
        self.holding[name] = mode, length, gpu

    @precondition(lambda self: self.holding)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.holding)))
        del self.holding[name]
        self.host.delete(name)

    @invariant()
    def the_gpus_are_as_those_who_share_them_want(self) -> None:
        for gpu in (0, 1):
            wanted = {held[1] for held in self.holding.values() if held[2] == gpu} - {None}
            found = slices(self.host)[gpu]
            if wanted:
                assert [found] == [{"short": 1, "long": 3}[length] for length in wanted]
            elif not any(held[2] == gpu for held in self.holding.values()):
                assert found == 0


Sharers.TestCase.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)


TestSharers: Any = pytest.mark.usefixtures("needs_root")(Sharers.TestCase)


def test_many_processes_and_kills(host: Host) -> None:
    """Creates in parallel, some killed at any time.

    At the end nothing is left on any GPU, and no two containers shared one that must not.
    """
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]; from lab.sharing_host import Host; "
        "from shim.errors import ChandlerError; from shim.sharing import pages\n"
        "host = Host(sys.argv[3])\n"
        "try:\n"
        "    host.create(sys.argv[4], devices=['0'], sharing='time-slice', time_slice=sys.argv[5])\n"
        "    page = pages.every(host.state)[0]['slice']\n"
        "    assert page == sys.argv[5], page\n"
        "    host.delete(sys.argv[4])\n"
        "except ChandlerError as error:\n"
        "    assert 'holds' in str(error), error\n"
    )
    rng = random.Random(11)
    seeds = [rng.random() for _ in range(24)]

    def live(number: int) -> str:
        argv = [
            sys.executable,
            "-c",
            program,
            REPOSITORY,
            os.path.join(REPOSITORY, "tests"),
            host.directory,
            f"c{number}",
            ("short", "long")[number % 2],
        ]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            error = process.communicate(timeout=0.2 + seeds[number] * 0.4 if number % 3 == 0 else 60)[1]
            return error if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return ""

    with ThreadPoolExecutor(6) as pool:
        assert [problem for problem in pool.map(live, range(len(seeds))) if problem] == []
    host.ledger.end_stale_leases()
    host.create("last", devices=["0"])
    assert (
        [lease["id"] for lease in host.ledger.read()] == ["last"]
        and pages.every(host.state) == []
        and slices(host)[0] == 0
    )
