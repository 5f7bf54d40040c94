"""An image cannot make a request: not by its manifest's annotations, not by its labels, not through any engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import bundle, image, runtimes
from lab.containerd import RELEASES as CONTAINERDS
from lab.containerd import Containerd
from lab.cri import CRI
from lab.docker import RELEASES as DOCKERS
from lab.docker import Docker
from lab.engine import Engine
from lab.install import Installation
from lab.node import KIND, Node
from lab.podman import RELEASES, Podman, Release
from lab.workdir import within

EVIL = "docker.io/local/evil:1"
P = "chandler.oci/"
LOW = {"podman-4": {"runc": "runc", "crun": "crun"}, "podman-5": {"runc": "newer-runc", "crun": "newer-crun"}}
SEE = ("sh", "-c", "env; ls /dev; cat /h/shadow")
GPUS = {P + "service": json.dumps({"resources": {"gpu": {"count": 8}}, "env": {"EVIL": "image"}})}


class Scene:
    """A podman that is not configured for Chandler and gets its program by --runtime; `engines` is not set."""

    def __init__(self, release: Release, workdir: str, node: Node, rootless: bool = False) -> None:
        self.node, self.workdir, self.release = node, workdir, release
        self.podman = Podman(release, os.path.join(workdir, "podman"), rootless)
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.configure()
        self.podman.load()
        self.images = 0

    def configure(self, more: str = "") -> None:
        low = [runtimes.named(label).path for label in LOW[self.release.label].values()]
        self.installation.configure(low, [self.node.cdi], more, engine="")
        self.installation.refresh()

    def load(self, annotations: Any, **configured: Any) -> str:
        """Load an image with these annotations in its manifest, under a name of its own.

        Its configuration is unique, too, because podman tells images apart by their configuration.
        """
        self.images += 1
        name = EVIL.replace(":1", f":{self.images}")
        self.pull(name, annotations, **{"Env": ["PATH=/bin", f"NUMBER={self.images}"], **configured})
        return name

    def pull(self, name: str, annotations: Any, **configured: Any) -> None:
        self.podman.cli(
            "load",
            "--input",
            image.make(os.path.join(self.workdir, "evil.tar"), name, annotations=annotations, **configured),
        )

    def run(
        self, low: str, name: str, *options: str, command: tuple[str, ...] = SEE
    ) -> subprocess.CompletedProcess[str]:
        program = self.installation.program(f"chandler-{low}")
        return self.podman.cli(f"--runtime={program}", "run", "--rm", *options, name, *command, check=False)

    def leases(self) -> dict[str, list[str]]:
        return self.installation.leases()


def made(release: Release, lab: str, node: Node, rootless: bool) -> Iterator[Scene]:
    for missing in (release.missing, *(runtimes.named(label).missing for label in LOW[release.label].values())):
        if missing:
            pytest.skip(missing)
    with within(lab) as directory:
        scene = Scene(release, directory, node, rootless)
        yield scene
        scene.podman.close()


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.label)
def scene(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Scene]:
    yield from made(request.param, lab, node, False)


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.label)
def rootless(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Scene]:
    yield from made(request.param, lab, node, True)


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "scene" in request.fixturenames:
        found = request.getfixturevalue("scene")
        found.podman.clean()
        found.configure()


def of_image(done: subprocess.CompletedProcess[str], key: str) -> bool:
    """Whether this is the refusal that names the image's key, and nothing ran."""
    return (
        done.returncode == 126
        and not done.stdout
        and f"annotation {key}: it comes from the image, whose manifest has it" in done.stderr
    )


def refused(scene: Scene, done: subprocess.CompletedProcess[str], key: str) -> bool:
    """Whether the image's request had no effect.

    Where podman copies the image's annotations (4.3 does), the create is refused. Where it does not (5.8), the
    container starts without a GPU.
    """
    if scene.release.label == "podman-4":
        return of_image(done, key)
    gpus = [os.path.basename(gpu.inside) for gpu in scene.node.gpus]
    return (
        "PATH=" in done.stdout
        and "EVIL" not in done.stdout
        and "root:" not in done.stdout
        and not set(gpus) & set(done.stdout.split())
    )


