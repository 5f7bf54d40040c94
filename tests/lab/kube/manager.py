"""Process 1 of a cluster's machine: a service manager that does what `systemctl` asks, as systemd does on a real node.

    manager.py DIRECTORY

DIRECTORY has services.json, an object of name to {"command": [...], "environment": {...}}, and two pipes: the script
`systemctl` writes its words to `asked`, and reads its exit status and output from `answer`. A service that was started
and ends by itself starts again. Only its first process gets signals, so containers outlive their engine (as with
KillMode=process in containerd's unit). Its output goes to DIRECTORY/NAME.log.

It uses the standard library only, and imports nothing later on: the machine may lose its Python after the start.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

PAUSE = 0.5  # seconds before a service that ended by itself starts again, and at most between two looks at them
PATIENCE = 5.0  # seconds for a caller to open the pipe with its answer


class Manager:
    def __init__(self, directory: str) -> None:
        self.directory = directory
        with open(f"{directory}/services.json", encoding="utf-8") as file:
            self.services = json.load(file)
        self.pids: dict[str, int] = {}
        self.ended: dict[str, float] = {}  # services that shall run and do not, with the time of their end

    def start(self, name: str) -> None:
        self.ended.pop(name, None)
        if name in self.pids:
            return
        service, write = self.services[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.pids[name] = os.posix_spawn(
            service["command"][0],
            service["command"],
            service["environment"],
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, f"{self.directory}/{name}.log", write, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        self.ended.pop(name, None)
        pid = self.pids.pop(name, 0)
        if pid:
            os.kill(pid, number)
            os.waitpid(pid, 0)

    def reap(self) -> None:
        """Take the ends of services, and of containers' processes that nobody else waits for."""
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                for name in [name for name, running in self.pids.items() if running == pid]:
                    del self.pids[name]
                    self.ended[name] = time.monotonic()

    def restart_ended(self) -> None:
        for name in [name for name, when in self.ended.items() if time.monotonic() >= when + PAUSE]:
            self.start(name)

    def do(self, words: list[str]) -> tuple[int, str]:
        """What `systemctl WORDS` does: its exit status and output."""
        verb = next((word for word in words if not word.startswith("-")), "")
        names = [word.removesuffix(".service") for word in words if not word.startswith("-") and word != verb]
        if verb not in ("start", "stop", "restart", "kill", "is-active", "show"):
            return 1, f"the test's systemctl cannot do this: {' '.join(words)}\n"
        if unknown := [name for name in names if name not in self.services]:
            return 5, f"Unit {unknown[0]}.service could not be found.\n"
        for name in names:
            if verb in ("stop", "restart"):
                self.stop(name)
            if verb in ("start", "restart"):
                self.start(name)
            if verb == "kill" and name in self.pids:  # which starts it again, as after any end that was not asked for
                os.kill(self.pids[name], signal.SIGKILL)
        if verb == "is-active":
            return (0, "active\n") if all(name in self.pids for name in names) else (3, "inactive\n")
        return 0, "".join(f"{self.pids.get(name, 0)}\n" for name in names) if verb == "show" else ""

    def answer(self, status: int, output: str) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            with contextlib.suppress(OSError):  # until the caller has opened it; one that was killed never does
                pipe = os.open(f"{self.directory}/answer", os.O_WRONLY | os.O_NONBLOCK)
                os.write(pipe, f"{status}\n{output}".encode())
                os.close(pipe)
                return
            time.sleep(0.01)

    def run(self) -> None:
        wakes, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        asked = os.open(f"{self.directory}/asked", os.O_RDWR)  # for writing, too: then it has no end
        print("ready", flush=True)
        while True:
            readable = select.select([wakes, asked], [], [], PAUSE)[0]
            if wakes in readable:
                os.read(wakes, 4096)
            self.reap()
            self.restart_ended()
            if asked in readable:
                self.answer(*self.do(os.read(asked, 4096).decode().split()))


if __name__ == "__main__":
    Manager(sys.argv[1]).run()
