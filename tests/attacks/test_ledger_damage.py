"""Damaged ledgers, grant records and inventories: no traceback, no hang, and no GPU given twice.

CHANDLER_FUZZ=5000 tries as many damaged files through an installation, and as many in this process for each way to
choose files.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import REPOSITORY, bundle
from lab.engine import ENVIRONMENT, PATIENCE
from lab.install import Installation
from lab.node import Node

from shim.errors import ChandlerError, HostError, LeaseError, LedgerError
from shim.state import grants, leases, ledger, records, stale
from shim.state.ledger import Ledger

TRIES = int(os.environ.get("CHANDLER_FUZZ", "100"))
SEED = int(os.environ.get("CHANDLER_FUZZ_SEED", "1"))
GPUS = [f"c195:{number}" for number in range(8)]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes, as a disk, a crash, a person or another program may."""
    at = rng.randrange(len(data) + 1)
    how = rng.randrange(10)
    if how == 0:
        return data[:at]
    if how == 1:
        return bytes(len(data)) if rng.random() < 0.5 else data[:at] + bytes(len(data) - at)
    if how == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]
    if how == 3:
        return data[:at] + data[min(len(data), at + rng.randrange(1, 60)) :]
    if how == 4:
        return data[at:] + data[:at]
    if how == 5:
        return rng.choice(
            [
                b"",
                b"[]",
                b"{}",
                b"null",
                b"[[]]",
                b"[null]",
                b'{"leases":[]}',
                b'{"leases":null}',
                b"[" * 100000,
                b'{"checksum":"',
                b"9" * 10000,
            ]
        )
    if how < 8:
        return json_mutated(data, rng)
    flipped = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def json_mutated(data: bytes, rng: random.Random) -> bytes:
    """Remove, rename or change the type of one member, and keep the old checksum or drop it.

    Files of older versions have no checksum.
    """
    try:
        document = json.loads(data)
    except ValueError:
        return data[::-1]
    if isinstance(document, dict) and rng.random() < 0.5:
        document.pop("checksum", None)
        document = document.get("leases", document)
    workdirs: list[tuple[Any, Any]] = []
    stack = [document]
    while stack:
        value = stack.pop()
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            workdirs.append((value, key))
            stack.append(value[key])
    if not workdirs:
        return b"[]"
    parent, key = rng.choice(workdirs)
    if isinstance(parent, dict) and rng.random() < 0.4:
        value = parent.pop(key)
        if rng.random() < 0.5:
            parent[key[:-1] + "o"] = value
    else:
        parent[key] = rng.choice([None, 0, -1, 1 << 80, 1.5, "", "x", [], {}, [[]], True, ["c195:0"], {"a": 1}])
    return json.dumps(document).encode()


class Taken:
    def __init__(self, keys: list[str]) -> None:
        self.keys, self.names, self.sharing = keys, keys, None


def take(count: int) -> Any:
    def plan(held: list[Any]) -> Taken:
        free = [key for key in GPUS if leases.holder([key], held) is None]
        if len(free) < count:
            raise LeaseError("short of devices")
        return Taken(free[:count])

    return plan


class Kept:
    """A ledger with three containers and their records.

    `lives` is alive (this process stands for it), `gone` is not, `nri` is the plugin's.
    """

    def __init__(self, directory: Path) -> None:
        self.state, self.root = str(directory / "state"), str(directory / "root")
        os.mkdir(self.root)
        os.makedirs(grants.nri_directory(self.state), mode=0o755)
        self.ledger = Ledger(self.state)
        lives, gone = (
            ledger.oci_lease("lives", self.root, "/bin/false", 1_700_000_000),
            ledger.oci_lease("gone", self.root, "/bin/false", 1_700_000_000),
        )
        gone["started"] += 1
        self.holds = {}
        for lease, count in ((lives, 2), (gone, 2), (ledger.nri_lease("nri", "pod", 1_700_000_000), 2)):
            self.holds[lease["id"]] = self.ledger.allocate(lease, take(count)).keys
            record: Any = {
                "time": lease["since"],
                "devices": lease["names"],
                "physical": lease["keys"],
                "source": "a test",
                **{key: value for key, value in lease.items() if key not in ("names", "keys", "since")},
            }
            grants.write(self.state if lease["owner"] == "oci" else grants.nri_directory(self.state), record)
        self.files = {str(path): path.read_bytes() for path in Path(self.state).rglob("*") if path.is_file()}
        self.names = sorted(path for path in self.files if not path.endswith(".lock"))

    def lose_plugin(self) -> None:
        """Remove the plugin's state: on a node without a plugin a damaged ledger is rebuilt by itself."""
        shutil.rmtree(grants.nri_directory(self.state))

    def restore(self) -> None:
        for directory, _, names in os.walk(self.state):
            for name in names:
                if os.path.join(directory, name) not in self.files:
                    os.unlink(os.path.join(directory, name))
        for path, data in self.files.items():
            Path(path).write_bytes(data)


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


