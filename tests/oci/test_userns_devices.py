"""Devices for a container in a user namespace."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shim import engine, errors
from shim.edits import DEVICE, ENV, Edits
from shim.oci import userns_devices

ORIGIN = "CDI nvidia.com/gpu=0"
NULL = {"type": "c", "major": 1, "minor": 3}
USERS = {"linux": {"namespaces": [{"type": "pid"}, {"type": "user"}]}}


def device(path: str, **node: Any) -> Edits:
    return Edits([(ENV, "A", "b", ORIGIN), (DEVICE, path, {"path": path, **node}, ORIGIN)])


def equipped(edits: Edits, document: dict[str, Any], rootless: bool = False) -> dict[str, Any]:
    return engine.equip(document, edits, rootless)


@pytest.mark.parametrize(("document", "rootless"), [(USERS, False), (USERS, True), ({}, True)])
def test_a_node_with_another_host_path_is_mounted(document: dict[str, Any], rootless: bool) -> None:
    """The rule that allows the device is there, too: it matters where root manages the control group.

    The mount is not idmapped, because devtmpfs cannot be.
    """
    made = equipped(device("/dev/gpu", hostPath="/dev/null", permissions="rw", **NULL), document, rootless)
    assert made["mounts"] == [
        {
            "destination": "/dev/gpu",
            "type": "bind",
            "source": "/dev/null",
            "options": ["bind", "rw", "nosuid", "noexec"],
        }
    ]
    assert made["linux"]["resources"]["devices"] == [
        {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rw"}
    ]
    assert "devices" not in made["linux"] and made["process"]["env"] == ["A=b"]


def test_a_node_with_the_same_host_path_is_left_to_the_runtime() -> None:
    made = equipped(device("/dev/null", **NULL), USERS)
    assert "mounts" not in made and made["linux"]["devices"] == [{"path": "/dev/null", **NULL}]


def test_without_a_user_namespace_nodes_are_made() -> None:
    made = equipped(device("/dev/gpu", hostPath="/dev/null", **NULL), {})
    assert "mounts" not in made and made["linux"]["devices"][0]["path"] == "/dev/gpu"


def test_two_nodes_of_one_path_have_both_rules() -> None:
    two = Edits(
        [
            *device("/dev/g", hostPath="/dev/null", **NULL).items,
            *device("/dev/g", hostPath="/dev/zero", type="c", major=1, minor=5).items,
        ]
    )
    made = equipped(two, USERS)
    assert [mount["source"] for mount in made["mounts"]] == ["/dev/zero"]
    assert [rule["minor"] for rule in made["linux"]["resources"]["devices"]] == [3, 5]
    assert equipped(two, made) == made


def test_a_fifo_has_no_rule(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    made = equipped(device("/dev/f", hostPath=str(tmp_path / "fifo"), type="p"), USERS)
    assert made["mounts"][0]["source"] == str(tmp_path / "fifo") and "resources" not in made["linux"]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"hostPath": "/dev/none-such"},
            "/dev/none-such is not on this host, and in a user namespace no device can be made",
        ),
        ({"hostPath": "/dev/zero"}, "/dev/zero is c 1:5 on this host, not c 1:3"),
        ({"hostPath": "/etc/passwd"}, "/etc/passwd is not a device node"),
    ],
)
def test_a_path_with_another_device_by_now_is_refused(node: dict[str, Any], message: str) -> None:
    """A runtime would mount it without a check."""
    with pytest.raises(errors.HostError) as raised:
        userns_devices.split(device("/dev/gpu", **node, **NULL))
    assert str(raised.value).startswith(f"{ORIGIN}: ") and message in str(raised.value)
