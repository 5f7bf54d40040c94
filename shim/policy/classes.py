"""Checks the rarer keys of a request (mounts, capabilities, users and the like) against the node's policy.

CLASSES is the one table of the trust classes.  shim.policy.permission calls this module when a request has such keys.
Pure: shim.keys.host_facts checks what depends on files of the host.
"""

from __future__ import annotations

from shim import errors
from shim.oci import reader
from shim.policy import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.request.parse import Request
    from shim.shapes import Config, Document


TIGHTEN, NAMED, HOST, DANGEROUS = "tighten", "named", "host-reaching", "dangerous"

# word of allow and deny: its trust class (SECURITY.md, "What a request may do").  A word that only tightens need not
# be in allow.  The default of allow (gpu, env, resources) covers no host-reaching and no dangerous word.  The comments
# name the list of [policy] that must also have what the request names.
CLASSES: dict[str, str] = {
    "cap_drop": TIGHTEN,
    "read_only_root_fs": TIGHTEN,
    "resources.oom_score_adj": TIGHTEN,
    "resources.blkio_weight": TIGHTEN,
    "resources.hugepages": TIGHTEN,
    "gpu.distributed": NAMED,
    "gpu.prefer": NAMED,
    "gpu.mps_active_thread_percentage": NAMED,
    "gpu.mps_pinned_memory": NAMED,
    "gpu.mps_priority": NAMED,
    "gpu.time_slice": NAMED,
    "gpu.time_slice_index": NAMED,
    "command": NAMED,
    "hostname": NAMED,
    "storage.tmpfs": NAMED,
    "storage": HOST,
    "storage.bind": HOST,  # bind-sources
    "storage.named": HOST,  # volumes
    "storage.anonymous": HOST,  # volumes
    "storage.s3": HOST,  # volumes
    "devices": HOST,  # devices
    "env.host": HOST,  # host-variables
    "env.secrets": HOST,  # secrets
    "cgroup_parent": HOST,  # cgroup-parents
    "ulimits": HOST,
    "sysctls": HOST,
    "user": DANGEROUS,
    "extra_groups": DANGEROUS,
    "capabilities": DANGEROUS,  # capabilities
    "host_network": DANGEROUS,
    "privileged": DANGEROUS,
}
_KERNEL = ("/proc", "/sys")
# The largest blockIO.weight that gives no more than the kernel's default.  v1: bfq's default.  v2: runtimes write
# 1 + (weight - 10) * 9999 / 990 to io.weight, whose default is 100.  Source: Documentation/block/bfq-iosched.rst,
# Documentation/admin-guide/cgroup-v2.rst; runc, libcontainer/cgroups, ConvertBlkIOToIOWeightValue.
_WEIGHT = {False: 100, True: 19}
# What `privileged` includes: where one of these words is denied, privileged is denied, too.
_PRIVILEGED_MEANS = ("capabilities", "devices", "gpu.all")


def glob(pattern: str, text: str) -> bool:
    """Whether a text matches a pattern in which * stands for any characters and ? for one character."""
    head, *rest = pattern.split("*")
    if len(text) < len(head) or not _alike(head, text[: len(head)]):
        return False
    if not rest:
        return len(text) == len(head)
    # The first match of each part between two * is enough, since a * takes up any rest.
    at, end = len(head), len(text) - len(rest[-1])
    for part in rest[:-1]:
        while at + len(part) <= end and not _alike(part, text[at : at + len(part)]):
            at += 1
        at += len(part)
        if at > end:
            return False
    return at <= end and _alike(rest[-1], text[end:])


def _alike(pattern: str, text: str) -> bool:
    """Whether a text matches a pattern in which only ? is special."""
    return len(pattern) == len(text) and all(wanted in ("?", actual) for wanted, actual in zip(pattern, text))


def listed(patterns: list[str], text: str) -> bool:
    """Whether a text matches one of some patterns."""
    return any(glob(pattern, text) for pattern in patterns)


def below(path: str, prefixes: list[str]) -> str:
    """The first of `prefixes` that is `path` or one of its parent directories, or ''.  Compares texts and no files."""
    for prefix in prefixes:
        plain = prefix.rstrip("/")
        if path == plain or path.startswith(plain + "/"):
            return plain or "/"
    return ""


def volume(storage: Document) -> str:
    """The name of a storage's volume in [volumes] of the configuration and in policy.volumes."""
    if storage["type"] == "named":
        return str(storage["name"])
    if storage["type"] == "anonymous":
        return "_anon_" + str(storage["target"]).lstrip("/").replace("/", "_")
    return f"_s3_{storage['bucket']}_{storage.get('prefix', '')}"


def asked(request: Request, document: Document) -> Iterator[tuple[str, str, bool]]:
    """What the rarer keys ask for: (word of CLASSES, key of the request, whether it only tightens)."""
    for key, value in request.document.items():
        if key == "storage":
            for storage in value:
                yield f"storage.{storage['type']}", f"storage ({storage['type']})", False
        elif key in ("privileged", "host_network"):
            if value:
                yield key, key, False
        elif key == "read_only_root_fs":
            yield key, key, value or not reader.readonly_root(document)
        elif key == "ulimits":
            yield key, key, _lower(value, document)
        elif key == "command" and not any(value.values()):
            continue
        elif key not in ("env", "resources"):
            yield key, key, CLASSES[key] == TIGHTEN
    for name, value in request.env.items():
        if value.startswith("$E:"):
            yield "env.host", f"env.{name}", False
        elif value.startswith("$S:"):
            yield "env.secrets", f"env.{name}", False


