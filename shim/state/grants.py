"""Grant records: what each container was given, one file for each container in the state directory.

The key is the runtime's root and the container's id.  A record is written before config.json is replaced, so no
container can have devices without one.  Part of the create path.
"""

from __future__ import annotations

import posix
from zlib import crc32

from shim import jsontext
from shim.host import files, trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Tuple

    from shim.shapes import Document
    from shim.state.leases import Marks, Started

    class Particulars(Started, total=False):
        """The members that only a front end knows."""

        owner: str  # nri or dra; without it, oci
        # of the wrapper
        config: str  # the path of config.json
        before: str  # digests of config.json
        after: str
        rules: List[Document]  # the device rules that we have added
        engine: str  # who called (shim.policy.engines)
        # of the NRI plugin
        pod: str
        namespace: str
        name: str  # the container's name in the pod; of DRA, the name of the ResourceClaim
        nodes: List[Tuple[str, str, int, int]]  # path, type, major, minor
        mark: List[str]  # the annotation's key and value

    class _Shared(Particulars, total=False):
        token: str  # of the container's lease
        # of the lease, if it has them
        claim: str
        called: str
        allocated: bool
        sharing: Marks

    class GrantRecord(_Shared):
        """What one container was given.  An older Chandler's has less: shim.state.records checks what it reads."""

        id: str
        root: str
        source: str  # where the request comes from
        devices: List[str]  # CDI names
        physical: List[str]  # keys of shim.state.leases
        time: int  # seconds since 1970
        grant: str  # digest of request and devices


MAX_RECORD = 1 << 20  # bytes
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-+")


def directory(state_dir: str) -> str:
    """The directory of the records."""
    return state_dir + "/grants"


def nri_directory(state_dir: str) -> str:
    """The state directory of the NRI plugin's records.  Their root is '', since NRI does not tell the runtime's."""
    return state_dir + "/nri"


def record_path(state_dir: str, root: str, container: str) -> str:
    """The file of a container's record.  An id that is long, or unsafe in a file name, is replaced by its digest."""
    name = container if len(container) < 200 and not set(container) - _PLAIN else files.digest(_bytes(container))
    return f"{directory(state_dir)}/{crc32(_bytes(root)):08x}-{name}.json"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def write(state_dir: str, record: GrantRecord, private: bool = False) -> None:
    """Writes a record.

    `private`: if the state directory does not exist, it is made with mode 0700 instead of 0755.
    Raises OSError, or TrustError when somebody else may write to the state directory.
    """
    path = record_path(state_dir, record["root"], record["id"])
    trust.own_directory(state_dir, 0o700 if private else 0o755)
    data = files.seal(jsontext.dumps(record))
    try:
        files.replace(path, data, 0o600)
    except FileNotFoundError:
        files.make_directory(directory(state_dir))
        files.replace(path, data, 0o600)


def remove(state_dir: str, root: str, container: str) -> None:
    """Removes a record, if there is one."""
    try:
        posix.unlink(record_path(state_dir, root, container))
    except OSError:
        pass
