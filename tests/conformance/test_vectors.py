"""The answers of the CDI reference library, case by case.

`cdi-inject.json` holds what release 1.1.0 answered.  In two ways the library has changed since, and Chandler
does as it does now: a variable that the config already sets is replaced where it stands (1.1.0 appended it once
more), and bind mounts of a container with a user namespace become idmapped.  `cdi-inject-1.1.1.json` holds the
answers of release 1.1.1 to the same cases where they differ for these reasons.
"""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import pytest

from shim import host, oci
from shim.cdi.registry import Registry
from shim.cdi.resolve import resolve
from shim.errors import ChandlerError

HERE = os.path.dirname(os.path.abspath(__file__))

with open(os.path.join(HERE, "cdi-inject.json"), encoding="utf-8") as vectors:
    CASES = json.load(vectors)
with open(os.path.join(HERE, "cdi-inject-1.1.1.json"), encoding="utf-8") as vectors:
    NEWER = json.load(vectors)

each_case = pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])


def inject(case: dict[str, Any], idmap: bool = True) -> dict[str, Any]:
    directories = [
        (f"/cdi/{number}", None, [(name, text.encode()) for name, text in files.items()])
        for number, files in enumerate(case["dirs"])
    ]
    # The reference leaves a hook without an environment as it is; we do not, so here that is switched off.
    registry = Registry.build(directories, hook_env=None)
    return oci.apply(case["config"], host.complete(resolve(case["devices"], registry.lookup)), idmap)


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """The config without exact duplicates among its cgroup rules, which the reference appends and we do not."""
    config = copy.deepcopy(config)
    resources = config.get("linux", {}).get("resources", {})
    rules: list[Any] = []
    for rule in resources.get("devices", ()):
        if rule not in rules:
            rules.append(rule)
    if "devices" in resources:
        resources["devices"] = rules
    return config


def replaced(before: list[str], after: list[str]) -> list[str]:
    """What 1.1.0 appended to the environment `before`, put where a variable of that name stands last."""
    assert after[: len(before)] == before, "1.1.0 changes nothing that was there"
    result = list(before)
    for entry in after[len(before) :]:
        name = entry.partition("=")[0]
        places = [place for place, other in enumerate(result) if other.partition("=")[0] == name]
        if places:
            result[places[-1]] = entry
        else:
            result.append(entry)
    return result


@each_case
def test_injection_is_that_of_the_reference(case: dict[str, Any]) -> None:
    before = copy.deepcopy(case["config"])
    expected = NEWER.get(case["name"], case["expect"])
    if expected is None:
        with pytest.raises(ChandlerError):
            inject(case)
    else:
        result = inject(case)
        assert comparable(result) == comparable(expected)
        again = inject({**case, "config": result})
        assert comparable(again) == comparable(result), "injecting twice is injecting once"
    assert case["config"] == before, "the input is not changed"


@each_case
def test_injection_is_that_of_release_1_1_0_but_for_the_place_of_variables(case: dict[str, Any]) -> None:
    if case["expect"] is None:
        with pytest.raises(ChandlerError):
            inject(case, idmap=False)
        return
    expected = comparable(case["expect"])
    expected["process"]["env"] = replaced(case["config"]["process"]["env"], expected["process"]["env"])
    assert comparable(inject(case, idmap=False)) == expected


def test_there_are_as_many_vectors_as_the_reference_gave() -> None:
    assert len(CASES) == 220
    assert NEWER.keys() <= {case["name"] for case in CASES if case["expect"] is not None}
