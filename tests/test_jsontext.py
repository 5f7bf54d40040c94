"""jsontext compared with the standard library's json, on every interpreter here, with and without its C accelerator."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lab import REPOSITORY

from shim import jsontext
from shim.errors import JsonError
from shim.jsontext import Number

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
        st.sampled_from(["chandler number", "chandler number'", '"chandler number"', "\ud800", "\0", "\u2028"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=4), st.just("chandler number")), inner, max_size=4),
    ),
    max_leaves=12,
)
blanks = st.text(" \t\r\n", max_size=3)
# Snippets from which damaged texts are put together: they come closer to JSON than random characters.
pieces = st.lists(
    st.sampled_from(
        [
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            '"',
            '"a"',
            '"b":',
            "1",
            "-",
            "0",
            "01",
            "1.5",
            "1e",
            "1e5",
            ".5",
            "+1",
            "NaN",
            "Infinity",
            "-Infinity",
            "true",
            "tru",
            "null",
            "nul",
            "\\",
            "\\u00",
            '"\\ud800"',
            '"\\u12"',
            "\x00",
            "\x0b",
            "\xa0",
            "\ufeff",
            "\t",
            " ",
            "\n",
            "/*",
            "'a'",
            "é",
            "\U0001f600",
            '"\x01"',
            "//",
        ]
    ),
    max_size=8,
).map("".join)


def plain(value: Any) -> Any:
    """A parsed value with every Number as the float that json would return."""
    if isinstance(value, Number):
        return float(value.text)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def refuse(_: str) -> Any:
    raise ValueError("no JSON")


def standard(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


def agree(text: str) -> None:
    """Check that jsontext and json return the same value, or that both refuse."""
    try:
        expected = standard(text)
    except (ValueError, RecursionError):
        with pytest.raises(JsonError):
            jsontext.loads(text.encode("utf-8"))
    else:
        found = plain(jsontext.loads(text.encode("utf-8")))
        assert json.dumps(found) == json.dumps(expected)


@given(json_values, blanks, blanks, st.booleans(), st.sampled_from([None, 1]))
def test_valid_text_gives_the_same_value(value: Any, before: str, after: str, ascii_only: bool, indent: Any) -> None:
    text = before + json.dumps(value, ensure_ascii=ascii_only, indent=indent) + after
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = before + json.dumps(value, indent=indent) + after
    agree(text)


@given(pieces)
@example("\ufeff{}")
@example("")
@example("{} {}")
@example("[1] \x0b")
@example("[1]\xa0")
@example("9" * 5000)
@example('{"a":1,"a":2}')
@settings(max_examples=400)
def test_damaged_text_is_refused_where_json_refuses(text: str) -> None:
    agree(text)


@given(json_values, st.integers(0, 200), st.sampled_from(["", "x", '"', "\\", "\x00", "}", "]", ","]))
def test_a_valid_text_damaged_in_one_place(value: Any, at: int, put: str) -> None:
    text = json.dumps(value)
    at %= len(text)
    agree(text[:at] + put + text[at + 1 :])


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("opened", ["[", '{"a":', '[{"a":'])
@pytest.mark.parametrize("closed", [True, False])
def test_nesting_beyond_the_interpreter_is_an_error(opened: str, closed: bool, unique: bool) -> None:
    close = opened.replace('"a":', "").replace("[", "]").replace("{", "}")[::-1]
    with pytest.raises(JsonError):
        jsontext.loads((opened * 200_000 + ("1" + close * 200_000 if closed else "")).encode(), unique)


@pytest.mark.parametrize(("depth", "fine"), [(1, True), (64, True), (65, False), (500, False)])
def test_depth(depth: int, fine: bool) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        for inner in ("", "1"):
            inner = inner or ("{}" if opening == "[" else "[]")
            value = jsontext.loads((opening * depth + inner + closing * depth).encode())
            limit_at = depth + (inner != "1")
            if limit_at <= 64:
                jsontext.check_value(value)
            else:
                with pytest.raises(JsonError, match="nested more than 64 deep"):
                    jsontext.check_value(value)
    assert fine == (depth <= 64)


def test_a_wide_value_is_not_deep() -> None:
    jsontext.check_value([[[]] * 100_000])
    jsontext.check_value("x")


INVALID = {
    "not UTF-8": (b'"\xff"', "not UTF-8 at byte 1"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), "not UTF-8 at byte 0"),
    "a surrogate in UTF-8": (b'"\xed\xa0\x80"', "not UTF-8 at byte 1"),
    "NaN": (b"[NaN]", "NaN is not JSON"),
    "Infinity": (b'{"a": Infinity}', "Infinity is not JSON"),
    "-Infinity": (b"-Infinity", "-Infinity is not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "trailing data": (b"{} x", "not JSON: Extra data: line 1 column 4"),
    "nothing": (b"  ", "not JSON: Expecting value: line 1 column"),
    "a line": (b'{\n"a": x}', "line 2 column 6"),
}


@pytest.mark.parametrize(("data", "words"), INVALID.values(), ids=INVALID)
def test_the_error_says_where_the_text_is_damaged(data: bytes, words: str) -> None:
    with pytest.raises(JsonError) as caught:
        jsontext.loads(data)
    assert words in str(caught.value)


@given(json_values)
def test_unique_changes_nothing_for_unique_keys(value: Any) -> None:
    data = json.dumps(value).encode()
    assert plain(jsontext.loads(data, unique=True)) == plain(jsontext.loads(data))


@pytest.mark.parametrize(
    "text", ['{"k":1,"k":1}', '[{"x":{"k":1,"j":2,"k":3}}]', '{"k":1,"\\u006b":2}', '{"k":{},"k":NaN}']
)
def test_a_key_that_stands_twice(text: str) -> None:
    with pytest.raises(JsonError, match="the key 'k' stands twice|NaN"):
        jsontext.loads(text.encode(), unique=True)


NUMBERS = ["1.0", "1.10", "-0.0", "1e3", "1E+3", "1e-7", "123456789012345678901234567890.5", "0.1", "1e999", "-1.5E0"]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_come_out_as_they_were_written(number: str) -> None:
    text = f'{{"a":[{number},"chandler number",{{"chandler number":{number}}}],"chandler number\'":"{number}"}}'
    assert jsontext.dumps(jsontext.loads(text.encode())).decode() == text


@given(json_values)
def test_written_text_is_json_on_one_line_and_means_the_same(value: Any) -> None:
    value = jsontext.loads(json.dumps(value).encode())
    data = jsontext.dumps(value)
    assert data.isascii() and b"\n" not in data
    assert jsontext.loads(data) == value
    assert json.dumps(json.loads(data)) == json.dumps(plain(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")], {"a": float("nan")}])
def test_nan_and_infinity_are_refused(value: Any) -> None:
    with pytest.raises(JsonError):
        jsontext.dumps(value)


def test_other_values_raise_type_error() -> None:
    for value in (b"x", {1, 2}, object()):
        with pytest.raises(TypeError, match="no JSON value"):
            jsontext.dumps(value)


def test_numbers_are_values() -> None:
    assert Number("1.0") == Number("1.0") != Number("1.00")
    assert len({Number("1.0"), Number("1.0")}) == 1
    assert Number("1") != "1"
    assert repr([Number("1.50")]) == "[1.50]"


# --- the same answers on every interpreter --------------------------------------------------------------------

VECTORS = [
    *NUMBERS,
    "{}",
    "[]",
    " \t\r\n[1]\n",
    '{"a":{"b":[1,true,null,"\\ud83d\\ude00"]}}',
    '"\\ud800"',
    '"\\ud800\\ud800"',
    "123456789012345678901234567890",
    '{"a":1,"a":2}',
    "NaN",
    "[Infinity]",
    "-Infinity",
    "\ufeff{}",
    "",
    " ",
    "{",
    "[",
    '"',
    '"\\',
    '"\\u',
    '"\\u12g4"',
    '"\x01"',
    "[1,]",
    '{"a":1,}',
    "{,}",
    '{"a"}',
    '{"a":}',
    "{1:2}",
    "01",
    "-",
    "+1",
    ".5",
    "1.",
    "1e",
    "tru",
    "nulll",
    "[1]x",
    "[1]\x0b",
    "[1]\xa0",
    "\xa0[1]",
    "'a'",
    "//",
    "{}{}",
    "[" * 64 + "]" * 64,
    "[" * 100000,
    '{"a":' * 100000,
    '"chandler number"',
    '["chandler number",1.50,"chandler number\'"]',
    '{"chandler number":2.50}',
    "\u2028",
    "[\u2028]",
    '"\x7f"',
    '"\U0001f600"',
]

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "without":
    sys.modules["_json"] = None
from shim import jsontext
from shim.errors import JsonError
assert (jsontext.make_scanner is None) == (sys.argv[2] == "without")
assert not {"json", "re", "enum", "functools"} & set(sys.modules)
import json
for line in sys.stdin:
    text = json.loads(line)
    answers = []
    for unique in (False, True):
        try:
            value = jsontext.loads(text.encode(), unique)
        except JsonError:
            answers.append(None)
            continue
        def plain(item):
            if isinstance(item, jsontext.Number):
                return {"number": item.text}
            if isinstance(item, list):
                return [plain(each) for each in item]
            if isinstance(item, dict):
                return {key: plain(each) for key, each in item.items()}
            return item
        answers.append([plain(value), jsontext.dumps(value).decode()])
    print(json.dumps(answers))
"""


