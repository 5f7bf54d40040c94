"""update-ldcache: a program in the container finds a mounted library; a hostile image changes nothing outside."""

from __future__ import annotations

import os
import pathlib
import shutil
import stat
import subprocess
from collections.abc import Callable

import pytest
from lab import ldsocache
from lab.hook_world import World

from shim.generate import ldcache

FOLDER = "/opt/driver/lib"
UPDATE = ("update-ldcache", "--folder", FOLDER)
LDCONFIG = "/sbin/ldconfig"
CACHE = "/etc/ld.so.cache"

needs_cache = pytest.mark.skipif(not os.path.exists(CACHE), reason="this host has no loader cache")


@pytest.fixture
def world(tmp_path: pathlib.Path, needs_mounts: None) -> World:
    return World(str(tmp_path))


def cache_of(*entries: ldcache.Entry) -> bytes:
    return ldsocache.write([fields(entry) for entry in entries])


def fields(entry: ldcache.Entry) -> tuple[int, bytes, bytes, int, int]:
    return entry.flags, entry.key, entry.value, entry.version, entry.hardware


def elf(machine: int = 62) -> bytes:
    return b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0" + machine.to_bytes(2, "little") + bytes(44)


def equipped(world: World) -> None:
    """A library of the host mounted in the image, and the links to it."""
    world.bind(world.put(world.directory + "/driver/libcuda.so.550.54.15", elf()), FOLDER + "/libcuda.so.550.54.15")
    world.link(FOLDER + "/libcuda.so.1", "libcuda.so.550.54.15")
    world.image(CACHE, cache_of(ldcache.Entry(0x0303, b"libc.so.6", b"/lib/x86_64-linux-gnu/libc.so.6", 0, 0)))


def keys(world: World) -> list[tuple[bytes, bytes]]:
    return [(entry.key, entry.value) for entry in ldcache.Cache(pathlib.Path(world.root + CACHE).read_bytes())]


# --- the file format ------------------------------------------------------------------------------------------


