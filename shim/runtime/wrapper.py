"""The OCI runtime wrapper: equips a container at create, run or restore, then becomes the runtime.

It runs under `python3 -I -S -B -X utf8` and imports only modules that are built into the interpreter, besides
Chandler's own (tests/test_hot_path.py has the list).  It ends in exec or with exit status 1.
"""

from __future__ import annotations

import posix
import sys
import time

from shim import engine, errors
from shim.errors import ChandlerError
from shim.host import files, runtimes
from shim.node import inventory
from shim.node.inventory import Account
from shim.oci import config_file
from shim.request import parse
from shim.runtime import args as _args
from shim.runtime import equip, node_inventory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, NoReturn


def main(argv: List[str]) -> NoReturn:
    """`argv`: the name that the engine called, then the runtime's arguments.  Does not return."""
    started = time.monotonic()
    if None in (sys.stdin, sys.stdout, sys.stderr):
        _open_streams()
    program, rest = argv[0], argv[1:]
    try:
        _serve(program, rest, started)
    except ChandlerError as error:
        problem = str(error)
    except MemoryError:
        raise  # see start.py
    except Exception as error:  # a defect in Chandler: the engine still gets one sentence, and no container starts
        problem = f"internal error, {type(error).__name__}: {error}"
    from shim import report

    call = _args.parse(rest, runtimes.fixed_kind(program))
    report.report_refusal(problem, call.log, call.log_format)
    sys.exit(1)


def _open_streams() -> None:
    """Opens /dev/null as each standard stream that the caller has closed; the runtime finds it closed again.

    Otherwise a file of ours would get the stream's number, and an error meant for the caller be written into it.
    """
    while posix.open("/dev/null", posix.O_RDWR | posix.O_CLOEXEC) < 2:
        pass


def _serve(program: str, rest: List[str], started: float) -> NoReturn:
    environment = _environment()
    account = Account(environment)
    parse.find_libraries = node_inventory.find_libraries
    fixed = runtimes.fixed_kind(program)
    call = _args.parse(rest, fixed or "runc")
    if not (call.edited and call.certain):
        # Which runtime serves is not chosen yet.  What is no create to runc may be one to another runtime.
        call = _args.parse(rest, fixed)
    if not call.edited:
        _pass_through(program, rest, call, account, environment)
    try:
        stored = node_inventory.load(account)
    except ChandlerError:
        if b"CHANDLER_CONFIG" in environment or _may_ask_anyway(account, _args.config_path(call)):
            raise
        _pass_through(program, rest, call, account, environment)
    kind, binary = runtimes.for_create(stored.config, program, account.owners)
    if kind != (fixed or "runc"):
        call = _args.parse(rest, kind)
    path = _args.config_path(call)
    undo = None
    if config_file.may_ask(path, engine.request_texts(stored.config)):
        undo = equip.equip(path, stored, account, call, kind, binary, environment, started, program)
    try:
        _exec(binary, rest, environment)
    except OSError as error:
        if undo is not None:
            undo()
        raise errors.HostError(f"the runtime {binary} cannot be started: {error.strerror}") from None


def _may_ask_anyway(account: Account, path: str) -> bool:
    """Whether config.json may carry a request, by the annotation prefixes that can be read from a wrong configuration.

    A mistake in the configuration must not stop the containers of a whole node that ask for nothing.
    """
    from shim.node import compiler

    return config_file.may_ask(path, [prefix.rstrip("/").encode() for prefix in compiler.prefixes(account)])


def _pass_through(
    program: str, rest: List[str], call: _args.Invocation, account: Account, environment: Dict[bytes, bytes]
) -> NoReturn:
    """Any other verb: becomes the runtime that has the container, even if the configuration now names another one."""
    state_dir = ""
    try:
        config = inventory.load(account, node_inventory.explain_missing(account)).config
        names, state_dir = config["runtimes"], config["state-dir"]
    except inventory.Stale:
        names = _names_from_sources(account)
    fixed = runtimes.fixed_kind(program)
    # where the options are not understood, each word may be the container's id
    ids = [call.id] if call.certain else [word for word in call.words if not word.startswith("-")]
    kind = fixed or runtimes.kind_of_container(call.root, [word for word in ids if word], account.rootless, environment)
    binary = runtimes.for_verb(names, kind, account.owners)
    if call.verb == "update" and call.certain and kind in ("crun", "youki"):
        from shim.runtime import update

        root = runtimes.state_root(call.root, kind, account.rootless, environment)
        try:
            trusted = account.trusted_state_dir(state_dir)
        except ChandlerError:
            trusted = ""  # records that somebody else may have written are not used
        if trusted:
            rest = update.with_devices(rest, call, kind, trusted, root, call.id)
    try:
        _exec(binary, rest, environment)
    except OSError as error:
        raise errors.HostError(f"the runtime {binary} cannot be started: {error.strerror}") from None


def _names_from_sources(account: Account) -> List[str]:
    """The configured runtimes.  Where the configuration is wrong, which must not stop a delete: those of the launch
    line, and the defaults."""
    from shim.node import compiler, launch_line

    try:
        names: List[str] = compiler.read_config(account)[0]["runtimes"]
    except ChandlerError:
        names = [*launch_line.read(account.owners), *runtimes.KINDS]
    return names


def _environment() -> Dict[bytes, bytes]:
    """The environment that the engine gave.  The interpreter has added LC_CTYPE to its own copy; the kernel has the
    original."""
    try:
        descriptor = posix.open("/proc/self/environ", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            data = files.read_all(descriptor, 4095, 64 << 20, "/proc/self/environ")
        finally:
            posix.close(descriptor)
    except OSError:
        return dict(posix.environ)
    result: Dict[bytes, bytes] = {}
    for entry in data.split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if equals and name:
            result.setdefault(name, value)
    return result


def _exec(binary: str, rest: List[str], environment: Dict[bytes, bytes]) -> NoReturn:
    """Becomes the runtime, with the signal handling that the interpreter changed at its start put back.  Raises
    OSError."""
    from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal

    signal(SIGPIPE, SIG_DFL)
    signal(SIGXFSZ, SIG_DFL)
    posix.execve(binary, [binary, *rest], environment)
