"""Compares what a request asks for with the words of `allow` and `deny`.  Pure; part of the create path."""

from __future__ import annotations

from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List

    from shim.request.parse import Request
    from shim.shapes import Config


# These need a word of their own in `allow`: "gpu" does not grant gpu.all.  In `deny`, "gpu" still refuses it.
_OWN_WORDS = frozenset(("gpu.all", "gpu.mps_pipe_dir", "gpu.mps_log_dir", "gpu.time_slicing_config_path"))


def check_word(request: Request, asked: str, key: str, config: Config, allowed: bool) -> None:
    """Raises PolicyError when the policy denies the word `asked`, or does not allow it.

    `key`: the key of the request, for the error.  `allowed`: the word needs no place in `allow`; `deny` still counts.
    """
    rule = _covers(config["policy.deny"], asked, frozenset())
    if rule:
        where = config.get("policy.denied-by", {}).get(rule, "[policy]")
        raise errors.PolicyError(f"{request.source}: {key} is refused by {rule!r} in deny of {where}")
    if not allowed and not _covers(config["policy.allow"], asked, _OWN_WORDS):
        raise errors.PolicyError(
            f"{request.source}: {key} is not allowed: allow of {by(config)} has no {asked!r}",
            "ask the node's administrator",
        )


def by(config: Config) -> str:
    """The part of the configuration that applies: [policy], or the rule that replaces its keys (shim.policy.rules)."""
    return str(config.get("policy.by", "[policy]"))


def _covers(rules: List[str], asked: str, own_words: frozenset[str]) -> str:
    """The word in `rules` that covers `asked`: the same word, or one above it unless `asked` is among `own_words`."""
    for rule in rules:
        if asked == rule or asked.startswith(rule + ".") and asked not in own_words:
            return rule
    return ""
