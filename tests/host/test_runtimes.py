"""The low-level runtimes: where they are, and which of them owns a container."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lab import partial

from shim import paths
from shim.errors import HostError, TrustError
from shim.host import runtimes

ME = {os.geteuid(): "the caller", 0: "root"}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("one", "two"):
        (tmp_path / name).mkdir(mode=0o755)
    monkeypatch.setattr(paths, "BINARY_DIRS", (str(tmp_path / "one"), str(tmp_path / "two")))
    return tmp_path


def binary(path: Path, mode: int = 0o755) -> str:
    path.touch()
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/usr/bin/runc", "runc"),
        ("/usr/bin/crun", "crun"),
        ("youki", "youki"),
        ("/opt/crun-1.2/runc", "runc"),
        ("/x/crun-vm", "crun"),
        ("/x/kata-runtime", "runc"),
        ("", "runc"),
    ],
)
def test_kind_of(path: str, kind: str) -> None:
    assert runtimes.kind_of(path) == kind


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("chandler-runc", "runc"),
        ("/usr/bin/chandler-crun", "crun"),
        ("./chandler-youki", "youki"),
        ("chandler-runtime", ""),
        ("runc", ""),
        ("chandler-", ""),
        ("xchandler-runc", ""),
        ("chandler-runc2", ""),
        ("/chandler-crun/x", ""),
    ],
)
def test_link_names(program: str, kind: str) -> None:
    assert runtimes.fixed_kind(program) == kind


def test_names_are_found_in_order_of_the_fixed_places(places: Path) -> None:
    second = binary(places / "two/crun")
    assert runtimes.find("crun", ME) == ("crun", second)
    first = binary(places / "one/crun")
    assert runtimes.find("crun", ME) == ("crun", first)


def test_files_that_cannot_be_executed_are_skipped(places: Path) -> None:
    binary(places / "one/crun", 0o644)
    second = binary(places / "two/crun")
    assert runtimes.find("crun", ME) == ("crun", second)
    with pytest.raises(HostError, match="the runtime youki is not installed"):
        runtimes.find("youki", ME)


def test_absolute_paths(places: Path) -> None:
    path = binary(places / "special-youki")
    assert runtimes.find(path, ME) == ("youki", path)
    with pytest.raises(HostError):
        runtimes.find(path + "x", ME)


def test_path_is_never_searched(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary(places / "crun")
    monkeypatch.setenv("PATH", str(places))
    monkeypatch.chdir(places)
    with pytest.raises(HostError):
        runtimes.find("crun", ME)


@pytest.mark.parametrize(("part", "mode"), [("one/crun", 0o775), ("one/crun", 0o757), ("one", 0o777)])
def test_a_binary_that_others_may_write_is_refused(places: Path, part: str, mode: int) -> None:
    binary(places / "one/crun")
    binary(places / "two/crun")
    (places / part).chmod(mode)
    with pytest.raises(TrustError, match="the runtime .*one/crun is not used: .* can be written by others"):
        runtimes.find("crun", ME)
    with pytest.raises(TrustError):
        runtimes.for_create(partial({"runtimes": ["crun", "runc"]}), "chandler-runtime", ME)


@pytest.mark.usefixtures("needs_root")
def test_a_binary_of_another_user_is_refused(places: Path) -> None:
    binary(places / "one/crun")
    os.chown(places / "one/crun", 1234, 0)
    with pytest.raises(TrustError, match="belongs to uid 1234"):
        runtimes.find("crun", ME)


@pytest.mark.parametrize(
    ("names", "program", "found"),
    [
        (["runc", "crun"], "chandler-runtime", "one/runc"),
        (["crun", "runc"], "chandler-runtime", "two/crun"),
        (["youki", "crun"], "chandler-runtime", "two/crun"),
        (["runc"], "chandler-crun", "two/crun"),
        (["runc", "crun"], "/usr/bin/chandler-runc", "one/runc"),
    ],
)
def test_for_create(places: Path, names: list[str], program: str, found: str) -> None:
    binary(places / "one/runc")
    binary(places / "two/crun")
    assert runtimes.for_create(partial({"runtimes": names}), program, ME)[1] == str(places / found)


def test_a_link_takes_the_configured_path_of_its_kind(places: Path) -> None:
    binary(places / "one/crun")
    mine = binary(places / "my-crun")
    assert runtimes.for_create(partial({"runtimes": ["runc", mine]}), "chandler-crun", ME) == ("crun", mine)


def test_no_runtime_at_all(places: Path) -> None:
    with pytest.raises(
        HostError, match="no runtime is installed: looked for runc, /x/crun; install runc, crun or youki"
    ):
        runtimes.for_create(partial({"runtimes": ["runc", "/x/crun"]}), "chandler-runtime", ME)
    with pytest.raises(HostError, match="looked for crun"):
        runtimes.for_create(partial({"runtimes": ["runc"]}), "chandler-crun", ME)
    with pytest.raises(HostError, match="no runtime is installed"):
        runtimes.for_verb(["runc"], "", ME)


@pytest.mark.parametrize(
    ("names", "kind", "found"),
    [
        (["runc", "crun"], "", "one/runc"),
        (["runc"], "crun", "two/crun"),
        (["crun", "runc"], "runc", "one/runc"),
        (["crun"], "youki", "two/crun"),
    ],
)
def test_for_verb(places: Path, names: list[str], kind: str, found: str) -> None:
    binary(places / "one/runc")
    binary(places / "two/crun")
    assert runtimes.for_verb(names, kind, ME) == str(places / found)


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["state.json"], "runc"),
        (["status"], "crun"),
        (["youki_config.json", "state.json"], "youki"),
        (["status", "state.json"], "crun"),
        ([], ""),
        (["other"], ""),
    ],
)
def test_state_files(tmp_path: Path, files: list[str], kind: str) -> None:
    (tmp_path / "c").mkdir()
    for name in files:
        (tmp_path / "c" / name).touch()
    assert runtimes.kind_of_container(str(tmp_path), ["c"], False, {}) == kind
    assert runtimes.kind_of_container(str(tmp_path), ["absent", "a\0b"], False, {}) == ""
    assert runtimes.kind_of_container(str(tmp_path), ["absent", "c"], False, {}) == kind


@pytest.mark.parametrize(
    ("rootless", "environment", "root"),
    [
        (False, {}, "/run/crun"),
        (False, {b"XDG_RUNTIME_DIR": b"/run/user/5"}, "/run/user/5/crun"),
        (True, {b"XDG_RUNTIME_DIR": b"/run/user/5"}, "/run/user/5/crun"),
        (True, {}, "/run/crun"),
        (True, {b"XDG_RUNTIME_DIR": b""}, "/run/crun"),
    ],
)
def test_default_roots(rootless: bool, environment: dict[bytes, bytes], root: str) -> None:
    assert runtimes.default_root("crun", rootless, environment) == root
    if not rootless:
        assert runtimes.default_root("runc", rootless, environment) == "/run/runc", (
            "only crun reads the environment as root"
        )


def test_the_runtime_that_has_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def root(kind: str, *_: Any) -> str:
        return str(tmp_path / kind)

    monkeypatch.setattr(runtimes, "default_root", root)
    (tmp_path / "crun/c").mkdir(parents=True)
    (tmp_path / "crun/c/status").touch()
    (tmp_path / "runc/other").mkdir(parents=True)
    (tmp_path / "runc/strange").mkdir()
    (tmp_path / "runc/strange/status").touch()
    assert runtimes.kind_of_container("", ["c"], False, {}) == "crun"
    assert runtimes.kind_of_container("", ["absent"], False, {}) == ""
    assert runtimes.kind_of_container("", ["strange"], False, {}) == "", "crun's file in runc's directory"
    assert runtimes.kind_of_container(str(tmp_path / "crun"), ["c"], False, {}) == "crun"
    assert runtimes.kind_of_container(str(tmp_path / "runc"), ["other"], False, {}) == ""
