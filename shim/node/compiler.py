"""Compiles the sources (configuration, CDI files) into an Inventory, in memory and, if possible, on disk.

If the inventory cannot be written to disk, the next create compiles again: that costs time, but the inventory in memory
is complete.  Not part of the create path while the stored inventory is up to date.
"""

from __future__ import annotations

import marshal
import os
import stat
import time
from typing import TYPE_CHECKING, Any, Callable, NoReturn
from zlib import crc32

from shim import jsontext, paths
from shim.cdi import devices as physical
from shim.cdi.registry import File, Registry
from shim.edits import DEVICE
from shim.errors import ChandlerError, ConfigError
from shim.host import device_nodes, files, trust
from shim.node import cdi_files, inventory, launch_line
from shim.node import config as _config
from shim.node.inventory import MAGIC, Account, Inventory
from shim.state.lock import Lock

if TYPE_CHECKING:
    from shim.edits import DeviceNode, Edit
    from shim.node.inventory import Segment, SegmentEdit
    from shim.shapes import Config

# A file that was changed less than this before we read it could be changed again and keep the same timestamp.
SETTLED_NS = 2_000_000_000
_MAX_CONFIG = 1 << 20  # bytes

# Takes the keys of the physical devices of one kind, and gives the text that shim.gpu.neighbours reads.
Near = Callable[[list[tuple[str, ...]]], str]


class Sources:
    """What stat said of the sources before they were read, so that a later change is noticed.

    `ways`: the directories on the way to a source, and watched paths in /sys and /proc: only their identity counts.
    `sources`: files, listed directories, and links on the way to them: their times count, too.
    `absent`: paths that do not exist, and whose creation would be a change.
    """

    def __init__(self) -> None:
        self.ways: dict[str, tuple[int, ...]] = {}
        self.sources: dict[str, tuple[int, ...]] = {}
        self.absent: set[str] = set()
        # The configuration's part of `sources`, by path as it was given, before links are followed.
        self.configuration: dict[str, tuple[int, ...]] = {}

    def note(self, path: str) -> bool:
        """Notes `path`, a file to be read or a directory to be listed; False when it does not exist."""
        try:
            self._note(path)
        except OSError:
            self.absent.add(path)
            return False
        return True

    def note_configuration(self, path: str) -> bool:
        """`note` for a file or directory of the configuration.

        Raises ConfigError when it cannot be looked at, since it may exist, or when a link to it leads nowhere.
        """
        try:
            self.configuration[path] = self._note(path)
        except (FileNotFoundError, NotADirectoryError):
            link = trust.broken_link(path)
            if link:
                raise ConfigError(
                    f"the configuration {path} cannot be read: the target of the link {link} is missing",
                    "restore the target, or remove the link",
                ) from None
            self.absent.add(path)
            return False
        except OSError as error:
            raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from None
        return True

    def _note(self, path: str) -> tuple[int, ...]:
        steps = trust.path_steps(path)
        for part, status in steps[:-1]:
            if stat.S_ISLNK(status.st_mode):
                # the times of a link count, since a new link may get the old one's inode
                self.sources[part] = inventory.fingerprints([part])[0]
            else:
                self.ways[part] = inventory.identities([part])[0]
        last = steps[-1][0]
        self.sources[last] = inventory.fingerprints([last])[0]
        return self.sources[last]

    def watch(self, watched: list[str]) -> None:
        """Notes the files of the host that generated devices depend on.

        Times in /sys and /proc say nothing, so only the identity of such a file counts: when a driver is loaded again,
        its files get other inodes.
        """
        for path in watched:
            if not path.startswith(("/sys/", "/proc/")):
                self.note(path)
                continue
            try:
                parts = [part for part, _ in trust.path_steps(path)]
                self.ways.update(zip(parts, inventory.identities(parts)))
            except OSError:
                self.absent.add(path)

    def blocks(self) -> list[str]:
        """The blocks 1 to 3 of the index (shim.node.inventory)."""
        return [_block(self.ways), _block(self.sources), "\n".join(sorted(self.absent))]

    def unchanged(self) -> bool:
        """Whether stat says of everything what it said when it was noted."""
        try:
            return (
                inventory.identities(self.ways) == list(self.ways.values())
                and inventory.fingerprints(self.sources) == list(self.sources.values())
                and not any(files.exists(path) for path in self.absent)
            )
        except OSError:
            return False

    def settled(self, now: int) -> bool:
        """Whether all sources were changed so long before `now` (ns) that another change will have another time."""
        return _settled(self.sources, now)

    def storable(self) -> bool:
        """Whether every path fits on one line of the index."""
        return not any("\n" in path for path in (*self.ways, *self.sources, *self.absent))


