"""The fields of a CDI file and their types, as a table; decoding collects every problem with its JSON path.

Source: CDI SPEC.md 1.1.0, "JSON Definition"; as strict as release 1.1.2 of the CDI Go library.  A null
is an absent field; an unquoted scalar in a string field is its text; an unknown field is an error.
"""

from __future__ import annotations

from shim.cdi.yamltext import Scalar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, Optional, Tuple, Union

    Place = Optional[Tuple[Any, Union[str, int]]]  # (the place around, key or index), written out only in a problem
    Problems = Dict[str, str]  # JSON path -> what is wrong there
    Decoder = Callable[[Any, Place, Problems], Any]


def where(place: Place) -> str:
    """A place as a JSON path: `devices[0].containerEdits.env[1]`; the whole file is `.`."""
    parts = []
    while place is not None:
        place, key = place
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    return "".join(reversed(parts)).lstrip(".") or "."


def report(problems: Problems, place: Place, what: str) -> None:
    """Note a problem; the first one at a place stays, since later ones are mostly its consequence."""
    problems.setdefault(where(place), what)


def _shown(value: Any) -> str:
    words = {dict: "a mapping", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return words.get(type(value)) or _as_text(value)


def _as_text(value: Any) -> str:
    """What a scalar that is not a string is in a string field; JSON's true has one spelling, and null is nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.text if type(value) is Scalar else str(value)


def text(value: Any, place: Place, problems: Problems) -> Any:
    if type(value) is str:
        if value.isascii() and "\0" not in value:
            return value
    elif isinstance(value, (dict, list)):
        return report(problems, place, f"must be a string, not {_shown(value)}")
    else:
        return _as_text(value)
    try:
        value.encode()
    except UnicodeEncodeError:
        return report(problems, place, "holds half of a surrogate pair")
    # A path or variable with it could never reach the kernel whole.
    return value if "\0" not in value else report(problems, place, "holds a NUL character")


def flag(value: Any, place: Place, problems: Problems) -> Any:
    if type(value) is Scalar and isinstance(value.value, bool):
        value = value.value
    if isinstance(value, bool):
        return value
    return report(problems, place, f"must be true or false, not {_shown(value)}")


def integer(low: int, high: int) -> Decoder:
    def decode(value: Any, place: Place, problems: Problems) -> Any:
        written = value
        if type(value) is Scalar:
            value = value.value
        if type(value) is float and value.is_integer():
            value = int(value)
        if value is None:  # only inside a list; a field would be absent
            return 0
        if type(value) is not int:  # a fraction, too, which the library cuts: 1.5 would be device 1
            return report(problems, place, f"must be a whole number, not {_shown(written)}")
        if not low <= value <= high:
            return report(problems, place, f"must be from {low} to {high}, not {value}")
        return value

    return decode


def list_of(item: Decoder) -> Decoder:
    def decode(value: Any, place: Place, problems: Problems) -> Any:
        if type(value) is not list:
            return report(problems, place, f"must be a list, not {_shown(value)}")
        return [item(one, (place, index), problems) for index, one in enumerate(value)]

    return decode


def texts(value: Any, place: Place, problems: Problems) -> Any:
    if type(value) is not dict:
        return report(problems, place, f"must be a mapping, not {_shown(value)}")
    return {key: text(one, (place, key), problems) for key, one in value.items()}


def record(fields: Dict[str, Decoder]) -> Decoder:
    def decode(value: Any, place: Place, problems: Problems) -> Any:
        if type(value) is not dict:
            report(problems, place, f"must be a mapping, not {_shown(value)}")
            return {}
        found = {}
        for key, one in value.items():
            field = fields.get(key)
            if field is None:
                report(problems, (place, key), _unknown(key, fields))
            elif one is not None:
                decoded = field(one, (place, key), problems)
                if decoded is not None:
                    found[key] = decoded
        return found

    return decode


def _unknown(key: str, fields: Dict[str, Decoder]) -> str:
    alike = [name for name in fields if name.lower() == key.lower()]
    return f"unknown field; write {alike[0]}" if alike else f"unknown field; known are {', '.join(sorted(fields))}"


# The kernel's device numbers have 12 and 20 bits (include/linux/kdev_t.h): mknod would cut a larger one to another
# device's, and in a rule of a control group -1 means every device.  The library refuses what is negative; we refuse
# both.
_MAJOR = integer(0, (1 << 12) - 1)
_MINOR = integer(0, (1 << 20) - 1)
# Permissions alone: runtimes add the bits of the type, and 060000 of a mode would turn type c into a block device.
_MODE = integer(0, 0o7777)
_ID = integer(0, (1 << 32) - 2)  # the last number is -1 to chown(2), which leaves the owner as it is
_INT64 = integer(-(1 << 63), (1 << 63) - 1)
_TEXT_LIST = list_of(text)

DEVICE_NODE = record(
    {
        "path": text,
        "hostPath": text,
        "type": text,
        "major": _MAJOR,
        "minor": _MINOR,
        "fileMode": _MODE,
        "permissions": text,
        "uid": _ID,
        "gid": _ID,
    }
)
NET_DEVICE = record({"hostInterfaceName": text, "name": text})
MOUNT = record({"hostPath": text, "containerPath": text, "options": _TEXT_LIST, "type": text})
HOOK = record({"hookName": text, "path": text, "args": _TEXT_LIST, "env": _TEXT_LIST, "timeout": _INT64})
INTEL_RDT = record(
    {
        "closID": text,
        "l3CacheSchema": text,
        "memBwSchema": text,
        "schemata": _TEXT_LIST,
        "enableMonitoring": flag,
    }
)
EDITS = record(
    {
        "env": _TEXT_LIST,
        "deviceNodes": list_of(DEVICE_NODE),
        "netDevices": list_of(NET_DEVICE),
        "hooks": list_of(HOOK),
        "mounts": list_of(MOUNT),
        "intelRdt": INTEL_RDT,
        "additionalGids": list_of(_ID),
    }
)
DEVICE = record({"name": text, "annotations": texts, "containerEdits": EDITS})
SPEC = record(
    {
        "cdiVersion": text,
        "kind": text,
        "annotations": texts,
        "devices": list_of(DEVICE),
        "containerEdits": EDITS,
    }
)
