"""Generated files in real containers: nodes that open, libraries that are found, links, and no other GPU."""

from __future__ import annotations

import os
import pathlib
import shutil
import stat
import subprocess
from collections.abc import Iterator

import pytest
from generate import hosts
from lab import bundle, install
from lab import node as lab_node
from lab.engine import Engine
from lab.runtimes import Runtime

from shim.generate import cdi_file, generators
from shim.generate.model import Options
from shim.generate.tree import HostTree

LIB = "/usr/lib/x86_64-linux-gnu"
RUNTIMES = pytest.mark.parametrize("runtime", ["runc", "crun", "youki"], indirect=True)
PROBE = (
    'for d in "$@"; do if (: < $d) 2>/tmp/why; then echo "$d opens"; else busybox sed "s|.*: |$d |" /tmp/why; fi; done'
)


class Gpus:
    """A driver root with real device nodes that open, and what /proc and /sys would say of it."""

    def __init__(self, directory: str, count: int, installed: install.Installation) -> None:
        self.root = os.path.join(directory, "driver")
        host = hosts.nvidia(count, LIB, self.root)
        host.nvml = hosts.nvml(count)
        self.numbers: dict[str, tuple[int, int]] = {}
        free = (pair for pair in lab_node.candidates() if self.opens(directory, *pair))
        for path in list(host.nodes):
            if path.startswith("/dev/dri/card"):
                del host.nodes[path]
        for path in sorted(host.nodes):
            major, minor = self.numbers[path] = next(free)
            made = self.root + path
            os.makedirs(os.path.dirname(made), exist_ok=True)
            os.mknod(made, stat.S_IFCHR | 0o660, os.makedev(major, minor))
            mode, group = host.nodes[path][3:]
            os.chmod(made, mode)
            os.chown(made, 0, group)
            host.nodes.pop(path)
        for path in [path for path in host.files if "/drm/card" in path]:
            del host.files[path]
        for path in [path for path in host.links if path.startswith("/dev/dri")]:
            host.links[self.root + path] = host.links.pop(path)
        tree = host.build(os.path.join(directory, "fixture"))
        shutil.copytree(tree.at(self.root), self.root, dirs_exist_ok=True, symlinks=True)
        tree = HostTree(elsewhere={"/proc": tree.at("/proc"), "/sys": tree.at("/sys")})
        found, _ = generators.describe(
            "nvidia", tree, Options(self.root, hook=installed.program("chandler-hook")), host.ask
        )
        assert found is not None
        self.cdi = os.path.join(directory, "cdi")
        os.mkdir(self.cdi)
        (pathlib.Path(self.cdi) / "chandler-nvidia.json").write_bytes(cdi_file.render(found))

    @staticmethod
    def opens(directory: str, major: int, minor: int) -> bool:
        path = os.path.join(directory, "probe")
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        try:
            return lab_node.opens(path)
        finally:
            os.unlink(path)


@pytest.fixture(scope="module")
def gpus(lab: str) -> Gpus:
    directory = os.path.join(lab, "generated")
    os.mkdir(directory)
    return Gpus(directory, 3, install.Installation(os.path.join(lab, "generating")))


@pytest.fixture
def engine(runtime: Runtime, gpus: Gpus, workdir: str, lab: str) -> Iterator[Engine]:
    installed = install.Installation(os.path.join(lab, "generating-" + runtime.label))
    if not os.path.exists(installed.state):
        installed.configure([runtime.path], [gpus.cdi])
        installed.refresh()
    made = Engine([*runtime.wrap, installed.program()], os.path.join(workdir, "root"))
    yield made
    made.clean()


def output(engine: Engine, made: bundle.Bundle) -> str:
    """What a container writes. Not by `run`, because youki's sometimes hangs with a container that ends at once."""
    engine.create(made, "c1")
    engine.call("start", "c1")
    engine.wait("c1", "stopped")
    engine.delete("c1", "--force")
    return made.output()


