"""Looks up what the rarer keys of a request need to know of the host, the image and the caller.

Loaded only when a request has one of these keys, or refers to a variable of the host or to a secret.  Everything that
can fail fails here, before anything is changed.
"""

from __future__ import annotations

import posix

from shim import errors
from shim.host import device_nodes, files, trust, userns
from shim.policy import patterns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from shim.edits import DeviceNode
    from shim.shapes import Document


MAX_ACCOUNTS = 1 << 20  # bytes of /etc/passwd or /etc/group
_LINK, _FORMAT, _DIRECTORY = 0o120000, 0o170000, 0o040000


class Facts:
    """Looks up facts for one container.

    `root`: the container's root file system, '' when it is not known.  `container`: the container's id.
    `volumes`: the directories of prepared volumes, by name.
    `prefixes`: the directories below which bind mounts may take their sources; None for a trusted caller, who may
    mount any path, and whose targets may lie below /proc, /sys and the engine's mounts.
    `document`: config.json; None while there is no bundle, so that targets cannot be resolved in the image.
    """

    def __init__(
        self,
        root: str = "",
        container: str = "",
        volumes: Mapping[str, str] | None = None,
        prefixes: list[str] | None = None,
        document: Document | None = None,
    ) -> None:
        self.root = root
        self._document = document
        self._image: Any = None
        self.container = container
        self.volumes = volumes or {}
        self.prefixes = prefixes
        self._accounts: dict[str, list[list[str]]] = {}

    # --- the image ------------------------------------------------------------------------------------------------

    def account(self, name: str) -> tuple[int, int]:
        """uid and gid of a user in the image's /etc/passwd.  Raises HostError."""
        for entry in self._read("/etc/passwd", f"the user {name!r}"):
            if entry[0] == name and len(entry) >= 4 and _is_id(entry[2]) and _is_id(entry[3]):
                return int(entry[2]), int(entry[3])
        raise errors.HostError(f"the image's /etc/passwd has no user {name!r}")

    def group(self, name: str) -> int:
        """gid of a group in the image's /etc/group.  Raises HostError."""
        for entry in self._read("/etc/group", f"the group {name!r}"):
            if entry[0] == name and len(entry) >= 3 and _is_id(entry[2]):
                return int(entry[2])
        raise errors.HostError(f"the image's /etc/group has no group {name!r}")

    def memberships(self, name: str) -> list[int]:
        """gids of the groups of the image that list a user; [] where its /etc/group cannot be read."""
        try:
            entries = self._read("/etc/group", "")
        except errors.HostError:
            return []
        return [
            int(entry[2]) for entry in entries if len(entry) >= 4 and _is_id(entry[2]) and name in entry[3].split(",")
        ]

    def _read(self, path: str, wanted: str) -> list[list[str]]:
        """The lines of a file of the image, split at colons.  `wanted`: what is looked up, for the error.

        The path is resolved as the container would resolve it.  Only a regular file is read, since to open a FIFO or a
        device can block or have effects.  Raises HostError.
        """
        entries = self._accounts.get(path)
        if entries is not None:
            return entries
        if not self.root:
            raise errors.HostError(
                f"{wanted} cannot be looked up: the container's root file system is not known", "write numbers"
            )
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
        entries = self._accounts[path] = [line.split(":") for line in text.split("\n") if ":" in line]
        return entries

    def target(self, path: str, source: str) -> str:
        """The path inside the container to which a path of the request leads when the image's links are followed.

        `source`: what the path is for, for the error.  Raises BundleError.  Raises PolicyError for a target below /proc
        or /sys, or in a directory that the engine mounts: who can write there could replace a part of the path by a
        link between this check and the mount.
        """
        if self._document is None:
            return path
        if not self.root:
            raise errors.BundleError(
                f"{source}: {path} cannot be resolved in the image: the container's root file system is not known"
            )
        if self._image is None:
            from shim.oci import targets

            self._image = targets.ImageRoot(self.root, self._document, exact=True)
        resolved: str = self._image.resolve(path, source)
        if self.prefixes is not None and self._image.kernel(resolved):
            raise errors.PolicyError(
                f"{source}: {path} lies in {self._image.kernel(resolved)}, which is the kernel's and cannot be mounted "
                "over"
            )
        bind = self._image.within_bind(resolved) if self.prefixes is not None else ""
        if bind:
            raise errors.PolicyError(
                f"{source}: {path} lies in {bind}, which the engine mounts, and whoever may write there could lead it "
                "elsewhere",
                "take a target outside of it",
            )
        return resolved

    def check_nested_target(self, source: str, rest: str, words: str) -> None:
        """Refuses a mount target that lies in another bind mount of the same request.

        `source`: the directory of the host that this other mount shows.  `rest`: the target's path in it.  `words`: the
        beginning of the error.
        Whoever can write to `source` could replace the target by a link at any time.  So this raises PolicyError, or
        for a trusted caller BundleError, and then only if there is a link now.
        """
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
                return  # the rest of the path does not exist yet, so it has no link

    # --- the host -------------------------------------------------------------------------------------------------

    def capabilities(self) -> int:
        """The capabilities that the kernel knows and this process can give to others, as bits.

        Source: proc_pid_status(5), CapBnd; capabilities(7), cap_last_cap.  A file that cannot be read removes none.
        """
        known = bounding = -1  # all bits
        try:
            known = (2 << int(_proc("/proc/sys/kernel/cap_last_cap"))) - 1
        except (OSError, ValueError, errors.HostError):
            pass
        try:
            for line in _proc("/proc/self/status").split("\n"):
                if line.startswith("CapBnd:"):
                    bounding = int(line[7:], 16)
        except (OSError, ValueError):
            pass
        return known & bounding

    def device(self, path: str) -> DeviceNode:
        """A device node as the host has it, in the form of a CDI deviceNode.  Raises HostError."""
        kind, major, minor, mode = device_nodes.lstat_device(path)
        return {"path": path, "type": kind, "major": major, "minor": minor, "fileMode": mode}

    def bind(self, source: str) -> str:
        """Checks the source of a bind mount, and gives it.

        Raises HostError when it does not exist, and PolicyError when a link, or somebody who can write to a directory
        on its path, could lead out of the allowed prefixes.
        """
        prefix = "" if self.prefixes is None else patterns.below(source, self.prefixes)
        if self.prefixes is not None:
            _check_bind(source, prefix)
        if not files.exists(source):
            raise errors.HostError(f"{source} is not on this host")
        return source

    def volume(self, name: str, storage: Document) -> str:
        """The directory of a prepared volume.  Raises RequestError or HostError, which name it."""
        path = self.volumes.get(name)
        if path is None:
            raise errors.RequestError(
                f"the volume {name!r} (for {storage['target']}) is not prepared",
                "give its directory in [volumes] of the configuration, or to `chandler bundle` with --volume",
            )
        try:
            status = posix.stat(path)
        except OSError as error:
            raise errors.HostError(f"the volume {name!r} is to be in {path}: {error.strerror}") from None
        if status.st_mode & _FORMAT != _DIRECTORY:
            raise errors.HostError(f"the volume {name!r} is to be in {path}, which is no directory")
        return path


