"""Puts into a wheel of Chandler what packaging/install lays out, so that `pip install` and pipx install the same files.

hatchling makes the wheel and asks this hook for its files.  An environment then has PREFIX/lib/chandler and the shell
launchers in PREFIX/bin, as a system package has, and starts as fast.  Console scripts look their package up in
site-packages, which takes longer than a whole create.  Byte code and the image of the create path fit only the
interpreter that builds them, and so does the wheel.

An editable install (`pip install -e .`) has only the launchers.  They run the code of the checkout with the interpreter
of the environment, without byte code and image.  So each change takes effect at once, and each create is slower.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The directories to put into the wheel.  Units, udev rules and /etc belong to a system, not to an environment.
DATA = ("lib/chandler", "share")
# They renew byte code and image for another Python, which an environment never gets.
LEFT_OUT = ("lib/chandler/compile", "lib/chandler/image.py")


class LayOut(BuildHookInterface[Any]):
    """Lays the files out in a temporary directory, and keeps it until hatchling has written the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Lays the files out and adds them to `build_data`."""
        self.laid_out = tempfile.TemporaryDirectory()
        if version == "editable":
            self._lay_out_launchers()
            build_data["shared_scripts"] = _files(self.laid_out.name, self.laid_out.name)
            return
        subprocess.run(
            [os.path.join(self.root, "packaging/install")],
            check=True,
            stdin=subprocess.DEVNULL,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "DESTDIR": self.laid_out.name,
                "PREFIX": "/prefix",
                "PYTHON": sys.executable,
                "RELOCATABLE": "yes",
            },
        )
        prefix = self.laid_out.name + "/prefix"
        build_data["tag"] = f"cp{sys.version_info[0]}{sys.version_info[1]}-none-any"
        # Name each file by itself, since hatchling skips __pycache__ in directories.
        build_data["shared_scripts"] = _files(prefix + "/bin", prefix + "/bin")
        for tree in DATA:
            build_data["shared_data"].update(_files(f"{prefix}/{tree}", prefix))
        for path in LEFT_OUT:
            del build_data["shared_data"][f"{prefix}/{path}"]

    def _lay_out_launchers(self) -> None:
        """Writes the launchers of packaging/bin, changed to run the checkout's code with the environment's python3."""
        source = os.path.join(self.root, "packaging/bin")
        for name in os.listdir(source):
            if not name.startswith("chandler"):
                continue
            with open(f"{source}/{name}", encoding="utf-8") as file:
                text = file.read()
            # chandler-hook needs the directory with shim and hooks; the others find both from packaging/bin.
            library = self.root if name == "chandler-hook" else source
            computed = (
                '_python=$(/usr/bin/readlink -f -- "$0")\n_python=${_python%/*}/python3\n'
                f"_lib={shlex.quote(library)}\n"
            )
            fixed = "_python=/usr/bin/python3\n_lib=\n"
            if text.count(fixed) != 1:
                raise RuntimeError(f"{source}/{name} does not have {fixed!r} exactly once; correct packaging/hatch.py")
            text = text.replace(fixed, computed)
            with open(f"{self.laid_out.name}/{name}", "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(f"{self.laid_out.name}/{name}", 0o755)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Removes the directory."""
        self.laid_out.cleanup()


def _files(tree: str, base: str) -> dict[str, str]:
    """Each file below `tree`, with its path from `base`.  A wheel has no links: it gets copies of their targets."""
    paths = sorted(os.path.join(where, name) for where, _, names in os.walk(tree) for name in names)
    return {path: os.path.relpath(path, base) for path in paths}
