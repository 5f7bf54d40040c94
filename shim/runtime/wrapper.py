"""Front end 1: the OCI runtime wrapper.  Equips a container at create, run or restore, then becomes the runtime.

Start-up contract: runs under `python3 -I -S -B -X utf8`; imports only what a bare interpreter has built in (a test holds
the list); everything that can fail fails before config.json is touched; ends in exec or in exit status 1.
"""

from __future__ import annotations

import posix
import sys
import time

from shim import engine, errors, jsontext
from shim.edits import ENV
from shim.errors import ChandlerError
from shim.host import files, kernel, runtimes
from shim.node import inventory
from shim.node.inventory import Place
from shim.oci import config_file, reader
from shim.policy import caller as _caller
from shim.request import parse
from shim.request.parse import MARK
from shim.runtime import args as _args
from shim.state import grants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, NoReturn, Optional

    from shim.node.inventory import Inventory


def main(argv: List[str]) -> NoReturn:
    """`argv`: how we were called, then the runtime's arguments.  Does not return."""
    started = time.monotonic()
    program, rest = argv[0], argv[1:]
    try:
        _serve(program, rest, started)
    except ChandlerError as error:
        problem = str(error)
    except Exception as error:  # a defect of ours: still one sentence, and the runtime does not start
        problem = f"internal error, {type(error).__name__}: {error}"
    from shim import report

    call = _args.parse(rest, runtimes.fixed_kind(program))
    report.error(problem, call.log, call.log_format)
    sys.exit(1)


def _serve(program: str, rest: List[str], started: float) -> NoReturn:
    environment = _environment()
    place = Place(environment)
    parse.find_libraries = _third_party
    fixed = runtimes.fixed_kind(program)
    call = _args.parse(rest, fixed or "runc")
    if not (call.edited and call.certain):
        # what runc does not know, or does not call a create, may be one to the runtime that we have not chosen yet
        call = _args.parse(rest, fixed)
    if not call.edited:
        _pass_through(program, rest, call, place, environment)
    try:
        stored = _stored(place)
    except ChandlerError:
        if b"CHANDLER_CONFIG" in environment or _may_ask_anyway(place, _args.config_path(call)):
            raise
        _pass_through(program, rest, call, place, environment)
    kind, binary = runtimes.for_create(stored.config, program, place.owners)
    if kind != (fixed or "runc"):
        call = _args.parse(rest, kind)
    path = _args.config_path(call)
    undo = None
    if config_file.may_ask(path, engine.needles(stored.config)):
        undo = _equip(path, stored, place, call, kind, binary, environment, started, program)
    try:
        _exec(binary, rest, environment)
    except OSError as error:
        if undo is not None:
            undo()
        raise errors.HostError(f"the runtime {binary} cannot be started: {error.strerror}") from None


def _stored(place: Place) -> Inventory:
    """The inventory, compiled anew when it is stale."""
    try:
        return inventory.load(place, _explain(place))
    except inventory.Stale:
        return _compiled(place)


def _may_ask_anyway(place: Place, path: str) -> bool:
    """Whether config.json may carry a request, as far as a wrong configuration tells what one looks like.

    A mistake in the configuration must not stop the containers of a whole node that ask for nothing.
    """
    from shim.node import compiler

    return config_file.may_ask(path, [prefix.rstrip("/").encode() for prefix in compiler.prefixes(place)])


def _compiled(place: Place, anew: bool = False) -> Inventory:
    _third_party()
    from shim.node import compiler

    return compiler.refresh(place) if anew else compiler.load(place)


def _explain(place: Place) -> Any:
    def explain(names: List[str]) -> NoReturn:
        _third_party()
        from shim.node import compiler

        raise compiler.read_registry(place, compiler.read_config(place)[0]).diagnose(names)

    return explain


def _third_party() -> None:
    """Off the warm path: lets imports find the distribution's packages, or the virtual environment's (YAML), which -S leaves out."""
    import gc
    import site

    gc.enable()
    directories = site.getsitepackages()
    environment = sys.executable.rpartition("/bin/")[0]
    if files.exists(environment + "/pyvenv.cfg"):
        directories.insert(0, f"{environment}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")
    for directory in directories:
        if directory not in sys.path:
            sys.path.append(directory)


