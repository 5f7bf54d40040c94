"""The compiled inventory: used only while no source has changed, and never required."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from lab.local_node import NVIDIA, Node, cdi

from shim import jsontext, paths
from shim.cdi.resolve import resolve
from shim.errors import CdiError, ChandlerError, ConfigError, HostError, TrustError
from shim.host import files
from shim.node import cdi_files, compiler, inventory
from shim.node.inventory import Account, Inventory, Stale

needs_root = pytest.mark.usefixtures("needs_root")


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(tmp_path, monkeypatch)
    made.later()
    return made


def explain(names: list[str]) -> NoReturn:
    raise CdiError(f"unknown: {names}")


def load(node: Node) -> Inventory:
    return inventory.load(node.account(), explain)


def is_stale(node: Node) -> bool:
    try:
        load(node)
    except Stale:
        return True
    return False


def stored(node: Node) -> Path:
    """The directory of a compiled inventory that is fresh."""
    compiler.refresh(node.account())
    assert not is_stale(node)
    return Path(node.account().directory)


def answers(at: Inventory) -> Any:
    """Everything that a create could read from it."""
    kinds = sorted(at.kinds())
    names = [f"{kind}={name}" for kind in kinds for name in (*at.picks(kind), "all", "GPU-0", "9")]
    edits = [None if at.lookup(name) is None else resolve([name], at.lookup).items for name in names]
    return kinds, [at.picks(kind) for kind in kinds], [at.key(name) for name in names], edits, at.config, at.problems


# --- stored and read --------------------------------------------------------------------------------------------


def test_a_stored_inventory_answers_like_a_fresh_one(node: Node) -> None:
    node.spec("x.json", cdi(2, "x.com/y"))
    node.spec(
        "env.json",
        {"cdiVersion": "0.6.0", "kind": "e.com/v", "devices": [{"name": "0", "containerEdits": {"env": ["A=1.50"]}}]},
    )
    fresh = node.compiled()
    stored(node)
    assert answers(load(node)) == answers(fresh)
    assert fresh.picks(NVIDIA) == ["0", "1", "2", "3"]
    assert fresh.kinds() and set(fresh.kinds()) == {NVIDIA, "x.com/y", "e.com/v"}


def test_an_inventory_without_devices_is_stored(node: Node) -> None:
    os.unlink(node.directory / "etc/cdi/nvidia.json")
    stored(node)
    assert load(node).kinds() == [] and load(node).picks(NVIDIA) == [] and load(node).lookup(f"{NVIDIA}=0") is None
    assert load(node).key(f"{NVIDIA}=0") == [f"{NVIDIA}=0"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "0",
        NVIDIA,
        f"{NVIDIA}=",
        f"{NVIDIA}=0\t0",
        f"{NVIDIA}=0\n",
        "\n",
        "\t",
        f"vidia.com/gpu=0\n{NVIDIA}=0",
        f"{NVIDIA}=00",
        "com/gpu=0",
    ],
)
def test_lookup_needs_the_whole_name(node: Node, name: str) -> None:
    at = node.compiled()
    assert at.lookup(name) is None and at.key(name) == [name]
    assert at.picks(name) == (["0", "1", "2", "3"] if name == NVIDIA else [])


def test_edits_name_their_source(node: Node) -> None:
    found = node.compiled().lookup(f"{NVIDIA}=GPU-1")
    assert found is not None
    path = f"{node.directory}/etc/cdi/nvidia.json"
    assert {edit[3] for edit in found[1]} == {path}
    assert {edit[3] for edit in found[2]} == {f"{path} {NVIDIA}=GPU-1"}


def test_inventory_files_are_readable_by_the_caller_only(node: Node) -> None:
    directory = stored(node)
    for name in os.listdir(directory):
        assert stat.S_IMODE((directory / name).stat().st_mode) == 0o600, name
    assert not [name for name in os.listdir(directory) if ".chandler-" in name]


# --- stale ------------------------------------------------------------------------------------------------------


def rewrite_in_place(path: Path) -> None:
    """Write other bytes with the same inode, size and mtime, as `cp -p` does; only ctime differs."""
    before = path.stat()
    data = path.read_bytes()
    after = before
    while after.st_ctime_ns == before.st_ctime_ns:  # the clock of the file system ticks some hundred times a second
        with path.open("r+b") as file:
            file.write(data.replace(b"nvidia1", b"nvidia7"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def changes() -> dict[str, Callable[[Node], Any]]:
    def at(name: str) -> Callable[[Node], Path]:
        return lambda node: node.directory / name

    spec, etc = at("etc/cdi/nvidia.json"), at("etc")
    return {
        "a CDI file's content": lambda node: node.spec("nvidia.json", cdi(2)),
        "a CDI file copied over with cp -p": lambda node: rewrite_in_place(spec(node)),
        "a new CDI file": lambda node: node.spec("new.json", cdi(1, "x.com/y")),
        "a CDI file removed": lambda node: os.unlink(spec(node)),
        "a CDI file renamed": lambda node: os.rename(spec(node), etc(node) / "cdi/z.json"),
        "a CDI file's mode": lambda node: spec(node).chmod(0o666),
        "a directory's mode": lambda node: (etc(node) / "cdi").chmod(0o777),
        "a CDI directory that was not there": lambda node: (etc(node) / "cdi2").mkdir(0o755),
        "the mode of a directory on the way": lambda node: etc(node).chmod(0o777),
        "a directory on the way replaced": lambda node: os.system(
            f"cd {node.directory} && mv etc old && cp -a old etc"
        ),
        "the configuration": lambda node: node.configure('engine = "crio"'),
        "the configuration copied over with cp -p": lambda node: rewrite_in_place(etc(node) / "config.toml"),
        "the configuration removed": lambda node: os.unlink(etc(node) / "config.toml"),
        "config.d added": lambda node: (etc(node) / "config.d").mkdir(0o755),
        "another configuration": lambda node: node.monkeypatch.setattr(
            paths, "CONFIG_DIR", str(node.directory / "other")
        ),
        "another version": lambda node: node.monkeypatch.setattr(paths, "VERSION", "9.9.9"),
        "another caller": lambda node: node.monkeypatch.setattr("posix.geteuid", lambda: 4242),
        "another user namespace": lambda node: node.monkeypatch.setattr(
            "shim.host.userns.user_namespace", lambda: "0 5 1"
        ),
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_every_change_of_a_source_makes_the_inventory_stale(node: Node, change: Callable[[Node], Any]) -> None:
    stored(node)
    change(node)
    assert is_stale(node)


def test_a_change_in_config_d_makes_the_inventory_stale(node: Node) -> None:
    (node.directory / "etc/config.d").mkdir(mode=0o755)
    stored(node)
    node.put("etc/config.d/a.toml", "[policy]\nmax-gpus = 2")
    assert is_stale(node)
    stored(node)
    assert load(node).config["policy.max-gpus"] == 2
    rewrite_in_place(node.directory / "etc/config.d/a.toml")
    assert is_stale(node)
    stored(node)
    os.unlink(node.directory / "etc/config.d/a.toml")
    assert is_stale(node)


def test_a_link_with_a_new_target_makes_the_inventory_stale(node: Node) -> None:
    (node.directory / "real").mkdir(mode=0o755)
    (node.directory / "real2").mkdir(mode=0o755)
    for name, count in (("real", 2), ("real2", 3)):
        (node.directory / name / "x.json").write_bytes(jsontext.dumps(cdi(count, "x.com/y")))
    (node.directory / "etc/cdi2").symlink_to(node.directory / "real")
    stored(node)
    assert load(node).picks("x.com/y") == ["0", "1"]
    os.unlink(node.directory / "etc/cdi2")
    (node.directory / "etc/cdi2").symlink_to(node.directory / "real2")
    assert is_stale(node)
    stored(node)
    assert load(node).picks("x.com/y") == ["0", "1", "2"]
    (node.directory / "real2").chmod(0o777)
    assert is_stale(node)


@needs_root
@pytest.mark.parametrize("name", ["etc/cdi/nvidia.json", "etc/cdi", "etc", "etc/config.toml"])
def test_another_owner_of_a_source_makes_the_inventory_stale(node: Node, name: str) -> None:
    stored(node)
    os.chown(node.directory / name, 1234, 0)
    assert is_stale(node)


@needs_root
def test_an_index_that_others_own_or_can_write_is_not_used(node: Node) -> None:
    directory = stored(node)
    for name in ("index", ""):
        os.chown(directory / name, 1234, 0)
        assert is_stale(node)
        os.chown(directory / name, 0, 0)
        (directory / name).chmod(0o777)
        assert is_stale(node)
        (directory / name).chmod(0o700)
        assert not is_stale(node)


def test_sources_that_are_too_young_are_not_stored(node: Node) -> None:
    node.later(0)
    compiler.refresh(node.account())
    assert is_stale(node)
    changed = os.stat(node.directory / "etc/cdi/nvidia.json").st_ctime_ns
    assert 0 < compiler.seconds_until_settled(node.account(), changed) <= 2.1
    assert compiler.seconds_until_settled(node.account(), changed + 10**10) == 0
    node.later(2.1)
    stored(node)


def test_a_change_while_compiling_is_not_stored(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cdi_files.read_spec_dirs

    def changed(*arguments: Any) -> Any:
        found = real(*arguments)
        node.spec("nvidia.json", cdi(2))
        return found

    monkeypatch.setattr(cdi_files, "read_spec_dirs", changed)
    compiler.refresh(node.account())
    assert is_stale(node)
    assert not os.path.exists(node.account().directory + "/index")


def test_an_index_of_another_key_is_not_used(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories are named by a short checksum of the key, so another key's index may be there."""
    directory = stored(node)
    monkeypatch.setattr(paths, "VERSION", "9.9.9")
    shutil.copytree(directory, node.account().directory)
    assert is_stale(node)


