"""What `pip install` and pipx put into a wheel of Chandler: what packaging/install lays out, for any directory.

hatchling makes the wheel and asks this hook for its files.  An environment then has PREFIX/lib/chandler and the shell
launchers in PREFIX/bin, as a package has, and starts as fast; console scripts, which look a package up in site-packages,
would be slower than a create itself.  Byte code and the create's image are those of the interpreter that builds, and so
is the wheel.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import Any, Dict

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# What is of use in an environment: not units, udev rules and /etc, which are a system's.
DATA = ("lib/chandler", "share")
# An environment for another Python is another environment.
LEFT_OUT = ("lib/chandler/compile", "lib/chandler/image.py")


class Laid(BuildHookInterface[Any]):
    """Its files live until the wheel is written."""

    def initialize(self, version: str, build_data: Dict[str, Any]) -> None:
        """Names the files of the wheel.  Each by itself, since hatchling passes over __pycache__ in directories."""
        if version == "editable":
            raise NotImplementedError("chandler cannot be installed as editable: its launchers run code that is compiled when it "
                                      "is installed; leave -e out, or run packaging/bin/chandler of the checkout")
        self.laid_out = tempfile.TemporaryDirectory()
        subprocess.run([os.path.join(self.root, "packaging/install")], check=True, stdin=subprocess.DEVNULL,
                       env={"PATH": os.environ.get("PATH", os.defpath), "DESTDIR": self.laid_out.name, "PREFIX": "/prefix",
                            "PYTHON": sys.executable, "RELOCATABLE": "yes"})
        prefix = self.laid_out.name + "/prefix"
        build_data["tag"] = f"cp{sys.version_info[0]}{sys.version_info[1]}-none-any"
        build_data["shared_scripts"] = _files(prefix + "/bin", prefix + "/bin")
        for tree in DATA:
            build_data["shared_data"].update(_files(f"{prefix}/{tree}", prefix))
        for path in LEFT_OUT:
            del build_data["shared_data"][f"{prefix}/{path}"]

    def finalize(self, version: str, build_data: Dict[str, Any], artifact_path: str) -> None:
        """Takes the files away again."""
        self.laid_out.cleanup()


def _files(tree: str, base: str) -> Dict[str, str]:
    """Each file below tree, and its path from base.  A wheel has no links: what they lead to is read in their place."""
    paths = sorted(os.path.join(where, name) for where, _, names in os.walk(tree) for name in names)
    return {path: os.path.relpath(path, base) for path in paths}
