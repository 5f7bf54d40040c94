"""config.json in its bundle: read safely, replaced as a whole, with the original beside it."""

from __future__ import annotations

import errno
import os
import posix
import stat
from pathlib import Path
from typing import Any

import pytest

from shim.errors import BundleError, ChandlerError
from shim.host import files
from shim.oci.config_file import ConfigJson, may_ask

MARK = b'"chandler.oci/granted":'
ENGINE = b'{"engine": 1}'
RESULT = b'{"annotations":{"chandler.oci/granted":"x"}}'


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes(ENGINE)
    (tmp_path / "config.json").chmod(0o640)
    return tmp_path


def opened(bundle: Path) -> ConfigJson:
    return ConfigJson(str(bundle / "config.json"), MARK)


def write(bundle: Path, data: bytes = RESULT) -> ConfigJson:
    config = opened(bundle)
    config.write(data, files.digest(data))
    return config


def content(bundle: Path) -> bytes:
    return (bundle / "config.json").read_bytes()


def test_write(bundle: Path) -> None:
    inode = (bundle / "config.json").stat().st_ino
    config = write(bundle)
    assert config.fresh and config.engine_bytes == ENGINE
    assert content(bundle) == RESULT
    assert stat.S_IMODE((bundle / "config.json").stat().st_mode) == 0o640
    assert sorted(os.listdir(bundle)) == ["config.json", "config.json.chandler-edited", "config.json.chandler-original"]
    original = bundle / "config.json.chandler-original"
    assert (original.read_bytes(), original.stat().st_ino) == (ENGINE, inode), (
        "the original must be a hard link to the engine's file"
    )
    assert os.readlink(bundle / "config.json.chandler-edited") == files.digest(RESULT)


@pytest.mark.usefixtures("needs_root")
def test_the_owner_is_kept(bundle: Path) -> None:
    os.chown(bundle / "config.json", 1234, 5678)
    write(bundle)
    found = (bundle / "config.json").stat()
    assert (found.st_uid, found.st_gid) == (1234, 5678)


def test_a_second_create_starts_from_the_original(bundle: Path) -> None:
    for n in range(10):
        result = b'{"n":%d}' % n
        config = write(bundle, result)
        assert config.engine_bytes == ENGINE
        assert config.fresh == (n == 0)
        assert content(bundle) == result
    assert (bundle / "config.json.chandler-original").read_bytes() == ENGINE
    assert len(os.listdir(bundle)) == 3


def test_a_new_file_of_the_engine_becomes_the_original(bundle: Path) -> None:
    write(bundle)
    (bundle / "config.json").write_bytes(b'{"engine": 2}')
    config = write(bundle)
    assert config.fresh and config.engine_bytes == b'{"engine": 2}'
    assert (bundle / "config.json.chandler-original").read_bytes() == b'{"engine": 2}'


@pytest.mark.parametrize(
    "changed", [RESULT + b" ", RESULT.replace(b"/", b"\\/"), b'{"x":1,"annotations":{"chandler.oci/granted":""}}']
)
def test_an_edited_config_that_was_changed_since_is_refused(bundle: Path, changed: bytes) -> None:
    write(bundle)
    (bundle / "config.json").write_bytes(changed)
    with pytest.raises(BundleError, match="was changed after Chandler had edited it.*mv .*chandler-original"):
        opened(bundle)
    assert content(bundle) == changed


def test_the_remedy_of_that_refusal_works(bundle: Path) -> None:
    write(bundle)
    (bundle / "config.json").write_bytes(RESULT + b" ")
    os.rename(bundle / "config.json.chandler-original", bundle / "config.json")
    assert write(bundle).engine_bytes == ENGINE


def test_a_lost_original_is_refused(bundle: Path) -> None:
    write(bundle)
    os.unlink(bundle / "config.json.chandler-original")
    with pytest.raises(BundleError, match="chandler-original cannot be read: No such file.*make the bundle anew"):
        opened(bundle)


