"""The node's inventory for the wrapper, and what it loads when that has to be compiled.  Part of the create path."""

from __future__ import annotations

import sys

from shim.host import files
from shim.node import inventory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, NoReturn

    from shim.node.inventory import Account, Inventory


def load(account: Account) -> Inventory:
    """The inventory, compiled anew when it is stale.  Raises ConfigError."""
    try:
        return inventory.load(account, explain_missing(account))
    except inventory.Stale:
        return compile_now(account)


def compile_now(account: Account, anew: bool = False) -> Inventory:
    """The inventory, compiled where it is stale, or in any case (`anew`)."""
    find_libraries()
    from shim.node import compiler

    return compiler.refresh(account) if anew else compiler.load(account)


def explain_missing(account: Account) -> Callable[[List[str]], NoReturn]:
    """What an inventory calls with the names of CDI devices that it does not have."""

    def diagnose(names: List[str]) -> NoReturn:
        find_libraries()
        from shim.node import compiler

        raise compiler.read_registry(account, compiler.read_config(account)[0]).diagnose(names)

    return diagnose


def find_libraries() -> None:
    """Lets imports find installed packages (YAML's library): those of the distribution, or of the virtual environment.

    The interpreter is started without them (-S), because a warm create needs none.
    """
    import gc
    import site

    gc.enable()
    directories = site.getsitepackages()
    environment = sys.executable.rpartition("/bin/")[0]
    if files.exists(environment + "/pyvenv.cfg"):
        directories.insert(0, f"{environment}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")
    for directory in directories:
        if directory not in sys.path:
            sys.path.append(directory)
