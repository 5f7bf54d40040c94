"""The keys that ordinary requests have: `env`, the limits of `resources`, and `resources.gpu`.

The rows of all other keys are in shim.keys.table, which is loaded only for a request with one of them.  Here a row is a
plain tuple, since to make objects of a class costs every create more than to read its request.  Pure; part of the
create path.

Units: cpu in thousandths of a CPU, memory in bytes.  Source: OCI runtime spec, config-linux.md, "Control groups";
Documentation/scheduler/sched-bwc.rst for the smallest quota.
"""

from __future__ import annotations

from shim import errors
from shim.edits import RESOURCE, Edits
from shim.oci import reader
from shim.policy import words
from shim.request import quantity, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple, Union

    from shim.edits import Edit
    from shim.shapes import Config, Document

    Entry = Union[Tuple[Any, ...], Document]

# An entry says how a key is read: a tuple of
# - a function that gives the normal form of a JSON value, or raises RequestError,
# - a function that gives the JSON value for which the text of a single-value annotation stands,
# - and, where they apply, the marks FREE and OWN_WORD.  An entry of LIMITS has further items instead (see there).
# For an object with fixed members, it is a dict of their entries by name.
FREE = "free"  # such an annotation can set any name in the object, such as env.NAME
OWN_WORD = "own word"  # allow must have the key's own word; a word above it, such as `gpu`, does not grant it

# The first characters of a variable's value that refers to a variable of the host, or to a secret.
HOST_VARIABLE, SECRET = REFERENCES = "$E:", "$S:"


def _env(value: Any) -> Dict[str, str]:
    if not isinstance(value, dict):
        raise values.wrong_value(value, "is not an object of names and texts")
    for name, text in value.items():
        if not name or "=" in name or not name.isprintable() or " " in name:
            raise errors.RequestError(f"{name!r} is no name of a variable")
        if not isinstance(text, str):
            raise errors.RequestError(f"the value of {name} is not a text", "put it in quotes")
        if "\0" in text:
            raise errors.RequestError(f"the value of {name} holds a NUL")
    return dict(value)


# --- limits ---------------------------------------------------------------------------------------------------

_MIN_QUOTA = 1000  # microseconds: the kernel refuses less


def _quantity(scale: int, low: int = 1, high: int = values.MAX_INT) -> Callable[[Any], int]:
    """Reads a quantity.  Its normal form is the quantity times `scale`, a whole number from `low` to `high`."""

    def read(value: Any) -> int:
        amount = quantity.scaled(values.as_text(value), scale)
        if amount < low:
            raise values.wrong_value(value, "is too small")
        if amount > high:
            raise values.wrong_value(value, "is too large")
        return amount

    return read


def _quantity_or_unlimited(value: Any) -> int:
    """Reads a quantity or -1, which means no limit."""
    return -1 if value == -1 or value == "-1" else _BYTES(value)


def _cpuset(value: Any) -> str:
    cpus(values.text(value))
    return str(value)


def cpus(text: str) -> set[int]:
    """The numbers of the CPUs in a list such as 0-3,8 (cpuset(7), list format).  Raises RequestError."""
    numbers: set[int] = set()
    if len(text) > 4096 or not text.isascii():
        raise values.wrong_value(text, "is no list of CPUs", "write for example 0-3,8")
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else True)) or len(part) > 12:
            raise errors.RequestError(f"{text!r} is no list of CPUs", "write for example 0-3,8")
        low, high = int(first), int(last or first)
        if low > high or high > 8191:
            raise errors.RequestError(f"{text!r} is no list of CPUs", "write for example 0-3,8")
        numbers.update(range(low, high + 1))
    return numbers


def check_limits(request: Document, document: Document, config: Config, unified: Callable[[], bool]) -> None:
    """Raises PolicyError where `request`, the resources of a request, loosens a limit that the engine has set, or is
    above the policy's max-cpu or max-memory.

    Where the engine has set none, the kernel's default counts instead, but only for a caller who is not trusted: a
    trusted one may give himself more than others have by default.  `document`: config.json.
    """
    trusted = config["policy.trust"] == "all"
    for key, (_, _, controller, name, file, maximum) in LIMITS.items():
        if key not in request:
            continue
        value = request[key]
        if reader.resource(document, "unified", file, str) is not None:
            raise errors.PolicyError(f"resources.{key}: the engine has set {file} in linux.resources.unified")
        present = reader.resource(document, controller, name, str if key == "cpuset" else int)
        if key == "cpuset":
            loose = bool(present) and not cpus(value) <= cpus(present)
        elif present is None or present <= 0:
            default = _default(key, unified)
            if default is not None and value > default and not trusted:
                raise errors.PolicyError(
                    f"resources.{key} = {value} gives more than the kernel's default of {default}",
                    f"ask for at most {default}, or let the engine set it"
                    if default
                    else "leave it out, or let the engine set it",
                )
            loose = False
        elif key == "cpu":
            period = reader.resource(document, "cpu", "period") or reader.CPU_PERIOD
            loose = value * period > present * 1000
            present = f"{present}/{period} of a CPU"
        else:
            loose = value <= 0 or value > present  # runtimes take 0 for no limit
            if key == "memory_swap" and not loose:
                # OCI's swap is memory and swap together: the sum can shrink while the swap in it grows
                limit = reader.resource(document, "memory", "limit", int) or 0
                loose = 0 < limit <= present and value - request.get("memory", limit) > present - limit
        if loose:
            raise errors.PolicyError(f"resources.{key} = {value} loosens the engine's limit of {present}")
        most = config[f"policy.{maximum}"] if maximum and not trusted else 0  # type: ignore[literal-required]
        if most and not 0 < value <= most:
            unit = "m" if key == "cpu" else ""
            raise errors.PolicyError(
                f"resources.{key} = {value}{unit} is above {maximum} of {words.source_of_policy(config)}, {most}{unit}"
            )


