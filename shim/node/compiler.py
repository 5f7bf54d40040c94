"""Compiles the sources (configuration, CDI files) into an Inventory, in memory and, where that can be, on disk.

Whatever goes wrong on the way to the disk costs time only: the inventory in memory is complete.  Not part of the
warm create path.
"""

from __future__ import annotations

import marshal
import os
import stat
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NoReturn, Optional, Set, Tuple
from zlib import crc32

from shim import jsontext, paths
from shim.cdi import devices as physical
from shim.cdi.registry import Registry
from shim.edits import DEVICE
from shim.errors import ChandlerError, ConfigError
from shim.host import device_nodes, files, trust
from shim.node import cdi_files, inventory, launch_line
from shim.node import config as _config
from shim.node.inventory import MAGIC, Inventory, Place
from shim.state.lock import Lock

if TYPE_CHECKING:
    from shim.edits import Edit

# A file changed this shortly before we read it may change again within its timestamp's tick.
SETTLED_NS = 2_000_000_000
_MAX_CONFIG = 1 << 20

Near = Callable[[List[Tuple[str, ...]]], str]  # what shim.gpu.neighbours reads, of the physical devices of one kind


class Sources:
    """What the sources looked like before they were read, so that a change can be noticed."""

    def __init__(self) -> None:
        self.ways: Dict[str, Tuple[int, ...]] = {}
        self.sources: Dict[str, Tuple[int, ...]] = {}
        self.absent: Set[str] = set()
        self.configuration: Dict[str, Tuple[int, ...]] = {}  # as sources, by the paths that its files have for people

    def note(self, path: str) -> bool:
        """Remembers `path` (a file to be read or a directory to be listed); False when it is not there."""
        try:
            self._note(path)
        except OSError:
            self.absent.add(path)
            return False
        return True

    def note_configuration(self, path: str) -> bool:
        """`note`, of a part of the configuration.  One that may be there and cannot be looked at is not taken for none:
        raises ConfigError."""
        try:
            self.configuration[path] = self._note(path)
        except (FileNotFoundError, NotADirectoryError):
            self.absent.add(path)
            return False
        except OSError as error:
            raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from None
        return True

    def _note(self, path: str) -> Tuple[int, ...]:
        passed = trust.way(path)
        for part, found in passed[:-1]:
            if stat.S_ISLNK(found.st_mode):  # with its times: a new link may have the inode of the old one
                self.sources[part] = inventory.fingerprints([part])[0]
            else:
                self.ways[part] = inventory.identities([part])[0]
        last = passed[-1][0]
        self.sources[last] = inventory.fingerprints([last])[0]
        return self.sources[last]

    def watch(self, watched: List[str]) -> None:
        """Remembers parts of the host on which generated devices rest.  The times in /sys and /proc say nothing; what
        is loaded anew there has another inode."""
        for path in watched:
            if not path.startswith(("/sys/", "/proc/")):
                self.note(path)
                continue
            try:
                parts = [part for part, _ in trust.way(path)]
                self.ways.update(zip(parts, inventory.identities(parts)))
            except OSError:
                self.absent.add(path)

    def blocks(self) -> List[str]:
        """As the index holds them."""
        return [_block(self.ways), _block(self.sources), "\n".join(sorted(self.absent))]

    def unchanged(self) -> bool:
        """Whether everything still looks as it was noted."""
        try:
            return (
                inventory.identities(self.ways) == list(self.ways.values())
                and inventory.fingerprints(self.sources) == list(self.sources.values())
                and not any(files.exists(path) for path in self.absent)
            )
        except OSError:
            return False

    def settled(self, now: int) -> bool:
        """Whether no source was changed so shortly before `now` (ns) that another change could go unnoticed."""
        return _settled(self.sources, now)

    def storable(self) -> bool:
        """Whether every path can stand in a text of lines."""
        return not any("\n" in path for path in (*self.ways, *self.sources, *self.absent))


