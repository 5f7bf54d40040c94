"""Checks a well-formed request against the node's policy.

Anybody who may start a container can write annotations, so an annotation only asks.  What it gets is decided by the
node's configuration.  Pure; part of the create path.
"""

from __future__ import annotations

from shim import errors
from shim.gpu import vendors
from shim.keys import common
from shim.policy import words
from shim.request import parse, schema

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, List, Sequence, Tuple

    from shim.shapes import Config, Document


# Chandler sets these variables, and those of the vendor table, from what it granted; a request must not set them.
_OURS_SUFFIX = "_VISIBLE_DEVICES"
_OURS_PREFIX = "CUDA_MPS_"
# These variables decide which code a process loads.
_LOADER_PREFIXES = ("LD_", "PYTHON")
_LOADER = frozenset(("PATH", "GCONV_PATH", "GLIBC_TUNABLES", "BASH_ENV", "ENV"))
_NO_LIMITS = frozenset(("gpu",))


def _no() -> bool:
    return False


def check(
    request: parse.Request,
    document: Document,
    config: Config,
    names: Sequence[str] = (),
    unified: Callable[[], bool] = _no,
) -> None:
    """Raises PolicyError, with the key and the rule, when the node's policy does not allow the request.

    `document`: config.json.  `config`: the configuration as it is for this container.
    `names`: devices for which other annotations ask (cdi.k8s.io/*); they are checked, too.
    `unified()`: whether this node has cgroup v2 only.
    """
    trusted = config["policy.trust"] == "all"
    for word, key, exact in _asked(request) + _asked_by_name(names, "cdi.k8s.io"):
        words.check_word(request.source, word, key, config, trusted, exact)
    for name in request.env:
        _check_variable(name, request.source, trusted)
    if request.resources.keys() - _NO_LIMITS:
        try:
            common.check_limits(request.resources, document, config, unified)
        except errors.PolicyError as error:
            raise error.within(request.source) from None
    if request.rare:
        from shim.policy import classes

        classes.check(request, document, config, unified)


def check_devices(
    request: parse.Request, names: List[str], count: int, aggregates: Sequence[str], config: Config
) -> None:
    """Raises PolicyError when the policy does not allow the kinds, or the number, of the devices that were chosen.

    `names`, `count`: the devices, and how many GPUs they contain (shim.gpu.choose.count_gpus).
    `aggregates`: those of the names that stand for every device of their kind, also where they are not called `all`.
    """
    trusted = config["policy.trust"] == "all"
    for name in aggregates:
        key = f"resources.gpu: {name}, which stands for every device of its kind,"
        words.check_word(request.source, "gpu.all", key, config, trusted, exact=True)
    if trusted:
        return
    for name in names:
        kind = name.partition("=")[0]
        if kind not in config["policy.kinds"]:
            raise errors.PolicyError(
                f"{request.source}: resources.gpu asks for {name}; kinds of {words.source_of_policy(config)} "
                f"has no {kind}"
            )
    limit = config["policy.max-gpus"]
    if count > limit:
        raise errors.PolicyError(
            f"{request.source}: resources.gpu asks for {count} devices; max-gpus of {words.source_of_policy(config)} "
            f"is {limit}"
        )


def _asked(request: parse.Request) -> List[Tuple[str, str, bool]]:
    """What a request asks for, defaults included: (word of allow and deny, key of the request, whether `allow` must
    have this very word)."""
    asked = [("env", "env", False)] if request.env else []
    for key in request.resources:
        if key != "gpu":
            entry = common.LIMITS.get(key) or schema.rare_entry(common.RESOURCES, key, "resources")
            asked.append((f"resources.{key}", f"resources.{key}", common.OWN_WORD in entry))
    if request.gpu is not None:
        names = request.gpu.get("devices")
        if names is None and "count" not in request.gpu:
            asked.append(("gpu.count", "resources.gpu (a count of 1, the default)", False))
        for key in request.gpu:
            if key != "devices":
                entry = common.GPU.get(key) or schema.rare_entry(common.GPU, key, "resources.gpu")
                asked.append((f"gpu.{key}", f"resources.gpu.{key}", common.OWN_WORD in entry))
        asked += _asked_by_name(names or (), "resources.gpu.devices")
    return asked


def _asked_by_name(names: Sequence[str], key: str) -> List[Tuple[str, str, bool]]:
    """What some names of devices ask for, as `_asked` gives it.

    A qualified name of another kind than the default vendor's also chooses the vendor.
    """
    if not names:
        return []
    asked = [("gpu.devices", key, False)]
    if any(name.rpartition("=")[2] == "all" for name in names):
        asked.append(("gpu.all", f'{key}: "all"', True))
    other = next((name for name in names if "=" in name and name.partition("=")[0] != vendors.DEFAULT.kind), "")
    if other:
        asked.append(("gpu.vendor", f"{key}: {other}", False))
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
