"""packaging/release on a copy of the tree: every place gets the new version, or nothing is written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lab import REPOSITORY

from shim.paths import VERSION

TOPS = ("shim", "packaging", "systemd", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
ENTRY = "### Fixed\n\n- Something that users noticed.\n"


def run(tree: Path | str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [f"{tree}/packaging/release", *words],
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def contents(tree: Path) -> dict[str, bytes]:
    return {
        os.path.relpath(os.path.join(where, name), tree): Path(where, name).read_bytes()
        for where, _, names in os.walk(tree)
        for name in names
    }


def changelog(tree: Path, entry: str) -> None:
    """Replace the text below "Unreleased" in the copy's CHANGELOG.md."""
    path = tree / "CHANGELOG.md"
    path.write_text(
        re.sub(
            r"(?<=^## \[Unreleased\]\n).*?(?=^## )",
            f"\n{entry}\n" if entry else "\n",
            path.read_text(),
            flags=re.M | re.S,
        )
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for top in TOPS:
        if os.path.isdir(f"{REPOSITORY}/{top}"):
            shutil.copytree(
                f"{REPOSITORY}/{top}", tmp_path / top, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(f"{REPOSITORY}/{top}", tmp_path)
    changelog(tmp_path, ENTRY)
    return tmp_path


def test_all_places_of_this_tree_have_one_version() -> None:
    done = run(REPOSITORY, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, VERSION + "\n", "")


def test_a_release_changes_every_place(tree: Path) -> None:
    before = contents(tree)
    done = run(tree, "97.0.1", "--date", "2031-02-03")
    assert (done.returncode, done.stderr) == (0, "")
    assert run(tree, "--check").stdout == "97.0.1\n"
    after = contents(tree)
    assert before.keys() == after.keys()
    changed = {path: after[path].decode() for path in before if after[path] != before[path]}
    assert set(
        re.findall(r"\S+/\S+|\S+\.md", done.stdout.partition(" in ")[2].partition("\n")[0].replace(",", ""))
    ) == set(changed)
    for path, text in changed.items():  # everything else is unchanged, also the text about earlier versions
        new = [line for line in text.splitlines() if line not in before[path].decode().splitlines()]
        assert new and all(re.search(r"97\.0\.1|CHANGELOG\.md|03 Feb 2031", line) for line in new), path
    assert f"## [Unreleased]\n\n## [97.0.1] - 2031-02-03\n\n{ENTRY}\n## [{VERSION}]" in changed["CHANGELOG.md"]
    assert (
        changed["packaging/deb/changelog"].startswith("chandler (97.0.1) unstable;")
        and f"chandler ({VERSION}) " in changed["packaging/deb/changelog"]
    )
    assert "  Mon, 03 Feb 2031 12:00:00 +0000\n" in changed["packaging/deb/changelog"]
    assert re.search(
        r"%changelog\n\* Mon Feb 03 2031 .*> - 97\.0\.1-1\n- .+\n\n\* ", changed["packaging/rpm/chandler.spec"]
    )
    assert (tree / "packaging/release").stat().st_mode & 0o111


@pytest.mark.parametrize(
    "version, sentence",
    [
        (VERSION, "is not later than"),
        ("0.0.9", "is not later than"),
        ("97.0", "is not a version"),
        ("v97.0.1", "is not a version"),
        ("97.0.1rc1", "is not a version"),
        ("097.0.1", "is not a version"),
    ],
)
def test_a_version_that_is_refused(tree: Path, version: str, sentence: str) -> None:
    before = contents(tree)
    done = run(tree, version)
    assert done.returncode == 1 and sentence in done.stderr and contents(tree) == before


def test_a_release_without_changes_is_refused(tree: Path) -> None:
    changelog(tree, "")
    before = contents(tree)
    done = run(tree, "97.0.1")
    assert done.returncode == 1 and "has no entries" in done.stderr and contents(tree) == before


@pytest.mark.parametrize(
    "path, old, new, sentence",
    [
        (
            "packaging/rpm/chandler.spec",
            f"\nVersion:        {VERSION}",
            "\nVersion:        9.9.9",
            "packaging/rpm/chandler.spec has 9.9.9",
        ),
        (
            "packaging/kubernetes/nri.yaml",
            f"chandler-node:{VERSION}",
            "chandler-node:latest",
            "packaging/kubernetes/nri.yaml has latest",
        ),
        (
            "packaging/kubernetes/cleanup.yaml",
            f"/chandler-node:{VERSION}",
            "/chandler",
            "packaging/kubernetes/cleanup.yaml: ",
        ),
    ],
)
def test_places_with_different_versions_are_refused(tree: Path, path: str, old: str, new: str, sentence: str) -> None:
    text = (tree / path).read_text()
    assert old in text
    (tree / path).write_text(text.replace(old, new))
    before = contents(tree)
    for words in (["--check"], ["97.0.1"]):
        done = run(tree, *words)
        assert done.returncode == 1 and sentence in done.stderr and contents(tree) == before


def test_an_unknown_place_with_the_version_is_refused(tree: Path) -> None:
    with open(tree / "README.md", "a", encoding="utf-8") as file:
        file.write(f"\ndnf install chandler-{VERSION}-1.noarch.rpm\n")
    number = len((tree / "README.md").read_text().splitlines())
    before = contents(tree)
    done = run(tree, "97.0.1")
    assert (
        done.returncode == 1
        and f"README.md:{number} would still have {VERSION}" in done.stderr
        and contents(tree) == before
    )


def test_a_version_and_check_exclude_each_other() -> None:
    assert run(REPOSITORY).returncode == 2 and run(REPOSITORY, "97.0.1", "--check").returncode == 2
