"""Reads an image's configuration: command, environment, working directory and user.

Source: OCI image specification, "OCI Image Configuration".  A caller's entrypoint and args are combined with the
image's by Docker's rule (Dockerfile reference, "Understand how CMD and ENTRYPOINT interact").  Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from shim import jsontext
from shim.errors import BundleError, ChandlerError
from shim.shapes import Document

MAX_IMAGE_CONFIG = 8 << 20
SHELL = ("/bin/sh",)  # the command when neither the image nor the caller names one


class Image(NamedTuple):
    """The parts of an image's configuration that a bundle uses.  Without an image all are empty."""

    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    env: Sequence[str] = ()
    workdir: str = ""
    user: str = ""


def parse(data: bytes, path: str) -> Image:
    """Parses an image configuration: an OCI image's, its `config` object alone, or the output of `docker inspect`.

    `path`: the file that `data` comes from, for errors.  Raises BundleError, which names the file and the key.
    """
    try:
        document = jsontext.loads(data)
        jsontext.check_value(document)
    except ChandlerError as error:
        raise BundleError(f"{path}: {error.what}") from None
    if isinstance(document, list) and len(document) == 1:
        document = document[0]
    if isinstance(document, dict):
        document = document.get("config", document.get("Config", document))
    if document is None:
        return Image()
    if not isinstance(document, dict):
        raise BundleError(
            f"{path} is not an image configuration", "name the blob that the manifest's `config` refers to"
        )
    env = _texts(document, "Env", path)
    for entry in env:
        if not entry.partition("=")[1] or entry.startswith("="):
            raise BundleError(f"{path}: Env: {entry!r} does not have the form NAME=VALUE")
    return Image(
        _texts(document, "Entrypoint", path),
        _texts(document, "Cmd", path),
        env,
        _text(document, "WorkingDir", path),
        _text(document, "User", path),
    )


def _texts(document: Document, key: str, path: str) -> list[str]:
    value = document.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
        raise BundleError(f"{path}: {key} is not a list of strings")
    return value


def _text(document: Document, key: str, path: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise BundleError(f"{path}: {key} is not a string")
    return value


def command(entrypoint: Sequence[str] | None, args: Sequence[str] | None, image: Image) -> list[str]:
    """The command line of the container's process.

    The caller's `entrypoint` replaces the image's entrypoint and cmd.  Without one, the image's entrypoint gets the
    caller's `args`, or the image's cmd when there are none.  An empty list of args counts as none.
    """
    if entrypoint is not None:
        words = [*entrypoint, *(args or ())]
    else:
        words = [*image.entrypoint, *(args or image.cmd)]
    return words or list(SHELL)
