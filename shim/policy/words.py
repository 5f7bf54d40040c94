"""The words of `allow` and `deny`, held against what a request means.  Pure; part of the create path."""

from __future__ import annotations

from shim import errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

    from shim.request.parse import Request

    Config = Dict[str, Any]

# Words of `allow` that a word above them does not grant.  A word above them in `deny` refuses them, too.
_OWN_WORDS = frozenset(("gpu.all", "gpu.mps_pipe_dir", "gpu.mps_log_dir", "gpu.time_slicing_config_path"))


def check_word(wish: Request, asked: str, key: str, config: Config, allowed: bool) -> None:
    """Raises PolicyError when what is asked for is denied or, unless it is `allowed` anyway, not allowed."""
    rule = _covers(config["policy.deny"], asked, frozenset())
    if rule:
        where = config.get("policy.denied-by", {}).get(rule, "[policy]")
        raise errors.PolicyError(f"{wish.source}: {key} is refused by {rule!r} in deny of {where}")
    if not allowed and not _covers(config["policy.allow"], asked, _OWN_WORDS):
        raise errors.PolicyError(
            f"{wish.source}: {key} is not allowed: allow of {by(config)} has no {asked!r}",
            "ask the node's administrator",
        )


def by(config: Config) -> str:
    """The part of the configuration that decides: [policy], or the rule that has taken its place (shim.policy.rules)."""
    return str(config.get("policy.by", "[policy]"))


def _covers(rules: List[str], asked: str, own_words: frozenset[str]) -> str:
    """The rule that covers what is asked: the same word, or, unless it is among `own_words`, a word above it."""
    for rule in rules:
        if asked == rule or asked.startswith(rule + ".") and asked not in own_words:
            return rule
    return ""
