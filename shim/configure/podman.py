"""podman: adds runtimes in a drop-in in containers.conf.d.

`runtime_supports_json` lists the runtimes that conmon starts with `--log`, so that podman shows their error messages
word for word.  Before podman 5 a list in a drop-in replaces the lists of earlier files, so our list repeats their
entries.  Pure.
"""

from __future__ import annotations

import posixpath

from shim.configure import tomledit
from shim.configure.model import (
    PROGRAMS,
    TOML,
    VALUE,
    Changes,
    ConfigureRequest,
    Edit,
    Read,
    Setting,
    in_directory,
    merged,
    table,
    words,
)
from shim.errors import ConfigError
from shim.shapes import Document

CONFIG = "/etc/containers/containers.conf"
VENDOR = "/usr/share/containers/containers.conf"
DROP_IN = "99-chandler.conf"
# podman's default for runtime_supports_json where no file has the key.
SUPPORTS_JSON = ["crun", "runc", "kata", "runsc", "youki", "krun"]
_SUPPORTS = ("engine", "runtime_supports_json")
_RUNTIMES, _DEFAULT = ("engine", "runtimes"), ("engine", "runtime")


def config(request: ConfigureRequest) -> str:
    """The path of the main file: the caller's own for a caller without root."""
    return request.config or (f"{request.home}/containers/containers.conf" if request.home else CONFIG)


def command(request: ConfigureRequest) -> tuple[str, ...]:
    """No command, since podman reads its configuration at every call."""
    return ()


def plan(request: ConfigureRequest, read: Read) -> Changes:
    """The drop-in to write.  Raises ConfigError, which names the file."""
    if request.nri:
        raise ConfigError("podman has no NRI", "leave out --nri")
    main = config(request)
    drop_in = in_directory(request.drop_in, main + ".d", DROP_IN, ".conf")
    document: Document = {}
    supports: list[str] = []
    for path in _files(main, read):
        text = read.text(path) if path != drop_in else None
        if not text:
            continue
        try:
            file_document = tomledit.parse(text)
        except ConfigError as error:
            raise error.within(path) from None
        document = merged(document, file_document)
        supports += words(file_document, _SUPPORTS)
    names = [*(supports or SUPPORTS_JSON), *(name for name, _ in request.handlers), *PROGRAMS]
    settings = [Setting(VALUE, _SUPPORTS, list(dict.fromkeys(names)))]
    if request.default:
        settings.insert(0, Setting(VALUE, _DEFAULT, request.handlers[0][0]))
    runtimes = table(document, _RUNTIMES)
    for name, program in request.handlers:
        if name in runtimes and runtimes[name] != [program]:
            raise ConfigError(
                f"podman has a runtime {name!r} already, and this command did not write it",
                "choose another name with --handler NAME, or remove that runtime",
            )
        settings.append(Setting(VALUE, (*_RUNTIMES, name), [program]))
    notes = ["podman injects CDI devices by itself"] if request.cdi else []
    later = [path for path in read.glob(main + ".d/*.conf") if path > drop_in]
    for key in (_SUPPORTS, *([_DEFAULT] if request.default else [])):
        notes += tomledit.notes_about_later_files(later, key, read.text)
    return Changes([Edit(drop_in, TOML, settings, own=True)], notes, command(request))


def possible_files(request: ConfigureRequest, read: Read) -> list[str]:
    """The files in which Chandler may have written."""
    return [*([request.drop_in] if request.drop_in else []), *read.glob(config(request) + ".d/*.conf")]


def _files(main: str, read: Read) -> list[str]:
    """The files that podman reads, in its order."""
    main_files = (
        list(dict.fromkeys((VENDOR, CONFIG, main))) if posixpath.basename(main) == "containers.conf" else [main]
    )
    return [path for main_file in main_files for path in (main_file, *read.glob(main_file + ".d/*.conf"))]
