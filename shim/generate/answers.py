"""What generators are asked and what they answer, as values.  Pure."""

from __future__ import annotations

from shim import paths
from shim.cdi.compile import SAFE_HOOK_ENV
from shim.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

    from shim.generate.tree import HostTree

    # A CDI `containerEdits` in the making; `calls` are what hooks are to do, each a list of a hook's name and its words
    Block = Dict[str, List[Any]]

OUR_PROGRAM = "chandler-hook"

STRATEGIES = ("index", "uuid", "type-index")
DEFAULT_STRATEGIES = ("index", "uuid")
MODES = ("auto", "nvml", "proc", "management", "wsl", "csv", "gds", "gdrcopy", "mofed", "nvswitch", "imex")

# In the order in which a CDI file of ours names them.
CATEGORIES = ("env", "deviceNodes", "mounts", "calls", "hooks", "additionalGids")

MOUNT_OPTIONS = ("ro", "nosuid", "nodev", "rbind", "rprivate")
SOCKET_OPTIONS = ("nosuid", "nodev", "rbind", "rprivate", "noexec")


class Options:
    """How to generate: where the driver and the device nodes are, which names devices get, which hooks are used.

    `driver_root` and `dev_root` are directories of the host without a slash at their end ("" is the host's own root).
    `hook` is the program that does what CDI leaves to hooks: ours, `nvidia-cdi-hook` or `nvidia-ctk`.
    """

    __slots__ = ("driver_root", "dev_root", "strategies", "mode", "all", "hook")

    def __init__(
        self,
        driver_root: str = "",
        dev_root: Optional[str] = None,
        strategies: Sequence[str] = DEFAULT_STRATEGIES,
        mode: str = "auto",
        all: bool = True,
        hook: str = "",
    ) -> None:
        self.driver_root = driver_root.rstrip("/")
        # A driver container has its nodes in its own /dev, if it has one at all; see nodes.node.
        self.dev_root = self.driver_root if dev_root is None else dev_root.rstrip("/")
        self.strategies = tuple(name for name in STRATEGIES if name in strategies)
        self.mode = mode
        self.all = all
        self.hook = hook or paths.HOOK

    def recorded(self) -> Dict[str, Any]:
        """What differs from the defaults, for the file's annotation, so that it can be made again."""
        plain = Options()
        shown = {
            "driver-root": (self.driver_root, plain.driver_root),
            "dev-root": (self.dev_root, self.driver_root),
            "names": (list(self.strategies), list(plain.strategies)),
            "mode": (self.mode, plain.mode),
            "all": (self.all, plain.all),
        }
        return {key: value for key, (value, usual) in shown.items() if value != usual}

    @classmethod
    def from_record(cls, record: Dict[str, Any], hook: str = "") -> Options:
        """The options that `recorded` told of; HostError for what no version of ours would write."""
        try:
            made = cls(
                str(record.get("driver-root", "")),
                record.get("dev-root"),
                [str(name) for name in record.get("names", DEFAULT_STRATEGIES)],
                str(record.get("mode", "auto")),
                bool(record.get("all", True)),
                hook,
            )
        except (AttributeError, TypeError):
            raise HostError("the options recorded in the file are damaged") from None
        if made.mode not in MODES or not made.strategies:
            raise HostError("the options recorded in the file are not known to this version")
        return made


class Unanswered(Exception):
    """Nobody on this host can be asked; the text is the reason."""


class Device:
    """A device to be: its names by strategy, its own edits, and its line in the file's `layout` annotation."""

    __slots__ = ("names", "edits", "layout", "annotations")

    def __init__(
        self, names: Dict[str, str], edits: Block, layout: str, annotations: Optional[Dict[str, str]] = None
    ) -> None:
        self.names = names
        self.edits = edits
        self.layout = layout
        self.annotations = annotations or {}


