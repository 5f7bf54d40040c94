"""Files at the edge: bounded reads that do not block, atomic replacement, and who may have written what.

Part of the create path: posix alone.
"""

from __future__ import annotations

import posix

from shim import errors
from shim.errors import ChandlerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Optional, Tuple

MAX_CDI_FILE = 16 << 20
MAX_CDI_FILES = 1024
MAX_CONFIG_JSON = 16 << 20
_MAX_LINKS = 40

_FORMAT, _REGULAR, _DIRECTORY, _LINK = 0o170000, 0o100000, 0o040000, 0o120000
_OTHERS_WRITE = 0o022
_STICKY = 0o1000
# O_NONBLOCK: a FIFO in the way must not hold us up
_READ = posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY


def read(path: str, limit: int, follow: bool = False) -> Tuple[bytes, posix.stat_result]:
    """The bytes of a regular file of at most `limit` bytes, and its fstat.

    Raises OSError, or HostError when it is no regular file or larger.
    """
    descriptor = posix.open(path, _READ if follow else _READ | posix.O_NOFOLLOW)
    try:
        found = posix.fstat(descriptor)
        if found.st_mode & _FORMAT != _REGULAR:
            raise errors.HostError(f"{path} is not a regular file")
        if found.st_size > limit:
            raise errors.HostError(f"{path} has {found.st_size} bytes, more than the limit of {limit}")
        return read_all(descriptor, found.st_size, limit, path), found
    finally:
        posix.close(descriptor)


def read_all(descriptor: int, size: int, limit: int, path: str) -> bytes:
    """All bytes behind a descriptor; `size` is what fstat said, which may grow meanwhile up to `limit`."""
    data = posix.read(descriptor, size + 1)
    if len(data) == size:
        return data
    parts = [data]
    total = len(data)
    while data:
        data = posix.read(descriptor, 1 << 20)
        parts.append(data)
        total += len(data)
        if total > limit:
            raise errors.HostError(f"{path} has more than the limit of {limit} bytes")
    return b"".join(parts)


def write_all(descriptor: int, data: bytes) -> None:
    """All of `data` to a descriptor; raises OSError."""
    while data:
        data = data[posix.write(descriptor, data):]


def replace(path: str, data: bytes, mode: int = 0o644, owner: Optional[Tuple[int, int]] = None,
            temporary: str = "") -> None:
    """`data` at `path`, by a temporary file beside it and a rename: a reader sees the old bytes or the new.

    `owner` is (uid, gid).  Nothing stays behind on failure; raises OSError.  Where only one process writes, a fixed
    name for the temporary file lets the next one clear up after a kill.
    """
    temporary = temporary or f"{path}.chandler-{posix.getpid()}"
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_NOFOLLOW | posix.O_CLOEXEC
    try:
        descriptor = posix.open(temporary, flags, 0o600)
    except FileExistsError:  # left by a killed process
        posix.unlink(temporary)
        descriptor = posix.open(temporary, flags, 0o600)
    try:
        try:
            write_all(descriptor, data)
            if owner is not None and owner != (posix.geteuid(), posix.getegid()):
                posix.fchown(descriptor, owner[0], owner[1])
            posix.fchmod(descriptor, mode)
        finally:
            posix.close(descriptor)
        posix.rename(temporary, path)
    except BaseException:
        posix.unlink(temporary)
        raise


def make_directory(path: str, mode: int = 0o755) -> None:
    """`path` as a directory with its parents; raises OSError.  One that is there stays as it is."""
    try:
        posix.mkdir(path, mode)
    except FileExistsError:
        return
    except FileNotFoundError:
        parent = path.rstrip("/").rpartition("/")[0]
        if not parent:
            raise
        make_directory(parent)
        make_directory(path, mode)


def own_directory(path: str, mode: int) -> None:
    """`path` as a directory of our own that nobody else may write, made with `mode` if it is not there.

    Raises OSError or TrustError.
    """
    try:
        found = posix.lstat(path)
    except FileNotFoundError:
        make_directory(path, mode)
        found = posix.lstat(path)
    check_trust(path, found, {posix.geteuid(): "the caller"})
    if found.st_mode & _FORMAT != _DIRECTORY:
        raise errors.TrustError(f"{path} is not a directory")


def way(path: str) -> List[Tuple[str, posix.stat_result]]:
    """Every directory and link that is passed to reach `path`, and `path` itself, each with its own lstat.

    Raises OSError when something is missing; the list then cannot say who could put it there.
    """
    passed: List[Tuple[str, posix.stat_result]] = [("/", posix.lstat("/"))]
    rest = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    here: List[str] = []
    links = 0
    while rest:
        part = rest.pop()
        if part == "..":
            here = here[:-1]
            continue
        current = "/" + "/".join((*here, part))
        found = posix.lstat(current)
        passed.append((current, found))
        if found.st_mode & _FORMAT == _LINK:
            links += 1
            if links > _MAX_LINKS:
                raise OSError(40, "too many levels of symbolic links")
            target = posix.readlink(current)
            if target.startswith("/"):
                here = []
            rest.extend(part for part in reversed(target.split("/")) if part not in ("", "."))
        else:
            here.append(part)
    return passed


