"""Checks a decoded CDI file for everything that a schema of types cannot express.

Every check reports into the table of problems and goes on, so that one run finds all problems.
Source: CDI SPEC.md, "Kind", "CDI Devices" and "OCI Edits"; CDI Go library 1.1.2, pkg/cdi/container-edits.go (Validate).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

from shim.cdi import names, versions
from shim.cdi.schema import report
from shim.errors import CdiError

if TYPE_CHECKING:
    from shim.cdi.schema import JsonPath, Problems
    from shim.shapes import Document

NODE_TYPES = ("", "b", "c", "u", "p")
HOOK_STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
MAX_CLOS_ID = 4095  # bytes
MAX_ANNOTATIONS = 256 << 10  # characters of all keys and values together
MAX_ANNOTATION_PREFIX = 253  # characters of a key before the slash
MAX_ANNOTATION_NAME = 63  # characters of a key after the slash

_LOWER = "abcdefghijklmnopqrstuvwxyz0123456789"


def check(file: Document, problems: Problems) -> None:
    """Reports the problems of a decoded file, in the order of the CDI Go library."""
    _version(file, problems)
    _kind(file.get("kind", ""), problems)
    _annotations(file.get("annotations", {}), (None, "annotations"), problems)
    _edits(file.get("containerEdits", {}), (None, "containerEdits"), problems)
    devices = file.get("devices", ())
    if not devices:
        report(problems, (None, "devices"), "must hold at least one device")
    for index, device in enumerate(devices):
        _device(device, ((None, "devices"), index), problems)
    _unique(devices, "name", (None, "devices"), problems)


def _version(file: Document, problems: Problems) -> None:
    at = (None, "cdiVersion")
    declared = file.get("cdiVersion", "")
    version = versions.normal(declared)
    if version is None:
        report(problems, at, f'unknown version "{declared}"; known are {versions.FLOOR} to {versions.KNOWN[-1]}')
        return
    minimum, reason = versions.minimum(file)
    if versions.older(version, minimum):
        needs = f"{reason} needs" if reason else "the oldest supported is"
        report(problems, at, f"{needs} {minimum}, but the file declares {version}")


def _kind(kind: str, problems: Problems) -> None:
    try:
        vendor, class_ = names.split_kind(kind)
        names.check_vendor(vendor)
        names.check_class(class_)
    except CdiError as error:
        report(problems, (None, "kind"), error.what)


def _device(device: Document, at: JsonPath, problems: Problems) -> None:
    try:
        names.check_device(device.get("name", ""))
    except CdiError as error:
        report(problems, (at, "name"), error.what)
    _annotations(device.get("annotations", {}), (at, "annotations"), problems)
    edits = device.get("containerEdits", {})
    if not any(edits.values()) and "intelRdt" not in edits:  # an empty intelRdt counts as an edit
        report(problems, (at, "containerEdits"), "must hold at least one edit")
    _edits(edits, (at, "containerEdits"), problems)


def _annotations(annotations: Document, at: JsonPath, problems: Problems) -> None:
    for key in annotations:
        if not _annotation_key(key.lower()):
            report(problems, (at, key), "the key is not [prefix/]name of letters, digits, - _ .")
    if sum(len(key) + len(value or "") for key, value in annotations.items()) > MAX_ANNOTATIONS:
        report(problems, at, f"more than {MAX_ANNOTATIONS} characters of annotations")


def _annotation_key(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    if slash and len(prefix) > MAX_ANNOTATION_PREFIX:
        return False
    labels = prefix.split(".") if slash else []
    return _is_label(name, _LOWER + "-_.", MAX_ANNOTATION_NAME) and all(
        _is_label(label, _LOWER + "-", MAX_ANNOTATION_PREFIX) for label in labels
    )


def _is_label(name: str, middle: str, limit: int) -> bool:
    """Whether a name begins and ends with a letter or digit, and has only characters of `middle` between."""
    return 0 < len(name) <= limit and name[0] in _LOWER and name[-1] in _LOWER and not name.strip(middle)


def _edits(edits: Document, at: JsonPath, problems: Problems) -> None:
    for category, check_item in _ITEMS.items():
        for index, item in enumerate(edits.get(category, ())):
            check_item(item, ((at, category), index), problems)
    _closid(edits.get("intelRdt", {}).get("closID", ""), ((at, "intelRdt"), "closID"), problems)
    for field in ("hostInterfaceName", "name"):
        _unique(edits.get("netDevices", ()), field, (at, "netDevices"), problems)


def _closid(name: str, at: JsonPath, problems: Problems) -> None:
    # A class of service is a directory in the kernel's resctrl file system, and "/" is its root class.
    usable = name not in (".", "..") and "/" not in name and "\n" not in name and len(name.encode()) <= MAX_CLOS_ID
    if not usable and name != "/":
        report(problems, at, f"{name[:64]!r} is not the name of a class of service")


def _unique(records: list[Document], field: str, at: JsonPath, problems: Problems) -> None:
    first: dict[str, int] = {}
    for index, item in enumerate(records):
        value = item.get(field, "")
        if first.setdefault(value, index) != index:
            report(problems, ((at, index), field), f'"{value}" is also that of number {first[value]}')


def _needs(item: Document, fields: list[str], at: JsonPath, problems: Problems) -> None:
    for field in fields:
        if not item.get(field):
            report(problems, (at, field), "must not be empty")


def _env(variable: Any, at: JsonPath, problems: Problems) -> None:
    if variable is not None and variable.find("=") < 1:
        report(problems, at, f'"{variable}" is not of the form NAME=value')


def _node(node: Document, at: JsonPath, problems: Problems) -> None:
    _needs(node, ["path"], at, problems)
    kind, permissions = node.get("type", ""), node.get("permissions", "")
    if kind not in NODE_TYPES:
        report(problems, (at, "type"), f'"{kind}" is not one of b, c, u, p')
    if permissions != "none" and permissions.strip("rwm"):
        report(problems, (at, "permissions"), f'"{permissions}" is neither made of r, w, m nor "none"')


def _net_device(device: Document, at: JsonPath, problems: Problems) -> None:
    _needs(device, ["hostInterfaceName", "name"], at, problems)


def _hook(hook: Document, at: JsonPath, problems: Problems) -> None:
    stage = hook.get("hookName", "")
    if stage not in HOOK_STAGES:
        report(problems, (at, "hookName"), f'"{stage}" is not one of {", ".join(HOOK_STAGES)}')
    _needs(hook, ["path"], at, problems)
    for index, variable in enumerate(hook.get("env", ())):
        _env(variable, ((at, "env"), index), problems)


def _mount(mount: Document, at: JsonPath, problems: Problems) -> None:
    _needs(mount, ["hostPath", "containerPath"], at, problems)


_ITEMS: dict[str, Callable[[Any, JsonPath, Problems], None]] = {
    "env": _env,
    "deviceNodes": _node,
    "hooks": _hook,
    "mounts": _mount,
    "netDevices": _net_device,
}
