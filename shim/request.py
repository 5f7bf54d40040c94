"""The request: what a service asks for, read from annotations and checked against one table.

A Request knows no host and no policy.  SCHEMA is a tree of the document's keys; a leaf is a pair of functions:
one that checks a JSON value and gives its normal form, one that reads the text of a single-value annotation.
Pure; part of the create path.
"""

from __future__ import annotations

from shim import errors, jsontext, quantity
from shim.errors import ChandlerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Optional, Tuple

    Document = Dict[str, Any]
    Leaf = Tuple[Callable[[Any], Any], Callable[[str], Any]]

MAX_ANNOTATIONS = 256 << 10
MARK = "granted"  # the annotation that says what was granted: for people, never believed
_SERVICE, _SERVICES = "service", "services"
MAX_INT = (1 << 63) - 1
REFERENCES = ("$E:", "$S:")  # to a variable of the host, to a secret
_PLAIN = frozenset(("env", "resources"))
_RARE = frozenset(("oom_score_adj", "blkio_weight", "hugepages"))


class Request:
    """A checked request: `document` in normal form (every value of the type that the table gives), and `source`,
    the words that name where it came from, such as `annotation chandler.oci/service`."""

    __slots__ = ("document", "source")

    def __init__(self, document: Document, source: str) -> None:
        self.document = document
        self.source = source

    @property
    def gpu(self) -> Optional[Document]:
        gpu: Optional[Document] = self.resources.get("gpu")
        return gpu

    @property
    def resources(self) -> Document:
        resources: Document = self.document.get("resources", {})
        return resources

    @property
    def rare(self) -> bool:
        """Whether it has keys, or references, that a plain request does without (shim.reach, shim.facts)."""
        for value in self.env.values():
            if value.startswith(REFERENCES):
                return True
        return not (self.document.keys() <= _PLAIN and _RARE.isdisjoint(self.resources))

    @property
    def env(self) -> Dict[str, str]:
        env: Dict[str, str] = self.document.get("env", {})
        return env


# --- leaves ---------------------------------------------------------------------------------------------------

def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise errors.RequestError(f"{_shown(value)} is not a text")
    return value


def _number(value: Any, low: int, high: int) -> int:
    if type(value) is not int:
        raise errors.RequestError(f"{_shown(value)} is not a whole number")
    if not low <= value <= high:
        raise errors.RequestError(f"{value} is not between {low} and {high}")
    return value


def number_text(text: str) -> Any:
    """The number that a single-value annotation writes; what is none stays text, for the check to refuse."""
    digits = text[1:] if text.startswith("-") else text
    return int(text) if digits.isdigit() and digits.isascii() and len(digits) < 20 else text


def _integer(low: int, high: int = MAX_INT) -> Leaf:
    return lambda value: _number(value, low, high), number_text


def _as_text(value: Any) -> str:
    if type(value) in (int, float) or isinstance(value, jsontext.Number):  # a float: from YAML
        return str(value)
    return _text(value)


def _quantity(scale: int, low: int = 1, high: int = MAX_INT) -> Leaf:
    def check(value: Any) -> int:
        found = quantity.scaled(_as_text(value), scale)
        if found < low:
            raise errors.RequestError(f"{_shown(value)} is too small")
        if found > high:
            raise errors.RequestError(f"{_shown(value)} is too large")
        return found
    return check, str


def _quantity_or_unlimited() -> Leaf:
    check, text = _quantity(1)
    return lambda value: -1 if value == -1 or value == "-1" else check(value), text


def _cpuset(value: Any) -> str:
    cpus(_text(value))
    return str(value)


def cpus(text: str) -> set[int]:
    """The CPUs of a list such as 0-3,8 (cpuset(7), list format).  Raises RequestError."""
    found: set[int] = set()
    if len(text) > 4096 or not text.isascii():
        raise errors.RequestError(f"{_shown(text)} is no list of CPUs", "write for example 0-3,8")
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() if dash else True)) or len(part) > 12:
            raise errors.RequestError(f"{text!r} is no list of CPUs", "write for example 0-3,8")
        low, high = int(first), int(last or first)
        if low > high or high > 8191:
            raise errors.RequestError(f"{text!r} is no list of CPUs", "write for example 0-3,8")
        found.update(range(low, high + 1))
    return found


def _names(value: Any) -> List[str]:
    if isinstance(value, list):
        names = [_as_text(item) for item in value]
    else:
        raise errors.RequestError(f"{_shown(value)} is not a list")
    if not names:
        raise errors.RequestError("the list is empty", "leave the key out")
    for name in names:
        if not name.isprintable() or name.strip() != name or "," in name or len(name) > 512:
            raise errors.RequestError(f"{name!r} is no device name")
    return names


def _vendor(value: Any) -> str:
    return _text(value)


