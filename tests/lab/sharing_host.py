"""A node with fakes for NVIDIA's commands, on which containers share GPUs."""

from __future__ import annotations

import json
from typing import Any

from lab.nvidia import Commands
from lab.served import inventory, node
from shim import engine
from shim.edits import ENV, MOUNT, Edits
from shim.sharing import setup
from shim.state import ledger
from shim.state.ledger import Ledger

UUIDS = [f"GPU-{number:08x}-5eed-4bad-8ace-0123456789ab" for number in range(4)]


def spec() -> bytes:
    devices = [
        {"name": name, "containerEdits": {"deviceNodes": [node(f"/dev/nvidia{n}", n)]}}
        for n in range(4)
        for name in (str(n), UUIDS[n])
    ]
    devices.append(
        {
            "name": "0:1",
            "containerEdits": {
                "deviceNodes": [node("/dev/nvidia0", 0), node("/dev/nvidia-caps/nvidia-cap12", 12, major=237)]
            },
        }
    )
    return json.dumps({"cdiVersion": "0.8.0", "kind": "nvidia.com/gpu", "devices": devices}).encode()


class Host:
    """A node with fakes for NVIDIA's commands; creates and deletes as the wrapper does them."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.state = directory + "/state"
        self.commands = Commands(directory + "/bin")
        self.ledger = Ledger(self.state)
        self.config: dict[str, Any] = {
            "gpu.allocator": "leases",
            "gpu.mps": "managed",
            "gpu.mps-patience": 20,
            "policy.trust": "all",
        }
        self.tokens: dict[str, str] = {}

    def plan(
        self, request: dict[str, Any], held: Any = None, uid: int = 0, document: dict[str, Any] | None = None
    ) -> engine.Plan:
        config: Any = {**self.config, **self.commands.config()}
        known = inventory(spec())
        known.config.update(config)
        document = document or {"process": {"user": {"uid": uid}}}
        document["annotations"] = {"chandler.oci/service": json.dumps({"resources": {"gpu": request}})}
        made = engine.plan(document, known, held=held)
        assert made is not None
        return made

    def create(self, name: str, uid: int = 0, document: dict[str, Any] | None = None, **request: Any) -> Edits:
        lease = ledger.oci_lease(name, self.directory, "/bin/false", 1_700_000_000)
        made = self.ledger.allocate(lease, lambda held: self.plan(request, held, uid, document))
        assert made is not None
        try:
            self.ledger.restore_gpus(made.keys)
            edits = setup.begin(made.sharing, self.state) if made.sharing else Edits()
        except BaseException:
            self.ledger.release({lease["token"]})
            raise
        self.tokens[name] = lease["token"]
        return edits

    def delete(self, name: str) -> None:
        self.ledger.release({self.tokens.pop(name)})

    def mode(self, number: int = 0) -> str:
        return str(self.commands.gpus().get(UUIDS[number], {}).get("mode", "DEFAULT"))


def env(edits: Edits) -> dict[str, str]:
    return {key: value for _, key, value, _ in edits.of(ENV)}


def mounts(edits: Edits) -> dict[str, str]:
    return {key: value["source"] for _, key, value, _ in edits.of(MOUNT)}
