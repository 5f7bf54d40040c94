"""The values that go into the generators of CDI files and come out of them: options, devices, edits.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from shim import paths
from shim.cdi.compile import SAFE_HOOK_ENV
from shim.errors import HostError

if TYPE_CHECKING:
    from shim.generate.tree import HostTree
    from shim.shapes import Document

    # A CDI `containerEdits` before its hooks are written.  `calls` says what hooks will do: each call is a list of the
    # hook's name and its arguments.
    Block = dict[str, list[Any]]

OUR_PROGRAM = "chandler-hook"

STRATEGIES = ("index", "uuid", "type-index")
DEFAULT_STRATEGIES = ("index", "uuid")
MODES = ("auto", "nvml", "proc", "management", "wsl", "csv", "gds", "gdrcopy", "mofed", "nvswitch", "imex")

# The keys of a Block, in the order in which our CDI files have them.
CATEGORIES = ("env", "deviceNodes", "mounts", "calls", "hooks", "additionalGids")

MOUNT_OPTIONS = ("ro", "nosuid", "nodev", "rbind", "rprivate")
SOCKET_OPTIONS = ("nosuid", "nodev", "rbind", "rprivate", "noexec")


class Options:
    """How to generate: where the driver and the device nodes are, which names devices get, which hook program is used.

    `driver_root` and `dev_root` are directories of the host without a slash at the end ("" is the host's own root).
    `hook` is the path of the program that CDI runs as hook: ours, `nvidia-cdi-hook` or `nvidia-ctk`.
    """

    __slots__ = ("driver_root", "dev_root", "strategies", "mode", "all", "hook")

    def __init__(
        self,
        driver_root: str = "",
        dev_root: str | None = None,
        strategies: Sequence[str] = DEFAULT_STRATEGIES,
        mode: str = "auto",
        all: bool = True,
        hook: str = "",
    ) -> None:
        self.driver_root = driver_root.rstrip("/")
        # A driver container may have the nodes in its own /dev; `node` falls back to the host's.
        self.dev_root = self.driver_root if dev_root is None else dev_root.rstrip("/")
        self.strategies = tuple(name for name in STRATEGIES if name in strategies)
        self.mode = mode
        self.all = all
        self.hook = hook or paths.HOOK

    def recorded(self) -> Document:
        """The options that differ from the defaults, for the file's annotation, from which the file can be renewed."""
        defaults = Options()
        values = {
            "driver-root": (self.driver_root, defaults.driver_root),
            "dev-root": (self.dev_root, self.driver_root),
            "names": (list(self.strategies), list(defaults.strategies)),
            "mode": (self.mode, defaults.mode),
            "all": (self.all, defaults.all),
        }
        return {key: value for key, (value, default) in values.items() if value != default}

    @classmethod
    def from_record(cls, record: Document, hook: str = "") -> Options:
        """The options from the result of `recorded`.  Raises HostError for a record that no version of ours writes."""
        try:
            options = cls(
                str(record.get("driver-root", "")),
                record.get("dev-root"),
                [str(name) for name in record.get("names", DEFAULT_STRATEGIES)],
                str(record.get("mode", "auto")),
                bool(record.get("all", True)),
                hook,
            )
        except (AttributeError, TypeError):
            raise HostError("the options recorded in the file are damaged") from None
        if options.mode not in MODES or not options.strategies:
            raise HostError("this version does not know the options recorded in the file")
        return options


class NvmlUnavailable(Exception):
    """NVML cannot be asked on this host; the text is the reason."""


class Device:
    """A device to describe: its names by strategy, its own edits, and its entry in the file's `layout` annotation."""

    __slots__ = ("names", "edits", "layout", "annotations")

    def __init__(
        self, names: dict[str, str], edits: Block, layout: str, annotations: dict[str, str] | None = None
    ) -> None:
        self.names = names
        self.edits = edits
        self.layout = layout
        self.annotations = annotations or {}


class Description:
    """What a generator found: the devices, the edits that all of them need (`common`), and notes.

    `driver` is the driver's version, "" when it has none of its own.  `notes` are sentences for a person.  When one of
    the paths in `watch` changes, the devices may have changed.
    """

    __slots__ = ("kind", "devices", "common", "driver", "notes", "watch")

    def __init__(
        self,
        kind: str,
        devices: list[Device],
        common: Block | None = None,
        driver: str = "",
        notes: Iterable[str] = (),
        watch: Iterable[str] = (),
    ) -> None:
        self.kind = kind
        self.devices = devices
        self.common = common or {}
        self.driver = driver
        self.notes = list(notes)
        self.watch = list(watch)


def merged(*blocks: Block) -> Block:
    """All edits of all blocks, each once and in order.  Of nodes or mounts with the same path only the first stays."""
    result: Block = {}
    for category in CATEGORIES:
        items: Document = {}
        for block in blocks:
            for item in block.get(category, ()):
                items.setdefault(_key(category, item), item)
        if items:
            result[category] = list(items.values())
    return result


def _key(category: str, item: Any) -> str:
    if category == "deviceNodes":
        return str(item["path"])
    return str(item["containerPath"]) if category == "mounts" else repr(item)


# --- edits ----------------------------------------------------------------------------------------------------


def node(
    tree: HostTree, options: Options, path: str, known: tuple[str, int, int, int, int] | None = None
) -> Block | None:
    """The edits for a device node of the host; None when the node is missing and `known` is None.

    The edits have the node's numbers, so that the device can be injected while the node is missing; and the node's
    group, when other users may not open the node.  `known` has the values (type, major, minor, mode, group) for a node
    that is missing.  The node is looked up below `dev_root`, then in the host's own /dev, which a driver container
    shares.
    """
    host_path = options.dev_root + path
    status = tree.node(host_path)
    if status is None and options.dev_root == options.driver_root:
        status, host_path = tree.node(path), path
    if status is None:
        status = known
    if status is None:
        return None
    kind, major, minor, mode, group = status
    edit: Document = {"path": path}
    if host_path != path:
        edit["hostPath"] = host_path
    edit.update({"type": kind, "major": major, "minor": minor, "fileMode": mode, "permissions": "rwm"})
    if not group or mode & 0o006 == 0o006:
        return {"deviceNodes": [edit]}
    # The runtime creates the node in the container anew, as root's.  Only with `gid` can the group open that node, too.
    edit["gid"] = group
    return {"deviceNodes": [edit], "additionalGids": [group]}


def mount(options: Options, host_path: str, path: str, flags: Sequence[str] = MOUNT_OPTIONS) -> Document:
    """A bind mount of `host_path`, a path inside the driver root, at `path`."""
    return {"hostPath": options.driver_root + host_path, "containerPath": path, "options": list(flags)}


def links(pairs: Sequence[tuple[str, str]]) -> Block:
    """A call that makes symbolic links, given as (path, target); an empty block for none."""
    if not pairs:
        return {}
    return {"calls": [[LINKS, *(word for path, target in pairs for word in ("--link", f"{target}::{path}"))]]}


LINKS = "create-symlinks"


def with_hooks(common: Block, devices: list[Block], options: Options) -> tuple[Block, list[Block]]:
    """The same blocks with createContainer hooks in place of calls.  Our program and NVIDIA's take the same arguments.

    Our program does all calls in one process, in one hook of the whole file, because starting it costs more than all
    of its work.  A link to a device node it makes only when the container has that node.  NVIDIA's program does one
    call in each process.  Each hook sets its own environment.  Without one it would run with the container's
    (CVE-2025-23266).
    """
    if options.hook.rpartition("/")[2] != OUR_PROGRAM:
        return _separate(common, options), [_separate(block, options) for block in devices]
    calls = [call for block in (common, *devices) for call in block.get("calls", ())]
    link_words = [word for call in calls if call[0] == LINKS for word in call[1:]]
    other_calls = [call for call in calls if call[0] != LINKS]
    words = [OUR_PROGRAM]
    for call in ([[LINKS, *link_words]] if link_words else []) + other_calls:
        words += ["--", *call] if len(words) > 1 else call
    result = merged({**common, "calls": []}, {"hooks": [_hook(options, words)]} if len(words) > 1 else {})
    return result, [merged({**block, "calls": []}) for block in devices]


def _separate(block: Block, options: Options) -> Block:
    """A block with one hook of NVIDIA's program for each call."""
    program = options.hook.rpartition("/")[2]
    first = [program, "hook"] if program == "nvidia-ctk" else [program]
    return merged(
        {**block, "calls": []}, {"hooks": [_hook(options, [*first, *call]) for call in block.get("calls", ())]}
    )


def _hook(options: Options, words: list[str]) -> Document:
    return {"hookName": "createContainer", "path": options.hook, "args": words, "env": list(SAFE_HOOK_ENV)}