@RUNTIMES
def test_nodes_libraries_links_and_no_other_gpu(engine: Engine, gpus: Gpus, workdir: str) -> None:
    others = [
        f"mknod /dev/made{n} c {major} {minor}"
        for n, (path, (major, minor)) in enumerate(gpus.numbers.items())
        if path == "/dev/nvidia2"
    ]
    look = f"ls -d /dev/nvidia*; ls {LIB}; ls /dev/dri/by-path; id; {others[0]}; " + PROBE
    other = others[0].split()[1]
    made = bundle.make(
        os.path.join(workdir, "b"),
        ["sh", "-c", look, "sh", "/dev/nvidia0", "/dev/nvidiactl", "/dev/dri/renderD129", f"{LIB}/libcuda.so", other],
        {**bundle.pod(), **bundle.request(resources={"gpu": {"count": 2}})},
    )
    shutil.copy("/etc/ld.so.cache", os.path.join(made.directory, "rootfs/etc/ld.so.cache"))
    seen = output(engine, made).splitlines()
    assert [line for line in seen if line.startswith("/dev/nvidia") and " " not in line] == [
        "/dev/nvidia-modeset",
        "/dev/nvidia-uvm",
        "/dev/nvidia-uvm-tools",
        "/dev/nvidia0",
        "/dev/nvidia1",
        "/dev/nvidiactl",
    ]
    assert {
        "libcuda.so",
        "libcuda.so.1",
        f"libcuda.so.{hosts.VERSION}",
        "libnvidia-ml.so.1",
        "libGLX_indirect.so.0",
        "vdpau",
    } <= set(seen)
    assert {f"pci-{hosts.address(n)}-render" in seen for n in (0, 1)} == {
        True
    } and f"pci-{hosts.address(2)}-render" not in seen
    assert any("105" in line for line in seen if line.startswith("uid="))
    assert seen[-5:] == [
        "/dev/nvidia0 opens",
        "/dev/nvidiactl opens",
        "/dev/dri/renderD129 opens",
        f"{LIB}/libcuda.so opens",
        f"{other} Operation not permitted",
    ]


@RUNTIMES
def test_the_loader_knows_the_libraries(engine: Engine, gpus: Gpus, workdir: str) -> None:
    """The fixture's libraries are not real; a real library of this host stands in for libcuda."""
    library = os.path.join(gpus.root + LIB, f"libcuda.so.{hosts.VERSION}")
    shutil.copy(os.path.realpath("/lib/x86_64-linux-gnu/libdl.so.2"), library + ".new")
    os.rename(library + ".new", library)
    made = bundle.make(
        os.path.join(workdir, "b"), ["true"], {**bundle.pod(), **bundle.request(resources={"gpu": {"count": 1}})}
    )
    root = os.path.join(made.directory, "rootfs")
    shutil.copy("/etc/ld.so.cache", os.path.join(root, "etc/ld.so.cache"))
    output(engine, made)
    shown = subprocess.run(
        ["/sbin/ldconfig", "-p", "-C", os.path.join(root, "etc/ld.so.cache")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"libcuda.so.1 (libc6,x86-64) => {LIB}/libcuda.so.1" in shown
    assert f"libcuda.so (libc6,x86-64) => {LIB}/libcuda.so" in shown


@RUNTIMES
def test_hooks_never_see_the_containers_environment(engine: Engine, workdir: str) -> None:
    """CVE-2025-23266: the image sets LD_PRELOAD and contains Python modules; nothing of it is loaded on the host."""
    canary = os.path.join(workdir, "canary")
    made = bundle.make(
        os.path.join(workdir, "b"),
        ["true"],
        {**bundle.pod(), **bundle.request(resources={"gpu": {"count": 1}})},
        [
            "LD_PRELOAD=/evil.so",
            "LD_LIBRARY_PATH=/",
            "PYTHONPATH=/",
            "PYTHONSTARTUP=/json.py",
            "PATH=/:/bin",
            "ENV=/evil.sh",
            "BASH_ENV=/evil.sh",
        ],
    )
    root = os.path.join(made.directory, "rootfs")
    for name in ("json.py", "os.py", "ctypes.py", "sitecustomize.py", "hooks.py", "evil.so"):
        with open(os.path.join(root, name), "w", encoding="ascii") as file:
            file.write(f"open({canary!r}, 'w')\n")
    for name in ("python3", "readlink", "sh", "evil.sh"):
        with open(os.path.join(root, name), "w", encoding="ascii") as file:
            file.write(f"#!/bin/sh\necho > {canary}\n")
        os.chmod(os.path.join(root, name), 0o755)
    assert output(engine, made) == ""
    assert os.readlink(f"{root}{LIB}/libcuda.so") == "libcuda.so.1"
    assert not os.path.exists(canary)


@RUNTIMES
def test_a_stale_file_is_named_with_both_drivers(engine: Engine, gpus: Gpus, workdir: str) -> None:
    library = os.path.join(gpus.root + LIB, f"libnvidia-ml.so.{hosts.VERSION}")
    os.rename(library, library + ".away")
    try:
        made = bundle.make(
            os.path.join(workdir, "b"), ["true"], {**bundle.pod(), **bundle.request(resources={"gpu": {"count": 1}})}
        )
        done = engine.create(made, "c1", check=False)
    finally:
        os.rename(library + ".away", library)
    assert done.returncode != 0
    assert (
        "chandler-nvidia.json" in done.stderr
        and f"made for driver {hosts.VERSION}" in done.stderr
        and "chandler cdi generate" in done.stderr
    )
