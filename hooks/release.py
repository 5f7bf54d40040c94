"""release STATE_DIR TOKEN: ends the lease with this token, at poststop.

By the token alone: a container of the same name may be there already, with another one.  Always exit status 0, since a
container must not stay because its lease does; what the hook cannot do, the next create that is short of devices does.
"""

from __future__ import annotations

from hooks import main
from shim import files, host
from shim.errors import ChandlerError
from shim.ledger import Ledger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List


def run(arguments: List[str]) -> int:
    """Exit status 0; what went wrong is said on standard error."""
    try:
        state_dir, token = arguments
        files.check_own_directory(state_dir, host.trusted_owners(host.user_namespace()))
        Ledger(state_dir).release({token})
    except (ChandlerError, ValueError) as error:
        main.say(f"release: {error}")
    except Exception as error:  # a defect of ours must not show as the container's
        main.say(f"release: {type(error).__name__}: {error}")
    return 0
