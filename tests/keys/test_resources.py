"""resources.* of a request as edits of linux.resources."""

from __future__ import annotations

from typing import Any

import pytest

from shim.edits import RESOURCE
from shim.errors import BundleError
from shim.keys import common
from shim.oci import writer
from shim.request import schema, values


def result(asked: dict[str, Any], engine: dict[str, Any] | None = None) -> Any:
    normal = schema.check({"resources": asked})["resources"]
    document = {"linux": {"resources": engine or {}}}
    edits = common.edits(normal, document, "here")
    assert all(kind == RESOURCE and origin == "here" for kind, _, _, origin in edits.items)
    return writer.apply(document, edits)["linux"]["resources"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, {}),
        ({"gpu": {"count": 2}}, {}),
        ({"cpu_shares": 5}, {"cpu": {"shares": 5}}),
        ({"cpuset": "0-1"}, {"cpu": {"cpus": "0-1"}}),
        ({"memory": "1Ki"}, {"memory": {"limit": 1024}}),
        ({"memory_swap": -1}, {"memory": {"swap": -1}}),
        ({"memory_reservation": 7}, {"memory": {"reservation": 7}}),
        ({"pids_limit": 9}, {"pids": {"limit": 9}}),
        ({"cpu": 2}, {"cpu": {"period": 100000, "quota": 200000}}),
        ({"cpu": "500m"}, {"cpu": {"period": 100000, "quota": 50000}}),
        ({"cpu": "1n"}, {"cpu": {"period": 100000, "quota": 1000}}),
        ({"memory": 8, "memory_swap": 16}, {"memory": {"limit": 8, "swap": 16}}),
    ],
)
def test_each_key(asked: dict[str, Any], found: dict[str, Any]) -> None:
    assert result(asked) == found


@pytest.mark.parametrize(
    ("period", "cpu", "quota"),
    [(50000, 2, 100000), (1000, "1", 1000), (1000000, "1m", 1000), (1000000, "250m", 250000), (0, 1, 100000)],
)
def test_the_engines_period_is_kept(period: int, cpu: Any, quota: int) -> None:
    assert result({"cpu": cpu}, {"cpu": {"period": period}})["cpu"] == {"period": period or 100000, "quota": quota}


@pytest.mark.parametrize(
    ("engine", "swap"),
    [
        ({"limit": 100, "swap": 100}, 50),
        ({"limit": 100, "swap": 150}, 100),
        ({"limit": 100, "swap": -1}, -1),
        ({"limit": 100}, None),
        ({"swap": 100}, 100),
        ({"limit": -1, "swap": 100}, 100),
        ({"limit": 100, "swap": 90}, 90),
    ],
)
def test_less_memory_is_not_more_swap(engine: dict[str, int], swap: Any) -> None:
    """OCI's swap counts memory and swap together."""
    assert result({"memory": 50}, {"memory": engine})["memory"].get("swap") == swap


def test_the_largest_cpu_is_a_quota_that_fits() -> None:
    largest = f"{values.MAX_INT // 1000}m"
    assert result({"cpu": largest}, {"cpu": {"period": 1000000}})["cpu"]["quota"] < 1 << 63


@pytest.mark.parametrize("period", ["100000", True, [], {}, 1.5])
def test_an_odd_period(period: Any) -> None:
    with pytest.raises(BundleError):
        result({"cpu": 1}, {"cpu": {"period": period}})
