"""What the node allows: the one place that says no to a request that is well formed.

An annotation is a request, written by anybody who may start a container; authority is in the node's
configuration alone.  Pure; part of the create path.
"""

from __future__ import annotations

from shim import errors
from shim.gpu import vendors
from shim.oci import reader
from shim.policy import words
from shim.request import parse, schema

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional, Sequence, Tuple

    Config = Dict[str, Any]

# Set by Chandler from what was granted, like the variables of the vendor table; a request must not say otherwise.
_OURS_SUFFIX = "_VISIBLE_DEVICES"
_OURS_PREFIX = "CUDA_MPS_"
# Variables that decide which code a process loads.
_LOADER_PREFIXES = ("LD_", "PYTHON")
_LOADER = frozenset(("PATH", "GCONV_PATH", "GLIBC_TUNABLES", "BASH_ENV", "ENV"))
_NO_LIMITS = frozenset(("gpu",))
# Limits whose default depends on the version of control groups (`unified` of check).
DEPENDS_ON_CGROUPS = frozenset(("memory_reservation", "blkio_weight"))


def check(
    wish: parse.Request, document: Config, config: Config, names: Sequence[str] = (), unified: bool = False
) -> None:
    """Raises PolicyError, with the key and the rule, when the node's policy does not allow the request, or the
    devices (`names`) that other annotations ask for.  `unified`: whether this node has cgroup v2 alone."""
    trusted = config["policy.trust"] == "all"
    for asked, key in _asked(wish) + _asked_by_name(names, "cdi.k8s.io"):
        words.check_word(wish, asked, key, config, trusted)
    for name in wish.env:
        _check_variable(name, wish.source, trusted)
    if wish.resources.keys() - _NO_LIMITS:
        _check_limits(wish, document, unified, trusted)
    if wish.rare:
        from shim.policy import classes

        classes.check(wish, document, config, unified)
    if not trusted and (config["policy.max-cpu"] or config["policy.max-memory"]):
        from shim.policy import classes

        classes.check_maxima(wish, config)


def check_devices(wish: parse.Request, names: List[str], count: int, aggregates: Sequence[str], config: Config) -> None:
    """Raises PolicyError when the devices that a request comes to are more, or of other kinds, than allowed.

    `aggregates` are the names among them that stand for every device of their kind, whatever they are called.
    """
    trusted = config["policy.trust"] == "all"
    for name in aggregates:
        words.check_word(
            wish, "gpu.all", f"resources.gpu: {name}, which stands for every device of its kind,", config, trusted
        )
    if trusted:
        return
    for name in names:
        kind = name.partition("=")[0]
        if kind not in config["policy.kinds"]:
            raise errors.PolicyError(
                f"{wish.source}: resources.gpu asks for {name}; kinds of {words.by(config)} has no {kind}"
            )
    limit = config["policy.max-gpus"]
    if count > limit:
        raise errors.PolicyError(
            f"{wish.source}: resources.gpu asks for {count} devices; max-gpus of {words.by(config)} is {limit}"
        )


def _asked(wish: parse.Request) -> List[Tuple[str, str]]:
    """What the request means, defaults included, in the words of allow and deny, each with the request's own key."""
    asked = [("env", "env")] if wish.env else []
    for key in wish.resources:
        if key != "gpu":
            asked.append((f"resources.{key}", f"resources.{key}"))
    if wish.gpu is not None:
        named = wish.gpu.get("devices")
        if named is None and "count" not in wish.gpu:
            asked.append(("gpu.count", "resources.gpu (a count of 1, the default)"))
        asked += [(f"gpu.{key}", f"resources.gpu.{key}") for key in wish.gpu if key != "devices"]
        asked += _asked_by_name(named or (), "resources.gpu.devices")
    return asked


def _asked_by_name(names: Sequence[str], key: str) -> List[Tuple[str, str]]:
    """A qualified name chooses the vendor, too, unless that is the default one."""
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


def _check_limits(wish: parse.Request, document: Config, unified: bool, trusted: bool) -> None:
    """A request may tighten what the engine has set, never loosen it.  Where the engine has set nothing the kernel's
    default counts, unless the caller is trusted: he may give himself more than others have by default."""
    asked = wish.resources
    for key, (controller, name, file) in _LIMITS.items():
        if key not in asked:
            continue
        if reader.resource(document, "unified", file, str) is not None:
            raise errors.PolicyError(
                f"{wish.source}: resources.{key}: the engine has set {file} in linux.resources.unified"
            )
        present = reader.resource(document, controller, name, str if key == "cpuset" else int)
        if key == "cpuset":
            loose = bool(present) and not schema.cpus(asked[key]) <= schema.cpus(present)
        elif present is None or present <= 0:
            default = _default(key, unified)
            if default is not None and asked[key] > default and not trusted:
                raise errors.PolicyError(
                    f"{wish.source}: resources.{key} = {asked[key]} gives more than the kernel's default of {default}",
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
                # both together may shrink while the part that may be swapped grows
                limit = reader.resource(document, "memory", "limit", int) or 0
                loose = 0 < limit <= present and asked[key] - asked.get("memory", limit) > present - limit
        if loose:
            raise errors.PolicyError(
                f"{wish.source}: resources.{key} = {asked[key]} loosens the engine's limit of {present}"
            )


def _default(key: str, unified: bool) -> Optional[int]:
    """The most that a container has of a resource while nobody sets anything; None where that is no limit at all.

    A weight is a share of what its siblings have, so more of it is less for them.  With cgroup v2 the reservation of
    memory is a protection (memory.low), whose default is none; with v1 it is a limit that applies when memory is short.
    Source: Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/memory.rst, "Soft limits"; sched-design-CFS.rst.
    """
    if key == "cpu_shares":
        return 1024
    return 0 if key == "memory_reservation" and unified else None


# request key: (controller, key of linux.resources, the file of cgroup v2 that unified would name)
_LIMITS = {
    "cpu": ("cpu", "quota", "cpu.max"),
    "cpu_shares": ("cpu", "shares", "cpu.weight"),
    "cpuset": ("cpu", "cpus", "cpuset.cpus"),
    "memory": ("memory", "limit", "memory.max"),
    "memory_swap": ("memory", "swap", "memory.swap.max"),
    "memory_reservation": ("memory", "reservation", "memory.low"),
    "pids_limit": ("pids", "limit", "pids.max"),
}