def test_problems_of_cdi_files_are_stored(node: Node) -> None:
    node.spec("broken.json", "{")
    stored(node)
    assert load(node).problems is True
    os.unlink(node.directory / "etc/cdi/broken.json")
    stored(node)
    assert load(node).problems is False


# --- damage -----------------------------------------------------------------------------------------------------


def used(node: Node) -> Any:
    """The inventory of a create: the stored one, or a new one if a part is lost."""
    at = compiler.load(node.account())
    try:
        return answers(at)
    except Stale:
        return answers(compiler.refresh(node.account()))


@pytest.mark.parametrize("which", ["index", "part"])
@pytest.mark.parametrize("kind", ["flip", "truncate", "insert", "zero"])
def test_damage_anywhere_costs_only_time(node: Node, which: str, kind: str) -> None:
    directory = stored(node)
    right = used(node)
    path = next(directory / name for name in os.listdir(directory) if name.endswith(which))
    whole = path.read_bytes()
    for at in {*range(0, len(whole), 50), len(whole) - 1, 20, 28, 29, 30}:
        damaged = {
            "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "truncate": whole[:at],
            "insert": whole[:at] + b"\n" + whole[at:],
            "zero": whole[:at] + b"\0" * (len(whole) - at),
        }[kind]
        path.write_bytes(damaged)
        assert used(node) == right, at
        assert path.read_bytes() == whole, "the stored inventory must be repaired"


