"""chandler-hook: its input, what it refuses, and what it never runs."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from lab import REPOSITORY, ldsocache
from lab.hook_world import HOOK, World

from shim.generate import ldcache

PARAMS = "EnableMSI: 1\nModifyDeviceFiles: 1\n"


@pytest.fixture
def world(tmp_path: pathlib.Path, needs_mounts: None) -> World:
    return World(str(tmp_path))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "no such hook"),
        (("nonsense",), "nonsense: no such hook"),
        (("create-symlinks", "--", "nonsense"), "nonsense: no such hook"),
        (("create-symlinks", "--"), "no such hook"),
        (("disable-device-node-modification", "x"), "takes no arguments"),
    ],
)
def test_unknown_hooks_and_wrong_arguments_are_refused(world: World, arguments: tuple[str, ...], words: str) -> None:
    done = world.run(*arguments)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("chandler-hook: ")


@pytest.mark.parametrize("state", ["", "{", "[]", '{"bundle": 1}', '{"bundle": "/nowhere"}', '{"id": "x"}', "null"])
def test_an_invalid_state_is_refused(world: World, state: str) -> None:
    done = world.run("create-symlinks", "--link", "x::/made", state=state)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert not os.path.lexists("/made") and not os.path.lexists(world.root + "/made")


@pytest.mark.parametrize("config", [{}, {"root": None}, {"root": {"path": 7}}])
def test_a_config_without_a_root_is_refused(world: World, config: dict[str, object]) -> None:
    world.config = config
    done = world.run("create-symlinks", "--link", "x::/made")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_nothing_of_the_image_is_loaded(world: World) -> None:
    """The working directory is the image, full of modules and libraries with the names of those that the hook uses."""
    canary = f"open({world.host + '/loaded'!r}, 'w')\n"
    for name in (
        "json",
        "os",
        "ctypes",
        "hooks",
        "signal",
        "sitecustomize",
        "usercustomize",
        "encodings/__init__",
        "hooks/__init__",
        "shim/__init__",
    ):
        world.image(f"/{name}.py", canary)
    world.image("/python3", "#!/bin/sh\ntouch loaded\n")
    done = world.run("create-symlinks", "--link", "x::/made", "--", "update-ldcache", "--folder", "/")
    assert (done.returncode, done.stderr) == (0, "")
    assert os.readlink(world.root + "/made") == "x"
    assert sorted(os.listdir(world.host)) == ["lib", "secret"]


IN_THE_CONTAINER = (
    "hooks.container, hooks.create_symlinks, hooks.update_ldcache, hooks.enable_cuda_compat, "
    "hooks.disable_device_node_modification"
)


@pytest.mark.parametrize(
    "modules, none",
    [
        (IN_THE_CONTAINER, "collections json re enum subprocess yaml logging typing shutil tempfile socket site"),
        ("hooks.release", "collections ctypes json os re stat struct typing"),
    ],
)
def test_the_modules_that_a_hook_imports(modules: str, none: str) -> None:
    """A hook has to start in a fraction of a second, and each further module could read from the image."""
    program = (
        f"import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); import hooks.main, {modules}; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", program, REPOSITORY], capture_output=True, text=True, check=True
    )
    assert not set(none.split()) & set(done.stdout.split())


def test_the_container_cannot_read_the_hooks_memory(world: World) -> None:
    """Processes of the container cannot read the hook's memory and executable (CVE-2019-5736)."""
    program = (
        f"import sys, ctypes; sys.path.insert(0, {REPOSITORY!r}); from hooks import main; main.main([]); "
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], input="", capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_in_a_user_namespace(world: World) -> None:
    """Root has no rights outside of it: rootless podman, and containers with a user namespace."""
    world.image("/etc/ld.so.cache", ldsocache.write())
    os.makedirs(world.root + "/lib")
    world.bind(
        world.put(world.directory + "/libx.so.1", b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0\x3e\0" + bytes(44)),
        "/lib/libx.so.1",
    )
    done = world.run(
        "create-symlinks",
        "--link",
        "libx.so.1::/lib/libx.so",
        "--",
        "update-ldcache",
        "--folder",
        "/lib",
        command=["unshare", "--user", "--map-root-user", "--mount", HOOK],
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ldcache.paths(pathlib.Path(world.root + "/etc/ld.so.cache").read_bytes(), "libx.so") == ["/lib/libx.so"]


# --- limits ---------------------------------------------------------------------------------------------------

# A hook as it runs, but one of its modules is replaced by code that never ends or that takes ever more memory.
BEYOND = """
import sys
sys.path.insert(0, sys.argv[1])
from hooks import bounds, main, container, update_ldcache, disable_device_node_modification
bounds.PATIENCE = 1

def forever(*_):
    while True:
        pass

def greedy(*_):
    return len([bytes(1 << 20) for _ in range(1 << 12)])

update_ldcache.run = disable_device_node_modification.run = {"forever": forever, "greedy": greedy}[sys.argv[2]]
sys.exit(main.main(sys.argv[3:]))
"""
LINK = ("create-symlinks", "--link", "x::/made")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("forever", "took longer than 1 seconds, and was stopped"),
        ("greedy", "needed more than 192 MiB of memory, or than the engine's limit, and was stopped"),
    ],
)
def test_a_hook_beyond_its_limits_is_stopped(world: World, how: str, words: str) -> None:
    """The container starts without the optional steps, and the later steps run."""
    command = [sys.executable, "-I", "-c", BEYOND, REPOSITORY, how]
    done = world.run("update-ldcache", "--folder", "/lib", "--", *LINK, command=command)
    assert (done.returncode, done.stderr) == (0, f"chandler-hook: update-ldcache: {words}\n")
    assert os.readlink(world.root + "/made") == "x"
    done = world.run("disable-device-node-modification", "--", *LINK, command=command)
    assert (done.returncode, done.stderr) == (1, f"chandler-hook: disable-device-node-modification: {words}\n")


