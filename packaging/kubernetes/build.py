#!/usr/bin/python3
"""build.py DIRECTORY: the root file system of the image, from this checkout and the interpreter that runs this.

It holds no shell, no package manager and no file of a distribution beyond what the interpreter needs: Chandler laid out
once for each directory that the installer may choose on a node (PREFIXES), with a copy of the interpreter that runs from
there whatever the node has, and the installer itself, /node.py.  Needs Python's packages yaml, google.protobuf and
tomlkit (Debian: python3-yaml, python3-protobuf, python3-tomlkit), ldd and patchelf; nothing from a network.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from typing import Dict, Iterator, List

HERE = os.path.dirname(os.path.realpath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
# The last is Container-Optimized OS's only directory that is writable, may hold programs and outlives a reboot.
PREFIXES = ("/opt/chandler", "/home/kubernetes/bin/chandler")
PACKAGES = {
    "yaml": "python3-yaml",
    "_yaml": "python3-yaml",
    "google.protobuf": "python3-protobuf",
    "google._upb": "",
    "tomlkit": "python3-tomlkit",
}  # google._upb: where protobuf has it
# Of the standard library: what no command of Chandler's imports, and what is large.
_WITHOUT = re.compile(
    r"(.*/)?(test|tests|unittest|idlelib|tkinter|turtledemo|lib2to3|ensurepip|distutils|venv|pydoc_data|"
    r"curses|dbm|sqlite3|wsgiref|xmlrpc|__pycache__|site-packages|dist-packages|config-[^/]*|_test[^/]*\.so|xxlimited[^/]*\.so|_ctypes_test[^/]*\.so|"
    r"(_tkinter|_sqlite3|_curses|_curses_panel|readline|_dbm|_gdbm|nis|ossaudiodev)\.[^/]*\.so)"
)
_LIBRARY = re.compile(r"(?:(\S+) => )?(/\S+) \(0x")


def main(directory: str) -> None:
    modules = packages()
    interpreter = os.path.realpath(sys.executable)
    version = f"{chandler_version()}-{digest([interpreter, sysconfig.get_path('stdlib'), *modules.values()])}"
    os.makedirs(directory)
    first = ""
    for prefix in PREFIXES:
        home = f"{prefix}/versions/{version}"
        install(directory, prefix, home, interpreter)
        python = f"{directory}{home}/python"
        if first:
            subprocess.run(["cp", "-al", first, python], check=True)  # linked: the image holds one copy
            os.unlink(f"{python}/bin/python3")
        else:
            first = python
            copy_interpreter(interpreter, python, f"{home}/python")
        shutil.copy(interpreter, f"{python}/bin/python3")
        subprocess.run(
            [
                "patchelf",
                "--set-interpreter",
                f"{home}/python/lib/{loader(interpreter)}",
                "--force-rpath",
                "--set-rpath",
                f"{home}/python/lib",
                f"{python}/bin/python3",
            ],
            check=True,
        )
        copy_packages(modules, f"{directory}{home}/lib/chandler", f"{home}/lib/chandler", python)
        os.symlink(f"versions/{version}/bin", f"{directory}{prefix}/bin")
    surroundings(directory, f"{PREFIXES[0]}/versions/{version}/python/bin/python3")


def chandler_version() -> str:
    with open(f"{REPOSITORY}/shim/paths.py", encoding="utf-8") as file:
        found = re.search(r'^VERSION = "(.*)"', file.read(), re.MULTILINE)
    assert found is not None
    return found[1]


def packages() -> Dict[str, str]:
    """The packages and where they are."""
    found = {}
    for name, debian in PACKAGES.items():
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is not None:
            found[name] = next(iter(spec.submodule_search_locations or [spec.origin or ""]))
        elif debian:
            sys.exit(
                f"build.py: {sys.executable} has no package {name}, which the image needs; apt-get install {debian}"
            )
    return found


def digest(more: List[str]) -> str:
    """Of all that goes into the image, so that two versions never lie in one directory of a node."""
    ours = [
        f"{REPOSITORY}/{name}" for name in ("shim", "hooks", "packaging/bin", "packaging/install", "packaging/image.py")
    ]
    found = hashlib.sha256()
    for top in [os.path.realpath(__file__), *ours, *more]:
        for path in [top] if os.path.isfile(top) else files(top):
            with open(path, "rb") as file:
                found.update(path.replace(REPOSITORY, "", 1).encode() + b"\0" + file.read())
    return found.hexdigest()[:12]


def files(top: str) -> Iterator[str]:
    for parent, directories, names in os.walk(top):
        directories[:] = sorted(name for name in directories if not _WITHOUT.fullmatch(name))
        yield from (f"{parent}/{name}" for name in sorted(names) if not _WITHOUT.fullmatch(name))


def install(directory: str, prefix: str, home: str, interpreter: str) -> None:
    """Chandler in a directory of this version's own.  Only `prefix`/bin, which leads to it, stands in what outlives a
    version: the engine's configuration and the hooks of containers that run."""
    subprocess.run(
        [f"{REPOSITORY}/packaging/install"],
        check=True,
        stdin=subprocess.DEVNULL,
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "DESTDIR": directory,
            "PREFIX": home,
            "SYSCONFDIR": "/etc",
            "STATEDIR": "/run/chandler",
            "PYTHON": interpreter,
            "COMPILE": "no",
        },
    )
    code = f"{directory}{home}/lib/chandler"
    replace(f"{code}/shim/paths.py", f'HOOK = "{home}/bin/', f'HOOK = "{prefix}/bin/')
    for launcher in os.listdir(f"{directory}{home}/bin"):
        replace(f"{directory}{home}/bin/{launcher}", f"_python={interpreter}\n", f"_python={home}/python/bin/python3\n")
    for package in ("shim", "hooks"):
        compile_all(f"{code}/{package}", f"{home}/lib/chandler/{package}")
    subprocess.run([interpreter, "-I", f"{REPOSITORY}/packaging/image.py", code, f"{home}/lib/chandler"], check=True)
    # Units, rules, completions and manual pages: a node's pods do what those are for.
    for left in [
        f"{home}/share",
        *(f"{home}/lib/{name}" for name in os.listdir(f"{directory}{home}/lib") if name != "chandler"),
    ]:
        shutil.rmtree(directory + left, ignore_errors=True)