def _default(key: str, unified: Callable[[], bool]) -> Optional[int]:
    """The kernel's default for a resource that a request must not exceed; None where any value only limits.

    CPU shares are relative: a container that has more takes from its siblings.  With cgroup v2 a reservation of memory
    protects memory (memory.low, by default 0), which takes from others.  With v1 it is a limit that applies when memory
    is short.
    Source: Documentation/admin-guide/cgroup-v2.rst; cgroup-v1/memory.rst, "Soft limits"; sched-design-CFS.rst.
    """
    if key == "cpu_shares":
        return 1024
    return 0 if key == "memory_reservation" and unified() else None


def edits(request: Document, document: Document, origin: str) -> Edits:
    """The edits for `request`, the resources of a request.  `document`: config.json, with what the engine has set."""
    items: List[Edit] = []
    for key, value in request.items():
        if key in LIMITS and key != "cpu":
            items.append((RESOURCE, LIMITS[key][2:4], value, origin))
    if "cpu" in request:
        period = reader.resource(document, "cpu", "period") or reader.CPU_PERIOD
        items.append((RESOURCE, ("cpu", "period"), period, origin))
        items.append((RESOURCE, ("cpu", "quota"), max(request["cpu"] * period // 1000, _MIN_QUOTA), origin))
    if "memory" in request and "memory_swap" not in request:
        limit, swap = (reader.resource(document, "memory", key) for key in ("limit", "swap"))
        if type(limit) is int and type(swap) is int and 0 < limit <= swap:
            # OCI's swap is memory and swap together: with a lower memory limit and the same sum, more could be swapped
            items.append((RESOURCE, ("memory", "swap"), request["memory"] + swap - limit, origin))
    return Edits(items)


# --- GPUs -----------------------------------------------------------------------------------------------------


def _names(value: Any) -> List[str]:
    if isinstance(value, list):
        names = [values.as_text(item) for item in value]
    else:
        raise values.wrong_value(value, "is not a list")
    if not names:
        raise errors.RequestError("the list is empty", "leave the key out")
    for name in names:
        if not name.isprintable() or name.strip() != name or "," in name or len(name) > 512:
            raise errors.RequestError(f"{name!r} is no device name")
    return names


# --- the entries -------------------------------------------------------------------------------------------------

_NUMBER = values.number_text
_BYTES = _quantity(1)

# shim.gpu.choose makes the edits of the first four, shim.sharing those of the others.
GPU: Dict[str, Entry] = {
    "count": (values.integer(1, 4096), _NUMBER),
    "vendor": (values.text, str),
    "devices": (_names, values.split_list),
    "prefer": (values.word("numa", "link"), str),
    "sharing": (values.word("exclusive", "mps", "time-slice"), str),
    "mps_pipe_dir": (values.host_path, str, OWN_WORD),
    "mps_log_dir": (values.host_path, str, OWN_WORD),
    "mps_active_thread_percentage": (values.integer(1, 100), _NUMBER),
    "mps_pinned_memory": (_quantity(1, 1 << 20), str),  # bytes of each GPU; the daemon takes whole MiB
    "mps_priority": (values.integer(0, 1), _NUMBER),  # 0 is normal, 1 is below normal
    "time_slice_index": (values.integer(0, 4095), _NUMBER),
    "time_slicing_config_path": (values.host_path, str, OWN_WORD),
    "time_slice": (values.word("default", "short", "medium", "long"), str),
}
SHARING = frozenset(key for key in GPU if key.startswith(("sharing", "mps_", "time_")))  # how GPUs are shared

# An entry, with: controller and key in linux.resources; the file of cgroup v2; the key of [policy] that has the largest
# value, or ''.
LIMITS: Dict[str, Tuple[Any, ...]] = {
    # thousandths of a CPU; times the period, at most a second in microseconds, it must stay below 2**63
    "cpu": (_quantity(1000, high=values.MAX_INT // 1000), str, "cpu", "quota", "cpu.max", "max-cpu"),
    "memory": (_BYTES, str, "memory", "limit", "memory.max", "max-memory"),
    # bytes of memory and swap together
    "memory_swap": (_quantity_or_unlimited, str, "memory", "swap", "memory.swap.max", "max-memory"),
    "memory_reservation": (_BYTES, str, "memory", "reservation", "memory.low", "max-memory"),
    "cpu_shares": (values.integer(2, 262144), _NUMBER, "cpu", "shares", "cpu.weight", ""),
    "cpuset": (_cpuset, str, "cpu", "cpus", "cpuset.cpus", ""),
    "pids_limit": (values.integer(-1), _NUMBER, "pids", "limit", "pids.max", ""),
}
RESOURCES: Dict[str, Entry] = {**LIMITS, "gpu": GPU}
ENTRIES: Dict[str, Entry] = {"env": (_env, str, FREE), "resources": RESOURCES}
