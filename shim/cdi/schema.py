"""The fields of a CDI file and their types, as tables of decoders.

A decoder takes (value, at, problems).  It returns the decoded value, or reports a problem with its JSON path and
returns None.  Decoding goes on after a problem, so that all of them are found.
A null counts as an absent field.  An unquoted scalar in a string field becomes its text.  An unknown field is an error.
Source: CDI SPEC.md 1.1.0, "JSON Definition".  As strict as release 1.1.2 of the CDI Go library.
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Union

from shim.cdi.yamltext import Scalar

# (the path of what encloses it, key or index); None is the whole file.  Only a problem turns it into text.
JsonPath = Optional[tuple[Any, Union[str, int]]]
Problems = dict[str, str]  # JSON path -> what is wrong there
Decoder = Callable[[Any, JsonPath, Problems], Any]


def json_path(at: JsonPath) -> str:
    """The JSON path as text: `devices[0].containerEdits.env[1]`; the whole file is `.`."""
    parts = []
    while at is not None:
        at, key = at
        parts.append(f"[{key}]" if isinstance(key, int) else f".{key}")
    return "".join(reversed(parts)).lstrip(".") or "."


def report(problems: Problems, at: JsonPath, what: str) -> None:
    """Records a problem.  The first one of a path stays, since later ones mostly follow from it."""
    problems.setdefault(json_path(at), what)


def _described(value: Any) -> str:
    words = {dict: "a mapping", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return words.get(type(value)) or _as_text(value)


def _as_text(value: Any) -> str:
    """The text that a scalar of another type becomes in a string field; '' for null."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.text if type(value) is Scalar else str(value)


def text(value: Any, at: JsonPath, problems: Problems) -> Any:
    """Decodes a string."""
    if type(value) is str:
        if value.isascii() and "\0" not in value:
            return value
    elif isinstance(value, (dict, list)):
        return report(problems, at, f"must be a string, not {_described(value)}")
    else:
        return _as_text(value)
    try:
        value.encode()
    except UnicodeEncodeError:
        return report(problems, at, "holds half of a surrogate pair")
    # A path or a variable with a NUL would reach the kernel cut off.
    return value if "\0" not in value else report(problems, at, "holds a NUL character")


def flag(value: Any, at: JsonPath, problems: Problems) -> Any:
    """Decodes true or false."""
    if type(value) is Scalar and isinstance(value.value, bool):
        value = value.value
    if isinstance(value, bool):
        return value
    return report(problems, at, f"must be true or false, not {_described(value)}")


def integer(low: int, high: int) -> Decoder:
    """A decoder of whole numbers from `low` to `high`."""

    def decode(value: Any, at: JsonPath, problems: Problems) -> Any:
        written = value
        if type(value) is Scalar:
            value = value.value
        if type(value) is float and value.is_integer():
            value = int(value)
        if value is None:  # only an element of a list: record() leaves null fields out
            return 0
        if type(value) is not int:  # a fraction as well, which the library would cut: 1.5 would be device 1
            return report(problems, at, f"must be a whole number, not {_described(written)}")
        if not low <= value <= high:
            return report(problems, at, f"must be from {low} to {high}, not {value}")
        return value

    return decode


def list_of(item: Decoder) -> Decoder:
    """A decoder of lists whose elements `item` decodes."""

    def decode(value: Any, at: JsonPath, problems: Problems) -> Any:
        if type(value) is not list:
            return report(problems, at, f"must be a list, not {_described(value)}")
        return [item(element, (at, index), problems) for index, element in enumerate(value)]

    return decode


def texts(value: Any, at: JsonPath, problems: Problems) -> Any:
    """Decodes a mapping of strings."""
    if type(value) is not dict:
        return report(problems, at, f"must be a mapping, not {_described(value)}")
    return {key: text(item, (at, key), problems) for key, item in value.items()}


def record(fields: dict[str, Decoder]) -> Decoder:
    """A decoder of objects with these fields; `fields`: name -> decoder."""

    def decode(value: Any, at: JsonPath, problems: Problems) -> Any:
        if type(value) is not dict:
            report(problems, at, f"must be a mapping, not {_described(value)}")
            return {}
        items = {}
        for key, item in value.items():
            decoder = fields.get(key)
            if decoder is None:
                report(problems, (at, key), _unknown(key, fields))
            elif item is not None:
                decoded = decoder(item, (at, key), problems)
                if decoded is not None:
                    items[key] = decoded
        return items

    return decode


def _unknown(key: str, fields: dict[str, Decoder]) -> str:
    alike = [name for name in fields if name.lower() == key.lower()]
    return f"unknown field; write {alike[0]}" if alike else f"unknown field; known are {', '.join(sorted(fields))}"


# The kernel's device numbers have 12 and 20 bits (include/linux/kdev_t.h).  mknod would cut a larger number to that of
# another device, and in a device rule of a control group -1 means every device.  The CDI Go library refuses negative
# numbers; we refuse both.
_MAJOR = integer(0, (1 << 12) - 1)
_MINOR = integer(0, (1 << 20) - 1)
# Only permission bits: runtimes add the bits of the type, and a mode with 060000 would turn type c into a block device.
_MODE = integer(0, 0o7777)
_ID = integer(0, (1 << 32) - 2)  # chown(2) takes the largest number for -1: leave the owner unchanged
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
