"""image.py LIBDIR [INSTALLED]: writes LIBDIR/create-TAG.image, which holds all modules that a create imports.

For every module the import system makes several calls to the file system, and unmarshals docstrings and annotations
that no create reads.  Together that takes longer than all the work of a create.

The image is one marshalled tuple (load, magic number of the byte code, modules, late functions):
- load: the code of _LOAD, which start.py executes to load the rest.  When another version of Python made the image,
  start.py imports the modules in the ordinary way.
- modules: (name, is package, code) of each module, in the order in which the modules finish importing.  The code has no
  docstrings, annotations and line numbers.
- late functions: the functions of LATE, which an ordinary create does not call, as "module function" -> marshalled
  code.  Each is unmarshalled when it is called for the first time.
Run this program with the interpreter that will read the image.  Like byte code, the image must be made again when that
interpreter is upgraded.  INSTALLED: where LIBDIR will be, when it is not there yet; tracebacks name files there.
"""

from __future__ import annotations

import ast
import importlib.util
import marshal
import os
import subprocess
import sys
import types
from typing import Any

# Each line has a module, then functions and methods of it.  A module may have several lines.  `tests/bench/run --late`
# prints the functions that a create with GPUs does not call.
LATE = """
shim.errors ChandlerError.within
shim.runtime.args Invocation.same _abbreviated _argp _clap _clap_globals _clap_id _verb_at
shim.policy.caller Caller._check_image Caller.believed_engine _of_storage
shim.cdi.names check_class check_device check_vendor file_name split_kind
shim.cdi.resolve unresolvable
shim.oci.config_file ConfigJson._forget ConfigJson._original ConfigJson.restore _unread
shim.engine CheckedRequest._as_pods CheckedRequest._of_pod Granting.undo Plan.add _check_engine_devices
shim.engine _config_by_rules _rare_edits _with_allocations claims_for_pod plan
shim.host.files cannot_read_now exists make_directory unseal
shim.host.kernel cgroups cgroups_of oom_score unified_cgroups
shim.host.trust broken_link check_own_directory read_trusted
shim.host.userns outer_uid overflow_uid has_outside_owner _effective_capabilities
shim.gpu.vendors all_names node_directories with_gpus
shim.gpu.choose Grant.joined keys_by_name _device_number _devices _free _from_nodes
shim.gpu.choose _named _node _present_numbers _key_of_nodes gpu_names_by_number with_allocated with_devices
shim.policy.engines called
shim.policy.words source_of_policy
shim.state.grants remove
shim.host.device_nodes _pci_vendor moved read_node read_gpu_node
shim.node.inventory Inventory.explain_missing Inventory.kinds Inventory.names Inventory.near
shim.node.inventory Account._own_state_dir Account._unfit Account.private
shim.jsontext _damage _refuse_constant
shim.state.leases utc describe is_of_sandbox of_pod of_sandbox sandbox_token without_lone_sandboxes
shim.state.ledger Ledger._failed Ledger._rebuild_if_certain Ledger._recorded Ledger._with_sandbox
shim.state.ledger Ledger.forget Ledger.rebuild Ledger.release
shim.state.ledger Ledger.restore_all_gpus Ledger.end_stale_leases dra_lease nri_lease parse
shim.oci.reader _node_tuple bind_sources capabilities rule_covers environment
shim.oci.reader hugepages kernel_mounts first_missing_node namespace
shim.oci.reader oom_score readonly_root resource rlimits text unified
shim.oci.writer _rdt _gids _net_devices _resources idmapped
shim.policy.permission _check_variable _no
shim.keys.common _cpuset _default _names check_limits cpus
shim.request.quantity _exponent scaled
shim.request.parse _check_text _container_document _set
shim.request.schema rare_entry
shim.request.values as_text host_path split_list number_text text wrong_value
shim.runtime.node_inventory compile_now find_libraries
shim.node.cdi_check moved
shim.runtime.equip _adjusted _asks _check_restored _log
shim.runtime.wrapper _open_streams _may_ask_anyway _names_from_sources _pass_through
shim.host.runtimes default_root for_verb kind_of_container
shim.oci.targets _is_bind ImageRoot._walk ImageRoot.kernel ImageRoot.plain ImageRoot.within_bind _check_nested
"""
# What a create imports.  It imports the ledger only on nodes that keep leases, which is the default.
ENTRIES = "shim.runtime.wrapper, shim.state.ledger"