@pytest.mark.parametrize("which", ["leases", "leases.copy", "both", "records", "all"])
@pytest.mark.parametrize("nri", [False, True])
def test_damaged_files_in_this_process(kept: Kept, which: str, nri: bool) -> None:
    """Whatever is damaged, nothing that `lives` holds is granted, and every error is one sentence."""
    rng = random.Random(f"{SEED} {which} {nri}")
    if not nri:
        kept.lose_plugin()
        kept.ledger.release({lease["token"] for lease in kept.ledger.read() if lease["owner"] == "nri"})
        kept.files = {path: Path(path).read_bytes() for path in kept.files if os.path.exists(path)}
        kept.names = sorted(path for path in kept.files if not path.endswith(".lock"))
    chosen = {
        "leases": [kept.ledger.path],
        "leases.copy": [kept.ledger.path + ".copy"],
        "both": [kept.ledger.path, kept.ledger.path + ".copy"],
        "records": [path for path in kept.names if path.endswith(".json")],
        "all": kept.names,
    }[which]
    served = refused = 0
    for turn in range(TRIES):
        kept.restore()
        for path in chosen if which != "all" else rng.sample(chosen, rng.randrange(1, len(chosen) + 1)):
            if which in ("both", "all") or rng.random() < 0.7:
                Path(path).write_bytes(mutated(kept.files[path], rng))
            elif rng.random() < 0.3:
                os.unlink(path)
        new = ledger.oci_lease(f"new{turn}", kept.root, "/bin/false", 1_700_000_000)
        try:
            keys = kept.ledger.allocate(new, take(rng.choice([0, 1, 4, 7]))).keys
            served += 1
            held = kept.holds["lives"] + (kept.holds["nri"] if nri else [])
            assert not set(keys) & set(held), f"turn {turn}: {held} are held, and {keys} were granted"
        except ChandlerError as error:
            assert str(error) and "\n" not in str(error)
            refused += 1
        for container in ("lives", "gone", "nri"):
            for base in (kept.state, grants.nri_directory(kept.state)):
                records.read(base, "" if container == "nri" else kept.root, container)
        stale.prune(kept.state, 0.0)
        try:
            Ledger(kept.state).rebuild(asked=True, force=turn % 2 == 0)
        except HostError as error:
            assert "damaged" in str(error)
    assert served and refused


def test_a_ledger_in_the_older_format_is_read(kept: Kept) -> None:
    """An upgrade keeps containers, leases and grants; the next change writes the new format."""
    held: list[Any] = kept.ledger.read()
    for lease in held:
        for key in ("boot", "pidns", "timens", "place", "group"):
            lease.pop(key, None)
    for path in kept.names:
        if path.endswith(".json"):
            record = json.loads(kept.files[path])
            old = {
                key: record[key]
                for key in ("id", "root", "owner", "runtime", "devices", "physical", "source", "time")
                if key in record
            }
            Path(path).write_text(json.dumps(old))
            assert records.read(os.path.dirname(os.path.dirname(path)), record["root"], record["id"]) == old
    Path(kept.ledger.path).write_text(json.dumps(held) + "\n")
    with pytest.raises(LedgerError, match="is damaged"):
        kept.ledger.read()  # an older Chandler writes no copy: ledger and copy differ, and nothing tells which is right
    os.unlink(kept.ledger.path + ".copy")
    assert kept.ledger.read() == held
    with pytest.raises(LeaseError):
        kept.ledger.allocate(ledger.oci_lease("new", kept.root, "/bin/false", 0), take(8))
    assert {lease["id"] for lease in kept.ledger.read()} == {"lives", "nri"}
    assert b'{"checksum":"' == Path(kept.ledger.path).read_bytes()[:13]


