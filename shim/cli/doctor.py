"""`chandler doctor`: checks what this host has for containers with GPUs, and prints a remedy for each problem."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import posixpath
import subprocess
from typing import Any, NamedTuple

from shim import paths, report
from shim.configure import containerd, crio, docker, podman
from shim.configure.model import PROGRAMS
from shim.errors import ChandlerError
from shim.gpu import vendors
from shim.host import cgroups, runtimes, trust
from shim.node import compiler
from shim.node import config as _config
from shim.node.inventory import Place
from shim.policy import engines
from shim.state import stale
from shim.state.ledger import Ledger

NRI_SOCKET = "/var/run/nri/nri.sock"
PATIENCE = 10.0  # seconds for a runtime to say its version

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

_DISPLAY = ("0x03", "0x12")  # PCI classes: display controller, processing accelerator

# Engine: (programs, configuration files, directories of drop-ins), where `chandler configure` and people write.
_ENGINES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
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


class Check(NamedTuple):
    """The result of one check: what was found, as a line (`text`) and for JSON (`data`), and its problems."""

    name: str
    text: str
    data: Any
    problems: list[dict[str, str]]


class Examined(cgroups.CgroupTree):
    """Reads the host for doctor.  Tests pass one with another root directory."""

    def names(self, directory: str) -> list[str]:
        """The sorted entries of a directory; none when it cannot be read."""
        try:
            return sorted(os.listdir(self._root + directory))
        except OSError:
            return []

    def program(self, name: str) -> str:
        """The path of a program in the usual directories; '' when it is not there."""
        return next(
            (f"{directory}/{name}" for directory in paths.BINARY_DIRS if self.exists(f"{directory}/{name}")), ""
        )

    def version(self, path: str) -> str:
        """The first line that a program prints for --version; '' when it fails or takes longer than PATIENCE."""
        try:
            done = subprocess.run(
                [self._root + path, "--version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE,
                check=False,
                env={"PATH": paths.SAFE_PATH},
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.partition("\n")[0].strip()


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser("doctor", help="check this host, with a remedy for each problem", description=__doc__)
    command.add_argument("--format", choices=("text", "json"), default="text")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints every check.  Returns exit status 0 when nothing is wrong, else 1."""
    checks = examine(Examined(), Place(dict(os.environb)))
    problems = sum(len(check.problems) for check in checks)
    if arguments.format == "json":
        print(
            json.dumps(
                {
                    "checks": {check.name: check.data for check in checks},
                    "problems": [{"check": check.name, **problem} for check in checks for problem in check.problems],
                },
                indent=2,
            )
        )
    else:
        print("\n".join(_lines(checks)))
    return 1 if problems else 0


def _lines(checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.name:<{width}}  {check.text}")
        for problem in check.problems:
            lines += [f"{'':<{width}}  problem: {problem['problem']}", f"{'':<{width}}  remedy:  {problem['remedy']}"]
    problems = sum(len(check.problems) for check in checks)
    return [*lines, "", f"{problems} problem{'' if problems == 1 else 's'}" if problems else "nothing is wrong"]


def examine(host: Examined, place: Place) -> list[Check]:
    """Makes every check.  The order is the one in which they are printed."""
    config, configured = _configuration(place)
    hybrid = cgroups.survey(host)
    return [
        configured,
        _caller(host, place),
        _groups(hybrid, place.rootless),
        _runtimes(host, place, config, hybrid.version),
        *_gpus(host, place, config),
        _nri(host, config),
        _engines(host, config),
        _state(place, config),
        _leases(place, config),
    ]


def _problem(problem: str, remedy: str) -> dict[str, str]:
    return {"problem": problem, "remedy": remedy}


def _problem_of(error: ChandlerError, remedy: str) -> dict[str, str]:
    return _problem(error.what, error.todo or remedy)


def _configuration(place: Place) -> tuple[dict[str, Any], Check]:
    try:
        config, _ = compiler.read_config(place)
        return config, Check("configuration", place.config_path, {"path": place.config_path, "valid": True}, [])
    except ChandlerError as error:
        config = {key: default for key, (_, _, default) in _config.KEYS.items()}
        return config, Check(
            "configuration",
            f"{place.config_path}, which cannot be used",
            {"path": place.config_path, "valid": False},
            [_problem_of(error, f"correct {place.config_path}")],
        )


def _caller(host: Examined, place: Place) -> Check:
    if not place.rootless:
        return Check("caller", "root", {"uid": place.euid, "rootless": False}, [])
    problems = []
    ranges = 0
    if place.euid:
        from shim.bundle import rootless
        from shim.bundle.build import owners

        for file in ("/etc/subuid", "/etc/subgid"):
            count = len(rootless.ranges(host.read(file), owners(place.euid)))
            ranges += count
            if not count:
                problems.append(
                    _problem(
                        f"uid {place.euid} has no range in {file}, so each of its containers has only one id",
                        f"usermod --add-sub{file[-3:]}s 100000-165535 USER",
                    )
                )
        for program in ("newuidmap", "newgidmap"):
            if not host.program(program):
                problems.append(
                    _problem(
                        f"{program} is not installed, so ranges cannot be used", "install uidmap (or shadow-utils)"
                    )
                )
    return Check(
        "caller", f"uid {place.euid}, rootless", {"uid": place.euid, "rootless": True, "ranges": ranges}, problems
    )


