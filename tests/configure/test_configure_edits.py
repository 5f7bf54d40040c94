"""Putting settings into texts and taking them out again, without the backup's help: the very same characters."""
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

HANDLER = {"runtime_type": "io.containerd.runc.v2", "pod_annotations": ["chandler.oci/*"], "options": {"BinaryName": "/usr/bin/chandler-runtime", "SystemdCgroup": True}}


def settings_of(text: str) -> list[Setting]:
    cri = ("plugins", CRI[tomledit.parse(text)["version"]])
    return [Setting(TABLE, (*cri, "containerd", "runtimes", "chandler"), HANDLER), Setting(VALUE, (*cri, "containerd", "default_runtime_name"), "chandler"),
            Setting(VALUE, (*cri, "enable_cdi"), True), Setting(VALUE, ("plugins", "io.containerd.nri.v1.nri", "disable"), False),
            Setting(ELEMENT, ("imports",), "/etc/containerd/conf.d/99-chandler.toml")]


@pytest.mark.parametrize("path", corpus("containerd"), ids=lambda path: path.name)
def test_toml(path: Any) -> None:
    """But for a comma that a list gets where tomlkit puts it, and an empty table within a line of tables."""
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
        assert back == text or back.replace(",", "").split() == text.replace(",", "").split()
    again, more = tomledit.put(result, settings_of(text))
    assert again == result and more == {"block": "", "tables": [], "values": [], "changes": []}


NAMES = st.sampled_from(["runtimes", "features", "default-runtime", "a", "ä\"\\", "", "{", "chandler"])
VALUES = st.recursive(st.sampled_from([1, 1.5, True, None, "x", "}{", "\"runtimes\": {", "é"]), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12)
SPELLING = st.sampled_from([{"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"indent": 0}, {}, {"separators": (",", ":")}, {"indent": 1, "ensure_ascii": False}])


@example({"runtimes": {"chandler": None}}, {"indent": 2}, "", "")
@given(st.dictionaries(NAMES, VALUES, max_size=5), SPELLING, st.sampled_from(["", "\n", "\n\n", " "]), st.sampled_from(["", " ", "\n"]))
def test_json(document: dict[str, Any], spelling: dict[str, Any], end: str, start: str) -> None:
    text = start + json.dumps(document, **spelling) + end
    settings = [Setting(TABLE, ("runtimes", "chandler"), {"path": "/usr/bin/chandler-runtime"}), Setting(VALUE, ("default-runtime",), "chandler"), Setting(VALUE, ("features", "cdi"), True)]
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
