#!/usr/bin/python3
"""build.py DIRECTORY: makes the root file system of the image, from this checkout and the interpreter that runs this.

The image has Chandler laid out once for each directory that the installer may choose on a node (PREFIXES), each time
with a copy of the interpreter that runs from there whatever the node has, and the installer itself, /node.py.  It has
no shell, no package manager, and no file of a distribution that the interpreter does not need.

Needs the Python packages yaml, google.protobuf, tomlkit and grpc (Debian: python3-yaml, python3-protobuf,
python3-tomlkit, python3-grpcio), ldd and patchelf; nothing from a network.
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
from collections.abc import Iterator

HERE = os.path.dirname(os.path.realpath(__file__))
REPOSITORY = os.path.dirname(os.path.dirname(HERE))
# The last is the only directory of Container-Optimized OS that is writable, may hold programs and survives a reboot.
PREFIXES = ("/opt/chandler", "/home/kubernetes/bin/chandler")
# Python package: Debian package.  Not every protobuf has google._upb, so that may be missing.
PACKAGES = {
    "yaml": "python3-yaml",
    "_yaml": "python3-yaml",
    "google.protobuf": "python3-protobuf",
    "google._upb": "",
    "tomlkit": "python3-tomlkit",
    "grpc": "python3-grpcio",
}
# What the image leaves out of the standard library: large parts, and parts that no command of Chandler imports.
_LEFT_OUT = re.compile(
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
        match = re.search(r'^VERSION = "(.*)"', file.read(), re.MULTILINE)
    assert match is not None
    return match[1]


def packages() -> dict[str, str]:
    """The path of each package, a file or directory.  Exits when one is missing."""
    paths = {}
    for name, debian in PACKAGES.items():
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is not None:
            paths[name] = next(iter(spec.submodule_search_locations or [spec.origin or ""]))
        elif debian:
            sys.exit(
                f"build.py: {sys.executable} has no package {name}, which the image needs; apt-get install {debian}"
            )
    return paths


def digest(others: list[str]) -> str:
    """A digest of everything that goes into the image.

    It becomes part of the version, so that two different builds never share a directory on a node.
    """
    ours = [
        f"{REPOSITORY}/{name}" for name in ("shim", "hooks", "packaging/bin", "packaging/install", "packaging/image.py")
    ]
    hash_ = hashlib.sha256()
    for top in [os.path.realpath(__file__), *ours, *others]:
        for path in [top] if os.path.isfile(top) else files(top):
            with open(path, "rb") as file:
                hash_.update(path.replace(REPOSITORY, "", 1).encode() + b"\0" + file.read())
    return hash_.hexdigest()[:12]


def files(top: str) -> Iterator[str]:
    """The sorted files below a directory, except those that the image leaves out."""
    for parent, directories, names in os.walk(top):
        directories[:] = sorted(name for name in directories if not _LEFT_OUT.fullmatch(name))
        yield from (f"{parent}/{name}" for name in sorted(names) if not _LEFT_OUT.fullmatch(name))


def install(directory: str, prefix: str, home: str, interpreter: str) -> None:
    """Installs Chandler in `home`, a directory for this version only.

    The engine's configuration and the hooks of running containers outlive a version.  They name `prefix`/bin, which is
    a link to the directory of the version in force.
    """
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
    # Remove units, udev rules, completions and manual pages: on a node, pods do what those are for.
    for removed in [
        f"{home}/share",
        *(f"{home}/lib/{name}" for name in os.listdir(f"{directory}{home}/lib") if name != "chandler"),
    ]:
        shutil.rmtree(directory + removed, ignore_errors=True)


def replace(path: str, old: str, new: str) -> None:
    """Replaces a text in a file that is no link.  Exits when the text is missing."""
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
    """Copies the standard library and the shared libraries that it needs to `target`, which is `home` on a node."""
    library = sysconfig.get_path("stdlib")
    inside = f"{target}/lib/{os.path.basename(library)}"
    for path in files(library):
        place(path, inside + path[len(library) :])
    os.makedirs(f"{target}/bin")
    copy_libraries([interpreter, *(path for path in files(inside) if path.endswith(".so"))], target)
    compile_all(inside, f"{home}{inside[len(target) :]}")


def copy_packages(modules: dict[str, str], code: str, home: str, python: str) -> None:
    """Copies the packages beside Chandler's own.

    Its programs look there first, whichever site directories the interpreter has.
    """
    for name, source in modules.items():
        destination = f"{code}/{name.replace('.', '/')}"
        for path in [source] if os.path.isfile(source) else files(source):
            place(
                path,
                os.path.dirname(destination) + "/" + os.path.basename(path)
                if path == source
                else destination + path[len(source) :],
            )
        if os.path.isdir(destination):
            compile_all(destination, f"{home}/{name.replace('.', '/')}")
    copy_libraries([path for path in files(code) if path.endswith(".so")], python)


def compile_all(directory: str, home: str) -> None:
    """Compiles a directory to byte code that names `home`, its path on a node."""
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


def copy_libraries(programs: list[str], target: str) -> None:
    """Copies the shared libraries that programs need to `target`/lib."""
    for program in programs:
        for name, path in libraries(program):
            if not os.path.exists(f"{target}/lib/{name}"):
                place(path, f"{target}/lib/{name}")


def libraries(program: str) -> Iterator[tuple[str, str]]:
    """Name and path of each shared library that a program needs, as ldd(1) prints them."""
    output = subprocess.run(
        ["ldd", program], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    ).stdout
    if "not found" in output:
        sys.exit(
            f"build.py: {program}: {' '.join(line.strip() for line in output.splitlines() if 'not found' in line)}"
        )
    for name, path in _LIBRARY.findall(output):
        yield os.path.basename(name or path), path


def loader(program: str) -> str:
    """The name of the program's dynamic loader."""
    return next(name for name, _ in libraries(program) if name.startswith("ld-"))


def place(source: str, target: str) -> None:
    """Copies a file, and creates its directory."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(source, target)
    os.chmod(target, 0o755 if os.access(source, os.X_OK) or target.endswith(".so") else 0o644)


def surroundings(directory: str, python: str) -> None:
    """Makes the directories and links that a container needs, and copies the installer.

    The pod of the NRI plugin mounts the node's /usr and /run, and the links lead there.
    """
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
