"""A plugin's service over a CDI file in memory."""

from __future__ import annotations

import json
import os
from typing import Any

from lab.peer import Peer
from shim.cdi.registry import Registry
from shim.node.compiler import Compiled
from shim.node.config import KEYS
from shim.node.inventory import Account, Inventory
from shim.nri.service import Service

NVIDIA = "nvidia.com/gpu"


def node(path: str, minor: int, **more: Any) -> dict[str, Any]:
    return {"path": path, "type": "c", "major": 195, "minor": minor, "fileMode": 0o666, **more}


def spec(common: dict[str, Any] | None = None, gpus: int = 8, **more: Any) -> bytes:
    """A CDI file of GPUs with complete device nodes, so that nothing is read from the host."""
    devices = [
        {"name": str(n), "containerEdits": {"deviceNodes": [node(f"/dev/nvidia{n}", n, **more)]}} for n in range(gpus)
    ]
    shared = {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "deviceNodes": [node("/dev/nvidiactl", 255)], **(common or {})}
    return json.dumps({"cdiVersion": "0.8.0", "kind": NVIDIA, "devices": devices, "containerEdits": shared}).encode()


def inventory(text: bytes | None = None, **config: Any) -> Inventory:
    values: Any = {key: default for key, (_, _, default) in KEYS.items()}
    values.update((key.replace("__", ".").replace("_", "-"), value) for key, value in config.items())
    return Compiled(
        values, Registry.build([("/cdi", None, [("nvidia.json", spec() if text is None else text)])])
    ).inventory()


class Served(Service):
    """A plugin's service that keeps its log."""

    def __init__(self, state: str, known: Inventory) -> None:
        self.lines: list[dict[str, Any]] = []
        account = Account({})
        account.state_dir = state
        super().__init__(account, known, self.lines.append)

    def records(self) -> list[dict[str, Any]]:
        directory = os.path.join(self.account.state_dir, "nri/grants")
        found = []
        for name in sorted(os.listdir(directory)) if os.path.isdir(directory) else ():
            with open(os.path.join(directory, name), encoding="utf-8") as file:
                record = json.load(file)
                del record["checksum"]
                found.append(record)
        return found


def service_of(peer: Peer) -> Served:
    found = peer.connection.service
    assert isinstance(found, Served)
    return found
