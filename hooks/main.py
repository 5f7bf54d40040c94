"""chandler-hook NAME [ARGUMENT...]: one entry for all OCI hooks that Chandler puts into a config.json.

Start-up contract: `python3 -I -S -B`; nobody may look into this process (PR_SET_DUMPABLE, against CVE-2019-5736) before
anything else; the hook's module with all that it needs is imported, and the container's state read from standard input,
before anything of the container's file system is touched; nothing is ever executed.  A hook that hangs is killed.
Source: OCI runtime specification, "POSIX-platform Hooks" and "State"; prctl(2).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys

from hooks.inroot import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List

# what config.json calls it: its module
HOOKS = {
    "create-symlinks": "create_symlinks",
    "update-ldcache": "update_ldcache",
    "disable-device-node-modification": "disable_device_node_modification",
}
PATIENCE = 20  # seconds
MAX_STATE = 1 << 20
MAX_CONFIG = 16 << 20


class Wrong(Exception):
    """Why the hook cannot do its work; the container must not start."""


class Container:
    """The container being made: `root`, its root file system; `config`, its config.json."""

    def __init__(self, root: Root, config: Dict[str, Any]) -> None:
        self.root = root
        self.config = config

    def mounts_at(self, destination: str) -> List[Dict[str, Any]]:
        """What config.json mounts at a path, in order."""
        mounts = self.config.get("mounts")
        return [one for one in mounts if isinstance(one, dict) and one.get("destination") == destination] if isinstance(mounts, list) else []


def say(sentence: str) -> None:
    """One line on standard error, which runtimes log."""
    print(f"chandler-hook: {sentence}", file=sys.stderr)


def container(state: bytes) -> Container:
    """The container that the state on standard input tells of.  Raises Wrong."""
    try:
        bundle = json.loads(state)["bundle"]
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            config = json.loads(file.read(MAX_CONFIG))
        path = os.path.join(bundle, config["root"]["path"])
        if not os.path.isabs(path):
            raise ValueError
        return Container(Root(path), config)
    except (ValueError, KeyError, TypeError) as error:
        raise Wrong(f"the runtime's state or the bundle's config.json does not say where the container is ({error})") from None
    except OSError as error:
        raise Wrong(f"{error.filename}: {error.strerror}") from None


def main(argv: List[str]) -> int:
    """`argv`: the hook's name and its arguments.  The exit status; every failure is one sentence on standard error."""
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    signal.alarm(PATIENCE)
    os.umask(0o022)
    name = argv[0] if argv else ""
    if name not in HOOKS:
        say(f"unknown hook {name!r}; known are {', '.join(HOOKS)}")
        return 1
    module = importlib.import_module("hooks." + HOOKS[name])
    try:
        arguments = module.parse(argv[1:])
        state = sys.stdin.buffer.read(MAX_STATE)
        os.chdir("/")  # engines start hooks in the container's root
        status: int = module.run(container(state), arguments)
        return status
    except Wrong as error:
        say(f"{name}: {error}")
    except OSError as error:
        say(f"{name}: {error.filename or ''}: {error.strerror}")
    return 1
