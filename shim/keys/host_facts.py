"""What the rarer keys of a request ask of the host, of the image and of whoever calls; and the edits that come of them.

Loaded only when a request has one of these keys, or a reference to the host in a variable.  Everything that can fail
fails here, before anything is touched.
"""

from __future__ import annotations

import posix

from shim import errors
from shim.edits import DEVICE, ENV, Edits
from shim.gpu import choose, vendors
from shim.host import device_nodes, files, trust, userns
from shim.keys import settings
from shim.oci import reader
from shim.policy import classes
from shim.request.rare_keys import CAPABILITIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional, Tuple

    from shim.node.inventory import Inventory
    from shim.request.parse import Request

MAX_ACCOUNTS = 1 << 20  # bytes of /etc/passwd or /etc/group
SECONDS = 5.0  # for all secrets of a container
_LINK, _FORMAT, _DIRECTORY = 0o120000, 0o170000, 0o040000
_ACCESS = {"type", "major", "minor"}


class Facts:
    """The answers.  `root` is the container's root file system, '' when that is not known; `container` its id; `volumes`
    the directories of prepared volumes by name; `prefixes` the only places that may be mounted from, None: any; `document`
    config.json, None while there is no bundle whose image could lead targets elsewhere."""

    def __init__(
        self,
        root: str = "",
        container: str = "",
        volumes: Optional[Mapping[str, str]] = None,
        prefixes: Optional[List[str]] = None,
        document: Optional[Dict[str, Any]] = None,
    ) -> None:
        self.root = root
        self._document = document
        self._image: Any = None
        self.container = container
        self.volumes = volumes or {}
        self.prefixes = prefixes
        self._accounts: Dict[str, List[List[str]]] = {}

    # --- the image ------------------------------------------------------------------------------------------------

    def account(self, name: str) -> Tuple[int, int]:
        """uid and gid of a user of the image.  Raises HostError."""
        for entry in self._read("/etc/passwd", f"the user {name!r}"):
            if entry[0] == name and len(entry) >= 4 and _plain(entry[2]) and _plain(entry[3]):
                return int(entry[2]), int(entry[3])
        raise errors.HostError(f"the image's /etc/passwd has no user {name!r}")

    def group(self, name: str) -> int:
        """gid of a group of the image.  Raises HostError."""
        for entry in self._read("/etc/group", f"the group {name!r}"):
            if entry[0] == name and len(entry) >= 3 and _plain(entry[2]):
                return int(entry[2])
        raise errors.HostError(f"the image's /etc/group has no group {name!r}")

    def memberships(self, name: str) -> List[int]:
        """gids of the groups that list a user; none where the image has no /etc/group."""
        try:
            entries = self._read("/etc/group", "")
        except errors.HostError:
            return []
        return [
            int(entry[2]) for entry in entries if len(entry) >= 4 and _plain(entry[2]) and name in entry[3].split(",")
        ]

    def _read(self, path: str, wanted: str) -> List[List[str]]:
        """The lines of a file of the image: resolved as the container would, a FIFO or a device never opened."""
        found = self._accounts.get(path)
        if found is not None:
            return found
        if not self.root:
            raise errors.HostError(f"{wanted} is a name, and the image is not known here", "write numbers")
        from shim.host.inroot import Root, read_regular

        try:
            root = Root(self.root)
            try:
                descriptor = root.find(path)
                try:
                    data = read_regular(descriptor, MAX_ACCOUNTS)
                finally:
                    posix.close(descriptor)
            finally:
                root.close()
        except OSError as error:
            raise errors.HostError(f"{wanted} cannot be looked up: the image's {path}: {error.strerror}") from None
        text = data.decode("utf-8", "surrogateescape")
        found = self._accounts[path] = [line.split(":") for line in text.split("\n") if ":" in line]
        return found

    def target(self, path: str, source: str) -> str:
        """A path of the request inside the container, the links of the image followed.

        Raises BundleError, or PolicyError for a target in a directory that the engine mounts: whoever may write there could
        lead it elsewhere between this look and the mount.
        """
        if self._document is None:
            return path
        if not self.root:
            raise errors.BundleError(
                f"{source}: where the image leads {path} cannot be seen here: its root file system is not known"
            )
        if self._image is None:
            from shim.oci import targets

            self._image = targets.ImageRoot(self.root, self._document, exact=True)
        resolved: str = self._image.resolve(path, source)
        if self.prefixes is not None and self._image.kernel(resolved):
            raise errors.PolicyError(
                f"{source}: {path} lies in {self._image.kernel(resolved)}, which is the kernel's and cannot be mounted over"
            )
        bound = self._image.within_bind(resolved) if self.prefixes is not None else ""
        if bound:
            raise errors.PolicyError(
                f"{source}: {path} lies in {bound}, which the engine mounts, and whoever may write there could lead it "
                "elsewhere",
                "take a target outside of it",
            )
        return resolved

    def within(self, source: str, rest: str, words: str) -> None:
        """Refuses a target (`rest`) in a directory of the host's that the request mounts, too: whoever writes there can make
        a link of it at any time.  A trusted caller's is refused when it is one now.  Raises PolicyError or BundleError."""
        if self.prefixes is not None:
            raise errors.PolicyError(
                f"{words}, which the request mounts, and whoever may write there could lead it elsewhere",
                "take a target outside of it",
            )
        at = source
        for part in rest.strip("/").split("/"):
            at = f"{at}/{part}"
            try:
                if posix.lstat(at).st_mode & _FORMAT == _LINK:
                    raise errors.BundleError(f"{words}, and {at} is a link", "take a target without links")
            except OSError:
                return

    # --- the host -------------------------------------------------------------------------------------------------

    def capabilities(self) -> List[str]:
        """The capabilities that the kernel knows and this process may hand on (proc_pid_status(5): CapBnd)."""
        last, bounding = len(CAPABILITIES) - 1, -1
        try:
            last = int(_proc("/proc/sys/kernel/cap_last_cap"))  # a sysctl is read at once or not at all
        except (OSError, ValueError, errors.HostError):
            pass
        try:
            for line in _proc("/proc/self/status").split("\n"):
                if line.startswith("CapBnd:"):
                    bounding = int(line[7:], 16)
        except (OSError, ValueError):
            pass
        return [name for number, name in enumerate(CAPABILITIES) if number <= last and bounding >> number & 1]

    def device(self, path: str) -> Dict[str, Any]:
        """A device node as the host has it, for complete() to fill in.  Raises HostError."""
        kind, major, minor, mode = device_nodes.lstat_device(path)
        return {"path": path, "type": kind, "major": major, "minor": minor, "fileMode": mode}

    def bind(self, source: str) -> str:
        """A path of the host that may be mounted from.  Raises HostError, or PolicyError when the way to it could lead
        somebody out of the places that are allowed."""
        prefix = "" if self.prefixes is None else classes.below(source, self.prefixes)
        if self.prefixes is not None:
            _check_bind(source, prefix)
        if not files.exists(source):
            raise errors.HostError(f"{source} is not on this host")
        return source

    def volume(self, name: str, storage: Dict[str, Any]) -> str:
        """The directory of a prepared volume.  Raises RequestError or HostError, which name it."""
        path = self.volumes.get(name)
        if path is None:
            raise errors.RequestError(
                f"the volume {name!r} (for {storage['target']}) is not prepared",
                "give its directory in [volumes] of the configuration, or to `chandler bundle` with --volume",
            )
        try:
            found = posix.stat(path)
        except OSError as error:
            raise errors.HostError(f"the volume {name!r} is to be in {path}: {error.strerror}") from None
        if found.st_mode & _FORMAT != _DIRECTORY:
            raise errors.HostError(f"the volume {name!r} is to be in {path}, which is no directory")
        return path


