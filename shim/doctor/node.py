"""Checks of the node: its configuration, who runs doctor, the CDI files."""

from __future__ import annotations

from shim.bundle import rootless
from shim.bundle.build import names_of_user
from shim.doctor.model import Check, Subject, problem, problem_of


def configuration(subject: Subject) -> Check:
    """Whether the configuration can be used."""
    path, error = subject.account.config_path, subject.config_error
    if error is None:
        return Check("configuration", path, {"path": path, "valid": True}, [])
    problems = [problem_of(error, "correct the file that is named")]
    return Check("configuration", f"{path}, which cannot be used", {"path": path, "valid": False}, problems)


def caller(subject: Subject) -> Check:
    """Root, or a user with ranges of ids."""
    host, account = subject.host, subject.account
    if not account.rootless:
        return Check("caller", "root", {"uid": account.euid, "rootless": False}, [])
    problems = []
    ranges = 0
    if account.euid:
        for file in ("/etc/subuid", "/etc/subgid"):
            count = len(rootless.ranges(host.read(file), names_of_user(account.euid)))
            ranges += count
            if not count:
                problems.append(
                    problem(
                        f"uid {account.euid} has no range in {file}, so each of its containers has only one id",
                        f"usermod --add-sub{file[-3:]}s 100000-165535 USER",
                    )
                )
        for program in ("newuidmap", "newgidmap"):
            if not host.program(program):
                problems.append(
                    problem(f"{program} is not installed, so ranges cannot be used", "install uidmap (or shadow-utils)")
                )
    return Check(
        "caller", f"uid {account.euid}, rootless", {"uid": account.euid, "rootless": True, "ranges": ranges}, problems
    )


def cdi_files(subject: Subject) -> Check:
    """The CDI files, the devices that they name, and the files that are wrong."""
    directories, count = subject.config["cdi.spec-dirs"], len(subject.cdi.files)
    problems = [
        problem_of(error if path in error.what else error.within(path), f"correct {path}, or move it away")
        for path, errors in subject.cdi.problems.items()
        for error in errors
    ]
    if subject.config_error is not None:
        return Check("cdi", "not known, see the configuration", {"directories": [], "files": 0, "devices": {}}, [])
    if subject.cdi_error is not None:
        problems = [problem_of(subject.cdi_error, "see cdi.spec-dirs in the configuration")]
    text = f"{count} file{'' if count == 1 else 's'} in {', '.join(directories)}"
    text += "".join(f", {number} names of {kind}" for kind, number in subject.kinds.items())
    return Check("cdi", text, {"directories": directories, "files": count, "devices": subject.kinds}, problems)