def interpreters() -> list[str]:
    """Every Python on PATH that starts, by its version, and this one."""
    found = [sys.executable]
    for minor in range(9, 14):
        path = shutil.which(f"python3.{minor}")
        # a shim for interpreters that are not installed (pyenv's) does not start
        if path and subprocess.run([path, "-I", "-S", "-c", ""], capture_output=True, check=False).returncode == 0:
            found.append(path)
    return list(dict.fromkeys(found))


def answers_here(text: str) -> list[Any]:
    answers: list[Any] = []
    for unique in (False, True):
        try:
            value = json.loads(
                text,
                parse_constant=refuse,
                parse_float=lambda number: {"number": number},
                object_pairs_hook=refuse_twice if unique else None,
            )
        except (ValueError, RecursionError):
            answers.append(None)
        else:
            answers.append(value)
    return answers


def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("twice")
    return dict(pairs)


@pytest.mark.parametrize("accelerator", ["with", "without"])
@pytest.mark.parametrize("interpreter", interpreters())
def test_every_interpreter_gives_these_answers(interpreter: str, accelerator: str) -> None:
    asked = "".join(json.dumps(text) + "\n" for text in VECTORS)
    done = subprocess.run(
        [interpreter, "-I", "-S", "-B", "-c", SCRIPT, REPOSITORY, accelerator],
        input=asked,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(VECTORS)
    for text, pair in zip(VECTORS, found):
        assert [answer and answer[0] for answer in pair] == answers_here(text), text[:80]
        for answer in pair:
            if answer is not None:  # what is written is the same, number by number
                assert answers_here(answer[1])[0] == answer[0]


def test_without_the_accelerator_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "make_scanner", None)
    for text in VECTORS:
        agree(text)
    assert jsontext.dumps(jsontext.loads(b'{"a":[1.50,"chandler number"]}')) == b'{"a":[1.50,"chandler number"]}'
    with pytest.raises(JsonError):
        jsontext.dumps([float("nan")])


