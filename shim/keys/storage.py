"""Rows of the keys that show the container files of the host: storage and devices.  Pure."""

from __future__ import annotations

from shim import errors
from shim.edits import DEVICE, MOUNT
from shim.keys.row import HOST, NAMED, Row
from shim.policy import patterns
from shim.request import objects, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Callable

    from shim.keys.host_facts import Facts
    from shim.keys.row import Change
    from shim.shapes import Config, Document

# YAML reads 0777 as the number 511, and 511 is a mode in octal, too.  So a number is refused when it is the value of
# one of these modes: it may be that mode, written with a 0 before it.
_USUAL_MODES = frozenset(
    int(mode, 8)
    for mode in "1777 1775 1770 1755 1750 777 775 771 770 757 755 750 711 700 666 664 "
    "660 644 640 600 555 550 500 444 440 400".split()
)


def _target(value: Any) -> str:
    text = objects.path(value.rstrip("/") or "/" if isinstance(value, str) else value)
    if text == "/":
        raise errors.RequestError("/ cannot be mounted over")
    return text


def _device_path(value: Any) -> str:
    text = objects.path(value)
    if not text.startswith("/dev/"):
        raise values.wrong_value(value, "is not below /dev")
    return text


def _name(value: Any) -> str:
    """The name of a volume or a bucket."""
    text = values.text(value, 255)
    if set(text) - objects.LETTERS - set("._-") or text.startswith((".", "-")):
        raise values.wrong_value(value, "is no name: letters, digits, dots, hyphens and underscores")
    return text


def _prefix(value: Any) -> str:
    text = objects.string(value)
    if not text.isprintable() or ".." in text.split("/"):
        raise values.wrong_value(value, "is no prefix of a bucket")
    return text


def _mode(value: Any) -> str:
    """A file mode in octal, as a text of four digits."""
    text = str(value) if type(value) is int else values.text(value, 8)
    if set(text) - set("01234567") or len(text) > 5 or int(text, 8) > 0o7777:
        raise values.wrong_value(value, "is no mode", 'write it in octal, as a text: "1777"')
    if type(value) is int and value in _USUAL_MODES:
        raise errors.RequestError(
            f"{value} may be meant as {value:o}, which YAML reads as {value} when it begins with 0",
            f'write it as a text: "{value:o}"',
        )
    return f"{int(text, 8):04o}"


_TIER = values.word("local", "cached", "network")
# type of storage: (its members and their checks, the members that must be there)
TYPES: dict[str, tuple[dict[str, Callable[[Any], Any]], tuple[str, ...]]] = {
    "bind": ({"source": objects.path, "target": _target, "readonly": objects.boolean}, ("source", "target")),
    "named": (
        {"name": _name, "target": _target, "readonly": objects.boolean, "tier": _TIER, "size": objects.size},
        ("name", "target"),
    ),
    "anonymous": ({"target": _target, "tier": _TIER}, ("target",)),
    "tmpfs": ({"target": _target, "size": objects.size, "mode": _mode}, ("target",)),
    # Chandler mounts no bucket itself.  Whoever prepared the volume used the endpoint and the credentials, so both are
    # accepted here and dropped.
    "s3": (
        {
            "bucket": _name,
            "prefix": _prefix,
            "target": _target,
            "readonly": objects.boolean,
            "endpoint": values.text,
            "credentials": lambda value: None,
        },
        ("bucket", "target"),
    ),
}


def _storage(value: Any) -> Document:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in TYPES:
        raise values.wrong_value(kind, "is no type of storage", f"known: {', '.join(TYPES)}")
    members, needed = TYPES[kind]
    try:
        storage = objects.object_of(value, {"type": str, **members}, needed)
    except errors.RequestError as error:
        raise error.within(kind) from None
    return {key: item for key, item in storage.items() if key not in ("endpoint", "credentials")}


def _storages(value: Any) -> list[Document]:
    return _distinct(objects.listing(value, _storage), "target", "is mounted twice")


def _distinct(items: list[Document], key: str, what: str) -> list[Document]:
    """The items, no two of which may have the same path under `key`.  `what`: the end of the error."""
    paths = [item[key] for item in items]
    for path in paths:
        if paths.count(path) > 1:
            raise errors.RequestError(f"{path} {what}")
    return items


