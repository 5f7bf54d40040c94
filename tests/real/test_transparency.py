"""With nothing asked, Chandler cannot be told from the runtime behind it: that runtime's own tests give the same results through it."""
from __future__ import annotations

import contextlib
import glob
import os
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import bundle, cgroups, runtimes
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node

SUITE = os.path.join(runtimes.CACHE, "crun-tests/tests")
LEAST = 80  # cases that run in the suite of Debian 12
TRIES = 6
ALONE = threading.Lock()  # most cases do not expect their like beside them; the file of the exception has one that waits half a minute

Results = dict[str, str]


def crun_tests(runtime: str, directory: str, only: dict[str, list[str]] | None = None) -> Results:
    """crun's tests, all or those named by file, with `runtime` in crun's place: case to ok, not ok or skip."""
    crun = runtimes.named("crun")
    helper = os.path.join(SUITE, "init")
    os.makedirs(os.path.join(directory, "tests"), exist_ok=True)
    if not os.path.exists(os.path.join(directory, "tests/init")):
        os.symlink(helper, os.path.join(directory, "tests/init"))  # some cases look for it here
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "OCI_RUNTIME": runtime, "INIT": helper, "HOME": "/root"}
    results: Results = {}
    for file in sorted(only or map(os.path.basename, glob.glob(os.path.join(SUITE, "test_*.py")))):
        chosen = {"RUN_TESTS": " ".join(only[file])} if only else {}
        # A pipe, not /dev/null, as standard input: crun would change the owner of the host's with a user namespace.
        with contextlib.nullcontext() if file == "test_start.py" else ALONE:
            done = subprocess.run([*crun.wrap, "/usr/bin/python3", "-B", os.path.join(SUITE, file)], cwd=directory, env={**env, **chosen},
                                  input="", capture_output=True, text=True, timeout=120, check=False)
            cgroups.end(directory)  # what a case left behind, frozen perhaps
        for verdict, name, skip in re.findall(r"^(ok|not ok) \d+ - (\S+)( #SKIP)?", done.stdout, re.MULTILINE):
            results[f"{file}::{name}"] = "skip" if skip else verdict
    return results


def test_crun_s_own_tests_cannot_tell(installation: Installation, node: Node, place: str) -> None:
    crun = runtimes.named("crun")
    if crun.missing or not os.path.exists(os.path.join(SUITE, "init")):
        pytest.skip("not installed: crun and its tests")
    installation.configure([crun.path], [node.cdi])
    wrapper = installation.program("chandler-crun")
    sides = (crun.path, wrapper), (os.path.join(place, "direct"), os.path.join(place, "through"))
    with ThreadPoolExecutor(2) as pool:
        direct, through = pool.map(crun_tests, *sides)
    print(f"{len(direct)} cases direct, {len(through)} through chandler-crun:",
          ", ".join(f"{list(direct.values()).count(verdict)} {verdict}" for verdict in ("ok", "not ok", "skip")))
    assert len(direct) >= LEAST
    assert direct.keys() == through.keys()
    # A few cases race with the kernel and differ from run to run without Chandler, too. Those that differ are repeated on
    # both sides until each has seen what the other has.
    seen = {case: ({direct[case]}, {through[case]}) for case in direct if direct[case] != through[case]}
    for _ in range(TRIES):
        open_cases = [case for case, (one, other) in seen.items() if not one & other]
        if not open_cases:
            break
        only: dict[str, list[str]] = {}
        for case in open_cases:
            file, name = case.split("::")
            only.setdefault(file, []).append(name)
        one_more, other_more = map(crun_tests, *sides, (only, only))
        for case in open_cases:
            seen[case][0].add(one_more[case])
            seen[case][1].add(other_more[case])
    assert not {case: results for case, results in seen.items() if not results[0] & results[1]}


# What a caller may get wrong; {bundle} is one that works, {gone} is no directory.
LINES = """
--version
--help
state nobody
start nobody
kill nobody 9
delete nobody
delete --force nobody
exec nobody true
create
create --bundle {gone} c1
create --bundle {bundle}
create --bundle {bundle} --nonsense c1
create --bundle {bundle} ../c1
create --bundle {bundle} c/1
run --bundle {bundle} c1 c2
run -b {bundle} create
run --bundle={bundle} --pid-file {bundle}/../p run
create --console-socket {gone} --bundle {bundle} c1
nonsense
--nonsense state c1
--root
list
features
spec --help
""".strip().splitlines()


@pytest.mark.parametrize("runtime", ["runc", "crun", "youki"], indirect=True)
@pytest.mark.parametrize("line", LINES)
def test_words_and_exit_codes_are_the_runtime_s(chandler: Engine, direct: Engine, place: str, line: str) -> None:
    answers = []
    for number, engine in enumerate((direct, chandler)):
        made = bundle.make(os.path.join(place, str(number), "b"), ["sh", "-c", "echo out; exit 5"])
        words = line.format(bundle=made.directory, gone=os.path.join(place, "gone")).split()
        engine.started.update({name: made for name in ("c1", "c2", "create", "run")})
        done = engine.call(*words, check=False, cwd=made.directory)
        # Sorted, since youki lists what it supports in another order each time.
        answers.append((done.returncode, sorted(comparable(done.stdout, made)), sorted(comparable(done.stderr, made))))
        engine.clean()
    assert answers[0] == answers[1]


def comparable(text: str, made: bundle.Bundle) -> list[str]:
    """The lines without what differs from call to call: the bundle's place, times, process ids, addresses."""
    text = text.replace(os.path.dirname(made.directory), "PLACE").replace(made.config["linux"]["cgroupsPath"], "GROUP")
    return re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.]+(Z|[+-][\d:]+)?|\bpid[ =:]+\d+|0x[0-9a-f]+|\b\d{3,}\b", "#", text).replace(",\n", "\n").splitlines()
