"""release STATE_DIR TOKEN: ends the lease with this token, and removes the container's grant record, at poststop.

The token alone decides, since a container of the same name may exist again already, with another token.
A container may leave processes behind: killed ones that wait for a device, or those of a container without its own PID
namespace.  While one of them exists, the lease stays.
The exit status is always 0, since a lease that cannot be ended must not keep the container.  The next create that lacks
free devices ends such a lease.
"""

from __future__ import annotations

import time

from hooks import bounds
from shim.errors import ChandlerError
from shim.host import trust, userns
from shim.state import liveness
from shim.state.ledger import Ledger

PATIENCE = 8.0  # seconds in which killed processes must end, enough on a busy machine
_PAUSE = 0.02  # seconds between two looks at the processes


def run(arguments: list[str]) -> int:
    """Ends the lease.  Always returns 0; errors go to standard error."""
    try:
        state_dir, token = arguments
        trust.check_own_directory(state_dir, userns.trusted_owners(userns.user_namespace()))
        _release(Ledger(state_dir), token)
    except (ChandlerError, ValueError) as error:
        bounds.say(f"release: {error}")
    except Exception as error:  # a defect of Chandler must not fail the container
        bounds.say(f"release: {type(error).__name__}: {error}")
    return 0


def _release(ledger: Ledger, token: str) -> None:
    lease = next((lease for lease in ledger.read() if lease["token"] == token), None)
    if lease is None:
        return
    deadline = time.monotonic() + PATIENCE
    while liveness.in_use(lease):
        if time.monotonic() > deadline:
            bounds.say(
                f"release: {lease['id']} keeps its lease of {', '.join(lease['names'])}: processes in its control "
                "group have not ended, or cannot be seen from here"
            )
            return
        time.sleep(_PAUSE)
    ledger.forget(lease)
    ledger.release({token})