@pytest.mark.parametrize("low", ["runc", "crun"])
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_gpus_and_variables(scene: Scene, low: str, warm: bool) -> None:
    if not warm:
        scene.installation.forget()
    done = scene.run(low, scene.load(GPUS))
    assert refused(scene, done, P + "service") and scene.leases() == {}, done.stderr


@pytest.mark.parametrize("low", ["runc", "crun"])
def test_the_host_under_a_policy_that_trusts_every_caller(scene: Scene, low: str) -> None:
    scene.configure('[policy]\ntrust = "all"\n')
    done = scene.run(
        low,
        scene.load(
            {
                P + "service": json.dumps(
                    {"privileged": True, "storage": [{"type": "bind", "source": "/etc", "target": "/h"}]}
                )
            }
        ),
    )
    assert refused(scene, done, P + "service"), done.stderr


@pytest.mark.parametrize(
    "key", [P + "resources.gpu.count", P + "env.EVIL", P + "services", P + "no-such-key", P + "x.nerdctl/y"]
)
def test_every_key_of_ours(scene: Scene, key: str) -> None:
    assert refused(scene, scene.run("runc", scene.load({key: "1"})), key)


def test_cdi_s_annotations_where_they_are_honoured(scene: Scene) -> None:
    name = scene.load({"cdi.k8s.io/x": f"{KIND}=0"})
    plain = scene.run("runc", name, command=("ls", "/dev"))
    assert plain.returncode == 0 and scene.node.gpus[0].inside.rpartition("/")[2] not in plain.stdout, (
        "nothing is asked, nothing is touched"
    )
    scene.configure("annotations = true\n")
    assert refused(scene, scene.run("runc", name), "cdi.k8s.io/x")
    asked = scene.run("runc", name, scene.podman.annotation(f"cdi.k8s.io/x={KIND}=1"), command=("ls", "/dev"))
    assert asked.returncode == 0 and [
        gpu.inside for gpu in scene.node.gpus if os.path.basename(gpu.inside) in asked.stdout.split()
    ] == [scene.node.gpus[1].inside]


@pytest.mark.parametrize("low", ["runc", "crun"])
def test_the_callers_own_annotation_counts(scene: Scene, low: str) -> None:
    """podman lets the caller's annotation win over the image's. If both have the same value, either may have asked."""
    name = scene.load({P + "service": json.dumps({"env": {"EVIL": "image"}})})
    own = scene.podman.annotation(f"{P}service={json.dumps({'env': {'GOOD': 'caller'}})}")
    done = scene.run(low, name, own, command=("env",))
    assert done.returncode == 0 and "GOOD=caller" in done.stdout and "EVIL" not in done.stdout
    assert of_image(
        scene.run(low, name, scene.podman.annotation(f"{P}service={json.dumps({'env': {'EVIL': 'image'}})}")),
        P + "service",
    )


def test_a_request_of_the_caller_adds_nothing_from_the_image(scene: Scene) -> None:
    name = scene.load({P + "env.EVIL": "image"})
    done = scene.run("runc", name, scene.podman.annotation(P + "resources.gpu.count=1"))
    assert "EVIL" not in done.stdout and (
        of_image(done, P + "env.EVIL") or scene.release.label == "podman-5" and "CUDA_VISIBLE_DEVICES=0" in done.stdout
    )
    assert scene.leases() == {}


def test_an_image_that_asks_nothing(scene: Scene) -> None:
    """Other annotations and labels of the image do not matter, whatever the caller asks for."""
    name = scene.load({"org.opencontainers.image.title": "chandler.oci/service"}, Labels=GPUS)
    plain = scene.run("runc", name, command=("env",))
    assert plain.returncode == 0 and "EVIL" not in plain.stdout
    asked = scene.run("runc", name, scene.podman.annotation(P + "resources.gpu.count=1"), command=("env",))
    assert asked.returncode == 0 and "CUDA_VISIBLE_DEVICES=0" in asked.stdout


