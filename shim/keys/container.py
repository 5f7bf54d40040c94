"""Rows of the keys for the container as a whole: its namespaces, root file system and control group.  Pure."""

from __future__ import annotations

from shim import errors
from shim.edits import HOSTNAME, HUGEPAGES, LINUX, NAMESPACE, RESOURCE, ROOT, SYSCTL
from shim.keys.common import FREE
from shim.keys.row import DANGEROUS, HOST, TIGHTEN, Row
from shim.oci import reader
from shim.policy import patterns
from shim.request import objects, quantity, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Callable

    from shim.keys.host_facts import Facts
    from shim.keys.row import Change
    from shim.shapes import Config, Document

# The sysctls of an IPC namespace, besides fs.mqueue.*.  Source: runc, libcontainer/configs/validate.
_IPC_SYSCTLS = frozenset(
    f"kernel.{name}" for name in "msgmax msgmnb msgmni sem shmall shmmax shmmni shm_rmid_forced".split()
)


def hostname(value: Any) -> str:
    """The name of a host."""
    text = values.text(value, 64)
    if set(text) - objects.LETTERS - set(".-") or text[0] in ".-" or text[-1] in ".-" or ".." in text:
        raise values.wrong_value(value, "is no name of a host")
    return text


def _hostname_edits(value: str, request: Document, document: Document, facts: Facts) -> list[Change]:
    if reader.namespace(document, "uts") is None:
        raise errors.RequestError("the container shares the host's name: config.json has no UTS namespace")
    return [(HOSTNAME, "", value)]


def _host_network(value: bool, request: Document, document: Document, facts: Facts) -> list[Change]:
    if not value:
        return []
    items: list[Change] = [(NAMESPACE, "network", None)]
    linux = document.get("linux")
    sysctls = linux.get("sysctl") if isinstance(linux, dict) else None
    # The engine's net.* sysctls are for a network of the container's own.  They must not change the host's network.
    return items + [
        (SYSCTL, name, None) for name in (sysctls if isinstance(sysctls, dict) else ()) if name.startswith("net.")
    ]


def _sysctl_namespace(name: str) -> str:
    """The kind of namespace that a sysctl belongs to: ipc, network, or '' when it belongs to the whole host."""
    if name in _IPC_SYSCTLS or name.startswith("fs.mqueue."):
        return "ipc"
    return "network" if name.startswith("net.") else ""


def _sysctl(name: str) -> str:
    plain = name.replace("/", ".")
    if set(plain) - objects.LETTERS - set("._-") or ".." in plain or plain.startswith(".") or plain.endswith("."):
        raise values.wrong_value(name, "is no name of a sysctl")
    if not _sysctl_namespace(plain):
        raise errors.RequestError(
            f"{name} belongs to the whole host",
            "only net.*, fs.mqueue.* and the kernel's IPC limits are a container's own",
        )
    return plain


def _sysctl_value(value: Any) -> str:
    text = str(value) if type(value) is int else values.text(value)
    if "\n" in text:
        raise values.wrong_value(value, "has more than one line")
    return text


def _sysctls(value: dict[str, str], request: Document, document: Document, facts: Facts) -> list[Change]:
    for name in value:
        kind = _sysctl_namespace(name)
        if reader.namespace(document, kind) is None or kind == "network" and request.get("host_network"):
            raise errors.RequestError(
                f"{name} would be set for the whole host: the container has no {kind} namespace of its own"
            )
    return [(SYSCTL, name, text) for name, text in value.items()]


def _cgroup_parent(value: Any) -> str:
    text = values.text(value, 1024)
    if text.startswith("/"):
        return objects.path(text.rstrip("/") or "/")
    if (
        not text.endswith(".slice")
        or set(text) - objects.LETTERS - set("._-\\:@")
        or ":" in text
        or text.startswith("-")
    ):
        raise values.wrong_value(value, "is neither an absolute path of a control group nor a systemd slice")
    return text


def _cgroup_parent_edits(value: str, request: Document, document: Document, facts: Facts) -> list[Change]:
    """The engine's cgroupsPath moved below another parent, in the form that the engine uses.

    Runtimes know two forms: slice:prefix:name with systemd, and a path.
    """
    present = reader.text(document, "linux", "cgroupsPath")
    slices = present.count(":") == 2
    if slices != value.endswith(".slice") and (present or slices):
        raise errors.RequestError(
            f"{value!r} does not fit the engine's cgroupsPath {present!r}",
            "write a systemd slice, name.slice" if slices else "write a path, /name",
        )
    if slices:
        return [(LINUX, "cgroupsPath", f"{value}:{present.partition(':')[2]}")]
    name = present.rstrip("/").rpartition("/")[2] or facts.container
    if not name or value.endswith(".slice"):
        raise errors.RequestError("config.json has no cgroupsPath to put below it")
    return [(LINUX, "cgroupsPath", f"{value.rstrip('/')}/{name}")]


