"""How long a hook may take and how much it may hold, and what is said of one that goes beyond.

Each hook bounds what it reads and holds, by limits with names in its module.  Behind them stand two for all: a hook
that takes longer than PATIENCE, or a hook in a container that needs more than MAX_MEMORY, is stopped with a sentence.
Source: setrlimit(2).
"""

from __future__ import annotations

import sys
from _signal import alarm  # signal itself, os and json are more than half of a hook's start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

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
    return (
        str(error) if isinstance(error, Late) else f"needed more than {MAX_MEMORY >> 20} MiB of memory, and was stopped"
    )
