"""Reads a request from the annotations of a container, and checks it by the rows of its keys (shim.request.schema).

Host and policy play no part here.  Pure; part of the create path.
"""

from __future__ import annotations

from shim import errors, jsontext
from shim.errors import ChandlerError
from shim.keys import common
from shim.request import schema

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Optional, Sequence, Tuple

    from shim.shapes import Document


MAX_ANNOTATIONS = 256 << 10  # bytes of names and values together
MARK = "granted"  # the annotation with which Chandler tells people what it granted; it is never read back
ALLOCATION = "allocation."  # how the keys of the device plugin's annotations begin (shim.state.allocations)
_SERVICE, _SERVICES = "service", "services"


def _no_search() -> None:
    """Does nothing: most front ends start with the directories of installed packages in sys.path."""


# Called before the YAML library is imported.  A front end that starts without those directories replaces this function.
find_libraries = _no_search


class Request:
    """A checked request.

    `document`: the request in normal form: every value has the type that the table gives it.
    `source`: where the request came from, for errors, such as `annotation chandler.oci/service`.
    `allocations`: the values of the device plugin's annotations, which are not checked yet.
    `pod_wide`: whether the request is for all containers of a pod together.
    """

    __slots__ = ("document", "source", "allocations", "pod_wide")

    def __init__(
        self, document: Document, source: str, allocations: Sequence[str] = (), pod_wide: bool = False
    ) -> None:
        self.document = document
        self.source = source
        self.allocations = allocations
        self.pod_wide = pod_wide

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
        """Whether the request has rare keys, or references in its variables, which need shim.keys.rare."""
        for value in self.env.values():
            if value.startswith(common.REFERENCES):
                return True
        return not (self.document.keys() <= common.ENTRIES.keys() and self.resources.keys() <= common.RESOURCES.keys())

    @property
    def env(self) -> Dict[str, str]:
        env: Dict[str, str] = self.document.get("env", {})
        return env


def parse_document(text: str) -> Any:
    """The value of a request document, which is JSON or YAML.  Raises RequestError.

    Text that begins with a brace is read as JSON, which is much faster.
    """
    try:
        if text.lstrip(" \t\r\n").startswith("{"):
            value = jsontext.loads(text.encode("utf-8", "surrogatepass"), unique=True)
        else:
            find_libraries()
            from shim.cdi import yamltext

            value = yamltext.load(text)
        jsontext.check_value(value)
        return value
    except ChandlerError as error:
        raise errors.RequestError(error.what, error.todo) from None


def from_annotations(annotations: Document, prefix: str, container: Optional[str]) -> Optional[Request]:
    """The request for one container, or None when its annotations have none.

    `container`: the name of the container in its pod, None where the engine gives none.  Annotations with a name
    (`services`, `service.NAME`) are for that container, and replace those for the whole pod.
    Raises RequestError, which names the annotation.
    """
    ours = {key[len(prefix) :]: value for key, value in annotations.items() if key.startswith(prefix)}
    if not ours:
        return None
    size = sum(len(prefix) + len(key) + len(value) for key, value in ours.items() if isinstance(value, str))
    if size > MAX_ANNOTATIONS // 4:  # a character has up to four bytes: only now the bytes must be counted
        size = sum(
            len((prefix + key + value).encode("utf-8", "surrogatepass"))
            for key, value in ours.items()
            if isinstance(value, str)
        )
    if size > MAX_ANNOTATIONS:
        raise errors.RequestError(f"the annotations {prefix}* hold {size} bytes, more than {MAX_ANNOTATIONS}")
    if MARK in ours:
        raise errors.RequestError(f"annotation {prefix}{MARK} is Chandler's own mark", "remove it")
    pod_wide: Document = {}
    by_name: Document = {}
    allocations: List[str] = []
    for key, value in ours.items():
        if not isinstance(value, str):
            raise errors.RequestError(f"annotation {prefix}{key} is not a text")
        if not (key.isascii() and value.isascii()):
            _check_text(key, f"the name of an annotation {prefix}*")
            _check_text(value, f"annotation {prefix}{key}")
        if key == _SERVICES or key.startswith(_SERVICE + "."):
            by_name[key] = value
        elif key.startswith(ALLOCATION):
            allocations.append(value)
        else:
            pod_wide[key] = value
    request = _container_document(by_name, prefix, container) if by_name else None
    if request is None and pod_wide:
        request = _pod_document(pod_wide, prefix)
        request.pod_wide = True
    if allocations:
        if request is None:
            request = Request({}, "the kubelet's allocation")
        request.allocations = allocations
    return request


def _check_text(text: str, where: str) -> None:
    """Raises RequestError, beginning with `where`, for a text that is not Unicode."""
    try:
        jsontext.check_text(text)
    except ChandlerError as error:
        raise errors.RequestError(f"{where}: {error.what}") from None


def _container_document(by_name: Dict[str, str], prefix: str, container: Optional[str]) -> Optional[Request]:
    """The request that `services` or `service.NAME` has for this container, or None."""
    if container is None:
        keys = ", ".join(prefix + key for key in by_name)
        raise errors.RequestError(
            f"{keys}: the engine does not say which container of a pod this is",
            f"use the annotation {prefix}{_SERVICE}",
        )
    candidates: List[Tuple[str, Any]] = []
    if _SERVICES in by_name:
        services = _document(by_name[_SERVICES], prefix + _SERVICES)
        if not isinstance(services, dict):
            raise errors.RequestError(f"annotation {prefix}{_SERVICES} is not an object of container names")
        if container in services:
            candidates.append((f"annotation {prefix}{_SERVICES} ({container})", services[container]))
    short = f"{_SERVICE}.{container}"
    if short in by_name:
        candidates.append((f"annotation {prefix}{short}", _document(by_name[short], prefix + short)))
    if len(candidates) > 1:
        raise errors.RequestError(
            f"annotations {prefix}{_SERVICES} and {prefix}{short} both ask for {container}", "remove one of them"
        )
    if not candidates:
        return None
    source, document = candidates[0]
    return _checked(document, source)


def _pod_document(pod_wide: Dict[str, str], prefix: str) -> Request:
    """The request for every container of the pod: `service` together with the annotations of single values."""
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
        return Request(schema.check(document), source)
    except errors.RequestError as error:
        raise error.within(source) from None


def _set(document: Document, key: str, text: str, annotation: str) -> None:
    """Sets a single value, given by an annotation such as `resources.gpu.count`, in a document.

    The entries of the keys say where the dotted path ends, and how the text is read.
    """
    entry: common.Entry = common.ENTRIES
    parts = key.split(".")
    depth = 0
    try:
        while isinstance(entry, dict):  # raises when the parts end before a value begins
            path = ".".join(parts[:depth])
            entry = entry.get(parts[depth]) or schema.rare_entry(entry, parts[depth], path)
            depth += 1
    except (IndexError, errors.RequestError):
        raise errors.RequestError(f"annotation {annotation}: unknown key {key!r}") from None
    rest = parts[depth:]
    if common.FREE in entry:  # the name may have dots
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
    document[name] = entry[1](text)
