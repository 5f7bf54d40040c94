"""Which engine calls, and which annotations may come from an image, with a containers/storage that the tests write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lab.local_node import Node, P

from shim.cli.main import main
from shim.errors import ChandlerError, PolicyError
from shim.policy import engines
from shim.policy.caller import Caller, recognise

ID, IMAGE, LAYER = "c" * 64, "1" * 64, "2" * 64
TASK = "/run/containerd/io.containerd.runtime.v2.task"
CONFIG: Any = {"annotation-prefix": P, "cdi.annotations": False, "engines": []}
ASKS = {P + "service": "{}"}


@pytest.mark.parametrize(
    ("root", "bundle", "annotations", "engine"),
    [
        ("/run/containerd/runc/k8s.io", f"{TASK}/k8s.io/{ID}", {}, "containerd"),
        ("/var/x/k8s.io", f"/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io/{ID}", {}, "containerd"),
        (None, f"{TASK}/k8s.io/{ID}", {}, "containerd"),
        ("", f"{TASK}/k8s.io/{ID}", {}, "other"),
        ("/run/runc", f"{TASK}/k8s.io/{ID}", {}, "other"),
        ("/run/containerd/runc/default", f"{TASK}/k8s.io/{ID}", {}, "other"),
        ("/run/containerd/runc/default", f"{TASK}/default/{ID}", {}, "other"),
        ("/run/containerd/runc/k8s.io", f"{TASK}/k8s.io/other", {}, "other"),
        ("/run/containerd/runc/k8s.io", f"{TASK[1:]}/k8s.io/{ID}", {}, "other"),
        ("/run/containerd/runc/k8s.io", f"/bundles/k8s.io/{ID}", {}, "other"),
        ("/run/containerd/runc/k8s.io", ".", {}, "other"),
        ("/run/containerd/runc/k8s.io", "", {}, "other"),
        ("/run/containerd/runc/k8s.io", f"{TASK}/k8s.io/{ID}/", {}, "other"),
        ("/k8s.io", f"/x/../{TASK}/k8s.io/{ID}", {"io.kubernetes.cri.container-type": "container"}, "containerd"),
        ("/run/containerd/runc/k8s.io", f"{TASK}/k8s.io/{ID}", {"nerdctl/namespace": "k8s.io"}, "nerdctl"),
        ("/run/containerd/runc/default", f"{TASK}/default/{ID}", {"nerdctl/platform": "x"}, "nerdctl"),
        ("/run/docker/runtime-runc/moby", f"{TASK}/moby/{ID}", {}, "docker"),
        ("/run/docker/runtime-x/moby-165536.165536", f"{TASK}/moby-165536.165536/{ID}", {}, "docker"),
        ("/run/docker/moby", f"{TASK}/moby/{ID}", {}, "other"),
        ("/run/docker/runtime-runc/k8s.io", f"{TASK}/moby/{ID}", {}, "other"),
        (None, f"{TASK}/moby/{ID}", {}, "docker"),
    ],
)
def test_an_engine_is_recognised_by_its_paths(
    root: str | None, bundle: str, annotations: dict[str, str], engine: str
) -> None:
    found = recognise(
        root, bundle, ID, {"annotations": {"io.kubernetes.cri-o.ContainerType": "container", **annotations}}
    )
    assert found.engine == engine and found.why


@pytest.mark.parametrize(
    "document", [None, [], {}, {"annotations": ["nerdctl/x"]}, {"annotations": None}, {"root": []}]
)
def test_a_config_of_any_shape_has_a_caller(document: Any, tmp_path: Path) -> None:
    for bundle in (f"{TASK}/k8s.io/{ID}", str(tmp_path / f"overlay-containers/{ID}/userdata")):
        assert recognise("/x/k8s.io", bundle, ID, document).engine in ("containerd", "other")


@pytest.mark.parametrize("engine", sorted(engines.ENGINES))
def test_engines_whose_requests_and_names_count(engine: str) -> None:
    caller = Caller(engine)
    assert caller.believed_engine(CONFIG) == ""
    assert caller.believed_engine(CONFIG | {"engines": ["containerd", "crio", "docker", "podman", "other"]}) == (
        engine if engine in ("containerd", "crio") else ""
    )
    for nothing in ({}, {"x": "y"}, {P + "granted": "x"}, {"cdi.k8s.io/x": "y"}):
        caller.check(nothing, CONFIG)
    config: Any
    for asks, config in ((ASKS, CONFIG), ({"cdi.k8s.io/x": "y"}, CONFIG | {"cdi.annotations": True})):
        if engine in ("nerdctl", "other"):
            with pytest.raises(PolicyError, match=f"annotation {next(iter(asks))}: "):
                caller.check(asks, config)
        else:
            caller.check(asks, config)
    if engine == "other":
        caller.check(ASKS, CONFIG | {"engines": ["other"]})
    caller.restores = True
    if engine in ("containerd", "crio", "podman"):
        with pytest.raises(PolicyError, match="takes it from the checkpoint, which may be an image"):
            caller.check(ASKS, CONFIG)


class Store:
    """A storage as podman and CRI-O write it: `overlay` below `graph`, the bundle there or below the run root."""

    def __init__(self, directory: Path) -> None:
        self.graph, self.run = directory / "graph", directory / "run"
        self.path = str(self.graph / f"overlay/{LAYER}/merged")
        (self.graph / "overlay-containers").mkdir(parents=True)
        (self.graph / f"overlay-images/{IMAGE}").mkdir(parents=True)

    def record(self, name: str = "containers.json", where: Path | None = None, **more: Any) -> None:
        record = {
            "id": ID,
            "names": ["x"],
            "image": IMAGE,
            "layer": LAYER,
            "metadata": '{"image-name": "x", "name": "x"}',
            **more,
        }
        directory = (where or self.graph) / "overlay-containers"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps([{"id": "d" * 64, "image": "3" * 64}, record]))

    def manifest(self, text: Any, name: str = "manifest") -> None:
        (self.graph / f"overlay-images/{IMAGE}" / name).write_text(
            text if isinstance(text, str) else json.dumps({"annotations": text})
        )

    def caller(self, where: Path | None = None, path: str = "") -> Caller:
        return recognise(
            "",
            f"{where or self.graph}/overlay-containers/{ID}/userdata",
            ID,
            {"root": {"path": path or self.path}, "annotations": {}},
        )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.parametrize("name", ["containers.json", "volatile-containers.json"])
@pytest.mark.parametrize(
    ("metadata", "engine"),
    [
        ('{"image-name": "x"}', "podman"),
        ('{"pod-name": "p", "pod-id": "5", "namespace": "n"}', "crio"),
        ('{"pod-id": ""}', "podman"),
        ("[]", "podman"),
    ],
)
def test_podman_and_crio(store: Store, name: str, metadata: str, engine: str) -> None:
    store.record(name, metadata=metadata)
    assert store.caller().engine == engine
    assert store.caller(store.run).engine == engine, (
        "CRI-O's bundle is below the run root, found by the root file system's path"
    )


def test_a_transient_store(store: Store) -> None:
    store.record("volatile-containers.json", store.run)
    store.manifest(ASKS)
    found = store.caller(store.run)
    assert found.engine == "podman"
    with pytest.raises(PolicyError, match="it comes from the image"):
        found.check(ASKS, CONFIG)


def test_a_storage_behind_a_link(store: Store, tmp_path: Path) -> None:
    """The engine gives the bundle's path as it is, and the root file system's path resolved."""
    store.record()
    (tmp_path / "linked").symlink_to(store.graph)
    assert store.caller(tmp_path / "linked").engine == "podman"


def test_annotations_of_an_image(store: Store) -> None:
    store.record()
    store.manifest({"a": "b"})
    store.manifest(ASKS, "=bWFuaWZlc3Qtc2hhMjU2OmFi")
    store.manifest({P + "env.A": "not a manifest"}, "=c2lnbmF0dXJlLQ==")
    found = store.caller()
    with pytest.raises(PolicyError, match=f"annotation {P}service: it comes from the image"):
        found.check({**ASKS, P + "env.A": "x"}, CONFIG)
    found.check({P + "service": '{"own": 1}', P + "env.A": "not a manifest"}, CONFIG)
    found.check({P + "service": 5, P + "env.A": ["x"]}, CONFIG)  # not a string: the reader of the request reports it


def test_no_image(store: Store) -> None:
    store.record(image="")
    store.caller().check(ASKS, CONFIG)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[" * 5000,
        '{"annotations": {"x": "\\ud800"}}',
        '{"annotations": {"\\udc00": "x"}}',
        '{"a": 1, "a": 2}',
        "\xff",
        json.dumps({"a": "x" * (5 << 20)}),
    ],
)
def test_an_uncertain_manifest_refuses_the_request(store: Store, text: str) -> None:
    store.record()
    store.manifest({"fine": "x"})
    (store.graph / f"overlay-images/{IMAGE}/=bWFuaWZlc3Qtc2hhMjU2OmFi").write_bytes(text.encode("latin-1"))
    with pytest.raises(PolicyError, match=f"annotation {P}service: whether it comes from the image is not known: "):
        store.caller().check(ASKS, CONFIG)


def spoil(store: Store, what: str) -> None:
    records = store.graph / "overlay-containers/containers.json"
    if what == "no records":
        records.unlink()
    elif what == "no record":
        records.write_text("[]")
    elif what == "two records":
        store.record("volatile-containers.json")
    elif what == "damaged":
        records.write_text("[{")
    elif what == "no list":
        records.write_text("{}")
    elif what == "a FIFO":
        records.unlink()
        os.mkfifo(records)
    elif what in ("5", '"{"', '{"a": 1}'):
        store.record(metadata=json.loads(what))
    elif what == "no manifest":
        (store.graph / f"overlay-images/{IMAGE}/manifest").unlink()
    elif what == "no image":
        store.record(image="4" * 64)
    elif what == "a path for an image":
        store.record(image=f"../overlay-images/{IMAGE}")
    elif what == "a number for an image":
        store.record(image=7)


@pytest.mark.parametrize(
    "what",
    [
        "no records",
        "no record",
        "two records",
        "damaged",
        "no list",
        "a FIFO",
        "5",
        '"{"',
        '{"a": 1}',
        "no manifest",
        "no image",
        "a path for an image",
        "a number for an image",
    ],
)
@pytest.mark.parametrize("engines", [[], ["other"]])
def test_a_damaged_storage_refuses_every_request(store: Store, what: str, engines: list[str]) -> None:
    """Every request is refused, whatever the administrator allows; a container without one is not checked."""
    store.record()
    store.manifest({})
    spoil(store, what)
    found = store.caller()
    with pytest.raises(ChandlerError, match="whether it comes from the image is not known"):
        found.check(ASKS, CONFIG | {"engines": engines})
    found.check({"x": "y"}, CONFIG | {"engines": engines})


def test_the_commands_have_an_engine_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle alone does not show which engine called."""
    node = Node(tmp_path, monkeypatch)
    node.put("etc/config.toml", "")
    node.put(
        "bundle/config.json",
        json.dumps({"ociVersion": "1.0.2", "process": {"args": ["x"], "cwd": "/"}, "annotations": {P + "env.A": "b"}}),
    )
    bundle = ["--bundle", str(node.directory / "bundle")]
    assert main(["policy", "check", *bundle]) == 1
    assert "since Chandler does not know who calls" in capsys.readouterr().out
    assert main(["explain", *bundle]) == 1
    assert "since Chandler does not know who calls" in capsys.readouterr().err
    for command in (["policy", "check"], ["explain"]):
        assert main([*command, *bundle, "--engine", "docker"]) == 0
        assert capsys.readouterr().out.startswith(
            "engine      docker (--engine says so); no identity annotation is believed; taken from the image: nothing\n"
        )
