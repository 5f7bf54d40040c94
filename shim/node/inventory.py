"""The compiled inventory: configuration and CDI devices in a form that a create reads without parsing the sources.

The inventory is a directory in the state directory.  It has an index (`index`), and one part for each CDI kind and each
CDI file.  The index lists the sources that it was made from, with what stat said of each.  `load` calls stat again, and
uses the index only when nothing has changed.  A create reads only the parts that it needs.  If any of this is lost or
damaged, the compiler parses the sources again: that costs time, never correctness.
Part of the create path: the files are lines of text that need no parser, below a header line with their checksum.

    index, block 0  key (versions of Chandler and Python, effective uid, user namespace, configuration path);
                    configuration as JSON; whether there are problems
           block 1  directories on the way to a source, and watched paths in /sys and /proc; what lstat says of owner
                    and identity
           block 2  files, listed directories, and links on the way to them; what lstat says, times included
           block 3  paths that do not exist
           block 4  one line per kind: the name of its part, and of the neighbours part if it has one
    kind, line 0    one name of each of its physical devices, in order
          others    one line per device: name, part of its CDI file, its physical devices
    neighbours      one line per physical device, in order (shim.generate.topology)
    CDI file        path, edits and devices, as marshal writes them: read four times as fast as JSON
"""

from __future__ import annotations

import marshal
import posix
import sys
from zlib import crc32

from shim import errors, jsontext, paths
from shim.errors import ChandlerError
from shim.host import files, trust, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Iterable, List, NoReturn, Optional, Tuple, TypedDict

    from shim.edits import Edit
    from shim.shapes import Config

    SegmentEdit = Tuple[str, Any, Any]  # an edit without its origin

    class Segment(TypedDict):
        """The part of one CDI file."""

        path: str
        edits: List[SegmentEdit]  # for each of its devices
        devices: Dict[str, List[SegmentEdit]]

    DeviceEdits = Tuple[str, Tuple[Edit, ...], Tuple[Edit, ...]]

MAGIC = "chandler-inventory 3 "
MAX_INDEX = 64 << 20  # bytes
MAX_PART = 64 << 20


class Inventory:
    """The configuration (`config`) and the CDI devices.

    `kinds`: block 4 of the index between newlines; `part`: gives the bytes of a part by its name; `explain`: called
    with device names that are missing, raises a CdiError with the reasons; `problems`: whether CDI files have errors
    or conflict.
    """

    __slots__ = ("config", "problems", "_kinds", "_part", "_explain", "_parts", "_segments", "_looked_up")

    def __init__(
        self,
        config: Config,
        kinds: str,
        part: Callable[[str], bytes],
        explain: Callable[[List[str]], NoReturn],
        problems: bool,
    ) -> None:
        self.config = config
        self.problems = problems  # whether a CDI file or directory could not be used, or two of them conflict
        self._kinds = kinds
        self._part = part
        self._explain = explain
        self._parts: Dict[str, str] = {}
        self._segments: Dict[str, Tuple[Segment, Tuple[Edit, ...]]] = {}
        self._looked_up: Dict[str, DeviceEdits] = {}

    def kinds(self) -> List[str]:
        """The kinds that have devices."""
        return [line.partition("\t")[0] for line in self._kinds.split("\n") if line]

    def picks(self, kind: str) -> List[str]:
        """One name of each physical device of a kind, in the order in which a count takes them."""
        return self._devices(kind).partition("\n")[0].split()

    def names(self, kind: str, key: str) -> List[str]:
        """All names of one physical device."""
        lines = [line.split("\t") for line in self._devices(kind).split("\n")[1:]]
        return [words[0] for words in lines if words[2:] == [key]]

    def key(self, name: str) -> List[str]:
        """The physical devices behind a qualified name; the name itself when it is unknown."""
        kind, _, device = name.partition("=")
        line = _line(self._devices(kind), device)
        return line.split("\t")[1:] if line else [name]

    def lookup(self, name: str) -> Optional[DeviceEdits]:
        """(name of its file's part, the edits for all devices of the file, the device's edits) of a qualified name.

        None when the name is unknown.
        """
        cached = self._looked_up.get(name)
        if cached is not None:
            return cached
        kind, _, device = name.partition("=")
        line = _line(self._devices(kind), device)
        if not line:
            return None
        part = line.partition("\t")[0]
        opened = self._segments.get(part)
        if opened is None:
            segment: Segment = marshal.loads(self._part(part))
            opened = self._segments[part] = segment, _edits(segment["edits"], segment["path"])
        segment, common = opened
        device_edits = _edits(segment["devices"][device], f"{segment['path']} {name}")
        result = self._looked_up[name] = part, common, device_edits
        return result

    def explain_missing(self, names: List[str]) -> NoReturn:
        """Raises a CdiError that says why these devices cannot be resolved."""
        self._explain(names)

    def _devices(self, kind: str) -> str:
        """The text of the part of a kind, '' when there is none."""
        text = self._parts.get(kind)
        if text is None:
            name = _line(self._kinds, kind).partition("\t")[0]
            text = self._parts[kind] = _text(self._part(name)) if name else ""
        return text

    def near(self, kind: str) -> str:
        """The neighbours part of a kind, a line for each of its picks; '' when there is none."""
        name = _line(self._kinds, kind).partition("\t")[2]
        return _text(self._part(name)) if name else ""