def _word(*known: str) -> Leaf:
    def check(value: Any) -> str:
        if value not in known:
            raise errors.RequestError(f"{_shown(value)} is not one of {', '.join(known)}")
        return str(value)
    return check, str


def _host_path(value: Any) -> str:
    text = _text(value)
    if not text.startswith("/") or not text.isprintable() or ".." in text.split("/") or len(text) > 1024:
        raise errors.RequestError(f"{_shown(value)} is no absolute path without '..'")
    return text


def _env(value: Any) -> Dict[str, str]:
    if not isinstance(value, dict):
        raise errors.RequestError(f"{_shown(value)} is not an object of names and texts")
    for name, text in value.items():
        if not name or "=" in name or not name.isprintable() or " " in name:
            raise errors.RequestError(f"{name!r} is no name of a variable")
        if not isinstance(text, str):
            raise errors.RequestError(f"the value of {name} is not a text", "put it in quotes")
        if "\0" in text:
            raise errors.RequestError(f"the value of {name} holds a NUL")
    return dict(value)


def _listed(text: str) -> List[str]:
    return [part.strip() for part in text.split(",")]


_NAMES: Leaf = (_names, _listed)
_ENV = (_env, str, True)  # an object of names, any of which a single-value annotation may set

# A text names a leaf, or a table, of shim.leaves, which a plain request does not load.
SCHEMA: Dict[str, Any] = {
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
        # thousandths of a CPU; times a period of at most a second it must be a quota below 2**63
        "cpu": _quantity(1000, high=MAX_INT // 1000),
        "memory": _quantity(1),             # bytes
        "memory_swap": _quantity_or_unlimited(),  # bytes of memory and swap together
        "memory_reservation": _quantity(1),
        "cpu_shares": _integer(2, 262144),
        "cpuset": (_cpuset, str),
        "pids_limit": _integer(-1),
        "oom_score_adj": "oom_score_adj",
        "blkio_weight": "blkio_weight",
        "hugepages": "hugepages",
        "gpu": {
            "count": _integer(1, 4096),
            "vendor": (_vendor, str),
            "devices": _NAMES,
            "prefer": _word("numa", "link"),
            "distributed": "distributed",
            "sharing": _word("exclusive", "mps", "time-slice"),
            "mps_pipe_dir": (_host_path, str),
            "mps_log_dir": (_host_path, str),
            "mps_active_thread_percentage": _integer(1, 100),
            "mps_pinned_memory": _quantity(1, 1 << 20),  # bytes of each GPU; the daemon knows whole MiB
            "mps_priority": _integer(0, 1),              # 0 normal, 1 below
            "time_slice_index": _integer(0, 4095),
            "time_slicing_config_path": (_host_path, str),
            "time_slice": _word("default", "short", "medium", "long"),
        },
    },
}

# keys of resources.gpu that say how GPUs are shared
SHARING = frozenset(key for key in SCHEMA["resources"]["gpu"] if key.startswith(("sharing", "mps_", "time_")))


# --- documents ------------------------------------------------------------------------------------------------

def check(document: Any, schema: Optional[Dict[str, Any]] = None, path: str = "") -> Document:
    """`document` in normal form.  Raises RequestError with the dotted path of the key that is wrong."""
    if not isinstance(document, dict):
        raise errors.RequestError(f"{path or 'the document'}: {_shown(document)} is not an object")
    schema = SCHEMA if schema is None else schema
    result: Document = {}
    for key, value in document.items():
        where = f"{path}.{key}" if path else key
        known = schema.get(key)
        if known is None:
            raise errors.RequestError(f"unknown key {where!r}", f"known here: {', '.join(sorted(schema))}")
        if type(known) is str:
            known = leaf(known)
        if isinstance(known, dict):
            result[key] = check(value, known, where)
        else:
            try:
                result[key] = known[0](value)
            except errors.RequestError as error:
                raise error.within(where) from None
    return result


def leaf(name: str) -> Any:
    """The leaf, or the table, that SCHEMA has under a name."""
    from shim.leaves import LEAVES
    return LEAVES[name]


def parse_document(text: str) -> Any:
    """The value of a request document, JSON or (slower) YAML.  Raises RequestError."""
    try:
        if text.lstrip(" \t\r\n").startswith("{"):
            value = jsontext.loads(text.encode("utf-8", "surrogatepass"), unique=True)
        else:
            from shim.cdi import yamltext
            value = yamltext.load(text)
        jsontext.check_value(value)
        return value
    except ChandlerError as error:
        raise errors.RequestError(error.what, error.todo) from None


