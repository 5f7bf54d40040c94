"""The kubelet's allocation of devices to a container, as a text that only this node's device plugin can have written.

The kubelet asks the device plugin (shim.kubelet) before it starts a container that has a resource of Chandler's in its
limits, and gives the plugin's answer, an annotation, to the engine.  A pod can have any annotation, so the text ends in
a keyed digest.  The key lies in KEEP_DIR, which survives a reboot, as the kubelet's copies of the answers do.
Loaded by creates of containers with such an annotation.
"""

from __future__ import annotations

import posix

from shim import errors, paths
from shim.host import files, trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_KEY_SIZE = 32  # bytes


def key_path() -> str:
    """The file with the key; it must be readable by its owner alone."""
    return f"{paths.KEEP_DIR}/allocation.key"


def make_key() -> bytes:
    """The node's key, which is made where there is none.  Raises TrustError, HostError or OSError."""
    path = key_path()
    try:
        return _read_key(path)
    except FileNotFoundError:
        files.make_directory(paths.KEEP_DIR)
        files.replace(path, posix.urandom(_KEY_SIZE), 0o600)
        return _read_key(path)


def text(names: Sequence[str], key: bytes) -> str:
    """The annotation's value for an allocation of devices, which are qualified CDI names."""
    joined = ",".join(names)
    return f"{joined} {_digest(joined, key)}"


def names(values: Sequence[str], source: str) -> list[str]:
    """The devices in the values of a container's annotations, as qualified CDI names.

    `source`: where the container's request came from, for errors.  Raises RequestError for a value that this node's
    device plugin did not write, TrustError or HostError where that cannot be told.
    """
    path = key_path()
    try:
        key = _read_key(path)
    except FileNotFoundError:
        raise errors.RequestError(
            f"{source}: the kubelet of this node allocates no devices for Chandler: {path} is not there",
            "remove the annotation allocation.*, which a container gets from chandler-kubelet-plugin alone",
        ) from None
    except OSError as error:
        raise errors.HostError(f"{source}: {path} cannot be read: {error.strerror}") from None
    found: list[str] = []
    for value in values:
        joined, _, digest = value.rpartition(" ")
        if not _equal(digest, _digest(joined, key)):
            raise errors.RequestError(
                f"{source}: the annotation allocation.* is not the kubelet's, or {path} has been replaced since",
                "delete the pod, and create it anew without such an annotation",
            )
        found += joined.split(",")
    return found


def _read_key(path: str) -> bytes:
    key, status = files.read(path, _KEY_SIZE)
    trust.check_own_file(path, status)
    if status.st_mode & 0o077:
        raise errors.TrustError(
            f"the key {path} can be read by others", f"remove {path}; the device plugin makes another"
        )
    if len(key) != _KEY_SIZE:
        raise errors.HostError(
            f"the key {path} has {len(key)} bytes, not {_KEY_SIZE}", f"remove {path}; the device plugin makes another"
        )
    return key


def _digest(joined: str, key: bytes) -> str:
    from _blake2 import blake2b  # as in files.digest

    return blake2b(joined.encode("utf-8", "surrogatepass"), key=key, digest_size=32).hexdigest()


def _equal(first: str, second: str) -> bool:
    """Whether two texts are equal, found out in a time that does not depend on where they differ."""
    from _operator import _compare_digest

    return first.isascii() and bool(_compare_digest(first, second))
