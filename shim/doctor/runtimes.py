"""Check of the OCI runtimes: their versions, known defects and owners."""

from __future__ import annotations

from typing import Any

from shim.doctor.model import Check, Subject, problem, problem_of
from shim.errors import ChandlerError
from shim.host import runtimes, trust

# Runtimes with known defects: kind, first bad version, first good version, what is wrong, what to do.
_KNOWN_DEFECTS: tuple[tuple[str, tuple[int, ...], tuple[int, ...], str, str], ...] = (
    (
        "runc",
        (0,),
        (1, 1, 12),
        "a container can reach the host through a leaked descriptor (CVE-2024-21626)",
        "runc 1.1.12 or newer",
    ),
    (
        "runc",
        (1, 1, 12),
        (1, 2, 8),
        "an image can redirect writes to /proc (CVE-2025-31133, -52565, -52881)",
        "runc 1.2.8 or newer",
    ),
    (
        "runc",
        (1, 3),
        (1, 3, 3),
        "an image can redirect writes to /proc (CVE-2025-31133, -52565, -52881)",
        "runc 1.3.3 or newer",
    ),
    ("crun", (0,), (1, 8, 2), "it refuses ociVersion 1.2, which containerd writes", "a newer crun"),
    (
        "crun",
        (0,),
        (1, 22),
        "with a user namespace and /dev/null as standard input it changes the owner of the host's /dev/null",
        "a newer crun",
    ),
    (
        "youki",
        (0,),
        (0, 8),
        "its `run` sometimes waits for ever for a container that ended at once",
        "create and start in its place, or runc",
    ),
)


def installed_runtimes(subject: Subject) -> Check:
    """The installed runtimes; problems of those that the configuration names."""
    host, config = subject.host, subject.config
    installed: list[dict[str, Any]] = []
    problems: list[dict[str, str]] = []
    names = list(dict.fromkeys([*config["runtimes"], *runtimes.KINDS]))
    usable = 0
    for name in names:
        path = (name if host.exists(name) else "") if name.startswith("/") else host.program(name)
        configured = name in config["runtimes"]
        if not path:
            continue
        kind = runtimes.kind_of(path)
        text = host.version(path)
        version = parse_version(text)
        installed.append({"kind": kind, "path": path, "version": ".".join(map(str, version)), "configured": configured})
        if not configured:
            continue
        usable += 1
        try:
            trust.check_path(path, subject.account.owners)
        except ChandlerError as error:
            problems.append(problem_of(error, f"chown root {path}; chmod go-w {path}"))
        except OSError:
            pass  # the path exists only below the root directory of a test
        if not version:
            problems.append(problem(f"{path} does not say its version", "see whether it starts"))
        for defect, remedy in known_defects(kind, version):
            problems.append(
                problem(
                    f"{path} {installed[-1]['version']}: {defect}",
                    f"{remedy}, or a build that the distribution has patched",
                )
            )
        if kind == "crun" and subject.cgroups.version == "hybrid" and usable == 1:
            problems.append(
                problem(
                    f"{path} refuses control groups of version 1 and 2 side by side",
                    "runc or youki first in `runtimes`",
                )
            )
    if not usable:
        problems.append(
            problem(
                f"none of the configured runtimes ({', '.join(config['runtimes'])}) is installed",
                "install runc, crun or youki, or set `runtimes` in the configuration",
            )
        )
    text = ", ".join(
        f"{each['kind']} {each['version'] or '?'} ({each['path']}{'' if each['configured'] else ', not configured'})"
        for each in installed
    )
    return Check("runtimes", text or "none", installed, problems)


def parse_version(text: str) -> tuple[int, ...]:
    """The version in a line such as `runc version 1.1.5+ds1`, as (1, 1, 5); () when there is none."""
    for word in text.split():
        parts = word[word.startswith("v") :].split("+")[0].split("-")[0].split("~")[0].split(".")
        if len(parts) > 1 and all(part.isdigit() and part.isascii() for part in parts):
            return tuple(int(part) for part in parts)
    return ()


def known_defects(kind: str, version: tuple[int, ...]) -> list[tuple[str, str]]:
    """The known defects of a version of a runtime, each with its remedy."""
    return [
        (defect, remedy)
        for of, since, below, defect, remedy in _KNOWN_DEFECTS
        if of == kind and version and since <= version < below
    ]