def _groups(survey: cgroups.Survey, rootless: bool) -> Check:
    words = [survey.version + ("" if survey.version == "none" else f" at {survey.mount}")]
    words.append("in a container" if survey.nested else "on the host")
    words.append("writable" if (survey.own_writable if survey.nested else survey.root_writable) else "not writable")
    if survey.controllers:
        words.append(f"controllers {' '.join(survey.controllers)}")
    if survey.version == "v2":
        words.append(f"delegated {' '.join(survey.delegated) or 'none'}")
    return Check("cgroups", ", ".join(words), survey._asdict(), cgroups.remedy(survey, rootless))


def _runtimes(host: Examined, place: Place, config: dict[str, Any], groups: str) -> Check:
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
        version = numbers(text)
        installed.append({"kind": kind, "path": path, "version": ".".join(map(str, version)), "configured": configured})
        if not configured:
            continue
        usable += 1
        try:
            trust.check_way(path, place.owners)
        except ChandlerError as error:
            problems.append(_problem_of(error, f"chown root {path}; chmod go-w {path}"))
        except OSError:
            pass  # the path exists only below the root directory of a test
        if not version:
            problems.append(_problem(f"{path} does not say its version", "see whether it starts"))
        for problem, remedy in known_bad(kind, version):
            problems.append(
                _problem(
                    f"{path} {installed[-1]['version']}: {problem}",
                    f"{remedy}, or a build that the distribution has patched",
                )
            )
        if kind == "crun" and groups == "hybrid" and usable == 1:
            problems.append(
                _problem(
                    f"{path} refuses control groups of version 1 and 2 side by side",
                    "runc or youki first in `runtimes`",
                )
            )
    if not usable:
        problems.append(
            _problem(
                f"none of the configured runtimes ({', '.join(config['runtimes'])}) is installed",
                "install runc, crun or youki, or set `runtimes` in the configuration",
            )
        )
    text = ", ".join(
        f"{each['kind']} {each['version'] or '?'} ({each['path']}{'' if each['configured'] else ', not configured'})"
        for each in installed
    )
    return Check("runtimes", text or "none", installed, problems)


def numbers(text: str) -> tuple[int, ...]:
    """The version in a line such as `runc version 1.1.5+ds1`, as (1, 1, 5); () when there is none."""
    for word in text.split():
        parts = word[word.startswith("v") :].split("+")[0].split("-")[0].split("~")[0].split(".")
        if len(parts) > 1 and all(part.isdigit() and part.isascii() for part in parts):
            return tuple(int(part) for part in parts)
    return ()


def known_bad(kind: str, version: tuple[int, ...]) -> list[tuple[str, str]]:
    """The known defects of a version of a runtime, each with its remedy."""
    return [
        (problem, remedy)
        for of, since, below, problem, remedy in _KNOWN_DEFECTS
        if of == kind and version and since <= version < below
    ]


def _gpus(host: Examined, place: Place, config: dict[str, Any]) -> list[Check]:
    problems: list[dict[str, str]] = []
    kinds: dict[str, int] = {}
    count = 0
    try:
        registry = compiler.read_registry(place, config)
        count = len(registry.files)
        for name in registry.devices:
            kind = name.partition("=")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
        problems = [
            _problem_of(error if path in error.what else error.within(path), f"correct {path}, or move it away")
            for path, errors in registry.problems.items()
            for error in errors
        ]
    except ChandlerError as error:
        problems = [_problem_of(error, "see cdi.spec-dirs in the configuration")]
    text = f"{count} file{'' if count == 1 else 's'} in {', '.join(config['cdi.spec-dirs'])}"
    text += "".join(f", {number} names of {kind}" for kind, number in kinds.items())
    return [
        Check("cdi", text, {"directories": config["cdi.spec-dirs"], "files": count, "devices": kinds}, problems),
        _drivers(host, kinds, config),
    ]


def _drivers(host: Examined, kinds: dict[str, int], config: dict[str, Any]) -> Check:
    by_vendor: dict[str, Any] = {}
    problems: list[dict[str, str]] = []
    cards = _cards(host)
    for vendor in vendors.with_gpus():
        loaded = [module for module in vendor.modules if host.exists(f"/sys/module/{module}")]
        nodes = [
            *vendor.control_nodes,
            *(directory for directory in vendors.node_directories(vendor) if directory != "/dev"),
        ]
        present = [node for node in nodes if host.exists(node)]
        on_bus = cards.count(vendor.pci)
        if not loaded and not on_bus:
            continue
        version = host.read(f"/sys/module/{vendor.modules[0]}/version").strip()
        by_vendor[vendor.name] = {"on_bus": on_bus, "modules": loaded, "nodes": present, "version": version}
        if not loaded and not vendor.integrated:
            problems.append(
                _problem(f"{on_bus} devices of {vendor.name} are on the PCI bus, and no driver is loaded", vendor.load)
            )
        elif loaded and on_bus and len(present) < len(nodes) and not vendor.integrated:
            missing = ", ".join(node for node in nodes if node not in present)
            problems.append(_problem(f"the driver of {vendor.name} is loaded, and {missing} is missing", vendor.load))
        elif loaded and vendor.kind not in kinds and config["gpu.fallback"] == "off":
            problems.append(
                _problem(
                    f"no CDI file describes {vendor.kind}, and gpu.fallback is off",
                    'chandler cdi generate --output /etc/cdi/, or gpu.fallback = "devices"',
                )
            )
    words = [
        f"{name} {each['version']}".rstrip()
        + f" ({each['on_bus']} on the bus, {' '.join(each['modules']) or 'no driver'})"
        for name, each in by_vendor.items()
    ]
    return Check("gpu drivers", ", ".join(words) or "none", by_vendor, problems)