@needs_cache
def test_the_hosts_cache_survives_reading_and_writing(tmp_path: pathlib.Path) -> None:
    data = pathlib.Path(CACHE).read_bytes()
    cache = ldcache.Cache(data)
    again = cache.build()
    assert (
        list(map(fields, ldcache.Cache(again))) == list(map(fields, cache))
        and ldcache.Cache(again).hardware() == cache.hardware()
    )
    (tmp_path / "cache").write_bytes(again)
    shown = [
        subprocess.run([LDCONFIG, "-p", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        for path in (CACHE, str(tmp_path / "cache"))
    ]
    assert [line for line in shown[1] if "=>" in line] == [line for line in shown[0] if "=>" in line]


@needs_cache
def test_compare_orders_names_as_glibc_does() -> None:
    entries = list(ldcache.Cache(pathlib.Path(CACHE).read_bytes()))
    assert len(entries) > 10
    assert all(ldcache.compare(one.key, other.key) >= 0 for one, other in zip(entries, entries[1:]))


@pytest.mark.parametrize(
    "one, other, sign",
    [
        (b"liba.so.1", b"liba.so.2", -1),
        (b"liba.so.10", b"liba.so.9", 1),
        (b"liba.so", b"liba.so.1", -1),
        (b"lib1", b"liba", 1),
        (b"liba", b"lib1", -1),
        (b"x", b"x", 0),
        (b"", b"", 0),
        (b"a01", b"a1", 0),
        (b"a4294967296", b"a0", 0),
    ],
)
def test_numbers_in_names_are_compared_as_numbers(one: bytes, other: bytes, sign: int) -> None:
    found = ldcache.compare(one, other)
    assert (found > 0) - (found < 0) == sign


def test_names_of_hardware_capabilities_survive(tmp_path: pathlib.Path) -> None:
    entry = ldcache.Entry(0x0303, b"liba.so.1", b"/lib/glibc-hwcaps/x86-64-v3/liba.so.1", 0, 1 << 62)
    cache = ldcache.Cache(ldsocache.write([fields(entry)], [b"x86-64-v3"]))
    added = ldcache.Entry(0x0303, b"libb.so.1", b"/lib/libb.so.1", 0, 0)
    assert cache.insert(added)
    made = ldcache.Cache(cache.build())
    assert list(map(fields, made)) == [fields(added), fields(entry)] and made.hardware() == [b"x86-64-v3"]
    path = tmp_path / "cache"
    path.write_bytes(made.build())
    if os.path.exists(LDCONFIG):
        shown = subprocess.run([LDCONFIG, "-p", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        assert 'hwcap: "x86-64-v3"' in shown


def test_an_old_form_before_the_new_one_is_skipped() -> None:
    new = cache_of(ldcache.Entry(0x0303, b"liba.so.1", b"/lib/liba.so.1", 0, 0))
    for count in (0, 1, 2, 3):
        old = b"ld.so-1.7.0\0" + count.to_bytes(4, "little") + bytes(12 * count)
        assert ldcache.paths(old + bytes(-len(old) % 8) + new, "liba.so.1") == ["/lib/liba.so.1"]


def test_damage_is_noticed() -> None:
    good = cache_of(*(ldcache.Entry(0x0303, b"lib%d.so" % n, b"/lib/lib%d.so" % n, 0, 0) for n in range(9, 0, -1)))
    for end in range(len(good)):
        with pytest.raises(ldcache.Damaged):
            ldcache.Cache(good[:end])
    for workdir in range(0, len(good)):
        for value in (0, 255):
            try:
                cache = ldcache.Cache(good[:workdir] + bytes([value]) + good[workdir + 1 :])
                cache.insert(ldcache.Entry(0x0303, b"lib5.so", b"/x/lib5.so", 0, 0))
                cache.build()
            except ldcache.Damaged:
                pass


# --- in a container -------------------------------------------------------------------------------------------

PROGRAM = """
#include <dlfcn.h>
#include <stdio.h>
int main(void) { void *l = dlopen("libnvtest.so.1", RTLD_NOW); puts(l ? "found" : dlerror()); return !l; }
"""


@pytest.mark.usefixtures("needs_chroot")
def test_a_program_finds_the_library(world: World, tmp_path: pathlib.Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("not installed: gcc")
    world.put(str(tmp_path / "p.c"), PROGRAM)
    world.put(str(tmp_path / "l.c"), "int x;\n")
    os.makedirs(world.root + "/bin")
    library = str(tmp_path / "driver/libnvtest.so.550.54.15")
    os.makedirs(os.path.dirname(library))
    subprocess.run([gcc, "-o", world.root + "/bin/p", str(tmp_path / "p.c"), "-ldl"], check=True)
    subprocess.run([gcc, "-shared", "-Wl,-soname,libnvtest.so.1", "-o", library, str(tmp_path / "l.c")], check=True)
    for name in subprocess.run(
        ["ldd", world.root + "/bin/p"], capture_output=True, text=True, check=True
    ).stdout.split():
        if name.startswith("/"):
            os.makedirs(os.path.dirname(world.root + name), exist_ok=True)
            shutil.copy(os.path.realpath(name), world.root + name)
    world.image("/etc/ld.so.conf", "include /etc/ld.so.conf.d/*.conf\n")
    os.makedirs(world.root + "/etc/ld.so.conf.d")
    subprocess.run([LDCONFIG, "-r", world.root], check=True)
    world.bind(library, FOLDER + "/libnvtest.so.550.54.15")
    look = f"chroot {world.root} /bin/p"
    links = ("create-symlinks", "--link", f"libnvtest.so.550.54.15::{FOLDER}/libnvtest.so.1")
    assert "found" not in world.run(*links, after=look).stdout
    done = world.run(*links, "--", *UPDATE, after=look)
    assert (done.stdout, done.stderr, done.returncode) == ("found\n", "", 0)
    done = world.run(*UPDATE, after=f"{LDCONFIG} -r {world.root}; {look}")
    assert done.stdout == "found\n", "a later ldconfig in the container keeps the folder"
    assert world.run(*UPDATE).returncode == 0


def test_mounted_libraries_and_links_to_them_are_added(world: World) -> None:
    equipped(world)
    world.image(FOLDER + "/libown.so.1", elf())  # the image's own library is left alone
    world.bind(world.put(world.directory + "/driver/other", elf(183)), FOLDER + "/libarm.so.1")
    world.bind(world.put(world.directory + "/driver/text", "INPUT(libx)"), FOLDER + "/libtext.so.1")
    os.makedirs(world.root + "/etc/ld.so.conf.d")
    done = world.run(*UPDATE)
    assert (done.returncode, done.stderr) == (0, "")
    assert keys(world) == [
        (b"libcuda.so.550.54.15", b"/opt/driver/lib/libcuda.so.550.54.15"),
        (b"libcuda.so.1", b"/opt/driver/lib/libcuda.so.1"),
        (b"libc.so.6", b"/lib/x86_64-linux-gnu/libc.so.6"),
        (b"libarm.so.1", b"/opt/driver/lib/libarm.so.1"),
    ]
    assert pathlib.Path(world.root + "/etc/ld.so.conf.d/00-chandler.conf").read_text() == FOLDER + "\n"
    before = pathlib.Path(world.root + CACHE).read_bytes()
    assert world.run(*UPDATE).returncode == 0
    assert pathlib.Path(world.root + CACHE).read_bytes() == before


def test_an_image_without_a_cache_is_left_alone(world: World) -> None:
    equipped(world)
    os.unlink(world.root + CACHE)
    os.makedirs(world.root + "/etc/ld.so.conf.d")
    done = world.run(*UPDATE)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(world.root + "/etc/ld.so.conf.d") == [] and not os.path.exists(world.root + CACHE)
    shutil.rmtree(world.root + "/etc")
    assert world.run(*UPDATE).returncode == 0
    assert not os.path.exists(world.root + "/etc")


def cache_is_fifo(world: World) -> None:
    os.unlink(world.root + CACHE)
    os.mkfifo(world.root + CACHE)


def cache_is_link(world: World) -> None:
    os.unlink(world.root + CACHE)
    shutil.copy("/etc/ld.so.cache", world.host + "/cache")
    world.link(CACHE, world.host + "/cache")


def cache_is_folder(world: World) -> None:
    os.unlink(world.root + CACHE)
    os.makedirs(world.root + CACHE + "/x")


def cache_is_rubbish(world: World) -> None:
    world.image(CACHE, os.urandom(10000))


def cache_promises_too_much(world: World) -> None:
    world.image(CACHE, b"glibc-ld.so.cache1.1" + b"\xff" * 28)


def etc_is_a_link(world: World) -> None:
    os.rename(world.root + "/etc", world.host + "/etc")
    world.link("/etc", world.host + "/etc")


def etc_is_a_mount(world: World) -> None:
    shutil.copytree(world.root + "/etc", world.host + "/etc")
    world.bind(world.host + "/etc", "/etc")


def cache_is_a_mount(world: World) -> None:
    shutil.copy(world.root + CACHE, world.host + "/cache")
    world.bind(world.host + "/cache", CACHE)


def temporary_is_a_link(world: World) -> None:
    world.link("/etc/.ld.so.cache.chandler", world.host + "/secret")


def drop_ins_are_a_link(world: World) -> None:
    world.link("/etc/ld.so.conf.d", world.host)


def drop_in_is_a_link(world: World) -> None:
    world.link("/etc/ld.so.conf.d/00-chandler.conf", world.host + "/secret")


def drop_in_is_a_fifo(world: World) -> None:
    os.makedirs(world.root + "/etc/ld.so.conf.d")
    os.mkfifo(world.root + "/etc/ld.so.conf.d/00-chandler.conf")


def libraries_are_odd(world: World) -> None:
    os.mkfifo(world.root + FOLDER + "/libfifo.so.1")
    world.bind(world.host, FOLDER + "/mounted")
    os.mkfifo(world.directory + "/fifo")
    world.image(FOLDER + "/libpipe.so.1")
    world.mounts.append(f"mount --bind {world.directory}/fifo {world.root}{FOLDER}/libpipe.so.1")
    world.link(FOLDER + "/libout.so.1", world.host + "/secret")
    world.link(FOLDER + "/libloop.so.1", "libloop.so.1")


def folder_is_a_link(world: World) -> None:
    shutil.rmtree(world.root + "/opt")
    world.mounts = []
    world.link("/opt", world.host)


HOSTILE: list[Callable[[World], None]] = [
    cache_is_fifo,
    cache_is_link,
    cache_is_folder,
    cache_is_rubbish,
    cache_promises_too_much,
    etc_is_a_link,
    etc_is_a_mount,
    cache_is_a_mount,
    temporary_is_a_link,
    drop_ins_are_a_link,
    drop_in_is_a_link,
    drop_in_is_a_fifo,
    libraries_are_odd,
    folder_is_a_link,
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_image_changes_nothing_on_the_host(world: World, hostile: Callable[[World], None]) -> None:
    equipped(world)
    hostile(world)
    before = world.snapshot()
    done = world.run(*UPDATE)
    assert done.returncode == 0, done.stderr
    assert world.snapshot() == before
    if stat.S_ISREG(os.lstat(world.root + CACHE).st_mode) and hostile not in (
        cache_is_rubbish,
        cache_promises_too_much,
        cache_is_a_mount,
    ):
        ldcache.Cache(pathlib.Path(world.root + CACHE).read_bytes())
    else:
        assert "was left as it is" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--folder"],
        ["--folder", "relative"],
        ["--folder", "/a\nb"],
        ["--ldconfig", "/x"],
        ["--folder", "/" + "x" * 1024],
        ["--folder", "/x"] * 257,
    ],
)
def test_invalid_arguments_are_refused(world: World, words: list[str]) -> None:
    done = world.run("update-ldcache", *words)
    assert done.returncode == 1 and done.stderr.startswith("chandler-hook: update-ldcache: ")


# --- enable-cuda-compat ---------------------------------------------------------------------------------------

COMPAT = "/usr/local/cuda/compat"


def compat(world: World, host: str, *, version: str = "560.35.03") -> list[bytes]:
    """Where libcuda.so.1 is found, best first, in an image that brings its own."""
    equipped(world)
    world.image(f"{COMPAT}/libcuda.so.{version}", elf())
    world.link(f"{COMPAT}/libcuda.so.1", f"libcuda.so.{version}")
    os.makedirs(world.root + "/etc/ld.so.conf.d")
    done = world.run(*UPDATE, "--", "enable-cuda-compat", f"--host-driver-version={host}")
    assert (done.returncode, done.stderr) == (0, "")
    return [value for key, value in keys(world) if key == b"libcuda.so.1"]


def test_the_images_newer_library_comes_first(world: World) -> None:
    assert compat(world, "550.54.15") == [b"/usr/local/cuda/compat/libcuda.so.1", b"/opt/driver/lib/libcuda.so.1"]
    assert sorted(os.listdir(world.root + "/etc/ld.so.conf.d")) == ["00-chandler-compat.conf", "00-chandler.conf"]


@pytest.mark.parametrize("host", ["560.28.03", "570.1.1", "560.35"])
def test_a_library_that_is_not_newer_is_not_used(world: World, host: str) -> None:
    assert compat(world, host) == [b"/opt/driver/lib/libcuda.so.1"]


def test_a_mounted_library_does_not_count_as_the_images(world: World) -> None:
    world.bind(world.host + "/lib", COMPAT)
    world.put(world.host + "/lib/libcuda.so.999.1", elf())
    before = world.snapshot()
    equipped(world)
    assert world.run("enable-cuda-compat", "--host-driver-version", "550.54.15").returncode == 0
    assert keys(world) == [(b"libc.so.6", b"/lib/x86_64-linux-gnu/libc.so.6")] and world.snapshot() == before


@pytest.mark.parametrize(
    "words",
    [[], ["--host-driver-version"], ["--host-driver-version", "550"], ["--host-driver-version=x.y"], ["--x=550.1"]],
)
def test_an_invalid_version(world: World, words: list[str]) -> None:
    assert world.run("enable-cuda-compat", *words).returncode == 1