# --- a document that remembers how it was written -----------------------------------------------------------------

DEEP = ("linux", "process")
members = st.dictionaries(st.sampled_from(["linux", "process", "a", "b", "chandler number"]), json_values, max_size=4)
sources = st.dictionaries(
    st.sampled_from(["linux", "process", "mounts", "x"]), st.one_of(members, json_values), max_size=4
)


@given(sources, st.sampled_from([None, 1]), st.booleans())
def test_a_source_has_the_same_value(value: Any, indent: Any, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    data = text.encode("utf-8", "replace")
    assert jsontext.Source(data, DEEP).value == jsontext.loads(data)


@given(
    st.one_of(
        pieces,
        pieces.map(lambda text: '{"linux":' + text + "}"),
        pieces.map(lambda text: '{"linux":{"a":' + text + '},"a":1}'),
    )
)
@settings(max_examples=400)
def test_a_damaged_source_is_refused_where_loads_refuses(text: str) -> None:
    try:
        expected = jsontext.loads(text.encode())
    except JsonError:
        expected = None
    if isinstance(expected, dict):
        assert jsontext.Source(text.encode(), DEEP).value == expected
    else:
        with pytest.raises(JsonError):
            jsontext.Source(text.encode(), DEEP)


@given(sources, members, st.sampled_from([None, 1]))
def test_a_changed_source_is_written_as_its_value_is(value: Any, more: Any, indent: Any) -> None:
    """Changed as shim.oci does it: new objects where something differs, the old objects elsewhere."""
    source = jsontext.Source(json.dumps(value, indent=indent).encode(), DEEP)
    new = jsontext.loads(json.dumps(more).encode())
    for changed in (
        source.value,
        {**source.value, "mounts": new},
        {**new, **source.value},
        {key: part for key, part in source.value.items() if key != "x"},
        {
            **source.value,
            "linux": {**(source.value["linux"] if isinstance(source.value.get("linux"), dict) else {}), **new},
        },
    ):
        assert jsontext.loads(source.dumps(changed)) == changed


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"x":1},"a":{"x":2}}',
        '{"linux":{"a":[1],"a":[2]},"b":[3]}',
        '{"linux":{"a":[1]},"linux":{"a":[2]}}',
        '{"a":[{"k":1,"k":2}]}',
    ],
)
def test_a_key_of_a_source_that_stands_twice(text: str) -> None:
    source = jsontext.Source(text.encode(), DEEP)
    assert source.value == jsontext.loads(text.encode())
    assert jsontext.loads(source.dumps(source.value)) == source.value


