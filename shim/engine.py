"""From a container's config.json to the edits that it gets, and to a grant.

`check_request` reads the request and asks the policy, `CheckedRequest.choose_devices` chooses devices, `Plan.complete`
looks at the host: up to here nothing is changed.  `Granting` then reserves the devices, prepares the host and writes
the record.  All front ends use these.  Part of the create path.
"""

from __future__ import annotations

import time

from shim import errors, jsontext
from shim.edits import ANNOTATION, EMPTY, ENV, Edits, merge
from shim.gpu import choose
from shim.host import device_nodes, files, kernel
from shim.keys import common
from shim.node import cdi_check
from shim.oci import reader, targets, writer
from shim.policy import engines, permission
from shim.request import parse
from shim.state import grants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional, Tuple

    from shim.node.inventory import Inventory
    from shim.policy.caller import Caller, CallFacts
    from shim.shapes import Config, Document
    from shim.sharing.terms import Sharing
    from shim.state.leases import Lease
    from shim.state.ledger import Ledger


class Plan:
    """What a container is to get.

    `request`; `names`: the devices as CDI names, or kind=number without CDI; `keys`: their physical devices, by which
    leases are kept; `edits`: for config.json.  A runtime that injects CDI devices itself gets the names in `by_cdi` and
    the edits in `own_edits` instead.  `sharing`: how the devices are shared, None when they are not shared.
    """

    __slots__ = ("request", "names", "keys", "edits", "by_cdi", "own_edits", "sharing")

    def __init__(
        self,
        request: parse.Request,
        grant: choose.Grant,
        before: Tuple[Edits, ...],
        after: Tuple[Edits, ...],
        sharing: Optional[Sharing],
    ) -> None:
        self.request = request
        self.names = grant.names
        self.keys = grant.keys
        self.edits = merge(*before, grant.edits, *after)
        self.by_cdi = grant.by_cdi
        self.own_edits = (*before, grant.own_edits, *after)
        self.sharing = sharing

    def complete(self) -> Plan:
        """This plan, with device numbers and modes from the host in its edits.

        Raises HostError when a node or a file that it names is missing, ChangedError when a node has another number
        than when the inventory was compiled.
        """
        self.edits = device_nodes.complete(self.edits)
        cdi_check.check_paths(self.edits)
        return self

    def digest(self) -> str:
        """A digest of the request and the devices: a restored container must have the same."""
        return files.digest(jsontext.dumps([self.request.document, self.names]))

    def add(self, edits: Edits) -> None:
        """Adds the variables, mounts and hooks that sharing the devices needs."""
        self.edits = merge(self.edits, edits)
        self.own_edits = (*self.own_edits, edits)

    def add_hooks(self, hooks: Edits) -> None:
        """Adds hooks.  Hooks replace nothing, so this is cheaper than `add`."""
        self.edits = self.edits.followed_by(hooks)
        self.own_edits = (*self.own_edits, hooks)


