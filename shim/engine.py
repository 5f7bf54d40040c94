"""The road from a container's configuration to the edits that it gets: request, policy, devices, completion.

Every front end takes this road.  Nothing here changes anything; everything that can fail fails here.  Part of the
create path.
"""

from __future__ import annotations

from shim import errors, gpu, host, identity, oci, policy, resources
from shim import request as _request
from shim.edits import ANNOTATION, EMPTY, ENV, Edits, merge

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Mapping, Optional, Tuple

    from shim.inventory import Inventory
    from shim.leases import Lease
    from shim.sharing import Sharing


class Plan:
    """What a container is to get: the request, the devices (`names`, and the physical ones, `keys`), the edits.

    An engine that injects CDI devices itself needs the names `by_cdi` and, instead of `edits`, the `beside`.
    `sharing`: how the devices are shared, None when they are not; nothing is set up for it yet.
    """

    __slots__ = ("request", "names", "keys", "edits", "by_cdi", "beside", "sharing")

    def __init__(self, request: _request.Request, grant: gpu.Grant, edits: Edits, beside: Tuple[Edits, ...],
                 sharing: Optional[Sharing] = None) -> None:
        self.request = request
        self.names = grant.names
        self.keys = grant.keys
        self.edits = edits
        self.by_cdi = grant.by_cdi
        self.beside = beside
        self.sharing = sharing


def needles(config: Dict[str, Any]) -> List[bytes]:
    """What the text of a config.json holds if it may carry a request (JSON may write the slash as `\\/`)."""
    found = [config["annotation-prefix"].rstrip("/").encode()]
    if config["cdi.annotations"]:
        found.append(b"cdi.k8s.io")
    return found


def mark(config: Dict[str, Any]) -> bytes:
    """What the text of every config.json holds that we wrote."""
    return f'"{config["annotation-prefix"]}{_request.MARK}":'.encode()


def plan(document: Dict[str, Any], inventory: Inventory, container: str = "",
         held: Optional[List[Lease]] = None, wish: Optional[_request.Request] = None,
         known: Optional[Mapping[str, Any]] = None) -> Optional[Plan]:
    """The plan for a container, or None when nothing is asked for.  Raises ChandlerError; changes nothing.

    `container`: its name in its pod, from a front end that need not look for it in annotations.  `held`: the leases
    that others have, None where nobody keeps leases.  `wish`: the request, from a front end that has it already;
    annotations then say nothing.  `known`: what the front end knows for certain, of id, bundle (its directory), handler,
    namespace, pod, image, volumes (directories by name), scope and seconds (of and for secrets).
    """
    config = inventory.config
    prefix = config["annotation-prefix"]
    engine_names: List[str] = []
    if wish is None:
        annotations = document.get("annotations")
        if not isinstance(annotations, dict):
            return None
        name, sandbox = (container, False) if container else identity.container(annotations, config["engine"])
        if sandbox:
            return None
        wish = _request.from_annotations(annotations, prefix, name)
        if config["cdi.annotations"]:
            from shim.cdi import annotations as cdi_annotations
            engine_names = cdi_annotations.parse(annotations)
        if wish is None:
            if not engine_names:
                return None
            wish = _request.Request({}, "annotation cdi.k8s.io/*")
    if type(document.get("process")) is not dict:
        raise errors.BundleError(f"{wish.source}: config.json has no process to equip")
    if config["policy.rule"]:
        config = _ruled(config, document, container, known or {})
    policy.check(wish, document, config, engine_names)
    share: Optional[Sharing] = None
    others = held
    if wish.gpu is not None and not _request.SHARING.isdisjoint(wish.gpu):
        from shim import sharing
        share = sharing.wished(wish.gpu, document, config, wish.source, held is not None)
        if share is not None and held:
            others = share.seen(held)
    try:
        grant = gpu.grant(wish.gpu, engine_names, inventory, wish.source, host.look_at_gpu, others)
    except errors.CdiError as error:
        raise error.within(wish.source) from None
    if held is not None and grant.names:
        _check_engine_devices(document, grant, inventory, wish.source)
    policy.check_devices(wish, grant.names, len(grant.keys), config)
    if share is not None:
        from shim import nvtools
        share.place(grant, inventory, nvtools.uuid_of)
    if wish.rare:
        own, more = _rare(wish, document, inventory, config, known or {})
    else:
        own, more = Edits([(ENV, variable, value, wish.source) for variable, value in wish.env.items()]), EMPTY
    limits = resources.edits(wish.resources, document, wish.source)
    training = EMPTY
    if wish.gpu and "distributed" in wish.gpu:
        from shim import training as _training
        training = _training.edits(wish.gpu["distributed"], {**oci.environment(document), **wish.env}, wish.source,
                                   (known or {}).get("master", ""))
    mark = Edits([(ANNOTATION, prefix + _request.MARK, ",".join(grant.names), "for people to read")])
    edits = host.complete(merge(own, more, limits, grant.edits, training, mark))
    host.check_paths(edits)
    return Plan(wish, grant, edits, (own, more, limits, grant.beside, training, mark), share)


def _ruled(config: Dict[str, Any], document: Dict[str, Any], container: str, known: Mapping[str, Any]) -> Dict[str, Any]:
    """The configuration with the policy's rule for this container in it."""
    from shim import facts, rules
    return rules.applied(config, document.get("annotations") or {}, {**known, "container": container, "user": facts.caller()})


def _rare(wish: _request.Request, document: Dict[str, Any], inventory: Inventory, config: Dict[str, Any],
          known: Mapping[str, Any]) -> Tuple[Edits, Edits]:
    """The request's variables, references to the host resolved, and the edits of the keys that few requests have."""
    from shim import facts, rules
    scope = known.get("scope")
    if scope is None:
        scope = "".join(rules.identity(document.get("annotations") or {}, config["engine"], known).get("namespace", ()))
    return (facts.variables(wish, config, scope, known.get("seconds", facts.SECONDS)),
            facts.edits(wish, document, inventory, config, known))


def _check_engine_devices(document: Dict[str, Any], grant: gpu.Grant, inventory: Inventory, source: str) -> None:
    """A GPU that the engine (or a device plugin, or --device) gave the container by itself is under nobody's lease."""
    present = oci.device_numbers(document)
    if not present:
        return
    kinds = dict.fromkeys(name.partition("=")[0] for name in grant.names)
    known = [key for kind in kinds for pick in inventory.picks(kind) for key in inventory.key(f"{kind}={pick}")]
    for key in (*known, *grant.keys):
        for number in key.split("+"):
            if number in present:
                raise errors.RequestError(f"{source}: resources.gpu: config.json has a GPU already, {present[number]}, from the engine",
                                          "ask for GPUs in one way alone")


def equip(document: Dict[str, Any], made: Plan, rootless: bool) -> Dict[str, Any]:
    """config.json with the plan's edits in it, as a new document."""
    return oci.apply(document, made.edits, idmap=not rootless)
