"""From the rarer keys of a request, and from references in its variables, to their edits.

Loaded only when a request has one of these keys, or refers to a variable of the host or to a secret.
"""

from __future__ import annotations

import posix

from shim import errors
from shim.edits import DEVICE, ENV, Edits
from shim.gpu import choose, vendors
from shim.host import device_nodes, userns
from shim.keys import common, table
from shim.keys.host_facts import Facts
from shim.oci import reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.edits import Edit
    from shim.node.inventory import Inventory
    from shim.policy.caller import CallFacts
    from shim.request.parse import Request
    from shim.shapes import Config, Document

SECONDS = 5.0  # to read all secrets of a container


def variables(request: Request, config: Config, scope: str, seconds: float = SECONDS) -> Edits:
    """The edits for the request's env, with its references to host variables ($E:) and secrets ($S:) resolved.

    `scope`: the namespace of the pod, or the name of the deployment, to which the secrets belong; '' for none
    (shim.host.secrets).  `seconds`: the time limit for all secrets together.
    Raises ChandlerError, which names the variable and never shows its value.
    """
    from time import monotonic

    from shim.host import secrets

    end = monotonic() + seconds
    owners: dict[int, str] = {}
    items = []
    for name, value in request.env.items():
        kind, rest = value[:3], value[3:]
        try:
            if kind == common.HOST_VARIABLE:
                host_value = posix.environ.get(rest.encode("utf-8", "surrogateescape"))
                if host_value is None:
                    raise errors.HostError(
                        f"Chandler's own environment has no variable {rest!r}", "set it for the engine's service"
                    )
                value = secrets.Hidden(host_value.decode("utf-8", "surrogateescape"))
            elif kind == common.SECRET:
                owners = owners or userns.trusted_owners(userns.user_namespace())
                value = secrets.read(rest, scope, config, owners, max(end - monotonic(), 0.01))
        except errors.ChandlerError as error:
            raise error.within(f"{request.source}: env.{name}") from None
        items.append((ENV, name, value, request.source))
    return Edits(items)


def edits(request: Request, document: Document, inventory: Inventory, config: Config, call_facts: CallFacts) -> Edits:
    """The edits for the rarer keys of a request.

    `document`: config.json.  `config`: the configuration as it is for this container.  `call_facts`: what the front end
    knows of the container (shim.engine.plan).  Raises ChandlerError.
    """
    prefixes = None if config["policy.trust"] == "all" else config["policy.bind-sources"]
    facts = Facts(
        reader.root_path(document, call_facts.get("bundle", "")),
        call_facts.get("id", ""),
        {**config["volumes"], **call_facts.get("volumes", {})},
        prefixes,
        None if call_facts.get("bundle") == "" else document,
    )
    items: list[Edit] = []
    for path, row, value in table.of(request.document):
        if row.edits is not None:
            origin = f"{request.source}: {path}"
            try:
                items += [(*change, origin) for change in row.edits(value, request.document, document, facts)]
            except errors.ChandlerError as error:
                raise error.within(origin) from None
    result = Edits(items)
    _check_gpus(result, inventory, request.source)
    return result


def _check_gpus(changes: Edits, inventory: Inventory, source: str) -> None:
    """Refuses the device node of a GPU under `devices`: neither the policy's counts nor a lease would cover it."""
    nodes = {f"{node['type']}{node['major']}:{node['minor']}": path for _, path, node, _ in changes.of(DEVICE)}
    if not nodes:
        return
    for number, name in choose.gpu_names_by_number(
        dict.fromkeys([*inventory.kinds(), *(vendor.kind for vendor in vendors.with_gpus())]),
        inventory,
        device_nodes.read_gpu_node,
    ).items():
        if number in nodes:
            raise errors.RequestError(
                f"{source}: devices: {nodes[number]} belongs to {name}", "ask for it in resources.gpu"
            )
