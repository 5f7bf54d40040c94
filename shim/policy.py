"""What the node allows: the one place that says no to a request that is well formed.

An annotation is a request, written by anybody who may start a container; authority is in the node's
configuration alone.  Pure; part of the create path.
"""

from __future__ import annotations

from shim import errors, oci
from shim import request as _request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Sequence, Tuple

    Config = Dict[str, Any]

# Set by Chandler from what was granted; a request must not say otherwise.
_OURS_SUFFIX = "_VISIBLE_DEVICES"
_OURS_PREFIX = "CUDA_MPS_"
_OURS = frozenset(("ZE_AFFINITY_MASK",))
# Variables that decide which code a process loads.
_LOADER_PREFIXES = ("LD_", "PYTHON")
_LOADER = frozenset(("PATH", "GCONV_PATH", "GLIBC_TUNABLES", "BASH_ENV", "ENV"))
_OWN_WORDS = frozenset(("gpu.all", "gpu.mps_pipe_dir", "gpu.mps_log_dir", "gpu.time_slicing_config_path"))


def check(wish: _request.Request, document: Config, config: Config, names: Sequence[str] = ()) -> None:
    """Raises PolicyError, with the key and the rule, when the node's policy does not allow the request, or the
    devices (`names`) that other annotations ask for."""
    trusted = config["policy.trust"] == "all"
    for asked, key in _asked(wish) + _asked_by_name(names, "cdi.k8s.io"):
        check_word(wish, asked, key, config, trusted)
    for name in wish.env:
        _check_variable(name, wish.source, trusted)
    _check_limits(wish, document)
    if wish.rare:
        from shim import reach
        reach.check(wish, document, config)
    if not trusted and (config["policy.max-cpu"] or config["policy.max-memory"]):
        from shim import reach
        reach.check_maxima(wish, config)


def check_word(wish: _request.Request, asked: str, key: str, config: Config, allowed: bool) -> None:
    """Raises PolicyError when what is asked for is denied or, unless it is `allowed` anyway, not allowed."""
    rule = _covers(config["policy.deny"], asked)
    if rule:
        where = config.get("policy.denied-by", {}).get(rule, "[policy]")
        raise errors.PolicyError(f"{wish.source}: {key} is refused by {rule!r} in deny of {where}")
    if not allowed and not _covers(config["policy.allow"], asked):
        raise errors.PolicyError(f"{wish.source}: {key} is not allowed: allow of {by(config)} has no {asked!r}",
                                 "ask the node's administrator")


def by(config: Config) -> str:
    """The part of the configuration that decides: [policy], or the rule that has taken its place (shim.rules)."""
    return str(config.get("policy.by", "[policy]"))


def check_devices(wish: _request.Request, names: List[str], count: int, config: Config) -> None:
    """Raises PolicyError when the devices that a request comes to are more, or of other kinds, than allowed."""
    if config["policy.trust"] == "all":
        return
    for name in names:
        kind = name.partition("=")[0]
        if kind not in config["policy.kinds"]:
            raise errors.PolicyError(f"{wish.source}: resources.gpu asks for {name}; kinds of {by(config)} has no {kind}")
    limit = config["policy.max-gpus"]
    if count > limit:
        raise errors.PolicyError(f"{wish.source}: resources.gpu asks for {count} devices; max-gpus of {by(config)} is {limit}")


def _asked(wish: _request.Request) -> List[Tuple[str, str]]:
    """What is asked for, in the words of allow and deny, each with the request's own key."""
    asked = [("env", "env")] if wish.env else []
    for key in wish.resources:
        if key != "gpu":
            asked.append((f"resources.{key}", f"resources.{key}"))
    for key, value in (wish.gpu or {}).items():
        asked.append((f"gpu.{key}", f"resources.gpu.{key}"))
        if key == "devices":
            asked += _asked_by_name(value, "resources.gpu.devices")[1:]
    if wish.gpu is not None and not wish.gpu:
        asked.append(("gpu", "resources.gpu"))
    return asked


def _asked_by_name(names: Sequence[str], key: str) -> List[Tuple[str, str]]:
    if not names:
        return []
    asked = [("gpu.devices", key)]
    if any(name.rpartition("=")[2] == "all" for name in names):
        asked.append(("gpu.all", f'{key}: "all"'))
    return asked


def _covers(rules: List[str], asked: str) -> str:
    """The rule that covers what is asked: the same words, or words above them.  What reaches to the host, and every
    device, only their own words cover."""
    for rule in rules:
        if asked == rule or asked.startswith(rule + ".") and asked not in _OWN_WORDS:
            return rule
    return ""


def _check_variable(name: str, source: str, trusted: bool) -> None:
    if name.endswith(_OURS_SUFFIX) or name.startswith(_OURS_PREFIX) or name in _OURS:
        raise errors.PolicyError(f"{source}: env.{name} is set by Chandler from what is granted", "remove it")
    if trusted:
        return
    if name.startswith(_LOADER_PREFIXES) or name in _LOADER:
        raise errors.PolicyError(f"{source}: env.{name} decides which code is loaded, so a request may not set it",
                          "set it in the image, or trust = \"all\" in [policy]")


def _check_limits(wish: _request.Request, document: Config) -> None:
    """A request may tighten what the engine has set, never loosen it."""
    asked = wish.resources
    for key, (controller, name, unified) in _LIMITS.items():
        if key not in asked:
            continue
        if oci.resource(document, "unified", unified, str) is not None:
            raise errors.PolicyError(f"{wish.source}: resources.{key}: the engine has set {unified} in linux.resources.unified")
        present = oci.resource(document, controller, name, str if key == "cpuset" else int)
        if key == "cpuset":
            loose = bool(present) and not _request.cpus(asked[key]) <= _request.cpus(present)
        elif present is None or present <= 0:
            loose = False
        elif key == "cpu":
            period = oci.resource(document, "cpu", "period") or oci.CPU_PERIOD
            loose = asked[key] * period > present * 1000
            present = f"{present}/{period} of a CPU"
        else:
            loose = asked[key] <= 0 or asked[key] > present  # runtimes take 0 for no limit
            if key == "memory_swap" and not loose:
                # both together may shrink while the part that may be swapped grows
                limit = oci.resource(document, "memory", "limit", int) or 0
                loose = 0 < limit <= present and asked[key] - asked.get("memory", limit) > present - limit
        if loose:
            raise errors.PolicyError(f"{wish.source}: resources.{key} = {asked[key]} loosens the engine's limit of {present}")


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
