"""create-symlinks, in ordinary images and in hostile ones."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest
from lab.hook_world import World

LIB = "/usr/lib/x86_64-linux-gnu"
LINK = ("--link", f"libcuda.so.1::{LIB}/libcuda.so")


@pytest.fixture
def world(tmp_path: pathlib.Path, needs_mounts: None) -> World:
    return World(str(tmp_path))


def test_links_are_made_with_their_directories(world: World) -> None:
    done = world.run("create-symlinks", *LINK, "--link", "../a/b::/opt/x/y")
    assert (done.returncode, done.stderr) == (0, "")
    assert os.readlink(f"{world.root}{LIB}/libcuda.so") == "libcuda.so.1"
    assert os.readlink(f"{world.root}/opt/x/y") == "../a/b"
    assert world.run("create-symlinks", *LINK).stderr == "", "a second time changes nothing"


def test_another_link_is_replaced_and_a_file_stays(world: World) -> None:
    world.link(f"{LIB}/libcuda.so", "/elsewhere")
    world.image(f"{LIB}/libnvidia-ml.so", "the image's stub")
    done = world.run("create-symlinks", *LINK, "--link", f"libnvidia-ml.so.1::{LIB}/libnvidia-ml.so")
    assert os.readlink(f"{world.root}{LIB}/libcuda.so") == "libcuda.so.1"
    assert pathlib.Path(f"{world.root}{LIB}/libnvidia-ml.so").read_text() == "the image's stub"
    assert done.returncode == 0 and "the image has a file of that name" in done.stderr


def test_leftovers_of_another_runtime_in_an_image_are_removed(world: World) -> None:
    world.image(f"{LIB}/libcuda.so")
    done = world.run("create-symlinks", *LINK)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.readlink(f"{world.root}{LIB}/libcuda.so") == "libcuda.so.1"


def mounted_last(world: World) -> None:
    world.bind(world.put(world.host + "/empty"), f"{LIB}/libcuda.so")


def linked_folder(world: World) -> None:
    world.link("/usr/lib", world.host + "/lib")


def linked_above(world: World) -> None:
    world.link("/usr", world.host)


def dots(world: World) -> None:
    os.makedirs(world.root + "/usr")
    os.symlink("../../../host/lib", world.root + "/usr/lib")


def last_is_link(world: World) -> None:
    world.link(f"{LIB}/libcuda.so", world.host + "/secret")


def folder_is_fifo(world: World) -> None:
    os.makedirs(world.root + "/usr/lib")
    os.mkfifo(world.root + LIB)


def last_is_fifo(world: World) -> None:
    os.makedirs(world.root + LIB)
    os.mkfifo(f"{world.root}{LIB}/libcuda.so")


def last_is_folder(world: World) -> None:
    os.makedirs(f"{world.root}{LIB}/libcuda.so/x")


def mounted_folder(world: World) -> None:
    world.bind(world.host + "/lib", LIB)


def mounted_above(world: World) -> None:
    world.bind(world.host, "/usr")


def link_into_a_mount(world: World) -> None:
    world.bind(world.host, "/mnt")
    world.link("/usr/lib", "/mnt/lib")


def magic_link(world: World) -> None:
    world.link("/usr/lib", "/proc/1/root" + world.host + "/lib")
    world.bind("/proc", "/proc")


def loop(world: World) -> None:
    world.link("/usr/lib", "/usr/lib")


HOSTILE: list[Callable[[World], None]] = [
    linked_folder,
    linked_above,
    dots,
    last_is_link,
    folder_is_fifo,
    last_is_fifo,
    last_is_folder,
    mounted_last,
    mounted_folder,
    mounted_above,
    link_into_a_mount,
    magic_link,
    loop,
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_image_changes_nothing_on_the_host(world: World, hostile: Callable[[World], None]) -> None:
    hostile(world)
    before = world.snapshot()
    done = world.run(
        "create-symlinks", *LINK, "--link", "x::/usr/lib/../../../../../etc/made", "--link", f"x::{world.host}/made"
    )
    assert done.returncode == 0, done.stderr
    assert world.snapshot() == before
    assert not os.path.lexists("/etc/made")


def test_links_to_devices_only_where_the_container_has_them(world: World) -> None:
    world.config["linux"]["devices"] = [{"path": "/dev/dri/card1"}]
    done = world.run(
        "create-symlinks",
        "--link",
        "../card1::/dev/dri/by-path/pci-a-card",
        "--link",
        "../card2::/dev/dri/by-path/pci-b-card",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(world.root + "/dev/dri/by-path") == ["pci-a-card"]


def test_dev_is_written_to_only_when_it_is_the_containers_own(world: World) -> None:
    world.config["linux"]["devices"] = [{"path": "/dev/dri/card1"}]
    link = ("create-symlinks", "--link", "../card1::/dev/dri/by-path/pci-a-card")
    os.makedirs(world.root + "/dev")
    world.mounts.append(f"mount -t tmpfs none {world.root}/dev")
    world.config["mounts"] = [{"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]}]
    done = world.run(*link, after=f"readlink {world.root}/dev/dri/by-path/pci-a-card")
    assert done.stdout == "../card1\n", done.stderr
    world.mounts = []
    world.bind(world.host, "/dev")
    world.config["mounts"] = [{"destination": "/dev", "type": "bind", "source": world.host, "options": ["rbind"]}]
    before = world.snapshot()
    done = world.run(*link)
    assert done.returncode == 0 and "something is mounted there" in done.stderr
    assert world.snapshot() == before


@pytest.mark.parametrize(
    "words",
    [
        ["--link"],
        ["--link", "no-colons"],
        ["--link", "x::relative"],
        ["--link", "x::/dir/"],
        ["--link", "::/x"],
        ["--link", "x::/a/.."],
        ["--other", "x::/y"],
        ["--link", "x" * 1025 + "::/y"],
        ["--link", "x::/" + "y/" * 512 + "z"],
        ["--link", "x::/y"] * 4097,
    ],
)
def test_invalid_arguments_are_refused(world: World, words: list[str]) -> None:
    done = world.run("create-symlinks", *words)
    assert (
        done.returncode == 1
        and done.stderr.startswith("chandler-hook: create-symlinks: ")
        and done.stderr.count("\n") == 1
    )
