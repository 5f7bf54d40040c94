"""Reads the config.json of a bundle and replaces it as a whole, with the engine's original kept beside it.

    config.json                    what the runtime reads
    config.json.chandler-original  what the engine wrote: a hard link to that file, or a copy
    config.json.chandler-built     in a bundle that `chandler bundle` made: a symbolic link whose text is the digest of
                                   its config.json
    config.json.chandler-edited    a symbolic link whose text is the digest of the config.json that we wrote last; after
                                   a second create, a comma and the digest of the one before

We replace .chandler-edited before config.json, and may be killed between the two.  Then config.json is still the older
one, so .chandler-edited keeps its digest as well.

The original and .chandler-edited allow the same bundle to be created again.  A config.json with one of the digests is
our own work: the edits start from the original.  One with another digest that holds our mark was changed after we
wrote it, and is refused.  Any other was written by the engine, and becomes the new original.
Part of the create path.
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
_MISSING = (2, 20, 36, 40)  # ENOENT, ENOTDIR, ENAMETOOLONG, ELOOP: the runtime finds no file there either
_REMEDY = "let the engine make the bundle anew"


def may_ask(path: str, needles: List[bytes]) -> bool:
    """Whether the file may carry a request, which means that it contains one of the needles.

    False for a missing file and for a directory: the runtime reports those.  Raises BundleError for anything that we
    cannot read but the runtime perhaps can.  Never blocks.  Reads the file in pieces, so its size costs no memory.
    """
    try:
        descriptor = posix.open(path, posix.O_RDONLY | posix.O_NONBLOCK | posix.O_CLOEXEC | posix.O_NOCTTY)
    except ValueError:  # no file has such a name: one with a NUL, say
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
                f"{path} is not a regular file, so Chandler cannot tell whether it carries a request",
                "give the bundle a config.json that is a regular file",
            )
        overlap = max(len(needle) for needle in needles)  # a needle may lie across two pieces
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
    return errors.BundleError(
        f"{path} cannot be read, so Chandler cannot tell whether it carries a request: {error.strerror}"
    )


class ConfigJson:
    """The config.json of one bundle.

    `path`, `original`, `stamp`: the paths of config.json, .chandler-original and .chandler-edited.
    `engine_bytes`: what the engine wrote, from which edits start.
    `fresh`: config.json is the engine's, not one that we wrote.
    """

    __slots__ = ("path", "original", "stamp", "engine_bytes", "fresh", "_status", "_digest")

    def __init__(self, path: str, mark: bytes) -> None:
        """Reads config.json.  `mark` is a text that every config.json that we write contains.

        Raises BundleError when config.json is a symbolic link, has a hard link that is not ours, cannot be read, is too
        large, or was changed after we wrote it.
        """
        self.path = path
        self.original = path + ".chandler-original"
        self.stamp = path + ".chandler-edited"
        try:
            if posix.lstat(path).st_mode & _FORMAT == _LINK:
                raise errors.BundleError(
                    f"{path} is a symbolic link", "a bundle with a request needs a config.json of its own"
                )
            data, self._status = files.read(path, files.MAX_CONFIG_JSON)
        except OSError as error:
            raise errors.BundleError(f"{path} cannot be read: {error.strerror}") from None
        self.fresh = True
        self.engine_bytes = data
        self._check_hard_links()
        written = self._written_digests()
        if written:
            self._digest = files.digest(data)
            if self._digest in written:
                self.fresh = False
                self.engine_bytes = self._original()
            elif mark in data.replace(b"\\/", b"/"):  # JSON writers may escape a slash
                raise errors.BundleError(
                    f"{path} was changed after Chandler had edited it, and still holds Chandler's edits",
                    f"put the engine's original back: mv {self.original} {path}",
                )

    def _check_hard_links(self) -> None:
        """Raises BundleError when config.json has a hard link besides our .chandler-original.

        Such a link could be somebody else's file, which must not change.
        """
        links = self._status.st_nlink
        if links == 2:
            try:
                original = posix.lstat(self.original)
            except OSError:
                original = None
            ours = self._status.st_dev, self._status.st_ino
            if original is not None and (original.st_dev, original.st_ino) == ours:
                return
        if links > 1:
            raise errors.BundleError(
                f"{self.path} has {links} names (hard links)", "a bundle with a request needs a config.json of its own"
            )

    def _written_digests(self) -> List[str]:
        """The digests of what we wrote, the latest first; [] when we have not edited this bundle."""
        try:
            return posix.readlink(self.stamp).split(",")
        except OSError:
            return []

    def built(self, document: Any) -> bool:
        """Whether `chandler bundle` wrote the engine's bytes, so that no image had a say in them.

        `document` is what these bytes decode to.

        False when the container's root file system is, or contains, the bundle's directory: then an image could bring
        the link .chandler-built itself.
        """
        try:
            if posix.readlink(self.path + BUILT) != files.digest(self.engine_bytes):
                return False
            directory = self.path.rpartition("/")[0] or "."
            path = document["root"]["path"]
            container_root = posix.stat(path if path[:1] == "/" else f"{directory}/{path}")
            host_root = posix.stat("/")
            while True:
                status = posix.stat(directory)
                if (status.st_dev, status.st_ino) == (container_root.st_dev, container_root.st_ino):
                    return False
                if (status.st_dev, status.st_ino) == (host_root.st_dev, host_root.st_ino):
                    return True
                directory += "/.."
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
        """Replaces config.json by `data`, whose digest is `digest`.

        Raises BundleError when that fails; config.json is then as it was.
        """
        try:
            if self.fresh:
                self._keep_original()
            _replace_link(self.stamp, digest if self.fresh else f"{digest},{self._digest}")
            files.replace(
                self.path,
                data,
                self._status.st_mode & 0o7777,
                (self._status.st_uid, self._status.st_gid),
                self.path + ".chandler-new",
            )
        except OSError as error:
            if self.fresh:
                self._forget()
            raise errors.BundleError(f"{self.path} cannot be replaced: {error.strerror}") from None

    def _keep_original(self) -> None:
        """Makes .chandler-original: a hard link, which costs nothing, or a copy where hard links are not permitted."""
        try:
            posix.unlink(self.original)
        except FileNotFoundError:
            pass
        try:
            posix.link(self.path, self.original, follow_symlinks=False)
        except PermissionError:
            files.replace(self.original, self.engine_bytes, self._status.st_mode & 0o7777)

    def _forget(self) -> None:
        """Removes the two names beside config.json that `write` made."""
        for name in (self.original, self.stamp):
            try:
                posix.unlink(name)
            except OSError:
                pass

    def restore(self) -> None:
        """Puts the engine's file back, for a runtime that could not be started."""
        if self.fresh:
            try:
                posix.rename(self.original, self.path)
            except OSError:
                return
            self._forget()


def _replace_link(path: str, text: str) -> None:
    """Makes the symbolic link `path` say `text`; a link that is there stays until it is replaced.  Raises OSError."""
    try:
        posix.symlink(text, path)
    except FileExistsError:
        temporary = path + "-new"  # always the same name, so that the next create removes what a killed one left
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
