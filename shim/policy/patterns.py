"""Compares names and paths with the lists of [policy].  Pure."""

from __future__ import annotations


def glob(pattern: str, text: str) -> bool:
    """Whether a text matches a pattern in which * stands for any characters and ? for one character."""
    head, *rest = pattern.split("*")
    if len(text) < len(head) or not _alike(head, text[: len(head)]):
        return False
    if not rest:
        return len(text) == len(head)
    # The first match of each part between two * is enough, since a * takes up any rest.
    at, end = len(head), len(text) - len(rest[-1])
    for part in rest[:-1]:
        while at + len(part) <= end and not _alike(part, text[at : at + len(part)]):
            at += 1
        at += len(part)
        if at > end:
            return False
    return at <= end and _alike(rest[-1], text[end:])


def _alike(pattern: str, text: str) -> bool:
    """Whether a text matches a pattern in which only ? is special."""
    return len(pattern) == len(text) and all(wanted in ("?", actual) for wanted, actual in zip(pattern, text))


def matches_any(patterns: list[str], text: str) -> bool:
    """Whether a text matches one of some patterns."""
    return any(glob(pattern, text) for pattern in patterns)


def below(path: str, prefixes: list[str]) -> str:
    """The first of `prefixes` that is `path` or one of its parent directories, or ''.  Compares texts and no files."""
    for prefix in prefixes:
        plain = prefix.rstrip("/")
        if path == plain or path.startswith(plain + "/"):
            return plain or "/"
    return ""
