"""config.json in its bundle: read without surprises, replaced whole, with the original beside it.

    config.json                    what the runtime reads
    config.json.chandler-original  what the engine wrote: a second name of that very file
    config.json.chandler-built     of a bundle of our own builder's: a symbolic link whose text is its config.json's digest
    config.json.chandler-edited    a symbolic link whose text is the digest of what we wrote, and of what we wrote
                                   before: it is replaced first, and we may be killed between

The two names beside it let the same bundle be created again: config.json that has the digest is our own work and
is made anew from the original; one that was changed since and still holds our mark is refused; any other is the
engine's, written anew.  Part of the create path.
"""

from __future__ import annotations

import posix

from shim import errors
from shim.host import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List

BUILT = ".chandler-built"
_REGULAR, _DIRECTORY, _LINK, _FORMAT = 0o100000, 0o040000, 0o120000, 0o170000
_MISSING = (2, 20, 36, 40)  # ENOENT, ENOTDIR, ENAMETOOLONG, ELOOP: a runtime finds no file there either
_REMEDY = "let the engine make the bundle anew"


def may_ask(path: str, needles: List[bytes]) -> bool:
    """Whether the file may carry a request: it can be read as a file, and holds one of the needles.

    What is missing, or a directory, carries none and is the runtime's to judge.  Raises BundleError for what the
    runtime may be able to read and we are not.  Never blocks; reads in pieces, so a file of any size costs little
    memory.
    """
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK | posix.O_CLOEXEC | posix.O_NOCTTY)
    except ValueError:
        return False
    except OSError as error:
        if error.errno in _MISSING:
            return False
        raise _unread(path, error) from None
    try:
        kind = posix.fstat(descriptor).st_mode & _FORMAT
        if kind == _DIRECTORY:
            return False
        if kind != _REGULAR:
            raise errors.BundleError(
                f"{path} is not a regular file, so whether it carries a request cannot be seen before the runtime reads it",
                "give the bundle a config.json that is a file",
            )
        overlap = max(len(needle) for needle in needles)
        tail = b""
        while True:
            piece = posix.read(descriptor, 1 << 20)
            if not piece:
                return False
            window = tail + piece
            if any(needle in window for needle in needles):
                return True
            tail = window[-overlap:]
    except OSError as error:
        raise _unread(path, error) from None
    finally:
        posix.close(descriptor)


def _unread(path: str, error: OSError) -> errors.ChandlerError:
    return errors.BundleError(f"{path} cannot be read, so whether it carries a request is not known: {error.strerror}")


class ConfigJson:
    """One config.json: `engine`, the bytes that the engine wrote, are what edits start from."""

    __slots__ = ("path", "original", "stamp", "engine", "fresh", "_found", "_present")

    def __init__(self, path: str, mark: bytes) -> None:
        """Reads it.  `mark` is the text that is in every config.json that we wrote.

        Raises BundleError when it is no plain file of its own, too large, or our own work that was changed since.
        """
        self.path = path
        self.original = path + ".chandler-original"
        self.stamp = path + ".chandler-edited"
        try:
            found = posix.lstat(path)
            if found.st_mode & _FORMAT == _LINK:
                raise errors.BundleError(
                    f"{path} is a symbolic link", "a bundle with a request needs a config.json of its own"
                )
            data, self._found = files.read(path, files.MAX_CONFIG_JSON)
        except OSError as error:
            raise errors.BundleError(f"{path} cannot be read: {error.strerror}") from None
        self.fresh = True
        self.engine = data
        self._check_names()
        written = self._written()
        if written:
            self._present = files.digest(data)
            if self._present in written:
                self.fresh = False
                self.engine = self._original()
            elif mark in data.replace(b"\\/", b"/"):
                raise errors.BundleError(
                    f"{path} was changed after Chandler had edited it, and still holds its edits",
                    f"put the engine's own back: mv {self.original} {path}",
                )

    def _check_names(self) -> None:
        """A second name that is not ours could be somebody else's file, which must not change."""
        names = self._found.st_nlink
        if names == 2:
            try:
                other = posix.lstat(self.original)
            except OSError:
                other = None
            if other is not None and (other.st_dev, other.st_ino) == (self._found.st_dev, self._found.st_ino):
                return
        if names > 1:
            raise errors.BundleError(
                f"{self.path} has {names} names (hard links)", "a bundle with a request needs a config.json of its own"
            )

    def _written(self) -> List[str]:
        """The digests of what we wrote last, the newest first."""
        try:
            return posix.readlink(self.stamp).split(",")
        except OSError:
            return []

    def built(self, document: Any) -> bool:
        """Whether the engine's bytes are those that `chandler bundle` wrote: no image has a say in them.

        A root file system that is, or holds, the bundle's directory could bring the mark itself.
        """
        try:
            if posix.readlink(self.path + BUILT) != files.digest(self.engine):
                return False
            at = self.path.rpartition("/")[0] or "."
            path = document["root"]["path"]
            root = posix.stat(path if path[:1] == "/" else f"{at}/{path}")
            top = posix.stat("/")
            while True:
                here = posix.stat(at)
                if (here.st_dev, here.st_ino) == (root.st_dev, root.st_ino):
                    return False
                if (here.st_dev, here.st_ino) == (top.st_dev, top.st_ino):
                    return True
                at += "/.."
        except (OSError, LookupError, TypeError):
            return False

    def _original(self) -> bytes:
        try:
            return files.read(self.original, files.MAX_CONFIG_JSON)[0]
        except OSError as error:
            raise errors.BundleError(
                f"{self.path} holds Chandler's edits, and {self.original} cannot be read: {error.strerror}", _REMEDY
            ) from None

    def write(self, data: bytes, digest: str) -> None:
        """Replaces config.json by `data`.  On failure it is as it was; raises BundleError."""
        try:
            if self.fresh:
                self._keep_original()
            _replace_link(self.stamp, digest if self.fresh else f"{digest},{self._present}")
            files.replace(
                self.path,
                data,
                self._found.st_mode & 0o7777,
                (self._found.st_uid, self._found.st_gid),
                self.path + ".chandler-new",
            )
        except OSError as error:
            if self.fresh:
                self._forget()
            raise errors.BundleError(f"{self.path} cannot be replaced: {error.strerror}") from None

    def _keep_original(self) -> None:
        """The engine's file gets a second name, which costs nothing; where links cannot be, a copy."""
        try:
            posix.unlink(self.original)
        except FileNotFoundError:
            pass
        try:
            posix.link(self.path, self.original, follow_symlinks=False)
        except PermissionError:
            files.replace(self.original, self.engine, self._found.st_mode & 0o7777)

    def _forget(self) -> None:
        for name in (self.original, self.stamp):
            try:
                posix.unlink(name)
            except OSError:
                pass

    def restore(self) -> None:
        """Puts the engine's file back: the runtime could not be started."""
        if self.fresh:
            try:
                posix.rename(self.original, self.path)
            except OSError:
                return
            self._forget()


def _replace_link(path: str, text: str) -> None:
    """A symbolic link whose text is `text`; the one that was there stays until the new one is.  Raises OSError."""
    try:
        posix.symlink(text, path)
    except FileExistsError:
        temporary = path + "-new"  # one name, so that what a killed create left does not stay
        try:
            posix.symlink(text, temporary)
        except FileExistsError:
            posix.unlink(temporary)
            posix.symlink(text, temporary)
        try:
            posix.rename(temporary, path)
        except OSError:
            posix.unlink(temporary)
            raise
