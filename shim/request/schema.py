"""The table of a request's keys: how each is checked and read.

SCHEMA is a tree of the document's keys.  Its leaves are pairs of functions (shim.request.values).  Pure; part of the
create path.
"""

from __future__ import annotations

from shim import errors
from shim.request import quantity, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional

    from shim.shapes import Document


def _quantity(scale: int, low: int = 1, high: int = values.MAX_INT) -> values.Leaf:
    """The leaf of a quantity.  Its normal form is the quantity times `scale`, a whole number from `low` to `high`."""

    def check(value: Any) -> int:
        amount = quantity.scaled(values.as_text(value), scale)
        if amount < low:
            raise values.wrong(value, "is too small")
        if amount > high:
            raise values.wrong(value, "is too large")
        return amount

    return check, str


def _quantity_or_unlimited() -> values.Leaf:
    """The leaf of a quantity or -1, which means no limit."""
    check, text = _quantity(1)
    return lambda value: -1 if value == -1 or value == "-1" else check(value), text


def _cpuset(value: Any) -> str:
    cpus(values.text(value))
    return str(value)


def cpus(text: str) -> set[int]:
    """The numbers of the CPUs in a list such as 0-3,8 (cpuset(7), list format).  Raises RequestError."""
    numbers: set[int] = set()
    if len(text) > 4096 or not text.isascii():
        raise values.wrong(text, "is no list of CPUs", "write for example 0-3,8")
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else True)) or len(part) > 12:
            raise errors.RequestError(f"{text!r} is no list of CPUs", "write for example 0-3,8")
        low, high = int(first), int(last or first)
        if low > high or high > 8191:
            raise errors.RequestError(f"{text!r} is no list of CPUs", "write for example 0-3,8")
        numbers.update(range(low, high + 1))
    return numbers


def _names(value: Any) -> List[str]:
    if isinstance(value, list):
        names = [values.as_text(item) for item in value]
    else:
        raise values.wrong(value, "is not a list")
    if not names:
        raise errors.RequestError("the list is empty", "leave the key out")
    for name in names:
        if not name.isprintable() or name.strip() != name or "," in name or len(name) > 512:
            raise errors.RequestError(f"{name!r} is no device name")
    return names


def _word(*words: str) -> values.Leaf:
    """The leaf of a value that is one of some words."""

    def check(value: Any) -> str:
        if value not in words:
            raise values.wrong(value, f"is not one of {', '.join(words)}")
        return str(value)

    return check, str


def _env(value: Any) -> Dict[str, str]:
    if not isinstance(value, dict):
        raise values.wrong(value, "is not an object of names and texts")
    for name, text in value.items():
        if not name or "=" in name or not name.isprintable() or " " in name:
            raise errors.RequestError(f"{name!r} is no name of a variable")
        if not isinstance(text, str):
            raise errors.RequestError(f"the value of {name} is not a text", "put it in quotes")
        if "\0" in text:
            raise errors.RequestError(f"the value of {name} holds a NUL")
    return dict(value)


_NAMES: values.Leaf = (_names, values.listed)
# The third member says that a single-value annotation can set any name in the object, such as env.NAME.
_ENV = (_env, str, True)

# A text stands for a leaf, or a table, of shim.request.rare_keys, which is loaded only when a request has such a key.
SCHEMA: values.Table = {
    "env": _ENV,
    "command": "command",
    "devices": "devices",
    "storage": "storage",
    "capabilities": "capabilities",
    "cap_drop": "cap_drop",
    "privileged": "flag",
    "host_network": "flag",
    "hostname": "hostname",
    "cgroup_parent": "cgroup_parent",
    "user": "user",
    "sysctls": "sysctls",
    "ulimits": "ulimits",
    "read_only_root_fs": "flag",
    "extra_groups": "extra_groups",
    "resources": {
        # thousandths of a CPU; times the period, at most a second in microseconds, it must stay below 2**63
        "cpu": _quantity(1000, high=values.MAX_INT // 1000),
        "memory": _quantity(1),  # bytes
        "memory_swap": _quantity_or_unlimited(),  # bytes of memory and swap together
        "memory_reservation": _quantity(1),
        "cpu_shares": values.integer(2, 262144),
        "cpuset": (_cpuset, str),
        "pids_limit": values.integer(-1),
        "oom_score_adj": "oom_score_adj",
        "blkio_weight": "blkio_weight",
        "hugepages": "hugepages",
        "gpu": {
            "count": values.integer(1, 4096),
            "vendor": (values.text, str),
            "devices": _NAMES,
            "prefer": _word("numa", "link"),
            "distributed": "distributed",
            "sharing": _word("exclusive", "mps", "time-slice"),
            "mps_pipe_dir": (values.host_path, str),
            "mps_log_dir": (values.host_path, str),
            "mps_active_thread_percentage": values.integer(1, 100),
            "mps_pinned_memory": _quantity(1, 1 << 20),  # bytes of each GPU; the daemon takes whole MiB
            "mps_priority": values.integer(0, 1),  # 0 is normal, 1 is below normal
            "time_slice_index": values.integer(0, 4095),
            "time_slicing_config_path": (values.host_path, str),
            "time_slice": _word("default", "short", "medium", "long"),
        },
    },
}


# keys of resources.gpu that say how GPUs are shared
SHARING = frozenset(key for key in SCHEMA["resources"]["gpu"] if key.startswith(("sharing", "mps_", "time_")))


def check(document: Any, schema: Optional[values.Table] = None, path: str = "") -> Document:
    """The normal form of `document`, an object with the keys of `schema` (by default SCHEMA).

    `path`: the dotted path of this object in the request, for errors.  Raises RequestError, which names the key.
    """
    if not isinstance(document, dict):
        raise values.wrong(document, "is not an object").within(path or "the document")
    schema = SCHEMA if schema is None else schema
    result: Document = {}
    for key, value in document.items():
        where = f"{path}.{key}" if path else key
        entry = schema.get(key)
        if entry is None:
            raise errors.RequestError(f"unknown key {where!r}", f"known here: {', '.join(sorted(schema))}")
        if type(entry) is str:
            entry = leaf(entry)
        if isinstance(entry, dict):
            result[key] = check(value, entry, where)
        else:
            try:
                result[key] = entry[0](value)
            except errors.RequestError as error:
                raise error.within(where) from None
    return result


def leaf(name: str) -> Any:
    """The leaf, or the table, of shim.request.rare_keys for which a text in SCHEMA stands."""
    from shim.request.rare_keys import LEAVES

    return LEAVES[name]
