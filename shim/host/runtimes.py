"""The low-level runtimes: where their binaries and their state directories are, and which one serves a container.

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
    from typing import Dict, List, Tuple

    from shim.shapes import Config

KINDS = ("runc", "youki", "crun")
# (file, kind): a container's state directory with this file belongs to a runtime of this kind.  The first match counts.
STATE_FILES = (("status", "crun"), ("youki_config.json", "youki"), ("state.json", "runc"))


def kind_of(path: str) -> str:
    """The kind of a runtime from its file name; runc for a name that we do not know."""
    name = path.rpartition("/")[2]
    for kind in ("crun", "youki"):
        if kind in name:
            return kind
    return "runc"


def can_map_owners(kind: str) -> bool:
    """Whether a runtime starts containers with idmapped mounts: youki (0.7) refuses them."""
    return kind != "youki"


def find(name: str, owners: Dict[int, str]) -> Tuple[str, str]:
    """(kind, absolute path) of the runtime `name`, a name or an absolute path.

    Raises HostError when it is not installed, TrustError when somebody else could have written it.
    """
    candidates = [name] if name.startswith("/") else [f"{directory}/{name}" for directory in paths.BINARY_DIRS]
    for path in candidates:
        if posix.access(path, posix.X_OK):
            try:
                if trust.check_path(path, owners)[-1][1].st_mode & 0o170000 != 0o100000:
                    continue
            except errors.TrustError as error:
                raise errors.TrustError(f"the runtime {path} is not used: {error.what}", error.todo) from None
            return kind_of(path), path
    raise errors.HostError(f"the runtime {name} is not installed")


def fixed_kind(program: str) -> str:
    """The kind in the name by which Chandler was called (crun for a link chandler-crun), or ''."""
    name = program.rpartition("/")[2]
    kind = name[len("chandler-") :] if name.startswith("chandler-") else ""
    return kind if kind in KINDS else ""


def for_create(config: Config, program: str, owners: Dict[int, str]) -> Tuple[str, str]:
    """(kind, path) of the runtime for a new container: the first of the configuration that is installed.

    `program`: the name by which Chandler was called; a link such as chandler-crun limits the choice to its kind.
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
    """The directory of a runtime's container state when no --root is given.

    Only crun reads XDG_RUNTIME_DIR when it runs as root, too.
    """
    runtime = environment.get(b"XDG_RUNTIME_DIR", b"").decode("utf-8", "surrogateescape")
    return f"{runtime}/{kind}" if runtime and (rootless or kind == "crun") else f"/run/{kind}"


def state_root(given: str, kind: str, rootless: bool, environment: Dict[bytes, bytes], bundle: str = "") -> str:
    """The runtime's root as leases and grants name it: absolute, without links, `.` and `..`.

    So one container has one name, however --root was spelled.
    `given`: the value of --root, '' for none.  A relative one counts from the working directory, but with crun's create
    from the bundle, since crun changes to it first.  `bundle`: the bundle, '' for a crun command without one.
    runc removes `..` from the text before it follows links (Go's filepath.Abs); the others leave it to the kernel.
    """
    root = given or default_root(kind, rootless, environment)
    if not root.startswith("/"):
        start = bundle if kind == "crun" else ""
        root = f"{start if start.startswith('/') else f'{posix.getcwd()}/{start}'}/{root}"
    return resolved(clean(root) if kind == "runc" else root)


def resolved(path: str) -> str:
    """An absolute path with all links resolved by the kernel.  Names at its end that do not exist stay as they are."""
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


def kind_of_container(root: str, containers: List[str], rootless: bool, environment: Dict[bytes, bytes]) -> str:
    """The kind of the runtime that has a state directory for one of `containers`, or ''.

    The first container that any runtime has decides.  `root`: the runtimes' root, '' for each runtime's default.
    """
    for container in containers:
        for name, kind in STATE_FILES:
            if exists(f"{root or default_root(kind, rootless, environment)}/{container}/{name}"):
                return kind
    return ""


def for_verb(names: List[str], kind: str, owners: Dict[int, str]) -> str:
    """The path of the binary for a verb on an existing container.

    `names`: the configured runtimes; `kind`: the kind of runtime that has the container, '' for any.  Tries the
    configured runtimes of the kind, then the kind's own name in paths.BINARY_DIRS, then the other configured ones.
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
    """The path of chandler-hook: the installed one, or that of the checkout."""
    return paths.HOOK if exists(paths.HOOK) else sys.path[0] + "/packaging/bin/chandler-hook"
