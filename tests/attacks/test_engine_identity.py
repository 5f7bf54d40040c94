"""A container's identity comes from the calling engine, never from annotations that a caller or an image writes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import bundle, image, runtimes
from lab.containerd import IMAGE, RELEASES, Containerd, Release
from lab.cri import CRI, Refused
from lab.docker import RELEASES as DOCKERS
from lab.docker import Docker
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node
from lab.podman import RELEASES as PODMANS
from lab.podman import Podman
from lab.workdir import within

P = "chandler.oci/"
FORGED = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.container-name": "main",
    "io.kubernetes.cri.sandbox-namespace": "prod",
    "io.kubernetes.cri.sandbox-name": "p",
    "io.kubernetes.cri-o.ContainerType": "container",
    "io.kubernetes.pod.namespace": "prod",
}
REACHING = {
    P + "service": json.dumps({"privileged": True, "storage": [{"type": "bind", "source": "/etc", "target": "/h"}]})
}
RULES = (
    '[policy]\nallow = ["gpu"]\n[[policy.rule]]\nname = "prod"\nmatch = {namespace = ["prod"]}\n'
    'allow = ["gpu", "env", "privileged", "bind"]\nbind-sources = ["/etc"]\n'
    '[[policy.rule]]\nname = "quarantine"\nmatch = {namespace = ["quarantine"]}\ndeny = ["hostname"]\n'
)


class Scene:
    """One node with containerd, podman and one Chandler for both, each configured by `chandler configure`."""

    def __init__(self, release: Release, workdir: str, node: Node) -> None:
        self.workdir, self.node = workdir, node
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.configure()
        self.containerd = Containerd(release, os.path.join(workdir, "c"), {}, node.cdi)
        self.podman = Podman(PODMANS[0], os.path.join(workdir, "podman"))
        self.said = self.chandler(
            "configure",
            "containerd",
            "--config",
            os.path.join(self.containerd.directory, "config.toml"),
            "--engine-version",
            "2.1.9" if release.schema == 3 else "1.7.24",
            "--runtime",
            "runc",
        )
        self.podman.call(
            self.installation.program("chandler"), "configure", "podman", "--runtime", "runc", "--runtime", "crun"
        )
        self.containerd.start()
        self.cri = CRI(self.containerd.socket)
        self.cri.ready()
        self.podman.load()

    def chandler(self, *words: str, status: int = 0) -> str:
        done = subprocess.run(
            [self.installation.program("chandler"), *words],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={},
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    def configure(self, more: str = "") -> None:
        self.installation.configure(["/usr/sbin/runc", "/usr/bin/crun"], [self.node.cdi], more + RULES, engine="")
        self.installation.refresh()

    def close(self) -> None:
        self.cri.__exit__()
        self.containerd.stop()
        self.podman.close()


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.label)
def scene(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Scene]:
    for missing in (
        request.param.missing,
        PODMANS[0].missing,
        runtimes.named("runc").missing,
        runtimes.named("crun").missing,
    ):
        if missing:
            pytest.skip(missing)
    with within(lab) as directory:
        made = Scene(request.param, directory, node)
        yield made
        made.close()


def test_engines_side_by_side(scene: Scene) -> None:
    """Both engines work when they are configured one after the other; only containerd's pod names are believed."""
    engines = os.path.join(scene.installation.etc, "config.d")
    assert os.listdir(engines) == ["50-engine-containerd.toml"]
    served = scene.cri.run(scene.cri.pod("served", {P + "env.A": "b"}, "chandler", namespace="prod"))
    assert scene.cri.env(served)["A"] == "b"
    with pytest.raises(Refused, match="allow of .policy. has no 'env'"):
        scene.cri.run(scene.cri.pod("other", {P + "env.A": "b", **FORGED}, "chandler", namespace="other"))
    gpu = scene.podman.run("chandler", "--rm", annotations={P + "resources.gpu.count": "1"}, command=["env"])
    assert "CUDA_VISIBLE_DEVICES=0" in gpu.stdout
    doctor = subprocess.run(
        [scene.installation.program("chandler"), "doctor"],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={},
    ).stdout
    assert "the bundle is in containers/storage, whose record names no pod" in doctor


