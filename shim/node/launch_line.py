"""The launch line: what the launcher (packaging/bin/chandler-runtime) must know of the configuration, on one line.

    CONFIG_DIR/launch              "2 MARK NEEDLES KIND=PATH...": what a request's text has in it, and the runtimes in
    order CONFIG_DIR/launch.d/MARK/...   for each file of the configuration, and for config.d, an empty one with its
    time

A shell can compare times and nothing else.  So a create believes the line only while every source has the very time
that its empty copy has, and there is none more and none less: a configuration that is older differs as well as one
that is newer.  Every line has copies of its own, made before it, so whoever reads an old line never meets new copies.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import Any, Dict, List

from shim import paths
from shim.errors import ChandlerError, HostError
from shim.host import files, runtimes, trust
from shim.node.inventory import Place
from shim.state.lock import Lock

_MAX_LINE = 1 << 16
_NEVER = "-"  # the mark of a line without copies: a source was changed so recently that its time may not tell of another change
_LOCK = "lock"  # the NRI plugin compiles, too
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./+@:,-")


def _line() -> str:
    return paths.CONFIG_DIR + "/launch"


def _copies() -> str:
    return paths.CONFIG_DIR + "/launch.d"


def is_ours(place: Place) -> bool:
    """Whether a line is made of this configuration: that of the node, by root."""
    return not place.rootless and place.config_path == paths.CONFIG_DIR + "/config.toml"


def write(place: Place, config: Dict[str, Any], times: Dict[str, int], settled: bool) -> None:
    """Writes the line.  `times`: when the configuration's files, and config.d, were changed (ns), as they were before
    they were read.  `settled`: whether those times tell of every later change.

    Where nothing can be written (a read-only /etc) the launcher asks Python on every create.
    """
    if not is_ours(place):
        return
    try:
        trust.check_way(paths.CONFIG_DIR, place.owners)
        files.make_directory(_copies())
        with Lock(f"{_copies()}/{_LOCK}"):
            mark = _copy(times) if settled else _NEVER
            files.replace(
                _line(), f"2 {mark} {_needles(config)} {' '.join(_runtimes(config, place.owners))}\n".encode()
            )
            for name in os.listdir(_copies()):
                if name not in (mark, _LOCK):
                    shutil.rmtree(f"{_copies()}/{name}")
    except (OSError, ChandlerError):
        return


def _copy(times: Dict[str, int]) -> str:
    """Makes the empty copies; the name of their directory, short since a shell pays for each character, and never
    that of the present line, which would be believed if we were killed before the next one is there."""
    number = time.time_ns() // 1_000_000
    while f"{number & 0xFFFF:x}" in {*os.listdir(_copies()), *_words()[1:2]}:
        number += 1
    mark = f"{number & 0xFFFF:x}"
    top = f"{_copies()}/{mark}"
    os.mkdir(top)
    for path, changed in sorted(times.items(), reverse=True):  # what is in config.d before it, whose time that changes
        name = path[len(paths.CONFIG_DIR) :]
        if name == "/config.d":
            files.make_directory(top + name)
        else:
            files.make_directory(os.path.dirname(top + name))
            os.close(os.open(top + name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        os.utime(top + name, ns=(changed, changed))
    return mark


def _needles(config: Dict[str, Any]) -> str:
    needles = [config["annotation-prefix"].rstrip("/")]
    if config["cdi.annotations"]:
        needles.append("cdi.k8s.io")
    return "|".join(needles)


def _runtimes(config: Dict[str, Any], owners: Dict[int, str]) -> List[str]:
    """KIND=PATH of those that are installed.  One that must not be used, or whose path a shell could read in another
    way, has no path, so that Python is asked."""
    found = []
    for name in config["runtimes"]:
        try:
            kind, path = runtimes.find(name, owners)
        except HostError:
            continue
        except ChandlerError:
            kind, path = runtimes.kind_of(name), ""
        found.append(f"{kind}={path if _PLAIN.issuperset(path) else ''}")
    return found


def read(owners: Dict[int, str]) -> List[str]:
    """The runtimes on the line, from when the configuration was last right; none where somebody else could have
    written it."""
    try:
        trust.check_way(_line(), owners)
    except (OSError, ChandlerError):
        return []
    words = _words()
    return [word.partition("=")[2] for word in words[3:] if word[-1] != "="] if words[:1] == ["2"] else []


def _words() -> List[str]:
    """What is on the line, whoever wrote it."""
    try:
        return files.read(_line(), _MAX_LINE)[0].decode("utf-8", "surrogateescape").split()
    except (OSError, ChandlerError):
        return []


def remove() -> None:
    """Takes the line away.  Raises OSError."""
    try:
        os.unlink(_line())
    except FileNotFoundError:
        pass
    shutil.rmtree(_copies(), ignore_errors=True)
