"""A request together with the devices that the kubelet has allocated to its container: one request, not two.

The pod's limits (`chandler.oci/nvidia: 2`) say how many devices of which vendor, so that the scheduler knows.  The
annotation may say the same once more, and how the devices are used.  The kubelet has chosen the devices.
Pure; loaded by creates of containers that have the device plugin's annotation.
"""

from __future__ import annotations

from shim import errors
from shim.gpu import choose, vendors
from shim.request import parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.shapes import Document


def combined(request: parse.Request, names: list[str]) -> parse.Request:
    """The request with the devices that the kubelet has allocated, which are qualified CDI names.

    The policy then judges it like a request for that number of devices.  Raises RequestError where the request asks for
    something else.
    """
    resources = request.resources
    gpu = _gpu(resources.get("gpu") or {}, names, request.source)
    document = {**request.document, "resources": {**resources, "gpu": gpu}}
    return parse.Request(document, request.source, request.allocations)


def _gpu(asked: Document, names: list[str], source: str) -> Document:
    """The value of resources.gpu: what the annotation has, with the number and vendor of what the kubelet allocated."""
    kinds = list(dict.fromkeys(name.partition("=")[0] for name in names))
    given = f"the kubelet allocated {', '.join(names)}, as the container's limits ask"
    if "devices" in asked:
        kind = choose.kind_of(asked.get("vendor", vendors.DEFAULT.name), source)
        if {name if "=" in name else f"{kind}={name}" for name in asked["devices"]} != set(names):
            raise errors.RequestError(
                f"{source}: resources.gpu.devices names {', '.join(asked['devices'])}, and {given}",
                "leave out devices: the kubelet chooses them",
            )
        return asked
    if asked.get("count", len(names)) != len(names):
        raise errors.RequestError(
            f"{source}: resources.gpu.count is {asked['count']}, and {given}",
            "write the same number in both, or leave out count",
        )
    if "vendor" in asked and kinds != [choose.kind_of(asked["vendor"], source)]:
        raise errors.RequestError(
            f"{source}: resources.gpu.vendor is {asked['vendor']}, and {given}",
            "write the resource of the same vendor in the limits, or leave out vendor",
        )
    request = {key: value for key, value in asked.items() if key != "prefer"}  # the kubelet has chosen by its own words
    request["count"] = len(names)
    other = next((kind for kind in kinds if kind != vendors.DEFAULT.kind), "")
    if other:
        request.setdefault("vendor", other)
    return request
