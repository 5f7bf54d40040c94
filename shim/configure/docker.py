"""docker: adds runtimes to daemon.json.  Pure."""

from __future__ import annotations

from typing import List, Tuple

from shim.configure import jsonedit
from shim.configure.model import JSON, TABLE, VALUE, Changes, Edit, Read, Setting, Wish, table
from shim.errors import ConfigError

CONFIG = "/etc/docker/daemon.json"


def config(wish: Wish) -> str:
    """The path of daemon.json; without root the caller's own."""
    return wish.config or (f"{wish.home}/docker/daemon.json" if wish.home else CONFIG)


def command(wish: Wish) -> Tuple[str, ...]:
    """The command that makes docker read its configuration again."""
    return ("systemctl", "--user", "restart", "docker") if wish.home else ("systemctl", "restart", "docker")


def plan(wish: Wish, read: Read) -> Changes:
    """What to write.  Raises ConfigError, which names the file."""
    path = config(wish)
    if wish.nri:
        raise ConfigError("docker has no NRI that can be enabled here", "leave out --nri")
    if wish.drop_in is not None:
        raise ConfigError("docker reads one file and no drop-ins", "leave out --drop-in")
    try:
        document = jsonedit.parse(read.text(path) or "")
    except ConfigError as error:
        raise error.within(path) from None
    runtimes = table(document, ("runtimes",))
    settings = []
    for name, program in wish.handlers:
        made = {"path": program}
        if name in runtimes and runtimes[name] != made:
            raise ConfigError(
                f"{path} has a runtime {name!r} already, which this command has not written",
                "--handler NAME gives ours another name; or take that one out",
            )
        settings.append(Setting(TABLE, ("runtimes", name), made))
    if wish.default:
        settings.append(Setting(VALUE, ("default-runtime",), wish.handlers[0][0]))
    if wish.cdi:
        settings.append(Setting(VALUE, ("features", "cdi"), True))
    return Changes([Edit(path, JSON, settings)], [], command(wish))


def places(wish: Wish, read: Read) -> List[str]:
    """The files in which Chandler may have written."""
    return [config(wish)]
