"""The Debian package as a file. tests/vm/test_vm_deb.py installs it on a machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lab import REPOSITORY
from packages.conftest import build

from shim.paths import VERSION


def output(*command: str) -> str:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout


def tree(directory: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(where, name), directory)
        for where, _, names in os.walk(directory)
        for name in names
    }


def test_a_second_build_gives_the_same_bytes(deb: Path, tmp_path: Path) -> None:
    again = build("deb", tmp_path, TZ="Asia/Tokyo", TMPDIR=str(tmp_path), LC_ALL="C")
    assert again.name == deb.name and again.read_bytes() == deb.read_bytes()


def test_lintian_finds_neither_errors_nor_warnings(deb: Path) -> None:
    if not shutil.which("lintian"):
        pytest.skip("not installed: lintian")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", str(deb)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_it_has_the_files_of_make_install(deb: Path, tmp_path: Path) -> None:
    """Except byte code, which is compiled on installation."""
    package, installed = tmp_path / "package", tmp_path / "installed"
    output("dpkg-deb", "--extract", str(deb), str(package))
    subprocess.run(
        [f"{REPOSITORY}/packaging/install"],
        check=True,
        stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "DESTDIR": str(installed), "ZSHDIR": "/usr/share/zsh/vendor-completions"},
    )
    wanted = {path for path in tree(installed) if not path.endswith((".pyc", ".image"))}
    assert {path.removesuffix(".gz") for path in tree(package) if "share/doc" not in path} == wanted
    assert not [path for path in tree(package) if "dist-packages" in path or "site-packages" in path]
    for path in wanted:
        if "/man/" not in path:
            one, other = package / path, installed / path
            assert one.read_bytes() == other.read_bytes() and one.stat().st_mode == other.stat().st_mode, path


def test_the_changelog_begins_with_the_version_of_the_code() -> None:
    with open(f"{REPOSITORY}/packaging/deb/changelog", encoding="utf-8") as file:
        assert re.match(rf"chandler \({re.escape(VERSION)}\) ", file.readline())


def test_dependencies(deb: Path) -> None:
    depends = output("dpkg-deb", "--field", str(deb), "Depends")
    assert "python3 (>= 3.9)" in depends and "python3-yaml" in depends
    assert output("dpkg-deb", "--field", str(deb), "Architecture") == "all\n"
    known = set(output("apt-cache", "pkgnames").split())
    if "python3-protobuf" not in known:
        pytest.skip("this host has no lists of packages")
    for field in ("Depends", "Recommends"):
        names = {
            re.split(r"[ (]", word.strip())[0]
            for word in re.split("[,|]", output("dpkg-deb", "--field", str(deb), field))
        }
        assert names - known <= {"youki"}


def test_units_that_are_enabled(deb: Path, tmp_path: Path) -> None:
    output("dpkg-deb", "--control", str(deb), str(tmp_path / "control"))
    script = (tmp_path / "control/postinst").read_text()
    assert set(re.findall(r"was-enabled '(.*?)'; then\n\t*# Enables", script)) == {
        "chandler-refresh.path",
        "chandler-refresh.service",
        "chandler-sweep.timer",
    }
    assert "chandler-mps" not in "".join(
        path.read_text() for path in (tmp_path / "control").iterdir() if path.name != "md5sums"
    )
