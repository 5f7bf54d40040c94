"""Configuration files as distributions, vendors and people write them.

Each is configured, configured again, changed by others, and restored.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from configure.world import World, corpus, leaves, use_root
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lab.containerd import RELEASES

from shim.configure import jsonedit, tomledit
from shim.configure.containerd import CRI

CASES = [(engine, path) for engine in ("containerd", "docker", "crio", "podman") for path in corpus(engine)]
NAMES = [f"{engine}-{path.name}" for engine, path in CASES]
OPTIONS: dict[str, list[tuple[str, ...]]] = {
    "containerd": [
        (),
        ("--default", "--cdi", "--nri"),
        ("--runtime", "youki", "--runtime", "crun"),
        ("--handler", "gpu", "--runtime", "runc", "--default"),
    ],
    "docker": [
        (),
        ("--default", "--cdi"),
        ("--runtime", "youki", "--runtime", "crun"),
        ("--handler", "gpu", "--runtime", "runc", "--default"),
    ],
    "crio": [
        (),
        ("--default", "--nri"),
        ("--runtime", "youki"),
        ("--handler", "gpu", "--runtime", "runc", "--default"),
    ],
    "podman": [(), ("--default",), ("--runtime", "youki"), ("--handler", "gpu", "--runtime", "runc", "--default")],
}
Make = Callable[..., World]


def parse(engine: str, text: str) -> dict[str, Any]:
    return jsonedit.parse(text) if engine == "docker" else tomledit.parse(text)


def whole(world: World) -> dict[str, Any]:
    """The main file with our drop-in, as the engine merges them."""
    from shim.configure.model import merged

    document = parse(world.engine, world.file.read_bytes().decode())
    for name in ("conf.d/99-chandler.toml", f"{world.file.name}.d/99-chandler.conf"):
        path = world.file.parent / name
        if path.exists():
            document = merged(document, tomledit.parse(path.read_text()))
    return document


def handlers(engine: str, document: dict[str, Any]) -> dict[str, Any]:
    """The engine's handlers by name."""
    if engine == "containerd":
        found = document["plugins"][CRI[document["version"]]]["containerd"]["runtimes"]
    elif engine == "crio":
        found = document["crio"]["runtime"]["runtimes"]
    else:
        found = (document["engine"] if engine == "podman" else document)["runtimes"]
    assert isinstance(found, dict)
    return found


def imports_are_readable(data: bytes) -> bool:
    """Whether `configure` can read the files that this one imports; only root may enter /run on some hosts."""
    return b'"/run/k0s/' not in data or os.access("/run", os.X_OK)


def wanted(options: tuple[str, ...]) -> list[str]:
    if "--handler" in options:
        return ["gpu"]
    return ["chandler", *(f"chandler-{kind}" for kind in ("youki", "crun") if kind in options)]


@pytest.mark.parametrize(("engine", "path"), CASES, ids=NAMES)
def test_configure_and_remove_restore_the_file(world: Make, engine: str, path: Path) -> None:
    """With every choice of options the handlers are added and nothing else is lost.

    A second call changes nothing, and --remove restores everything.
    """
    data = path.read_bytes()
    if not imports_are_readable(data):
        pytest.skip("only root may enter /run here")
    versions = ["1.7.24", "2.1.9"] if engine == "containerd" and b"version = 3" not in data else ["2.1.9"]
    made = world(engine)
    made.file.write_bytes(data)
    made.file.chmod(0o640)
    before = made.tree()
    for made.version in versions:
        for options in OPTIONS[engine]:
            assert made.run(*options) == 0
            after = made.tree()
            document = whole(made)
            assert set(wanted(options)) <= set(handlers(engine, document))
            check_kept(engine, data, made.file.read_bytes())
            assert made.file.stat().st_mode & 0o777 == 0o640
            assert made.run(*options) == 0 and made.tree() == after
        assert made.run("--remove") == 0
        assert made.tree() == before
        assert made.run("--remove") == 0 and made.tree() == before


