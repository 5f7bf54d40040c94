"""Checks a request's document by the entries of its keys (shim.keys.common).  Pure; part of the create path."""

from __future__ import annotations

from shim import errors
from shim.keys import common
from shim.request import values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional

    from shim.shapes import Document


def check(document: Any, entries: Optional[Dict[str, common.Entry]] = None, path: str = "") -> Document:
    """The normal form of `document`, an object with the keys of `entries` (by default all keys of a request).

    `path`: the dotted path of this object in the request.  Raises RequestError, which names the key.
    """
    if not isinstance(document, dict):
        raise values.wrong_value(document, "is not an object").within(path or "the document")
    entries = common.ENTRIES if entries is None else entries
    result: Document = {}
    for key, value in document.items():
        where = f"{path}.{key}" if path else key
        entry = entries.get(key) or rare_entry(entries, key, path)
        if isinstance(entry, dict):
            result[key] = check(value, entry, where)
        else:
            try:
                result[key] = entry[0](value)
            except errors.RequestError as error:
                raise error.within(where) from None
    return result


def rare_entry(entries: Dict[str, common.Entry], key: str, path: str) -> common.Entry:
    """The entry of a key that is not among `entries`, the common keys of the object at `path`.  Raises RequestError for
    an unknown key."""
    from shim.keys import table

    rows = table.below(path)
    if key not in rows:
        where = f"{path}.{key}" if path else key
        raise errors.RequestError(f"unknown key {where!r}", f"known here: {', '.join(sorted({*entries, *rows}))}")
    return rows[key].entry
