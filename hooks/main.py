"""chandler-hook NAME [ARGUMENT...] [-- NAME [ARGUMENT...]]...: one entry for all OCI hooks of Chandler's.

Start-up contract: `python3 -I -S -B -X utf8`; where there is a container, nobody may look into this process before
anything else; the hook's module with all that it needs is imported, and the container's state read from standard
input, before anything of the container's file system is touched; nothing is ever executed.

Source: OCI runtime specification, "POSIX-platform Hooks" and "State"; prctl(2).
"""

from __future__ import annotations

import posix
import sys
from _signal import SIGALRM, signal  # signal itself, os and json are more than half of a hook's start

from hooks import bounds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List

RELEASE = "release"  # ends a lease at poststop, when there is no container any more
MPS_READY = "mps-ready"  # asks an MPS daemon at createRuntime, with nothing of the container's


def _late(*_: Any) -> None:
    raise bounds.Late(f"took longer than {bounds.PATIENCE} seconds, and was stopped")


def main(argv: List[str]) -> int:
    """`argv`: hooks with their arguments.  The exit status."""
    if argv[:1] != [RELEASE]:
        from hooks import container

        container.hide()
    signal(SIGALRM, _late)
    bounds.be_patient()
    posix.umask(0o022)
    try:
        state = sys.stdin.buffer.read(
            bounds.MAX_STATE
        )  # in any case: crun 1.8 fails when a hook ends before it has read it
        posix.chdir("/")  # engines start hooks in the container's root
        if argv[:1] == [RELEASE]:
            from hooks import release

            return release.run(argv[1:])
        if argv[:1] == [MPS_READY]:
            from hooks import mps_ready

            return mps_ready.run(argv[1:], state)
        bounds.limit()  # not for the two above, since what they execute would inherit it
        return container.run(argv, state)
    except (bounds.Late, MemoryError) as error:
        bounds.say(f"{argv[0] if argv else ''}: {bounds.exceeded(error)}")
        return int(argv[:1] != [RELEASE])  # no container stays because its lease does
