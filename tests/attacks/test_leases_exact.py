"""Leases against spellings of a root, namespaces, processes that outlive their container, and hooks that fail."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import REPOSITORY, bundle, cgroups, runtimes
from lab.bundle import Bundle
from lab.engine import ENVIRONMENT, PATIENCE, Engine
from lab.install import Installation
from lab.node import Node

ONCE = ["runc", "crun", "youki"]
HELD = "0 of 8 are free"


class Attack:
    """Chandler over one runtime; create() takes any command line."""

    def __init__(self, runtime: runtimes.Runtime, node: Node, workdir: str, program: str = "") -> None:
        self.workdir, self.runtime, self.node = workdir, runtime, node
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.installation.configure([program or runtime.path], [node.cdi])
        self.installation.refresh()
        self.engine = Engine(
            [*runtime.wrap, self.installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
        )
        self.image = bundle.rootfs(os.path.join(workdir, "image"))
        self.made: list[tuple[str, str, str]] = []  # to be deleted: root, container, working directory

    def bundle(self, name: str, count: int = 8, args: tuple[str, ...] = ("sleep", "60")) -> bundle.Bundle:
        return bundle.make(
            os.path.join(self.workdir, name), args, bundle.request(resources={"gpu": {"count": count}}), root=self.image
        )

    def create(
        self, name: str, root: str, container: str, count: int = 8, cwd: str = "/", before: tuple[str, ...] = ()
    ) -> str:
        """The error message of a create, '' when it succeeds. `before`: a command that enters other namespaces."""
        return self.run(self.bundle(name, count), root, container, cwd, before)

    def run(self, made: Bundle, root: str, container: str, cwd: str = "/", before: tuple[str, ...] = ()) -> str:
        self.made += [
            (root, container, cwd),
            (root, container, made.directory),
        ]  # crun counts a relative root from the bundle
        with open(made.out, "ab") as out:
            status = subprocess.run(
                [
                    *before,
                    *self.runtime.wrap,
                    self.installation.program(),
                    "--root",
                    root,
                    "create",
                    "--bundle",
                    made.directory,
                    container,
                ],
                check=False,
                cwd=cwd,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=PATIENCE,
            ).returncode
        return made.output() or "refused" if status else ""

    def chandler(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.installation.program("chandler"), *words],
            check=False,
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def leases(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.chandler("leases", "--format", "json").stdout)
        return found

    def records(self) -> list[str]:
        directory = os.path.join(self.installation.state, "grants")
        return (
            sorted(name.partition("-")[2].removesuffix(".json") for name in os.listdir(directory))
            if os.path.isdir(directory)
            else []
        )

    def lose_hooks(self) -> Callable[[], None]:
        """Make poststop hooks do nothing until the returned function is called."""
        hook = self.installation.program("chandler-hook")
        os.rename(hook, hook + ".away")
        with open(hook, "w", encoding="ascii") as file:
            file.write("#!/bin/sh\nexec /bin/cat >/dev/null\n")
        os.chmod(hook, 0o755)
        return lambda: os.rename(hook + ".away", hook)

    def close(self) -> None:
        for root, container, cwd in self.made:
            subprocess.run(
                [*self.runtime.wrap, self.runtime.path, "--root", root, "delete", "--force", container],
                check=False,
                cwd=cwd,
                capture_output=True,
                timeout=PATIENCE,
            )
        self.engine.clean()


@pytest.fixture
def attack(runtime: runtimes.Runtime, node: Node, workdir: str) -> Iterator[Attack]:
    made = Attack(runtime, node, workdir)
    yield made
    made.close()


@pytest.fixture
def slow(runtime: runtimes.Runtime, node: Node, workdir: str) -> Iterator[Attack]:
    """Over a runtime that waits in each create until `go` exists.

    At that point the lease is taken, and the runtime has no state of the container yet.
    """
    program = os.path.join(workdir, runtime.kind)
    os.mkfifo(workdir + "/go")
    with open(program, "w", encoding="ascii") as file:
        file.write(
            f'#!/bin/sh\ncase " $* " in *" create "*) read -r _ <{workdir}/go;; esac\nexec {runtime.path} "$@"\n'
        )
    os.chmod(program, 0o755)
    made = Attack(runtime, node, workdir, program)
    yield made
    made.close()


# --- a root is its resolved absolute path ---------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_two_relative_roots_of_one_spelling(attack: Attack, cold: bool) -> None:
    """Both containers once held all GPUs: from another working directory the first container's state was not found."""
    for name in ("one", "two"):
        os.mkdir(f"{attack.workdir}/{name}")
    assert attack.create("b1", "state", "c1", cwd=f"{attack.workdir}/one") == ""
    if cold:
        shutil.rmtree(os.path.join(attack.installation.state, "inventory"), ignore_errors=True)
    assert HELD in attack.create("b2", "state", "c2", cwd=f"{attack.workdir}/two")
    start = f"{attack.workdir}/{'b1' if attack.runtime.kind == 'crun' else 'one'}/state"
    assert [lease["root"] for lease in attack.leases()] == [start] and os.path.isdir(start + "/c1")
    assert attack.chandler("leases", "release", "--stale").stdout.startswith("0 stale leases ended")


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_every_spelling_of_a_root_is_the_same(attack: Attack) -> None:
    """A container once had one lease for each spelling."""
    root = os.path.join(attack.workdir, "root")
    os.symlink("root", attack.workdir + "/link")
    assert attack.create("b0", root, "same", 1) == ""
    for number, spelled in enumerate(
        (
            root + "/",
            root + "/.",
            "/" + root,
            f"{attack.workdir}/./root//",
            attack.workdir + "/link",
            attack.workdir + "/installed/../root",
            "root",
        )
    ):
        message = attack.create(
            f"b{number + 1}",
            spelled,
            "same",
            1,
            cwd=attack.workdir if attack.runtime.kind != "crun" else attack.workdir,
        )
        if attack.runtime.kind != "crun" or spelled != "root":  # to crun that is another root, in the bundle
            assert "a container of this name is there already" in message, spelled
    assert len({lease["root"] for lease in attack.leases() if lease["root"] == root}) == 1


