"""chandler-hook NAME [ARGUMENT...] [-- NAME [ARGUMENT...]]...: one entry for all OCI hooks of Chandler's.

Start-up contract: `python3 -I -S -B -X utf8`; where there is a container, nobody may look into this process before anything
else; the hook's module with all that it needs is imported, and the container's state read from standard input, before
anything of the container's file system is touched; nothing is ever executed.

Each hook bounds what it reads and holds, by limits with names in its module.  Behind them stand two for all: a hook
that takes longer than PATIENCE, or a hook in a container that needs more than MAX_MEMORY, is stopped with a sentence.
Source: OCI runtime specification, "POSIX-platform Hooks" and "State"; prctl(2), setrlimit(2).
"""

from __future__ import annotations

import posix
import sys
from _signal import SIGALRM, alarm, signal  # signal itself, os and json are more than half of a hook's start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, List

RELEASE = "release"  # ends a lease at poststop, when there is no container any more
MPS_READY = "mps-ready"  # asks an MPS daemon at createRuntime, with nothing of the container's
PATIENCE = 20  # seconds, for each hook of a command line
MAX_CPU = 60  # seconds: ends what does not even come back to the interpreter
MAX_MEMORY = 192 << 20  # bytes of the process' own (RLIMIT_DATA)
MAX_STATE = 1 << 20
MAX_CONFIG = 16 << 20


class Late(Exception):
    """The hook took longer than PATIENCE."""


def say(sentence: str) -> None:
    """One line on standard error, which runtimes log."""
    print(f"chandler-hook: {sentence}", file=sys.stderr)


def be_patient() -> None:
    """From now on a hook has PATIENCE seconds, and is then stopped by Late."""
    alarm(PATIENCE)


def _late(*_: Any) -> None:
    raise Late(f"took longer than {PATIENCE} seconds, and was stopped")


def limit() -> Callable[[], None]:
    """Sets the kernel's limits behind those of each hook; an engine may have set lower ones.  The result undoes it."""
    import resource
    before = [(kind, resource.getrlimit(kind)) for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CPU)]
    for (kind, (soft, hard)), wanted in zip(before, (MAX_MEMORY, MAX_CPU)):
        resource.setrlimit(kind, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard))

    def undo() -> None:
        for kind, limits in before:
            resource.setrlimit(kind, limits)

    return undo


def exceeded(error: Exception) -> str:
    """What to say of Late or MemoryError."""
    return str(error) if isinstance(error, Late) else f"needed more than {MAX_MEMORY >> 20} MiB of memory, and was stopped"


def main(argv: List[str]) -> int:
    """`argv`: hooks with their arguments.  The exit status."""
    if argv[:1] != [RELEASE]:
        from hooks import container
        container.hide()
    signal(SIGALRM, _late)
    be_patient()
    posix.umask(0o022)
    try:
        state = sys.stdin.buffer.read(MAX_STATE)  # in any case: crun 1.8 fails when a hook ends before it has read it
        posix.chdir("/")  # engines start hooks in the container's root
        if argv[:1] == [RELEASE]:
            from hooks import release
            return release.run(argv[1:])
        if argv[:1] == [MPS_READY]:
            from hooks import mps_ready
            return mps_ready.run(argv[1:], state)
        limit()  # not for the two above, since what they execute would inherit it
        return container.run(argv, state)
    except (Late, MemoryError) as error:
        say(f"{argv[0] if argv else ''}: {exceeded(error)}")
        return int(argv[:1] != [RELEASE])  # no container stays because its lease does
