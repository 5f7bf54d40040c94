"""Each step of the launcher fails in every way that we know of, and no container starts without what it asked for.

    step                      when it fails                                          ends in
    the shell starts          no memory, no descriptors, a fork that fails           the shell's message, no runtime
    launch is read            missing, cut short, too long, odd, another version's   create: Python; else: default paths
    launch is compared        a source newer, older, added, removed; a copy missing  Python
                              a pattern without a match ends the loop (failglob)     Python
    config.json is opened     missing or no file                                     Python, which refuses what
                                                                                     a runtime could read
    grep                      missing, not executable, killed, out of memory         Python
                              stopped together with the launcher by a signal         the signal
    stat (without root)       missing                                                Python
    readlink (in a checkout)  missing                                                one sentence
    Python                    missing or empty                                       create: one sentence; else: runtime
                              it does not start at all (no memory)                   create: its message, no runtime;
                                                                                     else: never needed
                              what it runs cannot be loaded, or ends in an error     the launcher again: one sentence
    date (of a refusal)       missing                                                the record has the time 0
    exec of the runtime       missing, not executable                                else: another runtime of its kind,
                                                                                     Python, one sentence

"else" stands for verbs other than create. tests/real/test_faults.py covers what Python does with the call it is given.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest
from lab import bundle, runtimes
from lab.bundle import Bundle
from lab.engine import Engine, records
from lab.install import Installation
from lab.node import Node

SHELLS = ("dash", "bash", "busybox")
ASKED = bundle.request(resources={"gpu": {"count": 1}})
MARK = "chandler.oci/granted"


def under(shell: str, directory: str) -> Installation:
    """An installation whose programs run in this shell, which is called sh there."""
    target = f"/bin/{shell}"
    if not os.access(target, os.X_OK):
        pytest.skip(f"not installed: {shell}")
    made = Installation(os.path.join(directory, "installed"))
    os.mkdir(os.path.join(directory, "shell"))
    link = os.path.join(directory, "shell", "sh")
    os.symlink(target, link)
    with open(made.program(), encoding="utf-8") as file:
        text = file.read()
    with open(made.program(), "w", encoding="utf-8") as file:
        file.write(text.replace("#!/bin/sh\n", f"#!{link}\n", 1))
    return made


class Scene:
    """Chandler in one shell over a runtime, its launch line fresh."""

    def __init__(self, installation: Installation, engine: Engine, workdir: str) -> None:
        self.installation, self.engine, self.workdir = installation, engine, workdir
        self.root = bundle.rootfs(os.path.join(workdir, "image"))
        self.bundles = 0

    def bundle(self, annotations: dict[str, str] = ASKED) -> Bundle:
        self.bundles += 1
        return bundle.make(os.path.join(self.workdir, f"b{self.bundles}"), ["sleep", "60"], annotations, root=self.root)

    def served(self, made: Bundle, engine: Engine | None = None) -> bool:
        """Whether a create starts a container that has what it asked for.

        Fails if a container starts without it.
        """
        name = f"c{self.bundles}"
        engine = engine or self.engine
        done = engine.create(made, name, check=False)
        started = self.engine.call("state", name, check=False).returncode == 0
        self.engine.call("delete", "--force", name, check=False)
        granted = MARK in made.config["annotations"]
        assert granted or not started, done.stderr
        assert started == (done.returncode == 0)
        return started


@pytest.fixture(scope="module", params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["runc", "crun"])
def scene(request: pytest.FixtureRequest, shell: str, lab: str, node: Node) -> Iterator[Scene]:
    runtime = runtimes.named(request.param)
    if runtime.missing:
        pytest.skip(runtime.missing)
    workdir = os.path.join(lab, f"closed-{shell}-{runtime.label}")
    os.mkdir(workdir)
    installation = under(shell, workdir)
    installation.configure([runtime.path], [node.cdi], '[gpu]\nallocator = "fixed"\n')
    installation.refresh()
    engine = Engine(
        [*runtime.wrap, installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
    )
    yield Scene(installation, engine, workdir)
    engine.clean()


def replaced(scene: Scene, program: str, text: str, mode: int = 0o755) -> Engine:
    """The engine in a mount namespace in which a program of the host is another one."""
    fake = os.path.join(scene.workdir, f"fake-{os.path.basename(program)}")
    with open(fake, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(fake, mode)
    wrap = [
        "unshare",
        "-m",
        "--propagation",
        "private",
        "sh",
        "-c",
        f'mount --bind {fake} {os.path.realpath(program)} && exec "$@"',
        "sh",
    ]
    return Engine([*wrap, *scene.engine.command], scene.engine.root, hangs=scene.engine.hangs)


# --- grep: only status 1 says that there is no request -----------------------------------------------------------

GREPS = {
    "missing": "#!/nonexistent\n",
    "not executable": "",
    "status 2": "#!/bin/dash\nexit 2\n",
    "status 10": "#!/bin/dash\nexit 10\n",
    "status 126": "#!/bin/dash\nexit 126\n",
    "status 127": "#!/bin/dash\nexit 127\n",
    "status 255": "#!/bin/dash\nexit 255\n",
    "killed (out of memory)": "#!/bin/dash\nkill -KILL $$\n",
    "a fault": "#!/bin/dash\nkill -SEGV $$\n",
    "the limit of CPU time": "#!/bin/dash\nkill -XCPU $$\n",
    "ended from outside": "#!/bin/dash\nkill -TERM $$\n",
}


@pytest.mark.parametrize("how", GREPS)
def test_a_failed_grep_leaves_the_create_to_python(scene: Scene, how: str) -> None:
    engine = replaced(scene, "/bin/grep", GREPS[how], 0o644 if how == "not executable" else 0o755)
    assert scene.served(scene.bundle(), engine)


def test_a_container_without_a_request_needs_no_grep(scene: Scene) -> None:
    made = scene.bundle({})
    before = made.bytes
    engine = replaced(scene, "/bin/grep", GREPS["missing"])
    engine.create(made, "plain")
    scene.engine.delete("plain", "--force")
    assert made.bytes == before


@pytest.mark.parametrize("name", ["TERM", "USR1", "KILL"])
def test_a_launcher_that_is_ended_while_grep_runs_starts_nothing(scene: Scene, name: str) -> None:
    engine = replaced(scene, "/bin/grep", f"#!/bin/dash\nkill -{name} $PPID\nexit 1\n")
    made = scene.bundle({})
    done = engine.create(made, "ended", check=False)
    # every command before it on the command line is a shell that execs, so the status is the launcher's own
    assert done.returncode == -getattr(signal, f"SIG{name}")
    assert scene.engine.call("state", "ended", check=False).returncode


# --- the configuration is another one: any difference counts -------------------------------------------------------

CDI = {"cdi.k8s.io/x": "nvidia.com/gpu=0"}
OLD = 1_000_000_000


def old(path: str, time: int = OLD) -> None:
    os.utime(path, (time, time))


def move_config(etc: str) -> None:
    with open(f"{etc}/config.toml", encoding="utf-8") as file:
        text = file.read().replace("[cdi]\n", "[cdi]\nannotations = true\n")
    with open(f"{etc}/../moved", "w", encoding="utf-8") as file:
        file.write(text)
    old(f"{etc}/../moved")
    os.rename(f"{etc}/../moved", f"{etc}/config.toml")


def copy_config(etc: str) -> None:
    """Overwrite the existing file as `cp -p` does: the inode stays."""
    with open(f"{etc}/config.toml", encoding="utf-8") as file:
        text = file.read().replace("[cdi]\n", "[cdi]\nannotations = true\n")
    with open(f"{etc}/config.toml", "w", encoding="utf-8") as file:
        file.write(text)
    old(f"{etc}/config.toml")


def drop_in(path: str, text: str = "[cdi]\nannotations = true\n", time: int = OLD) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    old(path, time)


def add_drop_in(etc: str) -> None:
    before = os.stat(f"{etc}/config.d")
    drop_in(f"{etc}/config.d/a.toml")
    os.utime(f"{etc}/config.d", ns=(before.st_atime_ns, before.st_mtime_ns))


def swap_directory(etc: str) -> None:
    """Replace config.d by one that is older than it."""
    os.mkdir(f"{etc}/new")
    drop_in(f"{etc}/new/a.toml")
    old(f"{etc}/new")
    os.rename(f"{etc}/config.d", f"{etc}/before")
    os.rename(f"{etc}/new", f"{etc}/config.d")


def remove_drop_in(etc: str) -> None:
    before = os.stat(f"{etc}/config.d")
    os.unlink(f"{etc}/config.d/z.toml")
    os.utime(f"{etc}/config.d", ns=(before.st_atime_ns, before.st_mtime_ns))


def rename_drop_in(etc: str) -> None:
    """Rename the drop-in so that it comes before the file that it overrode."""
    before = os.stat(f"{etc}/config.d")
    os.rename(f"{etc}/config.d/z.toml", f"{etc}/config.d/0.toml")
    os.utime(f"{etc}/config.d", ns=(before.st_atime_ns, before.st_mtime_ns))


# what is in config.d before: (name, text)
OFF = ("z.toml", "[cdi]\nannotations = false\n")
ON = ("m.toml", "[cdi]\nannotations = true\n")
CHANGES: dict[str, tuple[list[tuple[str, str]], Callable[[str], None]]] = {
    "an older file is moved there": ([], move_config),
    "an older file is copied over it": ([], copy_config),
    "an older drop-in comes": ([], add_drop_in),
    "an older config.d takes its place": ([], swap_directory),
    "a drop-in goes": ([ON, OFF], remove_drop_in),
    "a drop-in gets another name": ([ON, OFF], rename_drop_in),
    "a drop-in becomes an older one": (
        [("a.toml", OFF[1])],
        lambda etc: drop_in(f"{etc}/config.d/a.toml", time=OLD - 1),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_configuration_with_an_older_time_counts(scene: Scene, node: Node, change: str) -> None:
    """The launch line says that CDI annotations are no request; the configuration says that they are."""
    etc = scene.installation.etc
    before, make = CHANGES[change]
    saved = os.path.join(scene.workdir, "saved")
    shutil.copytree(etc, saved)
    try:
        for name, text in before:
            drop_in(f"{etc}/config.d/{name}", text)
        scene.installation.refresh()
        made = scene.bundle(CDI)
        untouched = made.bytes
        scene.engine.create(made, "before")
        scene.engine.delete("before", "--force")
        assert made.bytes == untouched
        make(etc)
        assert scene.served(scene.bundle(CDI))
    finally:
        shutil.rmtree(etc)
        shutil.move(saved, etc)


# --- what is on the launch line, and what the process may have ------------------------------------------------------


class Bench:
    """Chandler in one shell over a runtime that only records that it was started, and its config.json at that time."""

    def __init__(self, installation: Installation, node: Node, workdir: str) -> None:
        self.installation, self.workdir = installation, workdir
        self.note, self.etc = os.path.join(workdir, "started"), installation.etc
        self.runtime = os.path.join(workdir, "crun")
        with open(self.runtime, "w", encoding="utf-8") as script:
            script.write(f'#!/bin/dash\nread -r text <{workdir}/b/config.json\necho "$*: $text" >>{self.note}\n')
        os.chmod(self.runtime, 0o755)
        installation.configure([self.runtime], [node.cdi], '[gpu]\nallocator = "fixed"\n')
        installation.refresh()
        self.bundle = bundle.make(os.path.join(workdir, "b"), ["true"], ASKED, root="/nonexistent")
        self.text = self.bundle.bytes
        with open(f"{self.etc}/launch", encoding="utf-8") as file:
            self.line = file.read()

    def call(
        self, *arguments: str, wrap: tuple[str, ...] = (), **options: object
    ) -> tuple[subprocess.CompletedProcess[str], str]:
        """The result, and what the runtime recorded."""
        with open(self.bundle.path, "wb") as file:
            file.write(self.text)
        if os.path.exists(self.note):
            os.unlink(self.note)
        settings = {
            "env": {"PATH": "/usr/bin:/bin"},
            "stdin": subprocess.DEVNULL,
            "capture_output": True,
            "text": True,
            "timeout": 60,
            **options,
        }
        done = subprocess.run([*wrap, self.installation.program(), *arguments], check=False, **settings)  # type: ignore[call-overload]
        noted = ""
        if os.path.exists(self.note):
            with open(self.note, encoding="utf-8") as file:
                noted = file.read()
        return done, noted

    def served(self, **options: object) -> bool:
        """Whether a create reaches the runtime, with what it asked for."""
        done, noted = self.call("create", "--bundle", self.bundle.directory, "c1", **options)  # type: ignore[arg-type]
        assert not noted or MARK in noted, done
        assert bool(noted) == (done.returncode == 0)
        return bool(noted)


@pytest.fixture(scope="module")
def bench(shell: str, lab: str, node: Node) -> Bench:
    workdir = os.path.join(lab, f"closed-{shell}")
    os.mkdir(workdir)
    return Bench(under(shell, workdir), node, workdir)


LINES = {
    "nothing": "",
    "one word": "2",
    "no mark": "2  chandler.oci crun={r}\n",
    "an older version": "1 c x.org crun={r}\n",
    "a newer version": "3 {m} x.org crun={r}\n",
    "an unknown mark": "2 0 x.org crun={r}\n",
    "the mark of a change": "2 - x.org crun={r}\n",
    "a pattern for a mark": "2 * x.org crun={r}\n",
    "a way out for a mark": "2 ../launch.d/{m} x.org crun={r}\n",
    "cut short": "2 {m} x.org crun={r}",
    "no runtime": "2 {m} x.org\n",
    "a runtime without a path": "2 {m} x.org crun=\n",
    "a runtime that is not there": "2 {m} x.org crun=/nonexistent\n",
    "a relative path": "2 {m} x.org crun=crun\n",
    "zeros": "\0" * 100,
    "no text": "\x80\xff\n",
    "blanks": " \n",
    "very long": "2 0 " + "x" * 200_000 + "\n",
    "everything is sought": "2 {m} | crun={r}\n",
}


@pytest.mark.parametrize("line", LINES)
def test_an_odd_launch_line_is_not_believed(bench: Bench, line: str) -> None:
    with open(f"{bench.etc}/launch", "w", encoding="latin-1") as file:
        file.write(LINES[line].format(r=bench.runtime, m=bench.line.split()[1]))
    try:
        assert bench.served()
        done, _ = bench.call("state", "c1")
        assert "internal error" not in done.stderr
    finally:
        with open(f"{bench.etc}/launch", "w", encoding="utf-8") as file:
            file.write(bench.line)


def test_a_launch_line_that_is_no_file(bench: Bench) -> None:
    os.unlink(f"{bench.etc}/launch")
    try:
        os.mkdir(f"{bench.etc}/launch")
        assert bench.served()
        os.rmdir(f"{bench.etc}/launch")
        os.symlink("nowhere", f"{bench.etc}/launch")
        assert bench.served()
        os.unlink(f"{bench.etc}/launch")
        assert bench.served()
    finally:
        with open(f"{bench.etc}/launch", "w", encoding="utf-8") as file:
            file.write(bench.line)


@pytest.mark.parametrize(
    "limit, values",
    [
        (resource.RLIMIT_NOFILE, range(13)),
        (resource.RLIMIT_AS, range(1 << 20, 40 << 20, 1 << 20)),
        (resource.RLIMIT_DATA, range(64 << 10, 12 << 20, 1 << 20)),
        (resource.RLIMIT_STACK, range(0, 256 << 10, 32 << 10)),
        (resource.RLIMIT_FSIZE, (0, 1, 4096)),
    ],
    ids=["descriptors", "memory", "data", "stack", "size of files"],
)
def test_resource_limits_do_not_lose_a_request(bench: Bench, limit: int, values: range) -> None:
    for value in values:

        def bounded(value: int = value) -> None:
            resource.setrlimit(limit, (value, value))

        try:
            bench.served(preexec_fn=bounded)
        except (OSError, subprocess.SubprocessError):
            continue  # not even the shell


OPTIONS = (
    "failglob",
    "nullglob",
    "dotglob",
    "extglob",
    "nocasematch",
    "execfail",
    "globstar",
    "noglob",
    "errexit",
    "nounset",
)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_bash_in_the_environment_hide_no_change(bench: Bench, option: str) -> None:
    """A drop-in is edited in place. No directory's time changes, so only the pattern over config.d can find it."""
    edited = f"{bench.etc}/config.d/a.toml"
    kind = "SHELLOPTS" if option in ("noglob", "errexit", "nounset") else "BASHOPTS"
    env = {"PATH": "/usr/bin:/bin", kind: option}
    before = os.stat(f"{bench.etc}/config.d")
    try:
        with open(edited, "w", encoding="utf-8") as file:
            file.write('annotation-prefix = "x.org/"\n')
        os.utime(f"{bench.etc}/config.d", ns=(before.st_atime_ns, before.st_mtime_ns))
        text = bench.text
        bench.text = bench.text.replace(b"chandler.oci/service", b"x.org/service")
        done, noted = bench.call("create", "--bundle", bench.bundle.directory, "c1", env=env)
        bench.text = text
        assert "x.org/granted" in noted, done
    finally:
        os.unlink(edited)
        os.utime(f"{bench.etc}/config.d", ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_config_json_that_only_the_runtime_could_read(bench: Bench) -> None:
    read, write = os.pipe()
    os.write(write, bench.text)
    os.close(write)
    for path in (f"/proc/self/fd/{read}", f"/dev/fd/{read}"):
        done, noted = bench.call("create", "--bundle", bench.bundle.directory, "--config", path, "c1", pass_fds=(read,))
        assert done.returncode == 1 and not noted and "is not a regular file" in done.stderr
    assert os.read(read, 1 << 20) == bench.text
    os.close(read)


def test_signals_that_are_ignored(bench: Bench) -> None:
    def ignore() -> None:
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    assert bench.served(preexec_fn=ignore)


# --- Python, and the programs beside it ----------------------------------------------------------------------------


def hidden(program: str, by: str) -> tuple[str, ...]:
    """A mount namespace in which a program is another file."""
    return (
        "unshare",
        "-m",
        "--propagation",
        "private",
        "sh",
        "-c",
        f'mount --bind {by} {os.path.realpath(program)} && exec "$@"',
        "sh",
    )


@pytest.fixture(params=["empty", "not executable", "broken", "not found"])
def broken(request: pytest.FixtureRequest, bench: Bench) -> str:
    """A file to take a program's place."""
    path = os.path.join(bench.workdir, "broken")
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            {"empty": "", "not executable": "", "broken": "#!/bin/false\n", "not found": "#!/nonexistent\n"}[
                request.param
            ]
        )
    os.chmod(path, 0o644 if request.param == "not executable" else 0o755)
    return path


