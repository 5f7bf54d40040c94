"""Turns Edits into NRI's ContainerAdjustment.

A runtime silently skips fields that it does not know.  So a table says what each runtime takes, and anything else is
refused with the way out.  Limits on huge pages are refused, too, although NRI has a field for them: containerd takes
them out again in its default configuration, and the plugin is not told which configuration it has.  Pure.

Sources: NRI's runtime-tools/generate (what is done with each field), and config.json as containerd 1.7.24 and 2.1.9
wrote it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from shim import edits as _edits
from shim.edits import Edits, merge
from shim.errors import ChandlerError
from shim.keys import common
from shim.nri.messages import ContainerAdjustment
from shim.oci import reader, writer

if TYPE_CHECKING:
    from shim.edits import DeviceNode, Edit, Hook, Mount
    from shim.engine import Plan
    from shim.shapes import Document

CDI_NAMES = "devices by CDI name"
WAY_OUT = "start this pod with the runtime handler of chandler-runtime (runtimeClassName)"

# What every runtime with NRI takes of linux.resources, as (controller, key).
_BASE: frozenset[Any] = frozenset(
    (("cpu", "shares"), ("cpu", "quota"), ("cpu", "period"), ("cpu", "cpus"), ("memory", "limit"), ("memory", "swap"))
)
_NEWER = _BASE | {("pids", "limit"), "oomScoreAdj", CDI_NAMES}
# (runtime, its first version, what it takes).  The first entry that fits counts; a runtime without one gets _BASE.
SUPPORT: tuple[tuple[str, tuple[int, ...], frozenset[Any]], ...] = (
    ("containerd", (2, 0), _NEWER),
    ("containerd", (0,), _BASE),
    ("cri-o", (0,), _BASE),
)

_HOOKS = {
    "prestart": "prestart",
    "createRuntime": "create_runtime",
    "createContainer": "create_container",
    "startContainer": "start_container",
    "poststart": "poststart",
    "poststop": "poststop",
}
# The accesses that fit the device rule that NRI adds.  Whether m (mknod) is among them makes no difference, since the
# container finds its node made.
_RULE = ("", "rw", "wr", "rwm", "rmw", "wrm", "wmr", "mrw", "mwr")
_MAX_KEPT = 4096  # entries of each of the two caches below, which save serializing the same edit for every container
# By id() of the mount: (mount, bytes).  The cache keeps the mount, so that no other object gets its id.
_mounts: dict[int, tuple[Any, bytes]] = {}
_devices: dict[Any, bytes] = {}
_REMOVAL = "-"  # NRI removes a variable whose name begins with this
# (controller, key) of linux.resources: the request's name for it
_ASKED = {row[2:4]: key for key, row in common.LIMITS.items()}


class Unsupported(ChandlerError):
    """NRI cannot express what the container is to get, or this runtime does not take it."""


class Runtime(NamedTuple):
    """The runtime at the other end, by the name and version that it gave."""

    name: str
    version: str

    @property
    def takes(self) -> frozenset[Any]:
        """What it takes, by SUPPORT."""
        number = _number(self.version)
        return next((takes for name, first, takes in SUPPORT if name == self.name and number >= first), _BASE)

    def __str__(self) -> str:
        return f"{self.name or 'the runtime'} {self.version}".strip()


def _number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version such as v2.1.9~ds1; of anything else ()."""
    numbers: list[int] = []
    for part in version.lstrip("v").split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits.isascii() or not digits or len(digits) > 9:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def adjustment(plan: Plan, runtime: Runtime, document: Document) -> Any:
    """The ContainerAdjustment with the plan's edits, for a container with the config.json `document`.

    Raises Unsupported.
    """
    result = ContainerAdjustment()
    if plan.by_cdi and CDI_NAMES in runtime.takes:
        for name in plan.by_cdi:
            result.CDI_devices.add(name=name)
        _apply(result, _edits_beside_cdi(plan), runtime, document)
    else:
        _apply(result, plan.edits, runtime, document)
    return result


def nodes(plan: Plan) -> list[tuple[str, str, int, int]]:
    """(path, type, major, minor) of every device node that the adjusted container has."""
    by_path = {
        path: (path, node["type"], node.get("major", 0), node.get("minor", 0))
        for _, path, node, _ in plan.edits.of(_edits.DEVICE)
    }
    return list(by_path.values())


def _edits_beside_cdi(plan: Plan) -> Edits:
    """The edits that are left when the runtime itself injects the CDI devices.

    A variable that a CDI device sets last is left out, so that ours does not replace it.
    """
    left = merge(*plan.own_edits)
    final = {edit[1]: edit[2] for edit in plan.edits.of(_edits.ENV)}
    return Edits([edit for edit in left.items if edit[0] != _edits.ENV or final[edit[1]] == edit[2]])


