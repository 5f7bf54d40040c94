"""The packages on a machine with systemd: installed, used by containerd, upgraded, removed, purged."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lab import REPOSITORY, bundle
from lab.containerd import RELEASES, Containerd
from lab.cri import CRI
from lab.engine import Engine
from lab.node import Node
from lab.plugin import until

from shim.paths import VERSION

OWN_MACHINE = True
NEWER = f"{VERSION}+upgrade"
CODE = "/usr/lib/chandler"
TAG = sys.implementation.cache_tag
ONE = bundle.request(resources={"gpu": {"count": 1}})
PLUGINS = ["chandler-nri.service", "chandler-kubelet-plugin.service"]
# A package that has the interpreter.
PYTHON3 = """
Name: python3
Version: 99
Release: 1
Summary: stands for the interpreter
License: none
BuildArch: noarch
%description
%install
mkdir -p %{buildroot}/usr/bin
cp -P /usr/bin/python3 %{buildroot}/usr/bin
%files
/usr/bin/python3
"""
# Where a package may leave something; all that is there, or the names alone where there is too much.
TREES = (
    "/etc",
    "/run/chandler",
    "/usr/bin",
    "/usr/lib/chandler",
    "/usr/lib/systemd/system",
    "/usr/lib/udev",
    "/usr/share/bash-completion",
    "/usr/share/fish",
    "/usr/share/zsh",
    "/usr/share/man",
    "/usr/share/doc/chandler",
    "/var/lib/chandler",
)
NAMES = ("/", "/usr/lib", "/usr/share", "/usr/share/doc", "/var/log")


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


def state(unit: str) -> tuple[str, str]:
    return sh("systemctl", "is-active", unit, check=False).strip(), sh(
        "systemctl", "is-enabled", unit, check=False
    ).strip()


def files() -> set[str]:
    found = {
        os.path.join(where, name)
        for top in TREES
        for where, folders, names in os.walk(top)
        for name in (*names, *folders)
    }
    found |= {os.path.join(top, name) for top in NAMES for name in os.listdir(top)}
    found |= {top for top in TREES if os.path.lexists(top)}
    return {path for path in found if "chandler" in path}  # the host may be at work, and the machine sees it


def move_module(tree: Path, module: str, name: str) -> None:
    """Rename a module, and what imports it from its package."""
    path = tree / module
    path.rename(path.with_name(name + ".py"))
    package = ".".join(Path(module).parent.parts)
    statement = re.compile(rf"^( *from {re.escape(package)} import .*)\b{path.stem}\b", re.M)
    for file in (tree / "shim").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        file.write_text(statement.sub(rf"\1{name} as {path.stem}", text), encoding="utf-8")


def outside(share: Path) -> None:
    """Two packages of each kind; the second one is newer, and its modules have moved."""
    newer = share / "newer"
    shutil.copytree(
        REPOSITORY, newer, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", "tests", ".*_cache")
    )
    move_module(newer, "shim/state/stale.py", "lapsed")
    move_module(newer, "shim/keys/process.py", "program")
    for kind in ("deb", "rpm"):
        for tree, version in ((REPOSITORY, ()), (str(newer), (NEWER,))):
            subprocess.run(
                [f"{tree}/packaging/build-{kind}", *version],
                check=True,
                stdin=subprocess.DEVNULL,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OUT": str(share / f"{kind}s")},
            )


class Package(NamedTuple):
    """An installed package, and a newer one. `before`: the files before its installation."""

    path: str
    newer: str
    before: set[str]


@pytest.fixture(scope="module")
def package() -> Package:
    """Installed by dpkg."""
    first, newer = (f"/share/debs/chandler_{version}_all.deb" for version in (VERSION, NEWER))
    # Every page of the host would be looked into.
    with contextlib.suppress(FileNotFoundError):
        os.unlink("/var/lib/man-db/auto-update")
    before = files()
    sh("dpkg", "--install", first)
    return Package(first, newer, before)


def plugin_pids() -> list[str]:
    return [sh("systemctl", "show", "--value", "--property", "MainPID", plugin).strip() for plugin in PLUGINS]


def launch() -> float:
    try:
        return os.stat("/etc/chandler/launch").st_ctime
    except FileNotFoundError:
        return 0.0


def inventory() -> str:
    return "".join(sorted(os.path.basename(path) for path in glob.glob("/run/chandler/inventory/*/*.part")))


def test_units(package: Package) -> None:
    assert state("chandler-refresh.path") == ("active", "enabled")
    assert state("chandler-refresh.service")[1] == "enabled"
    assert [state(plugin) for plugin in PLUGINS] == [("inactive", "disabled")] * 2
    assert state("chandler-mps@GPU-1.service") == ("inactive", "static")
    assert launch() and sh("chandler-runtime", "--version").startswith("runc version")
    assert os.path.exists(f"{CODE}/create-{TAG}.image") and os.path.exists(f"{CODE}/shim/__pycache__/edits.{TAG}.pyc")
    assert "/etc/chandler/config.toml" in sh("dpkg-query", "--show", "-f", "${Conffiles}", "chandler")


def test_a_changed_cdi_file_is_compiled(package: Package) -> None:
    before = inventory()
    os.makedirs("/etc/cdi", exist_ok=True)
    with open("/etc/cdi/new.json", "w", encoding="ascii") as file:
        file.write(
            '{"cdiVersion": "0.6.0", "kind": "example.com/new", '
            '"devices": [{"name": "0", "containerEdits": {"env": ["A=B"]}}]}'
        )
    until(lambda: inventory() != before, "the inventory")
    assert "example.com/new=0" in sh("chandler", "cdi", "list")
    os.unlink("/etc/cdi/new.json")
    until(lambda: inventory() == before, "the inventory, as it was")


@pytest.fixture(scope="module")
def containerd(package: Package, lab: str, gpus: Node) -> Iterator[Containerd]:
    """With the handler that `chandler configure` writes."""
    release = RELEASES[-1]
    if release.missing:
        pytest.skip(release.missing)
    made = Containerd(release, os.path.join(lab, release.label), {}, gpus.cdi, systemd=True)
    config = os.path.join(made.directory, "config.toml")
    sh(
        "chandler",
        "configure",
        "containerd",
        "--config",
        config,
        "--in-place",
        "--programs",
        os.path.dirname(release.binary("containerd")),
    )
    before = os.stat(config).st_mtime_ns
    sh(
        "chandler",
        "configure",
        "containerd",
        "--config",
        config,
        "--in-place",
        "--programs",
        os.path.dirname(release.binary("containerd")),
    )
    assert os.stat(config).st_mtime_ns == before
    os.makedirs("/run/nri", exist_ok=True)
    os.symlink(made.nri, "/run/nri/nri.sock")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def cri(containerd: Containerd) -> Iterator[CRI]:
    with CRI(containerd.socket) as made:
        made.ready()
        yield made


def opens(cri: CRI, container: str) -> str:
    return cri.exec(container, "sh", "-c", "exec 3<>/dev/nvidia0 && echo opened").out


def test_pods(cri: CRI) -> None:
    leasing = cri.run(cri.pod("leasing", ONE, "chandler", cgroup_parent="kubepods.slice"))
    other = cri.run(cri.pod("other", None, "chandler", cgroup_parent="kubepods.slice"), mounts={"/host": "/dev"})
    cri.exec(other, "mknod", "/dev/nvidia0", "c", "195", "0")
    for after in ((), ("systemctl", "daemon-reload"), ("dpkg-trigger", "--no-await", "/usr/bin/python3")):
        if after:
            sh(*after)
        assert opens(cri, leasing) == "opened\n"
        assert "not permitted" in cri.exec(other, "sh", "-c", "exec 3<>/dev/nvidia0").err
    for container in (leasing, other):
        cri.update(container, memory_limit_in_bytes=64 << 20)
    assert opens(cri, leasing) == "opened\n"
    assert "not permitted" in cri.exec(other, "sh", "-c", "exec 3<>/dev/nvidia0").err


def test_containers_live_through_an_upgrade(package: Package, cri: CRI) -> None:
    running, ending = (
        cri.run(cri.pod(name, ONE, "chandler", cgroup_parent="kubepods.slice")) for name in ("through", "between")
    )
    with open("/etc/chandler/config.toml", "a", encoding="utf-8") as file:
        file.write("# mine\n")
    sh("systemctl", "start", *PLUGINS)
    before = plugin_pids()
    sh("dpkg", "--unpack", package.newer)
    # This can last for minutes while other packages are unpacked.
    for command in (["leases"], ["leases", "release", "--stale", "--quiet"], ["refresh", "--quiet"], ["ps"]):
        assert "Traceback" not in sh("chandler", *command)
    cri.remove(ending)  # its hook is the old version's, or the new one's
    assert ending not in sh("chandler", "leases")
    rare = {**ONE, **bundle.request(resources={"gpu": {"count": 1}}, cap_drop=["CAP_MKNOD"])}
    meanwhile = cri.run(cri.pod("meanwhile", rare, "chandler", cgroup_parent="kubepods.slice"))
    assert opens(cri, meanwhile) == "opened\n"
    cri.remove(meanwhile)
    assert meanwhile not in sh("chandler", "leases")
    sh("dpkg", "--configure", "--force-confold", "chandler")
    assert NEWER in sh("dpkg-query", "--show", "chandler")
    assert opens(cri, running) == "opened\n" and running in sh("chandler", "leases")
    cri.remove(running)
    assert running not in sh("chandler", "leases")
    with open("/etc/chandler/config.toml", encoding="utf-8") as file:
        assert file.read().endswith("# mine\n")
    assert state("chandler-refresh.path") == ("active", "enabled")
    assert [state(plugin) for plugin in PLUGINS] == [("active", "disabled")] * 2
    assert not set(plugin_pids()) & {*before, "0"}
    sh("systemctl", "stop", "chandler-nri.service")


def test_another_python(package: Package, cri: CRI, lab: str) -> None:
    """A package with /usr/bin/python3 is installed. Until its trigger has run, creates are only slower."""
    image, compiled = f"{CODE}/create-{TAG}.image", f"{CODE}/shim/__pycache__/edits.{TAG}.pyc"
    old = [
        f"{CODE}/create-cpython-39.image",
        f"{CODE}/shim/__pycache__/edits.cpython-39.pyc",
        f"{CODE}/shim/__pycache__/gone.{TAG}.pyc",
    ]
    for path in old:
        os.link(image if path.endswith("image") else compiled, path)
    sh("find", CODE, "-name", f"*{TAG}*", "!", "-name", "gone*", "-delete")
    running = cri.run(cri.pod("between", ONE, "chandler", cgroup_parent="kubepods.slice"))
    assert opens(cri, running) == "opened\n"
    cri.remove(running)
    assert "nvidia" not in sh("chandler", "leases") and not os.path.exists(image)

    tree = f"{lab}/python3-minimal"
    os.makedirs(f"{tree}/usr/bin")
    os.makedirs(f"{tree}/DEBIAN")
    os.symlink(os.readlink("/usr/bin/python3"), f"{tree}/usr/bin/python3")
    output = sh("dpkg-query", "--status", "python3-minimal")
    with open(f"{tree}/DEBIAN/control", "w", encoding="utf-8") as file:
        file.write(
            "".join(
                line + "\n"
                for line in output.splitlines()
                if not line.startswith(("Status:", "Depends:", "Pre-Depends:"))
            )
        )
    sh("dpkg-deb", "--build", tree, f"{tree}.deb")
    assert "Processing triggers for chandler" in sh("dpkg", "--install", f"{tree}.deb")
    assert os.path.exists(image) and os.path.exists(compiled)
    assert not [path for path in old if os.path.exists(path)]


def write_own(text: str) -> None:
    """Write an administrator's configuration."""
    with open("/etc/chandler/config.d/99-mine.toml", "w", encoding="utf-8") as file:
        file.write(text)


