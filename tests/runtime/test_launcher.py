"""packaging/bin/chandler-runtime under every shell that may be /bin/sh.

The runtimes and the interpreter only report how they were called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import REPOSITORY

from shim.runtime import args

SOURCE = os.path.join(REPOSITORY, "packaging/bin/chandler-runtime")
PLAIN = {"PATH": "/usr/bin:/bin"}

# Variables that a shell cannot pass on unchanged: name -> the shells, None for all of them.
LOST: dict[str, tuple[str, ...] | None] = {
    "PWD": None,  # every shell sets its own value, which cannot be told from the caller's
    "a.b": ("dash", "busybox"),  # no identifier
    "OLDPWD": ("bash",),  # dropped unless it is a directory
    "IFS": None,  # never taken from outside
    "OPTIND": None,
    "PPID": None,
    "LINENO": ("bash",),
    "PS4": ("bash",),
    "PS1": ("bash",),  # the shell's own
    "SHELLOPTS": ("bash",),
    "BASHOPTS": ("bash",),
    "UID": ("bash",),
    "EUID": ("bash",),
    "BASH_VERSION": ("bash",),
    "RANDOM": ("bash", "busybox"),
    "_": ("bash",),
    "POSIXLY_CORRECT": ("bash",),
    "_verb": None,
    "_v": None,  # the launcher's own: an underscore and a letter, longer in a checkout
}
# dash blocks no signal after a fork, whatever its caller's mask was.
UNBLOCKS = ("dash",)
# What a shell adds if the caller did not set it: busybox's main program sets PATH.
ADDED = {"busybox": {"PATH"}}

REPORTER = """#!/usr/bin/python3 -ISB
import json, os, signal, sys
fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
fds = [fd for fd in fds if os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}")]
status = open("/proc/self/status").read()
report = {"who": NAME, "argv": [os.fsdecode(a) for a in sys.argv[1:]], "pid": os.getpid(), "fds": fds,
    "cwd": os.readlink("/proc/self/cwd"),
    "stdin": "" if 0 not in fds else sys.stdin.read() if os.environ.get("READ") else "",
    "env": [e.decode("utf-8", "surrogateescape") for e in open("/proc/self/environ", "rb").read().split(b"\\0") if e],
    "signals": [line for line in status.splitlines() if line[:6] in ("SigBlk", "SigIgn", "SigCgt")]}
with open(HERE + "/report", "w") as file:
    json.dump(report, file)
