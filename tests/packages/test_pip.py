"""`pip install .` into a virtual environment: launchers in sh, their code beside them, nothing of the host's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import hatchling
import pytest
import tomlkit
from lab import REPOSITORY, bundle, runtimes
from lab.engine import Engine
from lab.install import PYTHON

from shim.paths import VERSION

PLAIN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
PROGRAMS = {
    "chandler",
    "chandler-runtime",
    "chandler-runc",
    "chandler-youki",
    "chandler-crun",
    "chandler-nri",
    "chandler-kubelet-plugin",
    "chandler-hook",
}


def pip(python: str | Path, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """pip for that interpreter. It finds hatchling where the tests do, because nothing is fetched."""
    path = {"PYTHONPATH": os.path.dirname(os.path.dirname(hatchling.__file__))}
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            command,
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "--no-cache-dir",
            "--disable-pip-version-check",
            *words,
        ],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**PLAIN, **path},
    )


@pytest.fixture(scope="module")
def environment(lab: str) -> Path:
    """With Debian's packages, so that no dependency has to be fetched."""
    made = Path(lab, "an environment")
    subprocess.run(
        [PYTHON, "-m", "venv", "--system-site-packages", "--without-pip", str(made)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    done = pip(made / "bin/python", "install", REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def runtime(environment: Path, workdir: str, name: str = "chandler-runtime") -> Engine:
    found = runtimes.named("runc")
    if found.missing:
        pytest.skip(found.missing)
    config = f"{workdir}/config.toml"
    with open(config, "w", encoding="ascii") as file:
        file.write(
            f'runtimes = ["{found.path}"]\nstate-dir = "{workdir}/state"\nengines = ["other"]\n'
            f'[cdi]\nspec-dirs = ["{workdir}/cdi"]\n'
        )
    os.makedirs(f"{workdir}/cdi")
    with open(f"{workdir}/cdi/x.yaml", "w", encoding="ascii") as file:
        file.write(
            "cdiVersion: 0.5.0\nkind: example.com/gpu\ndevices: [{name: zero, containerEdits: {env: [FROM=yaml]}}]\n"
        )
    return Engine([str(environment / "bin" / name)], workdir + "/root", {"CHANDLER_CONFIG": config})


def test_a_wheel_installs_every_program(environment: Path) -> None:
    assert {path.name for path in (environment / "bin").glob("chandler*")} == PROGRAMS
    for name in ("chandler-runtime", "chandler-runc"):
        done = subprocess.run(
            [environment / "bin" / name, "--version"],
            check=True,
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith("runc version")
    for name in ("chandler", "chandler-nri", "chandler-kubelet-plugin"):
        done = subprocess.run(
            [environment / "bin" / name, "--version"],
            check=True,
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith(f"{name} 0")
    assert list((environment / "lib/chandler").glob("create-*.image"))
    assert (environment / "share/man/man1/chandler.1").exists()
    assert not list(environment.glob("lib/python*/site-packages/shim")) and not list(environment.glob("**/*.service"))


@pytest.mark.parametrize("way", ["bin", "link"])
def test_a_create_in_an_environment_equips_a_container(environment: Path, workdir: str, way: str) -> None:
    """Also through a link to the launcher, as pipx makes it."""
    engine = runtime(environment, workdir)
    if way == "link":
        os.symlink(environment / "bin/chandler-runtime", f"{workdir}/chandler-runtime")
        engine = Engine([f"{workdir}/chandler-runtime"], workdir + "/root", engine.env)
    request = bundle.request(
        env={"MODE": "fast"}, resources={"gpu": {"devices": ["example.com/gpu=zero"], "vendor": "example.com/gpu"}}
    )
    made = bundle.make(workdir + "/b", ["sleep", "60"], request)
    with open(f"{workdir}/config.toml", "a", encoding="ascii") as file:
        file.write('[policy]\nkinds = ["example.com/gpu"]\n')
    engine.create(made, "one")
    engine.call("start", "one")
    assert {"MODE=fast", "FROM=yaml"} <= set(made.config["process"]["env"])
    (hook,) = made.config["hooks"]["poststop"]
    assert hook["path"] == str(environment / "bin/chandler-hook") and os.access(hook["path"], os.X_OK)
    python = environment / "bin/python3"
    os.rename(python, f"{python}.away")
    try:
        plain = Engine(engine.command, engine.root)
        assert plain.state("one")["status"] == "running"
    finally:
        os.rename(f"{python}.away", python)
    engine.delete("one", "--force")
    assert json.loads(Path(workdir, "state/leases").read_text())["leases"] == []


def test_packages_of_the_environment_come_first(environment: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from shim.runtime.node_inventory import find_libraries; "
        "find_libraries(); print(sys.path)"
    )
    done = subprocess.run(
        [environment / "bin/python3", "-I", "-S", "-B", "-c", code, environment / "lib/chandler"],
        check=True,
        capture_output=True,
        text=True,
    )
    paths = eval(done.stdout)
    own = [path for path in paths if path.startswith(str(environment)) and path.endswith("site-packages")]
    assert len(own) == 1 and os.path.isdir(own[0])
    assert all(paths.index(own[0]) < at for at, path in enumerate(paths) if path.endswith("dist-packages"))


def test_an_editable_install_runs_the_code_of_the_checkout(lab: str, workdir: str) -> None:
    made = Path(lab, "an editable environment")
    subprocess.run(
        [PYTHON, "-m", "venv", "--system-site-packages", "--without-pip", str(made)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    done = pip(made / "bin/python", "install", "--editable", REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (made / "bin").glob("chandler*")} == PROGRAMS and not (made / "lib/chandler").exists()
    code = "import hooks.main, shim.paths; print(shim.paths.__file__)"
    done = subprocess.run(
        [made / "bin/python3", "-B", "-c", code], cwd="/", check=True, env={}, capture_output=True, text=True
    )
    assert done.stdout == f"{REPOSITORY}/shim/paths.py\n"
    for name in ("chandler", "chandler-nri", "chandler-kubelet-plugin"):
        done = subprocess.run(
            [made / "bin" / name, "--version"],
            check=True,
            env={},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"{name} {VERSION}\n"
    done = subprocess.run(
        [made / "bin/chandler-hook", "no-hook"],
        check=False,
        env={},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "no such hook" in done.stderr
    engine = runtime(made, workdir)
    made_bundle = bundle.make(workdir + "/b", ["sleep", "60"], bundle.request(env={"MODE": "fast"}))
    engine.create(made_bundle, "one")
    assert "MODE=fast" in made_bundle.config["process"]["env"]
    engine.delete("one", "--force")


def test_the_dev_extra_is_what_the_tests_install() -> None:
    with open(f"{REPOSITORY}/pyproject.toml", encoding="utf-8") as file:
        project = tomlkit.load(file).unwrap()["project"]
    with open(f"{REPOSITORY}/tests/lab/requirements.txt", encoding="utf-8") as file:
        pinned = {line.partition("==")[0] for line in file if line.strip() and not line.startswith("#")}
    assert set(project["optional-dependencies"]["dev"]) == pinned


def test_the_source_archive_makes_a_wheel_with_all_of_the_code(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "sdist", "--directory", tmp_path],
        cwd=REPOSITORY,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    (archive,) = tmp_path.iterdir()
    subprocess.run(["tar", "-C", tmp_path, "-xzf", archive], check=True)
    tree = tmp_path / archive.name[: -len(".tar.gz")]
    assert {path.name for path in tree.iterdir()} == {
        "PKG-INFO",
        "pyproject.toml",
        ".gitignore",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "shim",
        "hooks",
        "systemd",
        "packaging",
    }
    code = sources(tree)
    assert code == sources(Path(REPOSITORY)) and len(list(tree.rglob("paths.py"))) == 1
    assert not [path for path in tree.rglob("*") if path.suffix == ".pyc" or path.name.endswith("cache__")]
    done = pip(sys.executable, "wheel", "--wheel-dir", str(tmp_path / "wheel"), str(archive))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.endswith(f"-cp{sys.version_info[0]}{sys.version_info[1]}-none-any.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    assert {name.partition("/lib/chandler/")[2] for name in names if name.endswith(".py")} == {"start.py", *code}


def sources(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for folder in ("shim", "hooks") for path in (tree / folder).rglob("*.py")}