def from_annotations(annotations: Dict[str, Any], prefix: str, container: Optional[str]) -> Optional[Request]:
    """The request for one container, or None when its annotations carry none.

    `container` is the name that the engine gave, None where it gives none.  A document of the container's own
    replaces what is there for the whole pod.  Raises RequestError, which names the annotation.
    """
    found = {key[len(prefix):]: value for key, value in annotations.items() if key.startswith(prefix)}
    if not found:
        return None
    size = sum(len(prefix) + len(key) + len(value) for key, value in found.items() if isinstance(value, str))
    if size > MAX_ANNOTATIONS // 4:  # a character has up to four bytes
        size = sum(len((prefix + key + value).encode("utf-8", "surrogatepass")) for key, value in found.items() if isinstance(value, str))
    if size > MAX_ANNOTATIONS:
        raise errors.RequestError(f"the annotations {prefix}* hold {size} bytes, more than {MAX_ANNOTATIONS}")
    if MARK in found:
        raise errors.RequestError(f"annotation {prefix}{MARK} is Chandler's own mark", "remove it")
    pod_wide: Document = {}
    own: Document = {}
    for key, value in found.items():
        if not isinstance(value, str):
            raise errors.RequestError(f"annotation {prefix}{key} is not a text")
        if not (key.isascii() and value.isascii()):
            _check_text(key, f"the name of an annotation {prefix}*")
            _check_text(value, f"annotation {prefix}{key}")
        if key == _SERVICES or key.startswith(_SERVICE + "."):
            own[key] = value
        else:
            pod_wide[key] = value
    mine = _container_document(own, prefix, container) if own else None
    if mine is not None:
        return mine
    return _pod_document(pod_wide, prefix) if pod_wide else None


def _check_text(text: str, where: str) -> None:
    try:
        jsontext.check_text(text)
    except ChandlerError as error:
        raise errors.RequestError(f"{where}: {error.what}") from None


def _container_document(own: Dict[str, str], prefix: str, container: Optional[str]) -> Optional[Request]:
    """The document among `services` and `service.<container>` that is for this container."""
    if container is None:
        keys = ", ".join(prefix + key for key in own)
        raise errors.RequestError(f"{keys}: the engine does not say which container of a pod this is",
                           f"use the annotation {prefix}{_SERVICE}")
    found: List[Tuple[str, Any]] = []
    if _SERVICES in own:
        services = _document(own[_SERVICES], prefix + _SERVICES)
        if not isinstance(services, dict):
            raise errors.RequestError(f"annotation {prefix}{_SERVICES} is not an object of container names")
        if container in services:
            found.append((f"annotation {prefix}{_SERVICES} ({container})", services[container]))
    short = f"{_SERVICE}.{container}"
    if short in own:
        found.append((f"annotation {prefix}{short}", _document(own[short], prefix + short)))
    if len(found) > 1:
        raise errors.RequestError(f"annotations {prefix}{_SERVICES} and {prefix}{short} both ask for {container}",
                           "remove one of them")
    if not found:
        return None
    source, document = found[0]
    return _checked(document, source)


def _pod_document(pod_wide: Dict[str, str], prefix: str) -> Request:
    """`service` and the single values together."""
    document: Any = {}
    sources = []
    if _SERVICE in pod_wide:
        document = _document(pod_wide[_SERVICE], prefix + _SERVICE)
        sources.append(prefix + _SERVICE)
        if not isinstance(document, dict):
            raise errors.RequestError(f"annotation {prefix}{_SERVICE} is not an object")
    for key, text in pod_wide.items():
        if key != _SERVICE:
            _set(document, key, text, prefix + key)
            sources.append(prefix + key)
    return _checked(document, "annotation " + ", ".join(sources))


def _document(text: str, annotation: str) -> Any:
    try:
        return parse_document(text)
    except errors.RequestError as error:
        raise error.within(f"annotation {annotation}") from None


def _checked(document: Any, source: str) -> Request:
    try:
        return Request(check(document), source)
    except errors.RequestError as error:
        raise error.within(source) from None


def _set(document: Document, key: str, text: str, annotation: str) -> None:
    """Puts a single value at its dotted path; the table says where the path ends and how the text is read."""
    schema: Any = SCHEMA
    parts = key.split(".")
    depth = 0
    while isinstance(schema, dict) and depth < len(parts):
        schema = schema.get(parts[depth])
        depth += 1
        if isinstance(schema, str):
            schema = leaf(schema)
    if schema is None or isinstance(schema, dict):
        raise errors.RequestError(f"annotation {annotation}: unknown key {key!r}")
    rest = parts[depth:]
    if len(schema) > 2:  # the name of a variable may have dots
        where, name = parts[:depth], ".".join(rest)
    elif rest:
        raise errors.RequestError(f"annotation {annotation}: unknown key {key!r}")
    else:
        where, name = parts[:-1], parts[-1]
    for part in where:
        document = document.setdefault(part, {})
        if not isinstance(document, dict):
            raise errors.RequestError(f"annotation {annotation}: the document has another value at {part!r}")
    if name in document:
        raise errors.RequestError(f"annotation {annotation}: the document sets {key!r}, too", "remove one of them")
    document[name] = schema[1](text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