def _plain(text: str) -> bool:
    return text.isdigit() and text.isascii() and len(text) < 11 and int(text) < 1 << 31


def _proc(path: str) -> str:
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return files.read_all(descriptor, 4095, 1 << 20, path).decode("ascii", "replace")
    finally:
        posix.close(descriptor)


def _check_bind(source: str, prefix: str) -> None:
    """No link on the way below an allowed prefix, and no directory on it that others than root could replace parts of:
    the runtime resolves the path once more, later."""
    owners = userns.trusted_owners(userns.user_namespace())
    rest = [part for part in source[len(prefix.rstrip("/")) :].split("/") if part]
    at = prefix
    try:
        trust.check_way(prefix if rest else prefix.rpartition("/")[0] or "/", owners)
        for number, part in enumerate(rest):
            at = f"{at.rstrip('/')}/{part}"
            found = posix.lstat(at)
            if found.st_mode & _FORMAT == _LINK:
                raise errors.PolicyError(f"{at} is a link, and a path below bind-sources must have none")
            if number < len(rest) - 1:
                trust.check_trust(at, found, owners)
    except errors.TrustError as error:
        raise errors.PolicyError(
            f"{source} is not mounted: {error.what}, who could put another path in its place"
        ) from None
    except OSError as error:
        raise errors.HostError(f"{at}: {error.strerror}") from None


