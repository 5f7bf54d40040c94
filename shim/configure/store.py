"""Reads and writes the configuration files, and works out what they would be without Chandler.

Beside an edited file are its former bytes (`.chandler-original`) and a record of the edit (`.chandler-record`).  A
drop-in of Chandler's has its record in a comment instead, because some engines read every file of a directory.  As
long as nobody else has changed the file, undoing restores the former bytes; otherwise it removes what the record names.
"""

from __future__ import annotations

import difflib
import json
import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from shim.configure import jsonedit, template, tomledit
from shim.configure.model import JSON, TEMPLATE, TOML, Edit, Setting
from shim.errors import ChandlerError, ConfigError, HostError
from shim.host import files, trust

LIMIT = 16 << 20
ORIGINAL, RECORD = ".chandler-original", ".chandler-record"
HEADER = "# Written by `chandler configure`; its --remove takes this file away.\n"
_OWN = HEADER + "# record: "
_BOM = "\ufeff"

Put = Callable[[str, List[Setting]], Tuple[str, Dict[str, Any]]]
Take = Callable[[str, Dict[str, Any]], str]
FORMS: Dict[str, Tuple[Put, Take]] = {
    TOML: (tomledit.put, tomledit.take),
    JSON: (jsonedit.put, jsonedit.take),
    TEMPLATE: (template.put, template.take),
}


class Stored(NamedTuple):
    """A file as it is.  `path`: as it was asked for; `real`: with links resolved; `data`: its bytes, and `base`: its
    bytes without Chandler's part (None: no file); `ours`: there is a part of Chandler's; `directory`: the file's
    directory was created for it, or will be."""

    path: str
    real: str
    data: Optional[bytes]
    base: Optional[bytes]
    mode: int
    owner: Tuple[int, int]
    ours: bool
    directory: bool = False


class Change(NamedTuple):
    """What to write to a file.  `after`: its new bytes, None to delete it; `record`: the record beside it, or None."""

    stored: Stored
    after: Optional[bytes]
    record: Optional[bytes]

    @property
    def empty(self) -> bool:
        """Whether the file, its record and its backup already are what they should be."""
        beside = _beside(self.stored.real)
        return self.stored.data == self.after and beside == (self.record, self.stored.base if self.record else None)


def look(path: str, owners: Dict[int, str]) -> Stored:
    """Reads a file.  Raises TrustError, HostError, or ConfigError when Chandler's part cannot be removed from it."""
    real = trusted(path, owners)
    try:
        data, found = files.read(real, LIMIT)
    except FileNotFoundError:
        return Stored(path, real, None, None, 0o644, (os.geteuid(), os.getegid()), False, _made(os.path.dirname(real)))
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from None
    try:
        base, ours, directory = _without(real, data)
    except ConfigError as error:
        raise error.within(path) from None
    return Stored(path, real, data, base, found.st_mode & 0o7777, (found.st_uid, found.st_gid), ours, directory)


def _made(directory: str) -> bool:
    """Whether a directory is to be created, or was for another drop-in of Chandler's, which the new one replaces."""
    if not os.path.isdir(directory):
        return True
    return any(_head_of(os.path.join(directory, name)).get("directory") for name in os.listdir(directory))


def trusted(path: str, owners: Dict[int, str]) -> str:
    """Resolves links in a path.  Raises TrustError when an untrusted user could make it lead elsewhere."""
    real = os.path.realpath(path)
    there = path
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if os.path.islink(path) and not os.path.exists(path):
        raise HostError(f"{path} is a link to {real}, which is not there", "make that file, or take the link away")
    try:
        trust.check_way(there, owners)
    except OSError as error:
        raise HostError(f"{path} cannot be reached: {error.strerror}") from None
    return real


