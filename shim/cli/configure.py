"""`chandler configure ENGINE`: makes Chandler a runtime handler of containerd, CRI-O, docker or podman.

With --remove it undoes that.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import subprocess
from types import ModuleType
from typing import Any, Callable

from shim import paths
from shim.configure import containerd, crio, docker, podman, selinux, store, verify
from shim.configure.model import TOML, VALUE, Changes, ConfigureRequest, Edit, Read, Setting
from shim.doctor.model import HostReader
from shim.doctor.runtimes import parse_version
from shim.errors import ChandlerError, ConfigError, HostError
from shim.host import files, kernel, runtimes, trust
from shim.node import compiler
from shim.node import config as _config
from shim.node.inventory import Account
from shim.policy import engines

ENGINES: dict[str, ModuleType] = {"containerd": containerd, "crio": crio, "docker": docker, "podman": podman}
PATIENCE = 120.0  # seconds for an engine to start again
_PROGRAM = re.compile(rb"chandler-(runtime|runc|youki|crun)\b")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?")  # what a RuntimeClass may name


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "configure", help="make Chandler a runtime handler of an engine, or undo that", description=__doc__
    )
    command.add_argument("engine", choices=sorted(ENGINES))
    command.add_argument("--handler", metavar="NAME", help="the handler's name (default: chandler)")
    command.add_argument(
        "--runtime",
        action="append",
        default=[],
        choices=runtimes.KINDS,
        help="also a handler chandler-RUNTIME; with --handler NAME, NAME itself runs on RUNTIME; may be repeated",
    )
    command.add_argument("--default", action="store_true", help="make it the engine's default runtime")
    command.add_argument("--cdi", action="store_true", help="enable CDI in the engine")
    command.add_argument("--nri", action="store_true", help="enable NRI in the engine (containerd, crio)")
    command.add_argument(
        "--nri-required",
        action="store_true",
        help="--nri, and no container is created while chandler-nri is not connected (containerd from 2.2 on)",
    )
    command.add_argument(
        "--config", metavar="FILE", default="", help="the engine's main configuration file, if not the usual one"
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument(
        "--drop-in",
        metavar="PATH",
        nargs="?",
        const="",
        help="write a file of Chandler's own (containerd from 2.1 on, crio, podman: the default)",
    )
    where.add_argument(
        "--in-place", action="store_true", help="edit the main file even where a drop-in would do (containerd)"
    )
    command.add_argument(
        "--engine-version", metavar="X.Y", default="", help="containerd's version, where its program cannot be asked"
    )
    command.add_argument(
        "--programs", metavar="DIR", default="", help="where the engine's programs are, if not in the usual directories"
    )
    command.add_argument("--address", metavar="SOCKET", default="", help="the engine's socket, for --verify")
    command.add_argument(
        "--keep-engine", action="store_true", help="leave the key `engines` of Chandler's own configuration alone"
    )
    command.add_argument("--dry-run", action="store_true", help="show what would change as a diff, and write nothing")
    command.add_argument("--remove", action="store_true", help="restore the configuration from before this command")
    command.add_argument(
        "--restart",
        action="store_true",
        help="restart the engine if its configuration has changed now, or since it started",
    )
    command.add_argument(
        "--verify", action="store_true", help="start a container through the engine and check that its request arrives"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns exit status 0; raises ChandlerError.  It writes nothing before it has checked every change."""
    if arguments.nri_required and arguments.engine != "containerd":
        raise ConfigError(
            f"--nri-required is for containerd: this command cannot require an NRI plugin in {arguments.engine}",
            "leave it out",
        )
    if arguments.remove and arguments.verify:
        raise ConfigError("--remove takes away the handler that --verify needs", "leave one of them out")
    account = Account(dict(os.environb))
    changes, plan, handlers = _changes(arguments, account)
    changes = [change for change in changes if not change.empty]
    if arguments.dry_run:
        print("".join(map(store.diff, changes)), end="")
    else:
        store.apply(changes)
        _print_summary(arguments, changes, plan, handlers)
    if (
        arguments.restart
        and plan.command
        and not arguments.dry_run
        and (changes or _predates_its_files(plan.command, [edit.path for edit in plan.edits]))
    ):
        _restart(plan.command)
    if arguments.verify:
        address = arguments.address or _address(arguments)
        prefix = compiler.read_config(account)[0]["annotation-prefix"]
        print(verify.verify(arguments.engine, handlers[0][0], address, prefix, Programs(arguments.programs).find))
    return 0


