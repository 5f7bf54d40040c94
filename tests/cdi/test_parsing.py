"""Decoding the bytes of a CDI file.

The expected values were recorded from the CDI Go library, release 1.1.2 (pkg/cdi/spec.go, ParseSpec).
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
import yaml

from shim.cdi import decoder, spec, yamltext
from shim.errors import CdiError

FILE = """cdiVersion: 1.1.0
kind: v.com/c
containerEdits: {EDITS}
devices:
- name: "0"
  containerEdits: {env: [A=1]}
"""


@pytest.fixture(params=["plain", "libyaml", "pure"], autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test of this module as in production, and with each of PyYAML's parsers for all YAML."""
    if request.param != "plain":
        monkeypatch.setattr(decoder, "_yaml", yamltext.load)
    if request.param == "pure":
        monkeypatch.delattr(yaml, "CBaseLoader", raising=False)
    elif not hasattr(yaml, "CBaseLoader"):
        pytest.skip("PyYAML here has no libyaml")
    return str(request.param)


def with_edits(text: str) -> bytes:
    return FILE.replace("{EDITS}", text).encode()


def with_scalar(text: str, scalar: str) -> str:
    return text.replace("SCALAR", scalar)


def decoded_edits(text: str) -> dict[str, Any]:
    found: dict[str, Any] = spec.parse(with_edits(text), "f").document["containerEdits"]
    return found


# Unquoted scalars that YAML reads as another type: in a string field each keeps its text.
OWN_TEXTS = """
y Y yes on True true TRUE n no NO off false tRUE yeS
0 7 -1 +1 -0 010 -010 0777 00 0o17 0O17 0x1F 0X1F -0x10 +0x10 0b101 -0b11 0B1 1_000 1__0 0_7 1_ _1 08 0x 0o8
18446744073709551615 99999999999999999999 -99999999999999999999
.5 5. 1. 0. 00.5 0.1 1.10 1.0 1e3 1.5e3 12e03 1E5 100000.0 1e6 1e21 123456789.0 1e-7 -0.0 1e39 1e400 1e . - + --1 1.2.3
.inf -.inf +.INF .nan .NAN .iNf
1:0 1:0:0 12:30:45 2001-01-01 2001-01-01T00:00:00Z << = 1١
"""
PAIRS = [(text, text) for text in OWN_TEXTS.split()] + [
    ("'010'", "010"),
    ('"yes"', "yes"),
    ("!!str 010", "010"),
    ("!!int 0x3", "0x3"),
    ('!!int "3"', "3"),
    ("!!float 1e3", "1e3"),
    ("! 010", "010"),
]


def test_scalars_in_a_string_field() -> None:
    wrong = {}
    for given, expected in PAIRS:
        options = with_scalar("{mounts: [{hostPath: /a, containerPath: /b, options: [SCALAR]}]}", given)
        found = decoded_edits(options)["mounts"][0]["options"][0]
        if found != expected:
            wrong[given] = found
    assert wrong == {}


@pytest.mark.parametrize("scalar", ["null", "~", "Null", '""'])
def test_a_null_or_empty_string_field_is_absent(scalar: str) -> None:
    mount = decoded_edits(with_scalar("{mounts: [{hostPath: /a, containerPath: /b, type: SCALAR}]}", scalar))["mounts"][
        0
    ]
    assert not mount.get("type")


NUMBERS = {
    "1": 1,
    "1.0": 1,
    "1e2": 100,
    "1e18": 10**18,
    "0o666": 438,
    "0666": 438,
    "0x10": 16,
    "1_0": 10,
    "-1": -1,
    "9223372036854775807": 2**63 - 1,
    '!!int "7"': 7,
}
NO_NUMBERS = [
    "1.5",
    '"1"',
    '""',
    "true",
    "9223372036854775808",
    "1e19",
    "99999999999999999999",
    ".inf",
    ".nan",
    "!!str 1",
    "[1]",
    "{a: 1}",
    "x",
]


@pytest.mark.parametrize(("scalar", "number"), NUMBERS.items(), ids=str)
def test_valid_numbers(scalar: str, number: int) -> None:
    text = "{hooks: [{hookName: prestart, path: /a, timeout: SCALAR}]}"  # the widest range of all number fields
    assert decoded_edits(with_scalar(text, scalar))["hooks"][0]["timeout"] == number


