"""What `chandler configure` writes, on real engines: containerd 1.7 and 2.1 through CRI, docker and podman."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from cri_api.v1 import api_pb2 as pb
from lab import cgroups
from lab.containerd import RELEASES, Containerd, Release
from lab.cri import CRI, Pod, Refused, reason
from lab.docker import RELEASES as DOCKERS
from lab.docker import Docker
from lab.engine import read
from lab.install import Installation
from lab.node import Node
from lab.workdir import within


class Scene:
    """A containerd with a node's own configuration, to which `chandler configure` has added the handlers."""

    def __init__(self, release: Release, workdir: str, node: Node) -> None:
        self.node = node
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.installation.configure(["/usr/sbin/runc"], [node.cdi])
        self.containerd = Containerd(release, os.path.join(workdir, "c"), {}, node.cdi)
        self.file = os.path.join(self.containerd.directory, "config.toml")
        self.before = read(self.file)
        self.configured = self.configure("--runtime", "runc")
        self.containerd.start()
        self.cri = CRI(self.containerd.socket)
        self.cri.ready()

    def configure(self, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        programs = os.path.dirname(self.containerd.release.binary("containerd"))
        command = [
            self.installation.program("chandler"),
            "configure",
            "containerd",
            "--config",
            self.file,
            "--programs",
            programs,
            *options,
        ]
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env={}
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def again(self, *options: str) -> str:
        """Configure again and restart, as a person does after a change; returns the command's output."""
        output = self.configure(*options).stdout
        self.containerd.stop()
        self.containerd.start()
        self.cri.ready()
        return output

    def dump(self) -> str:
        """The configuration as containerd reads it."""
        return subprocess.run(
            [self.containerd.release.binary("containerd"), "--config", self.file, "config", "dump"],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    def close(self) -> None:
        self.cri.__exit__()
        self.containerd.stop()


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.label)
def scene(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Scene]:
    if request.param.missing:
        pytest.skip(request.param.missing)
    with within(lab) as directory:
        made = Scene(request.param, directory, node)
        yield made
        made.close()


@pytest.fixture
def cri(scene: Scene) -> Iterator[CRI]:
    yield scene.cri
    for pod in list(scene.cri.pods):
        scene.cri.end(pod)


def ask(container: str = "", **document: Any) -> dict[str, str]:
    return {"chandler.oci/service" + (f".{container}" if container else ""): json.dumps(document)}


def gpus(count: int) -> dict[str, Any]:
    return {"gpu": {"count": count}}


def opened(cri: CRI, container: str) -> list[int]:
    return [n for n in range(8) if cri.exec(container, "sh", "-c", f"exec 3</dev/nvidia{n}").code == 0]


def runtimes(dump: str) -> Mapping[str, Any]:
    from shim.configure import tomledit
    from shim.configure.containerd import CRI as PLUGIN

    document = tomledit.parse(dump)
    found: dict[str, Any] = document["plugins"][PLUGIN[document["version"]]]["containerd"]["runtimes"]
    return found


def test_containerd_understands_it(scene: Scene) -> None:
    """Beside the node's own handler and with its options; 2.1 from a file of ours, 1.7 from its own."""
    found = runtimes(scene.dump())
    assert set(found) == {"runc", "chandler", "chandler-runc"}
    own = found["runc"]["options"]
    for name, program in (("chandler", "chandler-runtime"), ("chandler-runc", "chandler-runc")):
        options = found[name]["options"]
        assert (
            options["BinaryName"] == scene.installation.program(program)
            and options["Root"] == own["Root"]
            and own["Root"]
        )
        assert options["SystemdCgroup"] == own["SystemdCgroup"]
        assert found[name]["pod_annotations"] == found[name]["container_annotations"] == ["chandler.oci/*"]
    assert own["BinaryName"] == "/usr/sbin/runc"
    drop_in = os.path.join(scene.containerd.directory, "conf.d/99-chandler.toml")
    assert os.path.exists(drop_in) == (scene.containerd.release.schema == 3)
    lines = read(scene.file).splitlines()
    assert set(scene.before.splitlines()) <= set(lines) and ("imports" in read(scene.file)) == os.path.exists(drop_in)


def two(cri: CRI, name: str, more: Mapping[str, str] | None = None) -> tuple[Pod, str, str]:
    """A pod of two containers with a request each, under the handler."""
    pod = cri.pod(
        name,
        {**ask("first", resources=gpus(1), env={"WHO": "first"}), **ask("second", resources=gpus(2)), **(more or {})},
        "chandler",
    )
    return pod, cri.run(pod, "first"), cri.run(pod, "second")


def test_a_pod_whose_containers_ask_for_themselves(scene: Scene, cri: CRI) -> None:
    pod, first, second = two(cri, "each")
    assert opened(cri, first) == [0] and opened(cri, second) == [1, 2]
    assert cri.env(first)["WHO"] == "first" and "WHO" not in cri.env(second)
    # the sandbox is as containerd made it
    bundle = scene.containerd.bundle(pod.id)
    assert not os.path.exists(os.path.join(bundle, "config.json.chandler-original"))
    assert "nvidia" not in read(os.path.join(bundle, "config.json")).replace("chandler.oci", "")
    # and a third container, which nothing asks for, too
    assert opened(cri, cri.run(pod, "third")) == []


def test_exec_update_stop_and_remove_through_the_handler(scene: Scene, cri: CRI) -> None:
    """exec, update of limits (the device still opens, another one does not), stop and remove."""
    pod, first, second = two(cri, "life")
    cri.remove(second)
    assert cri.exec(first, "echo", "hello").out == "hello\n"
    cri.update(first, memory_limit_in_bytes=48 << 20, cpu_quota=20000, cpu_period=100000)
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", cri.info(first)["pid"]) == 48 << 20
    assert opened(cri, first) == [0]
    other = scene.node.gpus[3]
    assert (
        "not permitted"
        in cri.exec(first, "sh", "-c", f"mknod /tmp/g c {other.major} {other.minor} && exec 3</tmp/g").err
    )
    cri.remove(first)
    cri.end(pod)
    _, first, second = two(cri, "next")  # what they held is free again
    assert opened(cri, first) + opened(cri, second) == [0, 1, 2]


REFUSED = {
    "more than the node has": (ask(resources=gpus(9)), "this node has 8"),
    "an unknown key": (ask(gpus=1), "unknown key 'gpus'"),
    "what the policy denies": (ask(privileged=True), "privileged is not allowed"),
}


def test_a_refusal_as_the_kubelet_sees_it(scene: Scene, cri: CRI) -> None:
    for name, (asked, words) in REFUSED.items():
        pod = cri.pod("refused-" + str(len(cri.pods)), asked, "chandler")
        container = cri.create(pod)
        with pytest.raises(Refused) as error:
            cri.start(container)
        assert words in reason(error), name
    assert opened(cri, cri.run(cri.pod("after", ask(resources=gpus(1)), "chandler"))) == [0]


def test_other_handlers_are_as_before(scene: Scene, cri: CRI) -> None:
    assert opened(cri, cri.run(cri.pod("plain", ask(resources=gpus(1)), "runc"))) == []
    assert opened(cri, cri.run(cri.pod("fixed", ask(resources=gpus(1)), "chandler-runc"))) == [0]
    with pytest.raises(Refused):
        cri.pod("unknown", {}, "chandler-crun")


def test_verify(scene: Scene) -> None:
    done = scene.configure("--runtime", "runc", "--verify")
    assert "nothing to change" in done.stdout and "got what it asked for" in done.stdout
    assert scene.cri.runtime.ListPodSandbox(_list()).items == [], "--verify must remove its pod"
    # where the policy refuses the test request, the answer says that the request arrived
    scene.installation.configure(["/usr/sbin/runc"], [scene.node.cdi], '[policy]\ndeny = ["env"]\n')
    done = scene.configure("--runtime", "runc", "--verify")
    assert "arrived, and was refused" in done.stdout and "deny of [policy]" in done.stdout
    scene.installation.configure(["/usr/sbin/runc"], [scene.node.cdi])
    # a handler that the running daemon does not know
    done = scene.configure("--handler", "unheard-of", "--dry-run", "--verify", check=False)
    assert done.returncode == 1 and "unheard-of" in done.stderr and "--restart" in done.stderr
    assert os.path.exists(scene.file) and "unheard-of" not in read(scene.file)


def test_verify_where_a_kubelet_ends_pods_that_it_does_not_know(scene: Scene) -> None:
    """It ends the first pod at once, the second one when it has a container; it leaves the third one alone."""
    ended: list[str] = []
    done = threading.Event()

    def kubelet() -> None:
        with CRI(scene.containerd.socket) as own:
            while not done.is_set() and len(ended) < 2:
                for sandbox in own.runtime.ListPodSandbox(_list()).items:
                    inside = own.runtime.ListContainers(
                        pb.ListContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=sandbox.id))
                    ).containers
                    if (
                        sandbox.metadata.namespace == "chandler-verify"
                        and sandbox.id not in ended
                        and (inside or not ended)
                    ):
                        ended.append(sandbox.id)
                        with contextlib.suppress(Refused):
                            own.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=sandbox.id))

    thread = threading.Thread(target=kubelet)
    thread.start()
    try:
        output = scene.configure("--runtime", "runc", "--verify", check=False)
    finally:
        done.set()
        thread.join()
    assert "got what it asked for" in output.stdout, output.stderr
    assert ended and scene.cri.runtime.ListPodSandbox(_list()).items == []