def _settled(seen: Dict[str, Tuple[int, ...]], now: int) -> bool:
    return all(now - each[4] > SETTLED_NS for each in seen.values())


def _block(seen: Dict[str, Tuple[int, ...]]) -> str:
    return "\n".join((repr(list(seen.values())), *seen))


def compile_now(place: Place, store: bool = True) -> Inventory:
    """The inventory from its sources as they are now; written for the next create when `store` is set (the caller
    then holds the lock).

    Raises ConfigError or TrustError for a configuration that must not be used.  A CDI file that is wrong is left
    out, and explained when somebody asks for what it may define.
    """
    started = time.time_ns()
    sources = Sources()
    config, _ = read_config(place, sources)
    registry = read_registry(place, config, sources)
    made = Compiled(config, registry, _neighbours())
    if store:
        times = {path: seen[3] for path, seen in sources.configuration.items()}
        launch_line.write(
            place, config, times, _settled(sources.configuration, started)
        )  # at once: the launcher compares times itself
        if sources.storable() and sources.settled(started) and sources.unchanged():
            made.store(place, sources.blocks())
    return made.inventory()


def unsettled(place: Place, now: int) -> float:
    """Seconds until every source is old enough to be believed from the inventory; 0 when all are."""
    sources = Sources()
    read_registry(place, read_config(place, sources)[0], sources)
    age = min((now - seen[4] for seen in sources.sources.values()), default=SETTLED_NS + 1)
    # a file from the future (the clock was set back) is not worth a longer wait
    return (SETTLED_NS - max(age, 0)) / 1e9 + 0.01 if age <= SETTLED_NS else 0.0


def read_config(place: Place, sources: Optional[Sources] = None) -> Tuple[Dict[str, Any], bool]:
    """The configuration, and whether its main file exists.  Raises ConfigError or TrustError."""
    texts = config_texts(place, sources or Sources())
    had_file = any(path == place.config_path for path, _ in texts)
    return _config.compile_config(texts), had_file


def config_texts(place: Place, sources: Sources) -> List[Tuple[str, bytes]]:
    """The configuration's files with their bytes.  Raises ConfigError or TrustError."""
    if not place.config_path.startswith("/"):
        raise ConfigError(f"the configuration {place.config_path}, which CHANDLER_CONFIG names, is no absolute path")
    names = [place.config_path]
    directory = os.path.dirname(place.config_path) + "/config.d"
    if sources.note_configuration(directory):
        try:
            names += [
                f"{directory}/{name}"
                for name in sorted(os.listdir(directory))
                if name.endswith(".toml") and name[0] != "."
            ]
        except OSError as error:
            raise ConfigError(f"the configuration {directory} cannot be read: {error.strerror}") from None
    for each in (os.path.dirname(place.config_path), directory):
        try:
            trust.check_way(each, place.owners)  # an empty one, too: somebody else may have taken out what it had
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError(f"the configuration {each} cannot be read: {error.strerror}") from None
    texts = []
    for path in names:
        if not sources.note_configuration(path):
            if path == place.config_path != paths.CONFIG_DIR + "/config.toml":
                raise ConfigError(f"the configuration {path}, which CHANDLER_CONFIG names, does not exist")
            continue
        try:
            texts.append((path, trust.read_trusted(path, _MAX_CONFIG, place.owners)))
        except OSError as error:
            raise ConfigError(f"the configuration {path} cannot be read: {error.strerror}") from None
    return texts


def prefixes(place: Place) -> List[str]:
    """What a request's annotations may begin with when the configuration cannot be used: the default, and its own."""
    try:
        own = _config.prefix_of(config_texts(place, Sources()))
    except ChandlerError:
        own = ""
    return [prefix for prefix in dict.fromkeys((_config.DEFAULT_PREFIX, own)) if prefix]


