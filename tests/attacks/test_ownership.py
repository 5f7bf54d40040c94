"""Chandler neither runs nor reads a file that another user could have written.

That covers runtimes, the launch line, and the state directory with all directories above it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Iterator

import pytest
from lab import bundle, runtimes
from lab.bundle import Bundle
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node

SHELLS = ("dash", "bash", "busybox")
OTHER, USER = 54321, 54322
ASKED = bundle.request(resources={"gpu": {"count": 1}})
EMPTY = "#!/bin/false\n"


def as_user(uid: int) -> list[str]:
    return ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"]


def give(path: str, uid: int) -> None:
    """Give a tree to a user."""
    os.chown(path, uid, uid, follow_symlinks=False)
    for directory, directories, names in os.walk(path):
        for name in (*directories, *names):
            os.chown(os.path.join(directory, name), uid, uid, follow_symlinks=False)


class Scene:
    """Chandler in one shell over a runtime that only records that it ran, and as which user."""

    def __init__(self, shell: str, workdir: str, node: Node) -> None:
        self.workdir = workdir
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.program = self.installation.program()
        self.etc, self.state = self.installation.etc, self.installation.state
        os.mkdir(os.path.join(workdir, "shell"))
        os.symlink(f"/bin/{shell}", os.path.join(workdir, "shell", "sh"))
        with open(self.program, encoding="utf-8") as file:
            text = file.read()
        with open(self.program, "w", encoding="utf-8") as file:
            file.write(text.replace("#!/bin/sh\n", f"#!{workdir}/shell/sh\n", 1))
        self.notes = os.path.join(workdir, "notes")
        os.mkdir(self.notes)
        os.chmod(self.notes, 0o1777)
        self.runtime = self.script(os.path.join(workdir, "bin", "runc"))
        self.installation.configure([self.runtime], [node.cdi], '[gpu]\nallocator = "fixed"\n')
        self.installation.refresh()
        self.plain = bundle.make(os.path.join(workdir, "plain"), ["true"], {}, root="/nonexistent")
        self.asked = bundle.make(os.path.join(workdir, "asked"), ["true"], ASKED, root="/nonexistent")
        self.text = self.asked.bytes
        self.broken = os.path.join(workdir, "broken")
        with open(self.broken, "w", encoding="utf-8") as file:
            file.write(EMPTY)
        os.chmod(self.broken, 0o755)

    def script(self, path: str) -> str:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(f'#!/bin/dash\necho "$0 $*" >{self.notes}/$$\n')
        os.chmod(path, 0o755)
        return path

    def call(
        self, *arguments: str, wrap: list[str] | None = None, env: dict[str, str] | None = None, python: bool = True
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """The result, and the programs that recorded a run."""
        with open(self.asked.path, "wb") as file:
            file.write(self.text)
        for name in os.listdir(self.notes):
            os.unlink(os.path.join(self.notes, name))
        hidden = (
            []
            if python
            else [
                "unshare",
                "-m",
                "--propagation",
                "private",
                "sh",
                "-c",
                f'mount --bind {self.broken} {os.path.realpath("/usr/bin/python3")} && exec "$@"',
                "sh",
            ]
        )
        done = subprocess.run(
            [*hidden, *(wrap or []), self.program, *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **(env or {})},
        )
        noted = []
        for name in os.listdir(self.notes):
            with open(os.path.join(self.notes, name), encoding="utf-8") as file:
                noted.append(file.read().split()[0])
        return done, noted

    def verbs(self) -> list[tuple[str, ...]]:
        return [
            ("state", "c1"),
            ("kill", "c1", "9"),
            ("delete", "--force", "c1"),
            ("start", "--new-option", "c1"),
            ("--new-option", "state", "c1"),
            ("features",),
            ("--version",),
            ("update", "--resources", "-", "c1"),
            ("create", "--bundle", self.plain.directory, "c1"),
            ("run", "--bundle", self.plain.directory, "--new-option", "c1"),
            ("create", "--bundle", self.asked.directory, "c1"),
        ]


@pytest.fixture(scope="module", params=SHELLS)
def scene(request: pytest.FixtureRequest, lab: str, node: Node) -> Scene:
    shell = str(request.param)
    if not os.access(f"/bin/{shell}", os.X_OK):
        pytest.skip(f"not installed: {shell}")
    workdir = os.path.join(lab, f"owned-{shell}")
    os.mkdir(workdir)
    return Scene(shell, workdir, node)


# --- runtimes and the launch line --------------------------------------------------------------------------------


@pytest.mark.parametrize("python", [True, False], ids=["", "without Python"])
@pytest.mark.parametrize("link", ["", "chandler-runc"])
def test_a_runtime_that_was_given_away_is_not_run(scene: Scene, python: bool, link: str) -> None:
    """The owner changes after the launch line was compiled, as when a package is unpacked as another user."""
    program, scene.program = scene.program, scene.installation.program(link) if link else scene.program
    os.chown(scene.runtime, OTHER, OTHER)
    try:
        for verb in scene.verbs():
            done, noted = scene.call(*verb, python=python)
            assert scene.runtime not in noted and done.returncode, verb
            if python:
                assert (
                    f"the runtime {scene.runtime} is not used: {scene.runtime} belongs to uid {OTHER}" in done.stderr
                ), verb
    finally:
        os.chown(scene.runtime, 0, 0)
        scene.program = program
    for verb in scene.verbs()[:3]:
        assert scene.call(*verb, python=python)[1] == [scene.runtime]


def test_a_runtime_that_others_may_write_is_not_compiled(scene: Scene) -> None:
    """The mode is checked on compiling the configuration and whenever Python runs; the owner at each call."""
    os.chmod(scene.runtime, 0o777)
    try:
        scene.installation.refresh()
        for verb in scene.verbs():
            done, noted = scene.call(*verb)
            assert scene.runtime not in noted and "can be written by others" in done.stderr, verb
    finally:
        os.chmod(scene.runtime, 0o755)
        scene.installation.refresh()


@pytest.mark.parametrize("python", [True, False], ids=["", "without Python"])
def test_a_launch_line_of_another_user_is_not_read(scene: Scene, python: bool) -> None:
    """In a configuration directory that everybody may write, with copies that have the right times."""
    evil = scene.script(os.path.join(scene.workdir, "evil", "runc"))
    os.chown(evil, OTHER, OTHER)
    with open(f"{scene.etc}/launch", encoding="utf-8") as file:
        line = file.read()
    os.rename(f"{scene.etc}/launch", f"{scene.etc}/kept")
    os.chmod(scene.etc, 0o777)
    try:
        for named in (evil, scene.runtime):
            with open(f"{scene.etc}/launch", "w", encoding="utf-8") as file:
                file.write(line.replace(scene.runtime, named).replace("chandler.oci", "x.org"))
            os.chown(f"{scene.etc}/launch", OTHER, OTHER)
            for verb in scene.verbs():
                done, noted = scene.call(*verb, python=python)
                assert evil not in noted, verb
                assert not (verb[0] == "create" and scene.asked.directory in verb and noted), done
    finally:
        os.chmod(scene.etc, 0o755)
        os.rename(f"{scene.etc}/kept", f"{scene.etc}/launch")


@pytest.mark.parametrize("python", [True, False], ids=["", "without Python"])
@pytest.mark.parametrize("inside", [[], ["unshare", "-Ur"]], ids=["", "in a user namespace"])
def test_without_root(scene: Scene, inside: list[str], python: bool) -> None:
    """Only root's files are trusted, also in a user namespace; with Python and without."""
    wrap = [*as_user(USER), *inside]
    for verb in (
        ("state", "c1"),
        ("kill", "c1", "9"),
        ("delete", "--force", "c1"),
        ("features",),
        ("create", "--bundle", scene.plain.directory, "c1"),
    ):
        done, noted = scene.call(*verb, wrap=wrap, python=python)
        assert noted == [scene.runtime], (verb, done)
    for uid, mode in ((OTHER, 0o755), (0, 0o777), (0, 0o775), (USER, 0o757)):
        # in a namespace where nobody but the caller has an id, any other owner shows as root does
        if inside and uid == OTHER:
            continue
        os.chown(scene.runtime, uid, uid)
        os.chmod(scene.runtime, mode)
        try:
            for other in scene.verbs():
                assert scene.runtime not in scene.call(*other, wrap=wrap, python=python)[1], (other, oct(mode))
        finally:
            os.chown(scene.runtime, 0, 0)
            os.chmod(scene.runtime, 0o755)


