"""Reads and writes the engines' configuration files, and works out what they would be without Chandler.

Two files stand beside an edited file: its former bytes (`.chandler-original`) and a record of the edit
(`.chandler-record`).  A drop-in of Chandler's keeps its record in a comment instead, because some engines read every
file of a directory.  If nobody else has changed the file since, undoing restores the former bytes.  Otherwise it
removes only what the record names.
"""

from __future__ import annotations

import difflib
import json
import os
from typing import Callable, NamedTuple

from shim.configure import jsonedit, template, tomledit
from shim.configure.model import JSON, TEMPLATE, TOML, Edit, Setting
from shim.errors import ChandlerError, ConfigError, HostError
from shim.host import files, trust
from shim.shapes import Document

LIMIT = 16 << 20  # bytes of a file
ORIGINAL, RECORD = ".chandler-original", ".chandler-record"
HEADER = "# Written by `chandler configure`; its --remove takes this file away.\n"
_OWN_START = HEADER + "# record: "
_BOM = "\ufeff"

Put = Callable[[str, list[Setting]], tuple[str, Document]]
Take = Callable[[str, Document], str]
FORMS: dict[str, tuple[Put, Take]] = {
    TOML: (tomledit.put, tomledit.take),
    JSON: (jsonedit.put, jsonedit.take),
    TEMPLATE: (template.put, template.take),
}


class Stored(NamedTuple):
    """A file as it is now.

    `path`: as the caller named it; `real`: with links resolved.  `data`: its bytes; `base`: its bytes without
    Chandler's part; both None for no file.  `mode` and `owner` (uid, gid): for every file that is written in its
    place.  `ours`: the file has a part of Chandler's.  `directory`: Chandler created the file's directory for it, or
    will.
    """

    path: str
    real: str
    data: bytes | None
    base: bytes | None
    mode: int
    owner: tuple[int, int]
    ours: bool
    directory: bool = False


class Change(NamedTuple):
    """What to write to a file.  `after`: its new bytes, None to delete it.  `record`: the record beside it, or None."""

    stored: Stored
    after: bytes | None
    record: bytes | None

    @property
    def empty(self) -> bool:
        """Whether the file, its record and its former bytes already are as this change would make them."""
        beside = _beside(self.stored.real)
        return self.stored.data == self.after and beside == (self.record, self.stored.base if self.record else None)


def read_stored(path: str, owners: dict[int, str]) -> Stored:
    """Reads a file.  Raises TrustError, HostError, or ConfigError when Chandler's part cannot be removed from it."""
    real = resolve_trusted(path, owners)
    try:
        data, status = files.read(real, LIMIT)
    except FileNotFoundError:
        return Stored(
            path, real, None, None, 0o644, (os.geteuid(), os.getegid()), False, _needs_directory(os.path.dirname(real))
        )
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from None
    try:
        base, ours, directory = _without_chandler(real, data)
    except ConfigError as error:
        raise error.within(path) from None
    return Stored(path, real, data, base, status.st_mode & 0o7777, (status.st_uid, status.st_gid), ours, directory)


def _needs_directory(directory: str) -> bool:
    """Whether Chandler has to create a directory, or created it for an earlier drop-in that the new one replaces."""
    if not os.path.isdir(directory):
        return True
    return any(_record_of(os.path.join(directory, name)).get("directory") for name in os.listdir(directory))


def resolve_trusted(path: str, owners: dict[int, str]) -> str:
    """Resolves links in a path.  Raises TrustError when a user who is not in `owners` could make it lead elsewhere."""
    real = os.path.realpath(path)
    existing = path
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if os.path.islink(path) and not os.path.exists(path):
        raise HostError(f"{path} is a link to {real}, which is not there", "make that file, or remove the link")
    try:
        trust.check_path(existing, owners)
    except OSError as error:
        raise HostError(f"{path} cannot be reached: {error.strerror}") from None
    return real


def _beside(real: str) -> tuple[bytes | None, bytes | None]:
    """Reads the record and the former bytes that stand beside a file; None for each that does not exist."""
    contents: list[bytes | None] = []
    for name in (real + RECORD, real + ORIGINAL):
        try:
            contents.append(files.read(name, LIMIT)[0])
        except FileNotFoundError:
            contents.append(None)
        except OSError as error:
            raise HostError(f"{name} cannot be read: {error.strerror}") from None
    return contents[0], contents[1]