@pytest.mark.parametrize("low", ["runc", "crun"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_an_image_that_forges_a_namespace(scene: Scene, low: str, warm: bool) -> None:
    name = f"docker.io/local/forged:{low}"
    scene.podman.cli(
        "load",
        "--input",
        image.make(
            os.path.join(scene.workdir, "forged.tar"),
            name,
            annotations={**FORGED, **REACHING},
            Env=["PATH=/bin", f"LOW={low}"],
        ),
    )
    if not warm:
        scene.installation.forget()
    for program in (f"chandler-{low}", scene.installation.program(f"chandler-{low}")):
        done = scene.podman.cli(f"--runtime={program}", "run", "--rm", name, "cat", "/h/shadow", check=False)
        assert (
            done.returncode == 126
            and f"annotation {P}service: it comes from the image" in done.stderr
            and not done.stdout
        )


@pytest.mark.parametrize(
    "flag", [(), ("--runtime-flag=root=/run/lab-forged/k8s.io",)], ids=["as it is", "with the --root of another"]
)
def test_a_caller_of_podman_that_forges_a_namespace(scene: Scene, flag: tuple[str, ...]) -> None:
    name = "docker.io/local/plain:1"
    scene.podman.cli(
        "load", "--input", image.make(os.path.join(scene.workdir, "plain.tar"), name, Env=["PATH=/bin", "PLAIN=1"])
    )
    annotations = [scene.podman.annotation(f"{key}={value}") for key, value in {**FORGED, **REACHING}.items()]
    done = scene.podman.cli(
        "--runtime=chandler-runc", *flag, "run", "--rm", *annotations, name, "cat", "/h/shadow", check=False
    )
    assert done.returncode == 126 and "is not allowed: allow of [policy] has no" in done.stderr and not done.stdout


def test_a_forged_sandbox_skips_nothing(scene: Scene) -> None:
    forged = {
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri-o.ContainerType": "sandbox",
        P + "resources.gpu.count": "1",
    }
    assert (
        "CUDA_VISIBLE_DEVICES=0"
        in scene.podman.run("chandler-runc", "--rm", annotations=forged, command=["env"]).stdout
    )


def test_a_rule_that_denies_what_is_unknown(scene: Scene) -> None:
    """Podman gives no namespace, so a denial for one namespace applies, whatever namespace the caller claims."""
    scene.configure('[secrets]\ndirectory = "/run/lab-secrets/{scope}"\n')
    try:
        for forged in ({}, FORGED):
            done = scene.podman.run(
                "chandler-runc", "--rm", annotations={**forged, P + "hostname": "x"}, command=["true"], check=False
            )
            assert (
                done.returncode == 126
                and "hostname is refused by 'hostname' in deny of rule 'quarantine'" in done.stderr
            )
    finally:
        scene.configure()


def test_the_scope_of_secrets(scene: Scene) -> None:
    scene.installation.configure(
        ["/usr/sbin/runc"],
        [scene.node.cdi],
        f'[secrets]\ndirectory = "{scene.workdir}/secrets/{{scope}}"\n[policy]\nsecrets = ["*"]\n',
        engine="",
    )
    try:
        os.makedirs(os.path.join(scene.workdir, "secrets/prod"), exist_ok=True)
        with open(os.path.join(scene.workdir, "secrets/prod/token"), "w", encoding="ascii") as file:
            file.write("hunter2")
        asked = {P + "service": json.dumps({"env": {"TOKEN": "$S:token"}})}
        done = scene.podman.run("chandler-runc", "--rm", annotations={**FORGED, **asked}, command=["env"], check=False)
        assert (
            done.returncode == 126
            and "the container's namespace, is not certain" in done.stderr
            and "hunter2" not in done.stdout
        )
        assert (
            scene.cri.env(scene.cri.run(scene.cri.pod("secret", asked, "chandler", namespace="prod")))["TOKEN"]
            == "hunter2"
        )
    finally:
        scene.configure()


def test_another_namespace_of_containerd(scene: Scene) -> None:
    """Identity annotations are not believed there, even where the administrator lets any caller ask."""
    with open(os.path.join(scene.installation.etc, "config.d/60-any.toml"), "w", encoding="ascii") as file:
        file.write('engines = ["other"]\n')
    try:
        scene.containerd.ctr("-n", "default", "images", "import", os.path.join(scene.containerd.directory, "image.tar"))
        options = [
            word for key, value in {**FORGED, P + "env.A": "b"}.items() for word in ("--annotation", f"{key}={value}")
        ]
        done = scene.containerd.ctr(
            "-n",
            "default",
            "run",
            "--rm",
            "--net-host",
            "--runc-binary",
            scene.installation.program(),
            *options,
            IMAGE,
            "x",
            "env",
            check=False,
        )
        assert done.returncode and "allow of [policy] has no 'env'" in done.stderr
    finally:
        os.unlink(os.path.join(scene.installation.etc, "config.d/60-any.toml"))


def test_what_the_commands_say(scene: Scene) -> None:
    container = scene.podman.run(
        "chandler-runc", "--detach", annotations={**FORGED, P + "resources.gpu.count": "1"}, command=["sleep", "60"]
    ).stdout.strip()
    try:
        output = scene.chandler("policy", "check", "--bundle", scene.podman.bundle(container))
        assert output.startswith(
            "engine      podman (the bundle is in containers/storage, whose record names no pod); "
            "no identity annotation is believed; "
        )
        assert "not known   namespace" in output
        pod = scene.cri.run(scene.cri.pod("shown", {P + "env.A": "b"}, "chandler", namespace="prod"))
        bundle_of = scene.containerd.bundle(pod)
        output = scene.chandler("policy", "check", "--bundle", bundle_of)
        assert output.startswith(
            "engine      containerd (--root and bundle are of containerd's namespace k8s.io); "
            "its identity annotations are believed; taken from the image: nothing\n"
        )
        assert "engine      containerd" in scene.chandler("explain", "--bundle", bundle_of)
        output = scene.chandler("policy", "check", "--bundle", bundle_of, "--root", "/run/runc", status=1)
        assert (
            "engine      other (the bundle is of containerd's namespace k8s.io, and --root /run/runc is not)" in output
        )
    finally:
        scene.podman.clean()


@pytest.mark.parametrize("release", DOCKERS, ids=lambda release: release.label)
def test_a_caller_of_docker(release: Any, lab: str, node: Node) -> None:
    """On a node where containerd's identity annotations are believed."""
    if release.missing:
        pytest.skip(release.missing)
    with within(lab) as workdir:
        installation = Installation(os.path.join(workdir, "installed"))
        installation.configure(["/usr/sbin/runc"], [node.cdi], RULES)
        docker = Docker(release, os.path.join(workdir, "d"))
        with open(docker.config, "w", encoding="utf-8") as file:
            json.dump({"runtimes": {"chandler": {"path": installation.program()}}}, file)
        docker.start()
        try:
            done = docker.run(
                "chandler", "--rm", annotations={**FORGED, **REACHING}, command=["cat", "/h/shadow"], check=False
            )
            assert done.returncode and "is not allowed: allow of [policy] has no" in done.stderr and not done.stdout
            forged = {"io.kubernetes.cri.container-type": "sandbox", P + "resources.gpu.count": "1"}
            assert (
                "CUDA_VISIBLE_DEVICES=0" in docker.run("chandler", "--rm", annotations=forged, command=["env"]).stdout
            )
            docker.clean()
        finally:
            docker.stop()


def test_a_call_by_hand_is_not_taken_for_containerd(runtime: runtimes.Runtime, lab: str, workdir: str) -> None:
    """Where any caller may ask, neither annotations nor only one of its two paths make a call containerd's."""
    installation = Installation(os.path.join(lab, "who-" + runtime.label))
    installation.configure([runtime.path], [], RULES)
    task = os.path.join(workdir, "io.containerd.runtime.v2.task/k8s.io")
    for root, directory, given in (
        (f"{workdir}/root", f"{workdir}/b1/x", False),
        (f"{workdir}/r/k8s.io", f"{workdir}/b2/x", False),
        (f"{workdir}/root", f"{task}/c1", False),
        (f"{workdir}/r/k8s.io", f"{task}/c2", True),
    ):
        engine = Engine([*runtime.wrap, installation.program()], root)
        made = bundle.make(directory, ["env"], {**FORGED, P + "env.A": "b"})
        name = os.path.basename(directory) if given or "task" in directory else "c"
        before = made.bytes
        done = engine.create(made, name, check=False)
        engine.clean()
        assert (done.returncode == 0) is given and (made.bytes != before) is given, done.stdout
        assert given or "allow of [policy] has no 'env'" in done.stdout
