"""The house's style as tests: lint, types, and who may import whom."""
from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Front ends: each may use everything else and none of the others.
FRONT_ENDS = ("shim.runtime", "shim.nri", "shim.bundle", "shim.cli")
# Commands that show another front end, which has no command line of its own: module, front end.
COMMANDS = {("shim.cli.bundle", "shim.bundle"), ("shim.cli.doctor", "shim.bundle")}
# Modules that touch the host. Everything else that is no front end is pure: values in, values out.
EFFECTS = ("shim.configjson", "shim.enginemounts", "shim.targets", "shim.host", "shim.files", "shim.lock", "shim.inventory", "shim.ledger", "shim.nvtools", "shim.shared", "shim.mps", "shim.timeslice", "shim.grants", "shim.compiler", "shim.engine", "shim.caller", "shim.storage", "shim.facts", "shim.inroot", "shim.secrets", "shim.unmapped", "shim.bound", "shim.update",
           "shim.launch", "shim.report", "shim.runtimes", "shim.stale", "shim.liveness", "shim.rebuild", "shim.records", "shim.cgroups", "shim.generate.tree", "shim.generate.nvml", "shim.generate.managed", "shim.generate.stale",
           "shim.configure.store", "shim.configure.selinux", "shim.configure.verify", "shim.configure.cri")
# What a pure module has no business with; `errno` and the like are only names.
HOST_MODULES = {"os", "posix", "socket", "subprocess", "time", "datetime", "fcntl", "tempfile", "shutil", "pathlib", "select", "signal"}


def modules() -> Iterator[tuple[str, str]]:
    """Dotted name and path of every module of the package."""
    for directory, _, names in os.walk(os.path.join(REPOSITORY, "shim")):
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(directory, name)
                yield os.path.relpath(path, REPOSITORY)[:-3].replace(os.sep, ".").removesuffix(".__init__"), path


def imports(path: str) -> set[str]:
    """Every module that a file imports when it runs; what only the type checker sees does not count."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read(), path)
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        at = pending.pop()
        if isinstance(at, ast.If) and "TYPE_CHECKING" in ast.dump(at.test):
            pending.extend(at.orelse)
            continue
        if isinstance(at, ast.Import):
            found.update(alias.name for alias in at.names)
        elif isinstance(at, ast.ImportFrom):
            assert at.level == 0, f"{path}: absolute imports only"
            found.update({at.module or "", *(f"{at.module}.{alias.name}" for alias in at.names)})
        pending.extend(ast.iter_child_nodes(at))
    return found


def within(name: str, packages: tuple[str, ...]) -> str:
    """The one of `packages` that a module belongs to, or nothing."""
    return next((package for package in packages if name == package or name.startswith(package + ".")), "")


MODULES = dict(modules())


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    wanted = imports(MODULES[name])
    for other in wanted:
        front_end = within(other, FRONT_ENDS)
        own = within(name, FRONT_ENDS)
        assert not front_end or front_end == own or (name, front_end) in COMMANDS, f"{name} imports {other}, a front end"
    if not within(name, FRONT_ENDS + EFFECTS):
        assert not [other for other in wanted if within(other, EFFECTS)], f"{name} is pure and imports what touches the host"
        assert not {other.partition(".")[0] for other in wanted} & HOST_MODULES, f"{name} is pure and reaches for the host"


def test_lint() -> None:
    tool("ruff", "check", "--quiet", "--no-cache", "--output-format", "concise", ".")


def test_types() -> None:
    # Its cache in the checkout may be another user's.
    tool("mypy", "--strict", "--cache-dir", os.path.join(tempfile.gettempdir(), f"chandler-mypy-{os.getuid()}"))


def tool(name: str, *arguments: str) -> None:
    program = os.path.join(os.path.dirname(sys.executable), name)
    if not os.path.exists(program):
        pytest.skip(f"not installed: {name}")
    done = subprocess.run([program, *arguments], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
