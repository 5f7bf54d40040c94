"""image.py LIBDIR: writes LIBDIR/create-TAG.image, all that a create imports as one marshalled list.

The import system asks the file system several times for every module, and unmarshals docstrings and annotations
that nobody reads: together more than all the work of a create.  The image holds (name, is package, code) in the
order in which the modules finish importing, without docstrings, annotations and column numbers, and the code that
loads them (_LOAD).  start.py executes that; when the image is another Python's, the modules are imported in the
ordinary way.
Run it with the interpreter that will read it; like byte code it has to be made anew when that is upgraded.
"""
from __future__ import annotations

import ast
import importlib.util
import marshal
import os
import subprocess
import sys
from typing import Any, List, Tuple

ENTRIES = "shim.runtime, shim.ledger"  # the latter where leases are kept, as nodes do where nothing else is said

# Runs in start.py, with the names that it has there.
_LOAD = """
import _frozen_importlib_external
if magic == _frozen_importlib_external.MAGIC_NUMBER:
    for name, package, code in modules:
        module = sys.modules[name] = type(sys)(name)
        if package:
            module.__path__ = [root + "/" + name.replace(".", "/")]
        exec(code, module.__dict__)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
"""


def modules(directory: str) -> List[str]:
    """The modules of ours that importing ENTRIES imports, each after those that it needs itself."""
    program = f"import sys; sys.path.insert(0, {directory!r}); import {ENTRIES}"
    done = subprocess.run([sys.executable, "-I", "-S", "-B", "-X", "importtime", "-c", program], check=True,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    return [name for name in names if name.partition(".")[0] == ENTRIES.partition(".")[0]]


class _Bare(ast.NodeTransformer):
    """Takes out what only people and type checkers read."""

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            return ast.Assign([node.target], node.value) if node.value else ast.Pass()
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return None  # a module of its own, and of no use without annotations
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or None
        return node


def code(path: str, shown: str) -> Any:
    """The code of a module, bare; tracebacks call it `shown`."""
    with open(path, encoding="utf-8") as file:
        tree = _Bare().visit(ast.parse(file.read(), path))
    return compile(ast.fix_missing_locations(tree), shown, "exec", dont_inherit=True, optimize=0)


def image(directory: str, installed: str) -> bytes:
    """The image of the modules in `directory`, whose tracebacks name files in `installed`."""
    entries: List[Tuple[str, bool, Any]] = []
    for name in modules(directory):
        path = os.path.join(directory, *name.split("."))
        package = os.path.isdir(path)
        path = os.path.join(path, "__init__.py") if package else path + ".py"
        entries.append((name, package, code(path, os.path.join(installed, os.path.relpath(path, directory)))))
    load = compile(_LOAD, "<image>", "exec", dont_inherit=True)
    return marshal.dumps((load, importlib.util.MAGIC_NUMBER, entries))


def main(directory: str, installed: str = "") -> None:
    """`installed`: where `directory` will be, when it is not there yet."""
    path = os.path.join(directory, f"create-{sys.implementation.cache_tag}.image")
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(image(directory, installed or directory))
    os.chmod(temporary, 0o644)
    os.rename(temporary, path)


if __name__ == "__main__":
    if "no_debug_ranges" not in sys._xoptions:
        os.execv(sys.executable, [sys.executable, "-I", "-X", "no_debug_ranges", *sys.argv])
    main(*sys.argv[1:])
