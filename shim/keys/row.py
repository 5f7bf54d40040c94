"""Row: everything that belongs to one rare key of a request.  Pure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, Callable

    from shim.keys.common import Entry
    from shim.keys.host_facts import Facts
    from shim.shapes import Config, Document

    Change = tuple[str, Any, Any]  # an edit without its origin (shim.edits)

# The trust classes of the words of allow and deny (SECURITY.md, "What a request may do").  A word that only tightens
# need not be in allow.  The default of allow (gpu, env, resources) covers no host-reaching and no dangerous word.
TIGHTEN, NAMED, HOST, DANGEROUS = "tighten", "named", "host-reaching", "dangerous"


class Row:
    """One key of a request: how it is read, what the policy must allow for it, and the edits that it makes.

    `entry`: how the key is read (shim.keys.common).
    `trust`: the trust class of the key's word.  The word is the key's dotted path, or gpu.X for resources.gpu.X.
    `words`: further words and their trust classes.

    In the functions, `value` is the normal form and `document` is config.json.
    `asks(value)`: the words that the value needs, each with the key as errors name it; by default the key's own word.
    `tightens(value, document)`: whether the value loosens nothing; by default that is so for the trust class TIGHTEN.
    Both are for keys at the top.  For a key of `resources`, `resources` in allow is enough, or the key's own word;
    with OWN_WORD (shim.keys.common) in its entry only the latter.
    `implies`: words whose denial refuses this key, too.
    `unlisted(value, config)`: what the value names and a list of [policy] does not have: (key, name, name of the list);
    where no list could allow it, (key, sentence, '').
    `check(value, document, unified, trusted)`: raises PolicyError, which names the key, for a value that loosens a
    limit of the engine, or the kernel's default.  `unified()`: whether this node has cgroup v2 only.
    `edits(value, request, document, facts)`: the changes to config.json.  `request`: the whole request document;
    `facts`: looks up what only the host or the image knows.
    """

    def __init__(
        self,
        entry: Entry,
        trust: str = NAMED,
        words: dict[str, str] | None = None,
        asks: Callable[[Any], Sequence[tuple[str, str]]] | None = None,
        tightens: Callable[[Any, Document], bool] | None = None,
        implies: Sequence[str] = (),
        unlisted: Callable[[Any, Config], Iterator[tuple[str, str, str]]] | None = None,
        check: Callable[[Any, Document, Callable[[], bool], bool], None] | None = None,
        edits: Callable[[Any, Document, Document, Facts], list[Change]] | None = None,
    ) -> None:
        self.entry = entry
        self.trust = trust
        self.words = words or {}
        self.asks = asks
        self.tightens = tightens
        self.implies = implies
        self.unlisted = unlisted
        self.check = check
        self.edits = edits
