"""Kills a container that runs without what it asked for.

NRI has a field for evictions, but containerd 1.7 and 2.1 do not read it.  The kubelet sees that the container has
ended, and starts it again where the pod says so.  This time the plugin is there to serve it.
"""

from __future__ import annotations

import os
import signal

from shim.errors import HostError
from shim.host import kernel


def runs(container: str, pid: int) -> bool:
    """Whether process `pid` exists and is one of the container's: the id is in the path of its control group."""
    try:
        return any(container in path for path in kernel.cgroups_of(pid).values())
    except OSError:
        return False


def kill(container: str, pid: int) -> None:
    """Kills the container's first process, if `pid` still is that.  Raises HostError.

    The pidfd is opened before the check, so that the signal cannot hit another process that has got the number since
    (pidfd_open(2)).  The path of a container's control group contains the container's id.
    """
    if pid <= 1 or len(container) < 16:
        raise HostError(f"container {container} cannot be ended: the runtime has not told its process id")
    try:
        descriptor = os.pidfd_open(pid)
        try:
            if not runs(container, pid):
                raise HostError(f"container {container} cannot be ended: process {pid} is not in its control group")
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        return  # it has ended
    except OSError as error:
        raise HostError(f"container {container} cannot be ended: {error.strerror}") from None