def test_without_root_and_without_stat(scene: Scene) -> None:
    """Python checks the owner, too."""
    hidden = [
        "unshare",
        "-m",
        "--propagation",
        "private",
        "sh",
        "-c",
        f'mount --bind {scene.broken} {os.path.realpath("/usr/bin/stat")} && exec "$@"',
        "sh",
    ]
    for verb in (("state", "c1"), ("kill", "c1", "9"), ("create", "--bundle", scene.plain.directory, "c1")):
        assert scene.call(*verb, wrap=[*hidden, *as_user(USER)])[1] == [scene.runtime], verb


def test_an_unreadable_configuration_does_not_count_as_missing(scene: Scene) -> None:
    """The configuration may define the annotation prefix of requests."""
    os.chmod(scene.etc, 0o700)
    try:
        done, noted = scene.call("create", "--bundle", scene.asked.directory, "c1", wrap=as_user(USER))
        assert not noted and "config.d cannot be read: Permission denied" in done.stderr
    finally:
        os.chmod(scene.etc, 0o755)


# --- the state directory -------------------------------------------------------------------------------------------


def poisoned(inventory: str, runtime: str, evil: str) -> None:
    """A stored inventory that names another runtime."""
    for name in os.listdir(inventory):
        path = os.path.join(inventory, name, "index")
        with open(path, "rb") as file:
            header, _, body = file.read().partition(b"\n")
        body = body.replace(runtime.encode(), evil.encode())
        with open(path, "wb") as file:
            file.write(header.rpartition(b" ")[0] + f" {zlib.crc32(body):08x}\n".encode() + body)


