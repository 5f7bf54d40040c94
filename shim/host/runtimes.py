"""The low-level runtimes: where their binaries are, which one serves a container, and the exec.

Part of the create path.
"""

from __future__ import annotations

import posix
import sys

from shim import errors, paths
from shim.host import trust
from shim.host.files import exists
from shim.pathtext import clean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Tuple

KINDS = ("runc", "youki", "crun")
# The file by which a container's state directory tells whose it is, in the order to look for them.
STATE_FILES = (("status", "crun"), ("youki_config.json", "youki"), ("state.json", "runc"))


def kind_of(path: str) -> str:
    """The kind of a runtime from its file name; one that we do not know is taken to be like runc."""
    name = path.rpartition("/")[2]
    for kind in ("crun", "youki"):
        if kind in name:
            return kind
    return "runc"


def can_map_owners(kind: str) -> bool:
    """Whether a runtime starts containers that have idmapped mounts: youki (0.7) refuses them."""
    return kind != "youki"


def find(name: str, owners: Dict[int, str]) -> Tuple[str, str]:
    """(kind, absolute path) of the runtime `name`, a name or an absolute path.

    Raises HostError when it is not there, TrustError when somebody else could have written it.
    """
    candidates = [name] if name.startswith("/") else [f"{directory}/{name}" for directory in paths.BINARY_DIRS]
    for path in candidates:
        if posix.access(path, posix.X_OK):
            try:
                if trust.check_way(path, owners)[-1][1].st_mode & 0o170000 != 0o100000:
                    continue
            except errors.TrustError as error:
                raise errors.TrustError(f"the runtime {path} is not used: {error.what}", error.todo) from None
            return kind_of(path), path
    raise errors.HostError(f"the runtime {name} is not installed")


def fixed_kind(program: str) -> str:
    """The kind that a link's name asks for (chandler-crun), or ''."""
    name = program.rpartition("/")[2]
    kind = name[len("chandler-") :] if name.startswith("chandler-") else ""
    return kind if kind in KINDS else ""


def for_create(config: Dict[str, Any], program: str, owners: Dict[int, str]) -> Tuple[str, str]:
    """(kind, path) of the runtime for a new container: the link's, or the first of the configuration that is there.

    Raises HostError or TrustError.
    """
    fixed = fixed_kind(program)
    names: List[str] = config["runtimes"]
    if fixed:
        names = [name for name in names if kind_of(name) == fixed] or [fixed]
    for name in names:
        try:
            return find(name, owners)
        except errors.HostError:
            continue
    raise errors.HostError(
        f"no runtime is installed: looked for {', '.join(names)}",
        "install runc, crun or youki, or set runtimes in the configuration",
    )


def default_root(kind: str, rootless: bool, environment: Dict[bytes, bytes]) -> str:
    """Where a runtime keeps its containers' state when no --root is given (crun asks the environment as root, too)."""
    runtime = environment.get(b"XDG_RUNTIME_DIR", b"").decode("utf-8", "surrogateescape")
    return f"{runtime}/{kind}" if runtime and (rootless or kind == "crun") else f"/run/{kind}"


def state_root(given: str, kind: str, rootless: bool, environment: Dict[bytes, bytes], bundle: str = "") -> str:
    """The root as leases and grants name it, however --root was spelled: absolute, without links, `.` and `..`.

    `given`: the value of --root, '' for none; a relative one counts from the working directory, and with crun's
    create from the bundle, where it goes first (`bundle`, '' where crun is called without one).  runc takes `..` out
    of the text before it looks at any link (Go's filepath.Abs), the others leave it to the kernel.
    """
    root = given or default_root(kind, rootless, environment)
    if not root.startswith("/"):
        start = bundle if kind == "crun" else ""
        root = f"{start if start.startswith('/') else f'{posix.getcwd()}/{start}'}/{root}"
    return resolved(clean(root) if kind == "runc" else root)


def resolved(path: str) -> str:
    """An absolute path as the kernel resolves it; names at its end that are not there yet stay as they are."""
    try:
        descriptor = posix.open(path, posix.O_PATH | posix.O_CLOEXEC)
    except OSError:
        above, _, name = path.rstrip("/").rpartition("/")
        if not name:
            return "/"
        above = resolved(above or "/")
        return clean(f"{above}/{name}")
    try:
        return posix.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return clean(path)
    finally:
        posix.close(descriptor)


def owner(root: str, containers: List[str], rootless: bool, environment: Dict[bytes, bytes]) -> str:
    """The kind of runtime that has the first of `containers` that any has, from its state directory, or ''."""
    for container in containers:
        for name, kind in STATE_FILES:
            if exists(f"{root or default_root(kind, rootless, environment)}/{container}/{name}"):
                return kind
    return ""


def for_verb(names: List[str], kind: str, owners: Dict[int, str]) -> str:
    """The binary for a verb on a container of one kind ('' for any): configured, or else found in the fixed places.

    Raises HostError or TrustError.
    """
    if kind:
        names = [name for name in names if kind_of(name) == kind] + [kind] + names
    for name in names:
        try:
            return find(name, owners)[1]
        except errors.HostError:
            continue
    raise errors.HostError(f"no runtime is installed: looked for {', '.join(names)}", "install runc, crun or youki")


def hook_program() -> str:
    """chandler-hook: the installed one, or in a checkout its own."""
    return paths.HOOK if exists(paths.HOOK) else sys.path[0] + "/packaging/bin/chandler-hook"
