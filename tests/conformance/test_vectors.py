"""The answers of the CDI Go library, release 1.1.2, case by case.

`cdi-inject.json` holds what a Go program got from it (`Cache.InjectDevices` of package pkg/cdi, on directories with the
case's files, and the OCI config read into and written from the types of runtime-spec).  In a case, `expect` is the
library's answer, null where it refused.  Where Chandler differs on purpose, `why` says why and `ours` is its answer.

In all cases Chandler leaves the engine's mounts in the order that the engine gave them, where the library sorts all
mounts by depth; what a container sees must be the same all the same.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import pytest

from shim import pathtext
from shim.cdi.registry import Registry
from shim.cdi.resolve import resolve
from shim.errors import ChandlerError
from shim.host import device_nodes
from shim.oci import writer

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "cdi-inject.json"), encoding="utf-8") as vectors:
    CASES = json.load(vectors)


def inject(case: dict[str, Any]) -> dict[str, Any]:
    directories = [
        (f"/cdi/{number}", None, [(name, text.encode()) for name, text in files.items()])
        for number, files in enumerate(case["dirs"])
    ]
    # The reference leaves a hook without an environment as it is. Chandler does not, so that is switched off here.
    registry = Registry.build(directories, hook_env=None)
    return writer.apply(case["config"], device_nodes.complete(resolve(case["devices"], registry.lookup)))


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The config without exact duplicates among its cgroup rules: the library appends duplicates, Chandler does not."""
    config = copy.deepcopy(config)
    resources = config.get("linux", {}).get("resources", {})
    rules: list[Any] = []
    for rule in resources.get("devices", ()):
        if rule not in rules:
            rules.append(rule)
    if "devices" in resources:
        resources["devices"] = rules
    return config


def seen(mounts: list[Any], probes: list[str]) -> dict[str, Any]:
    """What a container sees at some paths and below them: the mount made last at it or above it."""
    paths = [pathtext.absolute(mount["destination"]) for mount in mounts]
    return {
        probe: next(
            (
                mount
                for mount, path in zip(reversed(mounts), reversed(paths))
                if f"{probe}/".startswith(f"{path.rstrip('/')}/")
            ),
            None,
        )
        for path in probes
        for probe in (path, f"{path.rstrip('/')}/below")
    }


def same_but_for_the_order_of_mounts(one: dict[str, Any], other: dict[str, Any]) -> bool:
    mounts = [config.get("mounts") or [] for config in (one, other)]
    probes = [pathtext.absolute(mount["destination"]) for found in mounts for mount in found]
    return {**one, "mounts": seen(mounts[0], probes)} == {**other, "mounts": seen(mounts[1], probes)}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_injection_equals_that_of_the_go_library(case: dict[str, Any]) -> None:
    before = copy.deepcopy(case["config"])
    expected = case["ours"] if "why" in case else case["expect"]
    if expected is None:
        with pytest.raises(ChandlerError):
            inject(case)
    else:
        result = inject(case)
        if "why" in case:
            assert result == expected
        else:
            assert same_but_for_the_order_of_mounts(comparable(result), comparable(expected))
        own = [mount for mount in result["mounts"] if mount in case["config"]["mounts"]]
        assert own == [mount for mount in case["config"]["mounts"] if mount in own], (
            "the engine's mounts keep their order"
        )
        ours = {pathtext.absolute(mount["destination"]) for mount in result["mounts"] if mount not in own}
        assert all(
            mount in own or pathtext.absolute(mount["destination"]) in ours for mount in case["config"]["mounts"]
        )
        assert inject({**case, "config": result}) == result, "injecting twice is injecting once"
    assert case["config"] == before, "the input is not changed"


def test_there_are_as_many_vectors_as_were_recorded() -> None:
    assert len(CASES) == len({case["name"] for case in CASES}) == 356
    assert all("why" in case for case in CASES if "ours" in case)


@pytest.mark.parametrize("case", [case for case in CASES if "why" in case], ids=lambda case: case["name"])
def test_every_explained_difference_exists(case: dict[str, Any]) -> None:
    assert case["ours"] != case["expect"]
