"""How `pip install` and pipx make a wheel of Chandler (PEP 517): what packaging/install lays out, for any directory.

An environment then has PREFIX/lib/chandler and the shell launchers in PREFIX/bin, as a package has, and starts as fast;
console scripts, which look a package up in site-packages, would be slower than a create itself.  Byte code and the
create's image are those of the interpreter that builds, and so is the wheel.
Source: PEP 427 and the binary distribution format of packaging.python.org.
"""
from __future__ import annotations

import base64
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from typing import Any, Dict, Iterator, List, Optional, Tuple

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}-none-any"
# What a wheel, or a package, is made of.
SOURCES = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "shim", "hooks", "systemd", "packaging")
# What is of use in an environment: not units, udev rules and /etc, which are a system's.
DATA = ("lib/chandler", "share")
# An environment for another Python is another environment.
LEFT_OUT = ("lib/chandler/compile", "lib/chandler/image.py")
_TIME = (1980, 1, 1, 0, 0, 0)


def get_requires_for_build_wheel(config_settings: Any = None) -> List[str]:
    """Nothing beyond [build-system] requires."""
    return []


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    """Writes the wheel and returns its name."""
    project, version = _project()
    name = f"chandler-{version}"
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([os.path.join(HERE, "packaging/install")], check=True, stdin=subprocess.DEVNULL,
                       env={"PATH": os.environ.get("PATH", os.defpath), "DESTDIR": directory, "PREFIX": "/prefix", "PYTHON": sys.executable,
                            "RELOCATABLE": "yes"})
        files = list(_laid_out(directory + "/prefix", name))
    files += [(f"{name}.dist-info/METADATA", _metadata(project, version), 0o644),
              (f"{name}.dist-info/WHEEL", f"Wheel-Version: 1.0\nGenerator: chandler\nRoot-Is-Purelib: true\nTag: {TAG}\n".encode(), 0o644)]
    lines = [f"{path},sha256={_digest(data)},{len(data)}\n" for path, data, _ in files]
    files.append((f"{name}.dist-info/RECORD", "".join([*lines, f"{name}.dist-info/RECORD,,\n"]).encode(), 0o644))
    wheel = f"{name}-{TAG}.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, wheel), "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data, mode in files:
            entry = zipfile.ZipInfo(path, _TIME)
            entry.external_attr = (0o100000 | mode) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return wheel


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """Writes the source archive and returns its name."""
    project, version = _project()
    name = f"chandler-{version}"

    def plain(entry: tarfile.TarInfo) -> Optional[tarfile.TarInfo]:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return None if entry.name.endswith("__pycache__") else entry

    with tarfile.open(os.path.join(sdist_directory, f"{name}.tar.gz"), "w:gz", format=tarfile.PAX_FORMAT) as archive:
        information = _metadata(project, version)
        entry = tarfile.TarInfo(f"{name}/PKG-INFO")
        entry.size = len(information)
        archive.addfile(entry, io.BytesIO(information))
        for each in SOURCES:
            archive.add(os.path.join(HERE, each), f"{name}/{each}", filter=plain)
    return f"{name}.tar.gz"


def _laid_out(prefix: str, name: str) -> Iterator[Tuple[str, bytes, int]]:
    """Path in the wheel, content and mode of each file; a wheel has no links, so they become copies."""
    trees = [(prefix + "/bin", f"{name}.data/scripts"), *((f"{prefix}/{data}", f"{name}.data/data/{data}") for data in DATA)]
    for tree, target in trees:
        for where, folders, names in os.walk(tree):
            folders.sort()
            for each in sorted(names):
                path = os.path.join(where, each)
                if os.path.relpath(path, prefix) in LEFT_OUT:
                    continue
                with open(path, "rb") as file:
                    yield f"{target}/{os.path.relpath(path, tree)}", file.read(), os.stat(path).st_mode & 0o777


def _project() -> Tuple[Dict[str, Any], str]:
    """[project] of pyproject.toml, and the version, which the code has."""
    try:
        import tomllib
    except ImportError:  # Python before 3.11
        import tomli as tomllib  # type: ignore[no-redef, unused-ignore]
    with open(os.path.join(HERE, "pyproject.toml"), "rb") as file:
        project: Dict[str, Any] = tomllib.load(file)["project"]
    sys.path.insert(0, HERE)
    try:
        from shim.paths import VERSION
    finally:
        sys.path.remove(HERE)
    return project, VERSION


def _metadata(project: Dict[str, Any], version: str) -> bytes:
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {version}", f"Summary: {project['description']}",
             f"License: {project['license']['text']}", f"Requires-Python: {project['requires-python']}"]
    lines += [f"Requires-Dist: {each}" for each in project["dependencies"]]
    for extra, needed in project["optional-dependencies"].items():
        lines += [f"Provides-Extra: {extra}", *(f'Requires-Dist: {each} ; extra == "{extra}"' for each in needed)]
    with open(os.path.join(HERE, project["readme"]), encoding="utf-8") as file:
        return "\n".join([*lines, "Description-Content-Type: text/markdown", "", file.read()]).encode()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