@pytest.mark.parametrize("runtime", ["crun"], indirect=True)
def test_an_update_with_another_spelling_keeps_the_devices(attack: Attack) -> None:
    root = os.path.join(attack.workdir, "root")
    os.symlink("root", attack.workdir + "/link")
    made = attack.bundle("b1", 1)
    attack.engine.create(made, "c1")
    deny = {
        "devices": [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
        ]
    }
    for spelled in (attack.workdir + "/link", root + "/"):
        subprocess.run(
            [
                *attack.runtime.wrap,
                attack.installation.program(),
                "--root",
                spelled,
                "update",
                "--resources",
                "-",
                "c1",
            ],
            check=True,
            env=ENVIRONMENT,
            input=json.dumps(deny).encode(),
            capture_output=True,
        )
        attack.engine.call("state", "c1")
    gpu = attack.node.gpus[0]
    pid = attack.engine.state("c1")["pid"]
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        group = next((line.rstrip("\n").split(":", 2)[2] for line in file if ":devices:" in line), "")
    if not group:
        pytest.skip("no device rules of version 1 to be read here")
    with open(f"/sys/fs/cgroup/devices{group}/devices.list", encoding="ascii") as file:
        assert f"c {gpu.major}:{gpu.minor} " in file.read()


# --- what cannot be seen counts as alive ----------------------------------------------------------------------------

