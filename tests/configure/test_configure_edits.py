"""Adding settings to a text and removing them without the backup restores the same characters."""

from __future__ import annotations

import json
from typing import Any

import pytest
from configure.world import corpus
from hypothesis import example, given
from hypothesis import strategies as st

from shim.configure import jsonedit, tomledit
from shim.configure.containerd import CRI
from shim.configure.model import ELEMENT, TABLE, VALUE, Setting, lookup, with_setting
from shim.errors import ConfigError

HANDLER = {
    "runtime_type": "io.containerd.runc.v2",
    "pod_annotations": ["chandler.oci/*"],
    "options": {"BinaryName": "/usr/bin/chandler-runtime", "SystemdCgroup": True},
}


def settings_of(text: str) -> list[Setting]:
    cri = ("plugins", CRI[tomledit.parse(text)["version"]])
    return [
        Setting(TABLE, (*cri, "containerd", "runtimes", "chandler"), HANDLER),
        Setting(VALUE, (*cri, "containerd", "default_runtime_name"), "chandler"),
        Setting(VALUE, (*cri, "enable_cdi"), True),
        Setting(VALUE, ("plugins", "io.containerd.nri.v1.nri", "disable"), False),
        Setting(ELEMENT, ("imports",), "/etc/containerd/conf.d/99-chandler.toml"),
    ]


@pytest.mark.parametrize("path", corpus("containerd"), ids=lambda path: path.name)
def test_toml_is_restored(path: Any) -> None:
    """Exceptions: a blank in an inline table, and an empty table in an inline table of plugins."""
    text = path.read_text()
    result, record = tomledit.put(text, settings_of(text))
    document = tomledit.parse(result)
    for setting in settings_of(text):
        found = lookup(document, setting.path)
        assert setting.value in found if setting.kind == ELEMENT else found == setting.value
    back = tomledit.take(result, json.loads(json.dumps(record)))
    if path.name == "inline-tables.toml":
        document = tomledit.parse(back)
        assert document["plugins"].pop("io.containerd.nri.v1.nri") == {} and document == tomledit.parse(text)
    else:
        assert back == text or b"{" in path.read_bytes() and back.split() == text.split()
    again, more = tomledit.put(result, settings_of(text))
    assert again == result and more == {"block": "", "tables": [], "values": [], "changes": []}


IN_PLACE = Setting(VALUE, ("a", "ours"), True)


def test_toml_keeps_the_comment_above_the_next_table() -> None:
    """Also when somebody has changed Chandler's block: tomlkit counts that comment as part of the table before it."""
    text = "[a]\n  x = 1 # one\n\n# about b\n[b]\n"
    result, record = tomledit.put(text, [IN_PLACE, Setting(TABLE, ("c",), {"y": {"z": 1}})])
    assert result.startswith("[a]\n  x = 1 # one\n  ours = true\n\n# about b\n[b]\n") and result.endswith(
        "[c.y]\nz = 1\n"
    )
    result = result.replace("z = 1", "z = 2") + "# about d\n[d]\n"
    assert tomledit.take(result, record) == text + "\n# about d\n[d]\n"


def test_toml_with_the_parts_of_a_table_apart() -> None:
    text = "[a.b]\nx = 1\n[c]\n[a]\ny = 2\n[a.b.d]\n[e]\n"
    result, record = tomledit.put(text, [IN_PLACE, Setting(VALUE, ("a", "b", "x"), 3)])
    assert result == "[a.b]\nx = 3\n[c]\n[a]\ny = 2\nours = true\n[a.b.d]\n[e]\n"
    assert tomledit.take(result, record) == text


@pytest.mark.parametrize(
    ("array", "result"),
    [
        ("[]", '["v"]'),
        ("['a']", "['a', \"v\"]"),
        ("['a',]", "['a', \"v\"]"),
        ("[\n]", '["v"\n]'),
        ("[\n\t'a',\n]", "[\n\t'a',\n\t\"v\"\n]"),
        ("['a', # one\n]", "['a', # one\n\"v\"\n]"),
        ("[\n 'a' # one\n]", "[\n 'a' # one\n , \"v\"\n]"),
    ],
)
def test_an_element_of_a_toml_array(array: str, result: str) -> None:
    text = f"x = {array} # ours?\n"
    edited, record = tomledit.put(text, [Setting(ELEMENT, ("x",), "v")])
    assert edited == f"x = {result} # ours?\n"
    assert tomledit.take(edited, record) == text
    record["changes"][0]["previous"] = ""  # as earlier releases wrote it
    assert tomledit.parse(tomledit.take(edited, record)) == tomledit.parse(text)
    assert tomledit.parse(tomledit.take('x = ["v", "b"]\n', record)) == {"x": ["b"]}


NAMES = st.sampled_from(["runtimes", "features", "default-runtime", "a", 'ä"\\', "", "{", "chandler"])
VALUES = st.recursive(
    st.sampled_from([1, 1.5, True, None, "x", "}{", '"runtimes": {', "é"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
SPELLING = st.sampled_from(
    [
        {"indent": 2},
        {"indent": 4},
        {"indent": "\t"},
        {"indent": 0},
        {},
        {"separators": (",", ":")},
        {"indent": 1, "ensure_ascii": False},
    ]
)


@example({"runtimes": {"chandler": None}}, {"indent": 2}, "", "")
@given(
    st.dictionaries(NAMES, VALUES, max_size=5),
    SPELLING,
    st.sampled_from(["", "\n", "\n\n", " "]),
    st.sampled_from(["", " ", "\n"]),
)
def test_json_is_restored(document: dict[str, Any], spelling: dict[str, Any], end: str, start: str) -> None:
    text = start + json.dumps(document, **spelling) + end
    settings = [
        Setting(TABLE, ("runtimes", "chandler"), {"path": "/usr/bin/chandler-runtime"}),
        Setting(VALUE, ("default-runtime",), "chandler"),
        Setting(VALUE, ("features", "cdi"), True),
    ]
    try:
        result, record = jsonedit.put(text, settings)
    except ConfigError:
        assert any(name in document and not isinstance(document[name], dict) for name in ("runtimes", "features"))
        return
    wanted = jsonedit.parse(text)
    for setting in settings:
        wanted = with_setting(wanted, setting)
    assert jsonedit.parse(result) == wanted
    assert jsonedit.take(result, json.loads(json.dumps(record))) == text


@given(st.text(max_size=60))
def test_any_text_is_an_error_or_a_document(text: str) -> None:
    for edit in (jsonedit, tomledit):
        try:
            result, record = edit.put(text, [Setting(VALUE, ("a", "b"), 1)])
            assert lookup(edit.parse(result), ("a", "b")) == 1
        except ConfigError:
            continue
