"""The error family: what was asked, what is wrong, what to do.

Every error that a person can meet is a ChandlerError.  It is one plain sentence (two at most), without a
newline, and names the key or file.  Front ends print it once, at the edge; context is added outward with
`within`.

Part of the create path: no imports.  The subclasses come into being when they are first asked for, since making
all of them costs a twentieth of the interpreter's own start; modules of the create path therefore write
`errors.HostError`, others may import the name.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Type


MAX_SENTENCE = 2000  # characters: a request may quote 256 KiB at us, and nobody reads that


class ChandlerError(Exception):
    """What is wrong (`what`, lower case, naming the key or file) and, where it helps, `todo`, the remedy."""

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(what, todo)
        self.what = what
        self.todo = todo

    def __str__(self) -> str:
        text = " ".join((f"{self.what}; {self.todo}" if self.todo else self.what).split("\n"))
        return text if len(text) <= MAX_SENTENCE else text[: MAX_SENTENCE - 1] + "…"

    def within(self, context: str) -> ChandlerError:
        """The same error with the place that it happened in put before it."""
        return type(self)(f"{context}: {self.what}", self.todo)


_FAMILY = {
    "JsonError": "Text that is not JSON, or is JSON beyond the limits.",
    "RequestError": "The request document is wrong: unknown key, wrong type, out of range.",
    "PolicyError": "The request is well formed, but the node's policy does not allow it.",
    "CdiError": "A CDI file is invalid, or a CDI device cannot be resolved.",
    "TrustError": "A file, or a directory on its way, may be written by somebody who must not.",
    "ConfigError": "The configuration is wrong.",
    "LeaseError": "A device is held by another container.",
    "LedgerError": "The ledger of leases is there, and nobody can say what stood in it.",
    "HostError": "The host lacks something: a device node, a runtime, a file.",
    "BundleError": "The bundle cannot be read or changed.",
    "ChangedError": "A device is another one than when the inventory was compiled.",
}


def __getattr__(name: str) -> Type[ChandlerError]:
    if name not in _FAMILY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (ChandlerError,), {"__doc__": _FAMILY[name], "__module__": __name__})
    globals()[name] = made
    return made


if TYPE_CHECKING:

    class JsonError(ChandlerError): ...

    class RequestError(ChandlerError): ...

    class PolicyError(ChandlerError): ...

    class CdiError(ChandlerError): ...

    class TrustError(ChandlerError): ...

    class ConfigError(ChandlerError): ...

    class LeaseError(ChandlerError): ...

    class LedgerError(ChandlerError): ...

    class HostError(ChandlerError): ...

    class BundleError(ChandlerError): ...

    class ChangedError(ChandlerError): ...