def test_an_old_root_is_found_by_its_new_name(kept: Kept, tmp_path: Path) -> None:
    """docker says /var/run/docker/…, which is a link."""
    os.symlink("root", tmp_path / "link")
    spelled = str(tmp_path / "link")
    old = {**ledger.oci_lease("old", spelled, "/bin/false", 0), "names": ["x"], "keys": [GPUS[7]]}
    for path in kept.names:
        os.unlink(path)
    Path(kept.ledger.path).write_text(json.dumps([old]))
    assert [lease["root"] for lease in kept.ledger.read()] == [kept.root]
    path = grants.record_path(kept.state, spelled, "old")
    Path(path).write_text(json.dumps({"id": "old", "root": spelled, "devices": ["x"]}))
    assert records.read(kept.state, kept.root, "old") is None
    found = records.read(kept.state, kept.root, "old", spelled)
    assert found is not None and found["devices"] == ["x"]


def test_a_lost_ledger_does_not_count_as_empty(kept: Kept) -> None:
    """Somebody removes the ledger: the grant records still tell who holds what."""
    kept.lose_plugin()
    for name in ("", ".copy"):
        os.unlink(kept.ledger.path + name)
    with pytest.raises(LedgerError, match="is lost; `chandler leases rebuild`"):
        kept.ledger.read()
    with pytest.raises(LeaseError):
        kept.ledger.allocate(ledger.oci_lease("new", kept.root, "/bin/false", 0), take(7))
    assert [lease["id"] for lease in kept.ledger.read()] == ["lives"]


def test_the_copy_equals_the_ledger(kept: Kept) -> None:
    before = kept.ledger.read()
    assert Path(kept.ledger.path).read_bytes() == Path(kept.ledger.path + ".copy").read_bytes()
    Path(kept.ledger.path).write_bytes(b"")
    assert kept.ledger.read() == before
    assert kept.ledger.release({before[0]["token"]}) == 1
    assert Path(kept.ledger.path).read_bytes() == Path(kept.ledger.path + ".copy").read_bytes()


def test_a_rebuild_waits_for_creates_that_go_on(kept: Kept) -> None:
    """A rebuild waits for a create that has a lease but no record yet.

    It waits until the record is there or the create has ended.
    """
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom shim.state.ledger import Ledger\n"
        "Ledger(sys.argv[2]).announce(); print('announced', flush=True); sys.stdin.read()"
    )
    here = REPOSITORY
    with subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", program, here, kept.state], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as creating:
        assert creating.stdout is not None and creating.stdout.readline() == b"announced\n"
        waiting = subprocess.Popen(
            [
                "/usr/bin/python3",
                "-I",
                "-c",
                "import sys; sys.path.insert(0, sys.argv[1])\nfrom shim.state.ledger import Ledger\n"
                "Ledger(sys.argv[2]).rebuild(asked=True)",
                here,
                kept.state,
            ]
        )
        for _ in range(1000):  # the lock that it waits for is in the kernel's table
            inode = os.stat(kept.ledger.path + ".creating").st_ino
            with open("/proc/locks", encoding="ascii") as file:
                if any("->" in line and line.split()[-3].endswith(f":{inode}") for line in file):
                    break
            assert waiting.poll() is None, "the rebuild did not wait for the create"
        creating.stdin.close()  # type: ignore[union-attr]
        assert waiting.wait(PATIENCE) == 0


