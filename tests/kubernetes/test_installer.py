"""The installer's program on several kinds of nodes: the files that it installs, its refusals, and failures."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest
from lab import bundle, cgroups
from lab.engine import Engine, read
from lab.kubenode import PYTHONS, Node, replace_image
from lab.node import Node as GPUNode
from lab.plugin import until

UBUNTU = 'NAME="Ubuntu"\nID=ubuntu\nPRETTY_NAME="Ubuntu 24.04.1 LTS"\n'
COS = 'NAME="Container-Optimized OS"\nID=cos\nPRETTY_NAME="Container-Optimized OS from Google"\n'
FLATCAR = 'ID=flatcar\nID_LIKE=coreos\nPRETTY_NAME="Flatcar Container Linux by Kinvolk 4081.2.0 (Oklo)"\n'
CONTAINERD = "version = 3\n# our own words\n[plugins.'io.containerd.cri.v1.runtime']\n"
OPT, HOME = "/opt/chandler", "/home/kubernetes/bin/chandler"
Maker = Callable[..., Node]
IMPORTS = """import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import shim, hooks, tomlkit, yaml, google.protobuf
assert yaml.__with_libyaml__
for package in (shim, hooks):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
assert all(sys.argv[1] in each.__file__ for each in (shim, yaml, tomlkit, google.protobuf))
"""


@pytest.fixture
def make(workdir: str, tree: str) -> Iterator[Maker]:
    """Nodes without Python, with a configured containerd."""
    made: list[Node] = []

    def node(os_release: str = UBUNTU, image: str = tree) -> Node:
        directory = os.path.join(workdir, str(len(made)))
        os.makedirs(directory)
        made.append(Node(directory, image, os_release, PYTHONS))
        made[-1].write("/etc/containerd/config.toml", CONTAINERD)
        made[-1].write("/usr/local/sbin/systemctl", '#!/bin/sh\necho "$@" >>/run/systemctl.log\n', 0o755)
        os.makedirs(made[-1].root + "/run/systemd/system")
        return made[-1]

    yield node
    for each in made:
        each.close()


def version(tree: str) -> str:
    (name,) = os.listdir(f"{tree}{OPT}/versions")
    return name


def unlaunched(node: Node) -> dict[str, str]:
    """The changes of a node without the launch line, which differs after every compilation."""
    return {path: text for path, text in node.changed().items() if not path.startswith("/etc/chandler/launch")}


def restarts(node: Node) -> int:
    log = node.root + "/run/systemctl.log"
    return read(log).count("restart containerd\n") if os.path.exists(log) else 0


def test_a_node_without_python_runs_a_request(make: Maker, tree: str, node: GPUNode, workdir: str) -> None:
    host = make()
    host.write(
        "/etc/chandler/config.toml",
        f'runtimes = ["/usr/sbin/runc"]\nengines = ["other"]\n[cdi]\nspec-dirs = ["{node.cdi}"]\n',
    )
    output = host.image("install").stdout
    assert f"{OPT}/versions/{version(tree)} is in force on Ubuntu 24.04.1 LTS" in output
    assert restarts(host) == 1
    text = read(host.root + "/etc/containerd/config.toml")
    assert text.startswith(CONTAINERD) and f'BinaryName = "{OPT}/bin/chandler-runtime"' in text
    # The interpreter that is installed along has every module that Chandler imports.
    home = f"{OPT}/versions/{version(tree)}"
    host.run(f"{home}/python/bin/python3", "-I", "-B", "-c", IMPORTS, f"{home}/lib/chandler")
    # The program that containerd would call, on a node with no other interpreter.
    assert host.run("sh", "-c", "python3 -c ''", check=False).returncode == 127
    engine = Engine(host.command(f"{OPT}/bin/chandler-runtime"), os.path.join(host.workdir, "store/root"))
    made = bundle.make(
        os.path.join(host.workdir, "store/b"),
        ["sh", "-c", "env; ls /dev/nvidia*"],
        {**bundle.pod(), **bundle.request(resources={"gpu": {"count": 2}}, env={"A": "b"})},
    )
    try:
        seen = engine.run(made, "c1").stdout.splitlines()
    finally:
        engine.clean()
        cgroups.end(workdir)
    assert "A=b" in seen and "/dev/nvidia1" in seen and "/dev/nvidia2" not in seen


def test_an_update_changes_a_link(make: Maker, tree: str, newer: str, workdir: str) -> None:
    host = make()
    host.image("install")
    shutil.copytree(f"{host.root}{OPT}/versions/{version(tree)}", f"{host.root}{OPT}/versions/0.0.1-old", symlinks=True)
    before = unlaunched(host)
    replace_image(host, newer)
    host.image("install")
    after = unlaunched(host)
    assert {path for path in after if after[path] != before.get(path)} == {f"{OPT}/bin"}
    # The previous version stays for processes that were started from it; older ones are removed.
    assert set(os.listdir(f"{host.root}{OPT}/versions")) == {version(tree), version(newer)}
    assert "chandler 9." in host.run(f"{OPT}/bin/chandler", "--version").stdout
    assert restarts(host) == 1, "containerd's configuration must name only the link"


def closed(host: Node, *directories: str, options: str = "ro") -> None:
    """Mount directories of the node with `options`."""
    for directory in directories:
        os.makedirs(host.root + directory, exist_ok=True)
        for root in ("", "/run/image/host"):
            host.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", root + directory)


@pytest.mark.parametrize("system, options", [(COS, "ro"), (FLATCAR, "noexec")], ids=["read-only", "noexec"])
def test_another_prefix_where_the_default_does_not_work(make: Maker, system: str, options: str) -> None:
    host = make(system)
    closed(host, "/opt", options=options)
    assert f"{HOME}/versions/" in host.image("install").stdout
    assert "chandler " in host.run(f"{HOME}/bin/chandler", "--version").stdout
    assert f'BinaryName = "{HOME}/bin/chandler-runtime"' in host.changed()["/etc/containerd/config.toml"]


def test_a_node_without_a_directory_for_programs_is_refused(make: Maker) -> None:
    host = make(COS)
    closed(host, "/opt")
    closed(host, "/home", options="noexec")
    before = host.changed()
    done = host.image("install", check=False)
    assert done.returncode == 1 and host.changed() == before
    assert (
        "Container-Optimized OS" in done.stdout
        and "/opt is read-only" in done.stdout
        and "/home is mounted noexec" in done.stdout
    )
    assert "NRI DaemonSet" in done.stdout


@pytest.mark.parametrize(
    "system", ['ID=talos\nPRETTY_NAME="Talos (v1.9.0)"\n', 'ID=bottlerocket\nPRETTY_NAME="Bottlerocket OS 1.30.0"\n']
)
def test_a_closed_system_is_refused_by_name(make: Maker, system: str) -> None:
    host = make(system)
    before = host.changed()
    done = host.image("install", check=False)
    assert done.returncode == 1 and host.changed() == before
    assert system.split('"')[1] in done.stdout and "NRI DaemonSet" in done.stdout


def broken_policy(host: Node) -> None:
    """Two policies that are each correct, but not together."""
    host.write("/etc/chandler/config.toml", "annotation-prefix = 3\n")


def broken_engine(host: Node) -> None:
    host.write("/etc/containerd/config.toml", "version = [\n")


def broken_restart(host: Node) -> None:
    host.write("/usr/local/sbin/systemctl", "#!/bin/sh\necho no such unit >&2; exit 5\n", 0o755)


def no_shell(host: Node) -> None:
    os.unlink(host.root + "/usr/bin/sh")


@pytest.mark.parametrize(
    "damage, words",
    [
        (broken_policy, "annotation-prefix"),
        (broken_engine, "/etc/containerd/config.toml"),
        (broken_restart, "no such unit"),
        (no_shell, "cannot be started"),
    ],
)
def test_a_failure_puts_everything_back(make: Maker, damage: Callable[[Node], None], words: str) -> None:
    host = make()
    damage(host)
    before = host.changed()
    host.write("/run/policy.toml", "[policy]\nmax-gpus = 1\n")
    done = host.image("install", "--config", "/host/run/policy.toml", check=False)
    assert done.returncode == 1 and words in done.stdout, done.stdout
    assert host.changed() == before
    assert not os.path.exists(host.root + OPT)


def test_a_failed_update_leaves_the_version_before_in_force(make: Maker, tree: str, newer: str) -> None:
    host = make()
    host.write("/run/policy.toml", "[policy]\nmax-gpus = 1\n")
    host.image("install", "--config", "/host/run/policy.toml")
    before = host.changed()
    replace_image(host, newer)
    host.write("/run/policy.toml", "[policy]\nmax-gpus = 2\n")
    broken_engine(host)
    assert host.image("install", "--config", "/host/run/policy.toml", check=False).returncode == 1
    host.write("/etc/containerd/config.toml", before["/etc/containerd/config.toml"])
    assert host.changed() == before
    assert set(os.listdir(f"{host.root}{OPT}/versions")) == {version(tree), ".unfinished"}
    assert "chandler 0." in host.run(f"{OPT}/bin/chandler", "--version").stdout


def test_an_invalid_policy_is_refused_first(make: Maker) -> None:
    host = make()
    host.write("/run/policy.toml", "[policy]\nmax-gpu = 1\n")
    before = host.changed()
    done = host.image("install", "--config", "/host/run/policy.toml", check=False)
    assert done.returncode == 1 and "50-kubernetes.toml" in done.stdout and "max-gpu" in done.stdout
    assert host.changed() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_installer_that_is_ended_during_the_restart_undoes_everything(make: Maker, number: signal.Signals) -> None:
    """After SIGTERM everything is restored. After SIGKILL the next installer knows that the restart may be missing."""
    host = make()
    before = host.changed()
    host.write(
        "/usr/local/sbin/systemctl",
        '#!/bin/sh\n[ -e /run/go ] || { echo $$ >/run/waits; exec sleep 600; }\necho "$@" >>/run/systemctl.log\n',
        0o755,
    )
    process = subprocess.Popen(
        host.inside("install"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    until(lambda: os.path.exists(host.root + "/run/waits"), "the restart")
    host.write("/run/go", "")
    if number == signal.SIGKILL:  # as the kubelet does, all of the container
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what stands for systemctl
    if number == signal.SIGTERM:
        assert "SIGTERM ended" in output
        host.write("/usr/local/sbin/systemctl", before["/usr/local/sbin/systemctl"], 0o755)
        assert host.changed() == before
        return
    assert restarts(host) == 0 and "chandler" in host.changed()["/etc/containerd/config.toml"]
    host.image("install")
    assert restarts(host) == 1


def test_install_twice_and_clean_up(make: Maker) -> None:
    host = make()
    before = host.changed()
    host.write("/run/policy.toml", "[policy]\nmax-gpus = 1\n")
    install = ("install", "--config", "/host/run/policy.toml", "--runtime", "crun")
    os.umask(0)
    try:
        host.image(*install)
    finally:
        os.umask(0o022)
    between = unlaunched(host)
    assert f'BinaryName = "{OPT}/bin/chandler-crun"' in between["/etc/containerd/config.toml"]
    assert between["/etc/chandler/config.d/50-kubernetes.toml"] == "[policy]\nmax-gpus = 1\n"
    for directory, _, names in os.walk(host.root + OPT):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            found = os.lstat(path)
            assert found.st_uid == found.st_gid == 0 and (os.path.islink(path) or not found.st_mode & 0o022), path
    assert "nothing to change" in host.image(*install).stdout
    assert unlaunched(host) == between and restarts(host) == 1
    assert "is gone" in host.image("cleanup").stdout
    assert host.changed() == before and restarts(host) == 2
    assert not os.path.exists(host.root + OPT) and not os.path.exists(host.root + "/etc/chandler")
    assert host.image("cleanup").stdout == "", "a second cleanup must find nothing"


def test_k3s(make: Maker) -> None:
    host = make()
    template = "/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.tmpl"
    host.write(template, '{{ template "base" . }}\n')
    before = host.changed()
    host.image("install", "--engine-config", template)
    assert f'BinaryName = "{OPT}/bin/chandler-runtime"' in host.changed()[template]
    host.image("cleanup", "--engine-config", template)
    assert host.changed() == before
    assert read(host.root + "/run/systemctl.log") == "restart k3s\n" * 2


def test_only_files_are_installed(make: Maker) -> None:
    """For a node whose plugin runs in a pod, and whose CDI files name chandler-hook."""
    host = make()
    host.image("install", "--engine", "none")
    assert host.changed()["/etc/containerd/config.toml"] == CONTAINERD and restarts(host) == 0
    assert host.run(f"{OPT}/bin/chandler-hook", check=False).returncode != 127


def test_a_pod_that_only_waits_ends_when_it_is_told_to(make: Maker) -> None:
    """As process 1, for which the kernel drops a signal that is neither blocked nor handled."""
    host = make()
    process = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", *host.inside("wait")])

    def ended() -> bool:
        first = read(f"/proc/{process.pid}/task/{process.pid}/children").split()
        for pid in first:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)
        return process.poll() is not None

    try:
        until(ended, "the end of the pod's process 1")
    finally:
        process.kill()
    assert process.wait() == 0