def caller() -> Tuple[str, ...]:
    """Who starts the container: the uid that the host knows, and its names in the host's /etc/passwd."""
    uid = posix.geteuid()
    numbers = [int(word) for word in userns.user_namespace().split()]
    for inside, outside, count in zip(numbers[0::3], numbers[1::3], numbers[2::3]):
        if inside <= uid < inside + count:
            uid += outside - inside
            break
    names = [str(uid)]
    try:
        text = files.read("/etc/passwd", MAX_ACCOUNTS, follow=True)[0].decode("utf-8", "replace")
    except (OSError, errors.HostError):
        return tuple(names)
    return tuple(names + [line.partition(":")[0] for line in text.split("\n") if line.split(":")[2:3] == names[:1]])


# --- edits ----------------------------------------------------------------------------------------------------


def variables(wish: Request, config: Dict[str, Any], scope: str, seconds: float = SECONDS) -> Edits:
    """The request's own variables, references resolved.  Raises ChandlerError, which names the variable and no value."""
    from time import monotonic

    from shim.host import secrets

    end = monotonic() + seconds
    owners: Dict[int, str] = {}
    items = []
    for name, value in wish.env.items():
        kind, rest = value[:3], value[3:]
        try:
            if kind == "$E:":
                found = posix.environ.get(rest.encode("utf-8", "surrogateescape"))
                if found is None:
                    raise errors.HostError(
                        f"Chandler's own environment has no variable {rest!r}", "set it for the engine's service"
                    )
                value = secrets.Hidden(found.decode("utf-8", "surrogateescape"))
            elif kind == "$S:":
                owners = owners or userns.trusted_owners(userns.user_namespace())
                value = secrets.read(rest, scope, config, owners, max(end - monotonic(), 0.01))
        except errors.ChandlerError as error:
            raise error.within(f"{wish.source}: env.{name}") from None
        items.append((ENV, name, value, wish.source))
    return Edits(items)


def edits(
    wish: Request, document: Dict[str, Any], inventory: Inventory, config: Dict[str, Any], known: Mapping[str, Any]
) -> Edits:
    """The edits of the rarer keys.  `known`: what the front end knows (shim.engine.plan).  Raises ChandlerError."""
    prefixes = None if config["policy.trust"] == "all" else config["policy.bind-sources"]
    facts = Facts(
        reader.root_path(document, known.get("bundle", "")),
        known.get("id", ""),
        {**config["volumes"], **known.get("volumes", {})},
        prefixes,
        None if known.get("bundle") == "" else document,
    )
    made = settings.edits(wish.document, document, wish.source, facts)
    _check_gpus(made, inventory, wish.source)
    return made


def _check_gpus(made: Edits, inventory: Inventory, source: str) -> None:
    """A GPU is asked for as a GPU: as a bare node it would be under no count and no lease."""
    nodes = {f"{node['type']}{node['major']}:{node['minor']}": path for _, path, node, _ in made.of(DEVICE)}
    if not nodes:
        return
    for number, name in choose.numbers(
        dict.fromkeys([*inventory.kinds(), *(vendor.kind for vendor in vendors.with_gpus())]),
        inventory,
        device_nodes.look_at_gpu,
    ).items():
        if number in nodes:
            raise errors.RequestError(
                f"{source}: devices: {nodes[number]} belongs to {name}", "ask for it in resources.gpu"
            )
