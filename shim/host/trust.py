"""Checks who could have written or changed what is at a path: owner and mode of each directory and link on the way.

Part of the create path.
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
    """Makes the directory `path` with `mode` if it does not exist, and checks that only the caller may write to it.

    Raises OSError or TrustError.
    """
    try:
        status = posix.lstat(path)
    except FileNotFoundError:
        files.make_directory(path, mode)
        status = posix.lstat(path)
    check_trust(path, status, {posix.geteuid(): "the caller"})
    if status.st_mode & _FORMAT != _DIRECTORY:
        raise errors.TrustError(f"{path} is not a directory")


def path_steps(path: str) -> List[Tuple[str, posix.stat_result]]:
    """(path, lstat) of every directory and link on the way to `path`, and of `path` itself.

    Raises OSError when one of them does not exist.
    """
    passed: List[Tuple[str, posix.stat_result]] = [("/", posix.lstat("/"))]

    def link(directory: str, name: str) -> str:
        current = f"{directory}/{name}"
        status = posix.lstat(current)
        passed.append((current, status))
        return posix.readlink(current) if status.st_mode & _FORMAT == _LINK else ""

    if not pathtext.follow(path, link):
        raise OSError(40, "too many levels of symbolic links")
    return passed


def broken_link(path: str) -> str:
    """The link on the way to `path`, or at its end, because of which nothing is found there; '' when there is none.

    The way that leads nowhere may be in a directory of somebody else, who could have removed what was there.
    """
    while path:
        try:
            status = posix.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.rpartition("/")[0]
            continue
        return path if status.st_mode & _FORMAT == _LINK and not files.exists(path) else ""
    return ""


def check_trust(path: str, status: posix.stat_result, owners: Dict[int, str], last: bool = True) -> None:
    """Raises TrustError when somebody else than `owners` could have put or changed what is at `path`.

    `status`: its lstat.  `last`: whether it is the end of the way.  A directory before the end may be writable for all
    if it is sticky, such as /tmp: then nobody but the owner of a file in it can replace the file.
    """
    if status.st_uid not in owners and not userns.has_outside_owner(path, status):
        names = " or ".join(owners.values())
        raise errors.TrustError(f"{path} belongs to uid {status.st_uid}, not to {names}", f"`chown root {path}`")
    mode = status.st_mode
    if mode & _FORMAT == _LINK or not mode & _OTHERS_WRITE:
        return
    if not last and mode & _STICKY and mode & _FORMAT == _DIRECTORY:
        return
    raise errors.TrustError(f"{path} can be written by others (mode {mode & 0o7777:04o})", f"`chmod go-w {path}`")


def check_path(path: str, owners: Dict[int, str]) -> List[Tuple[str, posix.stat_result]]:
    """`path_steps(path)`, with `check_trust` for each part.  Raises OSError or TrustError."""
    passed = path_steps(path)
    for number, (part, status) in enumerate(passed):
        check_trust(part, status, owners, number == len(passed) - 1)
    return passed


def check_own_directory(path: str, owners: Dict[int, str]) -> None:
    """Raises TrustError when somebody else than `owners` could change the contents of the directory `path`.

    If it does not exist, raises TrustError when somebody else could make it first.  Raises HostError when it cannot be
    looked at.
    """
    nearest = path.rstrip("/") or "/"
    while True:
        try:
            status = check_path(nearest, owners)[-1][1]
            break
        except FileNotFoundError:
            nearest = nearest.rpartition("/")[0] or "/"
        except OSError as error:
            raise errors.HostError(f"{path} cannot be looked at: {error.strerror}") from None
        except errors.TrustError as error:
            if nearest == path.rstrip("/"):
                raise
            raise errors.TrustError(
                f"{path} is not there yet, and somebody else could make it: {error.what}",
                f"make it first: `mkdir -p -m 700 {path}`",
            ) from None
    if status.st_mode & _FORMAT != _DIRECTORY:
        raise errors.TrustError(f"{nearest} is not a directory")


def check_own_file(path: str, status: posix.stat_result) -> None:
    """Raises TrustError when others could have written a file in the state directory.  `status`: its fstat.

    Others cannot put a file there, but root may have changed its owner or mode.
    """
    if status.st_uid != posix.geteuid() or status.st_mode & _OTHERS_WRITE:
        check_trust(path, status, userns.trusted_owners(userns.user_namespace()))


def read_own(path: str, limit: int) -> bytes:
    """The bytes of a file in the state directory, of at most `limit` bytes, that others could not have written.

    Raises TrustError, HostError or OSError.
    """
    data, status = files.read(path, limit)
    check_own_file(path, status)
    return data


def read_trusted(path: str, limit: int, owners: Dict[int, str]) -> bytes:
    """The bytes of a regular file of at most `limit` bytes that only `owners` could have written.

    Raises TrustError, HostError or OSError.
    """
    check_path(path, owners)
    data, status = files.read(path, limit, follow=True)
    check_trust(path, status, owners)  # again, for the file that was opened: it may have been replaced since
    return data
