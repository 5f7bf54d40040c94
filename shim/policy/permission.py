"""Checks a well-formed request against the node's policy.

Anybody who may start a container can write annotations, so an annotation only asks.  What it gets is decided by the
node's configuration.  Pure; part of the create path.
"""

from __future__ import annotations

from shim import errors
from shim.gpu import vendors
from shim.oci import reader
from shim.policy import words
from shim.request import parse, schema

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Sequence, Tuple

    from shim.shapes import Config, Document


# Chandler sets these variables, and those of the vendor table, from what it granted; a request must not set them.
_OURS_SUFFIX = "_VISIBLE_DEVICES"
_OURS_PREFIX = "CUDA_MPS_"
# These variables decide which code a process loads.
_LOADER_PREFIXES = ("LD_", "PYTHON")
_LOADER = frozenset(("PATH", "GCONV_PATH", "GLIBC_TUNABLES", "BASH_ENV", "ENV"))
_NO_LIMITS = frozenset(("gpu",))
# Limits whose default depends on the version of control groups (`unified` of check).
DEPENDS_ON_CGROUPS = frozenset(("memory_reservation", "blkio_weight"))


def check(
    request: parse.Request, document: Document, config: Config, names: Sequence[str] = (), unified: bool = False
) -> None:
    """Raises PolicyError, with the key and the rule, when the node's policy does not allow the request.

    `document`: config.json.  `config`: the configuration as it is for this container.
    `names`: devices for which other annotations ask (cdi.k8s.io/*); they are checked, too.
    `unified`: whether this node has cgroup v2 only.
    """
    trusted = config["policy.trust"] == "all"
    for word, key in _asked(request) + _asked_by_name(names, "cdi.k8s.io"):
        words.check_word(request, word, key, config, trusted)
    for name in request.env:
        _check_variable(name, request.source, trusted)
    if request.resources.keys() - _NO_LIMITS:
        _check_limits(request, document, unified, trusted)
    if request.rare:
        from shim.policy import classes

        classes.check(request, document, config, unified)
    if not trusted and (config["policy.max-cpu"] or config["policy.max-memory"]):
        from shim.policy import classes

        classes.check_maxima(request, config)


def check_devices(
    request: parse.Request, names: List[str], count: int, aggregates: Sequence[str], config: Config
) -> None:
    """Raises PolicyError when the policy does not allow the kinds, or the number, of the devices that were chosen.

    `names`, `count`: the devices, and how many GPUs they contain (shim.gpu.choose.weighed).
    `aggregates`: those of the names that stand for every device of their kind, also where they are not called `all`.
    """
    trusted = config["policy.trust"] == "all"
    for name in aggregates:
        words.check_word(
            request, "gpu.all", f"resources.gpu: {name}, which stands for every device of its kind,", config, trusted
        )
    if trusted:
        return
    for name in names:
        kind = name.partition("=")[0]
        if kind not in config["policy.kinds"]:
            raise errors.PolicyError(
                f"{request.source}: resources.gpu asks for {name}; kinds of {words.by(config)} has no {kind}"
            )
    limit = config["policy.max-gpus"]
    if count > limit:
        raise errors.PolicyError(
            f"{request.source}: resources.gpu asks for {count} devices; max-gpus of {words.by(config)} is {limit}"
        )


def _asked(request: parse.Request) -> List[Tuple[str, str]]:
    """What a request asks for, defaults included: pairs of a word of allow and deny, and the key of the request."""
    asked = [("env", "env")] if request.env else []
    for key in request.resources:
        if key != "gpu":
            asked.append((f"resources.{key}", f"resources.{key}"))
    if request.gpu is not None:
        names = request.gpu.get("devices")
        if names is None and "count" not in request.gpu:
            asked.append(("gpu.count", "resources.gpu (a count of 1, the default)"))
        asked += [(f"gpu.{key}", f"resources.gpu.{key}") for key in request.gpu if key != "devices"]
        asked += _asked_by_name(names or (), "resources.gpu.devices")
    return asked


