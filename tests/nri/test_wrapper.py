"""The wrapper believes that the plugin served a container only if config.json and the grant record both say so."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from lab import bundle
from lab.engine import Engine, records
from lab.install import Installation
from lab.node import Node

from shim.oci import reader
from shim.state import ledger

NODES = [["/dev/a", "c", 195, 0], ["/dev/b", "c", 195, 1]]


def config(devices: list[Any], rules: list[Any]) -> dict[str, Any]:
    return {"linux": {"devices": devices, "resources": {"devices": rules}}}


def device(path: str, minor: int) -> dict[str, Any]:
    return {"path": path, "type": "c", "major": 195, "minor": minor}


def rule(minor: int, allow: bool = True) -> dict[str, Any]:
    return {"allow": allow, "type": "c", "major": 195, "minor": minor, "access": "rw"}


BOTH = [device("/dev/a", 0), device("/dev/b", 1)]
HELD: dict[str, tuple[Any, str]] = {
    "all of them": (config(BOTH, [rule(0), rule(1)]), ""),
    "a node is missing": (config(BOTH[:1], [rule(0), rule(1)]), "/dev/b"),
    "a rule is missing": (config(BOTH, [rule(1)]), "/dev/a"),
    "a rule denies": (config(BOTH, [rule(0, allow=False), rule(1)]), "/dev/a"),
    "another device under the name": (config([device("/dev/a", 7), BOTH[1]], [rule(0), rule(1)]), "/dev/a"),
    "nothing": ({}, "/dev/a"),
    "no object": ({"linux": []}, "/dev/a"),
    "rubbish among the devices": (config([None, "x", *BOTH], [3, rule(0), rule(1)]), ""),
}


@pytest.mark.parametrize("document, lost", HELD.values(), ids=HELD)
def test_devices_that_a_config_json_allows(document: Any, lost: str) -> None:
    assert reader.first_missing_node(document, NODES) == lost
    assert reader.first_missing_node(document, []) == ""


class Handler:
    """The wrapper over a runtime that does nothing, and the plugin's record of the container c1."""

    def __init__(self, installation: Installation, node: Node, workdir: str) -> None:
        self.installation, self.node = installation, node
        self.runtime = os.path.join(workdir, "runc")
        with open(self.runtime, "w", encoding="ascii") as script:
            script.write("#!/bin/sh\n")
        os.chmod(self.runtime, 0o755)
        self.configure("")
        self.engine = Engine([installation.program()], os.path.join(workdir, "root"))
        self.made = bundle.make(os.path.join(workdir, "b"), ["true"], bundle.request(resources={"gpu": {"count": 1}}))

    def configure(self, top: str) -> None:
        self.installation.configure([self.runtime], [self.node.cdi])
        with open(self.installation.etc + "/config.toml", "r+", encoding="utf-8") as file:
            text = file.read()
            file.seek(0)
            file.write(top + text)
        self.installation.forget()

    def record(self, nodes: list[Any]) -> None:
        directory = self.installation.state + "/nri/grants"
        os.makedirs(directory)
        with open(directory + "/00000000-c1.json", "w", encoding="ascii") as file:
            json.dump({"id": "c1", "root": "", "owner": "nri", "devices": ["nvidia.com/gpu=0"], "nodes": nodes}, file)

    def adjust(self) -> list[Any]:
        """config.json as NRI leaves it; the nodes that it holds."""
        gpu, changed = self.node.gpus[0], self.made.config
        changed["annotations"]["chandler.oci/granted"] = "nvidia.com/gpu=0"
        changed["linux"]["devices"] = [{"path": gpu.inside, "type": "c", "major": gpu.major, "minor": gpu.minor}]
        changed["linux"]["resources"]["devices"].append(
            {"allow": True, "type": "c", "major": gpu.major, "minor": gpu.minor, "access": "rw"}
        )
        self.made.config = changed
        return [[gpu.inside, "c", gpu.major, gpu.minor]]

    def create(self) -> tuple[int, str]:
        """Exit status and what was said."""
        before = self.made.bytes
        done = self.engine.create(self.made, "c1", check=False)
        if done.returncode:
            assert self.made.bytes == before
        return done.returncode, done.stderr


@pytest.fixture
def handler(installation: Installation, node: Node, workdir: str) -> Any:
    yield Handler(installation, node, workdir)
    installation.forget()


def edited(handler: Handler) -> bool:
    return os.path.exists(handler.made.path + ".chandler-original")


@pytest.mark.parametrize("top", ["", "require-grant = true\n"])
def test_record_and_config_json_agree(handler: Handler, top: str) -> None:
    handler.configure(top)
    handler.record(handler.adjust())
    before = handler.made.bytes
    assert handler.create() == (0, "") and handler.made.bytes == before and not edited(handler)


def test_a_record_without_its_devices_is_refused(handler: Handler) -> None:
    handler.record([*handler.adjust(), ["/dev/other", "c", 1, 9]])
    code, message = handler.create()
    assert code == 1 and "/dev/other" in message and "NRI" in message and not edited(handler)
    assert records(handler.made.log)[-1]["level"] == "error"


def test_a_mark_without_a_record_is_refused(handler: Handler) -> None:
    handler.adjust()
    code, message = handler.create()
    assert code == 1 and "mark" in message and not edited(handler)


@pytest.mark.parametrize("damage", ["", "{", '{"id": "c1"}'])
@pytest.mark.parametrize("marked", [False, True])
def test_an_unreadable_record_counts_as_none(handler: Handler, damage: str, marked: bool) -> None:
    if marked:
        handler.adjust()
    handler.record([])
    with open(handler.installation.state + "/nri/grants/00000000-c1.json", "w", encoding="ascii") as file:
        file.write(damage)
    ledger.Ledger(handler.installation.state).write([])  # without a ledger the record might tell of a lost lease
    code, message = handler.create()
    if marked:
        assert code == 1 and "mark" in message and not edited(handler)
    else:
        assert code == 0 and edited(handler), message


def test_an_unreadable_record_refuses_creates_until_a_rebuild(handler: Handler) -> None:
    handler.record([])
    with open(handler.installation.state + "/nri/grants/00000000-c1.json", "w", encoding="ascii"):
        pass
    code, message = handler.create()
    assert code == 1 and "`chandler leases rebuild`" in message and not edited(handler)


def test_the_wrapper_equips_when_the_plugins_reply_came_too_late(handler: Handler) -> None:
    handler.record([])
    assert handler.create()[0] == 0 and edited(handler)


def test_require_grant_refuses_a_request_that_was_not_served(handler: Handler) -> None:
    handler.configure("require-grant = true\n")
    code, message = handler.create()
    assert code == 1 and "require-grant" in message and "chandler-nri" in message and not edited(handler)
    handler.made.config = {**handler.made.config, "annotations": {}}
    assert handler.create()[0] == 0, "who asks for nothing needs no grant"
