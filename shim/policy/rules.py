"""[[policy.rule]]: finds the rule for a container, and makes the policy that applies to it.

The first rule that matches replaces keys of [policy].  What any matching rule denies stays denied.  The identity of a
container comes from the front end, or from annotations that the calling engine sets last, if `engines` of the
configuration lists that engine.  A field that neither gives is unknown.  A rule that asks for an unknown field
grants nothing, but what it denies is denied.  Pure.
"""

from __future__ import annotations

from shim.policy.engines import KEYS
from shim.policy.patterns import matches_any

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from shim.policy.caller import CallFacts
    from shim.shapes import Config, Rule

    Identity = dict[str, tuple[str, ...]]

FIELDS = ("handler", "namespace", "pod", "container", "image", "user")

YES, NO, UNKNOWN = "matches", "does not match", "cannot be told"


def identity(annotations: Mapping[str, Any], engine: str, call_facts: CallFacts) -> Identity:
    """The certain identity of a container: for each of FIELDS that is known, its values.

    `engine`: the engine whose annotations are believed, or ''.  `call_facts`: what the front end knows; it wins over
    annotations.
    """
    who: Identity = {}
    keys = KEYS.get(engine)
    if keys is not None and annotations.get(keys["kind"]) in ("container", "sandbox"):
        who = {
            field: (annotations[key],)
            for field, key in keys.items()
            if field in FIELDS and type(annotations.get(key)) is str
        }
    for field in FIELDS:
        value: Any = call_facts.get(field)
        if value:
            who[field] = (value,) if type(value) is str else tuple(value)
    return who


def believed_engine(config: Config, call_facts: CallFacts) -> str:
    """The engine whose identity annotations count for this container, or ''."""
    caller = call_facts.get("caller")
    return caller.believed_engine(config) if caller is not None else ""


def verdict(match: dict[str, list[str]], who: Identity) -> tuple[str, str]:
    """Whether a rule matches a container (YES, NO or UNKNOWN), and why.

    `match`: fields and their patterns.  Every field must match; one pattern of a field is enough.
    """
    unknown = ""
    for field, patterns in match.items():
        if field not in who:
            unknown = unknown or field
        elif not any(matches_any(patterns, value) for value in who[field]):
            return NO, f"{field} {'/'.join(who[field])} is none of {', '.join(patterns)}"
    if unknown:
        return UNKNOWN, f"the {unknown} is not known"
    return YES, ", ".join(f"{field} {'/'.join(who[field])}" for field in match) or "it asks for nothing"


def applied(config: Config, annotations: Mapping[str, Any], call_facts: CallFacts) -> Config:
    """The configuration as it is for one container.

    The result has more keys: policy.denied-by has, for each word of policy.deny, the part of the configuration that
    denies it; policy.by names the rule that replaced keys of [policy], if one did.
    """
    who = identity(annotations, believed_engine(config, call_facts), call_facts)
    result = config.copy()
    denied = dict.fromkeys(config["policy.deny"], "[policy]")
    winner: Rule | None = None
    for rule in config["policy.rule"]:
        matches, _ = verdict(rule["match"], who)
        if matches != NO:  # in doubt a rule denies
            for word in rule.get("policy.deny", ()):
                denied.setdefault(word, f"rule {rule['name']!r}")
        if matches == YES and winner is None:
            winner = rule
    if winner is not None:
        replaced: Any = {key: value for key, value in winner.items() if key.startswith("policy.")}
        result.update(replaced)
        result["policy.by"] = f"rule {winner['name']!r}"
    result["policy.deny"] = list(denied)
    result["policy.denied-by"] = denied
    return result
