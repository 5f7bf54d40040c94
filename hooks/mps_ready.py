"""mps-ready PIPE_DIR CONTROL [UID]: proves at createRuntime, in the host's namespaces, that the MPS daemon still
answers.

CUDA that finds no daemon runs without one and does not say so; a container that was to share must then not start.
UID: whom the daemon was chosen for by an NRI plugin, which is not told who the container's user is; config.json tells.
"""

from __future__ import annotations

import os

from hooks import bounds
from shim import jsontext
from shim.errors import ChandlerError
from shim.oci import reader
from shim.sharing import nvidia_tools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List


def run(arguments: List[str], state: bytes) -> int:
    """Exit status 1, with a sentence on standard error, when no answer comes, or the container is another user's."""
    try:
        pipe_dir, control, *user = arguments
        if len(user) > 1:
            raise ValueError
        uid = _uid(state) if user else 0
        if user and uid != int(user[0]):
            bounds.say(
                f"mps-ready: the container runs as uid {uid}, which this runtime does not tell NRI plugins; the MPS daemon "
                f"was chosen for uid {user[0]}, and serves one user; start the pod with the runtime handler of chandler-runtime"
            )
            return 1
        nvidia_tools.check(control, "mps-control")
        nvidia_tools.percentage(control, pipe_dir)
    except ValueError:
        bounds.say("mps-ready: wants the daemon's directory and nvidia-cuda-mps-control, and perhaps a uid")
        return 1
    except ChandlerError as error:
        bounds.say(f"mps-ready: {error}; {nvidia_tools.log_tail(arguments[0].rpartition('/')[0] + '/log')}")
        return 1
    return 0


def _uid(state: bytes) -> int:
    """The user of the container that the state on standard input tells of.  Raises ValueError."""
    unlimit = bounds.limit()
    try:
        with open(os.path.join(jsontext.loads(state)["bundle"], "config.json"), "rb") as file:
            return reader.process_user(jsontext.loads(file.read(bounds.MAX_CONFIG)))["uid"]
    except (ChandlerError, OSError, KeyError, TypeError):
        raise ValueError from None
    finally:
        unlimit()
