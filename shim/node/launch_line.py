"""The launch line: the part of the configuration that the launcher (packaging/bin/chandler-runtime) needs, on one line.

    CONFIG_DIR/launch              "2 MARK NEEDLES KIND=PATH...": the texts by which the launcher finds a request, and
                                   the runtimes in order; 2 is the version of the format
    CONFIG_DIR/launch.d/MARK/...   an empty copy of each configuration file, and of config.d, with the same mtime

Of files a shell can compare only the times.  So a create uses the line only while every configuration file has exactly
the time of its empty copy, and no file was added or removed.  A file that became older (from a backup) is noticed like
one that became newer.  Each line has copies of its own, made before it, so a reader of an old line does not compare
with new copies.
"""

from __future__ import annotations

import os
import shutil
import time

from shim import paths
from shim.errors import ChandlerError, HostError
from shim.host import files, runtimes, trust
from shim.node.inventory import Account
from shim.shapes import Config
from shim.state.lock import Lock

_MAX_LINE = 1 << 16  # bytes
# The mark of a line without copies, which no create uses as it is: a file was changed so recently that a second change
# could have the same time.
_NEVER = "-"
_LOCK = "lock"  # needed since the NRI plugin compiles the configuration, too
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./+@:,-")


def _line_path() -> str:
    return paths.CONFIG_DIR + "/launch"


def _copies_directory() -> str:
    return paths.CONFIG_DIR + "/launch.d"


def is_ours(account: Account) -> bool:
    """Whether the launch line is made from this configuration: only root's, and only the default path."""
    return not account.rootless and account.config_path == paths.CONFIG_DIR + "/config.toml"


def write(account: Account, config: Config, times: dict[str, int], settled: bool) -> None:
    """Writes the line, if it is made from this configuration.

    `times`: mtime (ns) of each configuration file and of config.d, taken before they were read.  `settled`: whether
    every later change would give a file another time.
    If the line cannot be written (a read-only /etc), the launcher asks Python on every create.
    """
    if not is_ours(account):
        return
    try:
        trust.check_path(paths.CONFIG_DIR, account.owners)
        files.make_directory(_copies_directory())
        with Lock(f"{_copies_directory()}/{_LOCK}"):
            mark = _copy(times) if settled else _NEVER
            files.replace(
                _line_path(), f"2 {mark} {_needles(config)} {' '.join(_runtimes(config, account.owners))}\n".encode()
            )
            for name in os.listdir(_copies_directory()):
                if name not in (mark, _LOCK):
                    shutil.rmtree(f"{_copies_directory()}/{name}")
    except (OSError, ChandlerError):
        return


def _copy(times: dict[str, int]) -> str:
    """Makes the empty copies in a new directory, and gives its name, the mark.

    The name is short, since a shell pays for each character.  It is never the mark of the present line: if we were
    killed before the new line is written, the old line would be compared with the new copies.
    """
    number = time.time_ns() // 1_000_000
    while f"{number & 0xFFFF:x}" in {*os.listdir(_copies_directory()), *_words()[1:2]}:
        number += 1
    mark = f"{number & 0xFFFF:x}"
    top = f"{_copies_directory()}/{mark}"
    os.mkdir(top)
    # In reverse order the files in config.d come before config.d itself, whose time their creation changes.
    for path, changed in sorted(times.items(), reverse=True):
        name = path[len(paths.CONFIG_DIR) :]
        if name == "/config.d":
            files.make_directory(top + name)
        else:
            files.make_directory(os.path.dirname(top + name))
            os.close(os.open(top + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        os.utime(top + name, ns=(changed, changed))
    return mark


def _needles(config: Config) -> str:
    """The texts that config.json of a container with a request contains, separated by |."""
    needles = [config["annotation-prefix"].rstrip("/")]
    if config["cdi.annotations"]:
        needles.append("cdi.k8s.io")
    return "|".join(needles)


def _runtimes(config: Config, owners: dict[int, str]) -> list[str]:
    """KIND=PATH of the runtimes that are installed.

    The path is left out, so that the launcher asks Python, for a runtime that others could have changed, and for a path
    with characters that a shell could interpret.
    """
    result = []
    for name in config["runtimes"]:
        try:
            kind, path = runtimes.find(name, owners)
        except HostError:
            continue
        except ChandlerError:
            kind, path = runtimes.kind_of(name), ""
        result.append(f"{kind}={path if _PLAIN.issuperset(path) else ''}")
    return result


def read(owners: dict[int, str]) -> list[str]:
    """The paths of the runtimes on the line, from the last configuration that was valid.

    Empty when somebody else could have written the line.
    """
    try:
        trust.check_path(_line_path(), owners)
    except (OSError, ChandlerError):
        return []
    words = _words()
    return [word.partition("=")[2] for word in words[3:] if word[-1] != "="] if words[:1] == ["2"] else []


def _words() -> list[str]:
    """The words of the line, without a check of who wrote it; empty when it cannot be read."""
    try:
        return files.read(_line_path(), _MAX_LINE)[0].decode("utf-8", "surrogateescape").split()
    except (OSError, ChandlerError):
        return []


def remove() -> None:
    """Removes the line and its copies.  Raises OSError."""
    try:
        os.unlink(_line_path())
    except FileNotFoundError:
        pass
    shutil.rmtree(_copies_directory(), ignore_errors=True)
