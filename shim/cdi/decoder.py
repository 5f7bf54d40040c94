"""Decodes the bytes of a CDI file to plain values: as JSON if that succeeds, otherwise as YAML.

Source: CDI SPEC.md, "JSON Definition"; CDI Go library 1.1.2, pkg/cdi/spec.go (ParseSpec).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

from shim.cdi import plainyaml, yamltext
from shim.errors import CdiError

if TYPE_CHECKING:
    from shim.shapes import Document

MAX_SIZE = 16 << 20  # bytes of one file

_BLANKS = " \t\r\n"
_ENCODINGS = (  # (byte order mark, encoding of a file that starts with it)
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"", "utf-8"),
)


def load(data: bytes, texts: bool = False) -> Any:
    """The document in `data`; None for an empty one.

    `texts`: return numbers as yamltext.Scalar, which keeps their text.  Raises CdiError, with the line where it is
    known, if `data` is neither JSON nor YAML, or exceeds a limit.
    """
    if len(data) > MAX_SIZE:
        raise CdiError(f"the file is larger than {MAX_SIZE} bytes")
    encoding = next(name for mark, name in _ENCODINGS if data.startswith(mark))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CdiError(f"line {data.count(10, 0, error.start) + 1}: not {encoding[:6].upper()} text") from None
    scalar = yamltext.plain_or_scalar if texts else yamltext.plain
    if text.lstrip(_BLANKS)[:1] != "{":  # a YAML file is read without importing json
        return _yaml(text, scalar)
    try:
        return _json(text, texts)
    except ValueError as error:
        json_error = CdiError(f"not JSON: {error}")
    try:
        return yamltext.load(text, scalar)
    except CdiError as yaml_error:
        # A file that begins with a brace was most likely meant as JSON, and installing PyYAML would not repair it.  So
        # the YAML error is only raised when it names a line.
        raise (yaml_error if yaml_error.what.startswith("line ") else json_error) from None


def _yaml(text: str, scalar: Callable[[str], Any]) -> Any:
    try:
        return plainyaml.load(text, scalar)
    except plainyaml.NotPlain:
        return yamltext.load(text, scalar)


def _json(text: str, texts: bool) -> Any:
    """Reads JSON.  Raises ValueError for text that may still be YAML, CdiError for text that YAML would refuse, too."""
    import json

    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_number(_integer, texts),
            parse_float=_number(float, texts),
            parse_constant=_refuse,
        )
    except RecursionError:
        raise CdiError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> Document:
    items = dict(pairs)
    if len(items) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise CdiError(f'key "{name}" comes twice')
            seen.add(name)
    return items


def _number(read: Callable[[str], Any], texts: bool) -> Callable[[str], Any]:
    return (lambda digits: yamltext.Scalar(digits, read(digits))) if texts else read


def _integer(digits: str) -> Any:
    return int(digits) if len(digits) <= 20 else float(digits)  # CDI files have integers of at most 64 bits


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
