"""CRI-O: adds runtime handlers in a drop-in in crio.conf.d.

CRI-O passes every annotation of a pod to the runtime, except its own experimental annotations that are not in
`allowed_annotations`.  It does not start when that list has any other name.  So Chandler's annotations need no entry.
The list is copied from the default handler, so that pods may still use the annotations that they could use before.
Pure.
"""

from __future__ import annotations

from shim.configure import tomledit
from shim.configure.model import (
    TABLE,
    TOML,
    VALUE,
    Changes,
    ConfigureRequest,
    Edit,
    Read,
    Setting,
    in_directory,
    lookup,
    merged,
    table,
)
from shim.errors import ConfigError
from shim.shapes import Document

CONFIG = "/etc/crio/crio.conf"
SOCKET = "/var/run/crio/crio.sock"
DROP_IN = "99-chandler.conf"
_RUNTIMES, _DEFAULT = ("crio", "runtime", "runtimes"), ("crio", "runtime", "default_runtime")
# The keys of the default handler that ours does not copy.
_NOT_COPIED = (
    "runtime_path",
    "runtime_type",
    "runtime_config_path",
    "platform_runtime_paths",
    "default_annotations",
    "container_min_memory",
)


def command(request: ConfigureRequest) -> tuple[str, ...]:
    """The command that makes CRI-O read its configuration again."""
    return ("systemctl", "restart", "crio")


def plan(request: ConfigureRequest, read: Read) -> Changes:
    """The drop-in to write.  Raises ConfigError, which names the file."""
    main = request.config or CONFIG
    directory = main + ".d"
    drop_in = in_directory(request.drop_in, directory, DROP_IN)
    document: Document = {}
    for path in [main, *read.glob(directory + "/*")]:
        text = read.text(path) if path != drop_in else None
        if text:
            try:
                document = merged(document, tomledit.parse(text))
            except ConfigError as error:
                raise error.within(path) from None
    notes = ["CRI-O injects CDI devices by itself"] if request.cdi else []
    if request.default:
        notes += tomledit.notes_about_later_files(
            [path for path in read.glob(directory + "/*") if path > drop_in], _DEFAULT, read.text
        )
    return Changes([Edit(drop_in, TOML, _settings(request, document), own=True)], notes, command(request))


def possible_files(request: ConfigureRequest, read: Read) -> list[str]:
    """The files in which Chandler may have written."""
    return [*([request.drop_in] if request.drop_in else []), *read.glob((request.config or CONFIG) + ".d/*")]


def _settings(request: ConfigureRequest, document: Document) -> list[Setting]:
    runtimes = table(document, _RUNTIMES)
    base = table(runtimes, (str(lookup(document, _DEFAULT) or "runc"),))
    inherited = {key: value for key, value in base.items() if key not in _NOT_COPIED}
    settings = []
    for name, program in request.handlers:
        if name in runtimes:
            raise ConfigError(
                f"CRI-O has a handler {name!r} already, and this command did not write it",
                "choose another name with --handler NAME, or remove that handler",
            )
        settings.append(
            Setting(
                TABLE,
                (*_RUNTIMES, name),
                {"runtime_path": program, "runtime_type": "oci", "allowed_annotations": [], **inherited},
            )
        )
    if request.default:
        settings.append(Setting(VALUE, _DEFAULT, request.handlers[0][0]))
    if request.nri:
        settings.append(Setting(VALUE, ("crio", "nri", "enable_nri"), True))
    return settings