ELSEWHERE = {
    "the same namespaces": (),
    "another PID namespace": ("unshare", "-m", "-p", "--fork", "--mount-proc"),
    "another time namespace": ("unshare", "-T", "--boottime", "100000", "--fork"),
}


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("runtime", ONCE[:2], indirect=True)
def test_a_create_in_progress_keeps_its_lease(slow: Attack, where: str) -> None:
    """From another PID or time namespace its process has another pid or start time.

    The runtime does not know the container yet, either.
    """
    first = slow.bundle("b1")
    slow.engine.started["c1"] = first
    with (
        open(first.out, "ab") as out,
        subprocess.Popen(
            slow.engine.argv("create", "--bundle", first.directory, "c1"),
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        ) as creating,
    ):
        try:
            # open() returns when the runtime reads the fifo: by then the lease is taken
            with open(slow.workdir + "/go", "w", encoding="ascii") as go:
                assert HELD in slow.create("b2", slow.engine.root, "c2", before=ELSEWHERE[where])
                assert [lease["id"] for lease in slow.leases()] == ["c1"]
                go.write("\n")
            assert creating.wait(PATIENCE) == 0, first.output()
        finally:
            creating.kill()


@pytest.mark.parametrize("runtime", ONCE[:2], indirect=True)
def test_a_create_in_a_pid_namespace_of_its_own_is_seen_from_the_host(slow: Attack) -> None:
    """When the create is killed there, its lease can be released."""
    first = slow.bundle("b1")
    with (
        open(first.out, "ab") as out,
        subprocess.Popen(
            [
                "unshare",
                "-m",
                "-p",
                "--fork",
                "--kill-child",
                "--mount-proc",
                *slow.engine.argv("create", "--bundle", first.directory, "c1"),
            ],
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        ) as creating,
    ):
        try:
            with open(slow.workdir + "/go", "w", encoding="ascii"):
                assert HELD in slow.create("b2", slow.engine.root, "c2")
                creating.send_signal(signal.SIGKILL)
                creating.wait(PATIENCE)
        finally:
            creating.kill()
    until_gone(slow)


def until_gone(attack: Attack) -> None:
    """Release stale leases again and again until the killed processes are gone."""
    for _ in range(200):
        attack.chandler("leases", "release", "--stale")
        if not attack.leases():
            return
    raise AssertionError(f"leases are left: {attack.leases()}")


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_a_hidden_state_directory_does_not_count_as_missing(attack: Attack) -> None:
    """A mount over the root, in another mount namespace, hides the container's state.

    A lease with another control group's name hides its process as well.
    """
    assert attack.create("b1", attack.engine.root, "c1") == ""
    hidden = cgroups.private(f"mount -t tmpfs none {attack.engine.root}")
    assert HELD in attack.create("b2", attack.engine.root, "c2", before=hidden)
    path = os.path.join(attack.installation.state, "leases")
    (lease,) = attack.leases()
    write_leases(attack, [{**lease, "group": "/of/another/name"}])
    assert HELD in attack.create("b3", attack.engine.root, "c3", before=hidden)
    assert [each["id"] for each in attack.leases()] == ["c1"] and os.path.exists(path)


def write_leases(attack: Attack, leases: list[dict[str, Any]]) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom shim.state.ledger import Ledger\nimport json\n"
        "Ledger(sys.argv[2]).write(json.load(sys.stdin))"
    )
    subprocess.run(
        [
            "/usr/bin/python3",
            "-I",
            "-c",
            program,
            attack.installation.prefix + "/lib/chandler",
            attack.installation.state,
        ],
        check=True,
        input=json.dumps(leases).encode(),
    )


