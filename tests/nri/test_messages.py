"""The messages: the numbers that real runtimes have, and every protobuf package that they must load with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.internal.decoder import _DecodeVarint  # type: ignore[attr-defined, unused-ignore]
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from lab import REPOSITORY, containerd
from lab.install import PYTHON
from lab.runtimes import CACHE

from shim.nri import messages

# Not in both releases; from NRI's own definition.
NEWER = {
    "CDIDevice",
    "FailurePolicy",
    "LinuxPids",
    "RemoveContainerRequest",
    "StartContainerRequest",
    "StopPodSandboxRequest",
    "User",
    "ValidateContainerAdjustmentRequest",
    "ValidateContainerAdjustmentResponse",
}

# The adjustment that both sides of the wire must agree on, byte by byte.
BYTES = "12060a016112016222070a014b12025a3d320f0a0d0a062f6465762f61120163180742060a04762f633d"


def described(binary: str) -> dict[str, Any]:
    """The messages of NRI as the descriptor inside a containerd tells them."""
    with open(binary, "rb") as file:
        data = file.read()
    for match in re.finditer(b"\\x0a\\x11pkg/api/api\\.proto\\x12\\x14nri\\.pkg\\.api\\.v1alpha1", data):
        at = match.start()
        while True:  # fields of a FileDescriptorProto, up to its last one, `syntax`
            tag, start = _DecodeVarint(data, at)
            length, start = _DecodeVarint(data, start)
            at = start + length
            if tag >> 3 == 12:
                break
        file_proto = descriptor_pb2.FileDescriptorProto.FromString(data[match.start() : at])
        return {message.name: message for message in file_proto.message_type}
    raise AssertionError(f"no descriptor in {binary}")


@pytest.mark.parametrize("release", [*containerd.RELEASES, containerd.NEWEST_NRI], ids=lambda release: release.label)
def test_field_numbers_and_types_are_those_of_a_real_runtime(release: containerd.Release) -> None:
    if release.missing:
        pytest.skip(release.missing)
    theirs, compared = described(release.binary("containerd")), 0
    for name in messages.TABLE:
        ours = messages._CLASSES[name].DESCRIPTOR
        if name not in theirs:
            assert name in NEWER, name
            continue
        fields = {field.name: field for field in theirs[name].field}
        for field in ours.fields:
            if field.name not in fields:
                continue  # a newer one: the number is free there
            known = fields[field.name]
            kind = 5 if known.type == known.TYPE_ENUM else known.type
            assert (field.number, field.type) == (known.number, kind), f"{name}.{field.name}"
            compared += 1
        taken = {known.number: known.name for known in theirs[name].field}
        assert all(taken.get(field.number, field.name) == field.name for field in ours.fields), name
    assert compared > 100


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import google.protobuf
from shim.nri import messages as m
a = m.ContainerAdjustment(annotations={"a": "b"})
a.env.add(key="K", value="Z=")
device = a.linux.devices.add(path="/dev/a", type="c", major=7)
a.CDI_devices.add(name="v/c=")
data = a.SerializeToString(deterministic=True)
again = m.ContainerAdjustment.FromString(data)
assert again == a and again.linux.devices[0].major == 7 and not again.linux.devices[0].HasField("file_mode")
empty = m.Container()
assert not empty.HasField("user") and not empty.linux.resources.cpu.HasField("quota")
print(google.protobuf.__version__, data.hex())
"""


def interpreters() -> dict[str, tuple[list[str], dict[str, str]]]:
    return {
        "this": ([sys.executable, "-I"], {}),
        "debian": ([PYTHON, "-I", "-B"], {}),
        "newest": ([sys.executable, "-s", "-E"], {}),
        "pure": ([sys.executable, "-s"], {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}),
    }


@pytest.mark.parametrize("which", interpreters())
def test_every_protobuf_builds_the_same_bytes(which: str) -> None:
    command, env = interpreters()[which]
    program = PROGRAM
    if which == "newest":
        newest = os.path.join(CACHE, "protobuf")
        if not os.path.isdir(newest):
            pytest.skip("not installed: the newest protobuf")
        program = f"import sys; sys.path.insert(0, {newest!r})\n" + PROGRAM
    done = subprocess.run(
        [*command, "-c", program, REPOSITORY],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if which == "debian" and "No module named 'google" in done.stderr:
        pytest.skip("not installed: python3-protobuf")
    assert done.returncode == 0, done.stderr
    version, data = done.stdout.split()
    assert data == BYTES
    if which == "newest":
        assert version.startswith("7.")


@given(st.sampled_from(sorted(messages.TABLE)), st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_a_decode_error(name: str, data: bytes) -> None:
    kind = messages._CLASSES[name]
    try:
        message = kind.FromString(data)
    except DecodeError:
        return
    assert kind.FromString(message.SerializeToString()).SerializeToString() == message.SerializeToString()