def test_unchanged_members_keep_their_text() -> None:
    source = jsontext.Source(b'{"x": [1.50,  "\\u0041"], "linux": {"seccomp": {"a" : 1e3}, "n": 2}}', DEEP)
    changed = {**source.value, "linux": {**source.value["linux"], "n": 3}}
    assert source.dumps(changed) == b'{"x":[1.50,  "\\u0041"],"linux":{"seccomp":{"a" : 1e3},"n":3}}'


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b"",
        b"{",
        b'{"a":1',
        b'{"a":1}x',
        b'{"a":1,}',
        b"{1:2}",
        b'{"a" 1}',
        b'{"a":"\xff"}',
        b'{"linux":{}',
        b"\xef\xbb\xbf{}",
        b'{"a":NaN}',
        b'{"linux":{"a":Infinity}}',
        b"{" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_a_source_must_be_an_object(data: bytes) -> None:
    with pytest.raises(JsonError):
        jsontext.Source(data, DEEP)


@pytest.mark.parametrize(
    "text", ['{"a":{"x":1},"a":5}', '{"linux":{"a":{"x":1},"a":5}}', '{"linux":{"a":{"x":1}},"linux":5}']
)
def test_a_forgotten_value_is_not_written_for_another(text: str) -> None:
    """A new object may have the id() of one that was freed."""
    source = jsontext.Source(text.encode(), DEEP)
    for new in [{"y": n} for n in range(100)]:
        assert json.loads(source.dumps({"b": new})) == {"b": new}
