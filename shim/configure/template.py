"""Edits a Go template of a TOML file, such as those from which k3s and rke2 generate containerd's configuration.

Settings are appended as one block, since a template cannot be parsed as TOML.  Pure.
"""

from __future__ import annotations

from shim.configure import tomledit
from shim.configure.model import Setting
from shim.errors import ConfigError
from shim.shapes import Document

BASE = '{{ template "base" . }}\n'  # k3s and rke2 put the file here that they generate without a template
_MARK = "\x00"  # stands on both sides of a raw value


def raw(text: str) -> str:
    """Marks a value that `put` writes without quotes, such as an action of the template."""
    return f"{_MARK}{text}{_MARK}"


def put(text: str, settings: list[Setting]) -> tuple[str, Document]:
    """Returns the text with the settings at its end, and the record that `take` needs.  Raises ConfigError."""
    text = text or BASE
    lines = tomledit.snippet(settings)
    for header in (line for line in lines.split("\n") if line.startswith("[")):
        if header.replace('"', "'") in text.replace('"', "'"):
            raise ConfigError(
                f"it already has {header}, which Chandler did not write",
                "remove that, or choose another name with --handler NAME",
            )
    quoted = tomledit.render(_MARK)[1:-1]
    lines = lines.replace(f'"{quoted}', "").replace(f'{quoted}"', "")
    block = ("" if text.endswith("\n") else "\n") + "\n" + tomledit.COMMENT + lines
    return text + block, {"block": block}


def take(text: str, record: Document) -> str:
    """Returns the text without our block.  Raises ConfigError when somebody has changed the block."""
    if record["block"] not in text:
        raise ConfigError("somebody changed the part that Chandler wrote", "remove that part by hand")
    return text.replace(record["block"], "", 1)
