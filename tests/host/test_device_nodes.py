"""What the host knows about devices, and how edits are completed with it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from shim.edits import DEVICE, ENV, MOUNT, Edits
from shim.errors import HostError
from shim.host import device_nodes, userns
from shim.node import cdi_check


def node(**fields: Any) -> Edits:
    return Edits([(DEVICE, "/dev/x", {"path": "/dev/x", **fields}, "file.yaml a/b=c"), (ENV, "A", "1", "x")])


def fake(path: str) -> tuple[str, int, int, int]:
    return {"/dev/x": ("c", 10, 5, 0o640), "/dev/host": ("b", 8, 1, 0o660), "/dev/fifo": ("p", 0, 0, 0o600)}[path]


def missing(path: str) -> tuple[str, int, int, int]:
    raise HostError(f"{path} is not on this host")


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({}, {"type": "c", "major": 10, "minor": 5, "fileMode": 0o640}),
        ({"fileMode": 0}, {"type": "c", "major": 10, "minor": 5}),
        ({"hostPath": "/dev/host"}, {"type": "b", "major": 8, "minor": 1, "fileMode": 0o660}),
        ({"type": "c"}, {"major": 10, "minor": 5, "fileMode": 0o640}),
        ({"type": "c", "major": 0, "minor": 9}, {"major": 10, "minor": 5, "fileMode": 0o640}),
        ({"type": "b", "major": 7, "minor": 3}, {"fileMode": 0o640}),  # minimally specified: no type check
        ({"type": "c", "major": 7, "minor": 3, "fileMode": 1}, {}),
        ({"major": 7}, {"type": "c", "fileMode": 0o640}),
        ({"hostPath": "/dev/fifo"}, {"type": "p", "fileMode": 0o600}),
        ({"hostPath": "/dev/fifo", "type": "p"}, {"fileMode": 0o600}),
    ],
)
def test_completion(fields: dict[str, Any], added: dict[str, Any]) -> None:
    edits = node(**fields)
    found = device_nodes.complete(edits, fake).items[0][2]
    assert found == {"path": "/dev/x", **fields, **added}
    assert edits == node(**fields), "the input is not changed"


def test_edits_of_other_kinds_are_unchanged() -> None:
    assert device_nodes.complete(node(), fake).items[1] == (ENV, "A", "1", "x")


@pytest.mark.parametrize("fields", [{"type": "c", "major": 1, "minor": 2}, {"type": "p"}])
def test_complete_devices_are_not_looked_up(fields: dict[str, Any]) -> None:
    assert device_nodes.complete(node(**fields), missing) == node(**fields)


@pytest.mark.parametrize("fields", [{}, {"type": "c"}, {"major": 5}])
def test_incomplete_devices_are_looked_up(fields: dict[str, Any]) -> None:
    with pytest.raises(HostError, match="^file.yaml a/b=c: /dev/x is not on this host"):
        device_nodes.complete(node(**fields), missing)


def test_another_type_than_declared() -> None:
    with pytest.raises(HostError, match="device of type 'c', not 'b'"):
        device_nodes.complete(node(type="b"), fake)


def test_nodes_of_the_host() -> None:
    found = os.stat("/dev/null")
    assert device_nodes.lstat_device("/dev/null") == ("c", 1, 3, stat.S_IMODE(found.st_mode))
    assert device_nodes.read_node("/dev/null") == ("c", 1, 3, stat.S_IMODE(found.st_mode), found.st_gid)


@pytest.mark.parametrize("major_minor", [(10, 300), (511, 65536), (1, 255)])
def test_large_numbers(needs_devices: None, tmp_path: Path, major_minor: tuple[int, int]) -> None:
    path = str(tmp_path / "node")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(*major_minor))
    assert device_nodes.lstat_device(path)[1:3] == major_minor


def test_a_path_that_is_no_device_node_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    assert device_nodes.lstat_device(str(tmp_path / "fifo"))[0] == "p"
    for name in ("file", "link", "", "absent", "a\0b"):
        with pytest.raises(HostError, match="is not|cannot be looked at"):
            device_nodes.lstat_device(str(tmp_path / name) if name else str(tmp_path))


def test_mount_sources(tmp_path: Path) -> None:
    def edits(source: str) -> Edits:
        return Edits([(MOUNT, "/x", {"destination": "/x", "source": source}, "file.yaml")])

    for fine in ("", "tmpfs", str(tmp_path)):
        cdi_check.check_paths(edits(fine))
    (tmp_path / "dangling").symlink_to("nowhere")
    for gone in (str(tmp_path / "gone"), str(tmp_path / "dangling"), "/a\0b"):
        with pytest.raises(HostError, match="^file.yaml: the host path .* .for /x. does not exist; the file is older"):
            cdi_check.check_paths(edits(gone))


@pytest.mark.parametrize(
    ("euid", "uid_map", "overflow", "owners"),
    [
        (0, "0 0 4294967295", 65534, {0}),
        (1000, "0 0 4294967295", 65534, {0, 1000}),
        (0, "0 1000 1", 65534, {0, 65534}),
        (0, "0 1000 1 1 100000 65536", 65534, {0}),
        (0, "0 1000 1 1 100000 65533", 65534, {0, 65534}),
        (5, "0 1000 1 5 9 1", 65534, {0, 5, 65534}),
        (0, "0 1000 1", 99, {0, 99}),
    ],
)
def test_trusted_owners(
    monkeypatch: pytest.MonkeyPatch, euid: int, uid_map: str, overflow: int, owners: set[int]
) -> None:
    monkeypatch.setattr("posix.geteuid", lambda: euid)
    monkeypatch.setattr(userns, "overflow_uid", lambda: overflow)
    assert set(userns.trusted_owners(uid_map)) == owners


def test_our_own_namespace() -> None:
    assert userns.user_namespace().split() == Path("/proc/self/uid_map").read_text().split()
    assert userns.overflow_uid() == int(Path("/proc/sys/kernel/overflowuid").read_text())