def _equip(
    path: str,
    stored: Inventory,
    place: Place,
    call: _args.Invocation,
    kind: str,
    binary: str,
    environment: Dict[bytes, bytes],
    started: float,
    program: str,
) -> Optional[Callable[[], None]]:
    """Edits config.json, and gives a function that undoes it; None when it turns out that nothing is asked for."""
    config = stored.config
    try:
        state_dir = place.trusted_state_dir(config["state-dir"])
    except ChandlerError:
        if _asks(path, stored, call.id, program):
            raise
        return None
    if files.exists(grants.nri(state_dir)) and _adjusted(path, config, grants.nri(state_dir), call.id):
        return None
    bundle = config_file.ConfigJson(path, engine.mark(config))
    try:
        source = jsontext.Source(bundle.engine, deep=("linux", "process"))
    except ChandlerError as error:
        raise errors.BundleError(f"{path}: {error.what}") from None
    root = runtimes.state_root(call.root, kind, place.rootless, environment, call.bundle)
    directory = path.rpartition("/")[0] or "."
    caller = _caller.of_call(call.root, directory, call.id, source.value, bundle.built(source.value))
    known: Dict[str, Any] = {
        "caller": caller,
        "id": call.id,
        "bundle": directory,
        "handler": program.rpartition("/")[2],
        "rootless": place.rootless,
    }
    checkpointed = None
    if call.verb == "restore":
        from shim.state import records

        checkpointed = records.load(state_dir, root, call.id, call.root)
    caller.restores = call.verb == "restore" and (checkpointed is None or caller.engine != "podman")
    if checkpointed is not None:
        known["restored"] = checkpointed.get("devices", [])
    creation = kernel.creation(root)
    ledger, lease = None, None
    if config["gpu.allocator"] == "leases":
        from shim.state.ledger import Ledger, oci_lease

        ledger, lease = Ledger(state_dir, place.rootless), oci_lease(call.id, root, binary, int(time.time()), creation)
    granting = engine.Granting(state_dir, state_dir, root, call.id, place.rootless, ledger, lease)

    def reserve(known_node: Inventory) -> Optional[engine.Plan]:
        wanted = engine.want(source.value, known_node, known=known, leased=ledger is not None)
        if wanted is None:
            return None
        if ledger is not None:
            ledger.announce()
        return granting.reserve(wanted, call.cgroup_manager)

    try:
        plan = reserve(stored)
    except (inventory.Stale, errors.ChangedError):  # it lost a part while we read it, or a device is another one by now
        plan = reserve(_compiled(place, anew=True))
    if plan is None:
        return None
    try:
        if config["require-grant"]:
            raise errors.PolicyError(
                f"{plan.request.source}: the NRI plugin has not served this container, and require-grant is set",
                "see that chandler-nri runs and is connected, then create the container anew",
            )
        granting.release_with_container()
        granting.prepare()
        if call.verb == "restore":
            _check_restored(plan, checkpointed, call.id)
        equipped = engine.equip(source.value, plan.edits, place.rootless, directory, runtimes.can_map_owners(kind))
        data = source.dumps(equipped)
        given = reader.device_rules(source.value)
        before, after = files.digest(bundle.engine), files.digest(data)
        granting.record(
            {
                "runtime": binary,
                "config": path,
                "before": before,
                "after": after,
                "rules": [rule for rule in reader.device_rules(equipped) if rule not in given],  # for later updates
                "engine": caller.engine,
                **creation,
                "group": reader.cgroups_path(source.value, plan.edits, call.cgroup_manager),
            }
        )
        bundle.write(data, after)
    except BaseException:
        granting.undo()
        raise
    if config["log.file"]:
        _log(config["log.file"], call.id, plan, binary, before, after, started)

    def undo() -> None:
        bundle.restore()
        granting.undo()

    return undo


def _asks(path: str, stored: Inventory, container: str, program: str) -> bool:
    """Whether there is a request in config.json, and not only a word that looks like one.  Raises ChandlerError."""
    document = jsontext.loads(config_file.ConfigJson(path, engine.mark(stored.config)).engine)
    known = {"id": container, "bundle": path.rpartition("/")[0] or ".", "handler": program.rpartition("/")[2]}
    return engine.want(document, stored, known=known) is not None


