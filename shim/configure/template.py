"""A template that some program fills in, such as k3s' of containerd's file: a block at its end, and nothing else.

It is no TOML yet, so nothing in it can be looked up.  Pure.
"""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

from shim.configure import tomledit
from shim.configure.model import Setting
from shim.errors import ConfigError

BASE = '{{ template "base" . }}\n'  # all that k3s and rke2 would write without a template
_MARK = "\x00"


def raw(text: str) -> str:
    """A value that goes into the template as it is."""
    return f"{_MARK}{text}{_MARK}"


def put(text: str, settings: List[Setting]) -> Tuple[str, Dict[str, Any]]:
    """The text with the settings at its end.  Raises ConfigError."""
    text = text or BASE
    lines = tomledit.snippet(settings)
    for header in (line for line in lines.split("\n") if line.startswith("[")):
        if header.replace('"', "'") in text.replace('"', "'"):
            raise ConfigError(f"{header} is there already, and it is not Chandler's", "take it out, or --handler NAME gives ours another name")
    quoted = tomledit.render(_MARK)[1:-1]
    lines = lines.replace(f'"{quoted}', "").replace(f'{quoted}"', "")
    block = ("" if text.endswith("\n") else "\n") + "\n" + tomledit.COMMENT + lines
    return text + block, {"block": block}


def take(text: str, record: Dict[str, Any]) -> str:
    """The text without the block.  Raises ConfigError when somebody has changed it."""
    if record["block"] not in text:
        raise ConfigError("what Chandler wrote there was changed since", "take it out by hand")
    text = text.replace(record["block"], "", 1)
    return text
