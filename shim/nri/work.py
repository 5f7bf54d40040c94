"""Slow work in a process of its own, because the thread that serves a runtime must not wait for a daemon.

It is a process and not a thread because the work forks, takes locks between processes, and must be possible to kill.
`Work` runs this module as a program.  The program reads one task as JSON from standard input, and writes its error as
JSON to standard output.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Optional, TypedDict

from shim import errors, jsontext
from shim.errors import ChandlerError

if TYPE_CHECKING:
    from shim.shapes import Document, SharingConfig
    from shim.sharing.terms import Sharing

LIMIT = 240.0  # seconds: more than the time limits of one set-up together (shim.sharing.nvidia_tools, mps-patience)
_LIBRARY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from shim.nri import work; work.main()"
_MAX_ANSWER = 64 << 10  # bytes


class _Share(TypedDict):
    """A shim.sharing.terms.Sharing."""

    mode: str
    request: Document
    source: str
    uid: int
    devices: list[tuple[str, str]]
    config: SharingConfig


Task = TypedDict("Task", {"state-dir": str, "private": bool, "restore": list[str], "share": Optional[_Share]})


class Work:
    """One task that another process does.

    `error`: why it has failed, once it is `done`.  `until`: the time (time.monotonic) at which it is killed.
    """

    def __init__(self, task: Task) -> None:
        self.error: ChandlerError | None = None
        self.until = time.monotonic() + LIMIT
        self._process: subprocess.Popen[bytes] | None = None
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
        """Whether the task has ended; `error` then is None or why it failed.  Never waits."""
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
        # The process has ended, so the whole answer is in the pipe, and one read gets it.
        answer = os.read(self._process.stdout.fileno(), _MAX_ANSWER)
        self._end(_error(answer, self._process.returncode))
        return True

    def _end(self, error: ChandlerError | None) -> None:
        self.error = error
        if self._process is not None:
            assert self._process.stdout is not None
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
        self._process = None


def _error(answer: bytes, status: int) -> ChandlerError | None:
    """The error in a program's answer; None when there is none.  An answer that cannot be read is an error, too."""
    try:
        document = jsontext.loads(answer)
        if not document:
            return None
        kind = getattr(errors, document["kind"], ChandlerError)
        error: ChandlerError = kind(document["what"], document["todo"])
        return error
    except (ChandlerError, KeyError, TypeError):
        return errors.HostError(
            f"a process of Chandler's own has ended with status {status}", "look at the log of chandler-nri"
        )


def task(state_dir: str, private: bool, keys: list[str], share: Sharing | None = None) -> Task:
    """The task that puts the devices `keys` back as they were before they were shared, and then sets up what `share`
    needs.  `private`: see shim.state.ledger.Ledger."""
    document: Task = {"state-dir": state_dir, "private": private, "restore": keys, "share": None}
    if share is not None:
        config: Any = {key: value for key, value in share.config.items() if key.startswith("gpu.")}
        document["share"] = {
            "mode": share.mode,
            "request": share.request,
            "source": share.source,
            "uid": share.uid,
            "devices": share.devices,
            "config": config,
        }
    return document


def main() -> None:
    """The program: does the task on standard input, and writes its error to standard output, {} for none."""
    answer: dict[str, str] = {}
    try:
        _do(jsontext.loads(sys.stdin.buffer.read()))
    except ChandlerError as error:
        answer = {"kind": type(error).__name__, "what": error.what, "todo": error.todo}
    sys.stdout.buffer.write(jsontext.dumps(answer))


def _do(document: Task) -> None:
    from shim.state.ledger import Ledger

    Ledger(document["state-dir"], document["private"]).restore_gpus(document["restore"])
    if document["share"]:
        from shim.sharing import setup
        from shim.sharing.terms import Sharing

        fields = document["share"]
        share = Sharing(fields["mode"], fields["request"], fields["source"], fields["config"], fields["uid"])
        share.devices = [(key, uuid) for key, uuid in fields["devices"]]
        setup.begin(share, document["state-dir"])
