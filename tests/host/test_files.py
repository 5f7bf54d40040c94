"""Files: bounded reads that never block, complete replacement, and who may have written a file."""

from __future__ import annotations

import os
import posix
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from shim.errors import ChandlerError, HostError, TrustError
from shim.host import files, trust
from shim.node import cdi_files
from shim.state.lock import Lock

ME = {os.geteuid(): "the caller", 0: "root"}
needs_root = pytest.mark.usefixtures("needs_root")


# --- reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 1 << 20, (1 << 21) + 7])
def test_read_gives_all_bytes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * size)
    data, found = files.read(str(path), size)
    assert len(data) == size == found.st_size


def test_a_file_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # never allocated
    with pytest.raises(HostError, match="more than the limit of 100"):
        files.read(str(path), 100)


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """fstat said 4 bytes; /proc says 0 for everything."""
    path = tmp_path / "f"
    path.write_bytes(b"x" * 5000)
    descriptor = os.open(path, os.O_RDONLY)
    assert files.read_all(descriptor, 4, 10_000, "f") == b"x" * 5000
    os.lseek(descriptor, 0, 0)
    with pytest.raises(HostError, match="f has more than the limit of 1000 bytes"):
        files.read_all(descriptor, 4, 1000, "f")
    os.close(descriptor)
    assert files.read("/proc/self/status", 1 << 20)[0]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    descriptor = os.open(path, os.O_RDONLY)
    assert files.read_all(descriptor, 100, 1000, "f") == b"abc"
    os.close(descriptor)


def test_special_files_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("fifo", "directory"):
            with pytest.raises(HostError, match="is not a regular file"):
                files.read(str(tmp_path / name), 100)
        with pytest.raises(OSError):
            files.read(str(tmp_path / "socket"), 100)
    with pytest.raises(HostError, match="is not a regular file"):
        files.read("/dev/null", 100)


def test_links_are_followed_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("f")
    with pytest.raises(OSError):
        files.read(str(tmp_path / "link"), 100)
    assert files.read(str(tmp_path / "link"), 100, follow=True)[0] == b"abc"


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    before = os.listdir("/proc/self/fd")
    for limit in (100, 1):
        try:
            files.read(str(tmp_path / "f"), limit)
        except HostError:
            pass
    files.replace(str(tmp_path / "g"), b"x")
    assert os.listdir("/proc/self/fd") == before


# --- replacing ------------------------------------------------------------------------------------------------


def test_replace(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    inode = path.stat().st_ino
    files.replace(str(path), b"new", 0o640)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_ino != inode
    assert os.listdir(tmp_path) == ["f"]


@needs_root
def test_replace_with_another_owner(tmp_path: Path) -> None:
    files.replace(str(tmp_path / "f"), b"new", 0o4755, (1234, 5678))
    found = (tmp_path / "f").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 5678, 0o4755), (
        "chown takes the s bit away, so it comes first"
    )


def test_replace_over_what_a_killed_process_left(tmp_path: Path) -> None:
    left = tmp_path / f"f.chandler-{os.getpid()}"
    left.write_bytes(b"half")
    files.replace(str(tmp_path / "f"), b"new")
    assert os.listdir(tmp_path) == ["f"]


def test_replace_does_not_write_through_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"victim")
    (tmp_path / f"f.chandler-{os.getpid()}").symlink_to("victim")
    files.replace(str(tmp_path / "f"), b"new")
    assert (tmp_path / "victim").read_bytes() == b"victim"
    assert sorted(os.listdir(tmp_path)) == ["f", "victim"]


@pytest.mark.parametrize("call", ["write", "fchown", "fchmod", "close", "rename", "open"])
def test_a_failing_replace_leaves_nothing_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    real = getattr(posix, call)

    def fail(*arguments: Any, **more: Any) -> Any:
        if call == "close":
            real(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(posix, call, fail)
    with pytest.raises(OSError):
        files.replace(str(path), b"new", owner=(os.geteuid() + 1, os.getegid()))
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_write_all_writes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def slowly(_: int, data: bytes) -> int:
        written.append(data[:3])
        return len(written[-1])

    monkeypatch.setattr(posix, "write", slowly)
    files.write_all(1, b"0123456789")
    assert b"".join(written) == b"0123456789"


def test_make_directory(tmp_path: Path) -> None:
    made = str(tmp_path / "a/b/c")
    os_umask = os.umask(0o022)
    try:
        files.make_directory(made, 0o700)
        files.make_directory(made, 0o755)
    finally:
        os.umask(os_umask)
    assert [stat.S_IMODE(os.stat(tmp_path / part).st_mode) for part in ("a", "a/b", "a/b/c")] == [0o755, 0o755, 0o700]
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        files.make_directory(str(tmp_path / "file/x"))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        files.make_directory(str(tmp_path / "link/x"))


# --- trust ----------------------------------------------------------------------------------------------------


def test_every_step_of_a_path_is_listed(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "real/deep/f").touch()
    (tmp_path / "link").symlink_to("real/./deep")
    (tmp_path / "absolute").symlink_to(tmp_path / "link")
    passed = [
        name[len(str(tmp_path)) :]
        for name, _ in trust.path_steps(str(tmp_path / "absolute/../deep//f"))
        if name.startswith(f"{tmp_path}/")
    ]
    # `..` after a link means the parent of what the link leads to
    assert passed == ["/absolute", "/link", "/real", "/real/deep", "/real/deep", "/real/deep/f"]


def test_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="too many levels"):
        trust.path_steps(str(tmp_path / "a"))


