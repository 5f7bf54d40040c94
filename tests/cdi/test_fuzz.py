"""Any bytes as a CDI file give a Spec or one clean error, in bounded time."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.cdi import schema, spec, yamltext
from shim.cdi.registry import Registry
from shim.errors import CdiError

SECONDS = 5.0  # far more than any of these takes, even on a slow machine

FILE = b"""# a comment
cdiVersion: "1.1.0"
kind: nvidia.com/gpu
annotations: {a: b}
containerEdits: &edits
  env: [A=1, "B=2"]
  deviceNodes:
  - {path: /dev/nvidia0, hostPath: /dev/x, type: c, major: 0xc3, minor: 0o17, fileMode: 0666, permissions: rw, uid: 1}
  mounts:
  - hostPath: /usr/lib/x.so
    containerPath: /usr/lib/x.so
    options: [ro, rbind]
  hooks:
  - {hookName: createContainer, path: /usr/bin/hook, args: [hook, x], timeout: 3}
  intelRdt: {closID: x}
  additionalGids: [44]
  netDevices: [{hostInterfaceName: e, name: n}]
devices:
- name: 0:1
  containerEdits: {<<: *edits}
- name: '1'
  containerEdits: *edits
"""
PIECES = [
    *(FILE[start : start + 7] for start in range(0, len(FILE), 7)),
    *b": - & * [ ] { } ' \" | > % ! # , ? \n \t \0 \xff".split(b" "),
    *(
        b"<<",
        b"---\n",
        b"...\n",
        b"!!binary ",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"&a [*a]",
        b"9" * 40,
        b"\\U",
        b'"\\x',
        b"%YAML 1.1\n",
    ),
]


def check(data: bytes) -> None:
    started = time.monotonic()
    problems = spec.problems(data, "/f")
    try:
        found = spec.parse(data, "/f")
    except CdiError as error:
        assert problems
        assert str(error).startswith("/f: ")
        assert "\n" not in str(error)
    else:
        assert problems == []
        assert found.devices
    assert time.monotonic() - started < SECONDS


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    check(data)


@given(st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join))
def test_any_pieces_of_a_file(data: bytes) -> None:
    check(data)


@given(
    st.lists(st.tuples(st.integers(0, len(FILE)), st.integers(0, 20), st.sampled_from(PIECES)), min_size=1, max_size=4)
)
@settings(max_examples=300)
def test_a_damaged_file(damages: list[tuple[int, int, bytes]]) -> None:
    data = FILE
    for start, length, piece in damages:
        data = data[:start] + piece + data[start + length :]
    check(data)


@given(st.integers(0, len(FILE)))
def test_a_file_cut_short(length: int) -> None:
    check(FILE[:length])


@given(st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join))
@settings(max_examples=60)
def test_any_pieces_with_the_parser_in_python(data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(yaml, "CBaseLoader", raising=False)
        check(data)


fields = st.sampled_from(
    "cdiVersion kind devices containerEdits name annotations env deviceNodes mounts hooks intelRdt additionalGids "
    "netDevices path hostPath containerPath type major options hookName args timeout closID schemata fileMode".split()
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(fields | st.text(max_size=3), inner, max_size=5),
    max_leaves=20,
)


@given(values)
def test_any_json_value(value: Any) -> None:
    check(json.dumps(value).encode())


@given(values)
def test_decoding_never_fails_and_places_every_problem(value: Any) -> None:
    found: dict[str, str] = {}
    schema.SPEC(value, None, found)
    assert all(place and sentence for place, sentence in found.items())


@given(st.text(alphabet="0123456789+-.eExXoObB_:aAfFnN", max_size=12))
def test_any_scalar_is_a_value_and_a_text(text: str) -> None:
    value = yamltext.plain(text)
    assert value is None or isinstance(value, (bool, int, float, str))
    kept = yamltext.plain_or_scalar(text)
    assert (kept.text, repr(kept.value)) == (text, repr(value)) if isinstance(kept, yamltext.Scalar) else kept == value


def alias_bomb(width: int, depth: int, leaf: str) -> str:
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth)]
    return "\n".join(lines)


@given(st.integers(1, 12), st.integers(1, 60), st.sampled_from(["x", "[]", "{a: b}", "x" * 5000]))
@settings(deadline=None)
def test_alias_bombs(width: int, depth: int, leaf: str) -> None:
    check(alias_bomb(width, depth, leaf).encode())
    check(("cdiVersion: 1.1.0\nannotations:\n  " + alias_bomb(width, depth, leaf).replace("\n", "\n  ")).encode())


@given(
    st.lists(
        st.tuples(st.sampled_from(["a.yaml", "b.json", "c.yml"]), st.binary(max_size=50) | st.just(FILE)), max_size=4
    ),
    st.text(),
)
def test_any_directory(entries: list[tuple[str, bytes]], name: str) -> None:
    registry = Registry.build([("/a", None, list(dict(entries).items()))])
    if registry.lookup(name) is None:
        assert "\n" not in str(registry.diagnose([name]))
