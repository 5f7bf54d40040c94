"""How a refusal reaches a person: one sentence on stderr, one record appended to the file given as --log.

containerd shows the last record of level error in that file and nothing else.  Source: the runtimes' own log
formats (logrus text and JSON).
"""

from __future__ import annotations

import posix
import time

from shim import errors, jsontext
from shim.errors import ChandlerError
from shim.host import files, trust, userns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


_APPEND = posix.O_WRONLY | posix.O_CREAT | posix.O_APPEND | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY


def error(message: str, log: str, log_format: str) -> None:
    """Says why nothing was started; a place that cannot be written to is passed over."""
    line = f"chandler-runtime: {message}\n".encode("utf-8", "backslashreplace")  # JSON may hold half a character
    try:
        files.write_all(2, line)
    except OSError:
        pass  # nobody listens
    if log:
        append(log, _record(message, log_format))


def _record(message: str, log_format: str) -> bytes:
    text = message.encode("utf-8", "backslashreplace").decode()
    if log_format == "json":
        return jsontext.dumps({"level": "error", "msg": text, "time": now()}) + b"\n"
    return b'time="' + now().encode() + b'" level=error msg=' + jsontext.dumps(text) + b"\n"


def now() -> str:
    """The time as RFC 3339, UTC, in seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def append(path: str, data: bytes) -> None:
    """Appends to the engine's log in one write; one that cannot be written to is passed over."""
    try:
        descriptor = posix.open(path, _APPEND, 0o644)
    except (OSError, ValueError):
        return
    _write(descriptor, data)


def _write(descriptor: int, data: bytes) -> None:
    try:
        files.write_all(descriptor, data)
    except OSError:
        pass
    finally:
        posix.close(descriptor)


def open_own(path: str) -> int:
    """A descriptor for Chandler's own log, which lies where only the administrator could have put it: the directory may
    be a group's to write to, as /var/log is, so what is opened is no link, and no second name of another file.

    Raises OSError, or TrustError.
    """
    owners = userns.trusted_owners(userns.user_namespace())
    passed = trust.way(path.rpartition("/")[0] or "/")
    for part, found in passed[:-1]:
        trust.check_trust(part, found, owners, last=False)
    if passed[-1][1].st_uid not in owners:
        trust.check_trust(*passed[-1], owners)
    descriptor = posix.open(path, _APPEND | posix.O_NOFOLLOW, 0o644)
    found = posix.fstat(descriptor)
    if found.st_mode & 0o170000 != 0o100000 or found.st_nlink != 1:
        posix.close(descriptor)
        raise errors.TrustError(f"{path} is not a file with this one name")
    return descriptor


def line(target: str, record: Any) -> None:
    """Chandler's own log: one JSON line to a file, or to the journal (its native protocol's socket)."""
    data = jsontext.dumps(record)
    if target != "journal":
        try:
            _write(open_own(target), data + b"\n")
        except (OSError, ValueError, ChandlerError):
            pass  # `chandler doctor` says why
        return
    from _socket import AF_UNIX, SOCK_DGRAM, socket

    channel = socket(AF_UNIX, SOCK_DGRAM)
    try:
        channel.sendto(
            b"PRIORITY=6\nSYSLOG_IDENTIFIER=chandler\nMESSAGE=" + data + b"\n", "/run/systemd/journal/socket"
        )
    except OSError:
        pass  # no journal on this machine, or it does not keep up
    finally:
        channel.close()
