"""What all hooks inside the container have in common: who may look at them, what they are told, and what they may
fail with."""

from __future__ import annotations

import ctypes
import os
import sys

from hooks.bounds import MAX_CONFIG, Late, be_patient, exceeded, say
from shim import jsontext
from shim.errors import ChandlerError
from shim.host.inroot import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Set

# what config.json calls it: its module
HOOKS = {
    "create-symlinks": "create_symlinks",
    "update-ldcache": "update_ldcache",
    "enable-cuda-compat": "enable_cuda_compat",
    "disable-device-node-modification": "disable_device_node_modification",
}
REQUIRED = ("disable-device-node-modification",)  # without the others a container starts all the same


class Wrong(Exception):
    """Why the hook cannot do its work; the container must not start."""


class Container:
    """The container being made: `root`, its root file system; `config`, its config.json."""

    def __init__(self, root: Root, config: Dict[str, Any]) -> None:
        self.root = root
        self.config = config

    def nodes(self) -> Set[str]:
        """The paths of the device nodes that config.json gives the container."""
        linux = self.config.get("linux")
        devices = linux.get("devices") if isinstance(linux, dict) else None
        return (
            {str(one.get("path")) for one in devices if isinstance(one, dict)} if isinstance(devices, list) else set()
        )

    def mounts_at(self, destination: str) -> List[Dict[str, Any]]:
        """What config.json mounts at a path, in order."""
        mounts = self.config.get("mounts")
        return (
            [one for one in mounts if isinstance(one, dict) and one.get("destination") == destination]
            if isinstance(mounts, list)
            else []
        )


def hide() -> None:
    """From now on nobody may look into this process or open its executable (PR_SET_DUMPABLE, against CVE-2019-5736)."""
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def run(argv: List[str], state: bytes) -> int:
    """`argv`: hooks with their arguments, done in order.  The exit status; a failure is one sentence on standard error.

    One that goes beyond the limits of main is stopped; unless it is REQUIRED the container starts without its work.
    """
    name = ""
    try:
        work = []
        for name, *words in _calls(argv):
            if name not in HOOKS:
                raise Wrong(f"no such hook; known are {', '.join(HOOKS)}")
            __import__("hooks." + HOOKS[name])
            module = sys.modules["hooks." + HOOKS[name]]
            work.append((name, module, module.parse(words)))
        made = _container(state)
        for step, module, arguments in work:
            name = step
            be_patient()
            try:
                status: int = module.run(made, arguments)
            except (Late, MemoryError) as error:
                say(f"{name}: {exceeded(error)}")
                status = int(name in REQUIRED)
            if status:
                return status
        return 0
    except Wrong as error:
        say(f"{name}: {error}")
    except OSError as error:
        say(f"{name}: {error.filename or ''}: {error.strerror}")
    return 1


def _container(state: bytes) -> Container:
    """The container that the state on standard input tells of.  Raises Wrong."""
    try:
        bundle = jsontext.loads(state)["bundle"]
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            config = jsontext.loads(file.read(MAX_CONFIG))
        path = os.path.join(bundle, config["root"]["path"])
        if not os.path.isabs(path):
            raise ValueError
        return Container(Root(path), config)
    except (ChandlerError, ValueError, KeyError, TypeError) as error:
        raise Wrong(
            f"the runtime's state or the bundle's config.json does not say where the container is ({error})"
        ) from None
    except OSError as error:
        raise Wrong(f"{error.filename}: {error.strerror}") from None


def _calls(argv: List[str]) -> List[List[str]]:
    """The words between the `--`, the first of each a hook's name."""
    calls: List[List[str]] = [[]]
    for word in argv:
        if word == "--":
            calls.append([])
        else:
            calls[-1].append(word)
    return [call or [""] for call in calls]