sys.exit(7)
"""


BEGUN = int(time.time())


def age(path: str, seconds: float) -> None:
    """Gives a file a time so many seconds from when these tests began: busybox compares whole seconds."""
    os.utime(path, (BEGUN + seconds, BEGUN + seconds))


class Shell(NamedTuple):
    name: str
    target: str


SHELLS = [Shell("dash", "/bin/dash"), Shell("bash", "/bin/bash"), Shell("busybox", "/bin/busybox")]


class Launcher:
    """An installation under one shell, whose fixed directories, /run and interpreter are the test's own."""

    def __init__(self, directory: str, shell: Shell) -> None:
        self.directory, self.shell = directory, shell
        self.fixed, self.run_dir = f"{directory}/fixed", f"{directory}/run"
        self.etc = f"{directory}/etc/chandler"
        self.python = f"{directory}/python"
        for path in (self.fixed, self.run_dir, f"{directory}/sh-dir", f"{directory}/work"):
            os.makedirs(path)
        os.symlink(shell.target, f"{directory}/sh-dir/sh")
        os.symlink("/bin/true", self.python)  # nothing to compile
        subprocess.run(
            [f"{REPOSITORY}/packaging/install"],
            check=True,
            stdin=subprocess.DEVNULL,
            env={
                "PATH": "/usr/bin:/bin",
                "PREFIX": f"{directory}/usr",
                "SYSCONFDIR": f"{directory}/etc",
                "PYTHON": self.python,
            },
        )
        self.program = f"{directory}/usr/bin/chandler-runtime"
        with open(self.program, encoding="utf-8") as file:
            text = file.read()
        text = text.replace("#!/bin/sh", f"#!{directory}/sh-dir/sh", 1).replace("/usr/local/sbin ", self.fixed + " ")
        text = text.replace(" /usr/local/bin /usr/sbin /usr/bin /sbin /bin;", ";")
        text = re.sub(r"(?<![\w/])/run\b", self.run_dir, text)
        assert self.fixed + ";" in text
        with open(self.program, "w", encoding="utf-8") as file:
            file.write(text)
        self.reset()

    def reset(self) -> None:
        """Only runc, no configuration."""
        for path in (self.etc, self.run_dir, self.fixed, f"{self.directory}/work"):
            shutil.rmtree(path, ignore_errors=True)
        if os.path.lexists(self.python):
            os.unlink(self.python)
        for path in (self.run_dir, self.fixed, f"{self.directory}/work"):
            os.mkdir(path)
        self.reporter(self.python, "python")
        self.runtime("runc")

    def reporter(self, path: str, name: str) -> str:
        with open(path, "w", encoding="utf-8") as file:
            file.write(REPORTER.replace("NAME", repr(name)).replace("HERE", repr(self.directory)))
        os.chmod(path, 0o755)
        return path

    def runtime(self, kind: str) -> str:
        return self.reporter(f"{self.fixed}/{kind}", kind)

    def configure(self, line: str | None, toml: str | None = "") -> None:
        """config.toml, config.d, and a launch line that was made from what is there now."""
        os.makedirs(f"{self.etc}/config.d", exist_ok=True)
        if toml is not None:
            with open(f"{self.etc}/config.toml", "w", encoding="utf-8") as file:
                file.write(toml)
            age(f"{self.etc}/config.toml", -100)
        if line is not None:
            with open(f"{self.etc}/launch", "w", encoding="utf-8") as file:
                file.write(line)
            shutil.rmtree(f"{self.etc}/launch.d", ignore_errors=True)
            os.makedirs(f"{self.etc}/launch.d/0/config.d")
            for name in (
                "config.toml",
                *(f"config.d/{name}" for name in os.listdir(f"{self.etc}/config.d")),
                "config.d",
            ):
                if os.path.exists(f"{self.etc}/{name}"):
                    copy = f"{self.etc}/launch.d/0/{name}"
                    if name != "config.d":
                        open(copy, "w").close()
                    found = os.stat(f"{self.etc}/{name}")
                    os.utime(copy, ns=(found.st_atime_ns, found.st_mtime_ns))

    def bundle(self, text: str | None = '{"ociVersion": "1.0.2"}', name: str = "bundle") -> str:
        path = f"{self.directory}/work/{name}"
        os.makedirs(path, exist_ok=True)
        if text is not None:
            with open(f"{path}/config.json", "w", encoding="utf-8") as file:
                file.write(text)
        return path

    def container(self, kind: str, root: str, name: str = "ID") -> None:
        """A container's state directory."""
        os.makedirs(f"{root}/{name}", exist_ok=True)
        for file in {"crun": ["status"], "youki": ["youki_config.json", "state.json"], "runc": ["state.json"]}[kind]:
            open(f"{root}/{name}/{file}", "w").close()

    def popen(
        self,
        argv: Sequence[str | bytes],
        env: Mapping[Any, Any] = PLAIN,
        link: str = "",
        wrap: Sequence[str] = (),
        **more: Any,
    ) -> subprocess.Popen[bytes]:
        program = f"{self.directory}/usr/bin/{link}" if link else self.program
        if os.path.exists(f"{self.directory}/report"):
            os.unlink(f"{self.directory}/report")
        settings = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": f"{self.directory}/work",
        }
        return subprocess.Popen([*wrap, program, *argv], env=env, **{**settings, **more})

    def call(
        self, argv: Sequence[str | bytes], env: Mapping[Any, Any] = PLAIN, link: str = "", **more: Any
    ) -> dict[str, Any]:
        """The report of the program that was reached; nothing else may have been printed."""
        process = self.popen(argv, env, link, **more)
        out, err = process.communicate(timeout=20)
        assert (out or b"", err or b"") == (b"", b""), (argv, out, err)
        assert process.returncode == 7, (argv, process.returncode)
        with open(f"{self.directory}/report", encoding="utf-8") as file:
            report: dict[str, Any] = json.load(file)
        assert report["pid"] == process.pid
        if report["who"] == "python":
            expected = [
                "-I",
                "-S",
                "-B",
                "-X",
                "utf8",
                f"{self.directory}/usr/lib/chandler/start.py",
                f"{self.directory}/usr/bin/{link}" if link else self.program,
            ]
            assert report["argv"][:7] == expected
            report["argv"] = report["argv"][7:]
        assert report["argv"] == [os.fsdecode(word) for word in argv]
        return report

    def who(self, *argv: str, env: Mapping[Any, Any] = PLAIN, link: str = "") -> str:
        found: str = self.call(argv, env, link)["who"]
        return found

    def fails(self, *argv: str, env: Mapping[Any, Any] = PLAIN, link: str = "") -> str:
        process = self.popen(argv, env, link)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 1 and out == b"" and not os.path.exists(f"{self.directory}/report"), (out, err)
        return err.decode()


