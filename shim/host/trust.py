"""Who could have written or changed what is at a path: the owner and the mode of every directory and link on its way.

Part of the create path: posix alone.
"""

from __future__ import annotations

import posix

from shim import errors, pathtext
from shim.host import files, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Tuple

_FORMAT, _DIRECTORY, _LINK = 0o170000, 0o040000, 0o120000
_OTHERS_WRITE = 0o022
_STICKY = 0o1000


def own_directory(path: str, mode: int) -> None:
    """`path` as a directory of our own that nobody else may write, made with `mode` if it is not there.

    Raises OSError or TrustError.
    """
    try:
        found = posix.lstat(path)
    except FileNotFoundError:
        files.make_directory(path, mode)
        found = posix.lstat(path)
    check_trust(path, found, {posix.geteuid(): "the caller"})
    if found.st_mode & _FORMAT != _DIRECTORY:
        raise errors.TrustError(f"{path} is not a directory")


def way(path: str) -> List[Tuple[str, posix.stat_result]]:
    """Every directory and link that is passed to reach `path`, and `path` itself, each with its own lstat.

    Raises OSError when something is missing; the list then cannot say who could put it there.
    """
    passed: List[Tuple[str, posix.stat_result]] = [("/", posix.lstat("/"))]

    def link(directory: str, name: str) -> str:
        current = f"{directory}/{name}"
        found = posix.lstat(current)
        passed.append((current, found))
        return posix.readlink(current) if found.st_mode & _FORMAT == _LINK else ""

    if not pathtext.follow(path, link):
        raise OSError(40, "too many levels of symbolic links")
    return passed


def check_trust(path: str, found: posix.stat_result, owners: Dict[int, str], last: bool = True) -> None:
    """Raises TrustError when somebody else than `owners` could have put or changed what is at `path`.

    A directory on the way may be writable for all when it is sticky, as /tmp is: nobody but the owner can then
    replace what is in it.
    """
    if found.st_uid not in owners and not userns.owner(path, found):
        names = " or ".join(owners.values())
        raise errors.TrustError(f"{path} belongs to uid {found.st_uid}, not to {names}", f"`chown root {path}`")
    mode = found.st_mode
    if mode & _FORMAT == _LINK or not mode & _OTHERS_WRITE:
        return
    if not last and mode & _STICKY and mode & _FORMAT == _DIRECTORY:
        return
    raise errors.TrustError(f"{path} can be written by others (mode {mode & 0o7777:04o})", f"`chmod go-w {path}`")


def check_way(path: str, owners: Dict[int, str]) -> List[Tuple[str, posix.stat_result]]:
    """`way(path)`, each part of it checked.  Raises OSError or TrustError."""
    passed = way(path)
    for number, (part, found) in enumerate(passed):
        check_trust(part, found, owners, number == len(passed) - 1)
    return passed


def check_own_directory(path: str, owners: Dict[int, str]) -> None:
    """Raises TrustError when somebody else than `owners` could change what is in the directory `path`, or, where that
    is not there yet, could make it first; HostError when it cannot be looked at."""
    there = path.rstrip("/") or "/"
    while True:
        try:
            found = check_way(there, owners)[-1][1]
            break
        except FileNotFoundError:
            there = there.rpartition("/")[0] or "/"
        except OSError as error:
            raise errors.HostError(f"{path} cannot be looked at: {error.strerror}") from None
        except errors.TrustError as error:
            if there == path.rstrip("/"):
                raise
            raise errors.TrustError(
                f"{path} is not there yet, and somebody else could make it: {error.what}",
                f"make it first: `mkdir -p -m 700 {path}`",
            ) from None
    if found.st_mode & _FORMAT != _DIRECTORY:
        raise errors.TrustError(f"{there} is not a directory")


def read_trusted(path: str, limit: int, owners: Dict[int, str]) -> bytes:
    """The bytes of a regular file that nobody but `owners` could have written.

    Raises TrustError, HostError or OSError.
    """
    check_way(path, owners)
    data, found = files.read(path, limit, follow=True)
    check_trust(path, found, owners)
    return data