# The valid range of each number of a device node; the kernel or a runtime would misread others.
RANGES = [
    ("major", 4095, [-1, 4096, 1 << 32]),
    ("minor", 1048575, [-1, 1048576, 1 << 32]),
    ("fileMode", 0o7777, [-1, 0o10000, 0o60666]),
    ("uid", (1 << 32) - 2, [-1, (1 << 32) - 1]),
    ("gid", (1 << 32) - 2, [-1, (1 << 32) - 1]),
]


@pytest.mark.parametrize(("field", "most", "beyond"), RANGES)
def test_numbers_of_a_device(field: str, most: int, beyond: list[int]) -> None:
    text = "{deviceNodes: [{path: /a, FIELD: SCALAR}]}".replace("FIELD", field)
    for number in (0, most):
        assert decoded_edits(with_scalar(text, str(number)))["deviceNodes"][0][field] == number
    for scalar in (*map(str, beyond), "-1.0", "1.5", "-0.5"):
        with pytest.raises(
            CdiError,
            match=rf"deviceNodes\[0\].{field}: must be (from 0 to {most}, not -?[0-9]+|a whole number, not .*\.5)$",
        ):
            decoded_edits(with_scalar(text, scalar))


@pytest.mark.parametrize("scalar", NO_NUMBERS)
def test_invalid_numbers(scalar: str) -> None:
    with pytest.raises(CdiError, match=r"deviceNodes\[0\].major"):
        decoded_edits(with_scalar("{deviceNodes: [{path: /a, major: SCALAR}]}", scalar))


@pytest.mark.parametrize("mode", ["-1", '"0666"', "4294967296", "1.5", "rw"])
def test_invalid_file_modes(mode: str) -> None:
    with pytest.raises(CdiError, match="fileMode"):
        decoded_edits(with_scalar("{deviceNodes: [{path: /a, fileMode: SCALAR}]}", mode))


@pytest.mark.parametrize("scalar", ["1", "0", '"true"', "[]", "maybe"])
def test_invalid_booleans(scalar: str) -> None:
    with pytest.raises(CdiError, match="enableMonitoring"):
        decoded_edits(with_scalar("{intelRdt: {enableMonitoring: SCALAR}}", scalar))