def test_restore(bundle: Path) -> None:
    write(bundle).restore()
    assert content(bundle) == ENGINE
    assert os.listdir(bundle) == ["config.json"]


def test_restore_of_a_second_create_keeps_what_is_there(bundle: Path) -> None:
    write(bundle)
    write(bundle, b'{"n":2}').restore()
    assert opened(bundle).engine_bytes == ENGINE


# --- what is refused ------------------------------------------------------------------------------------------


def test_a_symbolic_link(bundle: Path) -> None:
    os.rename(bundle / "config.json", bundle / "other")
    (bundle / "config.json").symlink_to("other")
    with pytest.raises(BundleError, match="is a symbolic link"):
        opened(bundle)


def test_no_file(bundle: Path) -> None:
    os.unlink(bundle / "config.json")
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        opened(bundle)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_regular_file(bundle: Path, make: Any) -> None:
    os.unlink(bundle / "config.json")
    make(bundle / "config.json")
    with pytest.raises(ChandlerError, match="is not a regular file"):
        opened(bundle)


def test_too_large(bundle: Path) -> None:
    os.truncate(bundle / "config.json", files.MAX_CONFIG_JSON)
    opened(bundle)
    os.truncate(bundle / "config.json", files.MAX_CONFIG_JSON + 1)
    with pytest.raises(ChandlerError, match="more than the limit of 16777216"):
        opened(bundle)


@pytest.mark.parametrize("names", [["other"], ["other", "config.json.chandler-original"]])
def test_a_file_with_other_hard_links_is_refused(bundle: Path, names: list[str]) -> None:
    for name in names:
        os.link(bundle / "config.json", bundle / name)
    with pytest.raises(BundleError, match=f"has {len(names) + 1} names .hard links."):
        opened(bundle)


def test_our_own_second_name_left_by_a_killed_create(bundle: Path) -> None:
    os.link(bundle / "config.json", bundle / "config.json.chandler-original")
    assert write(bundle).engine_bytes == ENGINE


@pytest.mark.parametrize("stamp", ["", "0" * 64, "nonsense"])
def test_a_stamp_of_another_file_is_ignored(bundle: Path, stamp: str) -> None:
    """A create that was killed before its last step leaves the stamp beside the engine's unchanged file."""
    if stamp:
        (bundle / "config.json.chandler-edited").symlink_to(stamp)
    else:
        (bundle / "config.json.chandler-edited").touch()
    assert write(bundle).fresh
    assert content(bundle) == RESULT


# --- faults ---------------------------------------------------------------------------------------------------

CALLS = ["link", "symlink", "open", "write", "fchmod", "rename"]


def failing(monkeypatch: pytest.MonkeyPatch, call: str, error: OSError) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(posix, call, fail)


@pytest.mark.parametrize("call", CALLS)
def test_a_failing_write_changes_nothing_and_leaves_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    config = opened(bundle)
    failing(monkeypatch, call, OSError(28, "No space left on device"))
    with pytest.raises(BundleError, match="config.json cannot be replaced: No space left on device"):
        config.write(RESULT, files.digest(RESULT))
    monkeypatch.undo()
    assert content(bundle) == ENGINE
    assert os.listdir(bundle) == ["config.json"]
    assert write(bundle).fresh, "the write must work afterwards"


