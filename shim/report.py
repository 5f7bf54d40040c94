"""Tells people about a refusal: writes one sentence to stderr, and appends one record to the runtime's --log file.

containerd shows only the last record of level error in that file.  Source: the runtimes' own log formats (logrus text
and JSON).  Also writes Chandler's own log.
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


def report_refusal(message: str, log: str, log_format: str) -> None:
    """Says why no container was started.  `log`: the path of the --log file, or ''; `log_format`: json or text.

    Where it cannot write, it does nothing.
    """
    # a message can quote half a surrogate pair from JSON, which UTF-8 cannot encode
    line = f"chandler-runtime: {message}\n".encode("utf-8", "backslashreplace")
    try:
        files.write_all(2, line)
    except OSError:
        pass  # nobody reads stderr any more
    if log:
        append(log, _record(message, log_format))


def _record(message: str, log_format: str) -> bytes:
    """One record of a log file: a line."""
    text = message.encode("utf-8", "backslashreplace").decode()
    if log_format == "json":
        return jsontext.dumps({"level": "error", "msg": text, "time": now()}) + b"\n"
    return b'time="' + now().encode() + b'" level=error msg=' + jsontext.dumps(text) + b"\n"


def now() -> str:
    """The time as RFC 3339, UTC, in seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def append(path: str, data: bytes) -> None:
    """Appends to the engine's log file.  Where that cannot be written, it does nothing."""
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
    """Opens Chandler's own log for appending, and creates it if needed.  Gives a file descriptor.

    All directories on the way must be trusted.  The log's own directory may be writable for its group, as /var/log is,
    or for all users where it is sticky.  A user who can write there could put a link there, or a second name of another
    file: both are refused.  Raises OSError, or TrustError.
    """
    owners = userns.trusted_owners(userns.user_namespace())
    directories = trust.path_steps(path.rpartition("/")[0] or "/")
    for directory, status in directories[:-1]:
        trust.check_trust(directory, status, owners, last=False)
    directory, status = directories[-1]
    if status.st_uid not in owners or status.st_mode & 0o1002 == 0o002:
        trust.check_trust(directory, status, owners)
    descriptor = posix.open(path, _APPEND | posix.O_NOFOLLOW, 0o644)
    status = posix.fstat(descriptor)
    if status.st_mode & 0o170000 != 0o100000 or status.st_nlink != 1:
        posix.close(descriptor)
        raise errors.TrustError(f"{path} is not a regular file with only this name")
    return descriptor


def write_log(target: str, record: Any) -> None:
    """Appends a record to Chandler's own log: as a JSON line to the file `target`, or to the journal.

    The journal takes it by its native protocol (systemd, "Native Journal Protocol").  Where it cannot write, it does
    nothing.
    """
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
        pass  # no journal on this machine, or its socket is full
    finally:
        channel.close()


def log_of_service(target: str, record: Any) -> None:
    """Writes a record to the log of a service: to `target` as `write_log` does, or to standard error, for systemd's
    journal, where the configuration names no log."""
    if target:
        write_log(target, record)
        return
    try:
        files.write_all(2, jsontext.dumps(record) + b"\n")
    except OSError:
        pass  # standard error is closed