def _log(target: str, container: str, made: engine.Plan, binary: str, before: str, after: str, started: float) -> None:
    from shim import report

    counts: Dict[str, int] = {}
    for edit in made.edits.items:
        counts[edit[0]] = counts.get(edit[0], 0) + 1
    hidden = any(edit[0] == ENV and type(edit[2]) is not str for edit in made.edits.items)  # shim.host.secrets.Hidden
    more = {} if made.sharing is None else {"sharing": made.sharing.marks}
    report.line(
        target,
        {
            "time": report.now(),
            "container": container,
            "source": made.request.source,
            "devices": made.names,
            # the digest of a config.json with a secret in it would let a reader of the log try values
            "edits": counts,
            "runtime": binary,
            "before": before,
            **({} if hidden else {"after": after}),
            "ms": int((time.monotonic() - started) * 1000),
            **more,
        },
    )


def _adjusted(path: str, config: Dict[str, Any], records_dir: str, container: str) -> bool:
    """Whether the NRI plugin has equipped this container and config.json, not only the record, says so.

    A reply that came too late leaves a record, and a config.json without our mark: then the work is ours.
    """
    from shim.state import records

    record = records.read(records_dir, "", container)
    if record is None:
        return False
    try:
        document = jsontext.loads(files.read(path, files.MAX_CONFIG_JSON)[0])
    except (OSError, ChandlerError):
        return False  # the ordinary road says what is wrong with it
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, dict) or config["annotation-prefix"] + MARK not in annotations:
        return False
    lost = reader.missing(document, record.get("nodes", []))
    if lost:
        raise errors.BundleError(
            f"{path}: the NRI plugin granted {lost}, which the container could not open",
            "another NRI plugin or the engine has taken it out: see in which order they run",
        )
    return True


def _check_restored(made: engine.Plan, record: Any, container: str) -> None:
    """A process image holds open devices: a restored container gets those that it had, or nothing."""
    devices = made.names if record is None else record.get("devices", [])
    if devices != made.names:
        raise errors.BundleError(
            f"{container} was checkpointed with {', '.join(devices) or 'no device'} and would be "
            f"restored with {', '.join(made.names) or 'no device'}",
            "create it anew",
        )
    if record is not None and record.get("grant") != made.digest():
        raise errors.BundleError(
            f"{container} was checkpointed with another request than it would be restored with", "create it anew"
        )


def _pass_through(
    program: str, rest: List[str], call: _args.Invocation, place: Place, environment: Dict[bytes, bytes]
) -> NoReturn:
    """A verb that is not ours: to the runtime that has the container, whatever the configuration says now."""
    state_dir = ""
    try:
        config = inventory.load(place, _explain(place)).config
        names, state_dir = config["runtimes"], config["state-dir"]
    except inventory.Stale:
        names = _names_from_sources(place)
    fixed = runtimes.fixed_kind(program)
    # where the words are in doubt, any of them may be the container
    ids = [call.id] if call.certain else [word for word in call.words if not word.startswith("-")]
    kind = fixed or runtimes.owner(call.root, [word for word in ids if word], place.rootless, environment)
    binary = runtimes.for_verb(names, kind, place.owners)
    if call.verb == "update" and call.certain and kind in ("crun", "youki"):
        from shim.runtime import update

        root = runtimes.state_root(call.root, kind, place.rootless, environment)
        try:
            rest = update.with_devices(rest, call.index, place.trusted_state_dir(state_dir), root, call.id, call.root)
        except ChandlerError:
            pass  # somebody else's records would give somebody else's devices
    try:
        _exec(binary, rest, environment)
    except OSError as error:
        raise errors.HostError(f"the runtime {binary} cannot be started: {error.strerror}") from None


def _names_from_sources(place: Place) -> List[str]:
    """The configured runtimes; what the launcher has, and the defaults, where it is wrong, which must not stop a delete."""
    from shim.node import compiler, launch_line

    try:
        names: List[str] = compiler.read_config(place)[0]["runtimes"]
    except ChandlerError:
        names = [*launch_line.read(place.owners), *runtimes.KINDS]
    return names


def _environment() -> Dict[bytes, bytes]:
    """The environment that we were given: the interpreter adds LC_CTYPE to its own, the kernel has the original."""
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
    """Becomes the runtime; what the interpreter changed at its start is undone.  Raises OSError."""
    from _signal import SIG_DFL, SIGPIPE, SIGXFSZ, signal

    signal(SIGPIPE, SIG_DFL)
    signal(SIGXFSZ, SIG_DFL)
    posix.execve(binary, [binary, *rest], environment)
