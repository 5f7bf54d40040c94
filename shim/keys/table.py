"""The rows of the keys that ordinary requests do not have, by dotted path.

Loaded only for a request with one of these keys, or with an unknown key.  Each module that is named here has some of
the rows and the functions in them; a new key needs no other change than a row in one of them.  Pure.
"""

from __future__ import annotations

from shim.keys import common, container, distributed, process, storage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from shim.keys.row import Row
    from shim.shapes import Document

ROWS: dict[str, Row] = {
    **process.ROWS,
    **container.ROWS,
    **storage.ROWS,
    **distributed.ROWS,
}


def below(path: str) -> dict[str, Row]:
    """The rows for the keys of the object at a dotted path, by the names of these keys."""
    start = f"{path}." if path else ""
    return {key[len(start) :]: row for key, row in ROWS.items() if key.rpartition(".")[0] == path}


def of(document: Document) -> Iterator[tuple[str, Row, Any]]:
    """The rows for the rare keys of a request document: (path, row, value).

    Also that of `env`, which is a common key, but may refer to variables and secrets of the host.
    """
    for key, value in document.items():
        if key in ROWS:
            yield key, ROWS[key], value
    for key, value in document.get("resources", {}).items():
        if key not in common.RESOURCES:
            yield f"resources.{key}", ROWS[f"resources.{key}"], value