def _unlisted_parent(parent: str, config: Config) -> Iterator[tuple[str, str, str]]:
    allowed = config["policy.cgroup-parents"]
    if not (
        patterns.below(parent, [prefix for prefix in allowed if prefix.startswith("/")])
        if parent.startswith("/")
        else patterns.matches_any(allowed, parent)
    ):
        yield "cgroup_parent", parent, "cgroup-parents"


# The largest blockIO.weight that gives no more than the kernel's default.  v1: bfq's default.  v2: runtimes write
# 1 + (weight - 10) * 9999 / 990 to io.weight, whose default is 100.  Source: Documentation/block/bfq-iosched.rst,
# Documentation/admin-guide/cgroup-v2.rst; runc, libcontainer/cgroups, ConvertBlkIOToIOWeightValue.
_WEIGHT = {False: 100, True: 19}


def _check_weight(weight: int, document: Document, unified: Callable[[], bool], trusted: bool) -> None:
    if reader.resource(document, "unified", "io.weight", str) is not None:
        raise errors.PolicyError("resources.blkio_weight: the engine has set io.weight in linux.resources.unified")
    present = reader.resource(document, "blockIO", "weight")
    if present and weight > present:
        raise errors.PolicyError(f"resources.blkio_weight = {weight} loosens the engine's limit of {present}")
    if not present and not trusted and weight > _WEIGHT[unified()]:
        raise errors.PolicyError(
            f"resources.blkio_weight = {weight} gives more than the kernel's default",
            f"ask for at most {_WEIGHT[unified()]}, or let the engine set it",
        )


def _page_size(name: str) -> str:
    """The size of a huge page as the kernel and OCI write it: 2MB, 1GB, 64KB.  2M, 2Mi and 2MiB mean the same."""
    text = name[:-1] if name.endswith("B") else name
    for unit in "KMG":  # units of page sizes are always powers of two
        if text.endswith(unit):
            text += "i"
    size = quantity.scaled(text)
    if size < 4096 or size & (size - 1):
        raise values.wrong_value(name, "is no size of a page", "write for example 2Mi or 1Gi")
    for power, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if not size & ((1 << power) - 1):
            return f"{size >> power}{unit}"
    raise values.wrong_value(name, "is no size of a page")


def _check_hugepages(asked: dict[str, int], document: Document, unified: Callable[[], bool], trusted: bool) -> None:
    if any(key.startswith("hugetlb.") for key in reader.unified(document)):
        raise errors.PolicyError("resources.hugepages: the engine has set such limits in linux.resources.unified")
    limits = reader.hugepages(document)
    for size, limit in asked.items():
        if type(limits.get(size)) is int and limit > limits[size]:
            raise errors.PolicyError(
                f"resources.hugepages.{size} = {limit} loosens the engine's limit of {limits[size]}"
            )


ROWS: dict[str, Row] = {
    "hostname": Row((hostname, str), edits=_hostname_edits),
    "host_network": Row(
        objects.FLAG,
        trust=DANGEROUS,
        asks=lambda value: [("host_network", "host_network")] if value else [],
        edits=_host_network,
    ),
    "sysctls": Row(
        (lambda value: objects.mapping(value, _sysctl, _sysctl_value), str, FREE), trust=HOST, edits=_sysctls
    ),
    "read_only_root_fs": Row(
        objects.FLAG,
        trust=TIGHTEN,
        tightens=lambda value, document: value or not reader.readonly_root(document),
        edits=lambda value, *_: [(ROOT, "readonly", value)],
    ),
    "cgroup_parent": Row((_cgroup_parent, str), trust=HOST, unlisted=_unlisted_parent, edits=_cgroup_parent_edits),
    "resources.blkio_weight": Row(
        (values.integer(10, 1000), values.number_text),
        trust=TIGHTEN,
        check=_check_weight,
        edits=lambda value, *_: [(RESOURCE, ("blockIO", "weight"), value)],
    ),
    "resources.hugepages": Row(
        (lambda value: objects.mapping(value, _page_size, objects.amount), str, FREE),
        trust=TIGHTEN,
        check=_check_hugepages,
        edits=lambda value, *_: [(HUGEPAGES, size, limit) for size, limit in value.items()],
    ),
}