@pytest.mark.parametrize(
    "members",
    [
        '"ANNOTATIONS": {"chandler.oci/env.EVIL": "image"}',
        '"annotation\\u017f": {"chandler.oci/env.EVIL": "image"}',
        '"annotations": {}, "annotations": {"chandler.oci/env.EVIL": "image"}',
        '"annotations": {"chandler.oci/env.EVIL": "\\ud800"}',
        '"annotations": {"chandler\\u002eoci/env.EVIL": "im\\u0061ge"}',
        '"annotations": {"chandler.oci/env.EVIL": "x", "chandler.oci/env.EVIL": "image"}',
    ],
)
def test_spellings_of_a_manifest_that_podman_reads(scene: Scene, members: str) -> None:
    """Go's JSON decoder ignores case, folds some letters and takes the last duplicate: all that it reads is refused."""
    name = scene.load(members)
    done = scene.run("runc", name, command=("env",))
    assert "EVIL" not in done.stdout, "the image has asked"
    assert done.returncode == 0 or "annotation chandler.oci/env.EVIL: " in done.stderr and "image" in done.stderr, (
        done.stderr
    )


def test_an_image_that_was_pulled_anew_since(scene: Scene) -> None:
    """Images with the same configuration are one image: its older manifest still counts."""
    name = scene.load(GPUS, Env=["PATH=/bin", "A=1"])
    program = scene.installation.program("chandler-runc")
    container = scene.podman.cli(f"--runtime={program}", "create", "--network=host", name, "env").stdout.strip()
    scene.pull(name, None, Env=["PATH=/bin", "A=1"])
    done = scene.podman.cli(f"--runtime={program}", "start", "--attach", container, check=False)
    assert scene.leases() == {}
    assert (
        done.returncode
        and "it comes from the image" in done.stderr
        or scene.release.label == "podman-5"
        and "EVIL" not in done.stdout
    )


@pytest.mark.parametrize("gone", ["manifest", "records", "image"])
def test_an_unreadable_image_record_refuses_the_request(scene: Scene, gone: str) -> None:
    """Where the image's record cannot be read, a request is refused and the sentence says what is missing.

    A container without a request is not looked at.
    """
    name = scene.load(None)
    store = os.path.join(scene.podman.home, "images")
    wrapper = os.path.join(scene.workdir, f"chandler-without-{gone}")
    identity = scene.podman.cli("image", "inspect", "--format", "{{.Id}}", name).stdout.strip()
    path = {
        "manifest": f"{store}/vfs-images/{identity}/manifest",
        "image": f"{store}/vfs-images/{identity}",
        "records": f"{store}/vfs-containers/containers.json",
    }[gone]
    spoil = f'cp "{path}" "{path}.aside"; echo "{{" >"{path}"' if gone == "manifest" else f'mv "{path}" "{path}.aside"'
    mend = f'rm -f "{path}"; mv "{path}.aside" "{path}"'
    # podman reads its own store before it calls the runtime, so the file is missing only while Chandler looks
    with open(wrapper, "w", encoding="utf-8") as file:
        file.write(
            f'#!/bin/sh\ncase " $* " in *" create "*) {spoil}; "{scene.installation.program("chandler-runc")}" "$@"; '
            f"status=$?; {mend}; exit $status ;; esac\n"
            f'exec "{scene.installation.program("chandler-runc")}" "$@"\n'
        )
    os.chmod(wrapper, 0o755)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return scene.podman.cli(f"--runtime={wrapper}", "run", "--network=host", *options, name, "env", check=False)

    done = run(scene.podman.annotation(P + "env.A=b"))
    assert (
        done.returncode == 126 and f"annotation {P}env.A: whether it comes from the image is not known: " in done.stderr
    ), done.stderr
    assert run().returncode == 0


