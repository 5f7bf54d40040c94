"""An image's configuration, and what it comes to: the command, the first layer of the environment, directory and user.

Source: OCI image specification, "Image Configuration"; how entrypoint and cmd meet a caller's is Docker's rule.  Pure.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence

from shim import jsontext
from shim.errors import BundleError, ChandlerError
from shim.shapes import Document

MAX_IMAGE_CONFIG = 8 << 20
SHELL = ("/bin/sh",)  # what runs when nobody says what to run


class Image(NamedTuple):
    """The parts of an image's configuration that a bundle takes up; all empty where there is no image."""

    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    env: Sequence[str] = ()
    workdir: str = ""
    user: str = ""


def parse(data: bytes, path: str) -> Image:
    """The image configuration in a file: an OCI image's, the `config` object of one, or what `docker inspect` prints.

    Raises BundleError, which names the file and the key.
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
        raise BundleError(f"{path} is no image configuration", "give it the blob that the manifest's `config` names")
    env = _texts(document, "Env", path)
    for entry in env:
        if not entry.partition("=")[1] or entry.startswith("="):
            raise BundleError(f"{path}: Env: {entry!r} is no NAME=VALUE")
    return Image(
        _texts(document, "Entrypoint", path),
        _texts(document, "Cmd", path),
        env,
        _text(document, "WorkingDir", path),
        _text(document, "User", path),
    )


def _texts(document: Document, key: str, path: str) -> List[str]:
    value = document.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) and "\0" not in item for item in value):
        raise BundleError(f"{path}: {key} is not a list of texts")
    return value


def _text(document: Document, key: str, path: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise BundleError(f"{path}: {key} is not a text")
    return value


def command(entrypoint: Optional[Sequence[str]], args: Optional[Sequence[str]], image: Image) -> List[str]:
    """What the process is: an entrypoint of one's own puts the image's cmd out of force, args of one's own replace
    the cmd and go to the image's entrypoint.  An empty list of args counts as none."""
    if entrypoint is not None:
        whole = [*entrypoint, *(args or ())]
    else:
        whole = [*image.entrypoint, *(args or image.cmd)]
    return whole or list(SHELL)
