"""Without a request Chandler behaves as the runtime behind it: that runtime's own tests give the same results."""

from __future__ import annotations

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import bundle, crunsuite
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node
from lab.runtimes import Runtime

LEAST = 100  # number of cases that succeed on any host


@pytest.mark.parametrize("crun", crunsuite.CRUNS, ids=lambda crun: crun.label)
def test_crun_s_own_tests_have_the_same_results(crun: Runtime, installation: Installation, node: Node) -> None:
    """Every case has the same verdict direct and through chandler-crun; none is excepted, none is repeated."""
    if reason := crunsuite.missing(crun):
        pytest.skip(reason)
    installation.configure([crun.path], [node.cdi])
    sides = {"direct": crun.path, "through": installation.program("chandler-crun")}
    # A short path, because tests make sockets deep below it. Unprivileged users read it.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as workdir, ThreadPoolExecutor(2) as pool:
        os.chmod(workdir, 0o755)
        waiting = {
            name: pool.submit(crunsuite.run_waiting, crun, program, f"{workdir}/waiting/{name}")
            for name, program in sides.items()
        }
        results = {name: crunsuite.run(crun, program, f"{workdir}/{name}") for name, program in sides.items()}
        for name, rest in waiting.items():
            results[name].update(rest.result())
    crunsuite.sweep()
    for name, verdicts in results.items():
        print(f"{name}: {crunsuite.counts(verdicts)}")
    assert results["direct"].keys() == {
        f"{file}::{case}" for file, cases in crunsuite.files().items() for case in cases
    }
    assert list(results["direct"].values()).count("ok") >= LEAST
    assert results["through"] == results["direct"]


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
def test_words_and_exit_codes_are_the_runtime_s(chandler: Engine, direct: Engine, workdir: str, line: str) -> None:
    answers = []
    for number, engine in enumerate((direct, chandler)):
        made = bundle.make(os.path.join(workdir, str(number), "b"), ["sh", "-c", "echo out; exit 5"])
        words = line.format(bundle=made.directory, gone=os.path.join(workdir, "gone")).split()
        engine.started.update({name: made for name in ("c1", "c2", "create", "run")})
        done = engine.call(*words, check=False, cwd=made.directory)
        # Sorted, since youki lists what it supports in another order each time.
        answers.append((done.returncode, sorted(comparable(done.stdout, made)), sorted(comparable(done.stderr, made))))
        engine.clean()
    assert answers[0] == answers[1]


def comparable(text: str, made: bundle.Bundle) -> list[str]:
    """The lines without what differs between calls: the bundle's path, times, process ids, addresses."""
    text = text.replace(os.path.dirname(made.directory), "PLACE").replace(made.config["linux"]["cgroupsPath"], "GROUP")
    return (
        re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.]+(Z|[+-][\d:]+)?|\bpid[ =:]+\d+|0x[0-9a-f]+|\b\d{3,}\b", "#", text)
        .replace(",\n", "\n")
        .splitlines()
    )
