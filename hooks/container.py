"""What all hooks that work on a container's file system share: hiding the process, reading the state, running them."""

from __future__ import annotations

import ctypes
import os
import sys

from hooks.bounds import MAX_CONFIG, TimeExceeded, exceeded, say, start_timeout
from shim import jsontext
from shim.errors import ChandlerError
from shim.host.inroot import Root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.shapes import Document

# name of the hook in config.json -> its module
HOOKS = {
    "create-symlinks": "create_symlinks",
    "update-ldcache": "update_ldcache",
    "enable-cuda-compat": "enable_cuda_compat",
    "disable-device-node-modification": "disable_device_node_modification",
}
REQUIRED = ("disable-device-node-modification",)  # the container starts even when one of the others is stopped


class HookError(Exception):
    """The hook cannot do its work, and the container must not start.  The text says why."""


class Container:
    """The container that is being created: `root`, its root file system; `config`, the decoded config.json."""

    def __init__(self, root: Root, config: Document) -> None:
        self.root = root
        self.config = config

    def nodes(self) -> set[str]:
        """The paths of the device nodes that config.json gives the container."""
        linux = self.config.get("linux")
        devices = linux.get("devices") if isinstance(linux, dict) else None
        if not isinstance(devices, list):
            return set()
        return {str(device.get("path")) for device in devices if isinstance(device, dict)}

    def mounts_at(self, destination: str) -> list[Document]:
        """The mounts of config.json whose destination is exactly `destination`, in order."""
        mounts = self.config.get("mounts")
        if not isinstance(mounts, list):
            return []
        return [mount for mount in mounts if isinstance(mount, dict) and mount.get("destination") == destination]


def hide() -> None:
    """Stops others from tracing this process or opening its executable (PR_SET_DUMPABLE, against CVE-2019-5736)."""
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def run(argv: list[str], state: bytes) -> int:
    """Runs the hooks of `argv` in order and returns the exit status.  A failure prints one sentence on standard error.

    `argv`: hooks with their arguments, separated by `--`; `state`: what the runtime wrote to standard input.  All
    modules are imported and all arguments parsed before the first hook runs.  A hook that exceeds the limits of
    hooks.bounds is stopped; unless it is one of REQUIRED, the container starts all the same.
    """
    name = ""
    try:
        steps = []
        for name, *words in _calls(argv):
            if name not in HOOKS:
                raise HookError(f"no such hook; known are {', '.join(HOOKS)}")
            __import__("hooks." + HOOKS[name])
            module = sys.modules["hooks." + HOOKS[name]]
            steps.append((name, module, module.parse(words)))
        container = _container(state)
        for step, module, arguments in steps:
            name = step  # for the messages below
            start_timeout()
            try:
                status: int = module.run(container, arguments)
            except (TimeExceeded, MemoryError) as error:
                say(f"{name}: {exceeded(error)}")
                status = int(name in REQUIRED)
            if status:
                return status
        return 0
    except HookError as error:
        say(f"{name}: {error}")
    except OSError as error:
        say(f"{name}: {error.filename or ''}: {error.strerror}")
    return 1


def _container(state: bytes) -> Container:
    """The container of a runtime's state (OCI runtime specification, "State").  Raises HookError."""
    try:
        bundle = jsontext.loads(state)["bundle"]
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            config = jsontext.loads(file.read(MAX_CONFIG))
        path = os.path.join(bundle, config["root"]["path"])
        if not os.path.isabs(path):
            raise ValueError
        return Container(Root(path), config)
    except (ChandlerError, ValueError, KeyError, TypeError) as error:
        raise HookError(
            f"the runtime's state or the bundle's config.json does not say where the container is ({error})"
        ) from None
    except OSError as error:
        raise HookError(f"{error.filename}: {error.strerror}") from None


def _calls(argv: list[str]) -> list[list[str]]:
    """The words of each hook, which `--` separates; the first word is the hook's name, '' where there is none."""
    calls: list[list[str]] = [[]]
    for word in argv:
        if word == "--":
            calls.append([])
        else:
            calls[-1].append(word)
    return [call or [""] for call in calls]
