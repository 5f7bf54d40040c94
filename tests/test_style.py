"""The project's style as tests: lint, format, types, and which module may import which."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest
from lab import REPOSITORY
from test_hot_path import LEASES, OURS

# Front ends: each may import every other module except other front ends.
FRONT_ENDS = ("shim.runtime", "shim.nri", "shim.kubelet", "shim.bundle", "shim.cli")
# Exceptions: commands for a front end that has no command line of its own: (module, front end).
COMMANDS = {("shim.cli.bundle", "shim.bundle"), ("shim.doctor.node", "shim.bundle")}
# Modules that touch the host. All others, except front ends, are pure: values in, values out.
EFFECTS = (
    "shim.doctor",
    "shim.engine",
    "shim.report",
    "shim.host",
    "shim.node",
    "shim.sharing",
    "shim.state",
    "shim.policy.caller",
    "shim.policy.containers_storage",
    "shim.keys.host_facts",
    "shim.keys.rare",
    "shim.oci.config_file",
    "shim.oci.engine_mounts",
    "shim.oci.targets",
    "shim.oci.userns_devices",
    "shim.generate.managed",
    "shim.generate.nvml",
    "shim.generate.driver_version",
    "shim.generate.tree",
    "shim.configure.cri",
    "shim.configure.selinux",
    "shim.configure.store",
    "shim.configure.verify",
)
# Pure modules in packages of EFFECTS.
PURE = ("shim.node.config", "shim.sharing.terms", "shim.state.leases")
CALENDAR = {"time", "time.gmtime", "time.strftime"}  # allowed: these two functions do not read the clock
# What a pure module may not import; `errno` and the like only define names.
HOST_MODULES = {
    "os",
    "posix",
    "socket",
    "subprocess",
    "time",
    "datetime",
    "fcntl",
    "tempfile",
    "shutil",
    "pathlib",
    "select",
    "signal",
}


def modules() -> Iterator[tuple[str, str]]:
    """Dotted name and path of every module of the package."""
    for directory, _, names in os.walk(os.path.join(REPOSITORY, "shim")):
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(directory, name)
                yield os.path.relpath(path, REPOSITORY)[:-3].replace(os.sep, ".").removesuffix(".__init__"), path


def imports(path: str, types: bool = False) -> set[str]:
    """Every module that a file imports at run time; `types`: also those under TYPE_CHECKING."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read(), path)
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        at = pending.pop()
        if isinstance(at, ast.If) and "TYPE_CHECKING" in ast.dump(at.test) and not types:
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
    """The first of `packages` that a module belongs to, or ""."""
    return next((package for package in packages if name == package or name.startswith(package + ".")), "")


MODULES = dict(modules())


def is_package(name: str) -> bool:
    return MODULES.get(name, "").endswith("__init__.py")


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    wanted = imports(MODULES[name])
    for other in wanted:
        front_end = within(other, FRONT_ENDS)
        own = within(name, FRONT_ENDS)
        assert not front_end or front_end == own or (name, front_end) in COMMANDS, (
            f"{name} imports {other}, a front end"
        )
    if within(name, PURE) or not within(name, FRONT_ENDS + EFFECTS):
        touching = [
            other for other in wanted if within(other, EFFECTS) and not within(other, PURE) and not is_package(other)
        ]
        assert not touching, f"{name} must be pure, but imports modules that touch the host"
        host = {other for other in wanted if other.partition(".")[0] in HOST_MODULES}
        assert not host or host == CALENDAR, f"{name} must be pure, but imports host modules of the standard library"


def test_no_import_circle() -> None:
    """Imports inside functions count, and those for types alone: what is loaded late for speed must still be lower."""
    below = {
        name: {other for other in imports(path, types=True) if other in MODULES and other != name}
        for name, path in MODULES.items()
    }
    while below:
        ground = [name for name, others in below.items() if not others & below.keys()]
        assert ground, f"each of these imports another one of them: {', '.join(sorted(below))}"
        for name in ground:
            del below[name]


def test_lint() -> None:
    tool("ruff", "check", "--quiet", "--no-cache", "--output-format", "concise", ".")


def test_typing_names_outside_the_create_path() -> None:
    """`list[int]` and `X | None`, and no List and Optional, except in modules that a create loads."""
    create_path = [os.path.relpath(MODULES[name], REPOSITORY) for name in sorted(OURS | LEASES)]
    rules = ("--isolated", "--target-version", "py39", "--select", "UP006,UP007,UP035,UP045")
    excluded = ("--exclude", ",".join(create_path))
    tool("ruff", "check", "--quiet", "--no-cache", "--output-format", "concise", *rules, *excluded, ".")


def test_format() -> None:
    tool("ruff", "format", "--check", "--quiet", "--no-cache", ".")


def test_types() -> None:
    # A cache in the checkout may belong to another user.
    tool("mypy", "--strict", "--cache-dir", os.path.join(tempfile.gettempdir(), f"chandler-mypy-{os.getuid()}"))


def tool(name: str, *arguments: str) -> None:
    program = os.path.join(os.path.dirname(sys.executable), name)
    if not os.path.exists(program):
        pytest.skip(f"not installed: {name}")
    done = subprocess.run(
        [program, *arguments], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
