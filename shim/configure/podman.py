"""podman: adds runtimes in a drop-in in containers.conf.d.

`runtime_supports_json` lists the runtimes that conmon starts with `--log`, so that podman shows their error messages
word by word.  Before podman 5 a list in a drop-in replaces those of earlier files, so ours repeats their entries.  Pure.
"""

from __future__ import annotations

import posixpath
from typing import Any, Dict, List, Tuple

from shim.configure import tomledit
from shim.configure.model import (
    PROGRAMS,
    TOML,
    VALUE,
    Changes,
    Edit,
    Read,
    Setting,
    Wish,
    in_directory,
    merged,
    table,
    words,
)
from shim.errors import ConfigError

CONFIG = "/etc/containers/containers.conf"
VENDOR = "/usr/share/containers/containers.conf"
DROP_IN = "99-chandler.conf"
# podman's default where no file has the key.
SUPPORTS_JSON = ["crun", "runc", "kata", "runsc", "youki", "krun"]
_SUPPORTS = ("engine", "runtime_supports_json")
_RUNTIMES, _DEFAULT = ("engine", "runtimes"), ("engine", "runtime")


def config(wish: Wish) -> str:
    """The path of the main file; without root the caller's own."""
    return wish.config or (f"{wish.home}/containers/containers.conf" if wish.home else CONFIG)


def command(wish: Wish) -> Tuple[str, ...]:
    """No command: podman reads its configuration at every call."""
    return ()


def plan(wish: Wish, read: Read) -> Changes:
    """What to write where.  Raises ConfigError, which names the file."""
    if wish.nri:
        raise ConfigError("podman has no NRI", "leave out --nri")
    main = config(wish)
    drop_in = in_directory(wish.drop_in, main + ".d", DROP_IN, ".conf")
    document: Dict[str, Any] = {}
    supports: List[str] = []
    for path in _files(main, read):
        text = read.text(path) if path != drop_in else None
        if not text:
            continue
        try:
            own = tomledit.parse(text)
        except ConfigError as error:
            raise error.within(path) from None
        document = merged(document, own)
        supports += words(own, _SUPPORTS)
    names = [*(supports or SUPPORTS_JSON), *(name for name, _ in wish.handlers), *PROGRAMS]
    settings = [Setting(VALUE, _SUPPORTS, list(dict.fromkeys(names)))]
    if wish.default:
        settings.insert(0, Setting(VALUE, _DEFAULT, wish.handlers[0][0]))
    there = table(document, _RUNTIMES)
    for name, program in wish.handlers:
        if name in there and there[name] != [program]:
            raise ConfigError(
                f"podman has a runtime {name!r} already, which this command has not written",
                "--handler NAME gives ours another name; or take that one out",
            )
        settings.append(Setting(VALUE, (*_RUNTIMES, name), [program]))
    notes = ["podman injects CDI devices by itself"] if wish.cdi else []
    later = [path for path in read.glob(main + ".d/*.conf") if path > drop_in]
    for key in (_SUPPORTS, *([_DEFAULT] if wish.default else [])):
        notes += tomledit.overriders(later, key, read.text)
    return Changes([Edit(drop_in, TOML, settings, own=True)], notes, command(wish))


def places(wish: Wish, read: Read) -> List[str]:
    """The files in which Chandler may have written."""
    return [*([wish.drop_in] if wish.drop_in else []), *read.glob(config(wish) + ".d/*.conf")]


def _files(main: str, read: Read) -> List[str]:
    """The files that podman reads, in its order."""
    mains = list(dict.fromkeys((VENDOR, CONFIG, main))) if posixpath.basename(main) == "containers.conf" else [main]
    return [path for one in mains for path in (one, *read.glob(one + ".d/*.conf"))]