def _edits(compiled: List[SegmentEdit], origin: str) -> Tuple[Edit, ...]:
    return tuple([(kind, key, value, origin) for kind, key, value in compiled])


def _line(text: str, key: str) -> str:
    """What follows `key` and a tab on its line, or ''."""
    start = text.find(f"\n{key}\t")
    if start < 0 or "\n" in key or "\t" in key:
        return ""
    start += len(key) + 2
    return text[start : text.find("\n", start)]


# --- where the inventory is -----------------------------------------------------------------------------------


class Account:
    """The paths that belong to one caller and one configuration file.

    `config_path`: the configuration; `state_dir`: the state directory, '' when there is none; `directory`: the
    inventory's directory in it; `key`: what must be the same for a stored inventory to be ours; `owners`: the uids
    whose files are trusted, with their names.
    """

    __slots__ = ("config_path", "state_dir", "directory", "key", "owners", "rootless", "euid", "_checked", "_without")

    def __init__(self, environment: Dict[bytes, bytes]) -> None:
        namespace = userns.user_namespace()
        self._checked = ""  # the state directory, once a check has found that nobody else can write to it
        self._without = ""  # why there is no state directory
        self.euid = posix.geteuid()
        self.rootless = self.euid != 0 or namespace != userns.INITIAL_NAMESPACE
        self.owners = userns.trusted_owners(namespace)
        named = environment.get(b"CHANDLER_CONFIG", b"")
        self.config_path = named.decode("utf-8", "surrogateescape") or paths.CONFIG_DIR + "/config.toml"
        self.state_dir = paths.STATE_DIR if not self.rootless else self._own_state_dir(environment, namespace)
        self.key = f"{paths.VERSION} {sys.hexversion} {self.euid} {namespace} {self.config_path}"
        number = crc32(self.key.encode("utf-8", "surrogateescape"))
        self.directory = f"{self.state_dir}/inventory/{number:08x}"

    def _own_state_dir(self, environment: Dict[bytes, bytes], namespace: str) -> str:
        """$XDG_RUNTIME_DIR/chandler, or /run/user/UID/chandler; '' when others can write to both directories.

        Only root can make directories in /run/user.  /tmp is never used, since another user could make the directory
        first.
        """
        named = environment.get(b"XDG_RUNTIME_DIR", b"").decode("utf-8", "surrogateescape")
        default = f"/run/user/{userns.outer_uid(self.euid, namespace)}"
        for runtime in (named, default):
            if runtime.startswith("/") and self.private(runtime):
                return runtime + "/chandler"
        self._without = (
            f"{named}, which XDG_RUNTIME_DIR names, {self._unfit(named)}" if named else "XDG_RUNTIME_DIR is not set"
        )
        if default != named:
            self._without += f", and {default} {self._unfit(default)}"
        return ""

    def _unfit(self, path: str) -> str:
        """Why a path is not that of a directory where the caller alone may write."""
        if not path.startswith("/"):
            return "is no absolute path"
        try:
            status = posix.lstat(path)
        except FileNotFoundError:
            return "is not there"
        except (OSError, ValueError) as error:
            return f"cannot be looked at ({getattr(error, 'strerror', error)})"
        if status.st_mode & 0o170000 != 0o040000:
            return "is not a directory"
        if status.st_uid != self.euid:
            return f"belongs to uid {status.st_uid}, not to the caller (uid {self.euid})"
        return f"can be written by others (mode {status.st_mode & 0o7777:04o})"

    def trusted_state_dir(self, configured: str = "") -> str:
        """The state directory, `configured` or the caller's default, after a check that nobody else can write to it.

        To be called before anything in it is read or made.  Raises TrustError or HostError.
        """
        path = configured or self.state_dir
        if path and path == self._checked:
            return path
        if not path:
            raise errors.HostError(
                f"leases and records need a directory that is the caller's alone: {self._without}",
                "set XDG_RUNTIME_DIR to a directory of your own with mode 0700, the one that the engine has (podman "
                "without a session: /tmp/podman-run-UID)",
            )
        try:
            trust.check_own_directory(path, self.owners)
        except errors.TrustError as error:
            raise errors.TrustError(f"the state directory {path} is not used: {error.what}", error.todo) from None
        return path

    def check_inventory(self) -> None:
        """Checks that nobody else can write to the inventory's directory.  Raises TrustError or OSError."""
        trust.check_path(self.directory, self.owners)
        if self.directory.startswith(self.state_dir + "/"):
            self._checked = self.state_dir  # its path was checked as a part of the inventory's

    def private(self, path: str) -> bool:
        """Whether `path` is a directory that belongs to the caller and that nobody else may write to."""
        try:
            status = posix.lstat(path)
        except OSError:
            return False
        return status.st_mode & 0o170000 == 0o040000 and status.st_uid == self.euid and not status.st_mode & 0o022