def test_removed_and_purged(package: Package, containerd: Containerd, cri: CRI, gpus: Node, workdir: str) -> None:
    engine = Engine(["/usr/bin/chandler-runtime"], workdir + "/root")
    made = bundle.make(workdir + "/b", ["sleep", "60"], ONE)
    write_own('engines = ["other"]\n')
    engine.create(made, "one")
    config = os.path.join(containerd.directory, "config.toml")
    write_own('[cdi]\ngenerate-dir = "/etc/cdi"\n')
    output = sh("dpkg", "--remove", "chandler")
    assert "one is still there" in output
    assert not os.path.exists(CODE) and not os.path.exists("/usr/bin/chandler-runtime") and not launch()
    assert os.path.exists("/etc/chandler/config.toml") and os.path.exists("/run/chandler/grants")
    assert [state(unit)[0] for unit in ("chandler-refresh.path", PLUGINS[1])] == ["inactive"] * 2
    assert os.path.exists("/var/lib/chandler/allocation.key")
    sh("/usr/sbin/runc", "--root", workdir + "/root", "delete", "--force", "one")
    assert "chandler" in Path(config).read_text(), "a path other than the default is left alone"
    os.unlink("/etc/chandler/config.d/99-mine.toml")
    sh("dpkg", "--purge", "chandler")
    assert files() - package.before == set()
    assert not os.path.exists("/run/chandler")


