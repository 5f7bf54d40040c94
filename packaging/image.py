"""image.py LIBDIR: writes LIBDIR/create-TAG.image, all that a create imports as one marshalled list.

The import system asks the file system several times for every module, and unmarshals docstrings and annotations that
nobody reads: together more than all the work of a create.  The image holds (name, is package, code) in the order in
which the modules finish importing, without docstrings, annotations and line numbers, and the code that loads them
(_LOAD).  start.py executes that; when the image is another Python's, the modules are imported in the ordinary way.
The functions that an ordinary create does not call (LATE) are kept as bytes: each is unmarshalled when it is called
first. Run it with the interpreter that will read it; like byte code it has to be made anew when that is upgraded.
"""

from __future__ import annotations

import ast
import importlib.util
import marshal
import os
import subprocess
import sys
import types
from typing import Any, Dict, List, Tuple

# Module, then functions and methods.  `tests/bench/run --late` prints those that a create with GPUs does not call.
LATE = """
shim.errors ChandlerError.within
shim.runtime.args Invocation.same _abbreviated _argp _clap _clap_globals _clap_id _verb_at
shim.policy.caller Caller._check_image Caller.believed _of_storage
shim.cdi.names check_class check_device check_vendor file_name split_kind
shim.cdi.resolve unresolvable
shim.oci.config_file ConfigJson._forget ConfigJson._original ConfigJson.restore _unread
shim.engine Granting.undo Plan.add _check_engine_devices _rare _ruled plan
shim.host.files exists make_directory unseal
shim.host.kernel cgroups cgroups_of oom_score unified_cgroups
shim.host.trust check_own_directory read_trusted
shim.host.userns outer_uid overflow_uid owner _effective_capabilities
shim.gpu.vendors all_names node_directories with_gpus
shim.gpu.choose Grant.joined _device_number _free _from_nodes _named _node _numbers_there _own_key again numbers
shim.policy.words by
shim.state.grants remove
shim.host.device_nodes _pci_vendor look look_at_gpu
shim.node.inventory Inventory.explain_missing Inventory.kinds Inventory.names Inventory.near Place._own_state_dir Place.private
shim.jsontext _damage _refuse_constant
shim.state.leases utc words
shim.state.ledger Ledger._failed Ledger._rebuild Ledger._recorded Ledger.forget Ledger.make_anew Ledger.release Ledger.settle_all Ledger.take_back nri_lease parse
shim.oci.reader _numbers bind_sources capabilities covers environment hugepages kernel_mounts missing namespace oom_score readonly_root resource rlimits text unified
shim.oci.writer _rdt _gids _net_devices _resources idmapped
shim.policy.permission _check_limits _check_variable _default
shim.request.quantity _exponent scaled
shim.request.parse _check_text _container_document _set
shim.request.schema _cpuset _names cpus leaf
shim.request.values as_text host_path listed number_text text wrong
shim.runtime.node_inventory compile_now find_libraries
shim.runtime.equip _adjusted _asks _check_restored _log
shim.runtime.wrapper _may_ask_anyway _names_from_sources _pass_through
shim.host.runtimes default_root for_verb owner
shim.oci.targets _bound ImageRoot._walk ImageRoot.kernel ImageRoot.plain ImageRoot.within_bind _check_nested
"""
ENTRIES = "shim.runtime.wrapper, shim.state.ledger"  # the latter where leases are kept, as nodes do where nothing else is said

# Runs in start.py, with the names that it has there.
_LOAD = """
import _frozen_importlib_external
def load_late(name, function):
    namespace = sys.modules[name].__dict__
    owner, _, last = function.rpartition(".")
    kept = namespace.get(last)
    exec(marshal.loads(late[name + " " + function]), namespace)
    found = namespace[last]
    if owner:
        setattr(namespace[owner], last, found)
        namespace[last] = kept
    return found
def late_function(name, function):
    def call(*given, **named):
        return load_late(name, function)(*given, **named)
    return call
if magic == _frozen_importlib_external.MAGIC_NUMBER:
    for name, package, code in modules:
        module = sys.modules[name] = type(sys)(name)
        if package:
            module.__path__ = [root + "/" + name.replace(".", "/")]
        if code:
            module._late = late_function
            module._modules = sys.modules
            exec(code, module.__dict__)
"""


