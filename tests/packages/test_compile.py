"""Byte code and the create's image: packaging/compile makes and removes them; without them creates are slower."""

from __future__ import annotations

import json
import marshal
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import REPOSITORY, bundle
from lab.install import PYTHON, Installation

TAG = sys.implementation.cache_tag
REQUEST = bundle.request(env={"MODE": "fast"})


@pytest.fixture(scope="module")
def installed(lab: str) -> Installation:
    made = Installation(os.path.join(lab, "compiled"))
    made.configure(["/bin/true"])
    return made


def code(installation: Installation) -> Path:
    return Path(installation.prefix, "lib/chandler")


def compile(installation: Installation, *arguments: str) -> None:
    subprocess.run([code(installation) / "compile", *arguments], check=True, stdin=subprocess.DEVNULL)


def compiled(installation: Installation) -> set[str]:
    return {
        str(path.relative_to(code(installation)))
        for pattern in ("*.pyc", "*.image")
        for path in code(installation).rglob(pattern)
    }


def with_magic(image: Path) -> None:
    load, magic, *rest = marshal.loads(image.read_bytes())
    image.write_bytes(marshal.dumps((load, b"\0" + magic[1:], *rest)))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "of another Python": with_magic,
    "cut short": lambda image: image.write_bytes(image.read_bytes()[:5000]),
    "empty": lambda image: image.write_bytes(b""),
    "something else": lambda image: image.write_bytes(marshal.dumps(7)),
    "not there": Path.unlink,
}


@pytest.mark.parametrize("damage", [*DAMAGE, "byte code, too"])
def test_a_create_works_without_the_image(installed: Installation, damage: str, workdir: str) -> None:
    compile(installed)
    if damage in DAMAGE:
        DAMAGE[damage](code(installed) / f"create-{TAG}.image")
    else:
        compile(installed, "--clean")
        assert not compiled(installed)
    made = bundle.make(workdir + "/b", ["true"], REQUEST)
    subprocess.run(
        [installed.program(), "create", "--bundle", made.directory, "one"], check=True, stdin=subprocess.DEVNULL, env={}
    )
    assert "MODE=fast" in json.loads(Path(made.directory, "config.json").read_bytes())["process"]["env"]


def test_leftovers_of_another_python_are_removed(installed: Installation) -> None:
    compile(installed)
    wanted = compiled(installed)
    assert f"create-{TAG}.image" in wanted and f"shim/cdi/__pycache__/names.{TAG}.pyc" in wanted
    sources = {
        str(path.relative_to(code(installed)))
        for folder in ("shim", "hooks")
        for path in (code(installed) / folder).rglob("*.py")
    }
    assert len(wanted) == len(sources) + 1
    for name in (
        "create-cpython-39.image",
        f"create-{TAG}.image.123",
        "shim/__pycache__/oci.cpython-39.pyc",
        f"shim/__pycache__/gone.{TAG}.pyc",
    ):
        (code(installed) / name).touch()
    (code(installed) / "shim/gone/__pycache__").mkdir(parents=True)
    (code(installed) / f"shim/gone/__pycache__/x.{TAG}.pyc").touch()
    compile(installed)
    assert compiled(installed) == wanted and not (code(installed) / "shim/gone").exists()
    assert [path.name for path in code(installed).glob("create-*")] == [f"create-{TAG}.image"]


def test_destdir(tmp_path: Path) -> None:
    """The byte code contains no path of the directory where a package is built."""
    environment = {"PATH": os.environ["PATH"], "DESTDIR": str(tmp_path), "COMPILE": "no", "PYTHON": PYTHON}
    subprocess.run([f"{REPOSITORY}/packaging/install"], check=True, env=environment, stdin=subprocess.DEVNULL)
    lib = tmp_path / "usr/lib/chandler"
    assert not list(lib.rglob("*.pyc")) and not list(lib.glob("*.image"))
    subprocess.run([lib / "compile", str(tmp_path)], check=True, stdin=subprocess.DEVNULL)
    made = [*lib.rglob("*.pyc"), *lib.glob("*.image")]
    assert len(made) > 100 and not [path for path in made if str(tmp_path).encode() in path.read_bytes()]
