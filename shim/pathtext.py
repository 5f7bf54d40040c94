"""Paths as texts, without a look at any file.  Pure; part of the create path."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List

MAX_LINKS = 40  # as in Linux: path_resolution(7)


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


def follow(path: str, link: Callable[[str, str], str]) -> str:
    """`path` with its links followed as a process would whose root directory is `/`; '' for more than MAX_LINKS of them.

    `link(directory, name)` gives what the link at {directory}/{name} says, '' where there is no link; `directory` has no
    links and no slash at its end.
    """
    rest = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    here = ""
    links = 0
    while rest:
        part = rest.pop()
        if part == "..":
            here = here.rpartition("/")[0]
            continue
        target = link(here, part)
        if not target:
            here = f"{here}/{part}"
            continue
        links += 1
        if links > MAX_LINKS:
            return ""
        if target.startswith("/"):
            here = ""
        rest += [each for each in reversed(target.split("/")) if each not in ("", ".")]
    return here or "/"