@pytest.mark.parametrize("how", ["missing", "another program"])
@pytest.mark.parametrize("runtime", ONCE[:2], indirect=True)
def test_a_lease_stays_while_its_runtime_cannot_be_asked(
    runtime: runtimes.Runtime, node: Node, workdir: str, how: str
) -> None:
    """A stopped container whose runtime's binary is then lost: nothing can tell that it has stopped."""
    program = os.path.join(workdir, runtime.kind)
    shutil.copy(runtime.path, program)
    attack = Attack(runtime, node, workdir, program)
    try:
        made = attack.bundle("b1", args=("true",))
        attack.engine.create(made, "c1")
        attack.engine.call("start", "c1")
        attack.engine.wait("c1", "stopped")
        os.rename(program, program + ".away")
        if how != "missing":
            shutil.copy("/bin/true", program)
        assert attack.chandler("leases", "release", "--stale").stdout.startswith("0 stale")
        assert "may still be using" in attack.chandler("leases", "release", "c1").stderr
        os.rename(program + ".away", program)
        assert attack.chandler("leases", "release", "--stale").stdout.startswith("1 stale"), (
            "the container is stopped, and its group is empty"
        )
        assert attack.records() == []
    finally:
        attack.close()


@pytest.mark.parametrize("runtime", ["crun", "newer-crun", "youki"], indirect=True)
def test_a_state_directory_that_has_lost_a_file(attack: Attack) -> None:
    """The runtime's own delete took the file and was killed, or met a create of the same id.

    From then on the runtime neither says anything about the container nor deletes it. Such a lease once stayed.
    """
    attack.engine.create(attack.bundle("b1"), "c1")
    pid = attack.engine.state("c1")["pid"]
    os.unlink(os.path.join(attack.engine.root, "c1", "state.json" if attack.runtime.kind == "youki" else "config.json"))
    assert attack.engine.call("state", "c1", check=False).returncode != 0
    assert attack.chandler("leases", "release", "--stale").stdout.startswith("0 stale"), "the container lives"
    assert HELD in attack.create("b2", attack.engine.root, "c2")
    os.kill(pid, signal.SIGKILL)
    assert attack.engine.call("delete", "--force", "c1", check=False).returncode != 0
    until_gone(attack)
    assert attack.create("b3", attack.engine.root, "c3") == "" and attack.records() == ["c3"]


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_a_container_whose_runtime_names_the_group_and_has_lost_its_state(attack: Attack) -> None:
    """Only the control group shows then that the container runs; youki has a name of its own kind for it."""
    made = attack.bundle("b1")
    config = made.config
    del config["linux"]["cgroupsPath"]
    made.config = config
    attack.engine.create(made, container := "x" + bundle.GROUPS)
    shutil.rmtree(os.path.join(attack.engine.root, container))
    assert HELD in attack.create("b2", attack.engine.root, "c2")
    assert attack.chandler("leases", "release", "--stale").stdout.startswith("0 stale leases ended")


@pytest.mark.skipif(cgroups.mode() == "unified", reason="needs cgroup v1, whose groups can be renamed")
@pytest.mark.parametrize("runtime", ["crun", "newer-crun"], indirect=True)
def test_a_running_container_whose_group_was_renamed(attack: Attack) -> None:
    """crun looks for processes in the group, and calls such a container stopped."""
    made = attack.bundle("b1")
    attack.engine.create(made, "c1")
    attack.engine.call("start", "c1")
    group = made.config["linux"]["cgroupsPath"]
    for path in glob.glob(f"{cgroups.SYSFS}/*{group}"):
        if not path.startswith(f"{cgroups.SYSFS}/unified/"):
            os.rename(path, path + "-renamed")
    assert HELD in attack.create("b2", attack.engine.root, "c2")
    assert attack.chandler("leases", "release", "--stale").stdout.startswith("0 stale leases ended")


# --- stopped is not unused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_a_child_that_outlives_init_keeps_the_gpus(attack: Attack) -> None:
    """A stopped container without a PID namespace of its own may have processes that keep the device open."""
    made = attack.bundle("b1", args=("sh", "-c", "busybox setsid sleep 300 & exec true"))
    config = made.config
    config["linux"]["namespaces"] = [each for each in config["linux"]["namespaces"] if each["type"] != "pid"]
    made.config = config
    attack.engine.create(made, "c1")
    attack.engine.call("start", "c1")
    attack.engine.wait("c1", "stopped")
    assert HELD in attack.create("b2", attack.engine.root, "c2")
    assert attack.chandler("leases", "release", "--stale").stdout.startswith("0 stale leases ended")
    attack.engine.call("delete", "--force", "c1")
    alive = living(config["linux"]["cgroupsPath"])
    assert bool(alive) == bool(attack.leases()), "the lease must stay exactly as long as the child lives"
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    until_gone(attack)