SAME = {
    "valid, plain": FILE,
    "valid, byte order mark": "\ufeff" + FILE,
    "valid, CR LF": FILE.replace("\n", "\r\n"),
    "valid, a second document": FILE + "---\nfoo: [\n",
    "valid, garbage after the end of the document": FILE + "...\n}}}\n",
    "valid, a document marker": "---\n" + FILE,
    "valid, comments": "# c\n" + FILE.replace("\n", " # x\n"),
    "valid, null edits": FILE.replace("{EDITS}", "null"),
    "valid, tagged mapping": FILE.replace("{EDITS}", "!!map {}"),
    "valid, version with v": FILE.replace("1.1.0", "v1.1.0"),
    "valid, flow style with a comma too many": '{"cdiVersion":"1.1.0","kind":"v.com/c",'
    '"devices":[{"name":0,"containerEdits":{"env":["A=1"]},}]}',
    "valid, JSON": '{"cdiVersion":"1.1.0","kind":"v.com/c","devices":[{"name":"0","containerEdits":{"env":["A=1"]}}]}',
    "valid, JSON with a number for a string": '{"cdiVersion":"1.1.0","kind":"v.com/c",'
    '"devices":[{"name":0,"containerEdits":{"env":["A=1"]}}]}',
    "valid, JSON indented with tabs": '{\n\t"cdiVersion":"1.1.0",\n\t"kind":"v.com\\/c",\n'
    '\t"devices":[{"name":"0","containerEdits":{"env":["A=1"]}}]}',
    "valid, JSON and something after it": '{"cdiVersion":"1.1.0","kind":"v.com/c",'
    '"devices":[{"name":"0","containerEdits":{"env":["A=1"]}}]} {}',
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_valid_files(text: str, encoding: str) -> None:
    if encoding == "utf-16":
        text = text.lstrip("\ufeff")
    found = spec.parse(text.replace("{EDITS}", "{}").encode(encoding), "f")
    assert found.kind == "v.com/c"
    assert found.devices == {"0": (("env", "A", "1", "f v.com/c=0"),)}


NOT_FILES = {
    "invalid, empty": ("", "no Spec data"),
    "invalid, blank": (" \n\n", "no Spec data"),
    "invalid, comment only": ("# nothing\n", "no Spec data"),
    "invalid, null": ("null\n", "no Spec data"),
    "invalid, marker only": ("---\n", "no Spec data"),
    "invalid, empty first document": ("---\n---\n" + FILE, "no Spec data"),
    "invalid, a list": ("[]", "must be a mapping"),
    "invalid, a string": ("hello", "must be a mapping"),
    "invalid, a number": ("3", "must be a mapping"),
    "invalid, a duplicate key": (FILE + "kind: v.com/c\n", 'line 7: key "kind" comes twice'),
    "invalid, a duplicate key deep inside": (
        FILE.replace("{EDITS}", "{env: [], env: []}"),
        'line 3: key "env" comes twice',
    ),
    "invalid, a duplicate key in JSON": ('{"kind": 1, "kind": 2}', 'key "kind" comes twice'),
    "invalid, a key that is merged and set": (
        FILE.replace("{EDITS}", "{mounts: [&a {hostPath: /a, containerPath: /b}, {<<: *a, hostPath: /c}]}"),
        'key "hostPath" comes twice',
    ),
    "invalid, unknown field": (FILE + "foo: 1\n", "foo: unknown field"),
    "invalid, unknown field deep inside": (
        FILE.replace("{EDITS}", "{hooks: [{nom: x}]}"),
        r"containerEdits.hooks\[0\].nom: unknown field",
    ),
    "invalid, field in other case": (FILE.replace("kind", "KIND"), "KIND: unknown field; write kind"),
    "invalid, dropped enableCMT": (
        FILE.replace("{EDITS}", "{intelRdt: {enableCMT: true}}"),
        "enableCMT: unknown field",
    ),
    "invalid, null device node": (
        FILE.replace("{EDITS}", "{deviceNodes: [null]}"),
        r"deviceNodes\[0\]: must be a mapping, not null",
    ),
    "invalid, null mount": (FILE.replace("{EDITS}", "{mounts: [~]}"), r"mounts\[0\]: must be a mapping, not null"),
    "invalid, null hook": (FILE.replace("{EDITS}", "{hooks: [null]}"), r"hooks\[0\]: must be a mapping, not null"),
    "invalid, null net device": (
        FILE.replace("{EDITS}", "{netDevices: [null]}"),
        r"netDevices\[0\]: must be a mapping, not null",
    ),
    "invalid, null device": (
        FILE.replace("devices:", "devices:\n- null"),
        r"devices\[0\]: must be a mapping, not null",
    ),
    "invalid, edits are a list": (FILE.replace("{EDITS}", "[]"), "containerEdits: must be a mapping, not a list"),
    "invalid, options are a string": (
        FILE.replace("{EDITS}", "{mounts: [{options: ro}]}"),
        "options: must be a list, not a string",
    ),
    "invalid, null key": (FILE.replace("{EDITS}", "{~: 1}"), "a key must be a string"),
    "invalid, a list for a key": (FILE.replace("{EDITS}", "{? [a] : 1}"), "a key must be a string"),
    "invalid, merge of a scalar": (FILE.replace("{EDITS}", "{<<: 3}"), "<< needs a mapping"),
    "invalid, unknown anchor": (FILE.replace("{EDITS}", "*a"), "line 3"),
    "invalid, an anchor inside itself": (FILE.replace("{EDITS}", "&a {env: *a}"), "line 3"),
    "invalid, foreign tag": (FILE.replace("{EDITS}", "!!python/name:os.system x"), "tag .* is not supported"),
    "invalid, tag that does not fit": (FILE.replace("1.1.0", "!!int x"), "is not of the type that its tag"),
    "invalid, not YAML": ("a: [", "line [12]"),
    "invalid, tab-indented YAML": ("a:\n\tb: 1\n", "line 2"),
    "invalid, NUL in a string": (FILE.replace("A=1", '"A=\\0"'), "NUL"),
    "invalid, half a surrogate pair in JSON": ('{"kind": "\\ud800"}', "surrogate"),
    "invalid, NaN in JSON": ('{"kind": NaN, "kind": 2}', 'line 1: key "kind" comes twice'),
    "invalid, a control character": (FILE + "\x07", "not YAML|line"),
    "invalid, an escape beyond Unicode": ('"\\UFFFFFFFF"', "not YAML|line"),
    "invalid, an absurd directive": ("%YAML 9999999999999999999999999999.1\n---\n" + FILE, "not YAML|line"),
}


@pytest.mark.parametrize(("text", "sentence"), NOT_FILES.values(), ids=NOT_FILES)
def test_invalid_files(text: str, sentence: str) -> None:
    with pytest.raises(CdiError, match=sentence) as caught:
        spec.parse(text.replace("{EDITS}", "{}").encode(), "/etc/cdi/f.yaml")
    assert str(caught.value).startswith("/etc/cdi/f.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff", b"a: \xc3\n", b"\x80abc", b"\xff\xfea"])