def test_a_path_that_ends_early(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trust.path_steps(str(tmp_path / "absent/f"))


def trusted(path: Path) -> None:
    trust.check_path(str(path), ME)
    trust.read_trusted(str(path), 100, ME)


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """A file three directories down, all the caller's own."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/f").write_bytes(b"abc")
    for part in ("a", "a/b"):
        (tmp_path / part).chmod(0o755)
    (tmp_path / "a/b/f").chmod(0o644)
    return tmp_path


def test_own_files_are_trusted(owned: Path) -> None:
    trusted(owned / "a/b/f")
    (owned / "link").symlink_to("a/b/f")
    trusted(owned / "link")
    assert trust.read_trusted(str(owned / "link"), 100, ME) == b"abc"


@pytest.mark.parametrize("part", ["a", "a/b", "a/b/f"])
@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o720, 0o702])
def test_files_that_others_can_write_are_not_trusted(owned: Path, part: str, mode: int) -> None:
    (owned / part).chmod(mode)
    with pytest.raises(TrustError, match=f"{owned / part} can be written by others .mode 0{mode:o}.; `chmod go-w"):
        trusted(owned / "a/b/f")


@needs_root
@pytest.mark.parametrize("part", ["a", "a/b", "a/b/f"])
def test_files_of_others_are_not_trusted(owned: Path, part: str) -> None:
    os.chown(owned / part, 1234, 0)
    with pytest.raises(TrustError, match=f"{owned / part} belongs to uid 1234, not to"):
        trusted(owned / "a/b/f")
    trust.check_path(str(owned / "a/b/f"), {**ME, 1234: "the caller"})


@needs_root
def test_links_of_others_are_not_trusted(owned: Path) -> None:
    (owned / "link").symlink_to("a/b/f")
    os.chown(owned / "link", 1234, 0, follow_symlinks=False)
    with pytest.raises(TrustError, match="link belongs to uid 1234"):
        trusted(owned / "link")


def test_the_target_of_a_link_in_a_path_is_checked(owned: Path) -> None:
    (owned / "link").symlink_to("a/b")
    (owned / "a").chmod(0o777)
    with pytest.raises(TrustError, match=f"{owned}/a can be written"):
        trusted(owned / "link/f")


def test_sticky_directories_are_trusted_only_above_the_file(owned: Path) -> None:
    (owned / "a").chmod(0o1777)
    trusted(owned / "a/b/f")
    with pytest.raises(TrustError):
        trust.check_path(str(owned / "a"), ME)
    (owned / "a/b/f").chmod(0o1666)
    with pytest.raises(TrustError):
        trusted(owned / "a/b/f")


# --- CDI directories ------------------------------------------------------------------------------------------


def test_spec_dirs(owned: Path) -> None:
    for name in ("b.yaml", "a.json", "c.yml", "d.JSON", "e.toml", ".json", "x.yaml~"):
        (owned / "a" / name).write_bytes(name.encode())
        (owned / "a" / name).chmod(0o644)
    (owned / "a/b.yaml").chmod(0o666)
    (owned / "a/dir.json").mkdir()
    os.mkfifo(owned / "a/fifo.json", 0o644)
    (owned / "a/gone.json").symlink_to("nowhere")
    (directory, error, entries), absent = cdi_files.read_spec_dirs([str(owned / "a"), str(owned / "absent")], ME)
    assert (directory, error) == (str(owned / "a"), None)
    assert absent == (str(owned / "absent"), None, [])
    found = dict(entries)
    assert list(found) == [".json", "a.json", "b.yaml", "dir.json", "fifo.json", "gone.json"]
    assert found["a.json"] == b"a.json"
    for name, words in (
        ("b.yaml", "can be written by others"),
        ("dir.json", "not a regular file"),
        ("fifo.json", "not a regular file"),
        ("gone.json", "cannot be read: No such file"),
    ):
        problem = found[name]
        assert isinstance(problem, ChandlerError) and words in str(problem) and name in str(problem)


def test_a_spec_dir_that_others_may_write(owned: Path) -> None:
    (owned / "a").chmod(0o777)
    ((_, error, entries),) = cdi_files.read_spec_dirs([str(owned / "a")], ME)
    assert isinstance(error, TrustError) and entries == []


def test_a_spec_dir_that_is_a_file(owned: Path) -> None:
    ((_, error, entries),) = cdi_files.read_spec_dirs([str(owned / "a/b/f")], ME)
    assert error is not None and "a/b/f cannot be read" in str(error) and entries == []


def test_too_many_spec_files(owned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdi_files, "MAX_CDI_FILES", 3)
    for n in range(2):
        (owned / f"a/{n}.json").write_bytes(b"{}")
        (owned / f"a/b/{n}.json").write_bytes(b"{}")
    one, two = cdi_files.read_spec_dirs([str(owned / "a"), str(owned / "a/b")], ME)
    assert one[1] is None and len(one[2]) == 2
    assert two[1] is not None and "more than 3 CDI files" in str(two[1]) and two[2] == []


# --- the rest -------------------------------------------------------------------------------------------------


def test_a_lock_is_exclusive(tmp_path: Path) -> None:
    import fcntl

    path = str(tmp_path / "lock")
    other = os.open(path, os.O_RDWR | os.O_CREAT)
    with Lock(path):
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_digest() -> None:
    import hashlib

    assert files.digest(b"abc") == hashlib.blake2b(b"abc", digest_size=32).hexdigest()