def _apply(result: Any, edits: Edits, runtime: Runtime, document: Document) -> None:
    idmap = reader.in_user_namespace(document)
    user = reader.process_user(document)
    devices: dict[str, bytes] = {}
    mounts: list[bytes] = []
    for edit in edits.items:
        kind = edit[0]
        if kind == _edits.MOUNT:  # first, as most edits are mounts
            mounts.append(_mount(writer.idmapped(edit[2]) if idmap else edit[2]))
        elif kind == _edits.DEVICE:
            devices.pop(edit[1], None)  # the later node of a path wins, and takes the later place
            devices[edit[1]] = _device(edit, runtime, user)
        elif kind == _edits.ENV:
            _env(result, edit, runtime)
        elif kind == _edits.HOOK:
            _hook(result, edit, runtime)
        elif kind == _edits.RESOURCE:
            _resource(result, edit, runtime, edits)
        elif kind == _edits.ANNOTATION:
            result.annotations[edit[1]] = edit[2]
        elif kind == _edits.RLIMIT:
            _rlimit(result, edit, runtime, reader.rlimits(document))
        elif kind == _edits.LINUX and edit[1] == "cgroupsPath" and edit[2]:
            result.linux.cgroups_path = edit[2]
        elif kind == _edits.PROCESS and edit[1] in runtime.takes:
            result.linux.oom_score_adj.value = edit[2]
        else:
            _refuse(edit, f"{kind} {edit[1]}".strip(), runtime)
    result.MergeFromString(b"".join([*devices.values(), *mounts]))


def _refuse(edit: Edit, what: str, runtime: Runtime) -> NoReturn:
    raise Unsupported(f"{edit[3]}: {runtime} cannot be told {what} through NRI", WAY_OUT)


def _env(result: Any, edit: Edit, runtime: Runtime) -> None:
    if edit[1].startswith(_REMOVAL):
        _refuse(edit, f"env.{edit[1]}, a name that begins with a hyphen,", runtime)
    result.env.add(key=edit[1], value=edit[2])


def _device(edit: Edit, runtime: Runtime, user: dict[str, int]) -> bytes:
    """An adjustment with only this device, as bytes; see `_mount`."""
    node: DeviceNode
    _, path, node, _ = edit
    access = node.get("permissions") or ""
    if access not in _RULE or node["type"] not in ("b", "c"):
        _refuse(edit, f"that {path} is a device of type {node['type']!r} with the access {access or 'rwm'!r}", runtime)
    uid, gid = node.get("uid"), node.get("gid")
    key = (
        path,
        node["type"],
        node.get("major", 0),
        node.get("minor", 0),
        node.get("fileMode"),
        user["uid"] or None if uid is None else uid,
        user["gid"] or None if gid is None else gid,
    )
    cached = _devices.get(key)
    if cached is None:
        if len(_devices) >= _MAX_KEPT:
            _devices.clear()
        cached = _devices[key] = _device_bytes(*key)
    return cached


def _device_bytes(path: str, kind: str, major: int, minor: int, mode: Any, uid: Any, gid: Any) -> bytes:
    single = ContainerAdjustment()
    device = single.linux.devices.add(path=path, type=kind, major=major, minor=minor)
    for field, value in ((device.file_mode, mode), (device.uid, uid), (device.gid, gid)):
        if value is not None:
            field.value = value
    data: bytes = single.SerializeToString()
    return data


def _mount(mount: Mount) -> bytes:
    """An adjustment with only this mount, as bytes.

    Serialized messages can be concatenated: the result is one adjustment with the mounts of all.  The mounts of a CDI
    file are the same objects as long as its inventory lives, so each is serialized once.
    """
    cached = _mounts.get(id(mount))
    if cached is None or cached[0] is not mount:
        single = ContainerAdjustment()
        single.mounts.add(
            destination=mount["destination"],
            type=mount.get("type") or "",
            source=mount.get("source") or "",
            options=mount.get("options") or [],
        )
        if len(_mounts) >= _MAX_KEPT:
            _mounts.clear()
        cached = _mounts[id(mount)] = (mount, single.SerializeToString())
    return cached[1]


def _hook(result: Any, edit: Edit, runtime: Runtime) -> None:
    hook: Hook
    _, stage, hook, _ = edit
    if stage not in _HOOKS:
        _refuse(edit, f"a hook of the stage {stage!r}", runtime)
    message = getattr(result.hooks, _HOOKS[stage]).add(
        path=hook["path"], args=hook.get("args") or [], env=hook.get("env") or []
    )
    if hook.get("timeout") is not None:
        message.timeout.value = hook["timeout"]


def _rlimit(result: Any, edit: Edit, runtime: Runtime, present: Document) -> None:
    _, name, value, _ = edit
    if name in present:  # runtimes append ours, and config.json must not have two of one type
        _refuse(edit, f"another {name} than the engine's", runtime)
    result.rlimits.add(type=name, hard=value["hard"], soft=value["soft"])


def _resource(result: Any, edit: Edit, runtime: Runtime, edits: Edits) -> None:
    _, key, value, _ = edit
    asked = f"resources.{_ASKED.get(key, '.'.join(key))}"
    if key not in runtime.takes:
        _refuse(edit, asked, runtime)
    resources = result.linux.resources
    if key == ("memory", "swap"):
        # A runtime that is told a memory limit sets swap to the same value, whatever the swap field says.
        limit = next((other[2] for other in edits.of(_edits.RESOURCE) if other[1] == ("memory", "limit")), None)
        if value != limit:
            _refuse(edit, f"{asked} other than resources.memory", runtime)
    controller, name = key
    message = getattr(resources, controller)
    if key in (("cpu", "cpus"), ("pids", "limit")):
        setattr(message, name, value)
    else:
        getattr(message, name).value = value
