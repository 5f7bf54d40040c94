"""Whether a process may still use a container's devices, according to the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab import cgroups, partial

from shim.host import kernel, runtimes
from shim.state import liveness, stale

ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("group", "container", "path", "inside"),
    [
        ("/a/b", "c", "/a/b", True),
        ("/a/b", "c", "/a/b/below", True),
        ("/a/b", "c", "/x/../a/b", True),
        ("a/b/", "c", "/user.slice/a/b", True),
        ("/a/b", "c", "/a/bc", False),
        ("/a/b", "c", "/b", False),
        ("/a/b", "c", "/a/x/b", False),
        ("/a/b", "c", "/a/b.scope", True),
        (f"system.slice:docker:{ID}", ID, f"/system.slice/docker-{ID}.scope", True),
        (f"system.slice:docker:{ID}", ID, f"/system.slice:docker:{ID}", True),
        (f"a.slice:libpod:{ID}", ID, f"/a.slice/libpod-{ID}.scope/container", True),
        (f"a.slice:libpod:{ID}", ID, f"/a.slice/libpod-conmon-{ID}.scope", False),
        ("a.slice::own", "c", "/a.slice/own.scope", True),
        # As runtimes name them: youki without a path; runc and crun with an empty prefix; crun with one colon or three.
        ("", ID, f"/:youki:{ID}", True),
        ("system.slice::n1", "c", "/system.slice/-n1.scope", True),
        ("::n1", "c", "/system.slice/-n1.scope/container", True),
        (":lab:n1", "c", "/system.slice/lab-n1.scope", True),
        ("system.slice:n1", "c", "/system.slice/n1.scope/container", True),
        ("lab:n1", "c", "/system.slice/lab-n1.scope", True),
        ("system.slice:lab:a:n1", "c", "/system.slice/lab-a:n1.scope/container", True),
        ("a.slice:b.slice:lab:n1", "c", "/a.slice/b.slice-lab:n1.scope/container", True),
        ("a.slice:lab:n1", "c", "/a.slice/lab-n10.scope", False),
        ("a.slice:x:b.slice", "c", "/a.slice/b.slice", True),
        ("", ID, f"/kubepods/pod1/{ID}", True),
        ("", ID, f"/kubepods.slice/cri-containerd-{ID}.scope", True),
        ("", ID, f"/crio-conmon-{ID}.scope", False),
        ("", "c", "/user.slice", False),
        ("/", "c", "/user.slice", False),
        ("/a-b/../grp", "c", "/grp", True),
        ("../grp", "c", "/grp", True),
        (liveness.NO_GROUP, ID, f"/a/{ID}", False),
    ],
)
def test_groups_of_every_driver(group: str, container: str, path: str, inside: bool) -> None:
    patterns = liveness.patterns(group, container)
    assert any(liveness._within(path.split("/"), pattern, False) for pattern in patterns) is inside


@pytest.mark.parametrize(
    ("path", "inside"),
    [("/../../pod2/c", True), ("/../pod1/c", False), ("/c", True), ("/../x/pod2/c", False), ("/a/pod2/c/below", True)],
)
def test_a_cgroup_namespace_shows_a_group_without_the_names_above(path: str, inside: bool) -> None:
    assert liveness._within(path.split("/"), ["a", "pod2", "c"], True) is inside
    assert liveness._within(path.split("/"), ["a", "pod2", "c"], False) is path.startswith("/a")


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("/sys/fs/cgroup/unified/x", ["x"]),
        ("/sys/fs/cgroup/x", ["x"]),
        ("/sys/fs/cgroup/pids/a/x", ["a", "x"]),
        ("/a/x", ["a", "x"]),
        ("", []),
    ],
)
def test_components_of_a_groups_path(written: str, names: list[str]) -> None:
    assert liveness._components(written) == names


def entry(root: Path, **more: Any) -> Any:
    return {"id": "c", "root": str(root), "runtime": "/nowhere/runc", "group": "", **kernel.creation(str(root)), **more}


def test_the_creating_process_is_known_by_pid_start_time_and_boot(tmp_path: Path) -> None:
    mine = entry(tmp_path)
    assert liveness.sees_all_processes(mine) and liveness.creator_runs(mine) and not stale.is_gone(mine)
    assert not liveness.creator_runs(mine | {"started": mine["started"] + 1})
    assert liveness.creator_runs(mine | {"started": mine["started"] + 1, "timens": "time:[1]"}), (
        "start times differ in that time namespace"
    )
    assert not liveness.creator_runs(mine | {"pid": 2**22, "timens": "time:[1]"})
    assert stale.is_gone(mine | {"boot": "another"}), "a process of an earlier boot is gone"
    assert stale.is_gone(mine | {"started": mine["started"] + 1})
    assert not stale.is_gone(mine | {"started": mine["started"] + 1, "root": "relative"})


def test_a_zombie_creates_nothing(tmp_path: Path) -> None:
    """A killed create whose engine has not waited for it yet."""
    pid = os.fork()
    if not pid:
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        made = entry(tmp_path, pid=pid, started=kernel.started(pid))
        assert made["started"] and not liveness.creator_runs(made) and stale.is_gone(made)
        assert not liveness.creator_runs(made | {"timens": "time:[1]"})
    finally:
        os.waitpid(pid, 0)


def test_a_namespace_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host sees all processes; from another namespace a process of a third one may be invisible."""
    theirs = entry(tmp_path, pidns="pid:[7]")
    real = kernel.namespace
    monkeypatch.setattr(
        kernel, "namespace", lambda kind, pid="self": "pid:[8]" if (kind, pid) == ("pid", "self") else real(kind, pid)
    )
    assert not liveness.sees_all_processes(theirs) and not stale.is_gone(theirs) and liveness.in_use(theirs)
    monkeypatch.setattr(
        kernel,
        "namespace",
        lambda kind, pid="self": liveness._INITIAL if (kind, pid) == ("pid", "self") else real(kind, pid),
    )
    assert liveness.sees_all_processes(theirs) and not liveness.creator_runs(theirs) and stale.is_gone(theirs)


