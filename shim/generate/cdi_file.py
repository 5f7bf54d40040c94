"""From what was found to a CDI file: names, what all devices share, `all`, the version, annotations, text.  Pure.

Source: CDI SPEC.md, "JSON Definition" and "Released versions".
"""

from __future__ import annotations

import hashlib
import json

from shim.cdi import spec, versions
from shim.cdi.names import check_device
from shim.errors import CdiError, HostError
from shim.generate.answers import CATEGORIES, merged, with_hooks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

    from shim.generate.answers import Block, Found, Options

# Annotations of a file that we made.  They never reach a container.
DRIVER = "chandler.oci/driver-version"
LAYOUT = "chandler.oci/layout"
OPTIONS = "chandler.oci/options"
DIGEST = "chandler.oci/digest"  # of all the rest: a file that a person changed is a person's


def document(found: Found, options: Options) -> Dict[str, Any]:
    """The CDI document.  Raises HostError when a device would have no name, or two the same."""
    common, own = with_hooks(*_lifted(found), options)
    devices: List[Dict[str, Any]] = []
    for device, edits in zip(found.devices, own):
        names = [name for name in (device.names.get(strategy, "") for strategy in options.strategies) if _is_name(name)]
        if not names:
            wanted = " or ".join(options.strategies)
            raise HostError(
                f"{device.layout} has no name by {wanted} that could be read from this host",
                "choose another --device-name-strategy",
            )
        devices += [_device(name, device.annotations, edits) for name in dict.fromkeys(names)]
    if options.all and not any(device["name"] == "all" for device in devices):
        devices.append(_device("all", {}, merged(*own)))
    seen = [device["name"] for device in devices]
    twice = [name for place, name in enumerate(seen) if name in seen[:place]]
    if twice:
        raise HostError(f"two devices of this host are both called {twice[0]}", "choose another --device-name-strategy")
    made: Dict[str, Any] = {
        "cdiVersion": "",
        "kind": found.kind,
        "annotations": _annotations(found, options),
        "containerEdits": common,
        "devices": devices,
    }
    if not common:
        del made["containerEdits"]
    made["cdiVersion"] = versions.minimum(made)[0]
    made["annotations"][DIGEST] = own_digest(made)
    return made


def _annotations(found: Found, options: Options) -> Dict[str, str]:
    result = {LAYOUT: _printable("; ".join(device.layout for device in found.devices))}
    if found.driver:
        result[DRIVER] = _printable(found.driver)
    recorded = options.recorded()
    if recorded:
        result[OPTIONS] = json.dumps(recorded, sort_keys=True)
    return result


def _printable(text: str) -> str:
    """What the host says, without what nobody can read."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


def _is_name(name: str) -> bool:
    try:
        check_device(name)
    except CdiError:
        return False
    return True


def _device(name: str, annotations: Dict[str, str], edits: Block) -> Dict[str, Any]:
    made: Dict[str, Any] = {"name": name, "containerEdits": edits}
    return {"name": name, "annotations": dict(annotations), "containerEdits": edits} if annotations else made


def _lifted(found: Found) -> tuple[Block, List[Block]]:
    """Common edits and each device's own: what several devices all have moves to the file, once.

    Nodes stay when a device had nothing else left, since a device without edits is not valid.
    """
    own = [merged(device.edits) for device in found.devices]
    if len(own) < 2:
        return merged(found.common), own
    shared: Block = {
        category: [
            item for item in own[0].get(category, ()) if all(item in edits.get(category, ()) for edits in own[1:])
        ]
        for category in CATEGORIES
    }
    rest: List[Block] = [
        {category: [item for item in items if item not in shared[category]] for category, items in edits.items()}
        for edits in own
    ]
    rest = [{category: items for category, items in edits.items() if items} for edits in rest]
    if all(edits.get("deviceNodes") for edits in rest):
        return merged(found.common, shared), rest
    nodes: Block = {"deviceNodes": shared.pop("deviceNodes")}
    return merged(found.common, shared), [merged(nodes, edits) for edits in rest]


def own_digest(made: Dict[str, Any]) -> str:
    """The digest of a document less the annotation that holds it."""
    annotations = {key: value for key, value in (made.get("annotations") or {}).items() if key != DIGEST}
    text = json.dumps({**made, "annotations": annotations}, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def is_ours(made: Dict[str, Any]) -> bool:
    """Whether a decoded document carries our mark."""
    return DIGEST in (made.get("annotations") or {})


def is_untouched(made: Dict[str, Any]) -> bool:
    """Whether a document of ours is still as we wrote it."""
    return is_ours(made) and made["annotations"][DIGEST] == own_digest(made)


def render(made: Dict[str, Any], form: str = "json") -> bytes:
    """The file's bytes; `form` is `json` or `yaml`.  Raises HostError if they were no valid CDI file."""
    text = json.dumps(made, indent=2) if form == "json" else "---\n" + "\n".join(_yaml(made, ""))
    data = text.encode() + b"\n"
    problems = spec.problems(data, "")
    if problems:
        raise HostError(f"what was found on this host gives no valid CDI file: {problems[0][0]}: {problems[0][1]}")
    return data


def _yaml(value: Any, indent: str) -> List[str]:
    """Block YAML with every string in double quotes, as JSON writes them, and so without a word to be mistaken."""
    lines: List[str] = []
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
