"""Checks the rarer keys of a request (mounts, capabilities, users and the like) against the node's policy.

What the policy says of a key is in its row (shim.keys).  shim.policy.permission calls this module when a request has
such keys.  Pure: shim.keys.host_facts checks what depends on files of the host.
"""

from __future__ import annotations

from shim import errors
from shim.keys import common, table
from shim.keys.row import NAMED, TIGHTEN
from shim.policy import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Callable

    from shim.request.parse import Request
    from shim.shapes import Config, Document


def known_words() -> dict[str, str]:
    """All words of allow and deny, with their trust classes."""
    known = dict.fromkeys(("gpu", "gpu.all", *(f"gpu.{key}" for key in common.GPU)), NAMED)
    known.update(dict.fromkeys(("env", "resources", *(f"resources.{key}" for key in common.LIMITS)), NAMED))
    for path, row in table.ROWS.items():
        known[path[len("resources.") :] if path.startswith("resources.gpu.") else path] = row.trust
        known.update(row.words)
    return known


def asked(request: Request, document: Document) -> Iterator[tuple[str, str, bool]]:
    """What the rarer keys ask for: (word, key of the request, whether it only tightens)."""
    for path, row, value in table.of(request.document):
        if not path.startswith("resources."):  # shim.policy.permission asks for these words
            tightens = row.tightens(value, document) if row.tightens else row.trust == TIGHTEN
            for word, key in row.asks(value) if row.asks else ((path, path),):
                yield word, key, tightens


def check(request: Request, document: Document, config: Config, unified: Callable[[], bool]) -> None:
    """Raises PolicyError, with the key and the rule, when the policy does not allow what the rarer keys ask for.

    `document`: config.json.  `config`: the configuration as it is for this container.  `unified()`: whether this node
    has cgroup v2 only.
    """
    trusted = config["policy.trust"] == "all"
    for word, key, tightens in asked(request, document):
        words.check_word(request.source, word, key, config, trusted or tightens)
    for path, row, value in table.of(request.document):
        for implied in row.implies if value else ():
            words.check_word(request.source, implied, path, config, allowed=True)
        if row.check is not None:
            try:
                row.check(value, document, unified, trusted)
            except errors.PolicyError as error:
                raise error.within(request.source) from None
    if trusted:
        return
    for _, row, value in table.of(request.document):
        for key, name, list_name in row.unlisted(value, config) if row.unlisted else ():
            raise errors.PolicyError(
                f"{request.source}: {key}: {list_name} of {words.source_of_policy(config)} has no {name}"
                if list_name
                else f"{request.source}: {key}: {name}",
                "ask the node's administrator",
            )