def test_a_root_file_system_without_an_image(scene: Scene) -> None:
    root = bundle.rootfs(os.path.join(scene.workdir, "rootfs"))
    program = scene.installation.program("chandler-runc")
    try:
        done = scene.podman.cli(
            f"--runtime={program}",
            "run",
            "--rm",
            scene.podman.annotation(P + "env.GOOD=caller"),
            "--rootfs",
            root,
            "env",
            check=False,
        )
        assert done.returncode == 0 and "GOOD=caller" in done.stdout, done.stderr
    finally:
        shutil.rmtree(root)


def test_a_pod_of_kube_play(scene: Scene) -> None:
    """podman does not copy the image's annotations here; the pod's own annotations are the caller's."""
    name = scene.load({P + "env.EVIL": "image"})
    file = os.path.join(scene.workdir, "pod.yaml")
    with open(file, "w", encoding="utf-8") as out:
        json.dump(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "p", "annotations": {P + "env.GOOD": "pod"}},
                "spec": {
                    "hostNetwork": True,
                    "restartPolicy": "Never",
                    "containers": [
                        {
                            "name": "c",
                            "image": name,
                            "command": ["sh", "-c", "echo EVIL=$EVIL; echo GOOD=$GOOD; echo END"],
                        }
                    ],
                },
            },
            out,
        )
    scene.podman.cli(f"--runtime={scene.installation.program('chandler-runc')}", "kube", "play", "--network=host", file)
    assert {"EVIL=", "GOOD=pod"} <= set(scene.podman.logs("p-c", "END"))


def test_a_build_from_the_image(scene: Scene) -> None:
    """buildah calls the runtime for every RUN, without the image's annotations."""
    context = os.path.join(scene.workdir, "context")
    os.makedirs(context)
    with open(os.path.join(context, "Containerfile"), "w", encoding="utf-8") as file:
        file.write(f"FROM {scene.load(GPUS)}\nRUN echo seen=$EVIL=\n")
    done = scene.podman.cli(
        f"--runtime={scene.installation.program('chandler-runc')}", "build", "--network=host", "--no-cache", context
    )
    assert "seen==" in done.stdout + done.stderr and scene.leases() == {}
    shutil.rmtree(context)


def test_a_transient_store_and_images_elsewhere(scene: Scene) -> None:
    if scene.release.label == "podman-4":
        return  # has neither
    clean, evil = scene.load(None), scene.load({P + "env.EVIL": "image"})
    program = f"--runtime={scene.installation.program('chandler-runc')}"
    asks = scene.podman.annotation(P + "env.GOOD=caller")
    done = scene.podman.cli(
        "--transient-store",
        program,
        "run",
        "--rm",
        scene.podman.annotation(P + "env.EVIL=image"),
        evil,
        "env",
        check=False,
    )
    assert of_image(done, P + "env.EVIL")
    done = scene.podman.cli("--transient-store", program, "run", "--rm", asks, clean, "env", check=False)
    assert done.returncode == 0 and "GOOD=caller" in done.stdout, done.stderr
    # images in a store that the container's paths do not name
    elsewhere = f"--imagestore={scene.workdir}/elsewhere"
    scene.podman.cli(
        elsewhere,
        "load",
        "--input",
        image.make(os.path.join(scene.workdir, "other.tar"), EVIL.replace("evil", "other"), Env=["PATH=/bin", "B=1"]),
    )
    done = scene.podman.cli(elsewhere, program, "run", "--rm", asks, EVIL.replace("evil", "other"), "env", check=False)
    assert (
        done.returncode == 126
        and f"annotation {P}env.GOOD: whether it comes from the image is not known" in done.stderr
    )


@pytest.mark.parametrize("low", ["runc", "crun"])
def test_podman_without_root(rootless: Scene, low: str) -> None:
    name = rootless.load({P + "env.EVIL": "image"})
    assert refused(rootless, rootless.run(low, name), P + "env.EVIL")
    assert of_image(rootless.run(low, name, rootless.podman.annotation(P + "env.EVIL=image")), P + "env.EVIL")
    done = rootless.run(low, name, rootless.podman.annotation(P + "env.EVIL=caller"), command=("env",))
    assert done.returncode == 0 and "EVIL=caller" in done.stdout, done.stderr


