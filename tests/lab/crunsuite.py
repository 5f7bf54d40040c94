"""crun's own tests of the command line, with any program in crun's place.

    PYTHONPATH=tests python3 tests/lab/crunsuite.py PROGRAM DIRECTORY

prints their verdicts. Two runs must not overlap: cases use fixed names on the host, and few of them wait for what they
check. One after the other, every case gives the same verdict each time, even on a busy machine.
"""

from __future__ import annotations

import contextlib
import glob
import os
import pty
import re
import signal
import subprocess
import sys
import threading

from lab import cgroups, runtimes

HERE = os.path.dirname(os.path.abspath(__file__))
PLACE = os.path.join(runtimes.CACHE, "crun-suite")
SUITE = os.path.join(PLACE, "source/tests")
HELPER = os.path.join(SUITE, "init")
# The crun that the tests belong to, and one that sees only version 2 of control groups.
CRUNS = (
    runtimes.named("crun")._replace(label="crun-of-the-suite", path=os.path.join(PLACE, "bin/crun")),
    runtimes.named("crun-on-v2" if cgroups.mode() != "unified" else "newer-crun"),
)
# This case waits half a minute for a message that never comes. It shares nothing with other cases.
WAITS = ("test_start.py", "sd-notify-proxy")
# A case of this file freezes a container in this group of the host. It fails where it has to make the group itself: a
# frozen process does not die, so the case cannot remove the group.
FREEZES, FROZEN = "test_delete.py", f"{cgroups.SYSFS}/freezer/frozen"

Results = dict[str, str]


def missing(crun: runtimes.Runtime) -> str:
    return crun.missing or ("" if os.path.exists(HELPER) else "not installed: crun's tests")


def files() -> dict[str, list[str]]:
    """The files of the suite and the cases of each."""
    found = {}
    for path in sorted(glob.glob(os.path.join(SUITE, "test_*.py"))):
        with open(path, encoding="utf-8") as file:
            found[os.path.basename(path)] = re.findall(
                r'^    "([^"]+)" *:', file.read().partition("\nall_tests = {")[2], re.MULTILINE
            )
    return found


def run(crun: runtimes.Runtime, program: str, directory: str) -> Results:
    """Case to "ok", "not ok" or "skip", except the case that waits. `crun`: the runtime behind `program`."""
    results: Results = {}
    for file, cases in files().items():
        results.update(run_file(crun, program, directory, file, [case for case in cases if (file, case) != WAITS]))
    return results


def run_waiting(crun: runtimes.Runtime, program: str, directory: str) -> Results:
    """Run the case that waits; other cases may run at the same time."""
    return run_file(crun, program, directory, WAITS[0], [WAITS[1]])


def run_file(crun: runtimes.Runtime, program: str, directory: str, file: str, cases: list[str]) -> Results:
    for name in ("tests", "tmp"):
        os.makedirs(os.path.join(directory, name), exist_ok=True)
    if not os.path.exists(os.path.join(directory, "tests/init")):
        os.symlink(HELPER, os.path.join(directory, "tests/init"))  # some cases look for it here
    if file == FREEZES and os.path.isdir(os.path.dirname(FROZEN)):
        os.makedirs(FROZEN, exist_ok=True)
    env = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "OCI_RUNTIME": program,
        "INIT": HELPER,
        "HOME": "/root",
        "TMPDIR": os.path.join(directory, "tmp"),
        "PYTHONPATH": os.path.join(HERE, "standins"),
        "RUN_TESTS": " ".join(cases),
    }
    # A terminal for the cases that test terminals, else a pipe. With /dev/null as standard input and a user namespace,
    # crun would change the owner of the host's /dev/null.
    terminal = file == "test_tty.py"
    ours, theirs = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [*crun.wrap, "/usr/bin/python3", "-B", os.path.join(SUITE, file)],
        cwd=directory,
        env=env,
        stdin=theirs if terminal else subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs)
    output: list[bytes] = []
    reader = threading.Thread(target=drain, args=(ours, output))
    reader.start()
    try:
        process.wait(120)
    finally:
        # The helper asks the kernel for a mount's mapping through a child that may outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin:
            process.stdin.close()
        cgroups.end(directory)  # what a case left behind, perhaps frozen
        if file == FREEZES:
            cgroups.remove({FROZEN})
        reader.join()
        os.close(ours)
    text = b"".join(output).decode(errors="replace")
    return {
        f"{file}::{name}": "skip" if skip else verdict
        for verdict, name, skip in re.findall(r"^(ok|not ok) \d+ - (\S+)( #SKIP)?", text, re.MULTILINE)
    }


def sweep() -> None:
    """Remove the groups that cases leave behind. No case may be running."""
    cgroups.sweep("test-tmp")


def drain(end: int, output: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # EIO: the last user of the terminal has gone
        while data := os.read(end, 65536):
            output.append(data)


def counts(results: Results) -> str:
    given = list(results.values())
    return f"{len(given)} cases, " + ", ".join(
        f"{given.count(verdict)} {verdict}" for verdict in ("ok", "not ok", "skip")
    )


if __name__ == "__main__":
    for name, verdict in (done := run(CRUNS[0], *sys.argv[1:3])).items():
        print(verdict, name, sep="\t")
    print(counts(done), file=sys.stderr)