def as_an_older_release_left_it(kept: Kept) -> str:
    """One living container: its ledger is a plain list, its record has no token; the token is also in its hook."""
    kept.lose_plugin()
    (lease,) = (each for each in kept.ledger.read() if each["id"] == "lives")
    for name in os.listdir(kept.state):
        if name.startswith("leases"):
            os.unlink(os.path.join(kept.state, name))
    old = {
        key: value
        for key, value in lease.items()
        if key in ("token", "owner", "id", "root", "runtime", "pid", "started", "names", "keys", "since")
    }
    old["pid"], old["started"] = 4194000, 1  # the wrapper has become the runtime, and has ended
    Path(kept.ledger.path).write_text(json.dumps([old]))
    grants_dir = Path(grants.directory(kept.state))
    for record in grants_dir.iterdir():
        record.unlink()
    Path(grants.record_path(kept.state, kept.root, "lives")).write_text(
        json.dumps(
            {
                "id": "lives",
                "root": kept.root,
                "runtime": "/bin/false",
                "config": "/b/config.json",
                "source": "a test",
                "devices": lease["names"],
                "physical": lease["keys"],
                "before": "0",
                "after": "1",
                "time": 1_700_000_000,
                "rules": [],
                "grant": "2",
            }
        )
    )
    os.mkdir(os.path.join(kept.root, "lives"))
    hook = {"path": "/usr/bin/chandler-hook", "args": ["chandler-hook", "release", kept.state, lease["token"]]}
    devices = [{"path": f"/dev/x{n}", "type": "c", "major": 195, "minor": n} for n in (255, *range(2))]
    Path(kept.root, "lives/state.json").write_text(
        json.dumps({"config": {"hooks": {"poststop": [hook]}, "devices": devices}})
    )
    return str(lease["token"])


def test_a_rebuild_after_an_upgrade_doubles_no_lease(kept: Kept) -> None:
    token = as_an_older_release_left_it(kept)
    made = Ledger(kept.state).rebuild(asked=True).leases
    assert [(lease["token"], lease["keys"]) for lease in made] == [(token, kept.holds["lives"])]


def test_a_ledger_that_is_lost_after_an_upgrade_is_noticed(kept: Kept) -> None:
    token = as_an_older_release_left_it(kept)
    os.unlink(kept.ledger.path)
    with pytest.raises(LedgerError):
        kept.ledger.read()
    later = ledger.oci_lease("later", kept.root, "/bin/false", 1_700_000_001)
    taken = kept.ledger.allocate(later, take(2)).keys
    assert not set(taken) & set(kept.holds["lives"])
    assert [lease["token"] for lease in kept.ledger.read()] == [token, later["token"]]


def test_a_damaged_ledger_whose_records_are_lost_is_not_made_anew_by_itself(kept: Kept) -> None:
    kept.lose_plugin()
    shutil.rmtree(grants.directory(kept.state))
    for name in ("leases", "leases.copy"):
        Path(kept.state, name).write_bytes(b"")
    with pytest.raises(HostError, match="its grant records are lost, too"):
        kept.ledger.allocate(ledger.oci_lease("later", kept.root, "/bin/false", 1_700_000_001), take(2))
    assert Ledger(kept.state).rebuild(asked=True).leases == []


# --- through an installation ----------------------------------------------------------------------------------------


class Installed:
    """Chandler over a runtime that does nothing; only the create of `held` stays in progress."""

    def __init__(self, workdir: str, node: Node) -> None:
        self.workdir = workdir
        self.installation = Installation(os.path.join(workdir, "installed"))
        runtime = os.path.join(workdir, "runc")
        os.mkfifo(workdir + "/created")
        with open(runtime, "w", encoding="ascii") as file:
            file.write(
                f'#!/bin/sh\ncase " $* " in *" held "*) echo >{workdir}/created; exec /bin/sleep 100000;; esac\n'
            )
        os.chmod(runtime, 0o755)
        self.installation.configure([runtime], [node.cdi])
        self.installation.refresh()
        self.image = bundle.rootfs(os.path.join(workdir, "image"))
        self.number = 0
        self.held = subprocess.Popen(self.argv("held", 3), env=ENVIRONMENT, stdin=subprocess.DEVNULL)
        with open(workdir + "/created", encoding="ascii") as file:
            file.read()
        self.files = {
            str(path): path.read_bytes()
            for path in Path(self.installation.state).rglob("*")
            if path.is_file() and path.stat().st_size
        }

    def argv(self, name: str, count: int, **more: Any) -> list[str]:
        self.number += 1
        made = os.path.join(self.workdir, f"b{self.number}")
        asked = bundle.request(**more) if more else bundle.request(resources={"gpu": {"count": count}})
        self.made = bundle.make(made, ["true"], asked, root=self.image)
        return [
            self.installation.program(),
            "--root",
            os.path.join(self.workdir, "root"),
            "create",
            "--bundle",
            made,
            name,
        ]

    def call(self, argv: list[str], **more: Any) -> tuple[int, str]:
        done = subprocess.run(
            argv,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            **{"env": ENVIRONMENT, **more},
        )
        output = done.stdout + done.stderr
        assert "Traceback" not in output and "internal error" not in output, (argv, output)
        return done.returncode, output

    def damage(self, rng: random.Random) -> list[str]:
        """Damage some files; write all others as they were."""
        for path, data in self.files.items():
            with open(path, "wb") as file:
                file.write(data)
        paths = rng.sample(sorted(self.files), rng.randrange(1, 4))
        if rng.random() < 0.5:
            paths += [os.path.join(self.installation.state, name) for name in ("leases", "leases.copy")]
        for path in dict.fromkeys(paths):
            with open(path, "wb") as file:
                file.write(mutated(self.files[path], rng))
        return paths