class CheckedRequest:
    """A container's request, allowed by the policy, with all edits that do not depend on which devices it gets.

    `choose_devices` must be quick, since other creates wait for the ledger meanwhile.  So secrets and users of the
    image are looked up before it, and paths of the host after it (Plan.complete).
    """

    __slots__ = (
        "request",
        "_gpu",
        "_document",
        "_engine_names",
        "_inventory",
        "_config",
        "_share",
        "_before",
        "_training",
        "_built",
        "_rootless",
        "_bundle",
        "_rules",
        "_closing",
        "_bound",
        "_devices",
        "called",
        "claim",
    )

    def __init__(
        self,
        request: parse.Request,
        document: Document,
        engine_names: List[str],
        inventory: Inventory,
        config: Config,
        call_facts: CallFacts,
        leased: bool,
    ) -> None:
        self.request = request
        # The id of the pod's sandbox, where all containers of the pod share the devices; else ''.
        self.claim = call_facts.get("sandbox", "") if leased and request.pod_wide and request.gpu else ""
        self.called = call_facts.get("called", "")
        self._gpu = request.gpu
        self._document = document
        self._engine_names = engine_names
        self._inventory = inventory
        self._config = config
        self._share: Optional[Sharing] = None
        self._built = call_facts.get("built", False)
        self._rootless = call_facts.get("rootless", False)
        self._bundle = call_facts.get("bundle", "")
        # Without root, runtimes set no device rules.  NRI does not tell all rules.
        self._rules = [] if self._rootless else reader.opening_rules(document, "bundle" in call_facts)
        # Device rules that allow only the engine's devices, and the bind mounts among these (engine_mounts.closing).
        self._closing = EMPTY
        self._bound: List[str] = []
        if self._rules and self._rules[0] is reader.NO_DENIAL and reader.in_user_namespace(document):
            # podman writes no device rules for a user namespace, and its image may have any node.
            from shim.oci import engine_mounts

            del self._rules[0]
            self._closing, self._bound = engine_mounts.closing_rules(document, self._bundle, request.source)
        if request.gpu is not None and not common.SHARING.isdisjoint(request.gpu):
            from shim.sharing import terms

            self._share = terms.requested_sharing(request.gpu, document, config, request.source, leased)
            if self._share is not None:
                self.claim = ""  # containers that share GPUs with each other need no further rule
        self._devices: List[str] = call_facts.get("devices", [])
        if request.gpu is not None and "devices" in call_facts:
            self._gpu = choose.with_devices(request.gpu, self._devices, engine_names)
        if request.rare:
            variables, rare_edits = _rare_edits(request, document, inventory, config, call_facts)
        else:
            variables, rare_edits = (
                Edits([(ENV, variable, value, request.source) for variable, value in request.env.items()]),
                EMPTY,
            )
        self._before = variables, rare_edits, common.edits(request.resources, document, request.source)
        self._training = EMPTY  # the variables of distributed training
        if request.gpu and "distributed" in request.gpu:
            from shim.keys import distributed

            self._training = distributed.edits(
                request.gpu["distributed"],
                {**reader.environment(document), **request.env},
                request.source,
                call_facts.get("master", ""),
            )

    def cgroups_path(self, edits: Edits, manager: str) -> str:
        """linux.cgroupsPath once these edits are made (shim.oci.reader.cgroups_path)."""
        return reader.cgroups_path(self._document, edits, manager)

    def choose_devices(self, held: Optional[List[Lease]]) -> Plan:
        """A plan, not completed yet, with devices that no lease in `held` holds; None: no leases are kept here.

        Raises ChandlerError; LeaseError when too few devices are free.
        """
        request = self.request
        share = self._share
        closing = EMPTY
        others = held if share is None or not held else share.with_shares(held)
        gpu = self._gpu
        if self.claim and others:
            gpu, others = self._of_pod(others)
        try:
            grant = choose.grant(
                gpu, self._engine_names, self._inventory, request.source, device_nodes.read_gpu_node, others
            )
        except errors.CdiError as error:
            raise error.within(request.source) from None
        except errors.LeaseError as error:
            raise (self._as_pods(error, held or []) if self.called else error) from None
        if grant.names and not self._built:
            leased = held is not None
            present = reader.device_numbers(self._document) if leased else {}
            # With root the device rules decide what a container can open, and `_closing` allows these mounts.
            mounts = reader.bind_sources(self._document) if self._rootless else self._bound
            if not leased:
                mounts = []  # an orchestrator may have chosen the device
            if present or mounts or self._rules:
                _check_engine_devices(
                    present, mounts, self._rules, grant, self._inventory, request.source, leased, self._bundle
                )
            closing = self._closing
        permission.check_devices(request, grant.names, *choose.count_gpus(grant, self._inventory), self._config)
        if share is not None:
            from shim.sharing import nvidia_tools

            share.choose_gpus(grant, self._inventory, nvidia_tools.uuid_of)
        mark = Edits(
            [(ANNOTATION, self._config["annotation-prefix"] + parse.MARK, ",".join(grant.names), "for people to read")]
        )
        return Plan(request, grant, self._before, (self._training, mark, closing), share)

    def _as_pods(self, error: errors.LeaseError, held: List[Lease]) -> errors.LeaseError:
        """The error with the names of pods in place of ids, for whoever sees the events of this pod.

        The pods of other namespaces are not named, since not everybody may see them.
        """
        from shim.state import leases

        what, namespace = error.what, self.called.partition("/")[0]
        for lease in held:
            if "called" in lease:
                owner = leases.of_pod(lease) if lease["called"].partition("/")[0] == namespace else "another namespace"
                what = what.replace(lease["id"], owner)
        return errors.LeaseError(
            what,
            "wait for a pod to end (`kubectl get pods` shows it); with the GPUs in the pod's limits "
            "(chandler.oci/nvidia: 1) the scheduler waits for them",
        )

    def _of_pod(self, held: List[Lease]) -> Tuple[Optional[Document], List[Lease]]:
        """resources.gpu with the devices of the pod, if the pod has any yet, and the leases of all others.

        A container with devices of its own from the kubelet does not share those of the pod.
        """
        own = [lease for lease in held if lease.get("claim") == self.claim]
        if not own:
            return self._gpu, held
        names, gpu = own[0]["names"], self._gpu
        if self.request.allocations and sorted(self._devices) != sorted(names):
            self.claim = ""
            return gpu, held
        if not self.request.allocations:
            given = f"the containers of its pod share {', '.join(names)}"
            gpu = choose.with_allocated(self.request.gpu or {}, names, self.request.source, given)
            gpu = choose.with_devices(gpu, names, self._engine_names)
        return gpu, [lease for lease in held if lease not in own]