@pytest.mark.parametrize("command", [LINK, ("mps-ready", "/nowhere", "/bin/true", "1000")])
def test_a_config_that_is_larger_in_memory_than_on_disk(world: World, command: tuple[str, ...]) -> None:
    world.config["nothing"] = [[]] * 4_000_000
    done = world.run(*command)
    assert (done.returncode, done.stderr) == (
        1,
        f"chandler-hook: {command[0]}: needed more than 192 MiB of memory, or than the engine's limit, "
        "and was stopped\n",
    )


@pytest.mark.parametrize("command", [LINK, ("release", "/nowhere", "t"), ("mps-ready", "/nowhere", "/bin/true")])
def test_a_runtime_that_never_sends_the_state_is_not_waited_for(command: tuple[str, ...]) -> None:
    program = (
        f"import sys; sys.path.insert(0, {REPOSITORY!r}); from hooks import bounds, main; bounds.PATIENCE = 1; "
        "sys.exit(main.main(sys.argv[1:]))"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program, *command], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as hook:
        assert (
            hook.stderr is not None
            and hook.stderr.read() == f"chandler-hook: {command[0]}: took longer than 1 seconds, and was stopped\n"
        )
        assert hook.wait() == int(command[0] != "release")


# --- disable-device-node-modification -------------------------------------------------------------------------

COVER = """
import sys
sys.path.insert(0, sys.argv[1])
from hooks import disable_device_node_modification as hook
from shim.host.inroot import Root
hook.cover(Root(sys.argv[2]), sys.argv[3], b"ModifyDeviceFiles: 0\\n")
"""


def cover(world: World, path: str, before: str, after: str) -> subprocess.CompletedProcess[str]:
    world.mounts.append(before)
    return world.run("-I", "-S", "-B", "-c", COVER, REPOSITORY, world.root, path, command=[sys.executable], after=after)


def test_a_file_of_proc_is_covered_and_cannot_be_changed(world: World) -> None:
    proc = world.root + "/proc"
    os.makedirs(proc)
    done = cover(
        world,
        "/proc/driver/rtc" if os.path.exists("/proc/driver/rtc") else "/proc/version",
        f"mount -t proc proc {proc}",
        f"cat {proc}/driver/rtc 2>/dev/null | head -1; cat {proc}/version | head -1; "
        f"(echo x > {proc}/version) 2>/dev/null || echo read-only; "
        f"grep -c tmpfs.*{proc} /proc/self/mountinfo; ls {proc}/1 >/dev/null && echo proc is there",
    )
    lines = done.stdout.splitlines()
    assert "ModifyDeviceFiles: 0" in lines and "read-only" in lines and "proc is there" in lines, (lines, done.stderr)


def test_only_a_real_proc_is_covered(world: World) -> None:
    world.image("/proc/version", "not of the kernel")
    done = cover(world, "/proc/version", "true", "true")
    assert done.returncode != 0 and "is not procfs" in done.stderr
    world.mounts.clear()
    os.rename(world.root + "/proc", world.host + "/proc")
    world.link("/proc", world.host + "/proc")
    before = world.snapshot()
    assert cover(world, "/proc/version", "true", "true").returncode != 0
    assert world.snapshot() == before


def test_disable_device_node_modification_does_nothing_without_the_driver(world: World) -> None:
    if os.path.exists("/proc/driver/nvidia/params"):
        pytest.skip("this host has the driver")
    done = world.run("disable-device-node-modification")
    assert (done.returncode, done.stderr) == (0, "")
