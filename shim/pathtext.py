"""Paths as texts, without a look at any file.  Pure; part of the create path."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List


def absolute(destination: str) -> str:
    """The path of a destination, from the container's root and without dots; a relative one is meant from there, too."""
    if "//" in destination or "/." in destination or destination[-1:] == "/" or destination[:1] != "/":
        return clean(f"/{destination}")
    return destination


def clean(path: str) -> str:
    """Go's filepath.Clean."""
    rooted = path.startswith("/")
    parts: List[str] = []
    for part in path.split("/"):
        if part in ("", "."):
            continue
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".." or not rooted:
            parts.append(part)
    return "/" + "/".join(parts) if rooted else "/".join(parts) or "."
