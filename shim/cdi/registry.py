"""Knows all CDI files of a node: which file defines a device, which definitions conflict, and why a name is missing.

Source: CDI Go library 1.1.2, pkg/cdi/spec-dirs.go and cache.go.  It differs in two points: a directory that cannot be
listed does not hide the directories after it, and a conflict between files of low priority does not remove a definition
in a file of higher priority.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Optional, Union

from shim.cdi import devices as physical
from shim.cdi.compile import SAFE_HOOK_ENV
from shim.cdi.names import split_kind
from shim.cdi.resolve import unresolvable
from shim.cdi.spec import Spec, parse
from shim.edits import DEVICE
from shim.errors import CdiError, ChandlerError
from shim.pathtext import clean

if TYPE_CHECKING:  # shim.edits has these names for type checkers alone, since a create loads it
    from shim.edits import Edit, Stat

Entry = tuple[str, Union[bytes, ChandlerError]]  # file name, and its content or why it cannot be read
Directory = tuple[str, Optional[ChandlerError], Sequence[Entry]]  # path, why it cannot be listed, entries

SUFFIXES = (".json", ".yaml")
MAX_NEAR = 4  # missing names for which we look up similar names, since that is slow


def is_spec_name(name: str) -> bool:
    """Whether a directory entry of this name is a CDI file.  Case matters; names that begin with a dot count."""
    return name.endswith(SUFFIXES)


class File:
    """A valid CDI file: its path, the priority of its directory (the higher one wins), and its content."""

    __slots__ = ("path", "priority", "spec")

    def __init__(self, path: str, priority: int, spec: Spec) -> None:
        self.path = path
        self.priority = priority
        self.spec = spec

    def identities(self, stat: Stat) -> physical.Identities:
        """The device nodes of its devices, as they are on the host."""
        nodes = {
            name: [value for kind, _, value, _ in edits if kind == DEVICE] for name, edits in self.spec.devices.items()
        }
        return physical.Identities(nodes, stat, [value for kind, _, value, _ in self.spec.common if kind == DEVICE])


class Registry:
    """What the CDI directories define, in tables by path or by qualified name."""

    __slots__ = (
        "conflicts",
        "devices",
        "directories",
        "files",
        "problems",
        "shadowed",
        "_distinguishing",
        "_identities",
    )

    def __init__(self, directories: Sequence[str]) -> None:
        self.directories: list[str] = list(directories)  # the last one has the highest priority
        self.files: list[File] = []  # the valid files, lowest priority first
        self.problems: dict[str, list[ChandlerError]] = {}  # file or directory -> what is wrong with it
        self.devices: dict[str, File] = {}  # qualified name -> the file that defines it
        self.shadowed: dict[str, list[str]] = {}  # qualified name -> files of lower priority that define it as well
        self.conflicts: dict[str, list[str]] = {}  # qualified name -> several files of the highest priority define it
        self._identities: dict[str, physical.Identities] | None = None  # by path; set by _identify
        # nodes that tell devices apart in any file; set by _identify
        self._distinguishing: frozenset[str] = frozenset()

    @classmethod
    def build(cls, directories: Sequence[Directory], hook_env: Sequence[str] | None = SAFE_HOOK_ENV) -> Registry:
        """The registry of some directories, lowest priority first.  Errors in files go into `problems`.

        `hook_env` is the environment for hooks that have none; with None they get none.
        """
        read: dict[str, tuple[ChandlerError | None, Sequence[Entry]]] = {}
        for path, error, entries in directories:
            read.pop(clean(path), None)  # a directory that is listed twice counts where it comes last
            read[clean(path)] = (error, entries)
        registry = cls(list(read))
        for priority, (path, (error, entries)) in enumerate(read.items()):
            if error is not None:
                registry._blame(path, error)
            registry._read(path, priority, entries, hook_env)
        registry._arrange()
        return registry

    def _blame(self, path: str, error: ChandlerError) -> None:
        self.problems.setdefault(path, []).append(error)

    def _read(self, path: str, priority: int, entries: Iterable[Entry], hook_env: Sequence[str] | None) -> None:
        for name, content in sorted((entry for entry in entries if is_spec_name(entry[0])), key=lambda entry: entry[0]):
            file = f"{path.rstrip('/')}/{name}"
            if isinstance(content, ChandlerError):
                self._blame(file, content)
            else:
                try:
                    self.files.append(File(file, priority, parse(content, file, hook_env)))
                except CdiError as error:
                    self._blame(file, error)

    def _arrange(self) -> None:
        definers: dict[str, list[File]] = {}
        for file in self.files:
            for device in file.spec.devices:
                definers.setdefault(f"{file.spec.kind}={device}", []).append(file)
        for name, files in definers.items():
            highest = files[-1].priority  # files are in order of priority
            winners = [file for file in files if file.priority == highest]
            losers = [file.path for file in files if file.priority != highest]
            if losers:
                self.shadowed[name] = losers
            if len(winners) == 1:
                self.devices[name] = winners[0]
            else:
                self.conflicts[name] = [file.path for file in winners]
            self._blame_conflicts(name, files)

    def _blame_conflicts(self, name: str, files: Sequence[File]) -> None:
        for priority in dict.fromkeys(file.priority for file in files):
            paths = [file.path for file in files if file.priority == priority]
            if len(paths) > 1:
                for path in paths:
                    self._blame(path, CdiError(_conflict(name, paths), "keep one of them"))

    def lookup(self, name: str) -> tuple[str, tuple[Edit, ...], tuple[Edit, ...]] | None:
        """For resolve(): (path of the file that defines `name`, the file's own edits, the device's edits), or None."""
        file = self.devices.get(name)
        if file is None:
            return None
        return file.path, file.spec.common, file.spec.devices[name.partition("=")[2]]

    def diagnose(self, missing: Sequence[str]) -> CdiError:
        """The error for names that `lookup` does not know: directories read, problems in them, similar names."""
        why = [f"read {', '.join(self.directories) or 'no directory'}"]
        why += [_conflict(name, self.conflicts[name]) for name in missing if name in self.conflicts]
        valid = {file.path for file in self.files}  # their problems are conflicts about other names
        why += [
            str(error) if path in error.what else f"{path}: {error}"
            for path, errors in self.problems.items()
            if path not in valid
            for error in errors
        ]
        near = self._near([name for name in missing if name not in self.conflicts][:MAX_NEAR])
        return unresolvable(missing, "; ".join(why), f"the nearest known: {', '.join(near)}" if near else self._known())

    def _near(self, missing: Iterable[str]) -> list[str]:
        """The known names that are similar to the missing ones, at most three for each."""
        import difflib

        similar: dict[str, None] = {}
        for name in missing:
            similar.update(dict.fromkeys(difflib.get_close_matches(name, self.devices, 3)))
        return list(similar)

    def _known(self) -> str:
        if self.devices:
            return ""
        return "no CDI device is known; generate a CDI file or name its directory"

    def _identify(self, stat: Stat) -> dict[str, physical.Identities]:
        if self._identities is None:
            self._identities = {file.path: file.identities(stat) for file in self.files}
            self._distinguishing = frozenset().union(*(each.distinguishing() for each in self._identities.values()))
        return self._identities

    def leased_with_file(self, file: File, stat: Stat) -> list[str]:
        """The device numbers of GPUs in a file's own edits, which a container gets with any device of the file.

        See Identities.leased_with_file.
        """
        return self._identify(stat)[file.path].leased_with_file(self._distinguishing)

    def device_keys(self, kind: str, stat: Stat) -> dict[str, tuple[str, ...]]:
        """The physical keys of all resolvable devices of a kind, by device name (see Identities.keys)."""
        identities = self._identify(stat)
        keys: dict[str, tuple[str, ...]] = {}
        for file in self.files:
            if file.spec.kind == kind:
                for device, key in identities[file.path].keys(self._distinguishing).items():
                    if self.devices.get(f"{kind}={device}") is file:
                        keys[device] = key
        return keys

    def pick(self, kind: str, count: int, stat: Stat) -> list[str]:
        """The qualified names of the first `count` physical devices of a kind.  Raises CdiError if there are fewer."""
        split_kind(kind)
        names = physical.pick(self.device_keys(kind, stat), count)
        if len(names) < count:
            raise CdiError(f"{count} devices of {kind} are asked for, but there are {len(names)}")
        return [f"{kind}={name}" for name in names]


def _conflict(name: str, paths: Sequence[str]) -> str:
    return f"{name} is defined by {' and '.join(paths)}"
