"""Limits on the time and memory of hooks, and the messages for hooks that exceed them.

Each hook limits what it reads and keeps, by constants in its own module.  Two limits apply to all hooks as well: a hook
that takes longer than PATIENCE is stopped, and so is a hook inside a container that needs more than MAX_MEMORY.  Either
prints one sentence.
Source: setrlimit(2).
"""

from __future__ import annotations

import sys
from _signal import alarm  # importing signal, os and json would take more than half of a hook's start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable

PATIENCE = 20  # seconds, for each hook of a command line
MAX_CPU = 60  # seconds of processor time: ends a hook that is busy in C code, where SIGALRM cannot raise TimeExceeded
MAX_MEMORY = 192 << 20  # bytes of the process's own data (RLIMIT_DATA)
MAX_STATE = 1 << 20  # bytes of the container's state on standard input
MAX_CONFIG = 16 << 20  # bytes of config.json


class TimeExceeded(Exception):
    """The hook took longer than PATIENCE."""


def say(sentence: str) -> None:
    """Prints one line on standard error, which runtimes log."""
    print(f"chandler-hook: {sentence}", file=sys.stderr)


def start_timeout() -> None:
    """Gives the hook PATIENCE seconds from now on; after them SIGALRM raises TimeExceeded (hooks.main)."""
    alarm(PATIENCE)


def limit() -> Callable[[], None]:
    """Sets the kernel's limits on memory and processor time, unless an engine has set lower ones.

    Returns a function that restores the limits from before.
    """
    import resource

    before = [(kind, resource.getrlimit(kind)) for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CPU)]
    for (kind, (soft, hard)), wanted in zip(before, (MAX_MEMORY, MAX_CPU)):
        resource.setrlimit(kind, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard))

    def undo() -> None:
        for kind, limits in before:
            resource.setrlimit(kind, limits)

    return undo


def exceeded(error: Exception) -> str:
    """The message for TimeExceeded or MemoryError."""
    return (
        str(error)
        if isinstance(error, TimeExceeded)
        else f"needed more than {MAX_MEMORY >> 20} MiB of memory, or than the engine's limit, and was stopped"
    )
