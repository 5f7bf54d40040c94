"""Checks of the container engines: their configuration, and NRI."""

from __future__ import annotations

import fnmatch
import posixpath
from typing import Any

from shim import paths
from shim.configure import containerd, crio, docker, podman
from shim.configure.model import PROGRAMS
from shim.doctor.model import Check, Subject, problem, problem_of
from shim.errors import ChandlerError
from shim.policy import engines

NRI_SOCKET = "/var/run/nri/nri.sock"

# Engine: (programs, configuration files, directories of drop-ins), where `chandler configure` and people write.
CONFIGURATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "containerd": (
        ("containerd", "k3s", "rke2"),
        (
            containerd.CONFIG,
            *(f"/var/lib{directory}/{name}" for directory in containerd.RANCHER for name in containerd.TEMPLATES),
        ),
        ("/etc/containerd/conf.d", "/etc/containerd/config.d"),
    ),
    "crio": (("crio",), (crio.CONFIG,), (crio.CONFIG + ".d",)),
    "podman": (("podman",), (podman.CONFIG,), (podman.CONFIG + ".d",)),
    "docker": (("dockerd",), (docker.CONFIG,), ()),
}


def nri(subject: Subject) -> Check:
    """The NRI socket, and whether containerd lets a plugin add hooks."""
    host = subject.host
    has_socket = host.exists(NRI_SOCKET)
    problems = []
    data: dict[str, Any] = {"socket": NRI_SOCKET if has_socket else None}
    text = NRI_SOCKET if has_socket else "no socket"
    try:
        rejecting = containerd.config_rejecting_hooks(
            lambda path: host.read(path) or None,
            lambda pattern: [
                f"{posixpath.dirname(pattern)}/{name}"
                for name in host.names(posixpath.dirname(pattern))
                if fnmatch.fnmatchcase(name, posixpath.basename(pattern))
            ],
        )
        if rejecting:
            data["hooks"] = "rejected"
            text += (
                f"; containerd's validator rejects OCI hooks (reject_oci_hook_adjustment in {rejecting}): leases end "
                "when containerd stops the container, and requests that need a hook, such as shared GPUs, are refused"
            )
    except ChandlerError as error:
        problems.append(problem_of(error, "correct containerd's configuration"))
    if not has_socket and subject.config["require-grant"]:
        problems.append(
            problem(
                f"require-grant is set, and {NRI_SOCKET} is not there: every create with a request is refused",
                "enable NRI in containerd or CRI-O, or take require-grant out",
            )
        )
    return Check("nri", text, data, problems)


def configured_engines(subject: Subject) -> Check:
    """Which engines call chandler-runtime, and whose names of pods and images are believed."""
    host, config = subject.host, subject.config
    by_engine: dict[str, Any] = {}
    for engine, (programs, names, directories) in CONFIGURATIONS.items():
        texts = [host.read(name) for name in names]
        texts += [host.read(f"{directory}/{name}") for directory in directories for name in host.names(directory)]
        configured = any(program in text for text in texts for program in PROGRAMS)
        installed = any(host.program(program) for program in programs)
        if installed or configured:
            known_by, from_image = engines.ENGINES[engine]
            by_engine[engine] = {
                "installed": installed,
                "configured": configured,
                "identity": engine in config["engines"] and engine in engines.KEYS,
                "known_by": known_by,
                "from_image": from_image,
            }
    problems = [
        problem(
            f'engines of the configuration has "{engine}", whose own configuration does not name chandler-runtime',
            f"chandler configure {engine}",
        )
        for engine in config["engines"]
        if engine in engines.KEYS and not by_engine.get(engine, {}).get("configured")
    ]
    problems += [
        problem(
            f'engines of the configuration does not have "{engine}", '
            "so no rule by namespace, pod or image can match its containers",
            f'chandler configure {engine}, or engines = ["{engine}"] in {paths.CONFIG_DIR}/config.toml',
        )
        for engine, entry in by_engine.items()
        if entry["configured"] and engine in engines.KEYS and not entry["identity"]
    ]
    words = [
        f"{name} ({'configured' if entry['configured'] else 'not configured'}"
        f"{', names believed' if entry['identity'] else ''}; "
        f"recognised by: {entry['known_by']}; taken from the image: {entry['from_image']})"
        for name, entry in by_engine.items()
    ]
    if engines.OTHER in config["engines"]:
        words.append('any other caller may ask, too ("other" in engines)')
    return Check("engines", ", ".join(words) or "none", by_engine, problems)