def check_kept(engine: str, before: bytes, after: bytes) -> None:
    """Every key keeps its value and every line is still there, except for the few that Chandler owns."""
    own = ("default_runtime_name", "enable_cdi", "disable", "imports", "default-runtime", "cdi", "version")
    old, new = (dict(leaves(parse(engine, data.decode()))) for data in (before, after))
    for path, value in old.items():
        if path and path[-1] not in own and value != {}:
            assert new.get(path) == value, path
    lost = Counter(before.decode().splitlines()) - Counter(after.decode().splitlines())
    if engine != "docker":
        changed = [
            line
            for line in lost
            if not any(word in line for word in own) and line + "," not in after.decode().splitlines()
        ]
        assert not changed or b"{" in before, changed


@pytest.mark.parametrize(
    ("engine", "path"),
    [case for case in CASES if case[0] in ("containerd", "docker")],
    ids=[name for name in NAMES if name.startswith(("c", "d")) and "crio" not in name],
)
def test_others_changed_the_file_since(world: Make, engine: str, path: Path) -> None:
    """--remove then removes Chandler's text and keeps the other changes, character by character."""
    if not imports_are_readable(path.read_bytes()):
        pytest.skip("only root may enter /run here")
    made = world(engine, "2.1.9" if "version = 3" in path.read_text() else "1.7.24")
    made.file.write_bytes(path.read_bytes())
    assert made.run("--default", "--cdi", "--in-place") == 0
    text = made.file.read_bytes().decode()
    if engine == "docker":
        theirs = '"added-later": {"by": ["somebody", "else"]}'
        text = text.replace("{", "{" + theirs + ",", 1)
    else:
        theirs = "\n# somebody's own\n[added-later]\nby = ['somebody', \"else\"] # and why\n"
        text += theirs
    made.file.write_text(text)
    assert made.run("--remove") == 0
    left = made.file.read_text()
    assert theirs in left and left.count("chandler") == path.read_text().count("chandler")
    before, after = parse(engine, path.read_text()), parse(engine, left)
    after.pop("added-later")
    assert dict(leaves(after)) == dict(leaves(before))
    if engine == "containerd" and b"{" not in path.read_bytes():
        assert left.replace(theirs, "").split() == path.read_text().split()
    assert not list(made.file.parent.glob("*chandler*"))


@pytest.mark.parametrize(
    "name", ["default", "debian-package.toml", "kubeadm.toml", "out-of-order.toml", "quoted-keys.toml"]
)
@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.label)
def test_containerd_understands_the_same_and_our_handler(world: Make, release: Any, name: str) -> None:
    """For the output of `config default` and other files, also for version 2 in a drop-in of 2.1."""
    if release.missing:
        pytest.skip(release.missing)
    binary = release.binary("containerd")

    def output(*arguments: str) -> str:
        return subprocess.run(
            [binary, *arguments], check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        ).stdout

    made = world("containerd", output("--version").split()[2].split("~")[0].split("+")[0])
    made.file.write_text(
        output("config", "default")
        if name == "default"
        else next(path for path in corpus("containerd") if path.name == name).read_text()
    )
    before = tomledit.parse(output("--config", str(made.file), "config", "dump"))
    text = made.file.read_text()
    assert made.run("--runtime", "crun") == 0
    after = tomledit.parse(output("--config", str(made.file), "config", "dump"))
    runtimes = handlers("containerd", after)
    runc = runtimes["runc"]
    for name in ("chandler", "chandler-crun"):
        ours = runtimes.pop(name)
        program = "chandler-runtime" if name == "chandler" else name
        assert ours["options"].pop("BinaryName") == str(made.root / "usr/bin" / program)
        assert all(
            ours["options"].get(key, type(value)()) == value
            for key, value in runc["options"].items()
            if key != "BinaryName"
        )
        assert ours.pop("pod_annotations") == ours.pop("container_annotations") == ["chandler.oci/*"]
        assert all(ours[key] == runc[key] for key in ours if key != "options" and ours[key])
    after["imports"] = before["imports"]
    if release.schema == 2 and b"runtimes" not in text.encode():  # then 1.7 needs its own handler in the file
        assert runc["runtime_type"] == handlers("containerd", before)["runc"]["runtime_type"]
        del runtimes["runc"], handlers("containerd", before)["runc"]
    assert after == before
    assert made.run("--remove") == 0 and made.file.read_text() == text


