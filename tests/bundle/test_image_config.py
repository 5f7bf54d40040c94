"""Image configurations, and how their entrypoint and cmd are combined with those of a service."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shim.bundle import image
from shim.errors import BundleError

FULL = {
    "Entrypoint": ["/entry"],
    "Cmd": ["serve", "-v"],
    "Env": ["PATH=/bin", "A=1"],
    "WorkingDir": "/srv",
    "User": "1000:1000",
    "ExposedPorts": {"80/tcp": {}},
    "Labels": {"chandler.oci/service": "{}"},
}
IMAGE = image.Image(["/entry"], ["serve", "-v"], ["PATH=/bin", "A=1"], "/srv", "1000:1000")


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (FULL, IMAGE),
        ({"architecture": "amd64", "os": "linux", "config": FULL, "rootfs": {}}, IMAGE),
        ([{"Id": "sha256:0", "Config": FULL}], IMAGE),
        ({"config": None}, image.Image()),
        ({"config": {}}, image.Image([], [], [], "", "")),
        (
            {"config": {"Entrypoint": None, "Cmd": None, "Env": None, "User": None, "WorkingDir": None}},
            image.Image([], [], [], "", ""),
        ),
    ],
)
def test_valid_files(document: Any, found: image.Image) -> None:
    assert image.parse(json.dumps(document).encode(), "image.json") == found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "image.json"),
        (b"[]", "is not an image configuration"),
        (b"7", "is not an image configuration"),
        (b'{"Cmd": "sh"}', "image.json: Cmd is not a list of strings"),
        (b'{"Cmd": [1]}', "Cmd is not a list"),
        (b'{"Entrypoint": ["a\\u0000b"]}', "Entrypoint is not a list"),
        (b'{"User": 7}', "User is not a string"),
        (b'{"WorkingDir": []}', "WorkingDir is not a string"),
        (b'{"Env": ["A"]}', "Env: 'A' does not have the form NAME=VALUE"),
        (b'{"Env": ["=x"]}', "Env: '=x'"),
    ],
)
def test_invalid_files(data: bytes, message: str) -> None:
    with pytest.raises(BundleError) as failed:
        image.parse(data, "image.json")
    assert message in str(failed.value)


BOTH, ENTRY, CMD, NONE = image.Image(["/e"], ["c"]), image.Image(["/e"]), image.Image((), ["c"]), image.Image()


@pytest.mark.parametrize(
    ("entrypoint", "args", "found", "runs"),
    [
        # nothing said: the image's
        (None, None, BOTH, ["/e", "c"]),
        (None, None, ENTRY, ["/e"]),
        (None, None, CMD, ["c"]),
        (None, None, NONE, ["/bin/sh"]),
        # an entrypoint puts both of the image's out of force
        (["/own"], None, BOTH, ["/own"]),
        (["/own", "-x"], None, NONE, ["/own", "-x"]),
        (["/own"], ["a"], BOTH, ["/own", "a"]),
        ([], ["a"], BOTH, ["a"]),
        ([], None, BOTH, ["/bin/sh"]),
        # args replace the cmd alone
        (None, ["a"], BOTH, ["/e", "a"]),
        (None, ["a"], CMD, ["a"]),
        (None, ["a"], NONE, ["a"]),
        (None, [], BOTH, ["/e", "c"]),
        (["/own"], [], BOTH, ["/own"]),
    ],
)
def test_command_follows_dockers_rules(entrypoint: Any, args: Any, found: image.Image, runs: list[str]) -> None:
    assert image.command(entrypoint, args, found) == runs
