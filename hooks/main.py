"""chandler-hook NAME [ARGUMENT...] [-- NAME [ARGUMENT...]]...: the entry point of all Chandler's OCI hooks.

Start-up contract:
- The command line is `python3 -I -S -B -X utf8`.
- Where there is a container, the process first hides itself from other processes.
- The hook's module and everything that it needs is imported, and the container's state is read from standard input,
  before the hook touches the container's file system.
- A hook in a container never executes a program.

Source: OCI runtime specification, "POSIX-platform Hooks" and "State"; prctl(2).
"""

from __future__ import annotations

import posix
import sys
from _signal import SIGALRM, signal  # importing signal, os and json would take more than half of a hook's start

from hooks import bounds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

RELEASE = "release"  # ends a lease at poststop, when the container is gone
MPS_READY = "mps-ready"  # asks an MPS daemon at createRuntime, and touches nothing in the container


def _late(*_: Any) -> None:
    raise bounds.TimeExceeded(f"took longer than {bounds.PATIENCE} seconds, and was stopped")


def main(argv: list[str]) -> int:
    """Runs the hooks of `argv`, with their arguments.  Returns the exit status."""
    if argv[:1] != [RELEASE]:
        from hooks import container

        container.hide()
    signal(SIGALRM, _late)
    bounds.start_timeout()
    posix.umask(0o022)
    try:
        # Every hook reads the state, since crun 1.8 fails when a hook ends before it has read it.
        state = sys.stdin.buffer.read(bounds.MAX_STATE)
        posix.chdir("/")  # engines start hooks in the container's root
        if argv[:1] == [RELEASE]:
            from hooks import release

            return release.run(argv[1:])
        if argv[:1] == [MPS_READY]:
            from hooks import mps_ready

            return mps_ready.run(argv[1:], state)
        bounds.limit()  # not for the two above: the programs that they execute would inherit the limits
        return container.run(argv, state)
    except (bounds.TimeExceeded, MemoryError) as error:
        bounds.say(f"{argv[0] if argv else ''}: {bounds.exceeded(error)}")
        return int(argv[:1] != [RELEASE])  # a lease that cannot be ended must not keep the container
