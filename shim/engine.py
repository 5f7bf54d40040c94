"""The road from a container's configuration to the edits that it gets: request, policy, devices, completion.

Every front end takes this road.  Nothing here changes anything; everything that can fail fails here.  Part of the
create path.
"""

from __future__ import annotations

import time

from shim import errors, jsontext
from shim.edits import ANNOTATION, EMPTY, ENV, Edits, merge
from shim.gpu import choose
from shim.host import device_nodes, files, kernel
from shim.keys import resources
from shim.node import cdi_check
from shim.oci import reader, targets, writer
from shim.policy import engines, permission
from shim.request import parse, schema
from shim.state import grants

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional, Tuple

    from shim.node.inventory import Inventory
    from shim.sharing.terms import Sharing
    from shim.state.leases import Lease
    from shim.state.ledger import Ledger


class Plan:
    """What a container is to get: the request, the devices (`names`, and the physical ones, `keys`), the edits.

    An engine that injects CDI devices itself needs the names `by_cdi` and, instead of `edits`, the `beside`.
    `sharing`: how the devices are shared, None when they are not; nothing is set up for it yet.
    """

    __slots__ = ("request", "names", "keys", "edits", "by_cdi", "beside", "sharing")

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
        self.beside = (*before, grant.beside, *after)
        self.sharing = sharing

    def complete(self) -> Plan:
        """With what only the host can say of its edits.  Raises HostError."""
        self.edits = device_nodes.complete(self.edits)
        cdi_check.check_paths(self.edits)
        return self

    def digest(self) -> str:
        """Of the request and the devices: a restored container must come to the same."""
        return files.digest(jsontext.dumps([self.request.document, self.names]))

    def add(self, edits: Edits) -> None:
        """Adds the variables, mounts and hooks that a share of the devices needs."""
        self.edits = merge(self.edits, edits)
        self.beside = (*self.beside, edits)

    def add_hooks(self, hooks: Edits) -> None:
        """Adds hooks, none of which takes another one's place."""
        self.edits = self.edits.beside(hooks)
        self.beside = (*self.beside, hooks)


class Wanted:
    """What a container asks for, checked against the policy, with all that is to be had without knowing its devices.

    `take` chooses these, and is quick: it runs while others wait for the ledger.  Secrets, names that the image has to
    tell, and paths of the host are asked for before and after.
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
    )

    def __init__(
        self,
        request: parse.Request,
        document: Dict[str, Any],
        engine_names: List[str],
        inventory: Inventory,
        config: Dict[str, Any],
        known: Mapping[str, Any],
        leased: bool,
    ) -> None:
        self.request = request
        self._gpu = request.gpu
        self._document = document
        self._engine_names = engine_names
        self._inventory = inventory
        self._config = config
        self._share: Optional[Sharing] = None
        self._built = known.get("built", False)
        self._rootless = known.get("rootless", False)
        self._bundle = known.get("bundle", "")
        # without root no rule counts; in a user namespace no node can be made; what NRI does not tell of rules is not known
        complete = "bundle" in known and not reader.in_user_namespace(document)
        self._rules = [] if self._rootless else reader.opening_rules(document, complete)
        if request.gpu is not None and not schema.SHARING.isdisjoint(request.gpu):
            from shim.sharing import terms

            self._share = terms.wished(request.gpu, document, config, request.source, leased)
        if request.gpu is not None and "restored" in known:
            self._gpu = choose.again(request.gpu, known["restored"], engine_names)
        if request.rare:
            own, more = _rare(request, document, inventory, config, known)
        else:
            own, more = (
                Edits([(ENV, variable, value, request.source) for variable, value in request.env.items()]),
                EMPTY,
            )
        self._before = own, more, resources.edits(request.resources, document, request.source)
        self._training = EMPTY
        if request.gpu and "distributed" in request.gpu:
            from shim.keys import distributed

            self._training = distributed.edits(
                request.gpu["distributed"],
                {**reader.environment(document), **request.env},
                request.source,
                known.get("master", ""),
            )

    def cgroups_path(self, edits: Edits, manager: str) -> str:
        """The container's control group as shim.oci.reader names it, with these edits."""
        return reader.cgroups_path(self._document, edits, manager)

    def take(self, held: Optional[List[Lease]]) -> Plan:
        """The plan, not complete, with devices that are free in the eyes of `held`, the leases of others; None where nobody
        keeps leases.  Raises ChandlerError: LeaseError when devices are short."""
        wish = self.request
        share = self._share
        others = held if share is None or not held else share.seen(held)
        try:
            grant = choose.grant(
                self._gpu, self._engine_names, self._inventory, wish.source, device_nodes.look_at_gpu, others
            )
        except errors.CdiError as error:
            raise error.within(wish.source) from None
        if grant.names and not self._built:
            leased = held is not None
            present = reader.device_numbers(self._document) if leased else {}
            # with root the device rules decide what a container can open
            mounts = reader.bind_sources(self._document) if leased and self._rootless else []
            if present or mounts or self._rules:
                _check_engine_devices(
                    present, mounts, self._rules, grant, self._inventory, wish.source, leased, self._bundle
                )
        permission.check_devices(wish, grant.names, *choose.weighed(grant, self._inventory), self._config)
        if share is not None:
            from shim.sharing import nvidia_tools

            share.place(grant, self._inventory, nvidia_tools.uuid_of)
        mark = Edits(
            [(ANNOTATION, self._config["annotation-prefix"] + parse.MARK, ",".join(grant.names), "for people to read")]
        )
        return Plan(wish, grant, self._before, (self._training, mark), share)