def _list() -> Any:
    return pb.ListPodSandboxRequest()


def test_chandler_as_the_default_runtime_and_back(scene: Scene, cri: CRI) -> None:
    output = scene.again("--default", "--runtime", "runc")
    assert "wrote " in output and "now: systemctl restart containerd" in output
    assert opened(cri, cri.run(cri.pod("default", ask(resources=gpus(1))))) == [0]
    plain = cri.run(cri.pod("asks-nothing"))
    assert opened(cri, plain) == []
    scene.again("--runtime", "runc")  # an option of an earlier call that is no longer given is removed
    assert opened(cri, cri.run(cri.pod("not-default", ask(resources=gpus(1))))) == []


def test_configuration_removed_under_running_pods(scene: Scene, cri: CRI) -> None:
    """The files are the same as before, byte by byte. A running pod goes on and ends; a new one finds no handler.

    containerd 2 looks up the handler for an exec. Therefore the command says that pods should end first.
    """
    pod, first, _ = two(cri, "survivor")
    output = scene.again("--remove")
    assert "restored " in output and "note: end the pods" in output and read(scene.file) == scene.before
    assert not [name for name in os.listdir(scene.containerd.directory) if "chandler" in name or name == "conf.d"]
    assert set(runtimes(scene.dump())) == {"runc"}
    assert cri.running(first)
    cri.end(pod)
    with pytest.raises(Refused) as error:
        cri.pod("late", {}, "chandler")
    assert "chandler" in reason(error)
    scene.again("--runtime", "runc")
    assert opened(cri, cri.run(cri.pod("again", ask(resources=gpus(1)), "chandler"))) == [0]


