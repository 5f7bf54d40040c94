"""mps-ready PIPE_DIR CONTROL: proves at createRuntime, in the host's namespaces, that the MPS daemon still answers.

CUDA that finds no daemon runs without one and does not say so; a container that was to share must then not start.
"""

from __future__ import annotations

from hooks import main
from shim import nvtools
from shim.errors import ChandlerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List


def run(arguments: List[str]) -> int:
    """Exit status 1, with a sentence on standard error, when no answer comes."""
    try:
        pipe_dir, control = arguments
        nvtools.check(control, "mps-control")
        nvtools.percentage(control, pipe_dir)
    except ValueError:
        main.say("mps-ready: wants the daemon's directory and nvidia-cuda-mps-control")
        return 1
    except ChandlerError as error:
        main.say(f"mps-ready: {error}; {nvtools.log_tail(arguments[0].rpartition('/')[0] + '/log')}")
        return 1
    return 0
