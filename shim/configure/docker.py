"""docker: adds runtimes to daemon.json.  Pure."""

from __future__ import annotations

from shim.configure import jsonedit
from shim.configure.model import JSON, TABLE, VALUE, Changes, ConfigureRequest, Edit, Read, Setting, table
from shim.errors import ConfigError

CONFIG = "/etc/docker/daemon.json"


def config(request: ConfigureRequest) -> str:
    """The path of daemon.json: the caller's own for a caller without root."""
    return request.config or (f"{request.home}/docker/daemon.json" if request.home else CONFIG)


def command(request: ConfigureRequest) -> tuple[str, ...]:
    """The command that makes docker read its configuration again."""
    return ("systemctl", "--user", "restart", "docker") if request.home else ("systemctl", "restart", "docker")


def plan(request: ConfigureRequest, read: Read) -> Changes:
    """The settings to write into daemon.json.  Raises ConfigError, which names the file."""
    path = config(request)
    if request.nri:
        raise ConfigError("docker has no NRI that can be enabled here", "leave out --nri")
    if request.drop_in is not None:
        raise ConfigError("docker reads one file and no drop-ins", "leave out --drop-in")
    try:
        document = jsonedit.parse(read.text(path) or "")
    except ConfigError as error:
        raise error.within(path) from None
    runtimes = table(document, ("runtimes",))
    settings = []
    for name, program in request.handlers:
        runtime = {"path": program}
        if name in runtimes and runtimes[name] != runtime:
            raise ConfigError(
                f"{path} has a runtime {name!r} already, and this command did not write it",
                "choose another name with --handler NAME, or remove that runtime",
            )
        settings.append(Setting(TABLE, ("runtimes", name), runtime))
    if request.default:
        settings.append(Setting(VALUE, ("default-runtime",), request.handlers[0][0]))
    if request.cdi:
        settings.append(Setting(VALUE, ("features", "cdi"), True))
    return Changes([Edit(path, JSON, settings)], [], command(request))


def possible_files(request: ConfigureRequest, read: Read) -> list[str]:
    """The files in which Chandler may have written."""
    return [config(request)]
