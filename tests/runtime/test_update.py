"""An engine's update of resources keeps the rules of the devices that Chandler granted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab import REPOSITORY, partial

from shim.runtime import args, update
from shim.state import grants

OURS = [{"allow": True, "type": "c", "major": 195, "minor": 0, "access": "rwm"}]
DENY = {"allow": False, "access": "rwm"}
# Becomes what a runtime would: says its arguments and what it reads as the resources.
CHILD = """
import json, sys
from shim.runtime import args, update
state, kind, *rest = sys.argv[1:]
rest = update.with_devices(rest, args.parse(rest, kind), kind, state, "/root", "c1")
given = args.READERS[kind](rest[1:], args.options_of(kind, args.OPTIONS[kind]["update"]))[0]
value = [value for name, value in given if name in ("resources", "r")][-1]
text = (sys.stdin if value == "-" else open(value)).read()
print(json.dumps([rest, text]))
"""


def updated(state: Path, data: str, *words: str, kind: str = "crun") -> tuple[list[str], Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(state), kind, *words],
        cwd=REPOSITORY,
        input=data,
        capture_output=True,
        text=True,
        check=True,
    )
    rest, text = json.loads(done.stdout)
    return rest, text


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    grants.write(str(directory), partial({"id": "c1", "root": "/root", "rules": OURS}))
    return directory


RESOURCES: dict[str, Any] = {
    "devices": [DENY, {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
    "memory": {"limit": 1 << 40},
}
JOINED = {**RESOURCES, "devices": [*RESOURCES["devices"], *OURS]}


def test_resources_on_standard_input_get_the_devices(state: Path) -> None:
    words = ["update", "--resources=-", "c1"]
    rest, text = updated(state, json.dumps(RESOURCES), *words)
    assert rest == words and json.loads(text) == JOINED


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        *(
            (kind, option)
            for kind in ("crun", "youki")
            for option in ("--resources FILE", "--resources=FILE", "-r FILE")
        ),
        ("youki", "-r=FILE"),
        # abbreviations, and the last one of several
        *(("crun", option) for option in ("-rFILE", "--resource=FILE", "--res FILE", "-r /none -r FILE")),
        ("crun", "--resources /none --resources FILE"),
    ],
)
def test_resources_from_a_file_get_the_devices_and_the_file_does_not_change(
    state: Path, tmp_path: Path, kind: str, option: str
) -> None:
    file = tmp_path / "resources"
    file.write_text(json.dumps(RESOURCES))
    words = option.replace("FILE", str(file)).split()
    rest, text = updated(state, "", "update", "--memory", "5", *words, "c1", kind=kind)
    assert rest == ["update", "--memory=5", "--resources=-", "c1"]
    assert json.loads(text) == JOINED and json.loads(file.read_text()) == RESOURCES


@pytest.mark.parametrize(
    "data", ['{"memory": {"limit": 5}}', '{"devices": []}', '{"devices": null}', '{"devices": 5}', "[]", "{", ""]
)
def test_resources_without_a_list_of_devices_are_passed_on_unchanged(state: Path, data: str) -> None:
    assert updated(state, data, "update", "-r", "-", "c1")[1] == data


@pytest.mark.parametrize("source", ["-", "/dev/stdin"])
def test_what_was_read_from_a_pipe_arrives(state: Path, source: str) -> None:
    """Other names of standard input, too, and what needs several reads."""
    large = {**RESOURCES, "unified": {f"x{n}": "y" * 1000 for n in range(1000)}}
    rest, text = updated(state, json.dumps(large), "update", "--resources", source, "c1")
    assert rest[1] == "--resources=-" and json.loads(text) == {**JOINED, "unified": large["unified"]}


@pytest.mark.parametrize("source", ["-", "/dev/stdin", "FILE"])
def test_resources_above_the_limit_are_refused(state: Path, tmp_path: Path, source: str) -> None:
    """The runtime would apply them without our rules, or find nothing more to read."""
    data = " " * (update.MAX_RESOURCES + 1)
    (tmp_path / "resources").write_text(data)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        updated(state, data, "update", "--resources", source.replace("FILE", str(tmp_path / "resources")), "c1")
    assert "more than the limit of 4194304 bytes" in failed.value.stderr


def test_an_update_of_an_unknown_container_is_unchanged(tmp_path: Path) -> None:
    grants.write(str(tmp_path), partial({"id": "c1", "root": "/root"}))  # as an older Chandler wrote it
    assert updated(tmp_path, json.dumps(RESOURCES), "update", "--resources", "-", "c1") == (
        ["update", "--resources", "-", "c1"],
        json.dumps(RESOURCES),
    )
    assert updated(tmp_path / "empty", "x", "update", "--resources", "-", "c1")[1] == "x"


@pytest.mark.parametrize(
    "words",
    [
        ["update", "c1"],
        ["update", "--memory", "5", "c1"],
        ["update", "c1", "--resources"],
        ["update", "--resources", "/none", "c1"],
    ],
)
def test_an_update_without_resources_is_unchanged(state: Path, words: list[str]) -> None:
    call = args.parse(words, "crun")
    assert update.with_devices(words, call, "crun", str(state), "/root", "c1") == words


@given(
    st.lists(
        st.fixed_dictionaries({"allow": st.booleans(), "type": st.sampled_from("bc"), "major": st.integers(0, 9)}),
        min_size=1,
    )
)
def test_granted_rules_follow_the_engines_and_are_added_once(theirs: list[Any]) -> None:
    ours = [{"allow": True, "type": "c", "major": number} for number in range(3)]
    once = update._with_rules(json.dumps({"devices": theirs}).encode(), ours)
    found = json.loads(once)["devices"]
    assert found[: len(theirs)] == theirs and all(rule in found for rule in ours)
    assert update._with_rules(once, ours) == once