class Granting:
    """Grants a container its plan in steps: `reserve`, `prepare`, `record`.  `undo` takes back those that were done.

    `state_dir`; `records_dir`: the directory whose grants/ gets the record; `root`: the state directory of the
    container's runtime, '' through NRI; `private`: whether a new state directory is for the caller alone; `ledger`
    and `lease`: None where no leases are kept.
    """

    __slots__ = (
        "_state_dir",
        "_records_dir",
        "_root",
        "_container",
        "_private",
        "_ledger",
        "_lease",
        "_plan",
        "_recorded",
    )

    def __init__(
        self,
        state_dir: str,
        records_dir: str,
        root: str,
        container: str,
        private: bool,
        ledger: Optional[Ledger] = None,
        lease: Optional[Lease] = None,
    ) -> None:
        self._state_dir = state_dir
        self._records_dir = records_dir
        self._root = root
        self._container = container
        self._private = private
        self._ledger = ledger
        self._lease = lease
        self._recorded = False

    def reserve(self, checked: CheckedRequest, manager: str = "", spared: str = "", patient: bool = True) -> Plan:
        """Takes devices, under a lease where leases are kept, and gives the completed plan.

        `manager`: the value of the runtime's --cgroup-manager; `spared`: the token of a lease to ignore; `patient`:
        whether runtimes may be asked which leases are stale when devices are short.  Raises ChandlerError; nothing is
        reserved then.
        """
        if self._ledger is None or self._lease is None:
            self._plan = checked.choose_devices(None).complete()
            return self._plan
        lease = self._lease
        lease.pop("claim", None)  # of a first try
        if checked.request.allocations:
            lease["allocated"] = True

        def choose_devices(held: List[Lease]) -> Plan:
            plan = checked.choose_devices([other for other in held if other["token"] != spared] if spared else held)
            if lease["owner"] == "oci":
                lease["group"] = checked.cgroups_path(plan.edits, manager)
            if checked.claim:
                lease["claim"] = checked.claim
            if checked.called:
                lease["called"] = checked.called
            return plan

        try:
            self._plan = self._ledger.allocate(lease, choose_devices, patient).complete()
        except BaseException:
            self.undo()
            raise
        return self._plan

    def release_with_container(self) -> None:
        """Adds the poststop hook that ends the container's lease."""
        if self._ledger is not None and self._lease is not None and self._plan.keys:
            self._plan.add_hooks(self._ledger.hook(self._lease["token"]))

    def prepare(self) -> None:
        """Ends sharing that nobody uses any more on these devices, and sets up the sharing that this plan needs, which
        lasts until the last of those who share ends.  Raises ChandlerError."""
        if self._ledger is not None:
            self._ledger.restore_gpus(self._plan.keys)
        if self._plan.sharing is not None:
            from shim.sharing import setup

            self._plan.add(setup.begin(self._plan.sharing, self._state_dir))

    def record(self, more: grants.Particulars) -> None:
        """Writes the grant record; `more`: members that only the front end knows.  Raises HostError or TrustError."""
        plan = self._plan
        record: grants.GrantRecord = {
            "id": self._container,
            "root": self._root,
            "source": plan.request.source,
            "devices": plan.names,
            "physical": plan.keys,
            "time": int(time.time()),
            "grant": plan.digest(),
        }
        record.update(more)  # type: ignore[typeddict-item]  # GrantRecord has all keys of Particulars
        if self._lease is not None and plan.keys:
            record["token"] = self._lease["token"]  # tells Ledger.read that leases existed when the ledger is lost
            for key in ("claim", "called", "allocated"):
                if key in self._lease:
                    record[key] = self._lease[key]
        if plan.sharing is not None:
            record["sharing"] = plan.sharing.marks
        self._recorded = True
        try:
            grants.write(self._records_dir, record, self._private)
        except OSError as error:
            raise errors.HostError(
                f"the grant cannot be recorded in {grants.directory(self._records_dir)}: {error.strerror}"
            ) from None

    def undo(self) -> None:
        """Removes the record, then ends the lease."""
        if self._recorded:
            grants.remove(self._records_dir, self._root, self._container)
        if self._ledger is not None and self._lease is not None:
            try:
                self._ledger.release({self._lease["token"]}, undone=True)
            except errors.ChandlerError:
                pass  # the reason for the undo matters more, and the next create that lacks devices tries again