# --- docker and podman: --verify, before and after, and nothing left ------------------------------------------------


@pytest.fixture
def installed(workdir: str) -> Installation:
    made = Installation(os.path.join(workdir, "installed"))
    made.configure(["/usr/sbin/runc"], [], engine="")
    return made


def command(installation: Installation, *arguments: str) -> list[str]:
    return [installation.program("chandler"), "configure", *arguments]


@pytest.mark.parametrize("release", DOCKERS, ids=lambda release: release.label)
def test_docker_verifies(release: Any, installed: Installation, workdir: str) -> None:
    if release.missing:
        pytest.skip(release.missing)
    docker = Docker(release, os.path.join(workdir, "docker"))
    with open(docker.config, "w", encoding="utf-8") as file:
        file.write('{"live-restore": false}')
    options = [
        "docker",
        "--config",
        docker.config,
        "--programs",
        release.binary("bin"),
        "--address",
        f"{docker.directory}/d.sock",
    ]

    def configure(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(installed, *options, *more),
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            env={"HOME": workdir},
        )

    assert configure("--default").returncode == 0
    docker.start()
    try:
        before = docker.cli("images", "--quiet").stdout
        done = configure("--default", "--verify")
        assert done.returncode == 0 and "got what it asked for" in done.stdout, done.stderr
        assert docker.info()["DefaultRuntime"] == "chandler"
        done = configure("--dry-run", "--handler", "unheard-of", "--verify")
        assert done.returncode == 1 and "unheard-of" in done.stderr and done.stderr.count("\n") == 1
        assert docker.cli("images", "--quiet").stdout == before and docker.cli("ps", "--all", "--quiet").stdout == ""
        assert configure("--remove").returncode == 0 and read(docker.config) == '{"live-restore": false}'
    finally:
        docker.stop()
        cgroups.end(workdir)