@pytest.mark.parametrize("call", [call for call in CALLS if call != "link"])
def test_a_failing_second_write_leaves_the_first(bundle: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    write(bundle)
    before = sorted(os.listdir(bundle))
    config = opened(bundle)
    if call == "symlink":
        real_symlink = posix.symlink

        def fail_at_new(text: str, path: str) -> None:
            if text.startswith(files.digest(b"{}")):
                raise OSError(28, "No space left on device")
            real_symlink(text, path)

        monkeypatch.setattr(posix, "symlink", fail_at_new)
    else:
        failing(monkeypatch, call, OSError(28, "No space left on device"))
    with pytest.raises(BundleError, match="cannot be replaced"):
        config.write(b"{}", files.digest(b"{}"))
    monkeypatch.undo()
    assert content(bundle) == RESULT
    assert sorted(os.listdir(bundle)) == before
    assert opened(bundle).engine_bytes == ENGINE, "the next create starts from the original again"


@pytest.mark.parametrize("step", ["symlink", "rename", "open"])
@pytest.mark.parametrize("create", [1, 2])
def test_a_create_that_is_killed_can_be_done_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, step: str, create: int
) -> None:
    """It is killed just before a step, without any cleanup; the next create still recognises the files."""
    for n in range(1, create):
        write(bundle, RESULT + b" " * n)
    before = content(bundle)

    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> Any:
        raise Killed

    for n in range(3):
        config = opened(bundle)
        monkeypatch.setattr(posix, step, kill)
        if create > 1:
            monkeypatch.setattr(posix, "unlink", kill)
        with pytest.raises(Killed):
            config.write(RESULT + b"\n" * n, files.digest(RESULT + b"\n" * n))
        monkeypatch.undo()
        assert content(bundle) == before
    assert write(bundle).engine_bytes == ENGINE
    assert content(bundle) == RESULT


def test_a_copy_where_links_cannot_be(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "link", PermissionError(1, "Operation not permitted"))
    write(bundle)
    original = bundle / "config.json.chandler-original"
    assert (original.read_bytes(), stat.S_IMODE(original.stat().st_mode)) == (ENGINE, 0o640)
    assert opened(bundle).engine_bytes == ENGINE


def test_a_directory_where_the_original_should_be(bundle: Path) -> None:
    (bundle / "config.json.chandler-original").mkdir()
    with pytest.raises(BundleError, match="cannot be replaced"):
        write(bundle)
    assert content(bundle) == ENGINE


# --- may_ask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", False),
        (b"chandler.oc", False),
        (b"chandler.oci", True),
        (b"x" * 5000 + b"chandler.oci", True),
        (b'"chandler.oci\\/service"', True),
        (b"cdi.k8s.io", True),
        (b"Chandler.oci", False),
        (b"x" * ((1 << 20) - 4) + b"chandler.oci/x", True),
        (b"x" * ((1 << 20) - 12) + b"chandler.oci", True),
        (b"x" * (3 << 20) + b"chandler.oci", True),
        (b"x" * (3 << 20), False),
    ],
)
def test_may_ask(tmp_path: Path, data: bytes, found: bool) -> None:
    (tmp_path / "c").write_bytes(data)
    assert may_ask(str(tmp_path / "c"), [b"chandler.oci", b"cdi.k8s.io"]) is found


def test_what_only_the_runtime_may_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in (str(tmp_path / "fifo"), "/dev/null"):
        with pytest.raises(BundleError, match="not a regular file"):
            may_ask(name, [b"chandler.oci"])
    (tmp_path / "file").write_bytes(b"{}")
    for number in (errno.EMFILE, errno.EACCES, errno.EIO, errno.ENOMEM):
        with monkeypatch.context() as patch:

            def fails(*_: object, number: int = number) -> int:
                raise OSError(number, os.strerror(number))

            patch.setattr("posix.open", fails)
            with pytest.raises(BundleError, match="cannot be read, so Chandler cannot tell whether"):
                may_ask(str(tmp_path / "file"), [b"chandler.oci"])
        with monkeypatch.context() as patch:
            patch.setattr("posix.read", fails)
            with pytest.raises(BundleError, match="cannot be read, so Chandler cannot tell whether"):
                may_ask(str(tmp_path / "file"), [b"chandler.oci"])


def test_a_file_that_is_not_regular_contains_no_request(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"chandler.oci")
    (tmp_path / "link").symlink_to("file")
    for name in ("dangling", ".", "absent", "file/x", "a\0b", "x" * 300):
        assert not may_ask(str(tmp_path / name), [b"chandler.oci"])
    assert may_ask(str(tmp_path / "link"), [b"chandler.oci"])