def replace(path: str, old: str, new: str) -> None:
    if os.path.islink(path):
        return
    with open(path, "r+", encoding="utf-8") as file:
        text = file.read()
        if old not in text:
            sys.exit(f"build.py: {path} has no {old.strip()}")
        file.seek(0)
        file.truncate()
        file.write(text.replace(old, new))


def copy_interpreter(interpreter: str, target: str, home: str) -> None:
    """The standard library and all that is linked to; `home` is where `target` will be."""
    library = sysconfig.get_path("stdlib")
    inside = f"{target}/lib/{os.path.basename(library)}"
    for path in files(library):
        place(path, inside + path[len(library) :])
    os.makedirs(f"{target}/bin")
    copy_libraries([interpreter, *(path for path in files(inside) if path.endswith(".so"))], target)
    compile_all(inside, f"{home}{inside[len(target) :]}")


def copy_packages(modules: Dict[str, str], code: str, home: str, python: str) -> None:
    """Beside Chandler's own, where its programs look first, whatever the interpreter takes for its site."""
    for name, source in modules.items():
        at = f"{code}/{name.replace('.', '/')}"
        for path in [source] if os.path.isfile(source) else files(source):
            place(
                path, os.path.dirname(at) + "/" + os.path.basename(path) if path == source else at + path[len(source) :]
            )
        if os.path.isdir(at):
            compile_all(at, f"{home}/{name.replace('.', '/')}")
    copy_libraries([path for path in files(code) if path.endswith(".so")], python)


def compile_all(directory: str, home: str) -> None:
    subprocess.run(
        [
            sys.executable,
            "-I",
            "-m",
            "compileall",
            "-q",
            "-f",
            "--invalidation-mode",
            "unchecked-hash",
            "-s",
            directory,
            "-p",
            home,
            directory,
        ],
        check=True,
    )


def copy_libraries(programs: List[str], target: str) -> None:
    for program in programs:
        for name, path in libraries(program):
            if not os.path.exists(f"{target}/lib/{name}"):
                place(path, f"{target}/lib/{name}")


def libraries(program: str) -> Iterator[tuple[str, str]]:
    said = subprocess.run(
        ["ldd", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    ).stdout
    if "not found" in said:
        sys.exit(f"build.py: {program}: {' '.join(line.strip() for line in said.splitlines() if 'not found' in line)}")
    for name, path in _LIBRARY.findall(said):
        yield os.path.basename(name or path), path


def loader(program: str) -> str:
    """The name of the program's dynamic loader."""
    return next(name for name, _ in libraries(program) if name.startswith("ld-"))


def place(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(source, target)
    os.chmod(target, 0o755 if os.access(source, os.X_OK) or target.endswith(".so") else 0o644)


def surroundings(directory: str, python: str) -> None:
    """What a container needs around it.  The NRI plugin gets the node's /usr and /run, where the links lead to."""
    for name in ("dev", "host", "proc", "run", "sys", "tmp", "usr", "var", "etc/cdi"):
        os.makedirs(f"{directory}/{name}", exist_ok=True)
    for name, target in (
        ("bin", "usr/bin"),
        ("sbin", "usr/sbin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
        ("var/run", "/run"),
        ("python3", python),
    ):
        os.symlink(target, f"{directory}/{name}")
    place(f"{HERE}/node.py", f"{directory}/node.py")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    os.umask(0o022)
    main(os.path.abspath(sys.argv[1]))