def check_trust(path: str, found: posix.stat_result, owners: Dict[int, str], last: bool = True) -> None:
    """Raises TrustError when somebody else than `owners` could have put or changed what is at `path`.

    A directory on the way may be writable for all when it is sticky, as /tmp is: nobody but the owner can then
    replace what is in it.
    """
    if found.st_uid not in owners and not _unmapped(path, found):
        names = " or ".join(owners.values())
        raise errors.TrustError(f"{path} belongs to uid {found.st_uid}, not to {names}", f"`chown root {path}`")
    mode = found.st_mode
    if mode & _FORMAT == _LINK or not mode & _OTHERS_WRITE:
        return
    if not last and mode & _STICKY and mode & _FORMAT == _DIRECTORY:
        return
    raise errors.TrustError(f"{path} can be written by others (mode {mode & 0o7777:04o})", f"`chmod go-w {path}`")


def _unmapped(path: str, found: posix.stat_result) -> bool:
    """Whether this is the host's root's as far as a user namespace can tell, though it shows a number of ours."""
    from shim import unmapped
    return unmapped.owner(path, found)


def check_way(path: str, owners: Dict[int, str]) -> List[Tuple[str, posix.stat_result]]:
    """`way(path)`, each part of it checked.  Raises OSError or TrustError."""
    passed = way(path)
    for number, (part, found) in enumerate(passed):
        check_trust(part, found, owners, number == len(passed) - 1)
    return passed


def check_own_directory(path: str, owners: Dict[int, str]) -> None:
    """Raises TrustError when somebody else than `owners` could change what is in the directory `path`, or, where that is
    not there yet, could make it first; HostError when it cannot be looked at."""
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
            raise errors.TrustError(f"{path} is not there yet, and somebody else could make it: {error.what}",
                                    f"make it first: `mkdir -p -m 700 {path}`") from None
    if found.st_mode & _FORMAT != _DIRECTORY:
        raise errors.TrustError(f"{there} is not a directory")


def read_trusted(path: str, limit: int, owners: Dict[int, str]) -> bytes:
    """The bytes of a regular file that nobody but `owners` could have written.

    Raises TrustError, HostError or OSError.
    """
    check_way(path, owners)
    data, found = read(path, limit, follow=True)
    check_trust(path, found, owners)
    return data


# A CDI directory as it was read: its path, why it could not be, and each file's bytes or why it has none.
if TYPE_CHECKING:
    from typing import Union

    SpecDir = Tuple[str, Optional[ChandlerError], List[Tuple[str, Union[bytes, ChandlerError]]]]


def spec_names(directory: str) -> List[str]:
    """The names of the CDI files in a directory, in order (CDI specification: exactly .json and .yaml)."""
    return sorted(name for name in posix.listdir(directory) if name.endswith((".json", ".yaml")))


def read_spec_dirs(directories: List[str], owners: Dict[int, str]) -> List[SpecDir]:
    """The CDI files of all directories, from low to high priority; what cannot be read carries its error."""
    result: List[SpecDir] = []
    count = 0
    for directory in directories:
        files: List[Tuple[str, Union[bytes, ChandlerError]]] = []
        error: Optional[ChandlerError] = None
        try:
            check_way(directory, owners)
            names = spec_names(directory)
        except FileNotFoundError:
            names = []
        except OSError as failed:
            names, error = [], errors.HostError(f"the CDI directory {directory} cannot be read: {failed.strerror}")
        except errors.TrustError as failed:
            names, error = [], failed
        count += len(names)
        if count > MAX_CDI_FILES:
            names, error = [], errors.HostError(f"more than {MAX_CDI_FILES} CDI files, with those in {directory}")
        for name in names:
            files.append((name, read_spec(f"{directory}/{name}", owners)))
        result.append((directory, error, files))
    return result


def read_spec(path: str, owners: Dict[int, str]) -> Union[bytes, ChandlerError]:
    """The bytes of one CDI file, or why they are not to be had."""
    try:
        return read_trusted(path, MAX_CDI_FILE, owners)
    except ChandlerError as error:
        return error
    except OSError as failed:
        return errors.HostError(f"{path} cannot be read: {failed.strerror}")


def digest(data: bytes) -> str:
    """BLAKE2b-256 of some bytes, as `b2sum -l 256` prints it (a third of SHA-256's cost without OpenSSL)."""
    from _blake2 import blake2b
    return blake2b(data, digest_size=32).hexdigest()


_SEAL = b'{"checksum":"'
_SEALED = len(_SEAL) + 64 + 2  # with the quote and the comma behind the checksum


def seal(text: bytes) -> bytes:
    """A file's bytes: the text of a JSON object that has members, with the checksum of the rest as its first member."""
    rest = text[1:]
    return _SEAL + digest(rest).encode("ascii") + b'",' + rest + b"\n"


def unseal(data: bytes) -> Optional[bytes]:
    """The text that `seal` was given; None for bytes that were never sealed.  Raises HostError when the checksum is wrong."""
    if data[:len(_SEAL)] != _SEAL:
        return None
    rest = data[_SEALED:-1]
    if data[len(_SEAL):_SEALED] != digest(rest).encode("ascii") + b'",' or data[-1:] != b"\n":
        raise errors.HostError("its checksum is wrong")
    return b"{" + rest