def _lower(limits: dict[str, dict[str, int]], document: Document) -> bool:
    """Whether the engine has set each of these limits to the same value or a higher one."""
    present = reader.rlimits(document)
    for name, limit in limits.items():
        for key, engine_limit in zip(("soft", "hard"), present.get(f"RLIMIT_{name.upper()}", (None, None))):
            if type(engine_limit) is not int or limit[key] < 0 or limit[key] > engine_limit:
                return False
    return True


def check(request: Request, document: Document, config: Config, unified: bool = False) -> None:
    """Raises PolicyError, with the key and the rule, when the policy does not allow what the rarer keys ask for.

    `document`: config.json.  `config`: the configuration as it is for this container.  `unified`: whether this node has
    cgroup v2 only.
    """
    trusted = config["policy.trust"] == "all"
    by = words.by(config)
    for word, key, tightens in asked(request, document):
        words.check_word(request, word, key, config, trusted or tightens)
        for implied in _PRIVILEGED_MEANS if word == "privileged" else ():
            words.check_word(request, implied, key, config, allowed=True)
    _check_engine(request, document, unified, trusted)
    if trusted:
        return
    refusal = next(_unlisted(request, config), None)
    if refusal is None:
        return
    key, value, list_name = refusal
    raise errors.PolicyError(
        f"{request.source}: {key}: {list_name} of {by} has no {value}"
        if list_name
        else f"{request.source}: {key}: {value}",
        "ask the node's administrator",
    )


def _unlisted(request: Request, config: Config) -> Iterator[tuple[str, str, str]]:
    """What the request names and the policy's lists do not have: (key of the request, value, name of the list).

    Where no list could allow the value, the name is '' and the value is a sentence.
    """
    document = request.document
    for name, value in request.env.items():
        if value.startswith("$E:") and not listed(config["policy.host-variables"], value[3:]):
            yield f"env.{name}", value[3:], "host-variables"
        if value.startswith("$S:") and not listed(config["policy.secrets"], value[3:]):
            yield f"env.{name}", value[3:], "secrets"
    for storage in document.get("storage", ()):
        if below(storage["target"], list(_KERNEL)):
            yield "storage", f"{storage['target']} is the kernel's and cannot be mounted over", ""
        if storage["type"] == "bind":
            if not below(storage["source"], config["policy.bind-sources"]):
                yield "storage", f"prefix of {storage['source']}", "bind-sources"
        elif storage["type"] != "tmpfs" and not listed(config["policy.volumes"], volume(storage)):
            yield "storage", volume(storage), "volumes"
    for device in document.get("devices", ()):
        if not listed(config["policy.devices"], device["path"]):
            yield "devices", device["path"], "devices"
    for name in document.get("capabilities", ()):
        if not {name, "ALL"} & set(config["policy.capabilities"]):
            yield "capabilities", name, "capabilities"
    parent = document.get("cgroup_parent")
    if parent is not None:
        allowed = config["policy.cgroup-parents"]
        if not (
            below(parent, [prefix for prefix in allowed if prefix.startswith("/")])
            if parent.startswith("/")
            else listed(allowed, parent)
        ):
            yield "cgroup_parent", parent, "cgroup-parents"


def _check_engine(request: Request, document: Document, unified: bool, trusted: bool) -> None:
    """Raises PolicyError where a request loosens a limit that the engine has set.

    Where the engine has set none, the kernel's default counts, as in shim.policy.permission._check_limits.
    """
    score, present = request.resources.get("oom_score_adj"), reader.oom_score(document)
    if score is not None and score < present:
        raise errors.PolicyError(
            f"{request.source}: resources.oom_score_adj = {score} loosens the engine's {present}: it is "
            "the other containers that would be killed"
        )
    weight = request.resources.get("blkio_weight")
    if weight is not None:
        if reader.resource(document, "unified", "io.weight", str) is not None:
            raise errors.PolicyError(
                f"{request.source}: resources.blkio_weight: the engine has set io.weight in linux.resources.unified"
            )
        present = reader.resource(document, "blockIO", "weight")
        if present and weight > present:
            raise errors.PolicyError(
                f"{request.source}: resources.blkio_weight = {weight} loosens the engine's limit of {present}"
            )
        if not present and weight > _WEIGHT[unified] and not trusted:
            raise errors.PolicyError(
                f"{request.source}: resources.blkio_weight = {weight} gives more than the kernel's default",
                f"ask for at most {_WEIGHT[unified]}, or let the engine set it",
            )
    if "hugepages" in request.resources and any(key.startswith("hugetlb.") for key in reader.unified(document)):
        raise errors.PolicyError(
            f"{request.source}: resources.hugepages: the engine has set such limits in linux.resources.unified"
        )
    limits = reader.hugepages(document)
    for size, limit in request.resources.get("hugepages", {}).items():
        if type(limits.get(size)) is int and limit > limits[size]:
            raise errors.PolicyError(
                f"{request.source}: resources.hugepages.{size} = {limit} loosens the engine's limit of {limits[size]}"
            )


def check_maxima(request: Request, config: Config) -> None:
    """Raises PolicyError when the request asks for a limit above the policy's max-cpu or max-memory."""
    cpu, memory = config["policy.max-cpu"], config["policy.max-memory"]
    for key, name, most, unit in (
        ("cpu", "max-cpu", cpu, "m"),
        ("memory", "max-memory", memory, ""),
        ("memory_reservation", "max-memory", memory, ""),
        ("memory_swap", "max-memory", memory, ""),
    ):
        value = request.resources.get(key)
        if most and value is not None and not 0 < value <= most:
            raise errors.PolicyError(
                f"{request.source}: resources.{key} = {value}{unit} is above {name} of {words.by(config)}, {most}{unit}"
            )