def _cards(host: Examined) -> list[str]:
    """The PCI vendor of each device whose class may be that of a GPU or an accelerator."""
    devices = "/sys/bus/pci/devices"
    return [
        host.read(f"{devices}/{name}/vendor").strip()
        for name in host.names(devices)
        if host.read(f"{devices}/{name}/class").startswith(_DISPLAY)
    ]


def _nri(host: Examined, config: dict[str, Any]) -> Check:
    has_socket = host.exists(NRI_SOCKET)
    problems = []
    data: dict[str, Any] = {"socket": NRI_SOCKET if has_socket else None}
    text = NRI_SOCKET if has_socket else "no socket"
    try:
        if has_socket and containerd.rejects_hooks(
            containerd.CONFIG,
            lambda path: host.read(path) or None,
            lambda pattern: [
                f"{posixpath.dirname(pattern)}/{name}"
                for name in host.names(posixpath.dirname(pattern))
                if fnmatch.fnmatchcase(name, posixpath.basename(pattern))
            ],
        ):
            data["hooks"] = "rejected"
            text += (
                ", where containerd's validator rejects OCI hooks (reject_oci_hook_adjustment): leases end when "
                "containerd stops the container, and requests that need a hook, such as shared GPUs, are refused"
            )
    except ChandlerError as error:
        problems.append(_problem_of(error, "correct containerd's configuration"))
    if not has_socket and config["require-grant"]:
        problems.append(
            _problem(
                f"require-grant is set, and {NRI_SOCKET} is not there: every create with a request is refused",
                "enable NRI in containerd or CRI-O, or take require-grant out",
            )
        )
    return Check("nri", text, data, problems)


def _engines(host: Examined, config: dict[str, Any]) -> Check:
    by_engine: dict[str, Any] = {}
    for engine, (programs, names, directories) in _ENGINES.items():
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
        _problem(
            f'engines of the configuration has "{engine}", whose own configuration does not name chandler-runtime',
            f"chandler configure {engine}",
        )
        for engine in config["engines"]
        if engine in engines.KEYS and not by_engine.get(engine, {}).get("configured")
    ]
    problems += [
        _problem(
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


def _state(place: Place, config: dict[str, Any]) -> Check:
    directory = config["state-dir"] or place.state_dir
    problems = []
    try:
        place.trusted_state_dir(config["state-dir"])
        if os.path.lexists(directory) and not place.private(directory):
            problems.append(
                _problem(f"{directory} is not a directory of uid {place.euid}", f"chown {place.euid} {directory}")
            )
    except ChandlerError as error:
        problems.append(_problem_of(error, "see who can write to it"))
    log = config["log.file"]
    if log not in ("", "journal") and os.path.lexists(log):
        try:
            os.close(report.open_own(log))
        except ChandlerError as error:
            problems.append(
                _problem(
                    f"log.file is not written: {error.what}",
                    error.todo or "choose a file in a directory that belongs to root",
                )
            )
        except OSError as error:
            problems.append(_problem(f"log.file {log} is not written: {error.strerror}", "see that it can be written"))
    return Check("state", directory or "none", {"path": directory}, problems)


def _leases(place: Place, config: dict[str, Any]) -> Check:
    """Which allocator gives out GPUs, and its leases.

    A stale lease is no problem: the next create that needs the device takes the lease back.
    """
    allocator = config["gpu.allocator"]
    if allocator != "leases":
        return Check(
            "leases", f'none are kept (allocator = "{allocator}")', {"allocator": allocator, "held": 0, "stale": 0}, []
        )
    leases: list[dict[str, Any]] = []
    problems = []
    try:
        directory = place.trusted_state_dir(config["state-dir"])
    except ChandlerError:
        return Check(
            "leases", "not known, see the state directory", {"allocator": allocator, "held": 0, "stale": 0}, []
        )
    try:
        leases = Ledger(directory, place.rootless).read()
    except ChandlerError as error:
        problems.append(_problem_of(error, "see the state directory"))
    stale_count = sum(stale.is_stale(lease) for lease in leases)
    text = f"{len(leases)} held" + (
        f", {stale_count} of them by containers that are gone (`chandler leases release --stale`)"
        if stale_count
        else ""
    )
    return Check("leases", text, {"allocator": allocator, "held": len(leases), "stale": stale_count}, problems)