def _settled(sources: dict[str, tuple[int, ...]], now: int) -> bool:
    """Whether the ctime of each fingerprint is more than SETTLED_NS before `now` (ns)."""
    return all(now - fingerprint[4] > SETTLED_NS for fingerprint in sources.values())


def _block(noted: dict[str, tuple[int, ...]]) -> str:
    """A block of the index: what stat said of all paths on the first line, then a line for each path."""
    return "\n".join((repr(list(noted.values())), *noted))


def compile_now(account: Account, store: bool = True) -> Inventory:
    """The inventory from its sources as they are now.

    `store`: writes it for the next create; the caller then holds the lock.
    Raises ConfigError or TrustError for a configuration that must not be used.  A CDI file with errors is left out, and
    the errors are reported when a request names a device that is missing.
    """
    started = time.time_ns()
    sources = Sources()
    config, _ = read_config(account, sources)
    registry = read_registry(account, config, sources)
    compiled = Compiled(config, registry, _neighbours())
    if store:
        times = {path: fingerprint[3] for path, fingerprint in sources.configuration.items()}
        # Written even if the index is not: the launcher compares the configuration's times itself.
        launch_line.write(account, config, times, _settled(sources.configuration, started))
        if sources.storable() and sources.settled(started) and sources.unchanged():
            compiled.store(account, sources.blocks())
    return compiled.inventory()


def seconds_until_settled(account: Account, now: int) -> float:
    """Seconds until every source is old enough for the inventory to be stored; 0 when all are."""
    sources = Sources()
    read_registry(account, read_config(account, sources)[0], sources)
    age = min((now - fingerprint[4] for fingerprint in sources.sources.values()), default=SETTLED_NS + 1)
    # A file may have a time in the future, after the clock was set back.  It waits no longer than a new file.
    return (SETTLED_NS - max(age, 0)) / 1e9 + 0.01 if age <= SETTLED_NS else 0.0


def watched_names(account: Account, inventory: Inventory) -> dict[str, tuple[str, ...]]:
    """The directories of configuration and CDI files, each with the endings of the file names that matter in it, for
    shim.node.watch.

    Of the directory of the configuration only the file itself matters: compiling writes other files there.
    """
    directory, _, name = account.config_path.rpartition("/")
    return {
        directory: (name,),
        directory + "/config.d": (".toml",),
        **{each: (".json", ".yaml") for each in inventory.config["cdi.spec-dirs"]},
    }


def read_config(account: Account, sources: Sources | None = None) -> tuple[Config, bool]:
    """The configuration, and whether its main file exists.  Raises ConfigError or TrustError."""
    texts = config_texts(account, sources or Sources())
    had_file = any(path == account.config_path for path, _ in texts)
    return _config.compile_config(texts), had_file


def config_texts(account: Account, sources: Sources) -> list[tuple[str, bytes]]:
    """The configuration's files with their bytes.  Raises ConfigError or TrustError."""
    names = _config_names(account, sources)
    return [(path, text) for path in names for text in [_config_text(account, path, sources)] if text is not None]


def _config_names(account: Account, sources: Sources) -> list[str]:
    """The paths of the configuration's files; the main one may be missing.  Raises ConfigError or TrustError."""
    if not account.config_path.startswith("/"):
        raise ConfigError(f"the configuration {account.config_path}, which CHANDLER_CONFIG names, is no absolute path")
    names = [account.config_path]
    directory = os.path.dirname(account.config_path) + "/config.d"
    if sources.note_configuration(directory):
        try:
            names += [
                f"{directory}/{name}"
                for name in sorted(os.listdir(directory))
                if name.endswith(".toml") and name[0] != "."
            ]
        except OSError as error:
            raise ConfigError(f"the configuration {directory} cannot be read: {error.strerror}") from None
    for checked in (os.path.dirname(account.config_path), directory):
        try:
            # Also a directory without files is checked: somebody else could have removed them.
            trust.check_path(checked, account.owners)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError(f"the configuration {checked} cannot be read: {error.strerror}") from None
    return names


def _config_text(account: Account, path: str, sources: Sources) -> bytes | None:
    """The bytes of one file of the configuration, None when it does not exist.  Raises ConfigError or TrustError."""
    if not sources.note_configuration(path):
        if path == account.config_path != paths.CONFIG_DIR + "/config.toml":
            raise ConfigError(f"the configuration {path}, which CHANDLER_CONFIG names, does not exist")
        return None
    try:
        return trust.read_trusted(path, _MAX_CONFIG, account.owners)
    except OSError as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from None