def test_a_root_is_visible_on_the_file_system_of_its_create(tmp_path: Path) -> None:
    root = tmp_path / "root"
    before = entry(root)
    assert before["place"][0] == str(tmp_path) and liveness.sees_root(before), "the runtime will create it"
    root.mkdir()
    assert liveness.sees_root(before) and liveness.sees_root(entry(root))
    path, device, inode = entry(root)["place"]
    assert not liveness.sees_root(entry(root, place=[path, device + 1, inode])), "a root on another file system"
    assert liveness.sees_root(partial({key: value for key, value in before.items() if key != "place"})), (
        "a lease of an older Chandler"
    )


@pytest.mark.parametrize(
    ("given", "kind", "wanted"),
    [
        ("P/root", "runc", "P/root"),
        ("P/root/", "crun", "P/root"),
        ("P/./root//", "youki", "P/root"),
        ("P/link", "runc", "P/root"),
        ("root", "runc", "P/root"),
        ("link/not/yet", "runc", "P/root/not/yet"),
        ("P/deep/../root", "runc", "P/root"),
        ("P/deep/../root", "crun", "P/far/root"),
        ("root", "crun", "P/bundle/root"),
        ("P/none/../root", "runc", "P/root"),
        ("", "runc", "/run/runc"),
    ],
)
def test_a_root_is_its_resolved_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, kind: str, wanted: str
) -> None:
    """`..` after a link: runc removes it from the text, the kernel goes to the parent of the link's target."""
    for name in ("root", "bundle", "far/below"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("root")
    (tmp_path / "deep").symlink_to("far/below")
    monkeypatch.chdir(tmp_path)
    place = os.path.realpath(tmp_path)
    assert runtimes.state_root(given.replace("P", place), kind, False, {}, "bundle") == wanted.replace("P", place)


def test_without_a_control_group_a_container_never_counts_as_gone(tmp_path: Path) -> None:
    made = entry(tmp_path, pid=4194000, started=1, id="c", runtime="/bin/false")
    assert stale.is_gone(made | {"group": "/no/such/group"})
    for none in (liveness.NO_GROUP, "/", "/a/.."):
        assert not stale.is_gone(made | {"group": none})


@pytest.mark.parametrize(
    ("options", "namespace", "uid", "seen"),
    [
        ("rw", "user:[1]", 1000, True),
        ("rw,hidepid=invisible", "user:[1]", 1000, True),
        ("rw,hidepid=2", "user:[2]", 0, False),
        ("rw,hidepid=1", "user:[2]", 1000, False),
        ("rw,subset=pid", "user:[2]", 1000, False),
        ("rw,hidepid=2", "user:[4026531837]", 0, True),
    ],
)
def test_a_proc_that_hides_processes(
    monkeypatch: pytest.MonkeyPatch, options: str, namespace: str, uid: int, seen: bool
) -> None:
    own = {"user": namespace, "pid": "pid:[5]"}
    monkeypatch.setattr(kernel, "namespace", lambda kind, pid="self": own[kind])
    monkeypatch.setattr(
        liveness, "_read", lambda path: f"24 30 0:22 / /proc rw,nosuid shared:12 - proc proc {options}\n"
    )
    monkeypatch.setattr("posix.geteuid", lambda: uid)
    assert liveness.sees_all_processes(partial({"pidns": "pid:[5]", "userns": "user:[1]"})) == seen


@pytest.mark.skipif(cgroups.mode() == "unified" or os.geteuid() != 0, reason="needs cgroup v1, and root to make groups")
def test_a_process_that_is_still_ending_is_an_occupant() -> None:
    """cgroup v1 shows it in the root group, while it gives its memory back and has its files open."""
    name = f"chandler-ending-{os.getpid()}"
    group = f"{cgroups.SYSFS}/cpuset/{name}"
    os.mkdir(group)
    for file in ("cpuset.cpus", "cpuset.mems"):
        Path(group, file).write_text(Path(cgroups.SYSFS, "cpuset", file).read_text())
    program = f"data = bytearray({256 << 20})\nfor at in range(0, len(data), 4096): data[at] = 1\nprint()\ninput()"
    process = subprocess.Popen([sys.executable, "-uc", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        Path(group, "cgroup.procs").write_text(str(process.pid))
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        process.kill()
        while liveness.occupants(partial({"id": name, "group": f"/{name}"})):
            pass
        assert kernel.stat(process.pid)[0] == "Z"
    finally:
        process.kill()
        process.communicate()
        os.rmdir(group)
