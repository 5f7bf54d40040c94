"""release STATE_DIR TOKEN: ends the lease with this token, and removes the container's grant record, at poststop.

By the token alone: a container of the same name may be there already, with another one.  A container may leave
processes behind (killed ones that wait for a device, or those of a container without a PID namespace of its own):
while one is there the lease stays.  Always exit status 0, since a container must not stay because its lease does;
what the hook cannot do, the next create that is short of devices does.
"""

from __future__ import annotations

import time

from hooks import bounds
from shim.errors import ChandlerError
from shim.host import trust, userns
from shim.state import liveness
from shim.state.ledger import Ledger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List

PATIENCE = 8.0  # seconds for processes that have been killed, on a machine that is busy
_PAUSE = 0.02


def run(arguments: List[str]) -> int:
    """Exit status 0; what went wrong is said on standard error."""
    try:
        state_dir, token = arguments
        trust.check_own_directory(state_dir, userns.trusted_owners(userns.user_namespace()))
        _release(Ledger(state_dir), token)
    except (ChandlerError, ValueError) as error:
        bounds.say(f"release: {error}")
    except Exception as error:  # a defect of ours must not show as the container's
        bounds.say(f"release: {type(error).__name__}: {error}")
    return 0


def _release(kept: Ledger, token: str) -> None:
    lease = next((lease for lease in kept.read() if lease["token"] == token), None)
    if lease is None:
        return
    until = time.monotonic() + PATIENCE
    while liveness.in_use(lease):
        if time.monotonic() > until:
            bounds.say(
                f"release: {lease['id']} keeps its lease of {', '.join(lease['names'])}: processes in its control group have not "
                "ended, or cannot be seen from here"
            )
            return
        time.sleep(_PAUSE)
    kept.forget(lease)
    kept.release({token})