def volume(storage: Document) -> str:
    """The name of a storage's volume in [volumes] of the configuration and in policy.volumes."""
    if storage["type"] == "named":
        return str(storage["name"])
    if storage["type"] == "anonymous":
        return "_anon_" + str(storage["target"]).lstrip("/").replace("/", "_")
    return f"_s3_{storage['bucket']}_{storage.get('prefix', '')}"


def _storage_edits(value: list[Document], request: Document, document: Document, facts: Facts) -> list[Change]:
    items: list[Change] = []
    targets: dict[str, str] = {}  # path in the container, links followed: the target in the request
    for storage in value:
        target = facts.target(storage["target"], storage["type"])
        if target in targets:
            raise errors.RequestError(
                f"{storage['target']} and {targets[target]} are the same path in the image, {target}", "mount it once"
            )
        targets[target] = storage["target"]
        if storage["type"] == "tmpfs":
            options = ["nosuid", "nodev"]
            options += [f"{key}={storage[key]}" for key in ("size", "mode") if key in storage]
            mount = {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": options}
        else:
            directory = (
                facts.bind(storage["source"]) if storage["type"] == "bind" else facts.volume(volume(storage), storage)
            )
            options = ["rbind", "rprivate", "ro" if storage.get("readonly") else "rw"]
            mount = {"destination": target, "type": "bind", "source": directory, "options": options}
        items.append((MOUNT, target, mount))
    # a target inside another bind mount is a path of the host that others may change
    for _, outer, mount in items:
        if mount["type"] == "bind":
            for target, requested in targets.items():
                if target.startswith(outer + "/"):
                    facts.check_nested_target(
                        mount["source"], target[len(outer) :], f"{requested} lies in {targets[outer]}"
                    )
    return items


_ACCESS = {"read": True, "write": True, "mknod": False}  # kind of access: whether a device allows it by default


def _device(value: Any) -> Document:
    if isinstance(value, str):
        value = {"path": value}
    checks: dict[str, Callable[[Any], Any]] = {"path": _device_path, **dict.fromkeys(_ACCESS, objects.boolean)}
    device = objects.object_of(value, checks, ("path",))
    device = {"path": device["path"], **_ACCESS, **device}
    if not any(device[key] for key in _ACCESS):
        raise errors.RequestError(f"{device['path']} is asked for without any access", "leave it out")
    return device


def _devices(value: Any) -> list[Document]:
    return _distinct(objects.listing(value, _device), "path", "is named twice")


def _device_edits(value: list[Document], request: Document, document: Document, facts: Facts) -> list[Change]:
    items: list[Change] = []
    for device in value:
        access = "".join(key[0] for key in _ACCESS if device[key])
        items.append((DEVICE, device["path"], {**facts.device(device["path"]), "permissions": access}))
    return items


def _unlisted_storage(storages: list[Document], config: Config) -> Iterator[tuple[str, str, str]]:
    for storage in storages:
        if patterns.below(storage["target"], ["/proc", "/sys"]):
            yield "storage", f"{storage['target']} is the kernel's and cannot be mounted over", ""
        if storage["type"] == "bind":
            if not patterns.below(storage["source"], config["policy.bind-sources"]):
                yield "storage", f"prefix of {storage['source']}", "bind-sources"
        elif storage["type"] != "tmpfs" and not patterns.matches_any(config["policy.volumes"], volume(storage)):
            yield "storage", volume(storage), "volumes"


def _unlisted_devices(devices: list[Document], config: Config) -> Iterator[tuple[str, str, str]]:
    for device in devices:
        if not patterns.matches_any(config["policy.devices"], device["path"]):
            yield "devices", device["path"], "devices"


ROWS: dict[str, Row] = {
    "storage": Row(
        (_storages, objects.json_text),
        trust=HOST,
        words={f"storage.{kind}": NAMED if kind == "tmpfs" else HOST for kind in TYPES},
        asks=lambda value: [(f"storage.{storage['type']}", f"storage ({storage['type']})") for storage in value],
        unlisted=_unlisted_storage,
        edits=_storage_edits,
    ),
    "devices": Row((_devices, values.split_list), trust=HOST, unlisted=_unlisted_devices, edits=_device_edits),
}