def _without_chandler(real: str, data: bytes) -> tuple[bytes | None, bool, bool]:
    """Returns `base`, `ours` and `directory` of Stored.  Raises ConfigError when Chandler's part cannot be removed."""
    if data.startswith(_OWN_START.encode()):
        return _without_own(data), True, bool(_record_in(data).get("directory"))
    record, original = _beside(real)
    if record is None:
        return data, original is not None, False  # former bytes without a record: an earlier command was interrupted
    try:
        stored_record = json.loads(record)
        unchanged, take, form_record = (
            stored_record["digest"] == files.digest(data),
            FORMS[stored_record["form"]][1],
            stored_record["record"],
        )
        directory = bool(stored_record["directory"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{real}{RECORD} is damaged",
            f"compare the file with {real}{ORIGINAL}, then remove the record and that copy",
        ) from None
    if unchanged:
        return original, True, directory
    return _edit_text(data, lambda text: take(text, form_record)), True, directory


def _record_in(data: bytes) -> Document:
    """The record in the comment of a drop-in of Chandler's; {} for any other file."""
    try:
        record = (
            json.loads(data[len(_OWN_START.encode()) :].partition(b"\n")[0])
            if data.startswith(_OWN_START.encode())
            else None
        )
    except ValueError:
        record = None
    keys = {"engine", "alone", "directory", "digest", "tables", "values", "changes"}
    return record if isinstance(record, dict) and keys <= set(record) else {}


def _without_own(data: bytes) -> bytes | None:
    """A drop-in of Chandler's without Chandler's part; None when nothing is left.  Raises ConfigError."""
    record, rest = _record_in(data), data[len(_OWN_START.encode()) :].partition(b"\n")[2]
    if not record:
        raise ConfigError("its first lines are damaged", "remove the file, and configure again")
    if record["alone"] and record["digest"] == files.digest(rest):
        return None
    remaining = _edit_text(rest, lambda text: tomledit.take(text, {**record, "block": ""}))
    return remaining if tomledit.parse(remaining.decode()) else None


def _edit_text(data: bytes, edit: Callable[[str], str]) -> bytes:
    """Applies `edit` to the text with plain line ends and without a byte order mark, and restores both afterwards.

    Raises ConfigError.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError("it is not UTF-8", "correct it first") from None
    bom = text.startswith(_BOM)
    text = text[1:] if bom else text
    crlf = "\r\n" in text and text.count("\r\n") == text.count("\n")
    text = edit(text.replace("\r\n", "\n") if crlf else text)
    return ((_BOM if bom else "") + (text.replace("\n", "\r\n") if crlf else text)).encode()


def change(stored: Stored, edit: Edit | None, engine: str) -> Change:
    """The change that makes an edit, or, without an edit, removes Chandler's part.  Raises ConfigError."""
    if edit is None:
        return Change(stored, stored.base, None)
    if edit.own and stored.base is not None and not stored.ours:
        raise ConfigError(
            f"{edit.path} exists, and Chandler did not write it", "choose another path with --drop-in PATH"
        )
    record: Document = {}

    def put(text: str) -> str:
        result, put_record = FORMS[edit.form][0](text, edit.settings)
        record.update(put_record)
        return result

    try:
        after = _edit_text(stored.base or b"", put)
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
        head.pop("block")  # it has the comment that was removed above, so it is not in the file
        return Change(stored, f"{_OWN_START}{json.dumps(head)}\n".encode() + after, None)
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
    """The engine for which Chandler wrote a drop-in; "" for any other file."""
    return str(_record_of(path).get("engine", ""))


def _record_of(path: str) -> Document:
    try:
        return _record_in(files.read(path, LIMIT)[0])
    except (OSError, ChandlerError):
        return {}


def diff(file_change: Change) -> str:
    """Shows a change as `diff -u` does."""
    sides = (file_change.stored.data, file_change.after)
    before, after = ((data or b"").decode("utf-8", "replace").splitlines(True) for data in sides)
    old, new = ("/dev/null" if data is None else file_change.stored.path for data in sides)
    lines = difflib.unified_diff(before, after, old, new)
    return "".join(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)


def apply(changes: list[Change]) -> None:
    """Writes changes in their order.  When one fails, restores all files and raises HostError."""
    written: list[tuple[Stored, dict[str, bytes | None]]] = []
    try:
        for file_change in changes:
            stored = file_change.stored
            record, original = _beside(stored.real)
            former = {stored.real: stored.data, stored.real + ORIGINAL: original, stored.real + RECORD: record}
            written.append((stored, former))
            _apply(file_change)
    except BaseException:
        for stored, former in reversed(written):
            for path, data in former.items():
                _put_back(path, data, stored)
        raise


def _put_back(path: str, data: bytes | None, stored: Stored) -> None:
    try:
        if data is None:
            _unlink(path)
            if stored.directory:
                _remove_empty(os.path.dirname(path))
        else:
            _replace(path, data, stored)
    except OSError:
        pass  # what made the change fail may prevent this, too; the caller raises that first error


def _apply(file_change: Change) -> None:
    """Writes a change.  The former bytes and the record come first, so that an interrupted change can be undone."""
    stored = file_change.stored
    try:
        if file_change.record is not None:
            if stored.base is not None:
                _replace(stored.real + ORIGINAL, stored.base, stored)
            _replace(stored.real + RECORD, file_change.record, stored)
        if file_change.after is None:
            os.unlink(stored.real)
        elif file_change.after != stored.data:
            files.make_directory(os.path.dirname(stored.real))
            _replace(stored.real, file_change.after, stored)
        if file_change.record is None or stored.base is None:
            _unlink(stored.real + ORIGINAL)
        if file_change.record is None:
            _unlink(stored.real + RECORD)
        if file_change.after is None and stored.directory and _remove_empty(os.path.dirname(stored.real)):
            return
        _sync(os.path.dirname(stored.real))
    except OSError as error:
        raise HostError(f"{stored.path} cannot be written: {error.strerror}", "nothing was changed") from None


def _replace(path: str, data: bytes, like: Stored) -> None:
    """Writes a file under a temporary name with the mode, owner and SELinux label of `like`, syncs and renames it."""
    files.make_directory(os.path.dirname(path))
    temporary = _temporary(path)
    _unlink(temporary)  # an interrupted command may have left it
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
                pass  # no SELinux; or a new file, which keeps the default label of its directory
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
        return False  # other files are in it


def _temporary(path: str) -> str:
    """The temporary name of a file: outside a directory of drop-ins, where an engine might read a half-written file."""
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