def _is_id(text: str) -> bool:
    """Whether a text is a uid or gid below 2**31."""
    return text.isdigit() and text.isascii() and len(text) < 11 and int(text) < 1 << 31


def _proc(path: str) -> str:
    """The text of a file in /proc.  Raises OSError, or HostError when it is too large."""
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        # the first read must get all of a sysctl, since the kernel gives nothing to a second one
        return files.read_all(descriptor, 4095, 1 << 20, path).decode("ascii", "replace")
    finally:
        posix.close(descriptor)


def _check_bind(source: str, prefix: str) -> None:
    """Refuses a path below an allowed prefix that has a link, or a directory in which somebody else can replace parts.

    The runtime resolves the path once more when it mounts, so what this check sees must not change until then.
    """
    owners = userns.trusted_owners(userns.user_namespace())
    rest = [part for part in source[len(prefix.rstrip("/")) :].split("/") if part]
    at = prefix
    try:
        trust.check_path(prefix if rest else prefix.rpartition("/")[0] or "/", owners)
        for number, part in enumerate(rest):
            at = f"{at.rstrip('/')}/{part}"
            status = posix.lstat(at)
            if status.st_mode & _FORMAT == _LINK:
                raise errors.PolicyError(f"{at} is a link, and a path below bind-sources must have none")
            if number < len(rest) - 1:
                trust.check_trust(at, status, owners)
    except errors.TrustError as error:
        raise errors.PolicyError(
            f"{source} is not mounted: {error.what}, who could put another path in its place"
        ) from None
    except OSError as error:
        raise errors.HostError(f"{at}: {error.strerror}") from None


def caller() -> tuple[str, ...]:
    """Who starts the container: the uid outside of the user namespace, and its names in the host's /etc/passwd."""
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