def read_registry(place: Place, config: Dict[str, Any], sources: Optional[Sources] = None) -> Registry:
    """The registry of the CDI directories that the configuration names."""
    sources = sources or Sources()
    for directory in config["cdi.spec-dirs"]:
        if sources.note(directory):
            try:
                for name in cdi_files.spec_names(directory):
                    sources.note(f"{directory}/{name}")
            except OSError:
                sources.absent.add(directory + "/.")  # never true of a directory: not to be stored
    read = cdi_files.read_spec_dirs(config["cdi.spec-dirs"], place.owners)
    registry = Registry.build(read)
    if config["gpu.fallback"] != "generate" or registry.problems:
        return registry  # a file that is wrong may be the one that describes the devices
    from shim.generate import managed

    entries, watch = managed.fallback([file.spec.kind for file in registry.files], config)
    sources.watch(watch)
    return Registry.build([(managed.GENERATED, None, entries), *read]) if entries else registry


def _neighbours() -> Near:
    """Which devices are neighbours on this host."""
    from shim.generate import topology
    from shim.generate.tree import HostTree

    return topology.Topology(HostTree(), _nvlink).text


def _nvlink() -> Dict[str, List[str]]:
    """What NVML says of NVLink; nothing where it says nothing."""
    from shim.generate import nvfiles, nvml
    from shim.generate.answers import Options, Unanswered
    from shim.generate.tree import HostTree

    try:
        links: Dict[str, List[str]] = nvml.ask(nvfiles.driver(HostTree(), Options()).library, nvml.links)["links"]
        return links
    except (Unanswered, ChandlerError):
        return {}


class Compiled:
    """The compiled form: the text of every part by its name, and which part a kind has."""

    def __init__(self, config: Dict[str, Any], registry: Registry, near: Optional[Near] = None) -> None:
        self.config = config
        self.registry = registry
        self.parts: Dict[str, bytes] = {}
        segment = {file.path: self._add(marshal.dumps(_segment(file))) for file in registry.files}
        self.kinds = "\n"
        of_kinds = {
            kind: registry.device_keys(kind, device_nodes.lstat_device)
            for kind in dict.fromkeys(file.spec.kind for file in registry.files)
        }
        picked = {kind: physical.pick(keys, len(keys)) for kind, keys in of_kinds.items()}
        several = len(of_kinds) > 1
        atoms = physical.smallest(
            [of_kinds[kind][pick] for kind, picks in picked.items() for pick in picks] if several else []
        )
        for kind, keys in of_kinds.items():
            picks = picked[kind]
            names = [kind, self._add(_encoded(_kind(kind, registry, segment, keys, picks, atoms)))]
            places = near([keys[pick] for pick in picks]) if near is not None and len(picks) > 1 else ""
            if places:
                names.append(self._add(_encoded(places)))
            self.kinds += "\t".join(names) + "\n"

    def _add(self, body: bytes) -> str:
        """Named by what it holds, so that an older index never finds a newer part."""
        name = files.digest(body)[:32] + ".part"
        self.parts[name] = body
        return name

    def explain(self, names: List[str]) -> NoReturn:
        raise self.registry.diagnose(names)

    def inventory(self) -> Inventory:
        return Inventory(self.config, self.kinds, self.parts.__getitem__, self.explain, bool(self.registry.problems))

    def store(self, place: Place, sources: List[str]) -> None:
        """Writes the parts, then the index; a reader sees the old index or the new one, and what it names."""
        directory = place.directory
        if not place.private(directory):
            return
        try:
            for name, body in self.parts.items():
                _store_part(f"{directory}/{name}", body)
            header = "\n".join(
                (place.key, jsontext.dumps(self.config).decode(), "problems" if self.registry.problems else "clean")
            )
            _store(f"{directory}/index", _encoded("\n\n".join((header, *sources, self.kinds.strip("\n")))))
            for name in os.listdir(directory):
                if name.endswith(".part") and name not in self.parts:
                    os.unlink(f"{directory}/{name}")
        except OSError:
            return  # the next create compiles again


