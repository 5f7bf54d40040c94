"""Compares what a request asks for with the words of `allow` and `deny`.  Pure; part of the create path."""

from __future__ import annotations

from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List

    from shim.shapes import Config


def check_word(source: str, asked: str, key: str, config: Config, allowed: bool, exact: bool = False) -> None:
    """Raises PolicyError when the policy denies the word `asked`, or does not allow it.

    `source`: where the request came from.  `key`: the key of the request, for the error.  `allowed`: the word needs no
    place in `allow`; `deny` still counts.  `exact`: `allow` must have this very word ("gpu" does not grant gpu.all).
    """
    denied = _covers(config["policy.deny"], asked, False)
    if denied:
        where = config.get("policy.denied-by", {}).get(denied, "[policy]")
        raise errors.PolicyError(f"{source}: {key} is refused by {denied!r} in deny of {where}")
    if not allowed and not _covers(config["policy.allow"], asked, exact):
        raise errors.PolicyError(
            f"{source}: {key} is not allowed: allow of {source_of_policy(config)} has no {asked!r}",
            "ask the node's administrator",
        )


def source_of_policy(config: Config) -> str:
    """The part of the configuration that applies: [policy], or the rule that replaces its keys (shim.policy.rules)."""
    return str(config.get("policy.by", "[policy]"))


def _covers(listed: List[str], asked: str, exact: bool) -> str:
    """The word in a list that covers `asked`: the same word or, unless `exact`, one above it.  '' when none does."""
    for word in listed:
        if asked == word or not exact and asked.startswith(word + "."):
            return word
    return ""
