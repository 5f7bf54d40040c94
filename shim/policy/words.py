"""Compares what a request asks for with the words of `allow` and `deny`.  Pure; part of the create path."""

from __future__ import annotations

from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List

    from shim.shapes import Config


def check_word(source: str, asked: str, key: str, config: Config, allowed: bool, own: bool = False) -> None:
    """Raises PolicyError when the policy denies the word `asked`, or does not allow it.

    `source`: where the request came from.  `key`: the key of the request, for the error.  `allowed`: the word needs no
    place in `allow`; `deny` still counts.  `own`: `allow` must have this very word ("gpu" does not grant gpu.all).
    """
    rule = _covers(config["policy.deny"], asked, False)
    if rule:
        where = config.get("policy.denied-by", {}).get(rule, "[policy]")
        raise errors.PolicyError(f"{source}: {key} is refused by {rule!r} in deny of {where}")
    if not allowed and not _covers(config["policy.allow"], asked, own):
        raise errors.PolicyError(
            f"{source}: {key} is not allowed: allow of {source_of_policy(config)} has no {asked!r}",
            "ask the node's administrator",
        )


def source_of_policy(config: Config) -> str:
    """The part of the configuration that applies: [policy], or the rule that replaces its keys (shim.policy.rules)."""
    return str(config.get("policy.by", "[policy]"))


def _covers(rules: List[str], asked: str, own: bool) -> str:
    """The word in `rules` that covers `asked`: the same word or, unless `own`, one above it."""
    for rule in rules:
        if asked == rule or not own and asked.startswith(rule + "."):
            return rule
    return ""