def test_the_rpm_package(workdir: str) -> None:
    """With rpm's own database, which knows none of the dependencies; dpkg's package has been removed before."""
    sh("dpkg", "--purge", "chandler")
    before = files()

    def rpm(*words: str) -> str:
        return sh("rpm", "--dbpath", f"{workdir}/rpm", "--force-debian", "--nodeps", *words)

    rpm("--install", f"/share/rpms/chandler-{VERSION}-1.noarch.rpm")
    assert state("chandler-refresh.path") == ("active", "enabled")
    assert [state(plugin) for plugin in PLUGINS] == [("inactive", "disabled")] * 2
    image = f"{CODE}/create-{TAG}.image"
    assert launch() and os.path.exists(image)
    config = Path("/etc/chandler/config.toml")
    config.write_text(config.read_text().replace("#engines = []", 'engines = ["other"]') + "# mine\n")
    engine = Engine(["/usr/bin/chandler-runtime"], workdir + "/root")
    engine.create(bundle.make(workdir + "/b", ["sleep", "60"], ONE), "one")
    sh("systemctl", "start", PLUGINS[1])
    plugin = plugin_pids()[1]
    rpm("--upgrade", f"/share/rpms/chandler-{NEWER}-1.noarch.rpm")
    assert plugin_pids() == ["0", plugin_pids()[1]] and plugin_pids()[1] not in (plugin, "0")
    assert (
        NEWER in sh("rpm", "--dbpath", f"{workdir}/rpm", "--query", "chandler")
        and os.path.exists(image)
        and state("chandler-refresh.path") == ("active", "enabled")
    )
    assert config.read_text().endswith("# mine\n")
    assert "one " in sh("chandler", "leases")
    engine.delete("one", "--force")
    assert "one " not in sh("chandler", "leases")

    os.unlink(image)
    with open(f"{workdir}/python3.spec", "w", encoding="utf-8") as file:
        file.write(PYTHON3)
    sh("rpmbuild", "-bb", "--define", f"_topdir {workdir}", f"{workdir}/python3.spec")
    rpm("--install", "--replacefiles", f"{workdir}/RPMS/noarch/python3-99-1.noarch.rpm")
    assert os.path.exists(image)
    rpm("--erase", "--justdb", "python3")

    rpm("--erase", "chandler")
    assert state(PLUGINS[1])[0] == "inactive"
    assert files() - before == {"/etc/chandler", "/etc/chandler/config.toml.rpmsave"}
