"""Ends a container that must not run on: NRI's own eviction is a field that containerd 1.7 and 2.1 never read.

The kubelet then sees a container that has ended, and starts it again where the pod says so, this time with us there.
"""

from __future__ import annotations

import os
import signal

from shim.errors import HostError
from shim.host import kernel


def runs(container: str, pid: int) -> bool:
    """Whether process `pid` is there and one of the container's."""
    try:
        return any(container in path for path in kernel.cgroups_of(pid).values())
    except OSError:
        return False


def end(container: str, pid: int) -> None:
    """Kills the container's first process, if `pid` still is that.  Raises HostError.

    The descriptor holds on to the process, so that none which has got the number since can be hit (pidfd_open(2));
    the control groups of a container's processes have its id in their names.
    """
    if pid <= 1 or len(container) < 16:
        raise HostError(f"container {container} cannot be ended: the runtime does not tell its process")
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