PYTHONS = ("create", "--bundle", "{plain}", "--new-option", "c1"), ("--new-option", "state", "c1")


def test_a_directory_in_tmp_that_was_there_first_is_not_used(scene: Scene) -> None:
    """The caller has no XDG_RUNTIME_DIR. The inventory is the caller's own file, but others may have put it there."""
    home = os.path.join(scene.workdir, "home")
    os.mkdir(home)
    evil = scene.script(os.path.join(home, "runc"))
    give(home, USER)
    trap = f"/tmp/chandler-{USER}"
    try:
        subprocess.run(
            [*as_user(USER), scene.installation.program("chandler"), "refresh", "--quiet"],
            check=True,
            stdin=subprocess.DEVNULL,
            env={"XDG_RUNTIME_DIR": home},
        )
        shutil.copytree(f"{home}/chandler/inventory", f"{trap}/inventory")
        poisoned(f"{trap}/inventory", scene.runtime, evil)
        give(trap, USER)
        os.chown(trap, OTHER, OTHER)
        for runtime_dir in ({}, {"XDG_RUNTIME_DIR": trap}, {"XDG_RUNTIME_DIR": os.path.dirname(trap)}):
            for words in PYTHONS:
                done, noted = scene.call(
                    *(word.format(plain=scene.plain.directory) for word in words), wrap=as_user(USER), env=runtime_dir
                )
                assert noted == [scene.runtime], (words, done)
            done, noted = scene.call(
                "create", "--bundle", scene.asked.directory, "c1", wrap=as_user(USER), env=runtime_dir
            )
            assert not noted and "set XDG_RUNTIME_DIR to a directory of your own" in done.stderr
            why = {
                "": "XDG_RUNTIME_DIR is not set, and /run/user/",
                trap: f"{trap}, which XDG_RUNTIME_DIR names, belongs to uid {OTHER}, not to the caller (uid {USER})",
                "/tmp": "/tmp, which XDG_RUNTIME_DIR names, belongs to uid 0, not to the caller",
            }
            assert why[runtime_dir.get("XDG_RUNTIME_DIR", "")] in done.stderr
        os.chmod(home, 0o775)
        done, noted = scene.call(
            "create", "--bundle", scene.asked.directory, "c1", wrap=as_user(USER), env={"XDG_RUNTIME_DIR": home}
        )
        assert not noted and f"{home}, which XDG_RUNTIME_DIR names, can be written by others (mode 0775)" in done.stderr
    finally:
        shutil.rmtree(trap, ignore_errors=True)
        shutil.rmtree(home)