def prefixes(account: Account) -> list[str]:
    """The annotation prefixes to look for when the configuration cannot be used: the default and the configured one.

    Files that cannot be read are left out: the others may configure it.
    """
    try:
        names = _config_names(account, Sources())
    except ChandlerError:
        names = [account.config_path]
    texts = []
    for path in names:
        try:
            texts.append((path, _config_text(account, path, Sources()) or b""))
        except ChandlerError:
            continue
    configured = _config.annotation_prefix(texts)
    return [prefix for prefix in dict.fromkeys((_config.DEFAULT_PREFIX, configured)) if prefix]


def read_registry(account: Account, config: Config, sources: Sources | None = None) -> Registry:
    """The registry of the configuration's CDI directories, with generated devices if gpu.fallback asks for them."""
    sources = sources or Sources()
    for directory in config["cdi.spec-dirs"]:
        if sources.note(directory):
            try:
                for name in cdi_files.spec_names(directory):
                    sources.note(f"{directory}/{name}")
            except OSError:
                # the directory exists, so `unchanged` is never true and the inventory is not stored
                sources.absent.add(directory + "/.")
    directories = cdi_files.read_spec_dirs(config["cdi.spec-dirs"], account.owners)
    registry = Registry.build(directories)
    if config["gpu.fallback"] != "generate" or registry.problems:
        return registry  # a file with errors may describe the devices that would be generated
    from shim.generate import managed

    entries, watch = managed.fallback([file.spec.kind for file in registry.files], config)
    sources.watch(watch)
    return Registry.build([(managed.GENERATED, None, entries), *directories]) if entries else registry


def _neighbours() -> Near:
    """The function that tells which devices are neighbours on this host."""
    from shim.generate import topology
    from shim.generate.tree import HostTree

    return topology.Topology(HostTree(), _nvlink).text


def _nvlink() -> dict[str, list[str]]:
    """The NVLink connections as NVML gives them (shim.generate.nvml.links); {} when NVML does not answer."""
    from shim.generate import nvfiles, nvml
    from shim.generate.model import NvmlUnavailable, Options
    from shim.generate.tree import HostTree

    try:
        links: dict[str, list[str]] = nvml.ask(nvfiles.driver(HostTree(), Options()).library, nvml.links)["links"]
        return links
    except (NvmlUnavailable, ChandlerError):
        return {}


class Compiled:
    """The compiled form: `parts`, the bytes of each part by its name; `kinds`, block 4 of the index."""

    def __init__(self, config: Config, registry: Registry, near: Near | None = None) -> None:
        self.config = config
        self.registry = registry
        self.parts: dict[str, bytes] = {}
        segments = {file.path: self._add(_file_part(file)) for file in registry.files}
        self.kinds = "\n"
        keys_of = {
            kind: registry.device_keys(kind, device_nodes.lstat_device)
            for kind in dict.fromkeys(file.spec.kind for file in registry.files)
        }
        picks_of = {kind: physical.pick(keys, len(keys)) for kind, keys in keys_of.items()}
        several_kinds = len(keys_of) > 1
        atoms = physical.smallest(
            [keys_of[kind][pick] for kind, picks in picks_of.items() for pick in picks] if several_kinds else []
        )
        for kind, keys in keys_of.items():
            picks = picks_of[kind]
            names = [kind, self._add(_encoded(_kind_part(kind, registry, segments, keys, picks, atoms)))]
            neighbours = near([keys[pick] for pick in picks]) if near is not None and len(picks) > 1 else ""
            if neighbours:
                names.append(self._add(_encoded(neighbours)))
            self.kinds += "\t".join(names) + "\n"

    def _add(self, body: bytes) -> str:
        """Adds a part, and gives its name: a digest of its bytes, so that an older index never finds a newer part."""
        name = files.digest(body)[:32] + ".part"
        self.parts[name] = body
        return name

    def explain(self, names: list[str]) -> NoReturn:
        raise self.registry.diagnose(names)

    def inventory(self) -> Inventory:
        return Inventory(self.config, self.kinds, self.parts.__getitem__, self.explain, bool(self.registry.problems))

    def store(self, account: Account, sources: list[str]) -> None:
        """Writes the parts, then the index, so that every index that a reader sees has all its parts.

        `sources`: the blocks of Sources.blocks.  Does nothing when the directory is not private, or cannot be written.
        """
        directory = account.directory
        if not account.private(directory):
            return
        try:
            for name, body in self.parts.items():
                _store_part(f"{directory}/{name}", body)
            header = "\n".join(
                (account.key, jsontext.dumps(self.config).decode(), "problems" if self.registry.problems else "clean")
            )
            _store(f"{directory}/index", _encoded("\n\n".join((header, *sources, self.kinds.strip("\n")))))
            for name in os.listdir(directory):
                if name.endswith(".part") and name not in self.parts:
                    os.unlink(f"{directory}/{name}")
        except OSError:
            return  # the next create compiles again


