"""The manifests of packaging/kubernetes."""

from __future__ import annotations

import glob
import os
from typing import Any

import yaml

from lab import REPOSITORY

DIRECTORY = os.path.join(REPOSITORY, "packaging/kubernetes")
FILES = sorted(
    os.path.relpath(path, DIRECTORY)
    for pattern in ("*.yaml", "examples/*.yaml")
    for path in glob.glob(os.path.join(DIRECTORY, pattern))
)


def documents(name: str) -> list[dict[str, Any]]:
    """The objects of a file."""
    with open(os.path.join(DIRECTORY, name), encoding="utf-8") as file:
        return list(yaml.safe_load_all(file))


def one(name: str, kind: str, called: str = "") -> dict[str, Any]:
    """The object of a kind in a file."""
    (found,) = (each for each in documents(name) if each["kind"] == kind and called in ("", each["metadata"]["name"]))
    return found


def pod_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    """The pod that an object is, or makes."""
    spec: dict[str, Any] = manifest["spec"]
    return spec if manifest["kind"] == "Pod" else spec["template"]["spec"]
