"""Works on paths as texts, without access to files.  Pure; part of the create path."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List

MAX_LINKS = 40  # as in Linux: path_resolution(7)


def absolute(destination: str) -> str:
    """A mount's destination as an absolute path without dots.  A relative one begins at the container's root, too."""
    if "//" in destination or "/." in destination or destination[-1:] == "/" or destination[:1] != "/":
        return clean(f"/{destination}")
    return destination


def clean(path: str) -> str:
    """The shortest equivalent path, by the rules of Go's filepath.Clean."""
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
    """`path` with its links followed, as a process does whose root directory is `/`; '' for more than MAX_LINKS links.

    `link(directory, name)` gives the target of the link {directory}/{name}, or '' where there is no link.  It gets a
    `directory` without links, and without a slash at its end: '' for the root.
    """
    rest = [part for part in reversed(path.split("/")) if part not in ("", ".")]  # a stack: the next part is last
    directory = ""
    links = 0
    while rest:
        part = rest.pop()
        if part == "..":
            directory = directory.rpartition("/")[0]
            continue
        target = link(directory, part)
        if not target:
            directory = f"{directory}/{part}"
            continue
        links += 1
        if links > MAX_LINKS:
            return ""
        if target.startswith("/"):
            directory = ""
        rest += [part for part in reversed(target.split("/")) if part not in ("", ".")]
    return directory or "/"
