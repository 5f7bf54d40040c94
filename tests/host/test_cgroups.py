"""Control groups on trees that are only files: surveys, a container's group, and a second call changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shim.errors import HostError, RequestError
from shim.host import cgroups

V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
TMPFS = "29 23 0:25 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
UNIFIED = "45 29 0:41 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"


def first(root: str = "/", *names: str) -> str:
    return TMPFS + "".join(
        f"{number} 29 0:{number} {root} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}\n"
        for number, name in enumerate(names or ("memory", "cpu,cpuacct", "pids", "devices"), 31)
    )


class Fake(cgroups.CgroupTree):
    """`frozen`: no group can be made."""

    def __init__(
        self, directory: Path, mounts: str, own: str, init: str = "0::/init.scope\n", frozen: bool = False
    ) -> None:
        super().__init__(str(directory))
        self.directory = directory
        self.frozen = frozen
        self.moved: list[str] = []
        self.put("/proc/self/mountinfo", "22 1 0:2 / / rw - ext4 /dev/vda rw\n" + mounts)
        self.put("/proc/self/cgroup", own)
        self.put("/proc/1/cgroup", init)

    def put(self, path: str, text: str = "") -> None:
        file = self.directory / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def group(self, path: str, controllers: str = "cpu memory pids", delegated: str = "", inner: bool = True) -> None:
        """A group of version 2; the real root has no cgroup.type."""
        at = "/sys/fs/cgroup" + path.rstrip("/")
        for name, text in (("controllers", controllers), ("subtree_control", delegated), ("procs", "")):
            self.put(f"{at}/cgroup.{name}", text)
        if inner:
            self.put(f"{at}/cgroup.type", "domain\n")

    def writable(self, path: str) -> bool:
        return not self.frozen and super().writable(path)

    def make(self, path: str) -> None:
        if self.frozen:
            raise OSError(30, "Read-only file system")
        super().make(path)
        for name in ("procs", "subtree_control", "controllers"):  # the kernel's part
            if not self.exists(f"{path}/cgroup.{name}"):
                self.put(f"{path}/cgroup.{name}")


def plain(directory: Path, frozen: bool = False) -> Fake:
    """A host of version 2 with systemd, seen from a session."""
    tree = Fake(directory, V2.format(root="/"), "0::/user.slice/user-0.slice/session-1.scope\n", frozen=frozen)
    tree.group("/", delegated="cpu memory pids", inner=False)
    tree.group("/user.slice/user-0.slice/session-1.scope")
    return tree


def contained(directory: Path, own: str = "/", frozen: bool = False) -> Fake:
    """A container with a cgroup namespace of its own."""
    tree = Fake(directory, V2.format(root="/"), f"0::{own}\n", "0::/\n", frozen=frozen)
    tree.group("/")
    return tree


def test_a_host_of_version_2(tmp_path: Path) -> None:
    found = cgroups.survey(plain(tmp_path))
    assert found == cgroups.Survey(
        "v2",
        "/sys/fs/cgroup",
        "/user.slice/user-0.slice/session-1.scope",
        False,
        True,
        True,
        ["cpu", "memory", "pids"],
        [],
    )


@pytest.mark.parametrize(
    ("mounts", "own", "init", "version", "path", "nested"),
    [
        # the host's own namespace, in a container of docker's: pid 1 is in its group
        (V2.format(root="/"), "0::/docker/abc\n", "0::/docker/abc\n", "v2", "/docker/abc", True),
        (V2.format(root="/docker/abc"), "0::/docker/abc\n", "0::/docker/abc\n", "v2", "/", False),
        (V2.format(root="/docker/abc"), "0::/docker/abc/x\n", "0::/docker/abc\n", "v2", "/x", False),
        (V2.format(root="/"), "0::/../other\n", "0::/\n", "v2", "/", False),
        (first(), "5:memory:/\n4:cpu,cpuacct:/\n3:pids:/\n2:devices:/\n", "4:memory:/\n", "v1", "/", False),
        (
            first("/docker/abc"),
            "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:pids:/docker/abc\n2:devices:/docker/abc\n",
            "5:memory:/docker/abc\n",
            "v1",
            "/",
            True,
        ),
        (
            first(),
            "".join(f"{n}:{name}:/docker/abc\n" for n, name in enumerate(("memory", "cpu,cpuacct", "pids", "devices"))),
            "0:memory:/docker/abc\n",
            "v1",
            "/docker/abc",
            True,
        ),
        (first(), "5:memory:/a\n4:cpu,cpuacct:/b\n3:pids:/\n2:devices:/\n", "5:memory:/\n", "v1", "", False),
        (
            first() + UNIFIED,
            "5:memory:/\n4:cpu,cpuacct:/\n3:pids:/\n2:devices:/\n0::/x\n",
            "0::/\n",
            "hybrid",
            "/",
            False,
        ),
        (
            TMPFS + "46 29 0:42 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n" + UNIFIED,
            "0::/\n",
            "0::/\n",
            "v2",
            "/",
            False,
        ),
        ("", "", "", "none", "", False),
        # version 2 mounted over everything, as in a test of ours
        (
            first() + UNIFIED + "50 29 0:50 / /sys/fs/cgroup rw - cgroup2 none rw\n",
            "5:memory:/a\n0::/\n",
            "0::/\n",
            "v2",
            "/",
            False,
        ),
    ],
)
def test_surveys(tmp_path: Path, mounts: str, own: str, init: str, version: str, path: str, nested: bool) -> None:
    found = cgroups.survey(Fake(tmp_path, mounts, own, init))
    assert (found.version, found.own, found.nested) == (version, path, nested)


def test_broken_lines_are_ignored(tmp_path: Path) -> None:
    found = cgroups.survey(Fake(tmp_path, "x\n1 2 3\n- cgroup2\n9 9 9 / /x rw - cgroup2\n", "nonsense\n1:2\n", ""))
    assert found.version == "none"


# --- where a container goes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parent", "systemd", "path"),
    [
        ("/team", False, "/team/web-1"),
        ("/team/", False, "/team/web-1"),
        ("/", False, "/web-1"),
        ("/a/b.slice", False, "/a/b.slice/web-1"),
        ("team-a.slice", True, "team-a.slice:chandler:web-1"),
        ("/team.slice/team-a.slice", True, "team-a.slice:chandler:web-1"),
    ],
)
def test_parents(parent: str, systemd: bool, path: str) -> None:
    assert cgroups.in_parent(parent, "web-1", systemd) == path


@pytest.mark.parametrize(
    ("parent", "systemd", "message"),
    [
        ("team", False, "write it from the top"),
        ("team.slice", False, "a slice is for --systemd-cgroup"),
        ("/a/../b", False, "no control group"),
        ("/a/./b", False, "no control group"),
        ("/a\nb", False, "no control group"),
        ("a:b:c", False, "no control group"),
        ("/team", True, "no slice"),
        ("/", True, "no slice"),
        ("a.scope", True, "no slice"),
        ("", True, "no slice"),
    ],
)
def test_invalid_parents(parent: str, systemd: bool, message: str) -> None:
    with pytest.raises(RequestError) as failed:
        cgroups.in_parent(parent, "web-1", systemd)
    assert message in str(failed.value)


@pytest.mark.parametrize(
    ("asked", "variable", "systemd", "rootless", "path", "by"),
    [
        ("/asked", "/variable", False, False, "/asked/c", "cgroup_parent"),
        ("", "/variable", False, False, "/variable/c", "CHANDLER_CGROUP_PARENT"),
        ("", "", False, False, "", "the runtime"),
        ("", "", False, True, "", "the runtime"),
        ("", "", True, False, "system.slice:chandler:c", "systemd"),
        ("", "", True, True, "user.slice:chandler:c", "systemd"),
        ("a.slice", "b.slice", True, False, "a.slice:chandler:c", "cgroup_parent"),
    ],
)
def test_the_source_of_a_parent(
    tmp_path: Path, asked: str, variable: str, systemd: bool, rootless: bool, path: str, by: str
) -> None:
    tree = plain(tmp_path)
    before = files(tmp_path)
    assert cgroups.choose_group("c", asked, variable, systemd, rootless, 4711, tree) == cgroups.Placement(path, by, [])
    assert files(tmp_path) == before


def test_a_wrong_parent_is_named_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="^CHANDLER_CGROUP_PARENT: 'x' is no control group"):
        cgroups.choose_group("c", variable="x", tree=plain(tmp_path))
    with pytest.raises(RequestError, match="^cgroup_parent: "):
        cgroups.choose_group("c", "x", "/y", tree=plain(tmp_path))


def files(directory: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_room_is_made_beside_the_builder(tmp_path: Path) -> None:
    tree = contained(tmp_path)
    made = cgroups.choose_group("c", move=4711, tree=tree)
    assert made == cgroups.Placement("/containers/c", "/proc/self/cgroup", [])
    root = tmp_path / "sys/fs/cgroup"
    assert (root / "init/cgroup.procs").read_text() == "4711"
    assert (root / "containers").is_dir()
    assert (root / "cgroup.subtree_control").read_text() and (root / "containers/cgroup.subtree_control").read_text()


def test_a_second_call_changes_nothing(tmp_path: Path) -> None:
    tree = contained(tmp_path)
    first_time = cgroups.choose_group("c", move=4711, tree=tree)
    # what the kernel shows afterwards
    tree.put("/proc/self/cgroup", "0::/init\n")
    for group in ("", "/containers"):
        tree.put(f"/sys/fs/cgroup{group}/cgroup.subtree_control", "cpu memory pids")
    before = files(tmp_path)
    assert cgroups.survey(tree).own == "/"
    assert cgroups.choose_group("c", move=4711, tree=tree) == first_time
    assert files(tmp_path) == before


def test_a_survey_moves_no_process(tmp_path: Path) -> None:
    tree = contained(tmp_path)
    before = files(tmp_path)
    assert cgroups.choose_group("c", tree=tree).path == "/containers/c"
    assert files(tmp_path) == before


def test_a_group_that_is_only_called_init_stays(tmp_path: Path) -> None:
    tree = contained(tmp_path, "/init")
    tree.group("/init")
    assert cgroups.survey(tree).own == "/init"


def test_missing_controllers_are_reported(tmp_path: Path) -> None:
    tree = contained(tmp_path)
    os.unlink(tmp_path / "sys/fs/cgroup/cgroup.subtree_control")
    notes = cgroups.choose_group("c", move=4711, tree=tree).notes
    assert len(notes) == 3 and "does not hand on the controller cpu" in notes[0]


def test_a_limit_whose_controller_is_not_delegated(tmp_path: Path) -> None:
    """Otherwise the runtime fails with a message that names a file of the kernel."""
    tree = contained(tmp_path)
    os.unlink(tmp_path / "sys/fs/cgroup/cgroup.subtree_control")
    (tmp_path / "sys/fs/cgroup/cgroup.procs").write_text("12\n13\n")
    with pytest.raises(HostError) as failed:
        cgroups.choose_group("c", move=4711, tree=tree, needed=["memory"])
    assert "cannot hand on the controller memory" in str(
        failed.value
    ) and "other processes are in it, such as 12, 13;" in str(failed.value)
    assert "CHANDLER_CGROUP_PARENT" in str(failed.value)
    before = files(tmp_path)
    with pytest.raises(HostError, match="controller hugetlb that it needs: the group above does not hand it on"):
        cgroups.choose_group("c", move=4711, tree=tree, needed=["hugetlb"])
    assert files(tmp_path) == before


def test_the_controllers_that_limits_need() -> None:
    assert cgroups.controllers({}) == [] == cgroups.controllers({"memory": {}, "devices": [{}]})
    assert cgroups.controllers({"memory": {"limit": 1}, "pids": {"limit": 1}, "blockIO": {"weight": 10}}) == [
        "memory",
        "pids",
        "io",
    ]
    assert cgroups.controllers({"cpu": {"shares": 2}}) == ["cpu"] and cgroups.controllers({"cpu": {"cpus": "0"}}) == [
        "cpu",
        "cpuset",
    ]


@pytest.mark.parametrize("move", [4711, None])
def test_no_parent_can_be_written_to(tmp_path: Path, move: int | None) -> None:
    """The error names three remedies."""
    with pytest.raises(HostError) as failed:
        cgroups.choose_group("c", move=move, tree=contained(tmp_path, frozen=True))
    message = str(failed.value)
    assert "no control group to put c into" in message
    assert "--cgroupns=host" in message and "CHANDLER_CGROUP_PARENT" in message and "/sys/fs/cgroup writable" in message
    with pytest.raises(HostError, match="--cgroupns=host"):
        cgroups.choose_group("c", tree=plain(tmp_path / "host", frozen=True))
    # but a parent that is named is accepted, and an unprivileged user gets no group
    assert cgroups.choose_group("c", "/x", tree=plain(tmp_path / "host", frozen=True)).path == "/x/c"
    assert cgroups.choose_group("c", rootless=True, tree=plain(tmp_path / "host", frozen=True)).path == ""


def test_version_1_in_a_container_needs_no_leaf(tmp_path: Path) -> None:
    tree = Fake(
        tmp_path,
        first(),
        "".join(f"{n}:{name}:/docker/abc\n" for n, name in enumerate(("memory", "cpu,cpuacct", "pids", "devices"))),
        "1:memory:/docker/abc\n",
    )
    for name in ("memory", "cpu,cpuacct", "pids", "devices"):
        (tmp_path / f"sys/fs/cgroup/{name}/docker/abc").mkdir(parents=True)
    before = files(tmp_path)
    assert cgroups.choose_group("c", move=4711, tree=tree).path == "/docker/abc/containers/c"
    assert files(tmp_path) == before


def test_without_control_groups_the_runtime_decides(tmp_path: Path) -> None:
    assert cgroups.choose_group("c", tree=Fake(tmp_path, "", "", "")) == cgroups.Placement("", "the runtime", [])


# --- remedies -------------------------------------------------------------------------------------------------


def survey(**more: object) -> cgroups.Survey:
    found = cgroups.Survey("v2", "/sys/fs/cgroup", "/", False, True, True, ["cpu", "memory", "pids"], [])
    return found._replace(**more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "rootless", "message"),
    [
        (survey(), False, ""),
        (survey(), True, ""),
        (survey(version="none", controllers=[]), False, "no control groups"),
        (survey(root_writable=False), False, "no control group can be made"),
        (survey(nested=True, own_writable=False), False, "no control group can be made"),
        (survey(own_writable=False), True, "not yours"),
        (survey(controllers=["cpu"]), False, "no control group controller for memory, pids"),
    ],
)
def test_remedies(found: cgroups.Survey, rootless: bool, message: str) -> None:
    problems = cgroups.remedy(found, rootless)
    assert bool(problems) == bool(message)
    if message:
        assert message in problems[0]["problem"] and problems[0]["remedy"]