class Found:
    """What a generator found: devices, edits that all of them need, and what to say about it.

    `driver` is the driver's version, if it has one of its own.  `notes` are sentences for a person.  `watch` are
    paths whose change means that this may be true no longer.
    """

    __slots__ = ("kind", "devices", "common", "driver", "notes", "watch")

    def __init__(
        self,
        kind: str,
        devices: List[Device],
        common: Optional[Block] = None,
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
    """All edits of all blocks, each once, in order; of device nodes and mounts the first of a path counts."""
    result: Block = {}
    for category in CATEGORIES:
        items: Dict[str, Any] = {}
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
    tree: HostTree, options: Options, path: str, known: Optional[Tuple[str, int, int, int, int]] = None
) -> Optional[Block]:
    """A device node of the host with its numbers, so that injection survives its absence; its group where others
    may not open it.  `known` is what to say of a node that is not there; None when that is not known either.

    The node is looked for below `dev_root`, then in the host's own /dev, which a driver container shares.
    """
    host_path = options.dev_root + path
    found = tree.node(host_path)
    if found is None and options.dev_root == options.driver_root:
        found, host_path = tree.node(path), path
    if found is None:
        found = known
    if found is None:
        return None
    kind, major, minor, mode, group = found
    made: Dict[str, Any] = {"path": path}
    if host_path != path:
        made["hostPath"] = host_path
    made.update({"type": kind, "major": major, "minor": minor, "fileMode": mode, "permissions": "rwm"})
    if not group or mode & 0o006 == 0o006:
        return {"deviceNodes": [made]}
    # The runtime makes the node anew, root's; the group opens it only when the node has that group there, too.
    made["gid"] = group
    return {"deviceNodes": [made], "additionalGids": [group]}


def mount(options: Options, host_path: str, path: str, flags: Sequence[str] = MOUNT_OPTIONS) -> Dict[str, Any]:
    """A bind mount of `host_path`, which is inside the driver root, at `path`."""
    return {"hostPath": options.driver_root + host_path, "containerPath": path, "options": list(flags)}


def links(pairs: Sequence[Tuple[str, str]]) -> Block:
    """Symbolic links for a hook to make, given as (path, what it says); nothing for none."""
    if not pairs:
        return {}
    return {"calls": [[LINKS, *(word for path, target in pairs for word in ("--link", f"{target}::{path}"))]]}


LINKS = "create-symlinks"


def with_hooks(common: Block, own: List[Block], options: Options) -> Tuple[Block, List[Block]]:
    """The same blocks with createContainer hooks in the place of calls; the same words do for NVIDIA's program and ours.

    Ours does everything in one process, at file level: what it starts with costs more than all of its work, and it
    makes only those links to device nodes whose node the container has.  NVIDIA's does one thing at a time.
    A hook has an environment of its own, or it would run with the container's (CVE-2025-23266).
    """
    if options.hook.rpartition("/")[2] != OUR_PROGRAM:
        return _separate(common, options), [_separate(block, options) for block in own]
    calls = [call for block in (common, *own) for call in block.get("calls", ())]
    said = [word for call in calls if call[0] == LINKS for word in call[1:]]
    rest = [call for call in calls if call[0] != LINKS]
    words = [OUR_PROGRAM]
    for call in ([[LINKS, *said]] if said else []) + rest:
        words += ["--", *call] if len(words) > 1 else call
    result = merged({**common, "calls": []}, {"hooks": [_hook(options, words)]} if len(words) > 1 else {})
    return result, [merged({**block, "calls": []}) for block in own]


def _separate(block: Block, options: Options) -> Block:
    program = options.hook.rpartition("/")[2]
    first = [program, "hook"] if program == "nvidia-ctk" else [program]
    return merged(
        {**block, "calls": []}, {"hooks": [_hook(options, [*first, *call]) for call in block.get("calls", ())]}
    )


def _hook(options: Options, words: List[str]) -> Dict[str, Any]:
    return {"hookName": "createContainer", "path": options.hook, "args": words, "env": list(SAFE_HOOK_ENV)}
