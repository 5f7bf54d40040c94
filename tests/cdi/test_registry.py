"""Directories, priorities, conflicts, diagnosis (CDI Go library, pkg/cdi/spec-dirs.go and cache.go)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cdi.registry import Registry
from shim.errors import CdiError, ChandlerError, HostError
from shim.host import trust
from shim.node import cdi_files

ME = {os.geteuid(): "the caller", 0: "root"}


def text(*devices: str, kind: str = "v.com/c", mark: str = "x") -> bytes:
    lines = ["cdiVersion: 0.5.0", f"kind: {kind}", "devices:"]
    lines += [f"- {{name: '{name}', containerEdits: {{env: [FROM={mark}]}}}}" for name in devices]
    return "\n".join(lines).encode()


def build(*directories: Mapping[str, bytes | ChandlerError], paths: str = "abcdef") -> Registry:
    return Registry.build([(f"/{path}", None, list(entries.items())) for path, entries in zip(paths, directories)])


def origin(registry: Registry, name: str) -> Any:
    found = registry.lookup(name)
    return found and found[0]


# directories from low to high priority; what defines v.com/c=x; files with a problem
CASES: dict[str, tuple[list[dict[str, bytes]], Any, list[str]]] = {
    "valid, one file": ([{"f.yaml": text("x")}], "/a/f.yaml", []),
    "valid, nothing at all": ([{}], None, []),
    "valid, .json, too": ([{"f.json": text("x")}], "/a/f.json", []),
    "valid, a dotfile loads": ([{".f.yaml": text("x")}], "/a/.f.yaml", []),
    "valid, other endings are ignored": (
        [{"f.yml": text("x"), "f.YAML": text("x"), "f.Json": b"?", "yaml": b"?"}],
        None,
        [],
    ),
    "valid, the later directory wins": ([{"f.yaml": text("x")}, {"f.yaml": text("x")}], "/b/f.yaml", []),
    "valid, another kind is another device": (
        [{"f.yaml": text("x")}, {"f.yaml": text("x", kind="w.com/c")}],
        "/a/f.yaml",
        [],
    ),
    "valid, two files of one kind": ([{"f.yaml": text("x"), "g.yaml": text("y")}], "/a/f.yaml", []),
    "invalid, a bad file does not hide the others": (
        [{"bad.yaml": b"a: [", "f.yaml": text("x")}],
        "/a/f.yaml",
        ["/a/bad.yaml"],
    ),
    "invalid, a bad file shadows nothing": ([{"f.yaml": text("x")}, {"f.yaml": b"["}], "/a/f.yaml", ["/b/f.yaml"]),
    "invalid, a conflict at one priority": (
        [{"f.yaml": text("x"), "g.yaml": text("x")}],
        None,
        ["/a/f.yaml", "/a/g.yaml"],
    ),
    "invalid, a conflict of three": (
        [{"f.yaml": text("x"), "g.yaml": text("x"), "h.yaml": text("x")}],
        None,
        ["/a/f.yaml", "/a/g.yaml", "/a/h.yaml"],
    ),
    "invalid, a clean definition above a conflict wins": (
        [{"f.yaml": text("x"), "g.yaml": text("x")}, {"h.yaml": text("x")}],
        "/b/h.yaml",
        ["/a/f.yaml", "/a/g.yaml"],
    ),
    "invalid, a clean definition below a conflict does not help": (
        [{"h.yaml": text("x")}, {"f.yaml": text("x"), "g.yaml": text("x")}],
        None,
        ["/b/f.yaml", "/b/g.yaml"],
    ),
    "invalid, a device name twice in one file": ([{"f.yaml": text("x", "x")}], None, ["/a/f.yaml"]),
}


@pytest.mark.parametrize(("directories", "definer", "wrong"), CASES.values(), ids=CASES)
def test_which_file_defines_a_device(directories: list[dict[str, bytes]], definer: Any, wrong: list[str]) -> None:
    registry = build(*directories)
    assert origin(registry, "v.com/c=x") == definer
    assert sorted(registry.problems) == wrong


def test_a_conflict_leaves_the_other_devices_of_both_files() -> None:
    registry = build({"f.yaml": text("x", "only-f"), "g.yaml": text("x", "only-g")})
    assert sorted(registry.devices) == ["v.com/c=only-f", "v.com/c=only-g"]
    assert registry.conflicts == {"v.com/c=x": ["/a/f.yaml", "/a/g.yaml"]}


def test_shadowing_leaves_the_other_devices_of_the_lower_file() -> None:
    registry = build({"f.yaml": text("x", "y")}, {"g.yaml": text("x")})
    assert origin(registry, "v.com/c=y") == "/a/f.yaml"
    assert registry.shadowed == {"v.com/c=x": ["/a/f.yaml"]}
    assert registry.problems == {}


def test_of_a_directory_listed_twice_the_second_copy_counts() -> None:
    one, two = {"f.yaml": text("x", mark="one")}, {"f.yaml": text("x", mark="two")}
    for first, second in (("/a", "/a"), ("/a", "/a/"), ("/a", "//b/..//a/.")):
        registry = Registry.build(
            [(first, None, list(one.items())), ("/m", None, []), (second, None, list(two.items()))]
        )
        found = registry.lookup("v.com/c=x")
        assert found and found[2][0][2] == "two"
        assert registry.directories == ["/m", "/a"]
        assert (registry.problems, registry.shadowed) == ({}, {})


def test_a_directory_that_cannot_be_listed_hides_no_other() -> None:
    error = HostError("the CDI directory /a cannot be read")
    registry = Registry.build([("/a", error, []), ("/b", None, [("f.yaml", text("x"))])])
    assert origin(registry, "v.com/c=x") == "/b/f.yaml"
    assert registry.problems == {"/a": [error]}


def test_the_reason_why_a_file_cannot_be_read_is_reported() -> None:
    error = HostError("/a/f.yaml is a directory")
    registry = build({"f.yaml": error, "g.yaml": text("x")})
    assert registry.problems == {"/a/f.yaml": [error]}
    assert origin(registry, "v.com/c=x") == "/a/g.yaml"


def test_files_are_read_in_the_order_of_their_names() -> None:
    registry = build({"b.yaml": text("b"), "a.yaml": text("a"), ".c.json": text("c")})
    assert [file.path for file in registry.files] == ["/a/.c.json", "/a/a.yaml", "/a/b.yaml"]


def test_lookup_gives_the_edits_of_the_file_and_of_the_device() -> None:
    data = (
        b"cdiVersion: 0.3.0\nkind: v.com/c\ncontainerEdits: {env: [F=1]}\n"
        b"devices: [{name: x, containerEdits: {env: [D=2]}}]"
    )
    assert build({"f.yaml": data}).lookup("v.com/c=x") == (
        "/a/f.yaml",
        (("env", "F", "1", "/a/f.yaml"),),
        (("env", "D", "2", "/a/f.yaml v.com/c=x"),),
    )


# --- diagnosis ------------------------------------------------------------------------------------------------


def test_the_diagnosis_names_directories_broken_files_and_near_names() -> None:
    registry = build({"f.yaml": text("gpu0", "gpu1"), "bad.yaml": b"kind: ["}, {})
    sentence = str(registry.diagnose(["v.com/c=gpu2", "v.com/c=gpu3"]))
    assert sentence.startswith("unresolvable CDI devices v.com/c=gpu2, v.com/c=gpu3 (read /a, /b; /a/bad.yaml: line ")
    assert "the nearest known: v.com/c=gpu" in sentence


def test_the_diagnosis_names_the_conflict_but_not_those_about_other_names() -> None:
    registry = build({"f.yaml": text("x", "y"), "g.yaml": text("x", "y")})
    sentence = str(registry.diagnose(["v.com/c=x"]))
    assert "v.com/c=x is defined by /a/f.yaml and /a/g.yaml" in sentence
    assert "v.com/c=y" not in sentence


def test_the_diagnosis_of_a_node_without_devices_says_what_to_do() -> None:
    assert str(build({}).diagnose(["gpu"])).endswith(
        "no CDI device is known; generate a CDI file or name its directory"
    )
    assert "read no directory" in str(Registry.build([]).diagnose(["gpu"]))


def test_the_diagnosis_names_a_directory_that_cannot_be_listed() -> None:
    registry = Registry.build([("/a", HostError("permission denied"), [])])
    assert "/a: permission denied" in str(registry.diagnose(["x"]))


@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_any_unknown_names_get_a_diagnosis_in_one_line(names: list[str]) -> None:
    error = build({"f.yaml": text("x")}).diagnose(names)
    assert isinstance(error, CdiError)
    assert "\n" not in str(error)


# --- the reader, with real directories ------------------------------------------------------------------------


def read(*directories: pathlib.Path) -> Registry:
    return Registry.build(cdi_files.read_spec_dirs([str(path) for path in directories], ME))


@pytest.fixture
def cdi(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    # Other tests cover trust; pytest's directories may be below one that anybody may write.
    monkeypatch.setattr(trust, "check_path", lambda path, owners: trust.path_steps(path))
    monkeypatch.setattr(trust, "check_trust", lambda *args, **kwargs: None)
    return tmp_path


def test_links_directories_and_missing_directories(cdi: pathlib.Path) -> None:
    (cdi / "real").write_bytes(text("linked"))
    (cdi / "specs").mkdir()
    (cdi / "specs" / "link.yaml").symlink_to(cdi / "real")
    (cdi / "specs" / "dangling.yaml").symlink_to(cdi / "nowhere")
    (cdi / "specs" / "directory.yaml").mkdir()
    (cdi / "specs" / "directory.yaml" / "deep.yaml").write_bytes(text("deep"))
    (cdi / "specs" / "to-directory.yaml").symlink_to(cdi / "specs")
    (cdi / "specs" / ".hidden.yaml").write_bytes(text("hidden"))
    registry = read(cdi / "missing", cdi / "specs")
    assert sorted(registry.devices) == ["v.com/c=hidden", "v.com/c=linked"]
    assert sorted(os.path.basename(path) for path in registry.problems) == [
        "dangling.yaml",
        "directory.yaml",
        "to-directory.yaml",
    ]


# files before, files after (None: removed), who then defines v.com/c=x
CHANGES: dict[str, tuple[dict[str, bytes], dict[str, bytes | None], str | None]] = {
    "valid, nothing changed": ({"a.yaml": text("x")}, {}, "a.yaml"),
    "valid, a file appears": ({}, {"a.yaml": text("x")}, "a.yaml"),
    "valid, a file goes": ({"a.yaml": text("x")}, {"a.yaml": None}, None),
    "valid, a device moves to another file": ({"a.yaml": text("x")}, {"a.yaml": None, "b.json": text("x")}, "b.json"),
    "valid, a device is renamed": ({"a.yaml": text("x")}, {"a.yaml": text("y")}, None),
    "valid, a bad file is mended": ({"a.yaml": b"["}, {"a.yaml": text("x")}, "a.yaml"),
    "valid, a conflict ends": ({"a.yaml": text("x"), "b.yaml": text("x")}, {"a.yaml": None}, "b.yaml"),
    "invalid, a conflict begins": ({"a.yaml": text("x")}, {"b.yaml": text("x")}, None),
    "invalid, a file breaks": ({"a.yaml": text("x")}, {"a.yaml": b"["}, None),
    "valid, another file breaks": ({"a.yaml": text("x"), "b.yaml": text("y")}, {"b.yaml": b"["}, "a.yaml"),
    "valid, a file of another kind appears": ({"a.yaml": text("x")}, {"b.yaml": text("x", kind="w.com/c")}, "a.yaml"),
}


@pytest.mark.parametrize(("before", "changes", "definer"), CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_by_the_next_reading(
    before: dict[str, bytes], changes: dict[str, bytes | None], definer: str | None, cdi: pathlib.Path
) -> None:
    for name, data in before.items():
        (cdi / name).write_bytes(data)
    read(cdi)
    for name, change in changes.items():
        if change is None:
            (cdi / name).unlink()
        else:
            (cdi / name).write_bytes(change)
    assert origin(read(cdi), "v.com/c=x") == (definer and str(cdi / definer))
