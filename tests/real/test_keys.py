"""Every key of the request on real runtimes, read back from inside the container."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import bundle
from lab.engine import Engine
from lab.install import Installation
from lab.runtimes import Runtime

from shim.keys.process import CAPABILITIES

ONCE = ["runc", "crun"]
SHOW = (
    "cat /proc/self/status; echo --; cat /proc/self/limits; echo --; cat /proc/self/mounts; echo --; env; echo --; "
    "cat /proc/sys/net/core/somaxconn; cat /proc/sys/kernel/hostname; pwd; echo x 2>/dev/null >/no && echo writable; "
    "ls -n /data; cat /proc/self/oom_score_adj; cat /proc/kcore | busybox wc -c"
)


@pytest.fixture
def trusting(runtime: Runtime, lab: str, workdir: str) -> Iterator[Callable[..., Engine]]:
    """Chandler over the runtime, with a policy."""
    engines = []

    def make(policy: str) -> Engine:
        installation = Installation(os.path.join(lab, "keys-" + runtime.label))
        installation.configure([runtime.path], [], policy.replace("@", workdir))
        installation.forget()
        engines.append(
            Engine(
                [*runtime.wrap, installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
            )
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.clean()


def inside(engine: Engine, workdir: str, document: dict[str, Any], script: str = SHOW) -> tuple[bundle.Bundle, str]:
    made = bundle.make(
        os.path.join(workdir, "b"),
        ["sh", "-c", script],
        bundle.request(**json.loads(json.dumps(document).replace("@", workdir))),
    )
    root = os.path.join(made.directory, "rootfs")
    with open(os.path.join(root, "etc/passwd"), "a", encoding="ascii") as passwd:
        passwd.write("app:x:1000:2000::/:/bin/sh\n")
    with open(os.path.join(root, "etc/group"), "w", encoding="ascii") as group:
        group.write("video:x:44:app\n")
    for name in ("data", "tmp1", "srv"):
        os.makedirs(os.path.join(root, name))
    return made, engine.run(made, "c1").stdout


def status(text: str) -> dict[str, str]:
    return {
        key: value.strip() for key, _, value in (line.partition(":") for line in text.partition("--")[0].splitlines())
    }


def names(mask: str) -> set[str]:
    return {name for number, name in enumerate(CAPABILITIES) if int(mask, 16) >> number & 1}


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_everything_at_once(trusting: Callable[..., Engine], workdir: str) -> None:
    os.makedirs(os.path.join(workdir, "shared"))
    with open(os.path.join(workdir, "shared/seen"), "w", encoding="ascii") as file:
        file.write("x")
    with open(os.path.join(workdir, "token"), "w", encoding="ascii") as file:
        file.write("hunter2\n")
    engine = trusting('[secrets]\ndirectory = "@"\n[volumes]\nwork = "@/shared"\n[policy]\ntrust = "all"')
    _, text = inside(
        engine,
        workdir,
        {
            "env": {"TOKEN": "$S:token", "SPACE": "$E:NAMESPACE"},
            "user": "app",
            "extra_groups": [105],
            "hostname": "trainer-0",
            "read_only_root_fs": True,
            "capabilities": ["SYS_PTRACE"],
            "cap_drop": ["NET_RAW", "MKNOD"],
            "sysctls": {"net.core.somaxconn": "777"},
            "ulimits": {"nofile": "100:200", "core": 0},
            "command": {"entrypoint": ["sh"], "args": ["-c", SHOW], "workdir": "/srv"},
            "resources": {"oom_score_adj": 1000},
            "storage": [
                {"type": "bind", "source": "@/shared", "target": "/data", "readonly": True},
                {"type": "named", "name": "work", "target": "/tmp/work"},
                {"type": "tmpfs", "target": "/tmp1", "size": "1Mi", "mode": "1777"},
            ],
        },
    )
    found = status(text)
    assert found["Uid"].split() == ["1000"] * 4 and found["Gid"].split() == ["2000"] * 4
    assert {"44", "105"} <= set(found["Groups"].split())
    assert names(found["CapBnd"]) == set(bundle.CAPABILITIES) - {"CAP_NET_RAW", "CAP_MKNOD"} | {"CAP_SYS_PTRACE"}
    assert found["NoNewPrivs"] == "1", "what the engine has set stays"
    limits, mounts, env, rest = text.split("--\n")[1:]
    lines = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert lines["Max open files"] == ["100", "200"] and lines["Max core file size"] == ["0", "0"]
    mounted = {line.split()[1]: line.split()[2:4] for line in mounts.splitlines()}
    assert (
        "ro" in mounted["/"][1].split(",")
        and "ro" in mounted["/data"][1].split(",")
        and "rw" in mounted["/tmp/work"][1].split(",")
    )
    assert mounted["/tmp1"][0] == "tmpfs" and {"nosuid", "nodev", "size=1024k"} <= set(mounted["/tmp1"][1].split(","))
    assert "mode=777" not in mounted["/tmp1"][1]
    assert "TOKEN=hunter2" in env.splitlines() and "SPACE=k8s.io" in env.splitlines()
    assert (
        rest.splitlines()[:3] == ["777", "trainer-0", "/srv"]
        and "writable" not in rest
        and "seen" in rest
        and "1000" in rest.splitlines()
    )
    grants = os.path.join(os.path.dirname(engine.command[-1]), "../../run")
    for directory, _, files in os.walk(os.path.realpath(grants)):
        for name in files:
            with open(os.path.join(directory, name), "rb") as record:
                assert b"hunter2" not in record.read()


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_privileged_and_devices(trusting: Callable[..., Engine], workdir: str) -> None:
    engine = trusting('[policy]\ntrust = "all"')
    script = (
        "cat /proc/self/status; echo --; cat /proc/self/mounts; ls -l /dev/loop-control; "
        "cat /proc/kcore | busybox head -c 4 | busybox wc -c"
    )
    _, text = inside(
        engine, workdir, {"privileged": True, "devices": [{"path": "/dev/loop-control", "mknod": True}]}, script
    )
    found = status(text)
    with open("/proc/self/status", encoding="ascii") as file:
        own = status(file.read())
    assert names(found["CapEff"]) == names(found["CapBnd"]) == names(own["CapBnd"]) and found["NoNewPrivs"] == "0"
    mounts = {
        line.split()[1]: line.split()[3].split(",")
        for line in text.partition("--\n")[2].splitlines()
        if " /" in line and len(line.split()) > 3 and line.split()[1].startswith("/")
    }
    assert "rw" in mounts["/sys"] and "/proc/kcore" not in mounts and "/proc/sys" not in mounts
    number = os.stat("/dev/loop-control").st_rdev
    assert f"{os.major(number)}, {os.minor(number):>3}".replace(" ", "") in text.replace(" ", "")


@pytest.mark.parametrize("runtime", ONCE, indirect=True)
def test_host_network_and_group(trusting: Callable[..., Engine], workdir: str) -> None:
    engine = trusting(
        '[policy]\nallow = ["host_network", "cgroup_parent"]\ncgroup-parents = ["/' + bundle.GROUPS + 'team"]'
    )
    made, text = inside(
        engine,
        workdir,
        {"host_network": True, "cgroup_parent": f"/{bundle.GROUPS}team"},
        "busybox readlink /proc/self/ns/net; cat /proc/self/cgroup",
    )
    assert text.splitlines()[0] == os.readlink("/proc/self/ns/net")
    assert made.config["linux"]["cgroupsPath"].startswith(f"/{bundle.GROUPS}team/")


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"privileged": True}, "privileged is not allowed"),
        ({"user": "app"}, "user is not allowed"),
        ({"env": {"A": "$S:token"}}, "secrets of [policy] has no token"),
        ({"storage": [{"type": "bind", "source": "/etc", "target": "/data"}]}, "storage (bind) is not allowed"),
        ({"devices": ["/dev/loop-control"]}, "devices is not allowed"),
    ],
)
def test_keys_that_no_rule_allows_are_refused(
    trusting: Callable[..., Engine], workdir: str, document: dict[str, Any], words: str
) -> None:
    engine = trusting("")
    made = bundle.make(os.path.join(workdir, "b"), ["true"], bundle.request(**document))
    before = made.bytes
    done = engine.create(made, "c1", check=False)
    assert done.returncode == 1 and words in done.stderr and made.bytes == before
    assert stat.S_ISREG(os.stat(made.path).st_mode)


@pytest.mark.parametrize("runtime", ["runc"], indirect=True)
def test_a_rule_for_a_namespace(trusting: Callable[..., Engine], workdir: str) -> None:
    engine = trusting(
        '[[policy.rule]]\nname = "a"\nmatch = {namespace = ["team-a"], handler = ["chandler-runtime"]}\n'
        'allow = ["hostname"]'
    )
    engine.root += "/k8s.io"  # containerd is known by its paths
    for namespace, given in (("team-a", True), ("team-b", False)):
        made = bundle.make(
            os.path.join(workdir, "io.containerd.runtime.v2.task/k8s.io", f"c-{namespace}"),
            ["true"],
            {**bundle.request(hostname="mine"), **bundle.pod(namespace=namespace)},
        )
        done = engine.create(made, f"c-{namespace}", check=False)
        assert (done.returncode == 0) is given, done.stderr
        assert made.config["hostname"] == ("mine" if given else "lab")
