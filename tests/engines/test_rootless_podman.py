"""podman of an unprivileged user: user namespaces with subordinate ids, state of the user's own, and limits of both."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from lab import runtimes
from lab.install import Installation
from lab.node import KIND, Node
from lab.podman import LENT, RELEASES, UID, Podman, Release
from lab.workdir import within

LOW = {
    "podman-4": {"chandler-runc": "runc", "chandler-crun": "crun"},
    "podman-5": {"chandler-runc": "newer-runc", "chandler-crun": "newer-crun"},
}
PREFIX = "chandler.oci/"


class Scene:
    """Chandler and the CDI files belong to root; the user configures podman himself."""

    def __init__(self, release: Release, workdir: str, node: Node) -> None:
        self.node = node
        self.podman = Podman(release, os.path.join(workdir, "podman"), rootless=True)
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.low = [runtimes.named(label) for label in LOW[release.label].values()]
        self.cdi = os.path.join(workdir, "cdi")
        os.mkdir(self.cdi)
        os.chmod(self.cdi, 0o755)
        shutil.copy(node.spec, self.cdi)
        self.installation.configure(
            [found.path for found in self.low], [self.cdi], '[gpu]\nallocator = "leases"\n', engine=""
        )
        self.installation.refresh()
        self.chandler("configure", "podman", *(f"--runtime={found.kind}" for found in self.low))
        self.podman.load()

    def chandler(self, *arguments: str) -> str:
        return self.podman.call(self.installation.program("chandler"), *arguments).stdout

    @contextlib.contextmanager
    def described(self, name: str, *edits: dict[str, Any]) -> Iterator[str]:
        """Make more devices on the node, NAME0, NAME1…; returns the path of their CDI file."""
        path = os.path.join(self.cdi, name + ".json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "cdiVersion": "0.5.0",
                    "kind": KIND,
                    "devices": [{"name": f"{name}{n}", "containerEdits": made} for n, made in enumerate(edits)],
                },
                file,
            )
        yield path
        os.unlink(path)

    def leases(self) -> dict[str, list[str]]:
        """The user's leases: container to devices."""
        return {lease["id"]: lease["names"] for lease in json.loads(self.chandler("leases", "--format", "json"))}


@pytest.fixture(scope="module", params=RELEASES, ids=lambda release: release.label)
def scene(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Scene]:
    for missing in (
        request.param.missing,
        *(runtimes.named(label).missing for label in LOW[request.param.label].values()),
    ):
        if missing:
            pytest.skip(missing)
    with within(lab) as directory:
        made = Scene(request.param, directory, node)
        yield made
        made.podman.close()


@pytest.fixture
def podman(scene: Scene) -> Iterator[Podman]:
    yield scene.podman
    scene.podman.clean()


@pytest.fixture(params=sorted(LOW["podman-5"]))
def handler(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ask(**document: Any) -> dict[str, str]:
    return {PREFIX + "service": json.dumps(document)}


def test_a_container_s_life(scene: Scene, podman: Podman, handler: str) -> None:
    asked = ask(resources={"gpu": {"count": 2}}, env={"EPOCHS": "3"})
    container = podman.run(
        handler,
        "--detach",
        annotations=asked,
        command=["sh", "-c", "env; cat /proc/self/uid_map; echo END; sleep 3600"],
    ).stdout.strip()
    assert scene.leases() == {container: [f"{KIND}=0", f"{KIND}=1"]} and scene.installation.leases() == {}
    seen = podman.logs(container, "END")
    assert {"EPOCHS=3", "CUDA_VISIBLE_DEVICES=0,1"} <= set(seen)
    assert [line.split() for line in seen[-3:-1]] == [["0", str(UID), "1"], ["1", str(LENT), "65536"]]
    opened = (
        "; ".join(f"exec 3<{gpu.inside} || exit 1" for gpu in scene.node.gpus[:2])
        + f"; ! test -e {scene.node.gpus[2].inside}"
    )
    podman.cli("exec", container, "sh", "-c", opened)
    # what Chandler keeps is his, where his other programs keep theirs
    kept = os.path.join(podman.state, "chandler")
    assert os.stat(kept).st_uid == UID and os.stat(kept).st_mode & 0o777 == 0o700
    assert any(container in name for name in os.listdir(os.path.join(kept, "grants")))
    podman.cli("stop", "--time=0", container)
    assert scene.leases() == {}
    podman.cli("start", container)
    podman.cli("exec", container, "sh", "-c", opened)
    podman.cli("rm", "--force", "--time=0", container)
    assert scene.leases() == {}


@pytest.mark.parametrize("option", ["--userns=keep-id", "--uidmap=0:1:1000"])
def test_a_user_namespace_within_the_users_own(scene: Scene, podman: Podman, handler: str, option: str) -> None:
    command = ["sh", "-c", f"exec 3<{scene.node.gpus[0].inside} && env"]
    done = podman.run(handler, "--rm", option, annotations={PREFIX + "resources.gpu.count": "1"}, command=command)
    assert "CUDA_VISIBLE_DEVICES=0" in done.stdout and scene.leases() == {}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"resources": {"gpu": {"count": 9}}}, "resources.gpu asks for 9 devices of nvidia.com/gpu; this node has 8"),
        ({"resources": {"gpu": {"devices": ["nvidia.com/gpu=77"]}}}, "unresolvable CDI devices nvidia.com/gpu=77"),
    ],
)
def test_a_refused_container(
    scene: Scene, podman: Podman, handler: str, document: dict[str, Any], message: str
) -> None:
    done = podman.run(handler, "--rm", annotations=ask(**document), check=False)
    assert done.returncode == 126 and message in done.stderr and f"Error: OCI runtime error: {handler}: " in done.stderr
    assert podman.cli("ps", "--all", "--quiet").stdout == "" and scene.leases() == {}


def test_a_device_that_cannot_be_made(scene: Scene, podman: Podman, handler: str) -> None:
    """For root a runtime makes any node. Here the host must have the node, and it must be the chosen device."""
    nodes = ({"path": path, "type": "c", "major": 7, "minor": 60} for path in ("/dev/gone", "/dev/zero"))
    with scene.described("other", *({"deviceNodes": [node]} for node in nodes)):
        for number, message in enumerate(
            (
                "/dev/gone is not on this host, and in a user namespace no device can be made",
                "/dev/zero is c 1:5 on this host, not c 7:60",
            )
        ):
            done = podman.run(
                handler, "--rm", annotations={PREFIX + "resources.gpu.devices": f"{KIND}=other{number}"}, check=False
            )
            assert done.returncode == 126 and message in done.stderr and scene.leases() == {}


def test_files_of_a_subordinate_id_are_not_trusted_as_roots(scene: Scene, podman: Podman) -> None:
    """A file of a subordinate id shows uid 65534 in the user's namespace, as root's files do."""
    asked = {PREFIX + "resources.gpu.devices": f"{KIND}=lent0"}
    with scene.described("lent", {"env": ["LENT=yes"]}) as path:
        assert "LENT=yes" in podman.run("chandler-runc", "--rm", annotations=asked, command=["env"]).stdout
        os.chown(path, LENT + 65534 - 1, 0)
        done = podman.run("chandler-runc", "--rm", annotations=asked, command=["env"], check=False)
        assert done.returncode == 126 and f"{path} belongs to uid 65534" in done.stderr


def test_a_container_without_a_request_is_unchanged(podman: Podman, handler: str) -> None:
    container = podman.run(handler, "--detach").stdout.strip()
    assert not [name for name in os.listdir(podman.bundle(container)) if "chandler" in name]
