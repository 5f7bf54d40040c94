"""`chandler doctor`: what this host has for containers with GPUs, and a remedy for each problem."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import posixpath
import subprocess
from typing import Any, Dict, List, NamedTuple, Tuple

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

# kind, below this version (from this one on), what is wrong, what to do
_BAD: Tuple[Tuple[str, Tuple[int, ...], Tuple[int, ...], str, str], ...] = (
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

# engine: (programs, configuration files, directories of them), where `chandler configure` writes, and people do
_ENGINES: Dict[str, Tuple[Tuple[str, ...], Tuple[str, ...], Tuple[str, ...]]] = {
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
    """One thing that was looked at: what was found, in a line and as data, and what is wrong with it."""

    name: str
    text: str
    data: Any
    problems: List[Dict[str, str]]


class Examined(cgroups.CgroupTree):
    """What doctor asks of the host; a test gives another."""

    def names(self, directory: str) -> List[str]:
        """The entries of a directory; none when it cannot be read."""
        try:
            return sorted(os.listdir(self._root + directory))
        except OSError:
            return []

    def program(self, name: str) -> str:
        """Where a program is, '' when it is nowhere."""
        return next(
            (f"{directory}/{name}" for directory in paths.BINARY_DIRS if self.exists(f"{directory}/{name}")), ""
        )

    def version(self, path: str) -> str:
        """The first line of what a runtime says of its version; '' when it says nothing in time."""
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
    command = commands.add_parser(
        "doctor", help="look this host over, with a remedy for each problem", description=__doc__
    )
    command.add_argument("--format", choices=("text", "json"), default="text")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit status 0 when nothing is wrong."""
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


def _lines(checks: List[Check]) -> List[str]:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.name:<{width}}  {check.text}")
        for problem in check.problems:
            lines += [f"{'':<{width}}  problem: {problem['problem']}", f"{'':<{width}}  remedy:  {problem['remedy']}"]
    problems = sum(len(check.problems) for check in checks)
    return [*lines, "", f"{problems} problem{'' if problems == 1 else 's'}" if problems else "nothing is wrong"]


def examine(host: Examined, place: Place) -> List[Check]:
    """Every check, in the order in which a person reads them."""
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


def _problem(problem: str, remedy: str) -> Dict[str, str]:
    return {"problem": problem, "remedy": remedy}


def _of(error: ChandlerError, remedy: str) -> Dict[str, str]:
    return _problem(error.what, error.todo or remedy)


