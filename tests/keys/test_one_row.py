"""A key of a request is one row in one module: one test adds a row, another counts the modules that name each key."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import REPOSITORY
from lab.local_node import Node, P, service

from shim.edits import ENV, RESOURCE
from shim.errors import ConfigError, PolicyError, RequestError
from shim.keys import common, table
from shim.keys.row import DANGEROUS, HOST, Row
from shim.policy.classes import known_words
from shim.request import values

NO_SUCH_KEY = Row(
    (values.text, str, common.OWN_WORD),
    trust=HOST,
    edits=lambda value, *_: [(RESOURCE, ("rdma", value), {"hcaHandles": 8}), (ENV, "NO_SUCH_KEY", value)],
)
ASKED = {
    "in the document": service({"resources": {"no_such_key": "mlx5_0"}}),
    "alone": {P + "resources.no_such_key": "mlx5_0"},
}


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


@pytest.fixture
def new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.ROWS, "resources.no_such_key", NO_SUCH_KEY)


def allow(node: Node, *words: str, key: str = "allow") -> None:
    node.configure("", f"[policy]\n{key} = {list(words)!r}\n")


@pytest.mark.parametrize("annotations", ASKED.values(), ids=ASKED)
def test_a_key_without_a_row_is_unknown(node: Node, annotations: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="unknown key 'resources.no_such_key'"):
        node.equip(annotations)
    allow(node, "resources.no_such_key")
    with pytest.raises(ConfigError, match="resources.no_such_key"):
        node.equip(annotations)


@pytest.mark.parametrize("annotations", ASKED.values(), ids=ASKED)
def test_one_row_adds_a_key(node: Node, new_key: None, annotations: dict[str, str]) -> None:
    with pytest.raises(PolicyError, match="resources.no_such_key is not allowed: .* has no 'resources.no_such_key'"):
        node.equip(annotations)  # `resources`, which is allowed by default, does not cover it
    allow(node, "resources.no_such_key")
    config = node.equip(annotations)
    assert config is not None
    assert config["linux"]["resources"]["rdma"] == {"mlx5_0": {"hcaHandles": 8}}
    assert "NO_SUCH_KEY=mlx5_0" in config["process"]["env"]
    allow(node, "resources.no_such_key", key="deny")
    with pytest.raises(PolicyError, match="resources.no_such_key is refused by 'resources.no_such_key' in deny"):
        node.equip(annotations)


def test_a_key_of_resources_that_is_not_for_everybody_needs_its_own_word() -> None:
    """`resources`, which is in allow by default, would cover it."""
    rows = {path: row for path, row in table.ROWS.items() if path.startswith("resources.")}
    assert not [
        path
        for path, row in rows.items()
        if row.trust in (HOST, DANGEROUS) and not (isinstance(row.entry, tuple) and common.OWN_WORD in row.entry)
    ]


def test_the_value_of_the_new_key_is_checked_and_its_name_is_known(node: Node, new_key: None) -> None:
    with pytest.raises(RequestError, match="resources.no_such_key: 5 is not a text"):
        node.equip(service({"resources": {"no_such_key": 5}}))
    with pytest.raises(RequestError, match="known here: .*no_such_key"):
        node.equip(service({"resources": {"rdma": 5}}))
    with pytest.raises(RequestError, match="unknown key 'resources.no_such_key.x'"):
        node.equip({P + "resources.no_such_key.x": "y"})
    assert known_words()["resources.no_such_key"] == HOST


# Names of keys that are also words of config.json, CDI, NRI, control groups, grant records or Python's argparse.
OTHER_MEANINGS = {
    "args",
    "capabilities",
    "command",
    "cpu",
    "cpuset",
    "devices",
    "env",
    "gpu",
    "hostname",
    "hugepages",
    "memory",
    "oom_score_adj",
    "resources",
    "sharing",
    "user",
    "vendor",
}
# module: the keys of other modules that it names.
EXCEPTIONS = {
    # makes config.json itself, so that these are no edits
    "shim.bundle.build": "cgroup_parent entrypoint workdir host_network privileged distributed master_addr",
    "shim.host.cgroups": "cgroup_parent",  # the bundle builder's groups: names the key in an error
    "shim.gpu.choose": "count prefer",  # the choice of devices is what these keys make
    "shim.policy.permission": "count",  # a request without it asks for one device
    "shim.engine": "distributed",  # its variables come after those of the devices
    # the sharing of devices is what these keys make
    "shim.sharing.mps": "mps_active_thread_percentage mps_log_dir mps_pinned_memory",
    "shim.sharing.pages": "mps_pipe_dir",
    "shim.sharing.setup": "time_slice time_slicing_config_path",
    "shim.sharing.terms": "mps_active_thread_percentage mps_log_dir mps_pinned_memory mps_pipe_dir mps_priority "
    "time_slice time_slice_index time_slicing_config_path",
    "shim.sharing.timeslice": "time_slice",
    "shim.cli.ps": "mps_active_thread_percentage",  # the limits of a grant record, in words
}


def names(entry: Any, path: str) -> Iterator[str]:
    """The dotted paths of an entry and its members."""
    yield path
    if isinstance(entry, dict):
        for key, member in entry.items():
            yield from names(member, f"{path}.{key}")


def test_one_module_names_a_key() -> None:
    entries = {**common.ENTRIES, **{path: row.entry for path, row in table.ROWS.items()}}
    paths = {path for key, entry in entries.items() for path in names(entry, key)}
    keys = {path: path.rpartition(".")[2] for path in paths}
    words = {**{name: name for name in keys.values()}, **keys}
    words.update({path.replace("resources.gpu.", "gpu."): key for path, key in keys.items()})
    named: dict[str, set[str]] = {}
    for file in (Path(REPOSITORY) / "shim").rglob("*.py"):
        module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
        for at in ast.walk(ast.parse(file.read_text())):
            key = words.get(at.value) if isinstance(at, ast.Constant) and isinstance(at.value, str) else None
            if key is not None and key not in OTHER_MEANINGS:
                named.setdefault(key, set()).add(module)
    assert named.keys() == set(keys.values()) - OTHER_MEANINGS
    for module, others in EXCEPTIONS.items():
        for key in others.split():
            named[key].remove(module)
    assert {key: modules for key, modules in named.items() if len(modules) != 1} == {}
