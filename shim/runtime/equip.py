"""Equips one container: from its config.json to the edited one, with its lease and its grant record.

Every check is made before config.json is replaced.  Part of the create path.
"""

from __future__ import annotations

import time

from shim import engine, errors, jsontext
from shim.edits import ENV
from shim.errors import ChandlerError
from shim.host import files, kernel, runtimes
from shim.node import cdi_check, inventory
from shim.oci import config_file, reader
from shim.policy import caller as _caller
from shim.request.parse import MARK
from shim.runtime import args as _args
from shim.runtime import node_inventory
from shim.state import grants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, Optional

    from shim.node.inventory import Account, Inventory
    from shim.policy.caller import CallFacts
    from shim.shapes import Config


def equip(
    path: str,
    stored: Inventory,
    account: Account,
    call: _args.Invocation,
    kind: str,
    binary: str,
    environment: Dict[bytes, bytes],
    started: float,
    program: str,
) -> Optional[Callable[[], None]]:
    """Grants the container what it asks for and replaces config.json.

    `path`: config.json; `kind`, `binary`: the runtime that will be started; `started`: time.monotonic() at the start,
    for the log; `program`: the name that the engine called.  The result undoes all of it; None when the container
    asks for nothing.  Raises ChandlerError; everything is then as it was.
    """
    config = stored.config
    try:
        state_dir = account.trusted_state_dir(config["state-dir"])
    except ChandlerError:
        # A state directory that cannot be trusted must not stop a container that asks for nothing.
        if _asks(path, stored, call.id, program):
            raise
        return None
    nri_directory = grants.nri_directory(state_dir)
    if files.exists(nri_directory) and _adjusted(path, config, nri_directory, call.id):
        return None
    bundle = config_file.ConfigJson(path, engine.mark(config))
    try:
        source = jsontext.Source(bundle.engine_bytes, deep=("linux", "process"))
    except ChandlerError as error:
        raise errors.BundleError(f"{path}: {error.what}") from None
    root = runtimes.state_root(call.root, kind, account.rootless, environment, call.bundle)
    directory = path.rpartition("/")[0] or "."
    caller = _caller.recognise(call.root, directory, call.id, source.value, bundle.built(source.value))
    call_facts: CallFacts = {
        "caller": caller,
        "id": call.id,
        "bundle": directory,
        "handler": program.rpartition("/")[2],
        "rootless": account.rootless,
    }
    checkpointed = None
    if call.verb == "restore":
        from shim.state import records

        checkpointed = records.load(state_dir, root, call.id, call.root)
    caller.restores = call.verb == "restore" and (checkpointed is None or caller.engine != "podman")
    if checkpointed is not None:
        call_facts["devices"] = checkpointed.get("devices", [])
    creation = kernel.creation(root)
    ledger, lease = None, None
    if config["gpu.allocator"] == "leases":
        from shim.state.ledger import Ledger, oci_lease

        ledger, lease = (
            Ledger(state_dir, account.rootless),
            oci_lease(call.id, root, binary, int(time.time()), creation),
        )
    granting = engine.Granting(state_dir, state_dir, root, call.id, account.rootless, ledger, lease)

    def reserve(known_node: Inventory) -> Optional[engine.Plan]:
        checked = engine.check_request(source.value, known_node, call_facts=call_facts, leased=ledger is not None)
        if checked is None:
            return None
        if ledger is not None:
            ledger.announce()
        return granting.reserve(checked, call.cgroup_manager)

    try:
        plan = reserve(stored)
    except (inventory.Stale, errors.ChangedError, errors.LeaseError) as error:
        # Another process replaced the inventory, or a device has another number by now.
        if isinstance(error, errors.LeaseError) and not cdi_check.moved(stored):
            raise
        plan = reserve(node_inventory.compile_now(account, anew=True))
    if plan is None:
        # A pod's sandbox gets the hook that ends what the pod holds as a whole.
        claim = engine.claims_for_pod(source.value, config, caller)
        if ledger is None or not claim or call.verb == "restore":
            return None
        from shim.state import leases

        equipped = engine.equip(source.value, ledger.hook(leases.sandbox_token(claim)), account.rootless, directory)
        data = source.dumps(equipped)
        bundle.write(data, files.digest(data))
        return bundle.restore
    try:
        if config["require-grant"]:
            raise errors.PolicyError(
                f"{plan.request.source}: the NRI plugin has not served this container, and require-grant is set",
                "see that chandler-nri runs and is connected, then create the container anew",
            )
        if plan.names and call.cgroup_manager == "disabled" and not account.rootless:
            raise errors.RequestError(
                f"{plan.request.source}: --cgroup-manager=disabled: without a control group nothing keeps the "
                "container from other GPUs",
                "call the runtime without this option",
            )
        granting.release_with_container()
        granting.prepare()
        if call.verb == "restore":
            _check_restored(plan, checkpointed, call.id)
        equipped = engine.equip(source.value, plan.edits, account.rootless, directory, runtimes.can_map_owners(kind))
        data = source.dumps(equipped)
        engine_rules = reader.device_rules(source.value)
        before, after = files.digest(bundle.engine_bytes), files.digest(data)
        particulars: grants.Particulars = {
            "runtime": binary,
            "config": path,
            "before": before,
            "after": after,
            "rules": [rule for rule in reader.device_rules(equipped) if rule not in engine_rules],  # for later updates
            "engine": caller.engine,
            "group": reader.cgroups_path(source.value, plan.edits, call.cgroup_manager),
        }
        particulars.update(creation)  # type: ignore[typeddict-item]  # Particulars has all keys of Creation
        granting.record(particulars)
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
    """Whether config.json has a request, rather than a text that looks like one.  Raises ChandlerError."""
    document = jsontext.loads(config_file.ConfigJson(path, engine.mark(stored.config)).engine_bytes)
    call_facts: CallFacts = {
        "id": container,
        "bundle": path.rpartition("/")[0] or ".",
        "handler": program.rpartition("/")[2],
    }
    return engine.check_request(document, stored, call_facts=call_facts) is not None


