"""The RPM as a file: the Debian package's files in another format. tests/vm/test_vm_deb.py runs its scriptlets."""

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

RPM = f"{REPOSITORY}/packaging/rpm"


def output(*command: str) -> str:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout


def test_a_second_build_gives_the_same_bytes(rpm: Path, tmp_path: Path) -> None:
    again = build("rpm", tmp_path, TZ="Asia/Tokyo", TMPDIR=str(tmp_path), LC_ALL="C")
    assert again.name == rpm.name == f"chandler-{VERSION}-1.noarch.rpm" and again.read_bytes() == rpm.read_bytes()


def test_rpmlint_finds_neither_errors_nor_warnings(rpm: Path) -> None:
    if not shutil.which("rpmlint"):
        pytest.skip("not installed: rpmlint")
    done = subprocess.run(
        ["rpmlint", "-c", f"{RPM}/rpmlint.toml", f"{RPM}/chandler.spec", str(rpm)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "0 errors, 0 warnings" in done.stdout, done.stdout


def test_it_has_the_same_files_as_the_deb(rpm: Path, deb: Path, tmp_path: Path) -> None:
    def listed(lines: list[str], path: int) -> dict[str, str]:
        """Path to type, mode and, for a link, its target; also directories that no other package has."""
        found = {}
        for words in map(str.split, lines):
            name = words[path].removeprefix(".").rstrip("/")
            found[name.replace("/zsh/vendor-completions/", "/zsh/site-functions/")] = " ".join(
                [words[0], *words[path + 1 :]]
            )
        return found

    one = listed(output("dpkg-deb", "--contents", str(deb)).splitlines(), 5)
    other = listed(output("rpm", "--query", "--package", "--list", "--verbose", str(rpm)).splitlines(), 8)
    left_out = re.compile(r"/usr/share/(doc|licenses)/|.*\.preset$")
    files = {name: what for name, what in one.items() if not what.startswith("d") and not left_out.match(name)}
    assert files == {
        name: what for name, what in other.items() if not what.startswith("d") and not left_out.match(name)
    }
    ours = {name for name, what in other.items() if what.startswith("d") and not left_out.match(name + "/")}
    assert ours == {name for name in one if re.match("/(etc|usr/lib)/chandler", name) and one[name].startswith("d")}
    tree = tmp_path / "tree"
    tree.mkdir()
    output("sh", "-c", f"rpm2cpio {rpm} | (cd {tree} && cpio --extract --make-directories --quiet)")
    output("dpkg-deb", "--extract", str(deb), str(tmp_path / "deb"))
    for name, what in files.items():
        if not what.startswith("l"):
            path = name.replace("/zsh/site-functions/", "/zsh/vendor-completions/")
            assert (tree / name[1:]).read_bytes() == (tmp_path / "deb" / path[1:]).read_bytes() or name.endswith(
                ".gz"
            ), name


def test_configuration_files_and_requirements(rpm: Path) -> None:
    assert output("rpm", "--query", "--package", "--configfiles", str(rpm)) == "/etc/chandler/config.toml\n"
    assert "python3 >= 3.9\n" in output("rpm", "--query", "--package", "--requires", str(rpm))


def test_every_unit_has_a_preset() -> None:
    with open(f"{RPM}/chandler.preset", encoding="utf-8") as file:
        preset = dict(re.findall(r"^(?:enable|disable) (.*?)()$", file.read(), re.M))
    installable = set()
    for unit in os.listdir(f"{REPOSITORY}/systemd"):
        with open(f"{REPOSITORY}/systemd/{unit}", encoding="utf-8") as file:
            if "[Install]" in file.read():
                installable.add(unit)
    assert set(preset) == installable
