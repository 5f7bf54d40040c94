"""shim.configure.cri without an engine; tests/real/test_configure.py asks real engines."""

from __future__ import annotations

import sys

import pytest

from shim.configure import cri
from shim.errors import HostError


def ask(path: str) -> str:
    return cri.ask("containerd", "chandler", path, ("chandler.oci/service", "{}"), [], "A")


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(
        HostError, match=r"the Python package of grpc is not installed; install python3-grpcio and python3-protobuf"
    ):
        ask("/nowhere")


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(cri, "STARTING", 0.0)
    with pytest.raises(
        HostError, match=rf"containerd does not answer at {tmp_path}/none: .*; start containerd, or name its socket"
    ):
        ask(f"unix://{tmp_path}/none")
