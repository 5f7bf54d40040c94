"""Root file systems made to harm the hooks, in real containers: the host does not change, and no hook grows large.

Each is an attack that was tried by hand; create-symlinks, update-ldcache and enable-cuda-compat run in every one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from lab import bundle, ldsocache
from lab.engine import Engine
from lab.install import Installation
from lab.runtimes import Runtime

from hooks import update_ldcache

KIND = "hook.test/dev"
MAX_PEAK = 128 << 10  # KiB: what a hook may hold at most, whatever the image is
LIBRARY = "/usr/lib/libfoo.so.1"
ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0\x3e\0" + bytes(44)
HOST_PATHS = ("/etc/ld.so.cache", "/etc/ld.so.conf.d", "/etc", "/usr/lib", "/")

# Runs the hook as the runtime would, and records how much memory it used.
MEASURE = """#!/usr/bin/python3 -IS
import os, sys
pid = os.posix_spawn({hook!r}, [{hook!r}, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(pid, 0)
with open({log!r}, "a", encoding="ascii") as log:
    log.write(str(usage.ru_maxrss) + "\\n")
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Lab(NamedTuple):
    """`victim`: a tree of the host that hostile links lead to. `peaks`: a file of the hooks' peak memory, in KiB."""

    engine: Engine
    workdir: str
    victim: str
    peaks: str


@functools.cache
def equipped(lab: str, runtime: Runtime) -> tuple[Installation, str, str]:
    """An installation with a CDI file of one device: a library, and the hooks that go with it."""
    workdir = os.path.join(lab, "hooks-" + runtime.label)
    installation = Installation(os.path.join(workdir, "installed"))
    victim, peaks, measure = (
        os.path.join(workdir, "victim"),
        os.path.join(workdir, "peaks"),
        os.path.join(workdir, "measure"),
    )
    os.makedirs(victim + "/etc/ld.so.conf.d")
    put(victim + "/etc/ld.so.cache", cache())
    put(workdir + "/libfoo.so.1", ELF)
    put(measure, MEASURE.format(hook=installation.program("chandler-hook"), log=peaks).encode())
    os.chmod(measure, 0o755)
    hooks = [
        "--link",
        "libfoo.so.1::/usr/lib/libfoo.so",
        "--",
        "update-ldcache",
        "--folder",
        "/usr/lib",
        "--",
        "enable-cuda-compat",
        "--host-driver-version",
        "550.1",
    ]
    edits = {
        "mounts": [{"hostPath": workdir + "/libfoo.so.1", "containerPath": LIBRARY, "options": ["ro", "bind"]}],
        "hooks": [
            {"hookName": "createContainer", "path": measure, "args": ["chandler-hook", "create-symlinks", *hooks]}
        ],
    }
    file = {
        "cdiVersion": "0.6.0",
        "kind": KIND,
        "containerEdits": edits,
        "devices": [{"name": "0", "containerEdits": {"env": ["X=1"]}}],
    }
    os.makedirs(workdir + "/cdi")
    put(workdir + "/cdi/hooks.json", json.dumps(file).encode())
    installation.configure([runtime.path], [workdir + "/cdi"], f'[policy]\nkinds = ["{KIND}"]\nallow = ["gpu"]\n')
    installation.refresh()
    return installation, victim, peaks


@pytest.fixture
def world(lab: str, runtime: Runtime, workdir: str) -> Iterator[Lab]:
    installation, victim, peaks = equipped(lab, runtime)
    engine = Engine(
        [*runtime.wrap, installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
    )
    put(peaks, b"")
    yield Lab(engine, workdir, victim, peaks)
    engine.clean()


def put(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def cache() -> bytes:
    return ldsocache.write([(ldsocache.FLAGS, b"libc.so.6", b"/lib/libc.so.6", 0, 0)])


def snapshot(victim: str) -> list[object]:
    """All that a hook could have changed of the host."""
    found: list[object] = []
    for path in HOST_PATHS:
        state = os.lstat(path)
        found.append((path, state.st_ino, state.st_size, state.st_mtime_ns))
    for directory, names, files in sorted(os.walk(victim)):
        for name in sorted([".", *names, *files]):
            path = os.path.join(directory, name)
            state = os.lstat(path)
            content = b""
            if stat.S_ISREG(state.st_mode):
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).digest()
            found.append((path, state.st_mode, state.st_ino, state.st_mtime_ns, content))
    return found


# --- what an image may hold; `root` is its root file system, `victim` the tree of the host -----------------------

Hostile = Callable[[str, str], None]
CASES: dict[str, Hostile] = {}
RUNTIME_REFUSES: set[str] = set()  # the names of those where runc or crun itself does not mount the library


def case(make: Hostile) -> Hostile:
    CASES[make.__name__] = make
    return make


def case_for_few(make: Hostile) -> Hostile:
    RUNTIME_REFUSES.add(make.__name__)
    return case(make)


def instead(path: str, target: str) -> None:
    """A link in the place of a file or a folder."""
    remove(path)
    os.symlink(target, path)


def remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


@case
def plain(root: str, victim: str) -> None:
    pass


@case
def etc_is_an_absolute_link(root: str, victim: str) -> None:
    instead(root + "/etc", victim + "/etc")


@case
def etc_leads_up(root: str, victim: str) -> None:
    instead(root + "/etc", "../../../../../../../../.." + victim + "/etc")


@case
def etc_leads_through_proc(root: str, victim: str) -> None:
    instead(root + "/etc", "/proc/self/root" + victim + "/etc")


@case
def etc_leads_to_init(root: str, victim: str) -> None:
    instead(root + "/etc", "/proc/1/root/etc")


@case
def etc_is_closed(root: str, victim: str) -> None:
    os.chmod(root + "/etc", 0)


@case
def cache_is_a_link(root: str, victim: str) -> None:
    instead(root + "/etc/ld.so.cache", victim + "/etc/ld.so.cache")


@case
def cache_is_a_fifo(root: str, victim: str) -> None:
    remove(root + "/etc/ld.so.cache")
    os.mkfifo(root + "/etc/ld.so.cache")


@case
def cache_is_a_folder(root: str, victim: str) -> None:
    remove(root + "/etc/ld.so.cache")
    os.mkdir(root + "/etc/ld.so.cache")


@case
def cache_is_a_device(root: str, victim: str) -> None:
    remove(root + "/etc/ld.so.cache")
    os.mknod(root + "/etc/ld.so.cache", 0o666 | stat.S_IFCHR, os.makedev(1, 5))


@case
def cache_is_a_terabyte(root: str, victim: str) -> None:
    os.truncate(root + "/etc/ld.so.cache", 1 << 40)


@case
def cache_is_empty_of_sense(root: str, victim: str) -> None:
    os.truncate(root + "/etc/ld.so.cache", update_ldcache.MAX_CACHE)


@case
def cache_is_a_bomb(root: str, victim: str) -> None:
    put(root + "/etc/ld.so.cache", ldsocache.bomb(22 << 20))


@case
def cache_is_a_bomb_within_the_limit(root: str, victim: str) -> None:
    put(root + "/etc/ld.so.cache", ldsocache.bomb(update_ldcache.MAX_CACHE - 100))


@case
def cache_has_one_name_alone(root: str, victim: str) -> None:
    entry = (ldsocache.FLAGS, b"libfoo.so.1", b"/x/libfoo.so.1", 0, 0)
    put(root + "/etc/ld.so.cache", ldsocache.write([entry] * 250_000))


@case
def drop_ins_are_a_link(root: str, victim: str) -> None:
    instead(root + "/etc/ld.so.conf.d", victim + "/etc/ld.so.conf.d")


@case
def temporary_is_a_folder(root: str, victim: str) -> None:
    os.mkdir(root + "/etc/.ld.so.cache.chandler")


@case
def temporary_is_a_link(root: str, victim: str) -> None:
    os.symlink(victim + "/x", root + "/etc/.ld.so.cache.chandler")


@case
def temporary_is_a_fifo(root: str, victim: str) -> None:
    os.mkfifo(root + "/etc/.ld.so.cache.chandler")


@case_for_few
def libraries_lead_out(root: str, victim: str) -> None:
    instead(root + "/usr/lib", victim)


@case_for_few
def libraries_are_a_fifo(root: str, victim: str) -> None:
    remove(root + "/usr/lib")
    os.mkfifo(root + "/usr/lib")


@case_for_few
def usr_leads_up(root: str, victim: str) -> None:
    instead(root + "/usr", "../../../../../../../.." + victim)


@case
def link_is_a_folder(root: str, victim: str) -> None:
    os.mkdir(root + "/usr/lib/libfoo.so")


@case
def link_leads_out(root: str, victim: str) -> None:
    os.symlink(victim + "/y", root + "/usr/lib/libfoo.so")


@case_for_few
def links_in_a_circle(root: str, victim: str) -> None:
    instead(root + "/usr/lib", "lib")


@case_for_few
def links_in_a_long_chain(root: str, victim: str) -> None:
    shutil.rmtree(root + "/usr/lib")
    path = "/usr/lib"
    for number in range(60):
        os.symlink(f"/c{number}", root + path)
        path = f"/c{number}"
    os.mkdir(root + path)


@case
def more_libraries_than_anybody_has(root: str, victim: str) -> None:
    for number in range(update_ldcache.MAX_NAMES + 1000):
        os.close(os.open(f"{root}/usr/lib/lib{'x' * 200}{number:06}.so", os.O_CREAT | os.O_WRONLY))


@case
def compat_leads_out(root: str, victim: str) -> None:
    os.makedirs(root + "/usr/local/cuda")
    os.symlink(victim, root + "/usr/local/cuda/compat")


@case
def compat_has_odd_versions(root: str, victim: str) -> None:
    os.makedirs(root + "/usr/local/cuda/compat")
    for name in ("libcuda.so.999.1", "libcuda.so.1\n", "libcuda.so.99999.1", "libcuda.so.٣.1"):
        put(f"{root}/usr/local/cuda/compat/{name}", b"x")


@case
def compat_has_no_files(root: str, victim: str) -> None:
    os.makedirs(root + "/usr/local/cuda/compat")
    os.mkfifo(root + "/usr/local/cuda/compat/libcuda.so.999.1")
    os.mknod(root + "/usr/local/cuda/compat/libcuda.so.998.1", 0o666 | stat.S_IFCHR, os.makedev(4, 0))


@case
def every_program_would_load_a_library(root: str, victim: str) -> None:
    put(root + "/etc/ld.so.preload", b"/evil.so\n")
    put(root + "/evil.so", ELF)


ENV = ["LD_PRELOAD=/evil.so", "LD_LIBRARY_PATH=/proc/self/cwd", "PYTHONPATH=/evil", "PYTHONHOME=/evil", "PATH=/bin"]


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_the_host_stays_as_it_is(world: Lab, name: str) -> None:
    root = bundle.rootfs(os.path.join(world.workdir, "rootfs"))
    os.makedirs(root + "/etc/ld.so.conf.d")
    put(root + "/etc/ld.so.cache", cache())
    CASES[name](root, world.victim)
    made = bundle.make(
        os.path.join(world.workdir, "b"),
        ["echo", "it runs"],
        bundle.request(resources={"gpu": {"vendor": KIND, "devices": ["0"]}}),
        ENV,
        root,
    )
    before = snapshot(world.victim)
    done = world.engine.run(made, "hostile", check=False)
    assert snapshot(world.victim) == before
    with open(world.peaks, encoding="ascii") as file:
        peaks = [int(line) for line in file]
    assert done.stdout == "it runs\n" or name in RUNTIME_REFUSES, (done.stdout, done.stderr)
    assert len(peaks) == int(done.stdout == "it runs\n") and max(peaks, default=0) < MAX_PEAK
    assert "Traceback" not in done.stderr