WAYS = {
    "the directory's owner": (0, OTHER, 0o755),
    "the directory's mode": (0, 0, 0o777),
    "a group": (0, 0, 0o775),
    "a directory above": (1, OTHER, 0o755),
    "one above for all": (1, 0, 0o777),
    "one above for a group": (1, 0, 0o775),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_state_directory_that_others_may_write(scene: Scene, way: str) -> None:
    """Creates with a request are refused, plain containers go on; the inventory is not read."""
    above, uid, mode = WAYS[way]
    path = scene.state
    for _ in range(above):
        path = os.path.dirname(path)
    evil = scene.script(os.path.join(scene.workdir, "trap", "runc"))
    shutil.rmtree(scene.state, ignore_errors=True)
    scene.installation.refresh()
    poisoned(f"{scene.state}/inventory", scene.runtime, evil)
    try:
        for words in PYTHONS:
            assert scene.call(*(word.format(plain=scene.plain.directory) for word in words))[1] == [evil], (
                "the inventory must be read while its directories are trusted"
            )
        os.chown(path, uid, uid)
        os.chmod(path, mode)
        for words in PYTHONS:
            assert scene.call(*(word.format(plain=scene.plain.directory) for word in words))[1] == [scene.runtime], (
                words
            )
        before = os.listdir(scene.state)
        done, noted = scene.call("create", "--bundle", scene.asked.directory, "c1")
        assert (
            not noted
            and done.returncode == 1
            and f"the state directory {scene.state} is not used: {path} " in done.stderr
        )
        assert scene.asked.bytes == scene.text and os.listdir(scene.state) == before
        for command in (("leases",), ("ps",), ("leases", "release", "--stale")):
            said = subprocess.run(
                [scene.installation.program("chandler"), *command],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env={},
            )
            assert said.returncode == 1 and "is not used" in said.stderr, command
    finally:
        os.chown(path, 0, 0)
        os.chmod(path, 0o755)
        shutil.rmtree(scene.state)
        scene.installation.refresh()


def test_the_prefix_without_a_request_needs_no_state_directory(scene: Scene) -> None:
    """The config.json has the prefix in its text, so Python runs, but nothing is requested."""
    made = bundle.make(os.path.join(scene.workdir, "mentions"), ["echo", "chandler.oci"], {}, root="/nonexistent")
    os.chown(scene.state, OTHER, OTHER)
    try:
        assert scene.call("create", "--bundle", made.directory, "c1")[1] == [scene.runtime]
    finally:
        os.chown(scene.state, 0, 0)
        shutil.rmtree(made.directory)


def test_root_ignores_the_callers_runtime_directory(scene: Scene) -> None:
    """The environment of an engine that root starts may have another user's XDG_RUNTIME_DIR."""
    theirs = os.path.join(scene.workdir, "theirs")
    os.mkdir(theirs)
    os.chown(theirs, OTHER, OTHER)
    done, noted = scene.call("create", "--bundle", scene.asked.directory, "c1", env={"XDG_RUNTIME_DIR": theirs})
    assert noted == [scene.runtime] and not os.listdir(theirs), done
    os.rmdir(theirs)


@pytest.fixture(params=["runc", "crun"])
def real(request: pytest.FixtureRequest, workdir: str, node: Node) -> Iterator[tuple[Installation, Engine, Bundle]]:
    runtime = runtimes.named(request.param)
    if runtime.missing:
        pytest.skip(runtime.missing)
    installation = Installation(os.path.join(workdir, "installed"))
    installation.configure([runtime.path], [node.cdi])
    engine = Engine([*runtime.wrap, installation.program()], os.path.join(workdir, "root"))
    yield installation, engine, bundle.make(os.path.join(workdir, "b"), ["sh", "-c", "ls /dev/nvidia0"], ASKED)
    engine.clean()


def test_places_of_the_configuration_that_others_may_write(
    real: tuple[Installation, Engine, Bundle], workdir: str, node: Node
) -> None:
    """state-dir and log.file, without an inventory and on a real runtime."""
    installation, engine, made = real
    with open(f"{installation.etc}/config.toml", encoding="utf-8") as file:
        runtime = file.readline().split('"')[1]
    open_to_all = os.path.join(workdir, "open")
    os.mkdir(open_to_all)
    os.chmod(open_to_all, 0o1777)
    with open(f"{workdir}/victim", "w", encoding="utf-8") as file:
        file.write("before")
    os.symlink(f"{workdir}/victim", f"{open_to_all}/log")
    installation.configure([runtime], [node.cdi], f'[log]\nfile = "{open_to_all}/log"\n')
    text = made.bytes
    assert "nvidia0" in engine.run(made, "c1").stdout
    engine.delete("c1", "--force")
    with open(f"{workdir}/victim", encoding="utf-8") as file:
        assert file.read() == "before"
    for directory, reason in (
        (f"{open_to_all}/state", "is not there yet, and somebody else could make it"),
        (open_to_all, "can be written by others"),
    ):
        made.config = json.loads(text)
        with open(f"{installation.etc}/config.toml", "w", encoding="utf-8") as file:
            file.write(f'runtimes = ["{runtime}"]\nstate-dir = "{directory}"\n[cdi]\nspec-dirs = ["{node.cdi}"]\n')
        before = made.bytes
        done = engine.run(made, "c2", check=False)
        assert done.returncode == 1 and reason in done.stderr and made.bytes == before
    assert os.listdir(open_to_all) == ["log"]


def test_a_directory_of_the_configuration_that_others_may_write(scene: Scene) -> None:
    """Another user may have removed a denial, so an empty directory is as bad as one with files."""
    directory = os.path.join(scene.etc, "config.d")
    os.makedirs(directory, exist_ok=True)
    os.chmod(directory, 0o777)
    try:
        done, ran = scene.call("create", "--bundle", scene.asked.directory, "c")
    finally:
        os.rmdir(directory)
    assert done.returncode == 1 and not ran and f"{directory} can be written by others" in done.stderr


def test_a_launch_line_that_is_no_file_does_not_block(scene: Scene) -> None:
    launch = os.path.join(scene.etc, "launch")
    os.unlink(launch)
    os.mkfifo(launch)
    try:
        assert scene.call("state", "c", wrap=["timeout", "30"])[0].returncode != 124
        done, ran = scene.call("create", "--bundle", scene.plain.directory, "c", wrap=["timeout", "30"])
        assert done.returncode == 0 and ran, done.stderr
    finally:
        os.unlink(launch)
        scene.installation.refresh()
