"""Checks of the state directory, the log file and the leases."""

from __future__ import annotations

import os

from shim import report
from shim.doctor.model import Check, Subject, problem, problem_of
from shim.errors import ChandlerError
from shim.state import stale
from shim.state.ledger import Ledger


def state_directory(subject: Subject) -> Check:
    """Whether state and log can be written, by nobody else."""
    account, config = subject.account, subject.config
    directory = config["state-dir"] or account.state_dir
    problems = []
    try:
        account.trusted_state_dir(config["state-dir"])
        if os.path.lexists(directory) and not account.private(directory):
            problems.append(
                problem(f"{directory} is not a directory of uid {account.euid}", f"chown {account.euid} {directory}")
            )
    except ChandlerError as error:
        problems.append(problem_of(error, "see who can write to it"))
    log = config["log.file"]
    if log not in ("", "journal") and os.path.lexists(log):
        try:
            os.close(report.open_own(log))
        except ChandlerError as error:
            problems.append(
                problem(
                    f"log.file is not written: {error.what}",
                    error.todo or "choose a file in a directory that belongs to root",
                )
            )
        except OSError as error:
            problems.append(problem(f"log.file {log} is not written: {error.strerror}", "see that it can be written"))
    return Check("state", directory or "none", {"path": directory}, problems)


def leases(subject: Subject) -> Check:
    """Which allocator gives out GPUs, and its leases.

    A stale lease is no problem: the next create that needs the device takes the lease back.
    """
    account, config = subject.account, subject.config
    data = {"allocator": config["gpu.allocator"], "held": 0, "stale": 0}
    if data["allocator"] != "leases":
        return Check("leases", f'none are kept (allocator = "{config["gpu.allocator"]}")', data, [])
    try:
        directory = account.trusted_state_dir(config["state-dir"])
    except ChandlerError:
        return Check("leases", "not known, see the state directory", data, [])
    try:
        held = Ledger(directory, account.rootless).read()
    except ChandlerError as error:
        return Check("leases", "not known", {**data, "held": None}, [problem_of(error, "see the state directory")])
    data["held"], data["stale"] = len(held), sum(stale.is_stale(lease) for lease in held)
    text = f"{data['held']} held"
    if data["stale"]:
        text += f", {data['stale']} of them by containers that are gone (`chandler leases release --stale`)"
    return Check("leases", text, data, [])