# --- other engines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", CONTAINERDS, ids=lambda release: release.label)
def test_containerd_and_its_clients(release: Any, lab: str, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    if release.missing:
        pytest.skip(release.missing)
    with within(lab) as workdir:
        installation = Installation(os.path.join(workdir, "installed"))
        installation.configure(["/usr/sbin/runc"], [node.cdi], engine="")
        containerd = Containerd(release, os.path.join(workdir, "c"), {"chandler": installation.program()}, node.cdi)
        containerd.start()
        try:
            evil = image.make(
                os.path.join(workdir, "evil.tar"),
                EVIL,
                annotations=GPUS,
                Labels={**GPUS, P + "env.EVIL.nerdctl/": "x"},
                Env=["PATH=/bin"],
            )
            for namespace in ("k8s.io", "default"):
                containerd.ctr("-n", namespace, "images", "import", evil)
            with CRI(containerd.socket) as cri:
                cri.ready()
                monkeypatch.setattr("lab.cri.IMAGE", EVIL)
                assert (
                    "EVIL" not in cri.env(cri.run(cri.pod("nothing", handler="chandler")))
                    and installation.leases() == {}
                )
                asking = cri.run(cri.pod("asks", {P + "env.GOOD": "pod"}, "chandler"))
                assert cri.env(asking)["GOOD"] == "pod" and "EVIL" not in cri.env(asking)
                monkeypatch.undo()

            def ctr(namespace: str, *annotations: str) -> subprocess.CompletedProcess[str]:
                options = [word for annotation in annotations for word in ("--annotation", annotation)]
                return containerd.ctr(
                    "-n",
                    namespace,
                    "run",
                    "--rm",
                    "--net-host",
                    "--runc-binary",
                    installation.program(),
                    *options,
                    EVIL,
                    "x",
                    "env",
                    check=False,
                )

            plain = ctr("default")
            assert plain.returncode == 0 and "EVIL" not in plain.stdout, plain.stderr
            stranger = ctr("default", P + "env.EVIL=x")
            assert (
                stranger.returncode
                and "since Chandler does not know who calls "
                "(containerd's namespace default is neither CRI's nor Docker's"
                in stranger.stderr
            )
            for namespace in ("default", "k8s.io"):
                # annotations that nerdctl adds to each of its containers, beside the image's labels
                nerdctl = ctr(
                    namespace,
                    f"nerdctl/namespace={namespace}",
                    "io.kubernetes.cri.container-type=container",
                    P + "env.EVIL=x",
                )
                assert nerdctl.returncode and "nerdctl makes annotations of an image's labels" in nerdctl.stderr
        finally:
            containerd.stop()


@pytest.mark.parametrize("release", DOCKERS, ids=lambda release: release.label)
def test_docker(release: Any, lab: str, node: Node) -> None:
    if release.missing:
        pytest.skip(release.missing)
    with within(lab) as workdir:
        installation = Installation(os.path.join(workdir, "installed"))
        installation.configure(["/usr/sbin/runc"], [node.cdi], engine="")
        docker = Docker(release, os.path.join(workdir, "d"))
        with open(docker.config, "w", encoding="utf-8") as file:
            json.dump({"runtimes": {"chandler": {"path": installation.program()}}, "default-runtime": "chandler"}, file)
        docker.start()
        try:
            docker.cli(
                "load",
                "--input",
                image.make(os.path.join(workdir, "evil.tar"), EVIL, annotations=GPUS, Labels=GPUS, Env=["PATH=/bin"]),
            )
            plain = docker.cli("run", "--rm", "--network=none", EVIL, "env")
            assert "EVIL" not in plain.stdout and installation.leases() == {}
            asked = docker.cli("run", "--rm", "--network=none", f"--annotation={P}env.GOOD=caller", EVIL, "env")
            assert "GOOD=caller" in asked.stdout and "EVIL" not in asked.stdout
            docker.clean()
        finally:
            docker.stop()


@pytest.fixture
def by_hand(
    runtime: runtimes.Runtime, lab: str, workdir: str, node: Node
) -> Iterator[Callable[..., tuple[Installation, Engine]]]:
    """Calls the runtime without an engine, as a person does."""
    engines = []

    def make(engine: str) -> tuple[Installation, Engine]:
        installation = Installation(os.path.join(lab, "asks-" + runtime.label))
        installation.configure([runtime.path], [node.cdi], engine=engine)
        engines.append(
            Engine(
                [*runtime.wrap, installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
            )
        )
        return installation, engines[-1]

    yield make
    for each in engines:
        each.clean()


def test_a_bundle_that_somebody_unpacked(by_hand: Callable[..., tuple[Installation, Engine]], workdir: str) -> None:
    """umoci turns an image's labels into annotations, as the OCI image specification says.

    Nothing then tells which annotations are the image's.
    """
    installation, engine = by_hand("")
    for warm in (True, False):
        if warm:
            installation.refresh()
        else:
            installation.forget()
        made = bundle.make(os.path.join(workdir, f"b-{warm}"), ["env"], {P + "env.EVIL": "image"})
        before = made.bytes
        done = engine.run(made, "c1", check=False)
        assert (
            done.returncode == 1
            and made.bytes == before
            and "does not know who calls (neither --root nor the bundle's path" in done.stderr
        )
        assert 'list "other" in engines' in done.stderr
        plain = bundle.make(os.path.join(workdir, f"p-{warm}"), ["env"])
        assert engine.run(plain, "c1").returncode == 0
    _, engine = by_hand("containerd")
    assert (
        "EVIL=image"
        in engine.run(bundle.make(os.path.join(workdir, "vouched"), ["env"], {P + "env.EVIL": "image"}), "c1").stdout
    )


def test_a_bundle_of_our_own_builder(
    runtime: runtimes.Runtime, by_hand: Callable[..., tuple[Installation, Engine]], workdir: str
) -> None:
    """The builder's own request is believed until somebody changes it.

    A mark inside the root file system is not believed.
    """
    installation, engine = by_hand("")
    installation.refresh()
    root = bundle.rootfs(os.path.join(workdir, "rootfs"))
    spec = os.path.join(workdir, "deployment.yaml")
    with open(spec, "w", encoding="utf-8") as file:
        json.dump(
            {
                "version": "v1",
                "deployment": "d",
                "services": {"web": {"command": {"entrypoint": ["env"]}, "resources": {"gpu": {"count": 1}}}},
            },
            file,
        )

    def chandler(*words: str) -> None:
        subprocess.run(
            [installation.program("chandler"), "bundle", *words],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={"PATH": "/usr/bin:/bin"},
        )

    directory = os.path.join(workdir, "built")
    chandler("create", "--spec", spec, "--rootfs", root, directory)
    made = bundle.Bundle(directory)
    assert "CUDA_VISIBLE_DEVICES=0" in engine.run(made, "c1").stdout
    assert "CUDA_VISIBLE_DEVICES=0" in engine.run(made, "c1").stdout, "created again from our own result"
    chandler("write-config", "--spec", spec, "--rootfs", root, directory)
    config = made.config
    config["annotations"][P + "service"] = json.dumps({"resources": {"gpu": {"count": 8}}})
    made.config = config
    done = engine.run(made, "c1", check=False)
    assert done.returncode == 1 and "does not know who calls" in done.stderr
    # the root file system is the bundle itself: what lies beside config.json is the image's
    inside = os.path.join(root, "b")
    config = bundle.config(["env"], {P + "env.EVIL": "image"}, root=root)
    os.makedirs(inside)
    made = bundle.Bundle(inside)
    made.config = config
    digest = subprocess.run(
        [
            "/usr/bin/python3",
            "-c",
            "import sys; "
            f"sys.path.insert(0, {os.path.dirname(os.path.dirname(installation.program())) + '/lib/chandler'!r}); "
            "from shim.host import files; print(files.digest(open(sys.argv[1], 'rb').read()))",
            made.path,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    os.symlink(digest, made.path + ".chandler-built")
    done = engine.run(made, "c1", check=False)
    assert done.returncode == 1 and "does not know who calls" in done.stderr