def request_texts(config: Config) -> List[bytes]:
    """Texts of which a config.json with a request holds one.  Without the slash, which JSON may write as `\\/`."""
    texts = [config["annotation-prefix"].rstrip("/").encode()]
    if config["cdi.annotations"]:
        texts.append(b"cdi.k8s.io")
    return texts


def mark(config: Config) -> bytes:
    """The text that every config.json written by Chandler holds."""
    return f'"{config["annotation-prefix"]}{parse.MARK}":'.encode()


def plan(
    document: Document,
    inventory: Inventory,
    container: str = "",
    held: Optional[List[Lease]] = None,
    request: Optional[parse.Request] = None,
    call_facts: Optional[CallFacts] = None,
) -> Optional[Plan]:
    """The completed plan for a container, its devices free of the leases in `held`; None when it asks for nothing.
    Changes nothing."""
    checked = check_request(document, inventory, container, request, call_facts, held is not None)
    return None if checked is None else checked.choose_devices(held).complete()


def check_request(
    document: Document,
    inventory: Inventory,
    container: str = "",
    request: Optional[parse.Request] = None,
    call_facts: Optional[CallFacts] = None,
    leased: bool = False,
) -> Optional[CheckedRequest]:
    """What a container asks for, None when it asks for nothing.  Raises ChandlerError; changes nothing.

    `container`: its name in its pod, where the front end knows it without annotations.  `leased`: whether leases are
    kept here.  `request`: the request, where the front end has it already; annotations are then not read.
    """
    if call_facts is None:
        call_facts = {}
    config = inventory.config
    prefix = config["annotation-prefix"]
    engine_names: List[str] = []
    if request is None:
        annotations = document.get("annotations")
        if not isinstance(annotations, dict):
            return None
        caller = call_facts.get("caller")
        name, sandbox = (
            (container, False)
            if container
            else engines.container(annotations, caller.engine if caller is not None else "")
        )
        if sandbox:
            return None
        if caller is not None:
            caller.check(annotations, config)
        request = parse.from_annotations(annotations, prefix, name)
        if config["cdi.annotations"]:
            from shim.cdi import annotations as cdi_annotations

            engine_names = cdi_annotations.parse(annotations)
        if request is None:
            if not engine_names:
                return None
            request = parse.Request({}, "annotation cdi.k8s.io/*")
        if leased and caller is not None and caller.engine in engines.SANDBOXES:
            # Set by the engine, as for the container's name above.
            sandbox = annotations.get(engines.SANDBOXES[caller.engine], "")
            call_facts = {
                "sandbox": sandbox if type(sandbox) is str else "",
                "called": engines.called(annotations, caller.engine),
                **call_facts,
            }
        if request.allocations:
            request, names = _with_allocations(request)
            call_facts = {**call_facts, "devices": names}
    if type(document.get("process")) is not dict:
        raise errors.BundleError(f"{request.source}: config.json has no process to equip")
    reader.check_keys(document)
    if config["policy.rule"]:
        config = _config_by_rules(config, document, container, call_facts)
    present = document
    if (
        request.rare
        and "bundle" in call_facts
        and not call_facts.get("built")
        and document["process"].get("oomScoreAdj") is None
    ):
        # Where the engine sets none, the container inherits that of the runtime, which this process becomes.
        present = {**document, "process": {**document["process"], "oomScoreAdj": kernel.oom_score()}}
    permission.check(request, present, config, engine_names, kernel.unified_cgroups)
    return CheckedRequest(request, document, engine_names, inventory, config, call_facts, leased)


def _with_allocations(request: parse.Request) -> Tuple[parse.Request, List[str]]:
    """The request together with the devices that the kubelet has allocated to the container, and these devices.

    They are one request, which the policy judges like one for that number of devices.
    """
    from shim.state import allocations

    names = allocations.names(request.allocations, request.source)
    resources = request.resources
    given = f"the kubelet allocated {', '.join(names)}, as the container's limits ask"
    gpu = choose.with_allocated(resources.get("gpu") or {}, names, request.source, given)
    document = {**request.document, "resources": {**resources, "gpu": gpu}}
    return parse.Request(document, request.source, request.allocations, request.pod_wide), names


