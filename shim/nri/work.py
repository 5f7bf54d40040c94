"""Work that may take its time, in a process of its own: whoever serves a runtime must not wait for a daemon.

A process and not a thread: what is done there forks, holds locks among processes, and can be ended.  `start` runs
this module again as a program that takes one task as JSON on its standard input and says on its standard output
what went wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Dict, Optional

from shim import errors, jsontext
from shim.errors import ChandlerError

if TYPE_CHECKING:
    from shim.sharing.terms import Sharing

LIMIT = 240.0  # seconds: more than all bounds of one set-up together (shim.sharing.nvidia_tools, mps-patience)
_LIBRARY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from shim.nri import work; work.main()"
_MAX_ANSWER = 64 << 10


class Work:
    """One task on its way."""

    def __init__(self, task: Dict[str, Any]) -> None:
        self.error: Optional[ChandlerError] = None
        self.until = time.monotonic() + LIMIT
        self._process: Optional[subprocess.Popen[bytes]] = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", _PROGRAM, _LIBRARY],
                cwd="/",
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            assert self._process.stdin is not None
            with self._process.stdin as pipe:
                pipe.write(jsontext.dumps(task))
        except OSError as error:
            self._end(errors.HostError(f"a process of Chandler's own cannot be started: {error.strerror}"))

    @property
    def done(self) -> bool:
        """Whether it has ended; `error` then says whether it has failed.  Never waits."""
        if self._process is None:
            return True
        if self._process.poll() is None:
            if time.monotonic() < self.until:
                return False
            self._end(
                errors.HostError(f"it has not ended within {LIMIT:.0f} seconds", "look at the log of chandler-nri")
            )
            return True
        assert self._process.stdout is not None
        answer = os.read(self._process.stdout.fileno(), _MAX_ANSWER)  # all of it lies in the pipe
        self._end(_error(answer, self._process.returncode))
        return True

    def _end(self, error: Optional[ChandlerError]) -> None:
        self.error = error
        if self._process is not None:
            assert self._process.stdout is not None
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
        self._process = None


def _error(answer: bytes, status: int) -> Optional[ChandlerError]:
    try:
        found = jsontext.loads(answer)
        if not found:
            return None
        kind = getattr(errors, found["kind"], ChandlerError)
        made: ChandlerError = kind(found["what"], found["todo"])
        return made
    except (ChandlerError, KeyError, TypeError):
        return errors.HostError(
            f"a process of Chandler's own has ended with status {status}", "look at the log of chandler-nri"
        )


def task(state_dir: str, private: bool, keys: list[str], share: Optional[Sharing] = None) -> Dict[str, Any]:
    """Ends what others left on the devices `keys`, then sets up what `share` needs."""
    made: Dict[str, Any] = {"state-dir": state_dir, "private": private, "settle": keys, "share": None}
    if share is not None:
        made["share"] = {
            "mode": share.mode,
            "wish": share.wish,
            "source": share.source,
            "uid": share.uid,
            "devices": share.devices,
            "config": {key: value for key, value in share.config.items() if key.startswith("gpu.")},
        }
    return made


def main() -> None:
    """The program."""
    answer: Dict[str, str] = {}
    try:
        _do(jsontext.loads(sys.stdin.buffer.read()))
    except ChandlerError as error:
        answer = {"kind": type(error).__name__, "what": error.what, "todo": error.todo}
    sys.stdout.buffer.write(jsontext.dumps(answer))


def _do(told: Dict[str, Any]) -> None:
    from shim.state.ledger import Ledger

    Ledger(told["state-dir"], told["private"]).settle(told["settle"])
    if told["share"]:
        from shim.sharing import setup
        from shim.sharing.terms import Sharing

        one = told["share"]
        share = Sharing(one["mode"], one["wish"], one["source"], one["config"], one["uid"])
        share.devices = [(key, uuid) for key, uuid in one["devices"]]
        setup.begin(share, told["state-dir"])
