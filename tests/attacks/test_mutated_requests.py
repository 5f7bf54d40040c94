"""Requests mutated at random, through the whole wrapper in this process.

Each is served, or refused in one sentence with nothing changed. CHANDLER_FUZZ=20000 tries that many requests;
CHANDLER_FUZZ_SEED chooses others.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from lab.local_node import CONFIG, Ended, Front, Node, P

from shim.state import ledger

TRIES = int(os.environ.get("CHANDLER_FUZZ", "300"))
SEED = int(os.environ.get("CHANDLER_FUZZ_SEED", "1"))
GPUS = 4
SEEDS: list[dict[str, Any]] = [
    {
        "resources": {
            "gpu": {"count": 2, "vendor": "nvidia", "prefer": "numa"},
            "cpu": "500m",
            "memory": "512Mi",
            "pids_limit": 64,
        },
        "env": {"A": "b", "C": "$E:HOME"},
    },
    {
        "resources": {
            "gpu": {"devices": ["0", "GPU-1", "nvidia.com/gpu=2"], "sharing": "exclusive"},
            "cpuset": "0-1",
            "cpu_shares": 512,
            "hugepages": {"2Mi": "4Mi"},
        }
    },
    {
        "storage": [
            {"type": "tmpfs", "target": "/t", "size": "1Mi", "mode": "1777"},
            {"type": "bind", "source": "/srv", "target": "/s", "readonly": True},
        ]
    },
    {
        "user": "1:2",
        "capabilities": ["NET_ADMIN"],
        "cap_drop": ["ALL"],
        "ulimits": {"nofile": "5:7"},
        "sysctls": {"net.core.somaxconn": "5"},
        "hostname": "h",
    },
    {
        "command": {"entrypoint": ["a"], "args": ["b"], "workdir": "/w"},
        "devices": ["/dev/null"],
        "extra_groups": [5],
        "read_only_root_fs": True,
        "privileged": False,
    },
]
ODD = [
    "",
    "\0",
    "\ud800",
    "\u202e",
    "/",
    "..",
    "all",
    "nvidia.com/gpu=all",
    "$S:x",
    "$E:",
    "-1",
    "9" * 40,
    "1e9",
    "{}",
    "\n",
    "x" * 3000,
    -1,
    0,
    1 << 70,
    True,
    None,
    [],
    {},
    [[]],
    {"": {}},
    [None],
    1.5,
]


def mutated(rng: random.Random, value: Any) -> Any:
    """A JSON value with one change in it."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        kind = rng.randrange(5)
        if kind == 0:
            return {**value, key: rng.choice(ODD)}
        if kind == 1:
            return {each: item for each, item in value.items() if each != key}
        if kind == 2:
            return {**value, str(rng.choice(ODD)): value[key]}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], rng.choice([mutated(rng, value[at]), rng.choice(ODD)]), *value[at + rng.randrange(2) :]]
    if isinstance(value, str) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return (
            value[:at]
            + rng.choice(["", chr(rng.randrange(1, 0x300)), value[::-1], str(rng.choice(ODD))])
            + value[at + 1 :]
        )
    return rng.choice(ODD)


def request(rng: random.Random) -> dict[str, Any]:
    document: Any = rng.choice(SEEDS)
    for _ in range(rng.randrange(1, 4)):
        document = mutated(rng, document)
    text = json.dumps(document)
    if rng.random() < 0.3 and text:  # damage to the text itself
        at = rng.randrange(len(text))
        text = (
            text[:at]
            + rng.choice(["", "}", '"', "\\", "\\ud800", ",", ":", "#", "&a", "\t", chr(rng.randrange(1, 0x3000))])
            + text[at + rng.randrange(2) :]
        )
    key = rng.choice(
        [
            P + "service",
            P + "service",
            P + "service",
            P + "services",
            P + "service.main",
            P + "resources.gpu.count",
            P + "env.A",
            P + "storage",
            P + str(rng.choice(ODD)),
        ]
    )
    found: dict[str, Any] = {key: rng.choice([text, text, text, json.dumps({"main": document}), document])}
    if rng.random() < 0.1:
        found[P + rng.choice(["granted", "service", "env.B", "resources.memory"])] = str(rng.choice(ODD))
    return found


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Front:
    return Front(Node(tmp_path, monkeypatch), capfd)


def test_mutated_requests(front: Front) -> None:
    front.node.configure(
        "",
        '[policy]\nallow = ["gpu", "gpu.all", "env", "resources", "storage", "user", "capabilities", "command", '
        '"hostname", "devices"]\n'
        'bind-sources = ["/srv"]\ndevices = ["*"]\ncapabilities = ["ALL"]\nhost-variables = ["*"]\n',
    )
    (front.node.directory / "bundle/rootfs").mkdir()
    rng = random.Random(SEED)
    served = refused = 0
    for number in range(TRIES):
        asked = request(rng)
        config = (
            mutated(rng, {key: CONFIG[key] for key in ("process", "linux", "mounts", "root")})
            if rng.random() < 0.1
            else {}
        )
        before = front.write(asked, {**CONFIG, **config} if isinstance(config, dict) else None)
        for left in front.config.parent.glob("config.json.*"):
            left.unlink()
        if front.log.exists():
            front.log.unlink()
        try:
            front.main(f"c{number}")
        except Ended:
            served += 1
            front.ends(f"c{number}")
            continue
        except SystemExit as end:
            assert end.code == 1
        refused += 1
        (record,) = [json.loads(line) for line in front.log.read_text().splitlines()]
        assert (
            record["level"] == "error" and "internal error" not in record["msg"] and "Traceback" not in record["msg"]
        ), (asked, config, record)
        assert len(record["msg"]) < 3000 and front.config.read_bytes() == before, (asked, config)
        assert ledger.Ledger(str(front.node.directory / "state")).read() == [], (asked, config)
    assert served > TRIES // 20 and refused > TRIES // 20
