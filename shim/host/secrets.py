"""Reads the values of secrets (`$S:name`) from a directory with one file per secret, or from a command.

A scope (the namespace of a pod, the name of a deployment) separates the secrets of one from those of another.  It
replaces {scope} in the configuration; where {scope} is used, a container without a scope gets no secret.
No error contains a value.
"""

from __future__ import annotations

from shim import errors, paths
from shim.host import trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.shapes import Config

MAX_SECRET = 64 << 10  # bytes
SCOPE, NAME = "{scope}", "{name}"
HIDDEN = "***"
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


class Hidden(str):
    """A text whose repr is HIDDEN, so that it is not shown: a secret's value, or a variable of the host."""

    __slots__ = ()

    def __repr__(self) -> str:
        return HIDDEN


def check_name(name: str) -> None:
    """Raises RequestError for a text that cannot be the name of a secret."""
    if not name or len(name) > 255 or set(name) - _PLAIN or name.startswith(".") or name.startswith("-"):
        raise errors.RequestError(
            f"{name!r} is no name of a secret", "write $S: and letters, digits, dots, hyphens, underscores"
        )


def read(name: str, scope: str, config: Config, owners: dict[int, str], seconds: float) -> Hidden:
    """The value of a secret, without the newline at its end.

    `owners`: the uids that may own the file or the command; `seconds`: the time limit of the command.
    Raises RequestError, HostError or TrustError.
    """
    check_name(name)
    directory, command = config["secrets.directory"], config["secrets.command"]
    if not directory and not command:
        raise errors.HostError(
            f"the secret {name} cannot be read: this node has no provider of secrets",
            "set directory or command in [secrets] of the configuration",
        )
    if SCOPE in directory or any(SCOPE in word for word in command):
        if not scope:
            raise errors.HostError(
                f"the secret {name} cannot be read: {SCOPE}, the container's namespace, is not certain",
                "list the engine in `engines` of the configuration, if its annotations name namespaces",
            )
        check_name(scope)
    if directory:
        data = _from_directory(directory.replace(SCOPE, scope), name, owners)
    else:
        data = _from_command(
            [word.replace(SCOPE, scope).replace(NAME, name) for word in command], name, owners, seconds
        )
    data = data[:-1] if data.endswith(b"\n") else data
    if b"\0" in data:
        raise errors.HostError(f"the secret {name} holds a NUL, which no variable can")
    try:
        return Hidden(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise errors.HostError(f"the secret {name} is not UTF-8, which config.json must be") from None


def _from_directory(directory: str, name: str, owners: dict[int, str]) -> bytes:
    path = f"{directory.rstrip('/')}/{name}"
    try:
        return trust.read_trusted(path, MAX_SECRET, owners)
    except FileNotFoundError:
        raise errors.HostError(f"the secret {name} is not there (looked for {path})") from None
    except OSError as error:
        raise errors.HostError(f"the secret {name} cannot be read ({path}: {error.strerror})") from None


def _from_command(command: list[str], name: str, owners: dict[int, str], seconds: float) -> bytes:
    """The standard output of the command.  Its standard error is dropped, since it could contain the value."""
    import subprocess

    if NAME not in " ".join(command) and name not in command:
        command = [*command, name]
    program = command[0]
    try:
        trust.check_path(program, owners)
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
            cwd="/",
            env={"PATH": paths.SAFE_PATH},
        )
    except subprocess.TimeoutExpired:
        raise errors.HostError(
            f"the secret {name} cannot be read: {program} took more than {seconds:g} seconds"
        ) from None
    except OSError as error:
        raise errors.HostError(
            f"the secret {name} cannot be read: {program} cannot be started ({error.strerror})"
        ) from None
    if done.returncode:
        raise errors.HostError(f"the secret {name} cannot be read: {program} ended with status {done.returncode}")
    if len(done.stdout) > MAX_SECRET:
        raise errors.HostError(f"the secret {name} has more than {MAX_SECRET} bytes")
    return done.stdout
