"""[[policy.rule]]: which rule of the node's policy is for a container, and what the policy then says.

The first rule that matches replaces keys of [policy]; what any matching rule denies stays denied.  Who a container is
tells the front end, or annotations that the engine which called sets last, if the configuration names it; what is known
in neither way is unknown: a rule that asks for it grants nothing, and still denies.  Pure.
"""

from __future__ import annotations

from shim.policy.classes import listed
from shim.policy.engines import KEYS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional, Tuple

    Config = Dict[str, Any]
    Who = Dict[str, Tuple[str, ...]]

FIELDS = ("handler", "namespace", "pod", "container", "image", "user")

YES, NO, UNKNOWN = "matches", "does not match", "cannot be told"


def identity(annotations: Mapping[str, Any], engine: str, known: Mapping[str, Any]) -> Who:
    """What is known for certain about a container: by annotations of `engine`, if that is one which is believed, and by
    `known`, what the front end says."""
    who: Who = {}
    keys = KEYS.get(engine)
    if keys is not None and annotations.get(keys["kind"]) in ("container", "sandbox"):
        who = {
            field: (annotations[key],)
            for field, key in keys.items()
            if field in FIELDS and type(annotations.get(key)) is str
        }
    for field in FIELDS:
        value = known.get(field)
        if value:
            who[field] = (value,) if type(value) is str else tuple(value)
    return who


def believed(config: Config, known: Mapping[str, Any]) -> str:
    """The engine whose identity annotations are authority for this container; '' for none."""
    caller = known.get("caller")
    return caller.believed(config) if caller is not None else ""


def verdict(match: Dict[str, List[str]], who: Who) -> Tuple[str, str]:
    """Whether a rule is for a container (YES, NO or UNKNOWN), and why."""
    unknown = ""
    for field, patterns in match.items():
        if field not in who:
            unknown = unknown or field
        elif not any(listed(patterns, value) for value in who[field]):
            return NO, f"{field} {'/'.join(who[field])} is none of {', '.join(patterns)}"
    if unknown:
        return UNKNOWN, f"the {unknown} is not known"
    return YES, ", ".join(f"{field} {'/'.join(who[field])}" for field in match) or "it asks for nothing"


def applied(config: Config, annotations: Mapping[str, Any], known: Mapping[str, Any]) -> Config:
    """The configuration as it is for one container."""
    who = identity(annotations, believed(config, known), known)
    result = dict(config)
    denied = dict.fromkeys(config["policy.deny"], "[policy]")
    winner: Optional[Dict[str, Any]] = None
    for rule in config["policy.rule"]:
        found, _ = verdict(rule["match"], who)
        if found != NO:
            for word in rule.get("policy.deny", ()):
                denied.setdefault(word, f"rule {rule['name']!r}")
        if found == YES and winner is None:
            winner = rule
    if winner is not None:
        result.update((key, value) for key, value in winner.items() if key.startswith("policy."))
        result["policy.by"] = f"rule {winner['name']!r}"
    result["policy.deny"] = list(denied)
    result["policy.denied-by"] = denied
    return result