@pytest.mark.parametrize("name", ["index", "part", "directory", "all"])
def test_lost_parts_cost_only_time(node: Node, name: str) -> None:
    directory = stored(node)
    right = used(node)
    for lost in os.listdir(directory):
        if name in ("directory", "all") or lost.endswith(name):
            os.unlink(directory / lost)
    if name in ("directory", "all"):
        os.rmdir(directory)
    if name == "all":
        os.rmdir(directory.parent)
        os.rmdir(directory.parent.parent)
    assert used(node) == right
    assert not is_stale(node)


def test_an_index_that_is_no_regular_file_is_replaced(node: Node) -> None:
    directory = stored(node)
    right = used(node)
    os.unlink(directory / "index")
    os.mkfifo(directory / "index")
    assert used(node) == right
    os.unlink(directory / "index")
    os.mkdir(directory / "index")
    assert used(node) == right
    os.rmdir(directory / "index")
    (directory / "index").symlink_to("/dev/zero")
    assert used(node) == right


def test_unused_segments_are_removed(node: Node) -> None:
    directory = stored(node)
    node.spec("nvidia.json", cdi(2))
    stored(node)
    assert len([name for name in os.listdir(directory) if name.endswith(".part")]) == 2


@pytest.mark.parametrize("what", ["state", "state/inventory"])
def test_an_unwritable_state_directory_costs_only_time(node: Node, what: str) -> None:
    if what == "state":
        os.rmdir(node.directory / "state")
    (node.directory / what).touch()
    for _ in range(2):
        assert compiler.load(node.account()).picks(NVIDIA) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("refused", ["lock", "index", ".part"])