def _asked_by_name(names: Sequence[str], key: str) -> List[Tuple[str, str]]:
    """What some names of devices ask for, as `_asked` gives it.

    A qualified name of another kind than the default vendor's also chooses the vendor.
    """
    if not names:
        return []
    asked = [("gpu.devices", key)]
    if any(name.rpartition("=")[2] == "all" for name in names):
        asked.append(("gpu.all", f'{key}: "all"'))
    other = next((name for name in names if "=" in name and name.partition("=")[0] != vendors.DEFAULT.kind), "")
    if other:
        asked.append(("gpu.vendor", f"{key}: {other}"))
    return asked


def _check_variable(name: str, source: str, trusted: bool) -> None:
    """Raises PolicyError for a variable that a request may not set."""
    if (
        name.endswith(_OURS_SUFFIX)
        or name.startswith(_OURS_PREFIX)
        or any(name in vendor.variables for vendor in vendors.VENDORS)
    ):
        raise errors.PolicyError(f"{source}: env.{name} is set by Chandler from what is granted", "remove it")
    if trusted:
        return
    if name.startswith(_LOADER_PREFIXES) or name in _LOADER:
        raise errors.PolicyError(
            f"{source}: env.{name} decides which code is loaded, so a request may not set it",
            'set it in the image, or trust = "all" in [policy]',
        )


def _check_limits(request: parse.Request, document: Document, unified: bool, trusted: bool) -> None:
    """Raises PolicyError where a request loosens a limit that the engine has set.

    Where the engine has set none, the kernel's default counts instead, but only for a caller who is not trusted: a
    trusted one may give himself more than others have by default.
    """
    asked = request.resources
    for key, (controller, name, file) in _LIMITS.items():
        if key not in asked:
            continue
        if reader.resource(document, "unified", file, str) is not None:
            raise errors.PolicyError(
                f"{request.source}: resources.{key}: the engine has set {file} in linux.resources.unified"
            )
        present = reader.resource(document, controller, name, str if key == "cpuset" else int)
        if key == "cpuset":
            loose = bool(present) and not schema.cpus(asked[key]) <= schema.cpus(present)
        elif present is None or present <= 0:
            default = _default(key, unified)
            if default is not None and asked[key] > default and not trusted:
                raise errors.PolicyError(
                    f"{request.source}: resources.{key} = {asked[key]} gives more than the kernel's default of "
                    f"{default}",
                    f"ask for at most {default}, or let the engine set it"
                    if default
                    else "leave it out, or let the engine set it",
                )
            loose = False
        elif key == "cpu":
            period = reader.resource(document, "cpu", "period") or reader.CPU_PERIOD
            loose = asked[key] * period > present * 1000
            present = f"{present}/{period} of a CPU"
        else:
            loose = asked[key] <= 0 or asked[key] > present  # runtimes take 0 for no limit
            if key == "memory_swap" and not loose:
                # OCI's swap is memory and swap together: the sum can shrink while the swap in it grows
                limit = reader.resource(document, "memory", "limit", int) or 0
                loose = 0 < limit <= present and asked[key] - asked.get("memory", limit) > present - limit
        if loose:
            raise errors.PolicyError(
                f"{request.source}: resources.{key} = {asked[key]} loosens the engine's limit of {present}"
            )


def _default(key: str, unified: bool) -> Optional[int]:
    """The kernel's default for a resource that a request must not exceed; None where any value only limits.

    CPU shares are relative: a container that has more takes from its siblings.  With cgroup v2 a reservation of memory
    protects memory (memory.low, by default 0), which takes from others.  With v1 it is a limit that applies when memory
    is short.
    Source: Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/memory.rst, "Soft limits"; sched-design-CFS.rst.
    """
    if key == "cpu_shares":
        return 1024
    return 0 if key == "memory_reservation" and unified else None


# key of the request: (controller and key in linux.resources, file of cgroup v2, a key of linux.resources.unified)
_LIMITS = {
    "cpu": ("cpu", "quota", "cpu.max"),
    "cpu_shares": ("cpu", "shares", "cpu.weight"),
    "cpuset": ("cpu", "cpus", "cpuset.cpus"),
    "memory": ("memory", "limit", "memory.max"),
    "memory_swap": ("memory", "swap", "memory.swap.max"),
    "memory_reservation": ("memory", "reservation", "memory.low"),
    "pids_limit": ("pids", "limit", "pids.max"),
}
