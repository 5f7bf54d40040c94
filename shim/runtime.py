"""Front end 1: the OCI runtime wrapper.  Equips a container at create, run or restore, then becomes the runtime.

Start-up contract: runs under `python3 -I -S -B`; imports only what a bare interpreter has built in (a test holds
the list); everything that can fail fails before config.json is touched; ends in exec or in exit status 1.
"""

from __future__ import annotations

import posix
import sys
import time

from shim import args as _args
from shim import configjson, engine, errors, files, grants, host, inventory, jsontext, oci, runtimes
from shim.errors import ChandlerError
from shim.inventory import Place
from shim.request import MARK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, NoReturn

    from shim.inventory import Inventory


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
    bundle = None
    if configjson.may_ask(path, engine.needles(stored.config)):
        bundle = _equip(path, stored, place, call, kind, binary, environment, started)
    try:
        _exec(binary, rest, environment)
    except OSError as error:
        if bundle is not None:
            bundle.restore()
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
    from shim import compiler
    return configjson.may_ask(path, [prefix.rstrip("/").encode() for prefix in compiler.prefixes(place)])


def _compiled(place: Place, anew: bool = False) -> Inventory:
    _third_party()
    from shim import compiler
    return compiler.refresh(place) if anew else compiler.load(place)


def _explain(place: Place) -> Any:
    def explain(names: List[str]) -> NoReturn:
        _third_party()
        from shim import compiler
        raise compiler.read_registry(place, compiler.read_config(place)[0]).diagnose(names)
    return explain


def _third_party() -> None:
    """Lets imports find the distribution's packages (YAML), which -S leaves out."""
    import site
    for directory in site.getsitepackages():
        if directory not in sys.path:
            sys.path.append(directory)


def _equip(path: str, stored: Inventory, place: Place, call: _args.Invocation, kind: str, binary: str,
           environment: Dict[bytes, bytes], started: float) -> Any:
    """Edits config.json; None when it turns out that nothing is asked for."""
    config = stored.config
    state_dir = config["state-dir"] or place.state_dir
    if host.exists(grants.nri(state_dir)) and _adjusted(path, config, grants.nri(state_dir), call.id):
        return None
    bundle = configjson.ConfigJson(path, engine.mark(config))
    try:
        source = jsontext.Source(bundle.engine, deep=("linux", "process"))
    except ChandlerError as error:
        raise errors.BundleError(f"{path}: {error.what}") from None
    document = source.value
    try:
        made = engine.plan(document, stored)
    except inventory.Stale:  # the stored inventory lost a part while we read it
        made = engine.plan(document, _compiled(place, anew=True))
    if made is None:
        return None
    if config["require-grant"]:
        raise errors.PolicyError(f"{made.request.source}: the NRI plugin has not served this container, and require-grant is set",
                                 "see that chandler-nri runs and is connected, then create the container anew")
    root = call.root or runtimes.default_root(kind, place.rootless, environment)
    if call.verb == "restore":
        _check_restored(made, grants.read(state_dir, root, call.id), call.id)
    data = source.dumps(engine.equip(document, made, place.rootless))
    before, after = files.digest(bundle.engine), files.digest(data)
    record = {
        "id": call.id, "root": root, "runtime": binary, "config": path, "source": made.request.source,
        "devices": made.names, "physical": made.keys, "before": before, "after": after, "time": int(time.time()),
        "grant": files.digest(jsontext.dumps([made.request.document, made.names])),
    }
    try:
        grants.write(state_dir, record, place.rootless)
    except OSError as error:
        raise errors.HostError(f"the grant cannot be recorded in {grants.directory(state_dir)}: {error.strerror}") from None
    try:
        bundle.write(data, after)
    except ChandlerError:
        grants.remove(state_dir, root, call.id)
        raise
    if config["log.file"]:
        from shim import report
        counts: Dict[str, int] = {}
        for edit in made.edits.items:
            counts[edit[0]] = counts.get(edit[0], 0) + 1
        report.line(config["log.file"], {
            "time": report.now(), "container": call.id, "source": made.request.source, "devices": made.names,
            "edits": counts, "runtime": binary, "before": before, "after": after,
            "ms": int((time.monotonic() - started) * 1000)})
    return bundle


def _adjusted(path: str, config: Dict[str, Any], records: str, container: str) -> bool:
    """Whether the NRI plugin has equipped this container and config.json, not only the record, says so.

    A reply that came too late leaves a record, and a config.json without our mark: then the work is ours.
    """
    record = grants.read(records, "", container)
    if record is None:
        return False
    try:
        document = jsontext.loads(files.read(path, files.MAX_CONFIG_JSON)[0])
    except (OSError, ChandlerError):
        return False  # the ordinary road says what is wrong with it
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, dict) or config["annotation-prefix"] + MARK not in annotations:
        return False
    lost = oci.missing(document, record["nodes"])
    if lost:
        raise errors.BundleError(f"{path}: the NRI plugin granted {lost}, which the container could not open",
                                 "another NRI plugin or the engine has taken it out: see in which order they run")
    return True


def _check_restored(made: engine.Plan, record: Any, container: str) -> None:
    """A process image holds open devices: a restored container gets those that it had, or nothing."""
    if record is not None and record["devices"] != made.names:
        raise errors.BundleError(f"{container} was checkpointed with {', '.join(record['devices']) or 'no device'} and would be "
                                 f"restored with {', '.join(made.names) or 'no device'}", "create it anew")


def _pass_through(program: str, rest: List[str], call: _args.Invocation, place: Place,
                  environment: Dict[bytes, bytes]) -> NoReturn:
    """A verb that is not ours: to the runtime that has the container, whatever the configuration says now."""
    try:
        names = inventory.load(place, _explain(place)).config["runtimes"]
    except inventory.Stale:
        names = _names_from_sources(place)
    fixed = runtimes.fixed_kind(program)
    # where the words are in doubt, any of them may be the container
    ids = [call.id] if call.certain else [word for word in call.words if not word.startswith("-")]
    kind = fixed or runtimes.owner(call.root, [word for word in ids if word], place.rootless, environment)
    binary = runtimes.for_verb(names, kind, place.owners)
    try:
        _exec(binary, rest, environment)
    except OSError as error:
        raise errors.HostError(f"the runtime {binary} cannot be started: {error.strerror}") from None


def _names_from_sources(place: Place) -> List[str]:
    """The configured runtimes; what the launcher has, and the defaults, where it is wrong, which must not stop a delete."""
    from shim import compiler
    try:
        names: List[str] = compiler.read_config(place)[0]["runtimes"]
    except ChandlerError:
        names = [*compiler.launched(), *runtimes.KINDS]
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
