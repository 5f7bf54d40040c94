"""Fixtures and hooks for all tests.

The hooks mark unit and quick tests, print before the run what this machine lacks, and turn a skip into a failure where
the test could have run.
"""

from __future__ import annotations

import collections
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

from lab import bundle, cgroups, install, needs, runtimes
from lab import node as gpu_node
from lab.engine import Engine

# A skip for one of these reasons means that an installation step failed; under CI=true it becomes a failure.
COULD_BE_INSTALLED = ("not installed:", "could not import")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "lab" in fixtures(item) or folder(item) == "vm":  # containers and machines
            continue
        item.add_marker("quick")
        if folder(item) != "packages" and item.path.name != "test_style.py":
            item.add_marker("unit")


def pytest_report_collectionfinish(items: list[pytest.Item]) -> list[str]:
    """Known skips with their reasons, before the first test runs."""
    skipped: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for item in items:
        reason = next(filter(None, (needs.NEEDS[name]() for name in needs.NEEDS if name in fixtures(item))), "")
        if reason:
            skipped[reason][os.path.join("tests", folder(item))] += 1
    return [
        f"{sum(counts.values())} tests will be skipped: {reason} "
        f"({', '.join(f'{counts[name]} of {name}' for name in sorted(counts))})"
        for reason, counts in skipped.items()
    ]


def fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


def folder(item: pytest.Item) -> str:
    """The folder of tests/ that a test is in, or ''."""
    first, _, rest = os.path.relpath(item.path, HERE).partition(os.sep)
    return first if rest else ""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    no_quiet_skip(outcome.get_result())  # type: ignore[attr-defined]


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome = yield
    no_quiet_skip(outcome.get_result())  # type: ignore[attr-defined]


def no_quiet_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped" or os.environ.get("CI") != "true" or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if reason.startswith(COULD_BE_INSTALLED) or os.geteuid() == 0 and reason.startswith(needs.NOT_ALLOWED):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may skip: {reason}"


def need(name: str) -> None:
    if reason := needs.NEEDS[name]():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def needs_root() -> None:
    need("needs_root")


@pytest.fixture(scope="session")
def needs_mounts() -> None:
    need("needs_mounts")


@pytest.fixture(scope="session")
def needs_chroot() -> None:
    need("needs_chroot")


@pytest.fixture(scope="session")
def needs_devices() -> None:
    need("needs_devices")


@pytest.fixture(scope="session")
def needs_kmsg() -> None:
    need("needs_kmsg")


@pytest.fixture(scope="session")
def lab(needs_root: None) -> Iterator[str]:
    """A directory that only root can write to, with all directories above it, and that everybody can enter.

    pytest's own temporary directories are not like that.
    """
    directory = tempfile.mkdtemp(prefix="run-", dir=runtimes.CACHE if os.path.isdir(runtimes.CACHE) else "/var/lib")
    os.chmod(directory, 0o755)
    yield directory
    cgroups.end(directory)
    cgroups.sweep(bundle.GROUPS)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def workdir(lab: str) -> Iterator[str]:
    """A directory for one test in `lab`."""
    directory = tempfile.mkdtemp(dir=lab)
    os.chmod(directory, 0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def node(lab: str, needs_devices: None) -> gpu_node.Node:
    """The simulated GPU node."""
    return gpu_node.make(os.path.join(lab, "node"))


@pytest.fixture(scope="session")
def installation(lab: str) -> install.Installation:
    """An installation for tests that write a configuration of their own."""
    return install.Installation(os.path.join(lab, "installed"))


@pytest.fixture(scope="session")
def served(lab: str, node: gpu_node.Node) -> Callable[[runtimes.Runtime], install.Installation]:
    """For each runtime an installation that has only this runtime, on the simulated node, with everything compiled."""

    @functools.cache
    def serving(runtime: runtimes.Runtime) -> install.Installation:
        made = install.Installation(os.path.join(lab, "serving-" + runtime.label))
        made.configure([runtime.path], [node.cdi])
        made.refresh()
        return made

    return serving


@pytest.fixture(params=[runtime.label for runtime in runtimes.known()])
def runtime(request: pytest.FixtureRequest) -> runtimes.Runtime:
    """Each low-level runtime in turn."""
    found = runtimes.named(request.param)
    if found.missing:
        pytest.skip(found.missing)
    return found


@pytest.fixture
def direct(runtime: runtimes.Runtime, workdir: str) -> Iterator[Engine]:
    """The runtime itself, without Chandler."""
    engine = Engine([*runtime.wrap, runtime.path], os.path.join(workdir, "root"), hangs=runtime.kind == "youki")
    yield engine
    engine.clean()


@pytest.fixture
def chandler(
    runtime: runtimes.Runtime, served: Callable[[runtimes.Runtime], install.Installation], workdir: str
) -> Iterator[Engine]:
    """Chandler over the runtime, on the simulated node."""
    engine = Engine(
        [*runtime.wrap, served(runtime).program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
    )
    yield engine
    engine.clean()
