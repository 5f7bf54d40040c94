"""Too little memory, or too few descriptors: one sentence, no container, and nothing left behind."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable

import pytest
from lab import bundle
from lab.engine import Engine, records
from lab.install import Installation
from lab.node import Node

MIB = 1 << 20
ASKED = bundle.request(resources={"gpu": {"count": 1}})
# Below these limits the interpreter itself does not start, and only its own message can be seen.
MEMORY = [
    *((resource.RLIMIT_AS, size) for size in (13 * MIB, 14 * MIB, 15 * MIB, 16 * MIB)),
    *((resource.RLIMIT_DATA, size) for size in (4 * MIB, 5 * MIB, 6 * MIB, 8 * MIB)),
]


def limited(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, value))


def scene(installation: Installation, node: Node, workdir: str) -> tuple[Engine, str]:
    """Chandler over a runtime that only says that it was started."""
    note, runtime = os.path.join(workdir, "started"), os.path.join(workdir, "runc")
    with open(runtime, "w", encoding="utf-8") as script:
        script.write(f"#!/bin/sh\necho >{note}\n")
    os.chmod(runtime, 0o755)
    installation.forget()
    installation.configure([runtime], [node.cdi])
    return Engine([installation.program()], os.path.join(workdir, "root")), note


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize(("kind", "size"), MEMORY)
def test_a_create_with_little_memory(
    installation: Installation, node: Node, workdir: str, kind: int, size: int, warm: bool
) -> None:
    engine, note = scene(installation, node, workdir)
    if warm:
        installation.refresh()
    made = bundle.make(os.path.join(workdir, "b"), ["true"], ASKED, env=[f"A{n}={'x' * 1000}" for n in range(1000)])
    before = made.bytes
    # A cold create gets some more, so that it fails where it compiles.
    done = engine.create(made, "c1", check=False, preexec_fn=limited(kind, size if warm else size + 4 * MIB))
    assert done.returncode == 1 and not os.path.exists(note)
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("chandler: Chandler ran out of memory or of descriptors (MemoryError)")
    (record,) = records(made.log)
    assert record["level"] == "error" and f"chandler: {record['msg']}" == sentence
    assert made.bytes == before and installation.leases() == {}
    assert not os.path.isdir(grants := f"{installation.state}/grants") or not os.listdir(grants)


def test_every_limit_ends_in_a_container_or_in_nothing(installation: Installation, node: Node, workdir: str) -> None:
    """Also where memory ends in the middle of the work."""
    engine, note = scene(installation, node, workdir)
    installation.refresh()
    made = bundle.make(os.path.join(workdir, "b"), ["true"], ASKED, env=[f"A{n}={'x' * 1000}" for n in range(3000)])
    before = made.bytes
    for size in range(18 * MIB, 40 * MIB, MIB):
        done = engine.create(made, "c1", check=False, preexec_fn=limited(resource.RLIMIT_AS, size))
        if os.path.exists(note):
            assert done.returncode == 0 and list(installation.leases()) == ["c1"]
            return
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert done.returncode == 1 and made.bytes == before and installation.leases() == {}
    raise AssertionError("no limit was enough")


def test_a_create_with_few_descriptors(installation: Installation, node: Node, workdir: str) -> None:
    """bash needs fewer than dash, so that Python starts.  A ledger that cannot be opened is not taken for damaged."""
    if not os.path.exists("/bin/bash"):
        pytest.skip("not installed: bash")
    engine, note = scene(installation, node, workdir)
    installation.refresh()
    engine.create(bundle.make(os.path.join(workdir, "a"), ["true"], ASKED), "c0")
    os.unlink(note)
    with open(f"{installation.state}/leases", "rb") as file:
        ledger = file.read()
    engine.command.insert(0, "/bin/bash")
    made = bundle.make(os.path.join(workdir, "b"), ["true"], ASKED)
    before = made.bytes
    done = engine.create(made, "c1", check=False, preexec_fn=limited(resource.RLIMIT_NOFILE, 6))
    assert done.returncode == 1 and not os.path.exists(note) and made.bytes == before
    assert "leases cannot be read: Too many open files" in done.stderr
    with open(f"{installation.state}/leases", "rb") as file:
        assert file.read() == ledger


def test_a_broken_installation(installation: Installation, node: Node, workdir: str) -> None:
    """One sentence with the kind of the error, for a create; other verbs need no Python."""
    engine, note = scene(installation, node, workdir)
    installation.refresh()
    code = os.path.join(installation.prefix, "lib/chandler")
    made = bundle.make(os.path.join(workdir, "b"), ["true"], ASKED)
    os.rename(code + "/shim", code + "/away")
    images = [name for name in os.listdir(code) if name.endswith(".image")]
    for name in images:
        os.rename(f"{code}/{name}", f"{code}/{name}.away")
    try:
        done = engine.create(made, "c1", check=False)
        assert done.returncode == 1 and not os.path.exists(note)
        assert done.stderr.splitlines() == [
            "chandler: Chandler could not run (ModuleNotFoundError), so the runtime was not started; install it again"
        ]
        engine.call("state", "c1")
        os.unlink(os.path.join(workdir, "runc"))
        assert "Chandler could not run (ModuleNotFoundError)" in engine.call("state", "c1", check=False).stderr
    finally:
        os.rename(code + "/away", code + "/shim")
        for name in images:
            os.rename(f"{code}/{name}.away", f"{code}/{name}")


@pytest.mark.parametrize(("words", "status"), [(["release", "/nowhere", "0"], 0), (["update-ldcache"], 1)])
@pytest.mark.parametrize("size", [11 * MIB + MIB // 2 * n for n in range(3, 9)])
def test_a_hook_with_little_memory(installation: Installation, words: list[str], status: int, size: int) -> None:
    done = subprocess.run(
        [installation.program("chandler-hook"), *words],
        input=b"{}",
        capture_output=True,
        check=False,
        preexec_fn=limited(resource.RLIMIT_AS, size),
    )
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") <= 1, done.stderr
    assert done.returncode == status


@pytest.mark.parametrize("closed", ["0", "1", "2", "0 2", "1 2", "0 1 2"])
def test_an_error_is_written_into_no_file_of_ours(
    installation: Installation, node: Node, workdir: str, closed: str
) -> None:
    """The caller has closed standard streams, so files that a create opens could get their numbers."""
    engine, note = scene(installation, node, workdir)
    installation.refresh()
    asked = bundle.request(resources={"gpu": {"devices": ["99"]}})
    made = bundle.make(os.path.join(workdir, "b"), ["true"], asked)
    shut = "; ".join(f"exec {number}>&-" for number in closed.split())
    command = engine.argv("create", "--bundle", made.directory, "c1", log=made.log)
    assert subprocess.run(["sh", "-c", f'{shut}; exec "$@"', "sh", *command], check=False).returncode == 1
    assert "99" in records(made.log)[-1]["msg"] and not os.path.exists(note)
    for directory, _, names in os.walk(installation.state):
        for name in names:
            with open(os.path.join(directory, name), "rb") as file:
                assert b"unresolvable" not in file.read()