# start.py executes this with its own names sys, marshal, magic, modules, late and root.
_LOAD = """
import _frozen_importlib_external
def load_late(name, function):
    namespace = sys.modules[name].__dict__
    owner, _, last = function.rpartition(".")
    before = namespace.get(last)
    exec(marshal.loads(late[name + " " + function]), namespace)
    loaded = namespace[last]
    if owner:
        setattr(namespace[owner], last, loaded)
        namespace[last] = before
    return loaded
def late_function(name, function):
    def call(*arguments, **named):
        return load_late(name, function)(*arguments, **named)
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


def modules(directory: str) -> list[str]:
    """The names of Chandler's modules that importing ENTRIES imports, each after the modules that it imports itself."""
    program = f"import sys; sys.path.insert(0, {directory!r}); import {ENTRIES}"
    completed = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-X", "importtime", "-c", program],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    names = [line.rpartition("|")[2].strip() for line in completed.stderr.splitlines()]
    return [name for name in names if name.partition(".")[0] == ENTRIES.partition(".")[0]]


class _Bare(ast.NodeTransformer):
    """Removes what only people and type checkers read."""

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
            # Making the members of a class with slots costs more than the few objects of a create save.
            return ast.Pass()
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            return None  # saves the import of __future__, which is useless without annotations
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return node.orelse or None
        return node


class _Split(ast.NodeTransformer):
    """Replaces each late function of a module by one that loads it when called; `functions` collects the late ones.

    It also replaces `from shim import module` by a look-up in sys.modules, without the import system: the modules that
    a module needs stand before it in the image, so they are loaded already.
    """

    def __init__(self, module: str, late: list[str], loaded: list[str]) -> None:
        """`late`: the names of the module's late functions; `loaded`: the modules before it in the image."""
        self.module, self.late, self.loaded = module, late, loaded
        self.functions: dict[str, ast.FunctionDef] = {}
        self._class = ""  # the class that is being visited, with a dot: `Class.`

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
    """The code of a module; tracebacks show the file name `shown`."""
    return _without_lines(compile(ast.fix_missing_locations(tree), shown, "exec", dont_inherit=True, optimize=0))


def _without_lines(code: types.CodeType) -> types.CodeType:
    """The same code without its table of line numbers.  A create prints an error message, never a traceback."""
    consts = tuple(
        _without_lines(constant) if isinstance(constant, types.CodeType) else constant for constant in code.co_consts
    )
    table = "co_linetable" if hasattr(code, "co_linetable") else "co_lnotab"
    return code.replace(co_consts=consts, **{table: b""})


def image(directory: str, installed: str) -> bytes:
    """The image of the modules in `directory`, whose tracebacks name files in `installed`."""
    entries: list[tuple[str, bool, Any]] = []
    late: dict[str, bytes] = {}
    late_names: dict[str, list[str]] = {}  # module -> its functions in LATE
    for line in LATE.strip().split("\n"):
        module, *functions = line.split()
        late_names.setdefault(module, []).extend(functions)
    for name in modules(directory):
        path = os.path.join(directory, *name.split("."))
        package = os.path.isdir(path)
        path = os.path.join(path, "__init__.py") if package else path + ".py"
        shown = os.path.join(installed, os.path.relpath(path, directory))
        with open(path, encoding="utf-8") as file:
            tree = _Bare().visit(ast.parse(file.read(), path))
        split = _Split(name, late_names.pop(name, []), [loaded for loaded, _, _ in entries])
        # the file of a package is mostly empty, and need not be run
        entries.append((name, package, compiled(split.visit(tree), shown) if tree.body else None))
        missing = set(split.late) - split.functions.keys()
        if missing:
            sys.exit(f"image.py: {path} has no function {', '.join(missing)}, which LATE names")
        for function, node in split.functions.items():
            late[f"{name} {function}"] = marshal.dumps(compiled(ast.Module([node], []), shown))
    if late_names:
        sys.exit(f"image.py: a create does not import {', '.join(late_names)}, which LATE names")
    load = compile(_LOAD, "<image>", "exec", dont_inherit=True)
    return marshal.dumps((load, importlib.util.MAGIC_NUMBER, entries, late))


def main(directory: str, installed: str = "") -> None:
    """Writes the image of `directory`.  `installed`: where `directory` will be, when it is not there yet."""
    path = os.path.join(directory, f"create-{sys.implementation.cache_tag}.image")
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as file:
        file.write(image(directory, installed or directory))
    os.chmod(temporary, 0o644)
    os.rename(temporary, path)


if __name__ == "__main__":
    # Without debug ranges, since the image would hold them and no create needs them.
    if "no_debug_ranges" not in sys._xoptions:
        os.execv(sys.executable, [sys.executable, "-I", "-X", "no_debug_ranges", *sys.argv])
    main(*sys.argv[1:])
