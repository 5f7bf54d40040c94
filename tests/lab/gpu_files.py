"""CDI files of GPUs as bytes, compiled, and what a request gets of them."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from shim.cdi.registry import Registry
from shim.errors import HostError
from shim.gpu import choose
from shim.node.compiler import Compiled
from shim.node.config import KEYS
from shim.node.inventory import Inventory

NVIDIA = "nvidia.com/gpu"
DEFAULTS = {key: default for key, (_, _, default) in KEYS.items()}


def node(path: str, minor: int, major: int = 195) -> dict[str, Any]:
    return {"path": path, "type": "c", "major": major, "minor": minor}


def device(name: str, *minors: int, env: tuple[str, ...] = ()) -> dict[str, Any]:
    edits: dict[str, Any] = {
        "deviceNodes": [node(f"/dev/nvidia{minor}", minor) for minor in minors] + [node("/dev/nvidiactl", 255)]
    }
    if env:
        edits["env"] = list(env)
    return {"name": name, "containerEdits": edits}


def spec(kind: str, *devices: dict[str, Any], env: tuple[str, ...] = ()) -> bytes:
    return json.dumps(
        {
            "cdiVersion": "0.6.0",
            "kind": kind,
            "devices": list(devices),
            "containerEdits": {"env": list(env)} if env else {},
        }
    ).encode()


def inventory(*texts: bytes, **config: Any) -> Inventory:
    registry = Registry.build([("/cdi", None, [(f"{n}.json", text) for n, text in enumerate(texts)])])
    settings: Any = {**DEFAULTS, **config}
    made = Compiled(settings, registry)
    return made.inventory()


def nowhere(path: str) -> NoReturn:
    raise HostError(f"{path} is not on this host")


def granted(request: Any, at: Inventory, names: tuple[str, ...] = (), look: Any = nowhere) -> choose.Grant:
    return choose.grant(request, list(names), at, "annotation a", look)