def _changes(
    arguments: argparse.Namespace, account: Account
) -> tuple[list[store.Change], Changes, list[tuple[str, str]]]:
    """Every change in the order in which to write them, the plan that they follow, and the handlers (name, program)."""
    seen: dict[str, store.Stored] = {}

    def look_once(path: str) -> store.Stored:
        if path not in seen:
            seen[path] = store.read_stored(path, account.owners)
        return seen[path]

    def text(path: str) -> str | None:
        return _text(path, look_once(path).base)

    read = Read(text, lambda path: _text(path, look_once(path).data), lambda pattern: sorted(glob.glob(pattern)))
    request = _request(arguments, account)
    module = ENGINES[arguments.engine]
    if arguments.remove:
        plan = Changes([], [], module.command(request))
    else:
        plan = module.plan(request, read)
        plan.notes.extend(selinux.notes())
        for _, program in request.handlers:
            _check_program(program, account)
    edits = {edit.path: edit for edit in [*plan.edits, *_engine_key(arguments, account)]}
    if arguments.remove:
        plan.notes.extend(_by_hand(module.possible_files(request, read), look_once))
    to_undo = [
        path
        for path in [*module.possible_files(request, read), *_engine_key_files(arguments, account)]
        if path not in edits and look_once(path).ours
    ]
    changes = [store.change(look_once(path), edit, arguments.engine) for path, edit in edits.items()]
    undone = [store.change(look_once(path), None, arguments.engine) for path in dict.fromkeys(to_undo)]
    if arguments.engine == "containerd" and arguments.remove and undone:
        plan.notes.append(
            "end the pods that run under the handler before the restart: containerd 2 cannot exec into them afterwards"
        )
    # change the files that import a drop-in before deleting the drop-in: deletions come last
    return [*changes, *sorted(undone, key=lambda change: change.after is None)], plan, request.handlers


def _by_hand(names: list[str], look: Callable[[str], store.Stored]) -> list[str]:
    """A note for each file that names a program of ours although no record says that this command wrote it."""
    return [
        f"{path} names {match.group().decode()}, and this command did not write that: take it out by hand"
        for path in names
        for match in [_PROGRAM.search(look(path).data or b"")]
        if match and not look(path).ours
    ]


def _text(path: str, data: bytes | None) -> str | None:
    if data is None:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8", "correct it first") from None


def _request(arguments: argparse.Namespace, account: Account) -> ConfigureRequest:
    if account.rootless and arguments.engine not in ("docker", "podman"):
        raise ConfigError(
            f"only root can configure {arguments.engine}", f"run `sudo chandler configure {arguments.engine}`"
        )
    for path in (arguments.config, arguments.drop_in or ""):
        if path and (not path.startswith("/") or any(character.isspace() or character in "*?[" for character in path)):
            raise ConfigError(f"{path!r} is not an absolute path, or has blanks or wildcards", "give the whole path")
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return ConfigureRequest(
        engine=arguments.engine,
        handlers=_handlers(arguments),
        annotations=_annotations(arguments, account),
        default=arguments.default,
        cdi=arguments.cdi,
        nri=arguments.nri or arguments.nri_required,
        config=arguments.config,
        drop_in=arguments.drop_in,
        in_place=arguments.in_place,
        version=_version(arguments),
        home=home if account.rootless else "",
        nri_required=arguments.nri_required,
    )


