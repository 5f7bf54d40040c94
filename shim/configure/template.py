"""Edits a Go template of a TOML file, such as those from which k3s and rke2 generate containerd's configuration.

Settings are appended as one block, since a template cannot be parsed as TOML.  Pure.
"""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

from shim.configure import tomledit
from shim.configure.model import Setting
from shim.errors import ConfigError

BASE = '{{ template "base" . }}\n'  # stands for the file that k3s and rke2 generate without a template
_MARK = "\x00"


def raw(text: str) -> str:
    """A value that is written into the template without quotes, such as an action of the template."""
    return f"{_MARK}{text}{_MARK}"


def put(text: str, settings: List[Setting]) -> Tuple[str, Dict[str, Any]]:
    """Returns the text with the settings at its end, and the record that `take` needs.  Raises ConfigError."""
    text = text or BASE
    lines = tomledit.snippet(settings)
    for header in (line for line in lines.split("\n") if line.startswith("[")):
        if header.replace('"', "'") in text.replace('"', "'"):
            raise ConfigError(
                f"{header} is there already, and it is not Chandler's",
                "take it out, or --handler NAME gives ours another name",
            )
    quoted = tomledit.render(_MARK)[1:-1]
    lines = lines.replace(f'"{quoted}', "").replace(f'{quoted}"', "")
    block = ("" if text.endswith("\n") else "\n") + "\n" + tomledit.COMMENT + lines
    return text + block, {"block": block}


def take(text: str, record: Dict[str, Any]) -> str:
    """Returns the text without our block.  Raises ConfigError when somebody has changed the block."""
    if record["block"] not in text:
        raise ConfigError("what Chandler wrote there was changed since", "take it out by hand")
    return text.replace(record["block"], "", 1)
