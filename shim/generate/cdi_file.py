"""Makes a CDI file of what a generator found: names, common edits, the device `all`, version, annotations.  Pure.

Source: CDI SPEC.md, "JSON Definition" and "Released versions".
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from shim.cdi import spec, versions
from shim.cdi.names import check_device
from shim.errors import CdiError, HostError
from shim.generate.model import CATEGORIES, merged, with_hooks

if TYPE_CHECKING:
    from shim.generate.model import Block, Description, Options
    from shim.shapes import Document

# The annotations of a file that we made.  No container gets them.
DRIVER = "chandler.oci/driver-version"
LAYOUT = "chandler.oci/layout"
OPTIONS = "chandler.oci/options"
DIGEST = "chandler.oci/digest"  # of the rest of the file; another digest means that a person changed it


def document(description: Description, options: Options) -> Document:
    """The CDI document.  Raises HostError when a device would have no name, or two devices the same name."""
    common, device_edits = with_hooks(*_lifted(description), options)
    devices: list[Document] = []
    for device, edits in zip(description.devices, device_edits):
        names = [name for name in (device.names.get(strategy, "") for strategy in options.strategies) if _is_name(name)]
        if not names:
            wanted = " or ".join(options.strategies)
            raise HostError(
                f"{device.layout} has no name by {wanted} that could be read from this host",
                "choose another --device-name-strategy",
            )
        devices += [_device(name, device.annotations, edits) for name in dict.fromkeys(names)]
    if options.all and not any(device["name"] == "all" for device in devices):
        devices.append(_device("all", {}, merged(*device_edits)))
    seen = [device["name"] for device in devices]
    repeated = [name for index, name in enumerate(seen) if name in seen[:index]]
    if repeated:
        raise HostError(
            f"two devices of this host are both called {repeated[0]}", "choose another --device-name-strategy"
        )
    result: Document = {
        "cdiVersion": "",
        "kind": description.kind,
        "annotations": _annotations(description, options),
        "containerEdits": common,
        "devices": devices,
    }
    if not common:
        del result["containerEdits"]
    result["cdiVersion"] = versions.minimum(result)[0]
    result["annotations"][DIGEST] = own_digest(result)
    return result


def _annotations(description: Description, options: Options) -> dict[str, str]:
    result = {LAYOUT: _printable("; ".join(device.layout for device in description.devices))}
    if description.driver:
        result[DRIVER] = _printable(description.driver)
    recorded = options.recorded()
    if recorded:
        result[OPTIONS] = json.dumps(recorded, sort_keys=True)
    return result


def _printable(text: str) -> str:
    """The text with "?" for every character that is not printable ASCII."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


def _is_name(name: str) -> bool:
    try:
        check_device(name)
    except CdiError:
        return False
    return True


def _device(name: str, annotations: dict[str, str], edits: Block) -> Document:
    if not annotations:
        return {"name": name, "containerEdits": edits}
    return {"name": name, "annotations": dict(annotations), "containerEdits": edits}


def _lifted(description: Description) -> tuple[Block, list[Block]]:
    """The common edits, and each device's own edits.  Edits that all of several devices have become common edits.

    Device nodes stay in the devices when a device would have no node left, since CDI needs edits in every device.
    """
    device_edits = [merged(device.edits) for device in description.devices]
    if len(device_edits) < 2:
        return merged(description.common), device_edits
    shared: Block = {
        category: [
            item
            for item in device_edits[0].get(category, ())
            if all(item in edits.get(category, ()) for edits in device_edits[1:])
        ]
        for category in CATEGORIES
    }
    rest: list[Block] = [
        {category: [item for item in items if item not in shared[category]] for category, items in edits.items()}
        for edits in device_edits
    ]
    rest = [{category: items for category, items in edits.items() if items} for edits in rest]
    if all(edits.get("deviceNodes") for edits in rest):
        return merged(description.common, shared), rest
    nodes: Block = {"deviceNodes": shared.pop("deviceNodes")}
    return merged(description.common, shared), [merged(nodes, edits) for edits in rest]


def own_digest(decoded: Document) -> str:
    """The digest of a document without the annotation that holds the digest."""
    annotations = {key: value for key, value in (decoded.get("annotations") or {}).items() if key != DIGEST}
    text = json.dumps({**decoded, "annotations": annotations}, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def is_ours(decoded: Document) -> bool:
    """Whether a decoded document has our digest annotation."""
    return DIGEST in (decoded.get("annotations") or {})


def is_untouched(decoded: Document) -> bool:
    """Whether a decoded document is ours and nobody has changed it."""
    return is_ours(decoded) and decoded["annotations"][DIGEST] == own_digest(decoded)


def render(decoded: Document, form: str = "json") -> bytes:
    """The file's bytes; `form` is `json` or `yaml`.  Raises HostError when they would not be a valid CDI file."""
    text = json.dumps(decoded, indent=2) if form == "json" else "---\n" + "\n".join(_yaml(decoded, ""))
    data = text.encode() + b"\n"
    problems = spec.problems(data, "")
    if problems:
        raise HostError(f"the devices of this host give no valid CDI file: {problems[0][0]}: {problems[0][1]}")
    return data


def _yaml(value: Any, indent: str) -> list[str]:
    """The lines of block YAML for a mapping.  Strings are quoted as in JSON, so none can be read as another type."""
    lines: list[str] = []
    for key, item in value.items():
        name = key if key.isidentifier() else json.dumps(key)
        if isinstance(item, dict):
            lines += [f"{indent}{name}:", *_yaml(item, indent + "  ")]
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            lines.append(f"{indent}{name}:")
            for entry in item:
                first, *rest = _yaml(entry, indent + "  ")
                lines += [f"{indent}- {first.lstrip(' ')}", *rest]
        elif isinstance(item, list):
            lines += [f"{indent}{name}:", *(f"{indent}- {json.dumps(entry)}" for entry in item)]
        else:
            lines.append(f"{indent}{name}: {json.dumps(item)}")
    return lines
