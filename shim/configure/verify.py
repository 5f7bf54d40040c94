"""`chandler configure --verify`: starts a container through the engine, and checks that its request reaches Chandler.

The container sees only the host's own /bin, /lib and /usr, mounted read-only, so it needs neither an image nor a
registry.  It requests a variable with a random value and prints the variable.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from typing import Callable

from shim.configure import cri
from shim.errors import HostError

PATIENCE = 120.0  # seconds for one call of an engine
VARIABLE = "CHANDLER_VERIFY"
_HOST_DIRECTORIES = ("bin", "sbin", "lib", "lib32", "lib64", "usr", "nix")
_PRINT_VARIABLE = ("/bin/sh", "-c", f'echo "got=${VARIABLE}"')

Find = Callable[[str], str]


def verify(engine: str, handler: str, address: str, prefix: str, find: Find) -> str:
    """Returns one sentence that says what was verified.  Raises HostError, with the engine's own message.

    `prefix` is the annotation prefix of Chandler's configuration.  `find` returns the path of a program, or "".
    """
    token = os.urandom(8).hex()
    annotation = f"{prefix}env.{VARIABLE}", token  # no quotes in it: podman reads an annotation as CSV
    try:
        if engine == "podman":
            value = _podman(handler, annotation, find)
        elif engine == "docker":
            value = _docker(handler, annotation, address, find)
        else:
            value = cri.ask(engine, handler, address, annotation, mounts(), VARIABLE)
    except HostError as error:
        if f"annotation {annotation[0]}: " not in error.what:  # Chandler's own refusals begin like this
            raise
        # a refusal of Chandler's proves, too, that the request arrived
        return (
            f"verified: the request of a container of {engine}'s handler {handler} arrived, and was refused: "
            f"{error.what}"
        )
    if value != token:
        raise HostError(
            f"a container of the handler {handler} started, but its request did not reach Chandler",
            f"run `chandler doctor`; does {engine} know its new configuration (--restart)?",
        )
    return f"verified: a container of {engine}'s handler {handler} got what it asked for"


def mounts() -> list[tuple[str, str]]:
    """The mounts of the host's programs: path in the container, and real path on the host."""
    return [(f"/{name}", os.path.realpath(f"/{name}")) for name in _HOST_DIRECTORIES if os.path.isdir(f"/{name}")]


def _podman(handler: str, annotation: tuple[str, str], find: Find) -> str:
    podman = _program("podman", find)
    with tempfile.TemporaryDirectory(prefix="chandler-verify-") as directory:
        os.chmod(directory, 0o755)
        return _printed_value(
            _call([podman, "run", *_options(handler, annotation), "--rootfs", directory, *_PRINT_VARIABLE])
        )


def _docker(handler: str, annotation: tuple[str, str], address: str, find: Find) -> str:
    docker = [_program("docker", find), *(["--host", f"unix://{address.replace('unix://', '', 1)}"] if address else [])]
    image = f"chandler-verify:{os.urandom(8).hex()}"
    _call([*docker, "import", "-", image], _empty_image())
    try:
        return _printed_value(_call([*docker, "run", *_options(handler, annotation), image, *_PRINT_VARIABLE]))
    finally:
        try:
            _call([*docker, "rmi", "--force", image])
        except HostError:
            pass  # the image stays; the failure of `run`, if any, is the one to report


def _options(handler: str, annotation: tuple[str, str]) -> list[str]:
    volumes = [word for inside, outside in mounts() for word in ("--volume", f"{outside}:{inside}:ro")]
    return [
        "--rm",
        "--runtime",
        handler,
        "--network",
        "none",
        "--security-opt",
        "label=disable",
        "--annotation",
        "=".join(annotation),
        *volumes,
    ]


def _empty_image() -> bytes:
    """The tar archive of an image that has only an empty /proc."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("proc")
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)
    return buffer.getvalue()


def _program(name: str, find: Find) -> str:
    path = find(name)
    if not path:
        raise HostError(
            f"{name} is not installed, and --verify starts its container with it",
            f"install {name}, or name its directory with --programs DIR",
        )
    return path


def _call(command: list[str], stdin: bytes = b"") -> str:
    shown = f"{os.path.basename(command[0])} {next(word for word in command[1:] if word in ('run', 'import', 'rmi'))}"
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"`{shown}` failed: {error}", "see whether the engine runs") from None
    if done.returncode:
        output = " ".join((done.stderr or done.stdout).decode("utf-8", "replace").split())
        raise HostError(
            f"`{shown}` failed, and it said: {output[-600:]}", "does the engine know its new configuration (--restart)?"
        )
    return done.stdout.decode("utf-8", "replace")


def _printed_value(output: str) -> str:
    return next((line.partition("=")[2] for line in output.splitlines() if line.startswith("got=")), "")
