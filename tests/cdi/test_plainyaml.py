"""The fast reader of plain YAML: it reads what generators write, and never differs from the full reader."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.cdi import plainyaml, spec, yamltext

# The style of `nvidia-ctk cdi generate`.
NVIDIA = """---
# made by hand
cdiVersion: 0.5.0
containerEdits:
  deviceNodes:
  - path: /dev/nvidia-modeset
    major: 195
  env:
  - NVIDIA_VISIBLE_DEVICES=void
  hooks:
  - args:
    - nvidia-cdi-hook
    - --link
    - ../libx.so.1::/usr/lib/x86_64-linux-gnu/gbm/x.so
    hookName: createContainer
    path: /usr/bin/nvidia-cdi-hook
  mounts:
    - containerPath: "/run/nvidia persistenced/socket"
      hostPath: /run/nvidia-persistenced/socket
      options: []

devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - hostPath: /dev/nvidia0
      path: /dev/nvidia0
      fileMode: 0o666
- containerEdits:
    env:
    - A=1
  name: 0:1
kind: nvidia.com/gpu
annotations: {}
"""

NOT_PLAIN = [
    *(
        "a: [x]",
        "a: {b: c}",
        "a: &x b",
        "a: *x",
        "a: !x b",
        'a: "b\\n"',
        "a: 'b''c'",
        "a: b # c",
        "a: |\n  b",
        "a: b\n  c",
        "a:b",
    ),
    *(
        "- a",
        "a",
        "a: b: c",
        "? a",
        "<<: a",
        "y: 1",
        "1: a",
        '"a": b',
        "a: \u00e4",
        "a:\tb",
        "a: b\n a: c",
        "a: 1\na: 2",
    ),
    *(
        "a:\n- - b",
        "a:\n  - b\n c: d",
        "a: b\n---",
        "a: b\n...",
        "%YAML 1.1",
        "a: @b",
        "a: `b",
        "a: ,b",
        "a: - b",
        'a: "b" c',
    ),
    *('a: "', "a:\n- b: c\n   d: e", "a: b:", "a: 'b", "a:\n-", "a: -", " a: b", "a: b\r\n", "a-b: c"),
]


def same(text: str) -> bool:
    """Whether the fast reader accepted the text; if so, checks that the full reader reads the same."""
    try:
        value = plainyaml.load(text)
    except plainyaml.NotPlain:
        return False
    assert repr(value) == repr(yamltext.load(text))
    assert repr(plainyaml.load(text, yamltext.plain_or_scalar)) == repr(yamltext.load(text, yamltext.plain_or_scalar))
    return True


def test_files_of_generators_are_read_without_a_yaml_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(NVIDIA)
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    found = spec.parse(NVIDIA.encode(), "f")
    assert list(found.devices) == ["0", "0:1"]
    assert found.devices["0"][0][2] == {"path": "/dev/nvidia0", "hostPath": "/dev/nvidia0", "fileMode": 0o666}


@pytest.mark.parametrize("text", ["", "# only\n", "---\n", *NOT_PLAIN])
def test_yaml_that_is_not_plain_is_left_to_the_full_reader(text: str) -> None:
    assert not same(text)


def test_depth_and_length_are_left_to_the_full_reader() -> None:
    assert not same("".join(" " * n + "a:\n" for n in range(plainyaml.MAX_DEPTH + 2)))
    assert not same("a" * 2000 + ": b")


words = st.sampled_from(
    "a b env mounts path /usr/lib/x.so 0:1 1.10 010 yes null ~ -x --y A=1 'q' \"q\" .inf ... [] {} = a#b a:b".split()
)
plain_values: Any = st.recursive(
    words,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(st.sampled_from("a b c d".split()), inner, min_size=1, max_size=3)
    ),
)


def written(value: Any, indent: int, left: bool) -> str:
    """A value in block style; `left`: sequences are indented as far as their key."""
    blank = " " * indent
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            if isinstance(item, str):
                lines.append(f"{blank}{key}: {item}\n")
            else:
                lines.append(
                    f"{blank}{key}:\n" + written(item, indent + (0 if left and isinstance(item, list) else 2), left)
                )
        return "".join(lines)
    if isinstance(value, list):
        return "".join(blank + "- " + written(item, indent + 2, left).lstrip(" ") for item in value)
    return f"{blank}{value}\n"


@given(st.dictionaries(st.sampled_from("a b c d".split()), plain_values, min_size=1), st.booleans())
def test_block_style_reads_the_same(value: dict[str, Any], left: bool) -> None:
    same(written(value, 0, left))


@given(st.dictionaries(st.sampled_from("a b c d".split()), plain_values, min_size=1))
def test_files_of_pyyaml_read_the_same(value: dict[str, Any]) -> None:
    text = yaml.safe_dump(value, default_flow_style=False, width=10**9)
    if same(text):
        assert plainyaml.load(text) == value


pieces = st.sampled_from(
    [
        "a",
        "b",
        "env",
        ":",
        ": ",
        " :",
        "- ",
        "-",
        "\n",
        "\n  ",
        "\n    ",
        "\n ",
        " ",
        "#",
        " #",
        "'",
        '"',
        "/x",
        "1",
        "0:1",
        "[]",
        "{}",
        "~",
        ".",
        "---",
        "...",
        "<<",
        "y",
        "?",
        "&a",
        "*a",
        "|",
        ">",
        "!",
        "%",
        "@",
        ",",
        "=",
        "(",
        "\\",
    ]
)


@given(st.lists(pieces, max_size=25).map("".join))
@settings(max_examples=1000)
def test_any_pieces_read_the_same_or_are_left(text: str) -> None:
    same(text)


damage = st.tuples(st.integers(0, len(NVIDIA)), st.integers(0, 6), st.lists(pieces, max_size=3).map("".join))


@given(st.lists(damage, min_size=1, max_size=3))
@settings(max_examples=500)
def test_a_damaged_file_reads_the_same_or_is_left(damages: list[tuple[int, int, str]]) -> None:
    text = NVIDIA
    for start, length, piece in damages:
        text = text[:start] + piece + text[start + length :]
    same(text)