@contextlib.contextmanager
def machine(engine: str, version: str) -> Iterator[World]:
    """A machine for each example, because hypothesis does not create fixtures anew."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        os.chmod(directory, 0o755)
        use_root(Path(directory), patch)
        patch.setattr(os, "fsync", lambda _: None)  # the disk is not tested here
        yield World(Path(directory), engine, version)


@st.composite
def varied(draw: st.DrawFn) -> tuple[str, bytes, str, tuple[str, ...]]:
    """A file of the corpus with added comments, blank lines, other tables, other line ends, or no final line end."""
    engine, path = draw(st.sampled_from(CASES))
    text = path.read_text()
    if engine != "docker":
        lines = text.splitlines()
        for _ in range(draw(st.integers(0, 4))):
            where = draw(st.integers(0, len(lines)))
            added = draw(st.sampled_from(["", "# a remark", "   # another: [plugins] {\"x\" = 'y'}", "\t"]))
            candidate = [*lines[:where], added, *lines[where:]]
            if same("\n".join(candidate), text):
                lines = candidate
        for number in range(draw(st.integers(0, 2))):
            name = draw(
                st.sampled_from(
                    [
                        "plugins.'io.example.v1.one'",
                        'proxy_plugins."a b"',
                        "x",
                        'plugins."io.containerd.grpc.v1.cri".x_of_others',
                    ]
                )
            )
            value = draw(st.sampled_from(["1", "[1, 2]", "{a = 1}", "true # yes", "1979-05-27", '"äö"']))
            candidate = [*lines, f"[{name}.n{number}]", f"k = {value}"]
            with contextlib.suppress(Exception):
                tomledit.parse("\n".join(candidate))
                lines = candidate
        text = "\n".join(lines) + draw(st.sampled_from(["", "\n"] if lines else [""]))
    elif text.strip():
        text = draw(st.sampled_from(["", " ", "\n\n"])) + text.rstrip("\n") + draw(st.sampled_from(["", "\n", " \n"]))
        if draw(st.booleans()):
            text = json.dumps(
                jsonedit.parse(path.read_text()),
                indent=draw(st.sampled_from([None, 1, 3, "\t"])),
                default=lambda number: 15,
            )
    if draw(st.booleans()):
        text = text.replace("\n", "\r\n")
    chosen = draw(st.sampled_from(OPTIONS[engine]))
    version = "2.1.9" if "version = 3" in text else draw(st.sampled_from(["1.7.24", "2.0.3", "2.1.9"]))
    return engine, text.encode(), version, chosen


def same(text: str, other: str) -> bool:
    try:
        return tomledit.parse(text) == tomledit.parse(other)
    except Exception:
        return False


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(varied())
def test_any_variation_of_a_file(case: tuple[str, bytes, str, tuple[str, ...]]) -> None:
    engine, data, version, options = case
    assume(imports_are_readable(data))
    with machine(engine, version) as made:
        made.file.write_bytes(data)
        before = made.tree()
        assert made.run(*options) == 0
        assert set(wanted(options)) <= set(handlers(engine, whole(made)))
        check_kept(engine, data, made.file.read_bytes())
        after = made.tree()
        assert made.run(*options) == 0 and made.tree() == after
        assert made.run("--remove") == 0 and made.tree() == before
