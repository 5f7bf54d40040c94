"""`chandler configure --verify`: starts a container through the engine, to see that its request arrives.

The container has nothing but the host's own /bin, /lib and /usr, mounted read-only, so that neither an image nor a
registry is needed.  Its request is for a variable with a random value, which it prints.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import tempfile
from typing import Callable, List, Tuple

from shim.configure import cri
from shim.errors import HostError

PATIENCE = 120.0  # seconds for one call of an engine
VARIABLE = "CHANDLER_VERIFY"
_HOST = ("bin", "sbin", "lib", "lib32", "lib64", "usr", "nix")
_SAY = ("/bin/sh", "-c", f'echo "got=${VARIABLE}"')

Find = Callable[[str], str]


def verify(engine: str, handler: str, address: str, prefix: str, find: Find) -> str:
    """Returns one sentence about the success.  Raises HostError, with the engine's own message."""
    token = os.urandom(8).hex()
    annotation = f"{prefix}env.{VARIABLE}", token  # no quotes in it: podman reads an annotation as CSV
    try:
        if engine == "podman":
            got = _podman(handler, annotation, find)
        elif engine == "docker":
            got = _docker(handler, annotation, address, find)
        else:
            got = cri.ask(engine, handler, address, annotation, mounts(), VARIABLE)
    except HostError as error:
        if f"annotation {annotation[0]}: " not in error.what:  # as our own refusals begin
            raise
        return f"verified: the request of a container of {engine}'s handler {handler} arrived, and was refused: {error.what}"
    if got != token:
        raise HostError(
            f"a container of the handler {handler} started, and its request did not arrive",
            f"`chandler doctor`; does {engine} know its new configuration (--restart)?",
        )
    return f"verified: a container of {engine}'s handler {handler} got what it asked for"


def mounts() -> List[Tuple[str, str]]:
    """The mounts of the host's programs: path in the container, and real path on the host."""
    return [(f"/{name}", os.path.realpath(f"/{name}")) for name in _HOST if os.path.isdir(f"/{name}")]


def _podman(handler: str, annotation: Tuple[str, str], find: Find) -> str:
    podman = _program("podman", find)
    with tempfile.TemporaryDirectory(prefix="chandler-verify-") as directory:
        os.chmod(directory, 0o755)
        return _got(_call([podman, "run", *_options(handler, annotation), "--rootfs", directory, *_SAY]))


def _docker(handler: str, annotation: Tuple[str, str], address: str, find: Find) -> str:
    docker = [_program("docker", find), *(["--host", f"unix://{address.replace('unix://', '', 1)}"] if address else [])]
    image = f"chandler-verify:{os.urandom(8).hex()}"
    _call([*docker, "import", "-", image], _empty())
    try:
        return _got(_call([*docker, "run", *_options(handler, annotation), image, *_SAY]))
    finally:
        try:
            _call([*docker, "rmi", "--force", image])
        except HostError:
            pass  # what is wrong is said already


def _options(handler: str, annotation: Tuple[str, str]) -> List[str]:
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


def _empty() -> bytes:
    """The tar archive of an image that has only an empty /proc."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        made = tarfile.TarInfo("proc")
        made.type, made.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(made)
    return buffer.getvalue()


def _program(name: str, find: Find) -> str:
    path = find(name)
    if not path:
        raise HostError(
            f"{name}, which --verify starts a container with, is not installed",
            f"install {name}, or --programs DIR where it is",
        )
    return path


def _call(command: List[str], given: bytes = b"") -> str:
    words = f"{os.path.basename(command[0])} {next(word for word in command[1:] if word in ('run', 'import', 'rmi'))}"
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"`{words}` failed: {error}", "see whether the engine runs") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).decode("utf-8", "replace").split())
        raise HostError(
            f"`{words}` failed, and it said: {said[-600:]}", "does the engine know its new configuration (--restart)?"
        )
    return done.stdout.decode("utf-8", "replace")


def _got(said: str) -> str:
    return next((line.partition("=")[2] for line in said.splitlines() if line.startswith("got=")), "")