# --- reading --------------------------------------------------------------------------------------------------


class Stale(Exception):
    """The stored inventory cannot be used: it is missing or damaged, belongs to somebody else, or a source changed."""


def identities(names: Iterable[str]) -> List[Tuple[int, ...]]:
    """What must stay the same about the directories on the way to a source: their times may change.  Raises OSError."""
    return [(status.st_dev, status.st_ino, status.st_uid, status.st_mode) for status in map(posix.lstat, names)]


def fingerprints(names: Iterable[str]) -> List[Tuple[int, ...]]:
    """What must stay the same about sources.  Raises OSError.

    The ctime is part of it, since `cp -p` keeps the mtime of the file that it copies.
    """
    return [
        (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_uid, stat.st_mode)
        for stat in map(posix.lstat, names)
    ]


def load(account: Account, explain: Callable[[List[str]], NoReturn]) -> Inventory:
    """The stored inventory, if it is ours and no source has changed since; otherwise raises Stale."""
    if not account.state_dir:
        raise Stale
    try:
        account.check_inventory()
        text = _text(checked(trust.read_own(account.directory + "/index", MAX_INDEX)))
        header, ways, sources, absent, kinds = text.split("\n\n")
        key, config, problems = header.split("\n")
        if key != account.key or not _unchanged(ways, identities) or not _unchanged(sources, fingerprints):
            raise Stale
        for path in absent.split("\n"):
            if path and files.exists(path):
                raise Stale
        return Inventory(
            jsontext.loads(config.encode()),
            f"\n{kinds}\n",
            lambda name: read_part(account.directory, name),
            explain,
            problems == "problems",
        )
    except (OSError, ValueError, ChandlerError):
        raise Stale from None


def checked(data: bytes) -> bytes:
    """The bytes after the header line, if the checksum in the header is theirs; otherwise raises Stale."""
    header, _, body = data.partition(b"\n")
    if header != f"{MAGIC}{crc32(body):08x}".encode():
        raise Stale
    return body


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _unchanged(block: str, examine: Callable[[List[str]], List[Tuple[int, ...]]]) -> bool:
    """Whether `examine` (identities or fingerprints) gives what the block's first line says for the block's paths."""
    expected, *names = block.split("\n")
    return repr(examine(names)) == expected


def read_part(directory: str, name: str) -> bytes:
    """The bytes of a part; raises Stale when it is damaged or gone, since a newer inventory replaced it."""
    try:
        return checked(trust.read_own(f"{directory}/{name}", MAX_PART))
    except (OSError, ValueError, ChandlerError):
        raise Stale from None
