"""The runtime that created a container serves it for its whole life, whatever happens to the node meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lab import bundle, cgroups, runtimes
from lab.engine import Engine
from lab.install import PYTHON, Installation
from lab.node import Node


@pytest.fixture(scope="module")
def without_python(lab: str, installation: Installation) -> Installation:
    """The same configuration and state, but the interpreter was removed after the installation."""
    python = os.path.join(lab, "python3")
    os.symlink(PYTHON, python)
    removed = Installation(os.path.join(lab, "without-python"), python=python, beside=installation)
    os.unlink(python)
    return removed


@pytest.fixture(params=["runc", "crun", "youki"])
def first(request: pytest.FixtureRequest) -> runtimes.Runtime:
    found = runtimes.named(request.param)
    if found.missing:
        pytest.skip(found.missing)
    return found


@pytest.fixture
def engine(first: runtimes.Runtime, installation: Installation, node: Node, workdir: str) -> Iterator[Engine]:
    """Chandler over `first`, with a running container c1 that was edited."""
    installation.configure([first.path], [node.cdi])
    # Where crun and the others can all work.
    wrap = cgroups.LEGACY if cgroups.mode() == "hybrid" else cgroups.HOST
    engine = Engine([*wrap, installation.program()], os.path.join(workdir, "root"))
    made = bundle.make(os.path.join(workdir, "b"), ["sleep", "60"], bundle.request(resources={"gpu": {"count": 1}}))
    engine.create(made, "c1")
    engine.call("start", "c1")
    engine.wait("c1", "running")
    yield engine
    engine.clean()


def others(first: runtimes.Runtime) -> list[str]:
    """The same runtimes, with another one first."""
    paths = [found.path for label in ("crun", "runc", "youki") if not (found := runtimes.named(label)).missing]
    paths.remove(first.path)
    return [*paths, first.path]


def finish(engine: Engine) -> None:
    """The rest of the container's life, which only the runtime that created it can serve."""
    assert engine.state("c1")["status"] == "running"
    assert engine.exec("c1", "echo", "still here").stdout == "still here\n"
    engine.kill("c1")
    engine.wait("c1", "stopped")
    engine.delete("c1")


def test_another_runtime_is_put_first(
    engine: Engine, first: runtimes.Runtime, installation: Installation, node: Node
) -> None:
    installation.configure(others(first), [node.cdi])
    finish(engine)


def test_the_state_directory_is_wiped(
    engine: Engine, first: runtimes.Runtime, installation: Installation, node: Node
) -> None:
    installation.configure(others(first), [node.cdi])
    installation.forget()
    finish(engine)


def test_python_is_removed(
    engine: Engine, first: runtimes.Runtime, installation: Installation, without_python: Installation, node: Node
) -> None:
    installation.configure(others(first), [node.cdi])
    installation.forget()
    engine.command[-1] = without_python.program()
    finish(engine)


def test_the_configuration_is_broken(
    engine: Engine, first: runtimes.Runtime, installation: Installation, node: Node
) -> None:
    """A broken configuration stops creates, but nothing that a running container needs."""
    installation.configure(others(first), [node.cdi], more="no-such-key = 1\n")
    finish(engine)


def test_a_create_without_python_fails_in_a_sentence(without_python: Installation, workdir: str, node: Node) -> None:
    runtime = runtimes.named("runc")
    if runtime.missing:
        pytest.skip(runtime.missing)
    without_python.configure([runtime.path], [node.cdi])
    engine = Engine([without_python.program()], os.path.join(workdir, "root"))
    made = bundle.make(os.path.join(workdir, "b"), ["true"], bundle.request(env={"A": "b"}))
    before = made.bytes
    done = engine.create(made, "c1", check=False)
    assert done.returncode == 1
    assert "python3" in done.stderr and len(done.stderr.splitlines()) == 1
    assert made.bytes == before
    assert not os.path.exists(os.path.join(workdir, "root", "c1"))