def claims_for_pod(document: Document, config: Config, caller: Caller) -> str:
    """The id of a sandbox whose pod may ask for GPUs as a whole; '' for any other container.

    Whether the request is right, its containers' creates will say.
    """
    annotations = document.get("annotations")
    if caller.engine not in engines.SANDBOXES or not isinstance(annotations, dict):
        return ""
    if not engines.container(annotations, caller.engine)[1]:
        return ""
    try:
        request = parse.from_annotations(annotations, config["annotation-prefix"], "")
    except errors.ChandlerError:
        return ""
    sandbox = annotations.get(engines.SANDBOXES[caller.engine])
    asks = request is not None and request.pod_wide and request.gpu is not None
    return sandbox if asks and type(sandbox) is str else ""


def _config_by_rules(config: Config, document: Document, container: str, call_facts: CallFacts) -> Config:
    """The configuration with [policy] as the rules make it for this container."""
    from shim.keys import host_facts
    from shim.policy import rules

    return rules.applied(
        config, document.get("annotations") or {}, {**call_facts, "container": container, "user": host_facts.caller()}
    )


def _rare_edits(
    request: parse.Request,
    document: Document,
    inventory: Inventory,
    config: Config,
    call_facts: CallFacts,
) -> Tuple[Edits, Edits]:
    """The request's variables, with references to the host resolved, and the edits of the rarer keys."""
    from shim.keys import rare
    from shim.policy import rules

    scope = call_facts.get("scope")
    if scope is None:
        scope = "".join(
            rules.identity(
                document.get("annotations") or {}, rules.believed_engine(config, call_facts), call_facts
            ).get("namespace", ())
        )
    return (
        rare.variables(request, config, scope, call_facts.get("seconds", rare.SECONDS)),
        rare.edits(request, document, inventory, config, call_facts),
    )


def _check_engine_devices(
    present: Dict[str, str],
    mounts: List[str],
    opening: List[Any],
    grant: choose.Grant,
    inventory: Inventory,
    source: str,
    leased: bool,
    bundle: str,
) -> None:
    """Refuses a grant beside a GPU that the engine, a device plugin or --device gives: no lease covers it.

    Such a GPU comes by its node, by a device rule (a container with CAP_MKNOD makes the node itself) or, without
    root, by a bind mount.  Without leases, rules for single devices are accepted: an orchestrator may have chosen the
    device.  `present`: device numbers with their paths; `mounts`: sources of bind mounts; `opening`: rules that open
    devices (all three from shim.oci.reader).  Raises RequestError.
    """
    rules = [rule for rule in opening if leased or rule[1] is None or rule[2] is None]
    granted = {number for key in grant.keys for number in key.split("+")}
    kinds = dict.fromkeys([*(name.partition("=")[0] for name in grant.names), *inventory.config["policy.kinds"]])
    gpu_names = choose.gpu_names_by_number(kinds, inventory, device_nodes.read_gpu_node)
    for number in (*gpu_names, *granted):
        if number in present:
            raise errors.RequestError(
                f"{source}: resources.gpu: config.json has a GPU already, {present[number]}, from the engine",
                "ask for GPUs in one way alone",
            )
    others = {number: name for number, name in gpu_names.items() if number not in granted}
    for kind, major, minor, words in rules:
        if kind is not None and major is not None and minor is not None:
            opened = others.get(f"{kind}{major}:{minor}")
        else:
            opened = next(
                (name for number, name in others.items() if reader.rule_covers(number, kind, major, minor)), None
            )
        if opened is not None:
            raise errors.RequestError(
                f"{source}: resources.gpu: {words} opens {opened}, which is not granted",
                "start the container with a rule for its own devices alone, and not as privileged",
            )
    if mounts:
        from shim.oci import engine_mounts

        engine_mounts.check(mounts, others, inventory, kinds, bundle, source)


def equip(document: Document, edits: Edits, rootless: bool, bundle: str = "", idmap: bool = True) -> Document:
    """A new config.json with a plan's edits.

    `bundle`: the directory from which a relative root.path counts; `idmap`: whether the runtime knows idmapped mounts.
    Raises HostError or BundleError.
    """
    root = reader.root_path(document, bundle)
    if rootless or reader.in_user_namespace(document):
        from shim.oci import userns_devices

        edits, mounted = userns_devices.split(edits)
        # the mounts of device nodes: devtmpfs cannot be idmapped
        document = writer.apply(document, targets.with_resolved_targets(document, mounted, root), idmap=False)
    return writer.apply(document, targets.with_resolved_targets(document, edits, root), idmap=idmap and not rootless)
