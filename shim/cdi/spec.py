"""Reads one CDI file: turns its bytes into a Spec with compiled edits, or lists every problem of the file.

Source: CDI SPEC.md, "CDI JSON Specification"; CDI Go library 1.1.2, pkg/cdi/spec.go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.cdi import schema, validate
from shim.cdi.compile import SAFE_HOOK_ENV, compile_edits
from shim.cdi.decoder import load
from shim.errors import CdiError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.edits import Edit
    from shim.shapes import Document


class Spec:
    """A valid CDI file: its version, kind, annotations and edits, and the decoded `document` that they come from.

    `common`: the edits of the file's own containerEdits; `devices`: device name -> the edits of that device.
    """

    __slots__ = ("annotations", "common", "devices", "document", "kind", "version")

    def __init__(self, document: Document, path: str, hook_env: Sequence[str] | None) -> None:
        self.document = document
        self.version: str = document["cdiVersion"]
        self.kind: str = document["kind"]
        self.annotations: dict[str, str] = document.get("annotations", {})
        self.common: tuple[Edit, ...] = compile_edits(document.get("containerEdits", {}), path, hook_env)
        self.devices: dict[str, tuple[Edit, ...]] = {
            device["name"]: compile_edits(device["containerEdits"], f"{path} {self.kind}={device['name']}", hook_env)
            for device in document["devices"]
        }


def parse(data: bytes, path: str, hook_env: Sequence[str] | None = SAFE_HOOK_ENV) -> Spec:
    """The Spec in `data`.  `path` is where the data came from; errors and the origins of edits name it.

    `hook_env` is the environment for hooks that have none; with None they get none.  Raises CdiError with the first
    problem, which names the file and the line or JSON path.
    """
    document, problems_found = _read(data)
    for at, what in problems_found:
        more = f" (and {len(problems_found) - 1} more)" if len(problems_found) > 1 else ""
        raise CdiError(f"{path}: {at}: {what}{more}" if at else f"{path}: {what}")
    return Spec(document, path, hook_env)


def problems(data: bytes, path: str) -> list[tuple[str, str]]:
    """Every problem of a file as (line or JSON path, sentence); [] for a valid file.  Never raises."""
    return _read(data)[1]


def _read(data: bytes) -> tuple[Document, list[tuple[str, str]]]:
    """(the decoded document, its problems as in `problems`)."""
    try:
        document = load(data, texts=True)
    except CdiError as error:
        at, colon, what = str(error).partition(": ")
        return {}, [(at, what) if colon and at.startswith("line ") else ("", str(error))]
    if document is None:
        return {}, [("", "no Spec data")]
    by_path: schema.Problems = {}
    decoded: Document = schema.SPEC(document, None, by_path)
    if isinstance(document, dict):
        validate.check(decoded, by_path)
    return decoded, list(by_path.items())