class Granting:
    """A container's grant in the making: its devices reserved, the host prepared, the record written.  `undo` takes back
    whatever of that has been done.

    `records_dir`: where its record goes; `root`: that of its runtime, '' through NRI; `private`: whether a state directory
    that is not there yet is the caller's alone; `ledger`, `lease`: None where no leases are kept.
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

    def reserve(self, wanted: Wanted, manager: str = "", spared: str = "", patient: bool = True) -> Plan:
        """The plan, completed, whose devices no other container holds as long as the lease lasts.

        `manager`: the runtime's cgroup manager, as its option names it; `spared`: the token of a lease that does not count;
        `patient`: whether runtimes may be asked which leases are stale.  Raises ChandlerError, nothing being reserved then.
        """
        if self._ledger is None or self._lease is None:
            self._plan = wanted.take(None).complete()
            return self._plan
        lease = self._lease

        def take(held: List[Lease]) -> Plan:
            plan = wanted.take([other for other in held if other["token"] != spared] if spared else held)
            if lease["owner"] == "oci":
                lease["group"] = wanted.cgroups_path(plan.edits, manager)
            return plan

        try:
            self._plan = self._ledger.allocate(lease, take, patient).complete()
        except BaseException:
            self.undo()
            raise
        return self._plan

    def release_with_container(self) -> None:
        """Gives the container the hook that ends the lease when the container does."""
        if self._ledger is not None and self._lease is not None and self._plan.keys:
            self._plan.add_hooks(self._ledger.hook(self._lease))

    def prepare(self) -> None:
        """Ends what others left on the devices, and sets up what sharing them needs: that ends with the lease, the last
        one of those who share.  Raises ChandlerError."""
        if self._ledger is not None:
            self._ledger.settle(self._plan.keys)
        if self._plan.sharing is not None:
            from shim.sharing import setup

            self._plan.add(setup.begin(self._plan.sharing, self._state_dir))

    def record(self, more: Dict[str, Any]) -> None:
        """Writes the grant record; `more`: what the front end alone knows.  Raises HostError or TrustError."""
        plan = self._plan
        record = {
            "id": self._container,
            "root": self._root,
            "source": plan.request.source,
            "devices": plan.names,
            "physical": plan.keys,
            "time": int(time.time()),
            "grant": plan.digest(),
            **more,
        }
        if self._lease is not None and plan.keys:
            record["token"] = self._lease["token"]  # so that a ledger that is lost is missed
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
        """Forgets the grant, then gives back the lease."""
        if self._recorded:
            grants.remove(self._records_dir, self._root, self._container)
        if self._ledger is not None and self._lease is not None:
            try:
                self._ledger.release({self._lease["token"]})
            except errors.ChandlerError:
                pass  # why the create fails says more, and the next one that is short of devices tries again


def needles(config: Dict[str, Any]) -> List[bytes]:
    """What the text of a config.json holds if it may carry a request (JSON may write the slash as `\\/`)."""
    found = [config["annotation-prefix"].rstrip("/").encode()]
    if config["cdi.annotations"]:
        found.append(b"cdi.k8s.io")
    return found


def mark(config: Dict[str, Any]) -> bytes:
    """What the text of every config.json holds that we wrote."""
    return f'"{config["annotation-prefix"]}{parse.MARK}":'.encode()


def plan(
    document: Dict[str, Any],
    inventory: Inventory,
    container: str = "",
    held: Optional[List[Lease]] = None,
    wish: Optional[parse.Request] = None,
    known: Optional[Mapping[str, Any]] = None,
) -> Optional[Plan]:
    """`want`, its devices taken in the eyes of `held`, completed."""
    wanted = want(document, inventory, container, wish, known, held is not None)
    return None if wanted is None else wanted.take(held).complete()


def want(
    document: Dict[str, Any],
    inventory: Inventory,
    container: str = "",
    wish: Optional[parse.Request] = None,
    known: Optional[Mapping[str, Any]] = None,
    leased: bool = False,
) -> Optional[Wanted]:
    """What a container asks for, or None when that is nothing.  Raises ChandlerError; changes nothing.

    `container`: its name in its pod, from a front end that need not look for it in annotations.  `leased`: whether
    leases are kept here.  `wish`: the request, from a front end that has it already; annotations then say nothing.
    `known`: what the front end knows for certain, of caller (shim.policy.caller), id, bundle (its directory), handler, namespace,
    pod, image, volumes (directories by name), scope and seconds (of and for secrets), restored (the devices that the
    container had), built (config.json is our own work, no engine's), rootless (whether the caller is not root).
    """
    config = inventory.config
    prefix = config["annotation-prefix"]
    engine_names: List[str] = []
    if wish is None:
        annotations = document.get("annotations")
        if not isinstance(annotations, dict):
            return None
        caller = (known or {}).get("caller")
        name, sandbox = (
            (container, False)
            if container
            else engines.container(annotations, caller.engine if caller is not None else "")
        )
        if sandbox:
            return None
        if caller is not None:
            caller.check(annotations, config)
        wish = parse.from_annotations(annotations, prefix, name)
        if config["cdi.annotations"]:
            from shim.cdi import annotations as cdi_annotations

            engine_names = cdi_annotations.parse(annotations)
        if wish is None:
            if not engine_names:
                return None
            wish = parse.Request({}, "annotation cdi.k8s.io/*")
    if type(document.get("process")) is not dict:
        raise errors.BundleError(f"{wish.source}: config.json has no process to equip")
    reader.check_keys(document)
    if config["policy.rule"]:
        config = _ruled(config, document, container, known or {})
    unified = not permission.DEPENDS_ON_CGROUPS.isdisjoint(wish.resources) and kernel.unified_cgroups()
    present = document
    if (
        "oom_score_adj" in wish.resources
        and known
        and "bundle" in known
        and not known.get("built")
        and document["process"].get("oomScoreAdj") is None
    ):
        # what nobody sets is inherited from the runtime, which this process becomes
        present = {**document, "process": {**document["process"], "oomScoreAdj": kernel.oom_score()}}
    permission.check(wish, present, config, engine_names, unified)
    return Wanted(wish, document, engine_names, inventory, config, known or {}, leased)


def _ruled(
    config: Dict[str, Any], document: Dict[str, Any], container: str, known: Mapping[str, Any]
) -> Dict[str, Any]:
    """The configuration with the policy's rule for this container in it."""
    from shim.keys import host_facts
    from shim.policy import rules

    return rules.applied(
        config, document.get("annotations") or {}, {**known, "container": container, "user": host_facts.caller()}
    )


def _rare(
    wish: parse.Request,
    document: Dict[str, Any],
    inventory: Inventory,
    config: Dict[str, Any],
    known: Mapping[str, Any],
) -> Tuple[Edits, Edits]:
    """The request's variables, references to the host resolved, and the edits of the keys that few requests have."""
    from shim.keys import host_facts
    from shim.policy import rules

    scope = known.get("scope")
    if scope is None:
        scope = "".join(
            rules.identity(document.get("annotations") or {}, rules.believed(config, known), known).get("namespace", ())
        )
    return (
        host_facts.variables(wish, config, scope, known.get("seconds", host_facts.SECONDS)),
        host_facts.edits(wish, document, inventory, config, known),
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
    """What the engine itself (or a device plugin, or --device) lets a container open beside its grant is under nobody's
    lease: a GPU, by its node or by a device rule (a container with CAP_MKNOD makes the node itself), or a rule for
    every device of a major number.  Without leases single devices of the engine's are left alone: an orchestrator may
    have chosen them.  `present`, `mounts`, `opening`: the devices by number, the sources of mounts that may bring devices,
    and the device rules that open something (shim.oci.reader).  Raises RequestError.
    """
    rules = [rule for rule in opening if leased or rule[1] is None or rule[2] is None]
    granted = {number for key in grant.keys for number in key.split("+")}
    kinds = dict.fromkeys([*(name.partition("=")[0] for name in grant.names), *inventory.config["policy.kinds"]])
    known = choose.numbers(kinds, inventory, device_nodes.look_at_gpu)
    for number in (*known, *granted):
        if number in present:
            raise errors.RequestError(
                f"{source}: resources.gpu: config.json has a GPU already, {present[number]}, from the engine",
                "ask for GPUs in one way alone",
            )
    others = {number: name for number, name in known.items() if number not in granted}
    for kind, major, minor, words in rules:
        if kind is not None and major is not None and minor is not None:
            opened = others.get(f"{kind}{major}:{minor}")
        else:
            opened = next((name for number, name in others.items() if reader.covers(number, kind, major, minor)), None)
        if opened is not None:
            raise errors.RequestError(
                f"{source}: resources.gpu: {words} opens {opened}, which is not granted",
                "start the container with a rule for its own devices alone, and not as privileged",
            )
    if mounts:
        from shim.oci import engine_mounts

        engine_mounts.check(mounts, others, inventory, kinds, bundle, source)


def equip(
    document: Dict[str, Any], edits: Edits, rootless: bool, bundle: str = "", idmap: bool = True
) -> Dict[str, Any]:
    """config.json with a plan's edits in it, as a new document.  `bundle`: its directory, where root.path is relative;
    `idmap`: whether the runtime takes idmapped mounts.

    Raises HostError or BundleError.
    """
    root = reader.root_path(document, bundle)
    if rootless or reader.in_user_namespace(document):
        from shim.oci import userns_devices

        edits, mounted = userns_devices.split(edits)
        document = writer.apply(
            document, targets.judged(document, mounted, root), idmap=False
        )  # devtmpfs cannot be idmapped
    return writer.apply(document, targets.judged(document, edits, root), idmap=idmap and not rootless)