def test_a_read_only_state_directory_costs_only_time(node: Node, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    os.makedirs(node.account().directory, 0o755)
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if flags & os.O_CREAT and refused in str(path):
            raise OSError(30, "Read-only file system", path)
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("posix.open", refuse)
    for _ in range(2):
        assert compiler.load(node.account()).picks(NVIDIA) == ["0", "1", "2", "3"]
        assert compiler.refresh(node.account()).picks(NVIDIA) == ["0", "1", "2", "3"]
    assert is_stale(node)


def test_a_full_disk_costs_only_time(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)
    assert compiler.load(node.account()).picks(NVIDIA) == ["0", "1", "2", "3"]
    monkeypatch.undo()
    assert [name for _, _, names in os.walk(node.directory / "state") for name in names] == ["lock"]


# --- at the same time -------------------------------------------------------------------------------------------


def compile_many(node: Node, times: int) -> list[str]:
    """What went wrong in so many compiles, each followed by the load that a create does.

    A load that meets two compiles of others loses the part of the index that it read, and compiles anew.
    """
    problems = []
    for _ in range(times):
        try:
            if compiler.refresh(node.account()).picks(NVIDIA) != ["0", "1", "2", "3"]:
                problems.append("compiled")
            if answers(compiler.load(node.account()))[1] != [["0", "1", "2", "3"]]:
                problems.append("loaded")
        except (ChandlerError, OSError) as error:
            problems.append(repr(error))
    return problems


def test_many_processes_compile_at_once(node: Node) -> None:
    children = []
    for _ in range(6):
        child = os.fork()
        if not child:
            status = 1
            try:
                status = 1 if compile_many(node, 8) else 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert not is_stale(node)
    assert sorted(name.rpartition(".")[2] for name in os.listdir(node.account().directory)) == [
        "index",
        "lock",
        "part",
        "part",
    ]


def test_many_threads_compile_at_once(node: Node) -> None:
    problems: list[str] = []
    threads = [threading.Thread(target=lambda: problems.extend(compile_many(node, 8))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# --- trust ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["etc", "etc/config.toml"])
def test_a_configuration_that_others_may_write_is_refused(node: Node, name: str) -> None:
    (node.directory / name).chmod(0o777)
    with pytest.raises(TrustError, match=f"{node.directory / name} can be written by others"):
        node.compiled()


@pytest.mark.parametrize("name", ["etc/cdi", "etc/cdi/nvidia.json"])
def test_cdi_files_that_others_may_write_are_not_used(node: Node, name: str) -> None:
    (node.directory / name).chmod(0o777)
    at = node.compiled()
    assert at.problems and at.picks(NVIDIA) == []
    with pytest.raises(CdiError, match="can be written by others"):
        at.explain_missing([f"{NVIDIA}=0"])


def test_chandler_config_names_the_configuration(node: Node) -> None:
    node.put("state/mine.toml", "[policy]\nmax-gpus = 1")
    account = node.account({b"CHANDLER_CONFIG": f"{node.directory}/state/mine.toml".encode()})
    assert compiler.compile_now(account, store=False).config["policy.max-gpus"] == 1
    assert account.key != node.account().key and account.directory != node.account().directory
    (node.directory / "state/mine.toml").chmod(0o666)
    with pytest.raises(TrustError):
        compiler.refresh(account)


@pytest.mark.parametrize("named", ["absent.toml", "state"])
def test_an_invalid_named_configuration(node: Node, named: str) -> None:
    with pytest.raises(ChandlerError, match=named):
        compiler.compile_now(node.account({b"CHANDLER_CONFIG": f"{node.directory}/{named}".encode()}))


@pytest.mark.parametrize("named", [b"mine.toml", b"./mine.toml", b"etc/passwd", b"../mine.toml"])
def test_a_named_configuration_below_the_working_directory(
    node: Node, named: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.put("mine.toml", "")
    monkeypatch.chdir(node.directory)
    with pytest.raises(ConfigError, match="is no absolute path"):
        compiler.compile_now(node.account({b"CHANDLER_CONFIG": named}))


def test_a_config_d_that_is_no_directory(node: Node) -> None:
    (node.directory / "etc/config.d").touch()
    with pytest.raises(ConfigError, match="config.d cannot be read: Not a directory"):
        node.compiled()


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("link", ["etc", "etc/config.toml", "etc/config.d", "etc/config.d/50-deny.toml"])
def test_a_configuration_behind_a_link_whose_target_is_gone(node: Node, link: str, warm: bool) -> None:
    """It once counted as missing, so that whoever owns the target's directory could lift a `deny`."""
    (node.directory / "etc/config.d").mkdir(mode=0o755)
    node.put("etc/config.d/50-deny.toml", '[policy]\ndeny = ["gpu"]')
    node.put("etc/config.d/60-prefix.toml", 'annotation-prefix = "example.com/"')
    real = node.directory / "real"
    os.rename(node.directory / link, real)
    (node.directory / link).symlink_to(real)
    if warm:
        stored(node)
        assert load(node).config["policy.deny"] == ["gpu"]
    os.rename(real, node.directory / "gone")
    with pytest.raises(ConfigError, match=f"target of the link {node.directory / link} is missing"):
        compiler.load(node.account())
    known = ["chandler.oci/"] if link in ("etc", "etc/config.d") else ["chandler.oci/", "example.com/"]
    assert compiler.prefixes(node.account()) == known


def test_a_cdi_directory_behind_a_link_whose_target_is_gone(node: Node) -> None:
    """Its files could have refused the devices that another directory describes."""
    (node.directory / "etc/cdi2").symlink_to(node.directory / "gone")
    assert node.compiled().problems
    os.unlink(node.directory / "etc/cdi2")
    assert not node.compiled().problems


def test_no_configuration_means_the_defaults(node: Node) -> None:
    os.unlink(node.directory / "etc/config.toml")
    config, had_file = compiler.read_config(node.account())
    assert not had_file and config["policy.max-gpus"] == 8


# --- where it lies ------------------------------------------------------------------------------------------------


def test_place_chooses_the_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shim.host.userns.user_namespace", lambda: "0 0 4294967295")
    monkeypatch.setattr("posix.geteuid", lambda: 0)
    assert (Account({}).rootless, Account({b"XDG_RUNTIME_DIR": b"/x"}).state_dir) == (False, paths.STATE_DIR)
    monkeypatch.setattr("shim.host.userns.user_namespace", lambda: "0 1000 1")
    assert Account({}).rootless, "root of another user namespace counts as rootless"
    uid = tmp_path.stat().st_uid
    monkeypatch.setattr("posix.geteuid", lambda: uid)
    monkeypatch.setattr("shim.host.userns.user_namespace", lambda: f"{uid} 1000 1")
    tmp_path.chmod(0o700)
    assert Account({b"XDG_RUNTIME_DIR": str(tmp_path).encode()}).state_dir == f"{tmp_path}/chandler"
    tmp_path.chmod(0o770)
    for directory in (str(tmp_path), "relative", "", f"{tmp_path}/absent", "/proc/self/status"):
        account = Account({b"XDG_RUNTIME_DIR": directory.encode()})
        assert account.state_dir in ("", "/run/user/1000/chandler"), (
            "never in a directory where another user could be first"
        )
    monkeypatch.setattr(Account, "private", lambda self, path: path == "/run/user/1000")
    assert Account({}).state_dir == "/run/user/1000/chandler", "named by the caller's uid outside of its namespace"
    monkeypatch.setattr(Account, "private", lambda self, path: False)
    account = Account({})
    assert account.state_dir == ""
    with pytest.raises(HostError, match="set XDG_RUNTIME_DIR"):
        account.trusted_state_dir()
    with pytest.raises(Stale):
        inventory.load(account, explain)
    assert compiler.load(account).config["policy.max-gpus"] == 8


@needs_root
def test_every_directory_above_the_state_directory_is_checked(node: Node) -> None:
    stored(node)
    account = node.account()
    above = Path(account.state_dir).parent / "above"
    for uid, mode, message in (
        (1000, 0o755, "belongs to uid 1000"),
        (0, 0o777, "can be written by others"),
        (0, 0o775, "can be written by others"),
    ):
        above.mkdir(0o755)
        (above / "state").mkdir()
        assert account.trusted_state_dir(f"{above}/state") == f"{above}/state"
        os.chown(above, uid, -1)
        above.chmod(mode)
        for directory in (f"{above}/state", f"{above}/state/absent", f"{above}/absent/absent"):
            with pytest.raises(TrustError, match=message):
                account.trusted_state_dir(directory)
        shutil.rmtree(above)
    above.mkdir()
    above.chmod(0o1777)
    (above / "mine").mkdir()
    assert account.trusted_state_dir(f"{above}/mine"), (
        "a sticky directory, as /tmp: nobody else can replace files there"
    )
    with pytest.raises(TrustError, match="is not there yet, and somebody else could make it"):
        account.trusted_state_dir(f"{above}/absent")
    (above / "file").write_text("")
    with pytest.raises(TrustError, match="not a directory"):
        account.trusted_state_dir(f"{above}/file")
    (above / "link").symlink_to("mine")
    assert account.trusted_state_dir(f"{above}/link")
    os.chown(above / "link", 1000, -1, follow_symlinks=False)
    with pytest.raises(TrustError, match="link belongs to uid 1000"):
        account.trusted_state_dir(f"{above}/link")


@needs_root
@pytest.mark.parametrize("directory", ["", "/inventory"])
def test_an_inventory_below_a_directory_of_others_is_not_read(node: Node, directory: str) -> None:
    stored(node)
    os.chown(node.account().state_dir + directory, 1000, -1)
    assert is_stale(node)
    os.chown(node.account().state_dir + directory, 0, -1)
    assert not is_stale(node)
    os.chmod(node.account().state_dir + directory, 0o777)
    assert is_stale(node)


# --- the launcher's line -------------------------------------------------------------------------------------------


@needs_root
def test_the_launch_line_has_what_the_launcher_needs(node: Node) -> None:
    if node.account().rootless:
        pytest.skip("in a user namespace the launcher has no line of its own")
    stored(node)
    etc = node.directory / "etc"
    line = (etc / "launch").read_text()
    version, mark, needles, runtime = line.split()
    assert (version, needles, runtime) == ("2", "chandler.oci", f"runc={node.directory}/bin/runc") and line.endswith(
        "\n"
    )
    (etc / "config.d").mkdir()
    for name in ("10-a.toml", ".hidden.toml", "other"):
        (etc / "config.d" / name).write_text("")
    node.later()
    stored(node)
    (made,) = [path for path in (etc / "launch.d").iterdir() if path.name != "lock"]
    assert made.name not in (mark, "-") and made.name == (etc / "launch").read_text().split()[1]
    copies = {path.relative_to(made) for path in made.rglob("*")}
    assert copies == {Path("config.toml"), Path("config.d"), Path("config.d/10-a.toml")}
    for copy in copies:
        assert (made / copy).stat().st_mtime_ns == (etc / copy).stat().st_mtime_ns
    (node.directory / "bin/runc").chmod(0o777)
    node.later(0)
    node.configure('annotation-prefix = "x.org/"', "annotations = true")
    compiler.refresh(node.account())
    line = (node.directory / "etc/launch").read_text()
    assert line.split()[2:] == ["x.org|cdi.k8s.io", "runc="], (
        "a runtime that others may write is left to Python, which explains it"
    )
    assert line.split()[1] == "-" and os.listdir(etc / "launch.d") == ["lock"], (
        "the configuration is too new to be trusted"
    )
