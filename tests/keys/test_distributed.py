"""shim.keys.distributed: the sources of a training's rank and sizes, and which source wins."""

from __future__ import annotations

from typing import Any

import pytest

from shim.errors import RequestError
from shim.keys import distributed

SOURCE = "annotation chandler.oci/service"

ROWS: list[tuple[str, dict[str, Any], dict[str, str], str, dict[str, str]]] = [
    ("no source", {}, {}, "", {}),
    (
        "the request",
        {"rank": 1, "world_size": 2, "local_rank": 0},
        {},
        "",
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ),
    ("the container's own stay", {}, {"RANK": "3", "WORLD_SIZE": "4"}, "", {"RANK": "3", "WORLD_SIZE": "4"}),
    ("the request before the container's own", {"rank": 1}, {"RANK": "3"}, "", {"RANK": "1"}),
    ("an indexed job", {"world_size": 4}, {"JOB_COMPLETION_INDEX": "2"}, "", {"WORLD_SIZE": "4", "RANK": "2"}),
    (
        "a leader and its workers",
        {},
        {"LWS_WORKER_INDEX": "0", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "set-0.svc"},
        "",
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "set-0.svc"},
    ),
    (
        "slurm",
        {},
        {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"},
        "",
        {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"},
    ),
    (
        "open mpi, started by slurm",
        {},
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "7"},
        "",
        {"RANK": "3", "WORLD_SIZE": "4"},
    ),
    (
        "mpich",
        {"backend": "mpi"},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"},
        "",
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
    ),
    ("a rank that is no number does not count", {}, {"JOB_COMPLETION_INDEX": "two"}, "", {}),
    (
        "the container's own stay, whatever they are",
        {},
        {"RANK": "$E:RANK", "JOB_COMPLETION_INDEX": "2"},
        "",
        {},
    ),
    ("a launcher counts only with its rank", {}, {"SLURM_NTASKS": "16"}, "", {}),
    ("the master of the front end", {}, {}, "web", {"MASTER_ADDR": "web"}),
    ("the container's master before it", {}, {"MASTER_ADDR": "zero"}, "web", {"MASTER_ADDR": "zero"}),
    ("the request's before both", {"master_addr": "first"}, {"MASTER_ADDR": "zero"}, "web", {"MASTER_ADDR": "first"}),
]


@pytest.mark.parametrize(
    ("asked", "environment", "master", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_the_source_that_wins(
    asked: dict[str, Any], environment: dict[str, str], master: str, expected: dict[str, str]
) -> None:
    found = {edit[1]: edit[2] for edit in distributed.edits(asked, environment, SOURCE, master).items}
    known = {"MASTER_ADDR", "WORLD_SIZE", "RANK", "LOCAL_RANK"}
    assert {name: value for name, value in found.items() if name in known} == expected


@pytest.mark.parametrize(
    ("asked", "environment", "words"),
    [
        ({"rank": 4, "world_size": 4}, {}, "resources.gpu.distributed.rank: 4 is not below world_size, 4"),
        (
            {"world_size": 2},
            {"JOB_COMPLETION_INDEX": "2"},
            "resources.gpu.distributed: JOB_COMPLETION_INDEX in the container's environment: 2 is not below",
        ),
        ({"rank": 5}, {"WORLD_SIZE": "5"}, "WORLD_SIZE in the container's environment says how many there are"),
    ],
)
def test_a_rank_beyond_the_size_is_refused(asked: dict[str, Any], environment: dict[str, str], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        distributed.edits(asked, environment, SOURCE)
    assert words in str(caught.value)
