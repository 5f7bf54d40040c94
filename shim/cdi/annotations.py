"""Reads and writes annotations that ask for CDI devices: `cdi.k8s.io/<plugin>_<device id>` = `name,name…`.

Source: CDI Go library, pkg/cdi/annotations.go.  Part of the create path: imports only shim.errors and names.
"""

from __future__ import annotations

from shim import errors
from shim.cdi.names import parse_qualified

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

PREFIX = "cdi.k8s.io/"
MAX_NAME = 63  # characters of a key after its prefix: the limit of Kubernetes

_ENDS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_MIDDLE = _ENDS + "_-."


def key(plugin: str, device_id: str) -> str:
    """The annotation key for the device that `plugin` allocated as `device_id`, whose slashes become underscores.

    Raises CdiError if a part is empty, or if Kubernetes would not accept the key.
    """
    if not plugin or not device_id:
        raise errors.CdiError("a CDI annotation key needs a plugin name and a device id")
    name = f"{plugin}_{device_id.replace('/', '_')}"
    if len(name) > MAX_NAME:
        raise errors.CdiError(f'CDI annotation name "{name}" is longer than {MAX_NAME} characters')
    if name[0] not in _ENDS or name[-1] not in _ENDS:
        raise errors.CdiError(f'CDI annotation name "{name}" does not start and end with a letter or digit')
    rest = name.lstrip(_MIDDLE)
    if rest:
        raise errors.CdiError(f'CDI annotation name "{name}" holds the character {rest[0]!r}')
    return PREFIX + name


def value(devices: Iterable[str]) -> str:
    """The annotation value that asks for `devices`.  Raises CdiError if one of them is not a qualified name."""
    names = list(devices)
    for name in names:
        parse_qualified(name)
    return ",".join(names)


def parse(annotations: Mapping[str, Any]) -> list[str]:
    """The devices that all CDI annotations ask for, in the order of the sorted keys, duplicates kept.

    Raises CdiError, which names the key, if any part of any value is not a qualified name.  An empty value, a trailing
    comma and a space are errors too, so that no annotation is understood only in part.
    """
    devices: list[str] = []
    for annotation in sorted(each for each in annotations if each.startswith(PREFIX)):
        text = annotations[annotation]
        if not isinstance(text, str):
            raise errors.CdiError(f"annotation {annotation} is not a string")
        for name in text.split(","):
            try:
                parse_qualified(name)
            except errors.CdiError as error:
                raise error.within(f"annotation {annotation}") from None
            devices.append(name)
    return devices
