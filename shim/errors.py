"""The errors that people see.  Each says what was asked, what is wrong, and what to do.

Every such error is a ChandlerError.  Its text is one plain sentence (two at most) without a newline, and names the key
or the file.  Callers add context with `within`.  The front end prints the error once.

Part of the create path: no imports.  A subclass is made when it is first used (`__getattr__`), since to make all of
them costs a twentieth of the interpreter's own start.  So modules of the create path write `errors.HostError`; other
modules can import the name.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Type


MAX_SENTENCE = 2000  # characters: an error can quote a request, which can have 256 KiB


class ChandlerError(Exception):
    """An error for people.

    `what`: what is wrong, in lower case, with the key or file.  `todo`: what to do about it; '' where nothing helps.
    """

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(what, todo)
        self.what = what
        self.todo = todo

    def __str__(self) -> str:
        text = " ".join((f"{self.what}; {self.todo}" if self.todo else self.what).split("\n"))
        return text if len(text) <= MAX_SENTENCE else text[: MAX_SENTENCE - 1] + "…"

    def within(self, context: str) -> ChandlerError:
        """The same error, beginning with the place where it happened."""
        return type(self)(f"{context}: {self.what}", self.todo)


_FAMILY = {
    "JsonError": "Text that is not JSON, or is JSON beyond the limits.",
    "RequestError": "The request document is wrong: unknown key, wrong type, out of range.",
    "PolicyError": "The request is well formed, but the node's policy does not allow it.",
    "CdiError": "A CDI file is invalid, or a CDI device cannot be resolved.",
    "TrustError": "Somebody who is not trusted can write to a file, or to a directory on the way to it.",
    "ConfigError": "The configuration is wrong.",
    "LeaseError": "A device is held by another container.",
    "LedgerError": "The ledger of leases exists, but it cannot be read.",
    "HostError": "The host lacks something: a device node, a runtime, a file.",
    "BundleError": "The bundle cannot be read or changed.",
    "ChangedError": "A device node is another device than when the inventory was compiled.",
}


def __getattr__(name: str) -> Type[ChandlerError]:
    if name not in _FAMILY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    error_class = type(name, (ChandlerError,), {"__doc__": _FAMILY[name], "__module__": __name__})
    globals()[name] = error_class
    return error_class


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