@pytest.fixture
def installed(workdir: str, node: Node) -> Iterator[Installed]:
    made = Installed(workdir, node)
    yield made
    made.held.kill()
    made.held.wait()


def test_damaged_files_through_an_installation(installed: Installed) -> None:
    rng = random.Random(SEED)
    served = 0
    commands = [
        ["leases"],
        ["leases", "release", "--stale"],
        ["ps"],
        ["doctor"],
        ["leases", "rebuild"],
        ["leases", "release", "held"],
        ["refresh", "--quiet"],
    ]
    for turn in range(TRIES):
        damaged = installed.damage(rng)
        status, output = installed.call(installed.argv(f"c{turn}", count := rng.choice([1, 5, 6])))
        granted = installed.made.config["annotations"].get("chandler.oci/granted", "")
        if status == 0:
            served += 1
            assert count < 6 and not {"nvidia.com/gpu=0", "nvidia.com/gpu=1", "nvidia.com/gpu=2"} & set(
                granted.split(",")
            ), (turn, damaged)
        else:
            assert output and granted == "", (turn, damaged)
        if turn % 5 == 0:
            installed.damage(rng)
            installed.call([installed.installation.program("chandler"), *commands[turn // 5 % len(commands)]], env={})
        shutil.rmtree(installed.made.directory)
    assert served


def test_a_damaged_ledger_does_not_stop_containers_without_a_gpu(installed: Installed) -> None:
    os.mkdir(os.path.join(installed.installation.state, "nri"))
    for name in ("leases", "leases.copy"):
        with open(os.path.join(installed.installation.state, name), "wb"):
            pass
    assert installed.call(installed.argv("c1", 0, env={"A": "b"})) == (0, "")
    status, output = installed.call(installed.argv("c2", 1))
    assert status == 1 and "who holds which GPU is not certain" in output and "`chandler leases rebuild`" in output
    chandler = installed.installation.program("chandler")
    assert "is damaged; `chandler leases rebuild`" in installed.call([chandler, "leases"], env={})[1]
    assert installed.call([chandler, "leases", "rebuild"], env={}) == (0, "1 leases\n")
    assert installed.installation.leases() == {"held": [f"nvidia.com/gpu={number}" for number in range(3)]}


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
def test_commands_with_a_damaged_inventory(installed: Installed, damage: str) -> None:
    """A part is read when it is needed first: then the inventory is compiled anew."""
    installed.call(installed.argv("c1", 1))
    parts = list(Path(installed.installation.state).glob("inventory/*/*.part"))
    assert parts
    for command in (["ps"], ["doctor"], ["leases"], ["cdi", "list"]):
        for part in parts:
            if damage == "missing":
                part.unlink(missing_ok=True)
            else:
                data = part.read_bytes() if part.exists() else b"x"
                part.write_bytes(b"" if damage == "empty" else data[:-1] + bytes([data[-1] ^ 1]))
        _, output = installed.call([installed.installation.program("chandler"), *command], env={})
        assert "Traceback" not in output and "Stale" not in output