def _configuration(place: Place) -> Tuple[Dict[str, Any], Check]:
    try:
        config, _ = compiler.read_config(place)
        return config, Check("configuration", place.config_path, {"path": place.config_path, "valid": True}, [])
    except ChandlerError as error:
        config = {key: default for key, (_, _, default) in _config.KEYS.items()}
        return config, Check(
            "configuration",
            f"{place.config_path}, which cannot be used",
            {"path": place.config_path, "valid": False},
            [_of(error, f"mend {place.config_path}")],
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
            found = len(rootless.ranges(host.read(file), owners(place.euid)))
            ranges += found
            if not found:
                problems.append(
                    _problem(
                        f"uid {place.euid} has no range in {file}, so its containers have one id alone",
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


def _groups(found: cgroups.Survey, rootless: bool) -> Check:
    words = [found.version + ("" if found.version == "none" else f" at {found.mount}")]
    words.append("in a container" if found.nested else "on the host")
    words.append("writable" if (found.own_writable if found.nested else found.root_writable) else "not writable")
    if found.controllers:
        words.append(f"controllers {' '.join(found.controllers)}")
    if found.version == "v2":
        words.append(f"delegated {' '.join(found.delegated) or 'none'}")
    return Check("cgroups", ", ".join(words), found._asdict(), cgroups.remedy(found, rootless))


def _runtimes(host: Examined, place: Place, config: Dict[str, Any], groups: str) -> Check:
    found: List[Dict[str, Any]] = []
    problems: List[Dict[str, str]] = []
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
        found.append({"kind": kind, "path": path, "version": ".".join(map(str, version)), "configured": configured})
        if not configured:
            continue
        usable += 1
        try:
            trust.check_way(path, place.owners)
        except ChandlerError as error:
            problems.append(_of(error, f"chown root {path}; chmod go-w {path}"))
        except OSError:
            pass  # a test's host
        if not version:
            problems.append(_problem(f"{path} does not say its version", "see whether it starts at all"))
        for problem, remedy in known_bad(kind, version):
            problems.append(
                _problem(
                    f"{path} {found[-1]['version']}: {problem}", f"{remedy}, or one that the distribution has mended"
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
        for each in found
    )
    return Check("runtimes", text or "none", found, problems)


def numbers(text: str) -> Tuple[int, ...]:
    """The version in a line such as `runc version 1.1.5+ds1`; () when there is none."""
    for word in text.split():
        parts = word[word.startswith("v") :].split("+")[0].split("-")[0].split("~")[0].split(".")
        if len(parts) > 1 and all(part.isdigit() and part.isascii() for part in parts):
            return tuple(int(part) for part in parts)
    return ()


def known_bad(kind: str, version: Tuple[int, ...]) -> List[Tuple[str, str]]:
    """What is known to be wrong with a version, each with its remedy."""
    return [
        (problem, remedy)
        for of, since, below, problem, remedy in _BAD
        if of == kind and version and since <= version < below
    ]


def _gpus(host: Examined, place: Place, config: Dict[str, Any]) -> List[Check]:
    problems: List[Dict[str, str]] = []
    kinds: Dict[str, int] = {}
    count = 0
    try:
        registry = compiler.read_registry(place, config)
        count = len(registry.files)
        for name in registry.devices:
            kind = name.partition("=")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
        problems = [
            _of(error if path in error.what else error.within(path), f"mend {path}, or move it away")
            for path, errors in registry.problems.items()
            for error in errors
        ]
    except ChandlerError as error:
        problems = [_of(error, "see cdi.spec-dirs in the configuration")]
    text = f"{count} file{'' if count == 1 else 's'} in {', '.join(config['cdi.spec-dirs'])}"
    text += "".join(f", {number} names of {kind}" for kind, number in kinds.items())
    return [
        Check("cdi", text, {"directories": config["cdi.spec-dirs"], "files": count, "devices": kinds}, problems),
        _drivers(host, kinds, config),
    ]


def _drivers(host: Examined, kinds: Dict[str, int], config: Dict[str, Any]) -> Check:
    found: Dict[str, Any] = {}
    problems: List[Dict[str, str]] = []
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
        found[vendor.name] = {"on_bus": on_bus, "modules": loaded, "nodes": present, "version": version}
        if not loaded and not vendor.integrated:
            problems.append(
                _problem(f"{on_bus} devices of {vendor.name} are on the bus, and no driver is loaded", vendor.load)
            )
        elif loaded and on_bus and len(present) < len(nodes) and not vendor.integrated:
            missing = ", ".join(node for node in nodes if node not in present)
            problems.append(_problem(f"the driver of {vendor.name} is loaded, and {missing} is not there", vendor.load))
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
        for name, each in found.items()
    ]
    return Check("gpu drivers", ", ".join(words) or "none", found, problems)


def _cards(host: Examined) -> List[str]:
    """The PCI vendors of everything that may be a GPU or an accelerator."""
    devices = "/sys/bus/pci/devices"
    return [
        host.read(f"{devices}/{name}/vendor").strip()
        for name in host.names(devices)
        if host.read(f"{devices}/{name}/class").startswith(_DISPLAY)
    ]


def _nri(host: Examined, config: Dict[str, Any]) -> Check:
    there = host.exists(NRI_SOCKET)
    problems = []
    data: Dict[str, Any] = {"socket": NRI_SOCKET if there else None}
    text = NRI_SOCKET if there else "no socket"
    try:
        if there and containerd.rejects_hooks(
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
                ", where containerd's validator rejects OCI hooks (reject_oci_hook_adjustment): leases end when containerd "
                "stops the container, and requests that need a hook, such as shared GPUs, are refused"
            )
    except ChandlerError as error:
        problems.append(_of(error, "mend containerd's configuration"))
    if not there and config["require-grant"]:
        problems.append(
            _problem(
                f"require-grant is set, and {NRI_SOCKET} is not there: every create with a request is refused",
                "enable NRI in containerd or CRI-O, or take require-grant out",
            )
        )
    return Check("nri", text, data, problems)


def _engines(host: Examined, config: Dict[str, Any]) -> Check:
    found: Dict[str, Any] = {}
    for engine, (programs, names, directories) in _ENGINES.items():
        texts = [host.read(name) for name in names]
        texts += [host.read(f"{directory}/{name}") for directory in directories for name in host.names(directory)]
        configured = any(program in text for text in texts for program in PROGRAMS)
        installed = any(host.program(program) for program in programs)
        if installed or configured:
            known_by, from_image = engines.ENGINES[engine]
            found[engine] = {
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
        if engine in engines.KEYS and not found.get(engine, {}).get("configured")
    ]
    problems += [
        _problem(
            f'engines of the configuration does not have "{engine}", so no rule by namespace, pod or image can match its containers',
            f'chandler configure {engine}, or engines = ["{engine}"] in {paths.CONFIG_DIR}/config.toml',
        )
        for engine, each in found.items()
        if each["configured"] and engine in engines.KEYS and not each["identity"]
    ]
    words = [
        f"{name} ({'configured' if each['configured'] else 'not configured'}{', names believed' if each['identity'] else ''}; "
        f"known by: {each['known_by']}; from an image comes: {each['from_image']})"
        for name, each in found.items()
    ]
    if engines.OTHER in config["engines"]:
        words.append('any other caller may ask, too ("other" in engines)')
    return Check("engines", ", ".join(words) or "none", found, problems)


def _state(place: Place, config: Dict[str, Any]) -> Check:
    directory = config["state-dir"] or place.state_dir
    problems = []
    try:
        place.trusted_state_dir(config["state-dir"])
        if os.path.lexists(directory) and not place.private(directory):
            problems.append(
                _problem(f"{directory} is not a directory of uid {place.euid}", f"chown {place.euid} {directory}")
            )
    except ChandlerError as error:
        problems.append(_of(error, "see who may write there"))
    log = config["log.file"]
    if log not in ("", "journal") and os.path.lexists(log):
        try:
            os.close(report.open_own(log))
        except ChandlerError as error:
            problems.append(
                _problem(
                    f"log.file is not written: {error.what}", error.todo or "choose a file in a directory of root's"
                )
            )
        except OSError as error:
            problems.append(_problem(f"log.file {log} is not written: {error.strerror}", "see that it can be written"))
    return Check("state", directory or "none", {"path": directory}, problems)


def _leases(place: Place, config: Dict[str, Any]) -> Check:
    """Who says which container gets which GPU; a lease of a container that is gone is no problem, since whoever needs the
    device takes it back."""
    allocator = config["gpu.allocator"]
    if allocator != "leases":
        return Check(
            "leases", f'none are kept (allocator = "{allocator}")', {"allocator": allocator, "held": 0, "stale": 0}, []
        )
    found: List[Dict[str, Any]] = []
    problems = []
    try:
        directory = place.trusted_state_dir(config["state-dir"])
    except ChandlerError:
        return Check(
            "leases", "not known, see the state directory", {"allocator": allocator, "held": 0, "stale": 0}, []
        )
    try:
        found = Ledger(directory, place.rootless).read()
    except ChandlerError as error:
        problems.append(_of(error, "see the state directory"))
    gone = sum(stale.is_stale(lease) for lease in found)
    text = f"{len(found)} held" + (
        f", {gone} of them by containers that are gone (`chandler leases release --stale`)" if gone else ""
    )
    return Check("leases", text, {"allocator": allocator, "held": len(found), "stale": gone}, problems)