@pytest.mark.parametrize("runtime", [*ONCE, "newer-runc", "newer-crun", "runc-on-v2", "crun-on-v2"], indirect=True)
def test_a_thread_that_outlives_the_first_one_keeps_the_gpus(attack: Attack) -> None:
    """Runtimes report a container as stopped when its first thread ends; cgroup v1 then shows it in the root group."""
    program = os.path.join(attack.image, "bin/thread")
    subprocess.run(
        ["gcc", "-static", "-pthread", "-o", program, os.path.join(REPOSITORY, "tests/lab/thread.c")], check=True
    )
    made = attack.bundle("b1", args=("/bin/thread",))
    engine = attack.engine
    engine.create(made, "c1")
    pid = engine.state("c1")["pid"]
    engine.call("start", "c1")
    engine.wait("c1", "stopped")
    assert len(os.listdir(f"/proc/{pid}/task")) == 2
    assert HELD in attack.create("b2", attack.engine.root, "c2")
    assert attack.chandler("leases", "release", "--stale").stdout.startswith("0 stale leases ended")
    os.kill(pid, signal.SIGKILL)
    engine.call("delete", "--force", "c1")
    until_gone(attack)


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_a_stopped_container_as_another_time_namespace_sees_it(attack: Attack) -> None:
    """Start times differ there, so the runtime takes a running container's pid for one that was reused."""
    made = attack.bundle("b1")
    engine = attack.engine
    engine.create(made, "c1")
    engine.call("start", "c1")
    elsewhere = ("unshare", "--time", "--boottime", "100000", "--fork")
    assert HELD in attack.create("b2", attack.engine.root, "c2", before=elsewhere)
    done = subprocess.run(
        [*elsewhere, attack.installation.program("chandler"), "leases", "release", "--stale"],
        check=True,
        env={},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("0 stale leases ended")
    engine.call("delete", "--force", "c1")
    until_gone(attack)


def living(group: str) -> list[int]:
    """The processes in a control group that have not ended."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with (
                open(f"/proc/{pid}/cgroup", encoding="utf-8") as file,
                open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat,
            ):
                if (
                    any(line.rstrip("\n").endswith(group) for line in file)
                    and stat.read().rpartition(")")[2].split()[0] not in "ZX"
                ):
                    found.append(int(pid))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("runtime", ONCE[:2], indirect=True)
def test_the_hook_waits_for_what_is_left_in_the_group(attack: Attack) -> None:
    """The lease stays while a process is in the container's control group that the runtime did not or could not end."""
    made = attack.bundle("b1")
    attack.engine.create(made, "c1")
    state = os.path.join(attack.engine.root, "c1")
    (lease,) = attack.leases()
    with subprocess.Popen(["sleep", "60"]) as other:
        pid = attack.engine.state("c1")["pid"]
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            group = next(line.rstrip("\n").split(":", 2) for line in file if lease["group"] in line)
        point = (
            f"/sys/fs/cgroup/{group[1].removeprefix('name=')}{group[2]}" if group[1] else f"/sys/fs/cgroup{group[2]}"
        )
        try:
            with open(point + "/cgroup.procs", "w", encoding="ascii") as procs:
                procs.write(str(other.pid))
        except OSError:
            other.kill()
            pytest.skip("this control group cannot be seen from here")
        done = subprocess.run(
            [attack.installation.program("chandler-hook"), "release", attack.installation.state, lease["token"]],
            check=True,
            input=b"{}",
            capture_output=True,
        )
        assert b"c1 keeps its lease" in done.stderr and len(attack.leases()) == 1 and os.path.isdir(state)
        other.kill()
    attack.engine.delete("c1", "--force")
    assert attack.leases() == [] and attack.records() == []


# --- hooks of others, records, releases by hand ---------------------------------------------------------------------


@pytest.mark.parametrize("label", ["runc", "newer-runc", "crun", "newer-crun", "youki"])
def test_a_failing_hook_of_another_program_does_not_keep_the_lease(label: str, node: Node, workdir: str) -> None:
    """runc 1.5 does not run the hooks after a failing one, so Chandler's has to be the first."""
    runtime = runtimes.named(label)
    if runtime.missing:
        pytest.skip(runtime.missing)
    attack = Attack(runtime, node, workdir)
    try:
        made = attack.bundle("b1")
        config = made.config
        config["hooks"] = {"poststop": [{"path": "/bin/false"}, {"path": "/bin/true"}]}
        made.config = config
        attack.engine.create(made, "c1")
        assert [hook["path"].rpartition("/")[2] for hook in made.config["hooks"]["poststop"]] == [
            "chandler-hook",
            "false",
            "true",
        ]
        attack.engine.call("delete", "--force", "c1", check=False)
        assert attack.leases() == [] and attack.records() == []
    finally:
        attack.close()


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_records_go_with_their_containers(attack: Attack) -> None:
    """A record goes with the lease, or, without a lease, in the timer's sweep.

    Records of living containers and young records stay.
    """
    attack.engine.create(attack.bundle("b1", 1), "leased")
    for name in ("plain", "lives"):
        attack.engine.create(
            bundle.make(
                os.path.join(attack.workdir, name), ["sleep", "60"], bundle.request(env={"A": "b"}), root=attack.image
            ),
            name,
        )
    assert attack.records() == ["leased", "lives", "plain"]
    for name in ("leased", "plain"):
        attack.engine.delete(name, "--force")
    assert attack.records() == ["lives", "plain"]
    assert (
        attack.chandler("leases", "release", "--stale").stdout
        == "0 stale leases ended, 1 grants of containers that are gone forgotten\n"
    )
    assert attack.records() == ["lives"] and attack.chandler("leases", "release", "--stale", "--quiet").stdout == ""


@pytest.mark.parametrize("runtime", ONCE[:1], indirect=True)
def test_a_sweep_keeps_the_record_of_a_create_that_goes_on(slow: Attack) -> None:
    made = bundle.make(
        os.path.join(slow.workdir, "b1"), ["sleep", "60"], bundle.request(env={"A": "b"}), root=slow.image
    )
    slow.engine.started["c1"] = made
    with (
        open(made.out, "ab") as out,
        subprocess.Popen(
            slow.engine.argv("create", "--bundle", made.directory, "c1"),
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        ) as creating,
    ):
        try:
            with open(slow.workdir + "/go", "w", encoding="ascii") as go:
                assert slow.chandler("leases", "release", "--stale").returncode == 0
                assert slow.chandler("refresh").returncode == 0 and slow.records() == ["c1"]
                go.write("\n")
            assert creating.wait(PATIENCE) == 0
        finally:
            creating.kill()


@pytest.mark.parametrize("runtime", ONCE[:1], indirect=True)
def test_a_living_container_s_lease_is_not_released_by_hand(attack: Attack) -> None:
    attack.engine.create(attack.bundle("b1"), "c1")
    done = attack.chandler("leases", "release", "c1")
    assert done.returncode == 1 and "c1 may still be using nvidia.com/gpu=0" in done.stderr and "--force" in done.stderr
    assert len(attack.leases()) == 1
    assert attack.chandler("leases", "release", "--force", "c1").returncode == 0 and attack.leases() == []


@pytest.mark.parametrize("runtime", ONCE[:2], indirect=True)
def test_the_same_id_under_another_root_is_another_container(attack: Attack) -> None:
    other = attack.workdir + "/other"
    assert attack.create("b1", attack.engine.root, "c", 3) == "" and attack.create("b2", other, "c", 3) == ""
    assert len(attack.leases()) == 2 and len(attack.records()) == 2
    subprocess.run(
        [*attack.runtime.wrap, attack.installation.program(), "--root", other, "delete", "--force", "c"],
        check=True,
        env=ENVIRONMENT,
    )
    assert [lease["root"] for lease in attack.leases()] == [attack.engine.root] and attack.records() == ["c"]


# --- a device is what its number says now ----------------------------------------------------------------------------


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_a_device_that_has_another_number_by_now(attack: Attack, cold: bool) -> None:
    """A driver that is loaded again assigns new numbers. The CDI file, which names paths only, does not change."""
    directory = os.path.join(attack.workdir, "own")
    gpus = attack.node.gpus[:2]
    os.makedirs(directory + "/cdi")
    for workdir, gpu in enumerate(gpus):
        os.mknod(f"{directory}/gpu{workdir}", 0o20666, os.makedev(gpu.major, gpu.minor))
    with open(directory + "/cdi/gpu.json", "w", encoding="utf-8") as file:
        json.dump(
            {
                "cdiVersion": "0.6.0",
                "kind": "nvidia.com/gpu",
                "devices": [
                    {
                        "name": str(workdir),
                        "containerEdits": {
                            "deviceNodes": [{"path": f"/dev/gpu{workdir}", "hostPath": f"{directory}/gpu{workdir}"}]
                        },
                    }
                    for workdir in range(2)
                ],
            },
            file,
        )
    attack.installation.configure([attack.runtime.path], [directory + "/cdi"])
    attack.installation.refresh()

    def ask(name: str, device: str) -> str:
        made = bundle.make(
            os.path.join(attack.workdir, name),
            ("sleep", "60"),
            bundle.request(resources={"gpu": {"devices": [device]}}),
            root=attack.image,
        )
        return attack.run(made, os.path.join(attack.workdir, "root"), name)

    assert ask("one", "1") == ""
    os.unlink(directory + "/gpu0")
    os.mknod(directory + "/gpu0", 0o20666, os.makedev(gpus[1].major, gpus[1].minor))
    if cold:
        shutil.rmtree(attack.installation.state + "/inventory")
    assert "is not free: one holds" in ask("two", "0")
    assert len(attack.leases()) == 1


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_a_gpu_that_every_device_of_a_file_brings(attack: Attack) -> None:
    """Its node is in the edits of the file, not in those of a device."""
    directory = os.path.join(attack.workdir, "own")
    os.makedirs(directory)
    first = attack.node.gpus[0]
    with open(directory + "/x.json", "w", encoding="utf-8") as file:
        json.dump(
            {
                "cdiVersion": "0.6.0",
                "kind": "x.com/gpu",
                "containerEdits": {"deviceNodes": [{"path": first.inside, "hostPath": first.host}]},
                "devices": [{"name": name, "containerEdits": {"env": ["X=1"]}} for name in ("0", "GPU-a")],
            },
            file,
        )
    attack.installation.configure(
        [attack.runtime.path],
        [attack.node.cdi, directory],
        '[policy]\nallow = ["gpu"]\nkinds = ["x.com/gpu", "nvidia.com/gpu"]\n',
    )
    attack.installation.refresh()

    def ask(name: str, *devices: str) -> str:
        made = bundle.make(
            os.path.join(attack.workdir, name),
            ("sleep", "60"),
            bundle.request(resources={"gpu": {"devices": list(devices)}}),
            root=attack.image,
        )
        return attack.run(made, os.path.join(attack.workdir, "root"), name)

    assert ask("one", "x.com/gpu=0") == ""
    assert "is not free: one holds" in ask("two", "x.com/gpu=GPU-a")
    assert "is not free: one holds" in ask("other", "nvidia.com/gpu=0")
    assert ask("three", "nvidia.com/gpu=1") == ""
