"""mps-ready PIPE_DIR CONTROL [UID]: checks at createRuntime, in the host's namespaces, that an MPS daemon answers.

When CUDA finds no daemon, it runs without MPS and does not report that.  So a container that is to share its GPU
through MPS must not start then.  PIPE_DIR: the daemon's pipe directory; CONTROL: the path of nvidia-cuda-mps-control.
UID: the user for whom an NRI plugin has chosen the daemon.  Some runtimes do not tell NRI plugins the container's user,
so the hook compares it with the one in config.json.
"""

from __future__ import annotations

import os

from hooks import bounds
from shim import jsontext
from shim.errors import ChandlerError
from shim.oci import reader
from shim.sharing import nvidia_tools


def run(arguments: list[str], state: bytes) -> int:
    """Returns 1, after a sentence on standard error, when no daemon answers or the container's user is not UID."""
    try:
        pipe_dir, control, *user = arguments
        if len(user) > 1:
            raise ValueError
        uid = _uid(state) if user else 0
        if user and uid != int(user[0]):
            bounds.say(
                f"mps-ready: the container runs as uid {uid}, but its MPS daemon, which serves one user, was "
                f"chosen for uid {user[0]}: this container runtime does not tell NRI plugins a container's user; start "
                "the pod with the runtime handler of chandler-runtime"
            )
            return 1
        nvidia_tools.check(control, "mps-control")
        nvidia_tools.percentage(control, pipe_dir)
    except ValueError:
        bounds.say("mps-ready: the arguments are PIPE_DIR CONTROL [UID]")
        return 1
    except ChandlerError as error:
        bounds.say(f"mps-ready: {error}; {nvidia_tools.log_tail(arguments[0].rpartition('/')[0] + '/log')}")
        return 1
    return 0


def _uid(state: bytes) -> int:
    """The uid of the process of the state's container, from config.json.  Raises ValueError."""
    restore_limits = bounds.limit()
    try:
        with open(os.path.join(jsontext.loads(state)["bundle"], "config.json"), "rb") as file:
            return reader.process_user(jsontext.loads(file.read(bounds.MAX_CONFIG)))["uid"]
    except (ChandlerError, OSError, KeyError, TypeError):
        raise ValueError from None
    finally:
        restore_limits()