def test_podman_verifies(installed: Installation, workdir: str) -> None:
    """The host's own podman, called as root, with an /etc/containers of its own."""
    if not os.access("/usr/bin/podman", os.X_OK):
        pytest.skip("not installed: podman")
    etc = os.path.join(workdir, "etc-containers")
    os.makedirs(etc)
    # A socket's path has at most 108 characters; with a longer one podman waits twenty seconds.
    with tempfile.TemporaryDirectory(dir="/run") as short:
        _podman(installed, workdir, etc, short)


def _podman(installed: Installation, workdir: str, etc: str, short: str) -> None:
    for name, text in {
        "policy.json": '{"default": [{"type": "insecureAcceptAnything"}]}',
        "storage.conf": f'[storage]\ndriver = "vfs"\ngraphroot = "{workdir}/graph"\nrunroot = "{short}/run"\n',
        "containers.conf": '[containers]\ndefault_ulimits = ["nofile=512:512", "nproc=512:512"]\n'
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n',
    }.items():
        with open(os.path.join(etc, name), "w", encoding="utf-8") as file:
            file.write(text)
    verify, remove = (" ".join(command(installed, "podman", option)) for option in ("--verify", "--remove"))
    # The sentence of a refusal reaches the caller through the log that podman is now configured to read.
    asking = "podman run --rm --runtime chandler --network none --annotation chandler.oci/gpus=1 --rootfs / /bin/true"
    script = (
        f"mount --bind {etc} /etc/containers && mount --make-rshared / && {verify} && "
        f"podman info --format '{{{{.Host.OCIRuntime.Name}}}}'; {asking} 2>&1; "
        f"{verify} --default && podman info --format '{{{{.Host.OCIRuntime.Name}}}}'; podman ps --all --quiet; {remove}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": workdir},
    )
    assert done.stdout.count("got what it asked for") == 2, done.stdout + done.stderr
    assert "unknown key 'gpus'" in done.stdout and "\nchandler\n" in done.stdout
    assert sorted(os.listdir(etc)) == ["containers.conf", "policy.json", "storage.conf"] and not os.listdir(
        os.path.join(installed.etc, "config.d")
    )
    cgroups.end(workdir)


def test_podman_of_a_user(installed: Installation, workdir: str) -> None:
    """The files are in the user's home and keep what the node's files say; Chandler's own key is root's."""
    home = os.path.join(workdir, "home")
    os.makedirs(home)
    os.chown(home, 1, 1)

    def configure(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["setpriv", "--reuid=1", "--regid=1", "--clear-groups", *command(installed, *arguments)],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={"HOME": home, "PATH": "/usr/bin:/bin"},
        )

    done = configure("podman", "--default")
    assert done.returncode == 0, done.stderr
    written = os.path.join(home, ".config/containers/containers.conf.d/99-chandler.conf")
    assert installed.program() in read(written) and os.stat(written).st_uid == 1
    assert not os.listdir(os.path.join(installed.etc, "config.d"))
    assert "nothing to change" in configure("podman", "--default").stdout
    assert configure("podman", "--remove").returncode == 0 and not os.path.exists(written)
    refused = configure("containerd")
    assert refused.returncode == 1 and "only root can configure containerd" in refused.stderr