def test_bytes_that_are_not_text_are_an_error(data: bytes) -> None:
    with pytest.raises(CdiError, match="line 1: not UTF"):
        decoder.load(data)


def test_anchors_and_merges() -> None:
    edits = decoded_edits(
        "{mounts: [&a {hostPath: /a, containerPath: /b}, {<<: *a, type: x}, *a, "
        "{<<: [{hostPath: /c}, {containerPath: /d}]}]}"
    )
    plain = {"hostPath": "/a", "containerPath": "/b"}
    assert edits["mounts"] == [plain, {**plain, "type": "x"}, plain, {"hostPath": "/c", "containerPath": "/d"}]


def test_a_quoted_merge_key_is_a_field_like_any_other() -> None:
    with pytest.raises(CdiError, match="<<: unknown field"):
        decoded_edits('{"<<": {}}')


def test_keys_that_are_no_strings_become_strings() -> None:
    found = spec.parse((FILE.replace("{EDITS}", "{}") + "annotations: {2: true, yes: 1.5, b: null}\n").encode(), "f")
    assert found.annotations == {"2": "true", "yes": "1.5", "b": ""}


def test_alias_bombs_stop_at_the_limit() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(CdiError, match="aliases add more than"):
        yamltext.load("\n".join(lines))


def test_a_long_text_repeated_by_aliases_stops_at_the_limit() -> None:
    with pytest.raises(CdiError, match="aliases add more than"):
        yamltext.load("a: &a " + "x" * 100_000 + "\nb: [" + ", ".join(["*a"] * 50) + "]\n")


def test_depth_is_limited() -> None:
    assert yamltext.load("[" * 60 + "]" * 60)
    for text in ("[" * 70 + "]" * 70, "[" * 100_000, "- " * 5000, "{a: " * 70):
        with pytest.raises(CdiError):
            yamltext.load(text)
    with pytest.raises(CdiError):
        decoder.load(b'{"a":' * 100_000)


def test_size_is_limited(parser: str) -> None:
    with pytest.raises(CdiError, match="larger than 16777216 bytes"):
        decoder.load(b" " * (decoder.MAX_SIZE + 1))
    if parser == "pure":
        with pytest.raises(CdiError, match="install python3-yaml with libyaml"):
            yamltext.load("# " + "x" * yamltext.MAX_PURE)


def test_very_long_numbers_are_not_converted() -> None:
    digits = "9" * 200_000
    assert yamltext.load(f"a: {digits}") == {"a": digits}
    assert math.isinf(decoder.load(with_scalar('{"a": SCALAR}', digits).encode())["a"])


def test_without_pyyaml_json_still_works_and_yaml_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert decoder.load(b'{"a": 1}') == {"a": 1}
    with pytest.raises(CdiError, match="install python3-yaml"):
        decoder.load(b"a: [1]")
    with pytest.raises(CdiError, match="not JSON: .* line 1"):
        decoder.load(b'{"a": 1')


def test_json_and_yaml_give_the_same(parser: str) -> None:
    value = {"a": [1, "x", None, True, 1.5], "b": {"c": "1:0", "d": ["010", "yes"]}}
    text = json.dumps(value)
    assert decoder.load(text.encode()) == yamltext.load(text) == value