def _beside(real: str) -> Tuple[Optional[bytes], Optional[bytes]]:
    """Reads the record and the former bytes beside a file; None where there is no such file."""
    found: List[Optional[bytes]] = []
    for name in (real + RECORD, real + ORIGINAL):
        try:
            found.append(files.read(name, LIMIT)[0])
        except FileNotFoundError:
            found.append(None)
        except OSError as error:
            raise HostError(f"{name} cannot be read: {error.strerror}") from None
    return found[0], found[1]


def _without(real: str, data: bytes) -> Tuple[Optional[bytes], bool, bool]:
    """Returns `base`, `ours` and `directory` of Stored."""
    if data.startswith(_OWN.encode()):
        return _without_own(data), True, bool(_head(data).get("directory"))
    record, original = _beside(real)
    if record is None:
        return data, original is not None, False  # a backup without a record: the writer was interrupted
    try:
        known = json.loads(record)
        unchanged, take, made = known["digest"] == files.digest(data), FORMS[known["form"]][1], known["record"]
        directory = bool(known["directory"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{real}{RECORD} is damaged", f"compare the file with {real}{ORIGINAL}, and remove both of these"
        ) from None
    if unchanged:
        return original, True, directory
    return _edited(data, lambda text: take(text, made)), True, directory


def _head(data: bytes) -> Dict[str, Any]:
    """The record in the comment of a drop-in of Chandler's; empty for any other file."""
    try:
        found = json.loads(data[len(_OWN.encode()) :].partition(b"\n")[0]) if data.startswith(_OWN.encode()) else None
    except ValueError:
        found = None
    keys = {"engine", "alone", "directory", "digest", "tables", "values", "changes"}
    return found if isinstance(found, dict) and keys <= set(found) else {}


def _without_own(data: bytes) -> Optional[bytes]:
    known, rest = _head(data), data[len(_OWN.encode()) :].partition(b"\n")[2]
    if not known:
        raise ConfigError("its first lines are damaged", "remove the file, and configure again")
    if known["alone"] and known["digest"] == files.digest(rest):
        return None
    taken = _edited(rest, lambda text: tomledit.take(text, {**known, "block": ""}))
    return taken if tomledit.parse(taken.decode()) else None


def _edited(data: bytes, edit: Callable[[str], str]) -> bytes:
    """Edits a text with plain line ends and without a byte order mark, and restores both.  Raises ConfigError."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError("it is not UTF-8", "mend it first") from None
    bom = text.startswith(_BOM)
    text = text[1:] if bom else text
    crlf = "\r\n" in text and text.count("\r\n") == text.count("\n")
    text = edit(text.replace("\r\n", "\n") if crlf else text)
    return ((_BOM if bom else "") + (text.replace("\n", "\r\n") if crlf else text)).encode()


def change(stored: Stored, edit: Optional[Edit], engine: str) -> Change:
    """The change that makes an edit, or, without one, undoes everything.  Raises ConfigError."""
    if edit is None:
        return Change(stored, stored.base, None)
    if edit.own and stored.base is not None and not stored.ours:
        raise ConfigError(f"{edit.path} is there already, and it is not Chandler's", "--drop-in PATH names another")
    record: Dict[str, Any] = {}

    def put(text: str) -> str:
        result, made = FORMS[edit.form][0](text, edit.settings)
        record.update(made)
        return result

    try:
        after = _edited(stored.base or b"", put)
    except ConfigError as error:
        raise error.within(edit.path) from None
    if edit.own:
        after = after.replace(tomledit.COMMENT.encode(), b"")  # HEADER says the same
        head = {
            "engine": engine,
            "alone": stored.base is None,
            "directory": stored.directory,
            "digest": files.digest(after),
            **record,
        }
        head.pop("block")
        return Change(stored, f"{_OWN}{json.dumps(head)}\n".encode() + after, None)
    if after == stored.base:
        return Change(stored, after, None)
    whole = {
        "engine": engine,
        "form": edit.form,
        "directory": stored.directory,
        "digest": files.digest(after),
        "record": record,
    }
    return Change(stored, after, json.dumps(whole).encode() + b"\n")


def engine_of(path: str) -> str:
    """The engine that a drop-in of Chandler's was written for; "" for any other file."""
    return str(_head_of(path).get("engine", ""))


def _head_of(path: str) -> Dict[str, Any]:
    try:
        return _head(files.read(path, LIMIT)[0])
    except (OSError, ChandlerError):
        return {}


def diff(one: Change) -> str:
    """Shows a change as `diff -u` does."""
    sides = (one.stored.data, one.after)
    before, after = ((data or b"").decode("utf-8", "replace").splitlines(True) for data in sides)
    old, new = ("/dev/null" if data is None else one.stored.path for data in sides)
    lines = difflib.unified_diff(before, after, old, new)
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


def apply(changes: List[Change]) -> None:
    """Writes changes in their order; when one fails, restores all files.  Raises HostError."""
    before: List[Tuple[Stored, Dict[str, Optional[bytes]]]] = []
    try:
        for one in changes:
            real = one.stored.real
            record, original = _beside(real)
            before.append((one.stored, {real: one.stored.data, real + ORIGINAL: original, real + RECORD: record}))
            _apply(one)
    except BaseException:
        for stored, were in reversed(before):
            for path, data in were.items():
                _put_back(path, data, stored)
        raise


def _put_back(path: str, data: Optional[bytes], stored: Stored) -> None:
    try:
        if data is None:
            _unlink(path)
            if stored.directory:
                _remove_empty(os.path.dirname(path))
        else:
            _replace(path, data, stored)
    except OSError:
        pass  # the cause of the failure may prevent this, too; it is reported already


def _apply(one: Change) -> None:
    """Writes a change: the former bytes and the record first, so that an interrupted one can be undone."""
    stored = one.stored
    try:
        if one.record is not None:
            if stored.base is not None:
                _replace(stored.real + ORIGINAL, stored.base, stored)
            _replace(stored.real + RECORD, one.record, stored)
        if one.after is None:
            os.unlink(stored.real)
        elif one.after != stored.data:
            files.make_directory(os.path.dirname(stored.real))
            _replace(stored.real, one.after, stored)
        if one.record is None or stored.base is None:
            _unlink(stored.real + ORIGINAL)
        if one.record is None:
            _unlink(stored.real + RECORD)
        if one.after is None and stored.directory and _remove_empty(os.path.dirname(stored.real)):
            return
        _sync(os.path.dirname(stored.real))
    except OSError as error:
        raise HostError(f"{stored.path} cannot be written: {error.strerror}", "nothing was changed") from None


def _replace(path: str, data: bytes, like: Stored) -> None:
    """Writes a file under another name, with the mode, owner and SELinux label of `like`, syncs it, and renames it."""
    files.make_directory(os.path.dirname(path))
    temporary = _temporary(path)
    _unlink(temporary)  # left by a process that was killed
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            files.write_all(descriptor, data)
            if like.owner != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, *like.owner)
            os.fchmod(descriptor, like.mode)
            try:
                os.setxattr(descriptor, "security.selinux", os.getxattr(like.real, "security.selinux"))
            except OSError:
                pass  # no SELinux, or a new file, which gets its directory's default label
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException:
        _unlink(temporary)
        raise


def _remove_empty(directory: str) -> bool:
    try:
        os.rmdir(directory)
        return True
    except OSError:
        return False  # it has files of somebody else


def _temporary(path: str) -> str:
    """The name under which a file is written first: not in a directory of drop-ins, where an engine might read it."""
    directory, name = os.path.split(path)
    above = os.path.dirname(directory)
    if directory.endswith(".d") and os.stat(above).st_dev == os.stat(directory).st_dev and os.access(above, os.W_OK):
        return os.path.join(above, name + ".chandler-new")
    return path + ".chandler-new"


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
