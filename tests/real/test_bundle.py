"""Bundles that `chandler bundle` builds, on real runtimes, read back from inside; nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import bundle, cgroups, runtimes
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node
from lab.runtimes import Runtime

Served = Callable[[Runtime], Installation]

ONCE = ["runc", "crun", "youki"]
SHOW = (
    "id; busybox hostname; pwd; env; cat /proc/self/status; cat /proc/self/limits; cat /proc/self/mountinfo; "
    "cat /proc/sys/net/core/somaxconn; "
    "echo x >/no 2>/dev/null || echo read-only; echo y >/data/file && echo written; cat /proc/kcore | busybox wc -c"
)


class Ship:
    """A root file system, a deployment file, and the command."""

    def __init__(self, workdir: str, installation: Installation, wrap: tuple[str, ...] = ()) -> None:
        self.workdir = workdir
        self.installation = installation
        self.wrap = wrap
        self.rootfs = bundle.rootfs(os.path.join(workdir, "image"))
        self.file = os.path.join(workdir, "deployment.yaml")
        with open(os.path.join(self.rootfs, "etc/passwd"), "a", encoding="ascii") as passwd:
            passwd.write("app:x:1234:99::/:/bin/sh\n")
        with open(os.path.join(self.rootfs, "etc/group"), "w", encoding="ascii") as group:
            group.write("video:x:44:app\n")

    def write(self, **service: Any) -> None:
        service.setdefault("cgroup_parent", f"/{bundle.GROUPS}ship")
        with open(self.file, "w", encoding="utf-8") as file:
            own = {key: value for key, value in service.items() if value is not None}
            json.dump(
                {"version": "v1", "deployment": "test", "services": {"web": {"image": {"name": "busybox"}, **own}}},
                file,
            )

    def command(
        self, action: str, *arguments: str, check: bool = True, env: dict[str, str] | None = None, timeout: int = 60
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.wrap, self.installation.program("chandler"), "bundle", action, *arguments],
            input="",
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd=self.workdir,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **(env or {})},
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def create(self, name: str, *arguments: str, **more: Any) -> bundle.Bundle:
        directory = os.path.join(self.workdir, name)
        self.command("create", "--spec", self.file, "--rootfs", self.rootfs, *arguments, directory, **more)
        return bundle.Bundle(directory)


@pytest.fixture
def ship(runtime: Runtime, served: Served, workdir: str) -> Ship:
    return Ship(workdir, served(runtime), runtime.wrap)


def test_a_built_bundle_runs(ship: Ship, direct: Engine, runtime: Runtime) -> None:
    data = os.path.join(ship.workdir, "data")
    os.mkdir(data)
    os.chown(data, 1234, 99)
    limits = {"resources": {"memory": "64Mi", "pids_limit": 50, "cpu": 0.5}} if runtime.limits else {}
    ship.write(
        env={"A": "service", "HOST": "$E:CHANDLER_TEST"},
        user="app",
        hostname="ship",
        ulimits={"nofile": 512},
        cap_drop=["MKNOD"],
        sysctls={"net.core.somaxconn": "77"},
        read_only_root_fs=True,
        extra_groups=[55],
        command={"args": ["sh", "-c", SHOW], "workdir": "/tmp"},
        storage=[
            {"type": "named", "name": "data", "target": "/data"},
            {"type": "tmpfs", "target": "/scratch", "size": "1Mi", "mode": "750"},
        ],
        **limits,
    )
    for path in ("data", "scratch"):
        os.mkdir(os.path.join(ship.rootfs, path))
    made = ship.create("b", "--volume", f"data={data}", "--env", "B=caller", env={"CHANDLER_TEST": "from the host"})
    assert os.stat(made.path).st_mode & 0o777 == 0o600
    seen = direct.run(made, bundle.GROUPS + "c1").stdout
    lines = seen.splitlines()
    assert "uid=1234(app) gid=99" in seen and "44" in lines[0] and "55" in lines[0]
    assert lines[1:3] == ["ship", "/tmp"]
    assert {"A=service", "B=caller", "HOST=from the host", "TERM=xterm", "77", "read-only", "written"} <= set(lines)
    bounding = int(next(line for line in lines if line.startswith("CapBnd")).split()[1], 16)
    assert "NoNewPrivs:\t1" in lines and not bounding >> 27 & 1 and bounding & 1, "CAP_MKNOD is gone, CAP_CHOWN is not"
    assert any(line.startswith("Max open files") and line.split()[3:5] == ["512", "512"] for line in lines)
    assert any(" /scratch " in line and "size=1024k" in line and "mode=750" in line for line in lines)
    assert lines[-1] == "0", "/proc/kcore is masked"
    with open(os.path.join(data, "file"), encoding="ascii") as file:
        assert file.read() == "y\n"
    if os.path.exists(made.log):  # a runtime's
        os.unlink(made.log)
    ship.command("remove", made.directory)
    assert not os.path.exists(made.directory) and os.path.exists(ship.rootfs)


@pytest.mark.parametrize("runtime", [found.label for found in runtimes.known() if found.limits], indirect=True)
def test_limits_are_the_kernel_s(ship: Ship, direct: Engine) -> None:
    ship.write(resources={"memory": "64Mi", "pids_limit": 50}, command={"entrypoint": ["sleep", "60"]})
    made = ship.create("b")
    direct.create(made, bundle.GROUPS + "c2")
    pid = direct.state(bundle.GROUPS + "c2")["pid"]
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", pid) == 64 << 20
    assert cgroups.limit("pids", "pids.max", "pids.max", pid) == 50
    with open(f"/proc/{pid}/cgroup", encoding="ascii") as table:
        assert f"/{bundle.GROUPS}ship/b" in table.read()
    direct.delete(bundle.GROUPS + "c2", "--force")


def test_a_privileged_container(ship: Ship, direct: Engine) -> None:
    ship.write(privileged=True, command={"args": ["sh", "-c", "cat /proc/self/status; cat /proc/self/mountinfo"]})
    seen = direct.run(ship.create("b"), bundle.GROUPS + "c3").stdout
    with open("/proc/self/status", encoding="ascii") as status:
        bounding = next(line.split()[1] for line in status if line.startswith("CapBnd"))
    assert f"CapEff:\t{bounding}" in seen and "NoNewPrivs:\t0" in seen
    assert not any(" /sys " in line and " ro," in line for line in seen.splitlines()) and " /proc/sys " not in seen


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_gpus_of_the_node(runtime: Runtime, direct: Engine, node: Node, workdir: str) -> None:
    """Without leases the bundle is complete, so any runtime can run it."""
    installation = Installation(os.path.join(workdir, "installed"))
    installation.configure([runtime.path], [node.cdi], '[gpu]\nallocator = "fixed"\n')
    ship = Ship(workdir, installation, runtime.wrap)
    ship.write(
        resources={"gpu": {"count": 2}},
        command={"args": ["sh", "-c", "ls /dev; for n in 0 1; do echo <>/dev/nvidia$n && echo opened; done; env"]},
    )
    seen = direct.run(ship.create("b"), bundle.GROUPS + "c4").stdout.splitlines()
    assert {"nvidia0", "nvidia1", "nvidiactl"} <= set(seen) and "nvidia2" not in seen
    assert seen.count("opened") == 2 and "CUDA_VISIBLE_DEVICES=0,1" in seen


# --- chandler bundle run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)  # youki's own run may hang, see lab.engine
@pytest.mark.parametrize("status", [0, 3])
def test_run_builds_runs_and_removes(ship: Ship, status: int) -> None:
    ship.write(env={"A": "b"}, resources={"gpu": {"count": 1}})
    directory = os.path.join(ship.workdir, bundle.GROUPS + "run")
    root = os.path.join(ship.workdir, "root")
    done = ship.command(
        "run",
        "--spec",
        ship.file,
        "--rootfs",
        ship.rootfs,
        f"--runtime-arg=--root={root}",
        directory,
        "--args",
        "sh",
        "-c",
        f"echo $A; ls /dev; exit {status}",
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.splitlines()[0] == "b" and "nvidia0" in done.stdout
    assert not os.path.exists(directory) and os.listdir(root) == []


class Leased:
    def __init__(self, runtime: Runtime, node: Node, workdir: str) -> None:
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.installation.configure([runtime.path], [node.cdi], '[gpu]\nallocator = "leases"\n')
        self.installation.refresh()
        self.ship = Ship(workdir, self.installation, runtime.wrap)
        self.engine = Engine(
            [*runtime.wrap, self.installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
        )

    def leases(self) -> list[str]:
        done = subprocess.run(
            [self.installation.program("chandler"), "leases", "--format", "json"],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
        )
        return [lease["id"] for lease in json.loads(done.stdout)]


@pytest.fixture
def leased(runtime: Runtime, node: Node, workdir: str) -> Iterator[Leased]:
    made = Leased(runtime, node, workdir)
    yield made
    made.engine.clean()


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_with_leases_only_a_container_holds_a_gpu(leased: Leased, node: Node) -> None:
    """A bundle holds nothing. A container takes free GPUs when it is created."""
    leased.ship.write(resources={"gpu": {"count": len(node.gpus)}}, command={"args": ["sleep", "60"]})
    first, second = (leased.ship.create(name) for name in ("b1", "b2"))
    assert leased.leases() == []
    name, other = bundle.GROUPS + "l1", bundle.GROUPS + "l2"
    leased.engine.create(first, name)
    assert leased.leases() == [name] and len(first.config["linux"]["devices"]) >= len(node.gpus)
    done = leased.engine.create(second, other, check=False)
    assert done.returncode != 0 and f"{name} holds" in done.stdout
    leased.engine.delete(name, "--force")
    leased.engine.create(second, other)
    assert leased.leases() == [other]
    leased.engine.delete(other, "--force")
    assert leased.leases() == []
    rebuilt = leased.ship.create("b1")
    assert "devices" not in rebuilt.config["linux"], "the wrapper's changes to the bundle must be gone"
    leased.engine.create(rebuilt, name)
    assert leased.leases() == [name]
    leased.engine.delete(name, "--force")
    for made in (first, second):
        refused = leased.ship.command("remove", made.directory, check=False)
        assert "holds init.pid, log.json, out.log" in refused.stderr, "the files belong to the engine"
        leased.ship.command("remove", "--all", made.directory)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(served: Served, workdir: str) -> Ship:
    runtime = runtimes.named("runc")
    if runtime.missing:
        pytest.skip(runtime.missing)
    return Ship(workdir, served(runtime))


def test_spec_prints_what_create_writes_and_changes_nothing(plain: Ship) -> None:
    plain.write(env={"A": "b"}, resources={"gpu": {}})
    made = plain.create("b")
    printed = plain.command("spec", "--spec", plain.file, "--rootfs", plain.rootfs, made.directory).stdout
    assert json.loads(printed) == made.config
    before = made.bytes
    plain.command("spec", "--spec", plain.file, os.path.join(plain.workdir, "other"))
    assert not os.path.exists(os.path.join(plain.workdir, "other"))
    assert plain.create("b").bytes == before, "the same again"


def test_secrets_are_not_printed(plain: Ship) -> None:
    plain.write(env={"A": "$E:HIDDEN"})
    done = plain.command("spec", "--spec", plain.file, "--debug", "x", env={"HIDDEN": "very-secret"})
    assert "very-secret" not in done.stdout + done.stderr and "A=***" in done.stdout
    assert "image" in done.stderr


def test_write_config_needs_a_rootfs(plain: Ship) -> None:
    plain.write(command={"args": ["true"]})
    directory = os.path.join(plain.workdir, "b")
    os.makedirs(directory)
    done = plain.command("write-config", "--spec", plain.file, directory, check=False)
    assert done.returncode == 1 and "has no rootfs" in done.stderr and os.listdir(directory) == []
    bundle.rootfs(os.path.join(directory, "rootfs"))
    plain.command("write-config", "--spec", plain.file, directory)
    assert bundle.Bundle(directory).config["root"]["path"] == "rootfs"
    refused = plain.command("remove", directory, check=False)
    assert (
        refused.returncode == 1
        and "holds rootfs" in refused.stderr
        and os.path.exists(os.path.join(directory, "rootfs/bin"))
    )
    plain.command("remove", "--all", directory)
    assert not os.path.exists(directory)
    plain.command("remove", directory)  # this is allowed


def test_a_refused_build_writes_nothing(plain: Ship) -> None:
    plain.write(resources={"gpu": {"count": 99}})
    for action in ("create", "run"):
        done = plain.command(
            action, "--spec", plain.file, "--rootfs", plain.rootfs, os.path.join(plain.workdir, "b"), check=False
        )
        assert (
            done.returncode == 1
            and "resources.gpu asks for 99 devices" in done.stderr
            and len(done.stderr.splitlines()) == 1
        )
        assert not os.path.exists(os.path.join(plain.workdir, "b"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--spec", "F"], "BUNDLE is missing"),
        (["create", "--spec", "F", "--id", "a/b", "B"], "'a/b' is not a container id"),
        (["create", "--spec", "F", "--env", "A", "B"], "--env 'A' does not have the form NAME=VALUE"),
        (["create", "--spec", "F", "--volume", "=x", "B"], "--volume '=x'"),
        (["create", "--spec", "/no/such", "B"], "/no/such: No such file"),
        (["create", "--spec", "F", "--service", "x", "B"], "no service 'x'; it has web"),
        (["create", "--spec", "F", "--image-config", "F", "--rootfs", "/no/such", "B"], "/no/such is not a directory"),
        (["run", "--spec", "F", "B"], "run needs --rootfs"),
        (["run", "--spec", "F", "--rootfs", "/", "/tmp"], "/tmp exists already"),
        (["remove", "/tmp"], "/tmp is not a bundle"),
    ],
)
def test_wrong_commands_are_refused(plain: Ship, arguments: list[str], message: str) -> None:
    plain.write()
    done = plain.command(
        *({"F": plain.file, "B": os.path.join(plain.workdir, "b")}.get(word, word) for word in arguments), check=False
    )
    assert done.returncode == 1 and message in done.stderr and not os.path.exists(os.path.join(plain.workdir, "b"))


def test_the_bundle_may_come_after_the_words_of_args(plain: Ship) -> None:
    plain.write()
    directory = os.path.join(plain.workdir, "b")
    plain.command("create", "--spec", plain.file, "--rootfs", plain.rootfs, "--args", "sh", "-c", "true", directory)
    assert bundle.Bundle(directory).config["process"]["args"] == ["sh", "-c", "true"]
    plain.command("create", "--spec", plain.file, "--rootfs", plain.rootfs, directory, "--args", "sleep", "1")
    assert bundle.Bundle(directory).config["process"]["args"] == ["sleep", "1"]


def test_the_image_s_configuration(plain: Ship) -> None:
    plain.write()
    file = os.path.join(plain.workdir, "image.json")
    with open(file, "w", encoding="utf-8") as image:
        json.dump(
            {
                "config": {
                    "Entrypoint": ["/bin/echo"],
                    "Cmd": ["hello"],
                    "Env": ["LANG=C"],
                    "User": "app",
                    "WorkingDir": "/tmp",
                }
            },
            image,
        )
    found = plain.create("b", "--image-config", file).config["process"]
    assert found["args"] == ["/bin/echo", "hello"] and found["cwd"] == "/tmp" and "LANG=C" in found["env"]
    assert found["user"] == {"uid": 1234, "gid": 99, "additionalGids": [44]}


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
def test_signals_are_passed_to_the_container(ship: Ship) -> None:
    ship.write(command={"args": ["sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 1 & wait; done"]})
    directory = os.path.join(ship.workdir, bundle.GROUPS + "signal")
    with subprocess.Popen(
        [
            *ship.wrap,
            ship.installation.program("chandler"),
            "bundle",
            "run",
            "--spec",
            ship.file,
            "--rootfs",
            ship.rootfs,
            directory,
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(30) == 5
    assert not os.path.exists(directory)


# --- a builder in a container -----------------------------------------------------------------------------------


@pytest.mark.skipif(cgroups.mode() == "legacy", reason="no control groups of version 2 here")
def test_a_builder_in_a_container_makes_room_for_others(plain: Ship) -> None:
    """The builder has a cgroup namespace of its own, as in a container.

    It moves into a leaf group, containers get groups beside it, and a second run changes nothing.
    """
    group = os.path.join(cgroups.SYSFS, "" if cgroups.mode() == "unified" else "unified", bundle.GROUPS + "nest")
    plain.write(cgroup_parent=None, command={"args": ["cat", "/proc/self/cgroup"]})
    directory = os.path.join(plain.workdir, bundle.GROUPS + "inner")
    chandler = plain.installation.program("chandler")
    create = f"{chandler} bundle create --spec {plain.file} --rootfs {plain.rootfs} {directory}"
    look = f"cat {directory}/config.json; find /sys/fs/cgroup -type d"
    script = (
        f"mkdir {group} && echo $$ >{group}/cgroup.procs && exec unshare -C -m --propagation private sh -c '"
        f"mount -t cgroup2 none /sys/fs/cgroup && {create} && {look} && echo --- && {create} && {look} && echo --- && "
        f"{runtimes.named('runc').path} --root {plain.workdir}/root run --bundle {directory} {bundle.GROUPS}n1'"
    )
    try:
        done = subprocess.run(
            ["sh", "-c", script], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        first, second, ran = done.stdout.split("---\n")
        assert first == second
        config, *groups = first.splitlines()
        assert json.loads(config)["linux"]["cgroupsPath"] == f"/containers/{os.path.basename(directory)}"
        assert sorted(groups) == ["/sys/fs/cgroup", "/sys/fs/cgroup/containers", "/sys/fs/cgroup/init"]
        assert "0::/" in ran
    finally:
        cgroups.remove(
            {group, f"{group}/init", f"{group}/containers", f"{group}/containers/{os.path.basename(directory)}"}
        )
        assert not os.path.exists(group)


def test_the_environment_names_a_parent(plain: Ship) -> None:
    plain.write(cgroup_parent=None)
    assert plain.create("b", env={"CHANDLER_CGROUP_PARENT": "/team"}).config["linux"]["cgroupsPath"] == "/team/b"


# --- an unprivileged user ---------------------------------------------------------------------------------------

UID = 12345
USER = ("setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups")


@pytest.mark.parametrize(
    "runtime", [found.label for found in runtimes.known() if found.kind != "youki" and found.limits], indirect=True
)
def test_an_unprivileged_user_s_container(runtime: Runtime, served: Served, workdir: str) -> None:
    home = os.path.join(workdir, "home")
    os.mkdir(home)
    ship = Ship(home, served(runtime), (*runtime.wrap, *USER))
    ship.write(
        env={"A": "b"},
        cgroup_parent=None,
        command={"args": ["sh", "-c", "id; env; cat /proc/self/uid_map; cat /proc/self/mountinfo"]},
    )
    for directory, _, names in os.walk(home):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            os.lchown(path, UID, UID)
    made = ship.create("b", env={"XDG_RUNTIME_DIR": home})
    options = ["--cgroup-manager", "disabled"] if runtime.kind == "crun" else []
    engine = Engine(
        [*runtime.wrap, *USER, runtime.path, *options], os.path.join(home, "root"), env={"USER": "lab", "HOME": home}
    )
    seen = engine.run(made, bundle.GROUPS + "u1").stdout
    assert "uid=0(root)" in seen and "A=b" in seen.splitlines()
    assert any(line.split() == ["0", str(UID), "1"] for line in seen.splitlines())
    engine.clean()


# youki needs a control group, and as an unprivileged user it can use only one of version 2.
@pytest.mark.parametrize("runtime", ["runc", "crun-on-v2", "youki"], indirect=True)
def test_an_unprivileged_user_runs_a_bundle(runtime: Runtime, served: Served, workdir: str) -> None:
    ship = Ship(workdir, served(runtime), runtime.wrap)
    group = f"/{bundle.GROUPS}mine"
    if runtime.kind == "youki":
        ship.wrap = cgroups.HOST if cgroups.mode() == "unified" else cgroups.UNIFIED
        subprocess.run(
            [
                *ship.wrap,
                "sh",
                "-c",
                f"mkdir {cgroups.SYSFS}{group} && "
                f"chown {UID}:{UID} {cgroups.SYSFS}{group} {cgroups.SYSFS}{group}/cgroup.*",
            ],
            check=True,
        )
    ship.write(
        env={"A": "b"},
        cgroup_parent=group if runtime.kind == "youki" else None,
        command={"args": ["sh", "-c", "echo $A; id -u; cat /proc/self/uid_map"]},
    )
    os.mkdir(os.path.join(workdir, "run"), 0o700)
    for directory, _, names in os.walk(workdir):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            os.lchown(path, UID, UID)
    ship.wrap += USER
    for attempt in range(3 if runtime.kind == "youki" else 1):  # see lab.engine
        directory = os.path.join(workdir, f"b{attempt}")  # a killed run leaves its bundle
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = ship.command(
                "run",
                "--spec",
                ship.file,
                "--rootfs",
                ship.rootfs,
                directory,
                check=False,
                timeout=20,
                env={"HOME": workdir, "XDG_RUNTIME_DIR": os.path.join(workdir, "run")},
            )
            break
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [["b"], ["0"], ["0", str(UID), "1"]]
    assert not os.path.exists(directory)


@pytest.mark.parametrize(
    "runtime", [found.label for found in runtimes.known() if found.kind != "youki" and found.limits], indirect=True
)
def test_ids_that_are_lent_to_a_user(runtime: Runtime, served: Served, workdir: str) -> None:
    """By name and by number, in two ranges; the container's user is in the second range."""
    user = pwd.getpwuid(1)
    lent = os.path.join(workdir, "subuid")
    with open(lent, "w", encoding="ascii") as file:
        file.write(f"{user.pw_name}:100000:500\nsomebody:1:1\n1:300000:65536\n")
    home = os.path.join(workdir, "home")
    os.mkdir(home)
    borrow = cgroups.private(" && ".join(f"mount --bind {lent} /etc/{name}" for name in ("subuid", "subgid")))
    caller = ("setpriv", "--reuid", "1", "--regid", "1", "--clear-groups")
    ship = Ship(home, served(runtime), (*runtime.wrap, *borrow, *caller))
    ship.write(user="1000:1001", cgroup_parent=None, command={"args": ["sh", "-c", "id; cat /proc/self/uid_map"]})
    for directory, _, names in os.walk(home):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            os.lchown(path, 1, 1)
    made = ship.create("b", env={"XDG_RUNTIME_DIR": home})
    assert [(each["containerID"], each["hostID"], each["size"]) for each in made.config["linux"]["uidMappings"]] == [
        (0, 1, 1),
        (1, 100000, 500),
        (501, 300000, 65536),
    ]
    options = ["--cgroup-manager", "disabled"] if runtime.kind == "crun" else []
    engine = Engine(
        [*runtime.wrap, *borrow, *caller, runtime.path, *options],
        os.path.join(home, "root"),
        env={"USER": "lab", "HOME": home},
    )
    seen = engine.run(made, bundle.GROUPS + "u2").stdout.splitlines()
    assert seen[0].startswith("uid=1000 gid=1001")
    assert [line.split() for line in seen[1:]] == [["0", "1", "1"], ["1", "100000", "500"], ["501", "300000", "65536"]]
    engine.clean()
