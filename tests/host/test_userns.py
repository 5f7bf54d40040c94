"""Whose files are trusted in a user namespace that maps the overflow uid, as rootless podman's does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import REPOSITORY

from shim.host import userns

# Enters a user namespace, waits for its id map, then prints for each path: uid, whether it is trusted.
CHILD = """
import ctypes, os, sys
from shim.host import trust, userns  # while they can be read: a checkout may be in a directory that is root's alone
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):
    sys.exit(os.strerror(ctypes.get_errno()))
print("ready", flush=True)
sys.stdin.readline()
os.setresgid(0, 0, 0)
os.setresuid(0, 0, 0)
if sys.argv[1] == "without":  # CAP_FOWNER
    class Header(ctypes.Structure): _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]
    data = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(ctypes.byref(Header(0x20080522, 0)), data) == 0
owners = userns.trusted_owners(userns.user_namespace())
for path in sys.argv[2:]:
    found = os.lstat(path)
    try:
        trust.check_trust(path, found, owners)
        print(found.st_uid, True)
    except Exception:
        print(found.st_uid, False)
"""
FIRST = 300000
OVERFLOW = 65534


@pytest.fixture
def world(lab: str, workdir: str) -> dict[str, str]:
    """One path of each kind, by its description. `lab`: only root can give files away and write any id map."""
    made = {
        name: os.path.join(workdir, name)
        for name in ("root's", "lent", "other's", "fifo", "directory", "closed", "link", "tmp/link")
    }
    for name in ("root's", "lent", "other's"):
        Path(made[name]).touch()
    os.chown(made["lent"], FIRST + OVERFLOW - 1, FIRST)
    os.chown(made["other's"], FIRST - 5, FIRST)
    os.mkfifo(made["fifo"])
    os.mkdir(made["directory"])
    os.mkdir(made["closed"], 0o711)
    os.chown(made["closed"], FIRST + OVERFLOW - 1, 5)
    os.mkdir(os.path.join(workdir, "tmp"))
    os.chmod(os.path.join(workdir, "tmp"), 0o1777)
    for name in ("link", "tmp/link"):
        os.symlink("/etc", made[name])
    return made


def believed(paths: dict[str, str], capability: str = "with") -> dict[str, bool]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, capability, *paths.values()],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin and child.stdout
    assert child.stdout.readline() == "ready\n"
    for table in ("uid_map", "gid_map"):
        Path(f"/proc/{child.pid}/{table}").write_text(f"0 {FIRST - 1} 1\n1 {FIRST} 65536\n")
    out, _ = child.communicate("go\n", timeout=60)
    said = [line.split() for line in out.splitlines()]
    assert {number for number, _ in said} == {str(OVERFLOW)}, "every path must show the overflow uid"
    return {name: word == "True" for name, (_, word) in zip(paths, said)}


def test_files_that_all_show_the_same_number(world: dict[str, str]) -> None:
    # A host user without an id in this namespace is trusted, as in every user namespace: such users are the host's
    # concern. Where the owner cannot be determined, the path is not trusted.
    assert believed(world) == {
        "root's": True,
        "lent": False,
        "other's": True,
        "fifo": False,
        "directory": True,
        "closed": False,
        "link": True,
        "tmp/link": False,
    }


def test_without_the_capability_no_owner_is_trusted(world: dict[str, str]) -> None:
    assert not any(believed({name: path for name, path in world.items() if "link" not in name}, "without").values())


def test_in_the_initial_namespace_a_number_is_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns, "user_namespace", lambda: userns.INITIAL_NAMESPACE)
    file = tmp_path / "file"
    file.touch()
    assert not userns.has_outside_owner(str(file), os.lstat(file))


@given(st.integers(0, 2**32 - 2).filter(lambda uid: uid != 65534))
def test_only_the_overflow_uid_is_looked_into(uid: int) -> None:
    found = os.stat_result((0o100644, 1, 1, 1, uid, 0, 0, 0, 0, 0))
    assert not userns.has_outside_owner("/does/not/exist", found)