def modules(directory: str) -> List[str]:
    """The modules of ours that importing ENTRIES imports, each after those that it needs itself."""
    program = f"import sys; sys.path.insert(0, {directory!r}); import {ENTRIES}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-X", "importtime", "-c", program],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
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
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__slots__":
            return ast.Pass()  # a member of each costs a class more than a create's few objects can win back
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return None  # a module of its own, and of no use without annotations
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or None
        return node


class _Split(ast.NodeTransformer):
    """Puts a function that loads itself in the place of each late function of a module, and keeps the functions by
    name.

    What one module takes from the package itself is there already, since modules stand in the image after those that
    they need: it is looked up without the import system.
    """

    def __init__(self, module: str, late: List[str], loaded: List[str]) -> None:
        self.module, self.late, self.loaded = module, late, loaded
        self.functions: Dict[str, ast.FunctionDef] = {}
        self._class = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        self._class = node.name + "."
        self.generic_visit(node)
        self._class = ""
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        name = self._class + node.name
        if name not in self.late:
            return node
        self.functions[name] = node
        return ast.parse(f"{node.name} = _late({self.module!r}, {name!r})").body[0]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        if self._class or node.module is None:
            return node
        if all(f"{node.module}.{alias.name}" in self.loaded for alias in node.names):
            lines = [f"{alias.asname or alias.name} = _modules['{node.module}.{alias.name}']" for alias in node.names]
        elif node.module in self.loaded:
            lines = [f"{alias.asname or alias.name} = _modules['{node.module}'].{alias.name}" for alias in node.names]
        else:
            return node
        return [ast.parse(line).body[0] for line in lines]


def compiled(tree: ast.Module, shown: str) -> Any:
    """The code of a module; tracebacks call it `shown`."""
    return _without_lines(compile(ast.fix_missing_locations(tree), shown, "exec", dont_inherit=True, optimize=0))


def _without_lines(code: types.CodeType) -> types.CodeType:
    """The same code without its table of line numbers: a create prints what is wrong, and no traceback."""
    consts = tuple(_without_lines(each) if isinstance(each, types.CodeType) else each for each in code.co_consts)
    table = "co_linetable" if hasattr(code, "co_linetable") else "co_lnotab"
    return code.replace(co_consts=consts, **{table: b""})


def image(directory: str, installed: str) -> bytes:
    """The image of the modules in `directory`, whose tracebacks name files in `installed`."""
    entries: List[Tuple[str, bool, Any]] = []
    late: Dict[str, bytes] = {}
    wanted = {line.split()[0]: line.split()[1:] for line in LATE.split("\n") if line.strip()}
    for name in modules(directory):
        path = os.path.join(directory, *name.split("."))
        package = os.path.isdir(path)
        path = os.path.join(path, "__init__.py") if package else path + ".py"
        shown = os.path.join(installed, os.path.relpath(path, directory))
        with open(path, encoding="utf-8") as file:
            tree = _Bare().visit(ast.parse(file.read(), path))
        split = _Split(name, wanted.pop(name, []), [each for each, _, _ in entries])
        # the file of a package is mostly empty, and need not be run
        entries.append((name, package, compiled(split.visit(tree), shown) if tree.body else None))
        if split.functions.keys() != set(split.late):
            sys.exit(
                f"image.py: {path} has no function {', '.join(set(split.late) - split.functions.keys())}, which LATE names"
            )
        for function, node in split.functions.items():
            late[f"{name} {function}"] = marshal.dumps(compiled(ast.Module([node], []), shown))
    if wanted:
        sys.exit(f"image.py: a create does not import {', '.join(wanted)}, which LATE names")
    load = compile(_LOAD, "<image>", "exec", dont_inherit=True)
    return marshal.dumps((load, importlib.util.MAGIC_NUMBER, entries, late))


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