def _kind_part(
    kind: str,
    registry: Registry,
    segments: dict[str, str],
    keys: dict[str, tuple[str, ...]],
    picks: list[str],
    atoms: physical.OverlapIndex,
) -> str:
    """The text of the part of one kind (shim.node.inventory).

    `segments`: the names of the CDI files' parts by path; `keys`: the physical key of each device; `picks`: one name of
    each physical device; `atoms`: the devices of all kinds that contain no other device.
    """
    lines = [" ".join(picks)]
    for device, units in physical_units(keys, picks, atoms).items():
        file = registry.devices[f"{kind}={device}"]
        if keys[device] == (device,):
            units = [f"{kind}={device}"]  # it has no device node, and another kind may have the same device name
        units += [
            number
            for number in registry.leased_with_file(file, device_nodes.lstat_device)
            if not any(number in unit.split("+") for unit in units)
        ]
        lines.append("\t".join((device, segments[file.path], *units)))
    return "\n".join(lines) + "\n"


def _file_part(file: File) -> bytes:
    """The bytes of the part of one CDI file (shim.node.inventory)."""
    segment: Segment = {
        "path": file.path,
        "edits": [_with_identity(edit) for edit in file.spec.common],
        "devices": {name: [_with_identity(edit) for edit in edits] for name, edits in file.spec.devices.items()},
    }
    content: Any = segment  # typeshed does not know that a TypedDict can be marshalled
    return marshal.dumps(content)


def _with_identity(edit: Edit) -> SegmentEdit:
    """An edit without its origin.

    A device node whose CDI file gives no device numbers is stored with those that it has on the host now.  The keys of
    leases are made from these, so a create refuses a node that has other numbers (shim.host.device_nodes).
    """
    kind, key, value = edit[:3]
    if kind == DEVICE:
        node: DeviceNode = value
        if not device_nodes.is_certain(node):
            node = node.copy()
            node[device_nodes.COMPILED] = physical.identity(node, device_nodes.lstat_device)
            return kind, key, node
    return kind, key, value


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _store_part(path: str, body: bytes) -> None:
    try:
        if inventory.checked(files.read(path, inventory.MAX_PART)[0]) == body:
            return
    except (OSError, ChandlerError, inventory.Stale):
        pass  # the part is missing or damaged
    _store(path, body)


def _store(path: str, body: bytes) -> None:
    files.replace(path, f"{MAGIC}{crc32(body):08x}\n".encode() + body, 0o600)


def physical_units(
    keys: dict[str, tuple[str, ...]], picks: list[str], atoms: physical.OverlapIndex
) -> dict[str, list[str]]:
    """The physical devices behind each name, each as its device numbers joined by `+`.

    A device that contains several others (an aggregate) stands for all of them.  They may be of another kind (`atoms`):
    two devices of one kind may overlap in a device of another kind.
    """
    aggregates = physical.aggregates(keys.values())
    units = {}
    for name, key in keys.items():
        numbers = set(key)
        if key in aggregates:
            parts = [keys[pick] for pick in picks if numbers >= set(keys[pick])]
        else:
            parts = sorted(tuple(sorted(atom)) for atom in atoms.overlapping(frozenset(numbers)) if atom < numbers)
            if len(parts) < 2:
                parts = []  # a device that contains only one other does not stand for several
            rest = numbers.difference(*parts)
            if parts and rest:
                parts.append(tuple(sorted(rest)))
        units[name] = ["+".join(part) for part in parts or [key]]
    return units


def load(account: Account) -> Inventory:
    """The stored inventory if it is up to date, else one that is compiled now.

    When several creates find it out of date at once, one compiles and the others wait for it.
    """

    def explain(names: list[str]) -> NoReturn:
        raise read_registry(account, read_config(account)[0]).diagnose(names)

    try:
        return inventory.load(account, explain)
    except inventory.Stale:
        pass
    lock = _lock(account)
    if lock is None:
        return compile_now(account, store=False)
    try:
        return inventory.load(account, explain)  # another create may have compiled it while we waited for the lock
    except inventory.Stale:
        return compile_now(account)
    finally:
        lock.__exit__()


def refresh(account: Account) -> Inventory:
    """Compiles the inventory now, even if the stored one is up to date."""
    lock = _lock(account)
    if lock is None:
        return compile_now(account, store=False)
    try:
        return compile_now(account)
    finally:
        lock.__exit__()


def _lock(account: Account) -> Lock | None:
    """Takes the lock of the stored inventory; None when nothing can be stored."""
    try:
        trust.own_directory(account.trusted_state_dir(), 0o700 if account.rootless else 0o755)
        files.make_directory(account.directory)
        return Lock(account.directory + "/lock").__enter__()
    except (OSError, ChandlerError):
        return None