def test_without_python_requests_are_refused_and_other_verbs_work(bench: Bench, broken: str) -> None:
    bench.installation.refresh()
    wrap = hidden("/usr/bin/python3", by=broken)
    assert not bench.served(wrap=wrap)
    for verb in (("state", "c1"), ("kill", "c1", "9"), ("delete", "--force", "c1"), ("start", "c1")):
        done, noted = bench.call(*verb, wrap=wrap)
        assert done.returncode == 0 and noted.startswith(" ".join(verb) + ":"), done
    bench.text, text = bench.text.replace(b"chandler.oci", b"other"), bench.text
    done, noted = bench.call("create", "--bundle", bench.bundle.directory, "c1", wrap=wrap)
    bench.text = text
    assert done.returncode == 0 and noted


def test_a_refusal_without_date_is_a_record_that_engines_read(bench: Bench, broken: str) -> None:
    log = os.path.join(bench.workdir, "log")
    if os.path.exists(log):
        os.unlink(log)
    empty = os.path.join(bench.workdir, "empty")
    open(empty, "w").close()
    wrap = (*hidden("/usr/bin/python3", by=empty), *hidden("/bin/date", by=broken))
    done, noted = bench.call(
        "--log", log, "--log-format", "json", "create", "--bundle", bench.bundle.directory, "c1", wrap=wrap
    )
    assert done.returncode == 1 and not noted and "/usr/bin/python3" in done.stderr
    (record,) = records(log)
    assert record["level"] == "error" and len(record["time"]) in (0, 20) and json.dumps(record["msg"])


def test_a_log_that_is_a_pipe_nobody_reads(bench: Bench) -> None:
    log = os.path.join(bench.workdir, "pipe")
    if not os.path.exists(log):
        os.mkfifo(log)
    empty = os.path.join(bench.workdir, "empty")
    open(empty, "w").close()
    done, _ = bench.call(
        "--log", log, "create", "--bundle", bench.bundle.directory, "c1", wrap=hidden("/usr/bin/python3", by=empty)
    )
    assert done.returncode == 1 and "interpreter" in done.stderr