def _log(target: str, container: str, plan: engine.Plan, binary: str, before: str, after: str, started: float) -> None:
    from shim import report

    counts: Dict[str, int] = {}
    for edit in plan.edits.items:
        counts[edit[0]] = counts.get(edit[0], 0) + 1
    hidden = any(edit[0] == ENV and type(edit[2]) is not str for edit in plan.edits.items)  # shim.host.secrets.Hidden
    more = {} if plan.sharing is None else {"sharing": plan.sharing.marks}
    report.write_log(
        target,
        {
            "time": report.now(),
            "container": container,
            "source": plan.request.source,
            "devices": plan.names,
            "edits": counts,
            "runtime": binary,
            "before": before,
            # With the digest of a config.json that holds a secret, a reader of the log could test guesses.
            **({} if hidden else {"after": after}),
            "ms": int((time.monotonic() - started) * 1000),
            **more,
        },
    )


def _adjusted(path: str, config: Config, records_dir: str, container: str) -> bool:
    """Whether the NRI plugin has equipped this container: config.json must say so, not only the record.

    A reply of the plugin that came too late leaves a record, but no mark in config.json: then the wrapper equips.
    """
    from shim.state import records

    record = records.read(records_dir, "", container)
    if record is None:
        return False
    try:
        document = jsontext.loads(files.read(path, files.MAX_CONFIG_JSON)[0])
    except (OSError, ChandlerError):
        return False  # equip() reports what is wrong with it
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, dict) or config["annotation-prefix"] + MARK not in annotations:
        return False
    missing = reader.first_missing_node(document, record.get("nodes", []))
    if missing:
        raise errors.BundleError(
            f"{path}: the NRI plugin granted {missing}, which the container could not open",
            "another NRI plugin or the engine has taken it out: see in which order they run",
        )
    return True


def _check_restored(plan: engine.Plan, record: Optional[grants.GrantRecord], container: str) -> None:
    """Refuses a restore with other devices or another request than before: the restored processes have the old
    devices open."""
    devices = plan.names if record is None else record.get("devices", [])
    if devices != plan.names:
        raise errors.BundleError(
            f"{container} was checkpointed with {', '.join(devices) or 'no device'} and would be "
            f"restored with {', '.join(plan.names) or 'no device'}",
            "create it anew",
        )
    if record is not None and record.get("grant") != plan.digest():
        raise errors.BundleError(
            f"{container} was checkpointed with another request than it would be restored with", "create it anew"
        )