def _handlers(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Name and program of each handler.  Raises ConfigError."""
    name, kinds = arguments.handler, list(dict.fromkeys(arguments.runtime))
    directory = os.path.dirname(paths.HOOK)
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(
            f"--handler {name!r} is not a name that a RuntimeClass can have",
            "use lower-case letters, digits, dots and hyphens",
        )
    if name is not None and len(kinds) > 1:
        raise ConfigError(
            f"--handler {name} names one handler, and {len(kinds)} runtimes need several",
            "give one --runtime, or leave out --handler",
        )
    if name is not None and kinds:
        return [(name, f"{directory}/chandler-{kinds[0]}")]
    return [
        (name or "chandler", f"{directory}/chandler-runtime"),
        *((f"chandler-{kind}", f"{directory}/chandler-{kind}") for kind in kinds),
    ]


def _annotations(arguments: argparse.Namespace, account: Account) -> list[str]:
    """The patterns of annotations that containerd is to pass to us.

    --remove works even with a damaged configuration of Chandler's, since it needs no patterns.
    """
    try:
        config, _ = compiler.read_config(account)
    except ChandlerError:
        if not arguments.remove:
            raise
        return []
    return [config["annotation-prefix"] + "*", *(["cdi.k8s.io/*"] if config["cdi.annotations"] else [])]


def _version(arguments: argparse.Namespace) -> tuple[int, ...]:
    """containerd's version, from --engine-version or from its program; () when unknown, and for other engines."""
    if arguments.engine != "containerd":
        return ()
    if arguments.engine_version:
        version = parse_version(arguments.engine_version)
        if not version:
            raise ConfigError(
                f"--engine-version {arguments.engine_version!r} is not a version", "write one such as 2.1.9"
            )
        return version
    programs = Programs(arguments.programs)
    path = programs.find("containerd")
    return parse_version(programs.host.version(path)) if path else ()


class Programs:
    """Finds the engine's programs: in a directory, or without one in the usual directories."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.host = HostReader()

    def find(self, name: str) -> str:
        """The program's path; "" when it is not found."""
        if not self.directory:
            return self.host.program(name)
        path = os.path.join(self.directory, name)
        return path if os.access(path, os.X_OK) else ""


def _check_program(path: str, account: Account) -> None:
    try:
        trust.check_path(path, account.owners)
    except OSError as error:
        raise HostError(
            f"the engine could not run {path}, which cannot be reached: {error.strerror}", "install Chandler first"
        ) from None


def _engine_key_files(arguments: argparse.Namespace, account: Account) -> list[str]:
    """The files in config.d in which this command named this engine.

    Earlier releases wrote 50-engine.toml for every engine.
    """
    directory = os.path.dirname(account.config_path) + "/config.d"
    paths_of_ours = [f"{directory}/50-engine-{arguments.engine}.toml", f"{directory}/50-engine.toml"]
    if account.rootless or arguments.keep_engine and not arguments.remove:
        return []
    return [path for path in paths_of_ours if store.engine_of(path) == arguments.engine]


def _engine_key(arguments: argparse.Namespace, account: Account) -> list[Edit]:
    """The edit that adds the engine to the key `engines` of Chandler's own configuration, as a file in config.d.

    Empty for an engine whose identity annotations Chandler cannot believe, and where another file names the engine
    already.  The `engines` of several files add up.
    """
    if arguments.remove or arguments.keep_engine or account.rootless or arguments.engine not in engines.KEYS:
        return []
    ours = _engine_key_files(arguments, account)
    texts = [(path, data) for path, data in compiler.config_texts(account, compiler.Sources()) if path not in ours]
    if arguments.engine in _config.compile_config(texts)["engines"]:
        return []
    path = f"{os.path.dirname(account.config_path)}/config.d/50-engine-{arguments.engine}.toml"
    return [Edit(path, TOML, [Setting(VALUE, ("engines",), [arguments.engine])], own=True)]


def _address(arguments: argparse.Namespace) -> str:
    """The socket of containerd or CRI-O; "" for docker and podman, whose own programs know it."""
    if arguments.engine == "containerd":
        path = arguments.config or containerd.CONFIG
        try:
            return containerd.address(path, _text(path, files.read(path, store.LIMIT, follow=True)[0]))
        except OSError:
            return containerd.address(path, None)
    return crio.SOCKET if arguments.engine == "crio" else ""


def _print_summary(
    arguments: argparse.Namespace, changes: list[store.Change], plan: Changes, handlers: list[tuple[str, str]]
) -> None:
    for change in changes:
        if change.after is None:
            print(f"removed {change.stored.path}")
        elif change.after != change.stored.data:
            former = (
                f" (before: {change.stored.real}{store.ORIGINAL})"
                if change.record is not None and change.stored.base is not None
                else ""
            )
            print(f"{'restored' if arguments.remove else 'wrote'} {change.stored.path}{former}")
    for note in plan.notes:
        print(f"note: {note}")
    if not changes:
        print(
            f"nothing to remove: {arguments.engine} has nothing of Chandler's"
            if arguments.remove
            else f"nothing to change: {arguments.engine} is configured"
        )
    elif not arguments.remove:
        print("\n".join(f"handler {name}: {program}" for name, program in handlers))
    if changes and plan.command and not arguments.restart:
        print(f"now: {' '.join(plan.command)}")


def _predates_its_files(command: tuple[str, ...], names: list[str]) -> bool:
    """Whether the engine's process started before one of its files was written, and so has not read that file.

    That happens after a run without --restart, and after an interrupted run.
    """
    show = [*command[:-2], "show", "--property=MainPID", "--value", command[-1]]
    try:
        pid = int(
            subprocess.run(
                show, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False
            ).stdout
        )
        ticks = kernel.started(pid)
        if not ticks:
            return False
        with open("/proc/stat", encoding="ascii") as file:
            boot = next(int(line.split()[1]) for line in file if line.startswith("btime "))
        started = boot + ticks / os.sysconf("SC_CLK_TCK")
        # btime is in whole seconds: add 2, so that a process that started right after the write counts as newer
        return any(os.stat(name).st_mtime > started + 2 for name in names)
    except (OSError, ValueError, IndexError, StopIteration, subprocess.SubprocessError):
        return False  # the engine does not run, or its start time cannot be read


def _restart(command: tuple[str, ...]) -> None:
    words = " ".join(command)
    if not os.path.isdir("/run/systemd/system"):
        raise HostError(
            f"every file is written, but `{words}` is impossible because systemd does not run here",
            f"restart {command[-1]} by hand",
        )
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"`{words}` failed: {error}", f"`journalctl -u {command[-1]}` says why") from None
    if done.returncode:
        raise HostError(
            f"`{words}` failed: {done.stderr.strip()[-300:]}",
            f"`journalctl -u {command[-1]}` says why; --remove takes everything back",
        )
    print(f"restarted {command[-1]}")
