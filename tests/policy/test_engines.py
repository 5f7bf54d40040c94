"""A container's name and kind, from the annotations of the engine that the configuration names."""

from __future__ import annotations

from typing import Any

import pytest

from shim.policy.engines import container

CONTAINERD = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "main"}
CRIO = {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.container.name": "side"}
SANDBOX = {"io.kubernetes.cri.container-type": "sandbox"}
CRIO_SANDBOX = {"io.kubernetes.cri-o.ContainerType": "sandbox", "io.kubernetes.container.name": "POD"}


@pytest.mark.parametrize(
    ("annotations", "engine", "found"),
    [
        ({}, "", (None, False)),
        (CONTAINERD, "", ("main", False)),
        (CRIO, "", ("side", False)),
        (SANDBOX, "", (None, True)),
        (CRIO_SANDBOX, "", ("POD", True)),
        (CONTAINERD, "containerd", ("main", False)),
        (SANDBOX, "containerd", (None, True)),
        (CRIO, "crio", ("side", False)),
        (CRIO_SANDBOX, "crio", ("POD", True)),
        # another engine's keys may be forged
        (CRIO, "containerd", (None, False)),
        (CRIO_SANDBOX, "containerd", (None, False)),
        (CONTAINERD, "crio", (None, False)),
        (SANDBOX, "crio", (None, False)),
        ({**CRIO, **SANDBOX}, "crio", ("side", False)),
        ({**CONTAINERD, **CRIO_SANDBOX}, "containerd", ("main", False)),
        # these two let a caller set anything
        (CONTAINERD, "podman", (None, False)),
        (SANDBOX, "docker", (None, False)),
        (CRIO_SANDBOX, "podman", (None, False)),
        # a name alone, or of an odd type
        ({"io.kubernetes.cri.container-name": "main"}, "containerd", (None, False)),
        ({**CONTAINERD, "io.kubernetes.cri.container-name": 5}, "containerd", (None, False)),
        ({**CONTAINERD, "io.kubernetes.cri.container-type": None}, "containerd", (None, False)),
        ({**CONTAINERD, "io.kubernetes.cri.container-type": 5}, "", ("main", False)),
    ],
)
def test_container(annotations: dict[str, Any], engine: str, found: tuple[str | None, bool]) -> None:
    assert container(annotations, engine) == found
