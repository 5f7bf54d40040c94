"""The error family: what was asked, what is wrong, what to do.

Every error that a person can meet is a ChandlerError.  It is one plain sentence (two at most), without a
newline, and names the key or file.  Front ends print it once, at the edge; context is added outward with
`within`.  Part of the create path: no imports.
"""

from __future__ import annotations


class ChandlerError(Exception):
    """What is wrong (`what`, lower case, naming the key or file) and, where it helps, `todo`, the remedy."""

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(what, todo)
        self.what = what
        self.todo = todo

    def __str__(self) -> str:
        return " ".join((f"{self.what}; {self.todo}" if self.todo else self.what).split("\n"))

    def within(self, context: str) -> ChandlerError:
        """The same error with the place that it happened in put before it."""
        return type(self)(f"{context}: {self.what}", self.todo)


class JsonError(ChandlerError):
    """Text that is not JSON, or is JSON beyond the limits."""


class RequestError(ChandlerError):
    """The request document is wrong: unknown key, wrong type, out of range."""


class PolicyError(ChandlerError):
    """The request is well formed, but the node's policy does not allow it."""


class CdiError(ChandlerError):
    """A CDI file is invalid, or a CDI device cannot be resolved."""


class TrustError(ChandlerError):
    """A file, or a directory on its way, may be written by somebody who must not."""


class ConfigError(ChandlerError):
    """The configuration is wrong."""


class HostError(ChandlerError):
    """The host lacks something: a device node, a runtime, a file."""


class BundleError(ChandlerError):
    """The bundle cannot be read or changed."""