@pytest.fixture(scope="module", params=SHELLS, ids=lambda shell: shell.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    shell: Shell = request.param
    if not os.access(shell.target, os.X_OK):
        pytest.skip(f"not installed: {shell.name}")
    return Launcher(str(tmp_path_factory.mktemp(shell.name)), shell)


@pytest.fixture
def launcher(made: Launcher) -> Launcher:
    made.reset()
    return made


REQUEST = r'{"annotations": {"chandler.oci\/service": "{}"}}'

# --- Who is reached.

PASS = [
    ["state", "ID"],
    ["--root", "/r", "--log", "/l", "--log-format", "json", "--systemd-cgroup", "start", "ID"],
    ["kill", "create"],
    ["--root", "create", "state", "run"],
    ["--root=create", "delete", "--force", "create"],
    ["kill", "--all", "ID", "9"],
    ["exec", "--process", "create", "--detach", "--pid-file", "run", "ID"],
    ["exec", "-t", "-e", "A=B", "ID", "create", "--bundle", "x"],
    ["update", "--resources=-", "ID"],
    ["update", "-r", "-", "ID"],
    ["ps", "--format", "json", "ID"],
    ["ps", "-f", "json", "ID"],
    ["update", "--memory", "create", "ID"],
    ["features"],
    ["list", "-f", "json"],
    ["list", "--quiet"],
    ["spec", "--bundle", "create"],
    ["--version"],
    ["-v"],
    ["--help"],
    ["-h"],
    ["--debug", "help", "create"],
    [],
    [""],
    ["state", ""],
    ["state", "--", "create"],
    ["checkpoint", "--image-path", "create", "--leave-running", "ID"],
    ["events", "--stats", "ID"],
    ["createe", "x"],
    ["create/x", "y"],
    ["state", "a b\n* ? [a-z] $(id) `id` \\ ' \""],
    ["state", "*"],
    ["kill", "ID", "-9"],
    ["pause", "\udcff\udce9"],
]


@pytest.mark.parametrize("argv", PASS, ids=repr)
def test_calls_that_pass_through(launcher: Launcher, argv: list[str]) -> None:
    report = launcher.call([os.fsencode(word) for word in argv])
    assert report["who"] == "runc"


EDITED = [
    (["create", "--bundle", "{b}", "ID"], True),
    (["--root", "/r", "create", "--bundle={b}", "--pid-file", "create", "ID"], True),
    (["run", "-b", "{b}", "-d", "ID"], True),
    (["restore", "--bundle", "{b}", "ID"], True),
    (["restore", "--image-path", "x", "--bundle", "{b}", "ID"], False),
    (["create", "--bundle", "{b}", "--no-pivot", "--console-socket", "/s", "--preserve-fds", "2", "create"], True),
    # In doubt, or so that only one of the parsers knows it: Python's.
    (["create", "ID", "--bundle", "{b}"], False),
    (["create", "-b{b}", "ID"], False),
    (["create", "--bund", "{b}", "ID"], False),
    (["create", "--b={b}", "ID"], False),
    (["create", "--bundl={b}", "ID"], False),
    (["create", "--conf={b}/config.json", "ID"], False),
    (["create", "--bundle={b}", "--pid-file=x", "ID"], True),
    (["create", "-bundle", "{b}", "ID"], False),
    (["create", "--future", "--bundle", "{b}", "ID"], False),
    (["create", "--bundle", "{b}"], False),
    (["--future", "create", "--bundle", "{b}", "ID"], False),
    (["--", "create", "--bundle", "{b}", "ID"], False),
    (["create", "--bundle", "{b}", "ID", "more"], False),
    (["create", "--bundle", "{b}", "--bundle", "", "ID"], False),
    (["create", "--help"], False),
    (["--root", "create", "create", "--bundle", "{b}", "ID"], False),
    (["create", "--bundle", "{b}", "--pid-file"], False),
    (["create", "--bundle", "{b}", "--", "ID"], False),
]


@pytest.mark.parametrize("argv, certain", EDITED, ids=repr)
def test_a_create_goes_to_the_runtime_only_without_a_request(
    launcher: Launcher, argv: list[str], certain: bool
) -> None:
    words = [word.replace("{b}", launcher.bundle()) for word in argv]
    assert launcher.who(*words) == ("runc" if certain else "python")
    launcher.bundle(REQUEST)
    assert launcher.who(*words) == "python"


def test_the_bundle_is_the_working_directory_and_the_last_one_wins(launcher: Launcher) -> None:
    plain, asking = launcher.bundle(), launcher.bundle(REQUEST, "asking")
    for cwd, expected in ((plain, "runc"), (asking, "python")):
        assert launcher.call(["create", "ID"], cwd=cwd)["who"] == expected
    assert launcher.who("create", "-b", asking, "-b", plain, "ID") == "runc"
    assert launcher.who("create", "-b", plain, "--bundle", asking, "ID") == "python"


def test_crun_may_be_given_another_config(launcher: Launcher) -> None:
    plain, asking = launcher.bundle(), launcher.bundle(REQUEST, "asking")
    assert launcher.who("create", "-b", plain, "--config", f"{asking}/config.json", "ID") == "python"
    assert launcher.who("create", "-b", asking, "-f", f"{plain}/config.json", "ID") == "runc"
    # crun looks for this one name in the bundle, for every other in the working directory
    assert launcher.who("create", "-b", asking, "--config", "config.json", "ID") == "python"
    assert launcher.call(["create", "-b", asking, "--config=./config.json", "ID"], cwd=plain)["who"] == "runc"


@pytest.mark.parametrize("name", ["-", "-e", "a:b", "-rf", "a b", "new\nline", "*", "[a]", "$(id)", "~", "-\n-"])
def test_any_name_can_be_a_bundle_or_config(launcher: Launcher, name: str) -> None:
    launcher.bundle(name=name)
    assert launcher.who("create", "--bundle", name, "ID") == "runc"
    launcher.bundle(REQUEST, name)
    assert launcher.who("create", "--bundle", name, "ID") == "python"
    shutil.copy(f"{launcher.directory}/work/{name}/config.json", f"{launcher.directory}/work/-x{name}")
    assert launcher.who("create", "--config", f"-x{name}", "ID") == "python"


def test_a_config_that_is_no_plain_file_is_not_read(launcher: Launcher) -> None:
    missing = launcher.bundle(None, "missing")
    directory, fifo, link = (launcher.bundle(None, name) for name in ("directory", "fifo", "link"))
    os.mkdir(f"{directory}/config.json")
    os.mkfifo(f"{fifo}/config.json")
    os.symlink(f"{launcher.bundle()}/config.json", f"{link}/config.json")
    for bundle in (missing, directory, fifo):
        assert launcher.who("create", "--bundle", bundle, "ID") == "python"
    assert launcher.who("create", "--bundle", link, "ID") == "runc"


def test_a_grep_without_an_exit_status_leaves_the_create_to_python(launcher: Launcher) -> None:
    """With SIGCHLD ignored, some shells lose the exit status of a child."""

    def ignore() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    assert launcher.call(["create", "--bundle", launcher.bundle(REQUEST), "ID"], preexec_fn=ignore)["who"] == "python"


def test_only_a_config_that_mentions_the_prefix_goes_to_python(launcher: Launcher) -> None:
    bundle = launcher.bundle()
    for data, expected in (
        (b"", "runc"),
        (b"\0\xff\xfe" * 99, "runc"),
        (b"\0\xffchandler.oci", "python"),
        (b"x" * (1 << 20), "runc"),
        (b"\n" * 999 + b"chandlerXoci", "runc"),
    ):
        with open(f"{bundle}/config.json", "wb") as file:
            file.write(data)
        assert launcher.who("create", "--bundle", bundle, "ID") == expected


# --- Which runtime.

ALL = "2 0 chandler.oci|cdi.k8s.io crun={f}/crun runc={f}/runc youki={f}/youki\n"


def test_the_first_configured_runtime_is_used(launcher: Launcher) -> None:
    for kind in args.KINDS:
        launcher.runtime(kind)
    bundle = launcher.bundle()
    assert launcher.who("state", "ID") == launcher.who("create", "-b", bundle, "ID") == "runc"
    launcher.configure(ALL.format(f=launcher.fixed))
    assert launcher.who("state", "ID") == launcher.who("create", "-b", bundle, "ID") == "crun"
    launcher.configure(f"2 0 chandler.oci runc={launcher.fixed}/gone youki={launcher.fixed}/youki\n")
    assert launcher.who("state", "ID") == "youki"
    other = launcher.reporter(f"{launcher.directory}/work/elsewhere", "elsewhere")
    launcher.configure(f"2 0 chandler.oci runc={other}\n")
    assert launcher.who("create", "-b", bundle, "ID") == launcher.who("list") == "elsewhere"


def test_the_name_of_the_link_fixes_the_runtime(launcher: Launcher) -> None:
    for kind in args.KINDS:
        launcher.runtime(kind)
    launcher.container("crun", f"{launcher.run_dir}/crun")
    for line in (None, ALL.format(f=launcher.fixed), f"2 0 chandler.oci crun={launcher.fixed}/crun\n"):
        if line:
            launcher.configure(line)
        for kind in args.KINDS:
            link = f"chandler-{kind}"
            assert launcher.who("state", "ID", link=link) == launcher.who("delete", "-f", "ID", link=link) == kind
            # a kind that is not configured is Python's to look for
            assert launcher.who("create", "-b", launcher.bundle(), "ID", link=link) == (
                "python" if line and f"{kind}=" not in line else kind
            )
            assert launcher.who("--new", "create", "ID", link=link) == "python"
            assert launcher.who("delete", "--new", "ID", link=f"chandler-{kind}") == kind


@pytest.mark.parametrize(
    "argv",
    [
        ["{v}", "ID"],
        ["{v}", "--force", "ID"],
        ["{v}", "--format", "x", "ID", "more"],
        ["{v}", "--memory", "other", "ID"],
        ["exec", "-t", "-u", "other", "ID", "sh"],
        ["{v}", "--x=y", "ID"],
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", args.KINDS)
def test_the_runtime_that_has_the_container(launcher: Launcher, kind: str, argv: list[str]) -> None:
    for each in args.KINDS:
        launcher.runtime(each)
    words = [word.replace("{v}", "kill") for word in argv]
    bundle = launcher.bundle()
    root = f"{launcher.directory}/work/root"
    xdg = f"{launcher.directory}/work/xdg"
    launcher.container(kind, root)
    launcher.container(kind, f"{launcher.run_dir}/{kind}")
    launcher.container("youki" if kind == "runc" else "runc", root, "other")
    for line in (None, ALL.format(f=launcher.fixed), f"2 0 chandler.oci youki={launcher.fixed}/youki\n", "damaged"):
        if line:
            launcher.configure(line)
        assert launcher.who("--root", root, *words) == kind
        assert launcher.who("--root=" + root, *words) == kind
        assert launcher.who(*words) == kind
    # a new container has no runtime yet
    launcher.configure(ALL.format(f=launcher.fixed))
    assert launcher.who("--root", root, "create", "-b", bundle, "ID") == "crun"
    # crun's directory is the caller's, also when root calls
    shutil.rmtree(launcher.run_dir)
    launcher.container(kind, f"{xdg}/{kind}")
    assert launcher.who("state", "ID", env={**PLAIN, "XDG_RUNTIME_DIR": xdg}) == kind


def test_an_update_that_may_take_devices_away_goes_through_python(launcher: Launcher) -> None:
    """Python is optional there: without an interpreter the update still reaches the runtime."""
    for kind in args.KINDS:
        launcher.runtime(kind)
        launcher.container(kind, f"{launcher.run_dir}/{kind}", kind)
    launcher.configure(ALL.format(f=launcher.fixed))
    update = ("update", "--resources=-")
    assert [launcher.who(*update, kind) for kind in ("runc", "crun", "youki")] == ["runc", "python", "python"]
    id_first = [launcher.who("update", kind, "--resources=-") for kind in ("runc", "crun", "youki")]
    assert id_first == ["runc", "python", "python"], "youki takes options anywhere"
    assert [launcher.who(*update, "new", link=f"chandler-{kind}") for kind in ("runc", "crun", "youki")] == [
        "runc",
        "python",
        "python",
    ]
    os.unlink(launcher.python)
    assert [launcher.who(*update, kind) for kind in ("runc", "crun", "youki")] == ["runc", "crun", "youki"]


def test_a_container_whose_runtime_is_gone_falls_back(launcher: Launcher) -> None:
    """Python may find the runtime in a configuration that is not compiled yet."""
    for kind, line in (("crun", None), ("youki", None), ("youki", f"2 0 chandler.oci runc={launcher.fixed}/runc\n")):
        launcher.reset()
        launcher.container(kind, f"{launcher.run_dir}/{kind}")
        launcher.configure(line)
        assert launcher.who("state", "ID") == launcher.who("kill", "--all", "ID") == "python"
        os.unlink(launcher.python)
        assert launcher.who("state", "ID") == launcher.who("kill", "--all", "ID") == "runc"


def test_without_a_runtime_python_decides(launcher: Launcher) -> None:
    os.unlink(f"{launcher.fixed}/runc")
    assert launcher.who("state", "ID") == launcher.who("delete", "-f", "ID") == "python"
    os.unlink(launcher.python)
    assert "no runtime is installed" in launcher.fails("state", "ID")
    launcher.runtime("runc")
    assert "no runtime is installed" in launcher.fails("state", "ID", link="chandler-crun")


@pytest.mark.parametrize(
    "line, fresh",
    [
        ("2 0 chandler.oci runc={r}\n", True),
        ("2 - chandler.oci runc={r}\n", False),  # made when a source could still change unseen
        ("2 1 chandler.oci runc={r}\n", False),  # whose copies are gone
        ("2 * chandler.oci runc={r}\n", False),
        ("2 ../0 chandler.oci runc={r}\n", False),
        ("1 c chandler.oci runc={r}\n", False),  # of an older version
        ("3 0 chandler.oci runc={r}\n", False),
        ("", False),
        ("2", False),
        ("\0\0\xff", False),
        ("2 0 chandler.oci runc={r}", False),  # cut short
        ("2 0\n", False),
        (None, False),
        ("2 0  runc={r}\n", False),
        ("2 0 | runc={r}\n", False),
    ],
    ids=repr,
)
def test_a_create_needs_a_fresh_launch_line(launcher: Launcher, line: str | None, fresh: bool) -> None:
    launcher.configure(line and line.format(r=f"{launcher.fixed}/runc"))
    assert launcher.who("create", "-b", launcher.bundle(), "ID") == ("runc" if fresh else "python")
    assert launcher.who("state", "ID") == launcher.who("kill", "-a", "ID") == "runc"


SOURCES = ("config.toml", "config.d", "config.d/a.toml")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seconds", [-3600, -101, -90, 3600])
def test_a_source_with_another_time_leaves_the_create_to_python(
    launcher: Launcher, source: str, seconds: float
) -> None:
    """Not only a newer time, because `cp -p` and `mv` keep an old one."""
    launcher.configure(None)
    open(f"{launcher.etc}/config.d/a.toml", "w").close()
    for name in SOURCES:
        age(f"{launcher.etc}/{name}", -100)
    launcher.configure(f"2 0 chandler.oci runc={launcher.fixed}/runc\n", None)
    bundle = launcher.bundle()
    assert launcher.who("create", "-b", bundle, "ID") == "runc"
    age(f"{launcher.etc}/{source}", seconds)
    assert launcher.who("create", "-b", bundle, "ID") == "python"
    launcher.configure(f"2 0 chandler.oci runc={launcher.fixed}/runc\n", None)
    assert launcher.who("create", "-b", bundle, "ID") == "runc"


def link_to_nothing(etc: str) -> None:
    os.rename(f"{etc}/config.d", f"{etc}/old")
    os.symlink("nowhere", f"{etc}/config.d")


CHANGES: dict[str, Callable[[str], object]] = {
    "config.toml goes": lambda etc: os.unlink(f"{etc}/config.toml"),
    "config.d goes": lambda etc: shutil.rmtree(f"{etc}/config.d"),
    "config.d becomes a link to nothing": link_to_nothing,
    "a drop-in comes": lambda etc: open(f"{etc}/config.d/b.toml", "w").close(),
    "a drop-in goes": lambda etc: os.unlink(f"{etc}/config.d/a.toml"),
    "a drop-in gets another name": lambda etc: os.rename(f"{etc}/config.d/a.toml", f"{etc}/config.d/b.toml"),
    "the copies go": lambda etc: shutil.rmtree(f"{etc}/launch.d"),
    "a copy goes": lambda etc: os.unlink(f"{etc}/launch.d/0/config.d/a.toml"),
    "the line goes": lambda etc: os.unlink(f"{etc}/launch"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_added_or_removed_source_leaves_the_create_to_python(
    launcher: Launcher, change: Callable[[str], object]
) -> None:
    """Also where config.d has its former time, as after an archive was unpacked over it."""
    launcher.configure(None)
    open(f"{launcher.etc}/config.d/a.toml", "w").close()
    launcher.configure(f"2 0 chandler.oci runc={launcher.fixed}/runc\n", None)
    before = os.stat(f"{launcher.etc}/config.d")
    bundle = launcher.bundle()
    assert launcher.who("create", "-b", bundle, "ID") == "runc"
    change(launcher.etc)
    if os.path.exists(f"{launcher.etc}/config.d"):
        os.utime(f"{launcher.etc}/config.d", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert launcher.who("create", "-b", bundle, "ID") == "python"


def test_a_config_with_either_search_text_goes_to_python(launcher: Launcher) -> None:
    launcher.configure(ALL.format(f=launcher.fixed))
    launcher.runtime("crun")
    for text, expected in (("cdi.k8s.io/x", "python"), ("chandler.oci", "python"), ("cdiXk8s", "crun")):
        assert launcher.who("create", "-b", launcher.bundle(text), "ID") == expected


def test_a_named_configuration_is_left_to_python(launcher: Launcher) -> None:
    env = {**PLAIN, "CHANDLER_CONFIG": "/x"}
    assert (
        launcher.who("state", "ID", env=env)
        == launcher.who("create", "-b", launcher.bundle(), "ID", env=env)
        == "python"
    )
    os.unlink(launcher.python)
    assert launcher.who("state", "ID", env=env) == "runc"
    launcher.fails("create", "-b", launcher.bundle(), "ID", env=env)


# --- Without the interpreter.


def test_verbs_pass_without_an_interpreter(launcher: Launcher) -> None:
    for kind in args.KINDS:
        launcher.runtime(kind)
    launcher.container("crun", f"{launcher.run_dir}/crun")
    assert launcher.who("kill", "--new-option", "ID") == launcher.who("kill", "--new", "value", "ID") == "python"
    assert launcher.who("--new-global", "kill", "ID") == "python"
    os.unlink(launcher.python)
    assert launcher.who("kill", "--new-option", "ID") == launcher.who("kill", "--new", "value", "ID") == "crun"
    assert launcher.who("--new-global", "kill", "ID") == "runc"
    assert launcher.who("create", "-b", launcher.bundle(), "ID") == "runc"
    launcher.fails("--new-global", "create", "ID")


@pytest.mark.parametrize(
    "option, form",
    [
        (["--log-format", "json"], "json"),
        (["--log-format=json"], "json"),
        ([], "text"),
        (["--log-format=text"], "text"),
    ],
)
def test_the_launcher_says_what_is_missing(launcher: Launcher, option: list[str], form: str) -> None:
    bundle = launcher.bundle(REQUEST)
    for path in (launcher.python, launcher.python + "2"):  # gone; and no program
        if os.path.exists(path):
            os.unlink(path)
    log = f"{launcher.directory}/work/a 'log\""
    with open(log, "w", encoding="utf-8") as file:
        file.write("before\n")
    error = launcher.fails("--root", "--log", "--log", log, *option, "create", "--bundle", bundle, "ID")
    assert error.count("\n") == 1 and launcher.python in error and "PYTHON=" in error
    with open(log, encoding="utf-8") as file:
        before, record = file.read().splitlines()
    if form == "json":
        parsed = json.loads(record)
        assert (
            list(parsed) == ["level", "msg", "time"] and parsed["level"] == "error" and launcher.python in parsed["msg"]
        )
        written = parsed["time"]
    else:
        found = re.fullmatch(r'time="(.*?)" level=error msg="[^"]*"', record)
        assert found
        written = found[1]
    assert abs(time.time() - time.mktime(time.strptime(written, "%Y-%m-%dT%H:%M:%SZ")) + time.timezone) < 100
    assert "interpreter" in launcher.fails("--log", "/nonexistent/log", "create", "--bundle", bundle, "ID")


# --- What the runtime inherits.


def environment(report: dict[str, Any]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in report["env"])


def cases(launcher: Launcher) -> list[list[str]]:
    """Each way out of the launcher: early, late, after grep, to Python."""
    plain, asking = launcher.bundle(), launcher.bundle(REQUEST, "asking")
    return [
        ["state", "ID"],
        ["kill", "-a", "ID"],
        ["create", "--bundle", plain, "ID"],
        ["create", "--bundle", asking, "ID"],
    ]


def test_variables_of_the_caller_do_not_mislead_the_shell(launcher: Launcher) -> None:
    name = launcher.shell.name
    given = {
        "PATH": "/usr/bin:/bin:",
        "PWD": "/nowhere",
        "OLDPWD": "/nowhere",
        "IFS": "x",
        "OPTIND": "3",
        "PPID": "1",
        "LINENO": "5",
        "PS1": "a",
        "PS4": "$(echo x >&2)",
        "ENV": "/nonexistent",
        "BASH_ENV": "/nonexistent",
        "CDPATH": "/",
        "LC_ALL": "C",
        "LANG": "C",
        "LC_CTYPE": "C",
        "GREP_OPTIONS": "-v",
        "GREP_COLOR": "1",
        "GREP_COLORS": "x",
        "POSIXLY_CORRECT": "1",
        "SHLVL": "7",
        "RANDOM": "5",
        "_": "/x",
        "a.b": "1",
        "UID": "9",
        "EUID": "9",
        "BASH_VERSION": "",
        "NOTIFY_SOCKET": "/run/x",
        "LISTEN_FDS": "1",
        "LISTEN_PID": "1",
        "EMPTY": "",
        "SPACES": " a  b ",
        "NEWLINE": "a\nb",
        "QUOTES": "'\"\\",
        "_verb": "x",
        "_v": "x",
        "TTRPC_ADDRESS": "/x",
        "HOME": "/h",
        "LATIN": "\udce9",
    }
    lost = {key for key, shells in LOST.items() if shells is None or name in shells}
    for argv in cases(launcher):
        found = environment(launcher.call(argv, {os.fsencode(k): os.fsencode(v) for k, v in given.items()}))
        assert {k: v for k, v in found.items() if k not in lost} == {k: v for k, v in given.items() if k not in lost}, (
            argv
        )
        assert "PWD" not in found


def test_nothing_is_added_to_the_environment(launcher: Launcher) -> None:
    for argv in cases(launcher):
        assert set(environment(launcher.call(argv, {}))) <= ADDED.get(launcher.shell.name, set()), argv
        assert set(environment(launcher.call(argv, {"PATH": "/", "A": ""}))) == {"PATH", "A"}, argv
        for level in ("1", "2", "99"):
            assert environment(launcher.call(argv, {"PATH": "/", "SHLVL": level}))["SHLVL"] == level


def test_only_known_names_are_changed() -> None:
    """The launcher's own variables are found by their names in its text."""
    with open(SOURCE, encoding="utf-8") as file:
        names = set(re.findall(r"(?:^|\s)([A-Za-z]\w*)=", re.sub(r"(?m)^\s*#.*|'[^']*'", "", file.read())))
    assert names <= {"SHLVL", "LC_ALL", "GREP_OPTIONS", "PYTHON", "level", "msg", "time"}, names


def test_functions_in_the_environment_of_bash(launcher: Launcher) -> None:
    names = [
        "[",
        "read",
        "test",
        "command",
        "exec",
        "unset",
        "set",
        "printf",
        "shift",
        "case",
        "/bin/grep",
        "grep",
        "leave",
        "python",
        "find",
        "export",
        "eval",
        ":",
        "owner",
        "return",
        "break",
        "builtin",
        "edited",
        "passed",
        "after_verb",
        "several",
        "fail",
        "/usr/bin/env",
        "true",
    ]
    env = {
        **PLAIN,
        **{
            f"BASH_FUNC_{name}%%": f"() {{  echo taken {name}; /bin/touch {launcher.directory}/taken; }}"
            for name in names
        },
    }
    for argv in cases(launcher):
        expected = launcher.who(*argv)
        # bash complains of names that it does not take, before it reads a line of ours
        process = launcher.popen(argv, env)
        out, err = process.communicate()
        assert out == b"" and not os.path.exists(f"{launcher.directory}/taken")
        with open(f"{launcher.directory}/report", encoding="utf-8") as file:
            assert json.load(file)["who"] == expected
    os.unlink(launcher.python)
    assert "taken" not in launcher.fails(
        "create", "-b", "x", "ID", env={**PLAIN, "BASH_FUNC_printf%%": "() { echo taken; }"}
    )


@pytest.mark.parametrize(
    "options",
    ["xtrace", "errexit", "nounset", "noglob", "errexit:nounset:noglob:xtrace", "posix", "physical", "noclobber"],
)
def test_shell_options_in_the_environment(launcher: Launcher, options: str) -> None:
    """noexec makes every bash script do nothing, and verbose prints its lines; Chandler cannot prevent either."""
    for argv in cases(launcher):
        launcher.call(argv, {**PLAIN, "SHELLOPTS": options, "PS4": "$(/bin/echo x)"})


def test_the_runtime_gets_the_callers_descriptors(launcher: Launcher) -> None:
    """The runtime gets the caller's descriptors, also at the numbers that shells use themselves, and no others."""
    for argv in cases(launcher):
        for extra in ([], [3, 10, 11, 255]):
            opened = " ".join(f"{fd}</dev/null" for fd in extra)
            report = launcher.call(argv, wrap=["/bin/bash", "-c", f'exec "$@" {opened}', "bash"])
            # the reporter has its own of /proc/self/fd open
            assert set(extra) <= set(report["fds"]) and len(set(report["fds"]) - {0, 1, 2, *extra}) <= 1, report["fds"]


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1], [0, 1, 2]], ids=repr)
def test_calls_with_closed_standard_streams(launcher: Launcher, closed: list[int]) -> None:
    launcher.configure(f"2 0 chandler.oci runc={launcher.fixed}/runc\n")

    def close() -> None:
        for fd in closed:
            os.close(fd)

    for argv in cases(launcher):
        expected = launcher.who(*argv)
        process = launcher.popen(argv, stdout=None, stderr=None, preexec_fn=close)
        assert process.wait() == 7
        with open(f"{launcher.directory}/report", encoding="utf-8") as file:
            assert json.load(file)["who"] == expected


def test_the_runtime_gets_stdin_directory_and_signals(launcher: Launcher) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    for argv in cases(launcher):
        direct = subprocess.run(
            [launcher.reporter(f"{launcher.directory}/direct", "direct"), *argv],
            preexec_fn=ignore,
            check=False,
            env={"READ": "1"},
            input=b"all of it\n",
            cwd=launcher.directory,
        )
        with open(f"{launcher.directory}/report", encoding="utf-8") as file:
            plain = json.load(file)
        read, write = os.pipe()
        os.write(write, b"all of it\n")
        os.close(write)
        report = launcher.call(argv, {**PLAIN, "READ": "1"}, stdin=read, cwd=launcher.directory, preexec_fn=ignore)
        os.close(read)
        assert direct.returncode == 7
        if launcher.shell.name in UNBLOCKS:
            plain["signals"][0] = report["signals"][0]
        assert [report[key] for key in ("stdin", "cwd", "signals")] == [
            plain[key] for key in ("stdin", "cwd", "signals")
        ]


# --- For any command line.

ODD = st.one_of(
    st.sampled_from(
        [
            "create",
            "run",
            "restore",
            "state",
            "exec",
            "delete",
            "ID",
            "-",
            "--",
            "",
            "--root",
            "--log",
            "-r",
            "-b",
            "--bundle",
            "--force",
            "-f",
            "-t",
            "--env",
            "-e",
            "--pid-file",
            "--debug",
            "--systemd-cgroup",
            "--rootless",
            "--help",
            "-v",
            "--x=y",
            "--root=create",
            "-abc",
            "---",
            "-=",
            "*",
        ]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
)
VALUE = st.one_of(st.sampled_from(["create", "run", "restore", "/r", "-", "--root", "a b", "*"]), ODD)


@st.composite
def passing(draw: st.DrawFn) -> list[str]:
    """A command line that all three parsers read alike, with a verb other than create, run and restore."""

    def options(table: dict[str, str]) -> list[str]:
        words: list[str] = []
        for name in draw(st.lists(st.sampled_from(sorted(table)), max_size=3)) if table else []:
            if not table[name]:
                words += [name]
            elif name[:2] == "--" and draw(st.booleans()):
                words += [f"{name}={draw(VALUE)}"]
            else:
                words += [name, draw(VALUE)]
        return words

    verb = draw(
        st.sampled_from(
            ["state", "start", "kill", "delete", "exec", "pause", "resume", "ps", "update", "events", "checkpoint"]
        )
    )
    before = {name: takes for name, takes in union(lambda each: each == "").items() if name not in EXITS}
    after = {
        name: takes
        for name, takes in union(lambda each: each == verb).items()
        if takes != "?" and (takes or name[:2] == "--")
    }
    container = draw(st.sampled_from(["ID", "create", "run", "restore", "a.b_c+d"]))
    return [*options(before), verb, *options(after), container, *draw(st.lists(ODD, max_size=3))]


EXAMPLES = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@EXAMPLES
@given(argv=passing())
def test_the_runtime_gets_verbs_that_are_not_edited(made: Launcher, argv: list[str]) -> None:
    made.reset()
    assert not args.parse(argv).edited
    assert made.call([os.fsencode(word) for word in argv])["who"] == "runc"


@EXAMPLES
@given(argv=st.lists(ODD, max_size=7))
def test_any_command_line_arrives_as_it_is(made: Launcher, argv: list[str]) -> None:
    """`call` checks the words.

    The launcher never treats a create that may have a request as one without.
    """
    made.reset()
    reading = args.parse(argv)
    who = made.call([os.fsencode(word) for word in argv])["who"]
    assert who == "python" or not reading.edited  # for there is no config.json


# --- The tables.


def spelled(options: str) -> dict[str, str]:
    """Option as it is written -> how it takes a value."""
    result = {}
    for word in options.split():
        name = word.rstrip("=?") or "?"
        result[("--" if len(name) > 1 else "-") + name] = word[len(name) :]
    return result


def union(verbs: Callable[[str], bool]) -> dict[str, str]:
    found: dict[str, str] = {}
    for table in args.OPTIONS.values():
        for verb, options in table.items():
            if verbs(verb):
                found.update(spelled(options))
    return found


EXITS = {("--" if len(name) > 1 else "-") + name for name in args.EXITS}


def source() -> str:
    with open(SOURCE, encoding="utf-8") as file:
        return file.read()


def test_the_option_tables_are_those_of_args() -> None:
    done = subprocess.run(
        [sys.executable, f"{REPOSITORY}/packaging/launcher.py", "--check"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr  # run `make launcher`


def test_verbs_that_python_edits() -> None:
    assert args.EDITED == {"create", "run", "restore"}, "packaging/bin/chandler-runtime has these three by name"


# --- The installation, and none.


def test_installed_files_name_no_destdir(tmp_path: Any) -> None:
    destination = str(tmp_path / "destdir")
    subprocess.run(
        [f"{REPOSITORY}/packaging/install"],
        check=True,
        stdin=subprocess.DEVNULL,
        env={
            "PATH": "/usr/bin:/bin",
            "DESTDIR": destination,
            "PREFIX": "/opt/chandler",
            "SYSCONFDIR": "/opt/etc",
            "STATEDIR": "/opt/run",
        },
    )
    for directory, _, names in os.walk(destination):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                data = file.read()
            assert os.fsencode(destination) not in data, name
    with open(f"{destination}/opt/chandler/lib/chandler/shim/paths.py", encoding="utf-8") as file:
        text = file.read()
    assert 'CONFIG_DIR = "/opt/etc/chandler"\n' in text and 'STATE_DIR = "/opt/run"\n' in text
    with open(f"{destination}/opt/chandler/bin/chandler-runtime", encoding="utf-8") as file:
        installed = file.read()
    assert (
        not re.search("[^t]/etc/", installed)
        and "_lib=/opt/chandler/lib/chandler\n" in installed
        and "_python=/usr/bin/python3\n" in installed
        and "\n#" not in installed
    )
    # What runs from a checkout is what is installed, links among it.
    programs = {
        name: os.path.islink(os.path.join(os.path.dirname(SOURCE), name))
        for name in os.listdir(os.path.dirname(SOURCE))
        if name.startswith("chandler")
    }
    assert {entry.name: entry.is_symlink() for entry in os.scandir(f"{destination}/opt/chandler/bin")} == programs
    source = f"{destination}/opt/chandler/lib/chandler/shim/runtime/args.py"
    assert (
        os.path.exists(os.path.join(os.path.dirname(source), "__pycache__", f"args.{sys.implementation.cache_tag}.pyc"))
        or sys.executable != "/usr/bin/python3"
    )


@pytest.mark.parametrize(
    "name, value", [("PREFIX", "relative"), ("PREFIX", "/a b"), ("PYTHON", '/a"b'), ("STATEDIR", "/a$b")]
)
def test_installation_refuses_odd_paths(name: str, value: str, tmp_path: Any) -> None:
    done = subprocess.run(
        [f"{REPOSITORY}/packaging/install"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={"PATH": "/usr/bin:/bin", "DESTDIR": str(tmp_path), name: value},
    )
    assert done.returncode == 1 and done.stderr.startswith("install: ") and not os.listdir(tmp_path)


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell.name)
def test_a_launcher_in_a_checkout(shell: Shell, tmp_path: Any) -> None:
    """From a checkout, by its path, by a link from elsewhere, beside it and without a directory."""
    if not os.access(shell.target, os.X_OK):
        pytest.skip(f"not installed: {shell.name}")
    directory = str(tmp_path)
    os.makedirs(f"{directory}/-bin")
    os.symlink(shell.target, f"{directory}/sh")
    with open(f"{directory}/python", "w", encoding="utf-8") as file:
        file.write('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    os.chmod(f"{directory}/python", 0o755)
    with open(f"{directory}/-bin/chandler-runtime", "w", encoding="utf-8") as file:
        file.write(source().replace("_python=/usr/bin/python3", f"_python={directory}/python"))
    os.chmod(f"{directory}/-bin/chandler-runtime", 0o755)
    open(f"{directory}/-bin/start.py", "w").close()
    os.symlink("-bin/chandler-runtime", f"{directory}/elsewhere")
    os.symlink("chandler-runtime", f"{directory}/-bin/chandler-crun")
    for cwd, called, library in (
        ("", "elsewhere", f"{directory}/-bin"),
        ("", "-bin/chandler-crun", "./-bin"),
        ("-bin", "chandler-runtime", "."),
        ("", f"{directory}/-bin/chandler-runtime", f"{directory}/-bin"),
        ("", f"{directory}/elsewhere", f"{directory}/-bin"),
    ):
        done = subprocess.run(
            [f"{directory}/sh", "--", called, "create", "-b", "none", "ID"]
            if shell.name != "busybox" or called[0] != "-"
            else [f"{directory}/sh", f"./{called}", "create", "-b", "none", "ID"],
            cwd=os.path.join(directory, cwd),
            capture_output=True,
            text=True,
            check=False,
            env=PLAIN,
            stdin=subprocess.DEVNULL,
        )
        words = done.stdout.split("\n")
        assert words[:5] == ["-I", "-S", "-B", "-X", "utf8"], done
        assert os.path.normpath(words[5]) == os.path.normpath(f"{library}/start.py") and words[5][0] != "-", words
        assert words[7:-1] == ["create", "-b", "none", "ID"]
