"""CRI-O: adds runtime handlers in a drop-in in crio.conf.d.

CRI-O passes every annotation of a pod to the runtime, except those experimental ones of its own that are not in
`allowed_annotations`; it does not start when that list has any other name.  So Chandler's annotations need no entry, and
the list is copied from the default handler, so that pods keep what they were allowed.  Pure.
"""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

from shim.configure import tomledit
from shim.configure.model import (
    TABLE,
    TOML,
    VALUE,
    Changes,
    Edit,
    Read,
    Setting,
    Wish,
    in_directory,
    lookup,
    merged,
    table,
)
from shim.errors import ConfigError

CONFIG = "/etc/crio/crio.conf"
SOCKET = "/var/run/crio/crio.sock"
DROP_IN = "99-chandler.conf"
_RUNTIMES, _DEFAULT = ("crio", "runtime", "runtimes"), ("crio", "runtime", "default_runtime")
_OWN = (
    "runtime_path",
    "runtime_type",
    "runtime_config_path",
    "platform_runtime_paths",
    "default_annotations",
    "container_min_memory",
)


def command(wish: Wish) -> Tuple[str, ...]:
    """The command that makes CRI-O read its configuration again."""
    return ("systemctl", "restart", "crio")


def plan(wish: Wish, read: Read) -> Changes:
    """What to write where.  Raises ConfigError, which names the file."""
    main = wish.config or CONFIG
    directory = main + ".d"
    drop_in = in_directory(wish.drop_in, directory, DROP_IN)
    document: Dict[str, Any] = {}
    for path in [main, *read.glob(directory + "/*")]:
        text = read.text(path) if path != drop_in else None
        if text:
            try:
                document = merged(document, tomledit.parse(text))
            except ConfigError as error:
                raise error.within(path) from None
    notes = ["CRI-O injects CDI devices by itself"] if wish.cdi else []
    if wish.default:
        notes += tomledit.overriders(
            [path for path in read.glob(directory + "/*") if path > drop_in], _DEFAULT, read.text
        )
    return Changes([Edit(drop_in, TOML, _settings(wish, document), own=True)], notes, command(wish))


def places(wish: Wish, read: Read) -> List[str]:
    """The files in which Chandler may have written."""
    return [*([wish.drop_in] if wish.drop_in else []), *read.glob((wish.config or CONFIG) + ".d/*")]


def _settings(wish: Wish, document: Dict[str, Any]) -> List[Setting]:
    runtimes = table(document, _RUNTIMES)
    like = table(runtimes, (str(lookup(document, _DEFAULT) or "runc"),))
    made = {key: value for key, value in like.items() if key not in _OWN}
    settings = []
    for name, program in wish.handlers:
        if name in runtimes:
            raise ConfigError(
                f"CRI-O has a handler {name!r} already, which this command has not written",
                "--handler NAME gives ours another name; or take that one out",
            )
        settings.append(
            Setting(
                TABLE,
                (*_RUNTIMES, name),
                {"runtime_path": program, "runtime_type": "oci", "allowed_annotations": [], **made},
            )
        )
    if wish.default:
        settings.append(Setting(VALUE, _DEFAULT, wish.handlers[0][0]))
    if wish.nri:
        settings.append(Setting(VALUE, ("crio", "nri", "enable_nri"), True))
    return settings