def _kind(
    kind: str,
    registry: Registry,
    segment: Dict[str, str],
    keys: Dict[str, Tuple[str, ...]],
    picks: List[str],
    atoms: physical.Sets,
) -> str:
    """The part of one kind; `atoms`: the devices of all kinds that hold no other."""
    lines = [" ".join(picks)]
    for device, units in physical_units(keys, picks, atoms).items():
        file = registry.devices[f"{kind}={device}"]
        if keys[device] == (device,):
            units = [f"{kind}={device}"]  # no hardware to know it by, and other kinds have such names, too
        units += [
            number
            for number in registry.brought(file, device_nodes.lstat_device)
            if not any(number in unit.split("+") for unit in units)
        ]
        lines.append("\t".join((device, segment[file.path], *units)))
    return "\n".join(lines) + "\n"


def _segment(file: Any) -> Dict[str, Any]:
    """The part of one CDI file."""
    return {
        "path": file.path,
        "edits": [_with_identity(edit) for edit in file.spec.common],
        "devices": {name: [_with_identity(edit) for edit in own] for name, own in file.spec.devices.items()},
    }


def _with_identity(edit: Edit) -> Tuple[Any, ...]:
    """An edit without its origin.  A device node whose numbers only the host can say is stored with what they were:
    leases count by that, so that a create has to find the same (shim.host.device_nodes)."""
    kind, key, value = edit[:3]
    if kind == DEVICE and not device_nodes.is_certain(value):
        value = {**value, device_nodes.COMPILED: physical.identity(value, device_nodes.lstat_device)}
    return kind, key, value


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _store_part(path: str, body: bytes) -> None:
    try:
        if inventory.checked(files.read(path, inventory.MAX_PART)[0]) == body:
            return
    except (OSError, ChandlerError, inventory.Stale):
        pass  # absent, or damaged
    _store(path, body)


def _store(path: str, body: bytes) -> None:
    files.replace(path, f"{MAGIC}{crc32(body):08x}\n".encode() + body, 0o600)


def physical_units(keys: Dict[str, Tuple[str, ...]], picks: List[str], atoms: physical.Sets) -> Dict[str, List[str]]:
    """The physical devices behind each name, each as its device numbers joined by `+`.

    An aggregate stands for all those that are part of it, whatever kind they are of (`atoms`): two devices of one
    kind may overlap in one of another.
    """
    whole = physical.aggregates(keys.values())
    found = {}
    for name, key in keys.items():
        own = set(key)
        if key in whole:
            parts = [keys[pick] for pick in picks if own >= set(keys[pick])]
        else:
            parts = sorted(tuple(sorted(atom)) for atom in atoms.near(frozenset(own)) if atom < own)
            if len(parts) < 2:
                parts = []
        rest = tuple(sorted(own.difference(*parts))) if parts and key not in whole else ()
        found[name] = ["+".join(part) for part in (*(parts or [key]), *([rest] if rest else []))]
    return found


def load(place: Place) -> Inventory:
    """The inventory as stored if it is fresh, else compiled now.  Of many at once one compiles, the others wait."""

    def explain(names: List[str]) -> NoReturn:
        raise read_registry(place, read_config(place)[0]).diagnose(names)

    try:
        return inventory.load(place, explain)
    except inventory.Stale:
        pass
    lock = _lock(place)
    if lock is None:
        return compile_now(place, store=False)
    try:
        return inventory.load(place, explain)
    except inventory.Stale:
        return compile_now(place)
    finally:
        lock.__exit__()


def refresh(place: Place) -> Inventory:
    """The inventory compiled now, whatever is stored."""
    lock = _lock(place)
    if lock is None:
        return compile_now(place, store=False)
    try:
        return compile_now(place)
    finally:
        lock.__exit__()


def _lock(place: Place) -> Optional[Lock]:
    """The lock of the stored inventory, taken; None where nothing can be stored."""
    try:
        trust.own_directory(place.trusted_state_dir(), 0o700 if place.rootless else 0o755)
        files.make_directory(place.directory)
        return Lock(place.directory + "/lock").__enter__()
    except (OSError, ChandlerError):
        return None
