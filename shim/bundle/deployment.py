"""Reads deployment files: YAML with services, one of which becomes a bundle.

A service has the keys of a request document (shim.request.parse).  Keys that only an orchestrator can use are ignored
and reported in a note.  Any other key is an error.  Pure.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from shim import jsontext
from shim.cdi import yamltext
from shim.errors import ChandlerError, RequestError
from shim.keys import common
from shim.request import schema
from shim.shapes import Document

MAX_FILE = 4 << 20
VERSION = "v1"

# Keys for an orchestrator, which runs many containers on many machines: at the top of the file, and of a service.
_ORCHESTRATED = frozenset(("api", "externals", "labels", "tunnels"))
_SERVICE_ORCHESTRATED = frozenset(
    (
        "depends",
        "dns",
        "endpoints",
        "errors",
        "extra_hosts",
        "health",
        "image",
        "init",
        "labels",
        "logs",
        "network",
        "node_mode",
        "node_selector",
        "ports",
        "replicas",
        "restart_policy",
        "rtype",
        "scale",
        "schedule",
        "service_type",
        "wasm",
    )
)


class DeployedService(NamedTuple):
    """One service of a deployment file.

    `document`: the service's keys and values, without those for an orchestrator.
    `ignored`: the keys for an orchestrator, of the file and of the service.
    `source`: the file and the service, for errors.
    """

    deployment: str
    name: str
    document: Document
    ignored: list[str]
    source: str


def service(text: str, path: str, name: str) -> DeployedService:
    """The service `name` of a deployment file; with the name '', the file's only service.

    `text`: the file's content.  `path`: its path, for errors.  The values in the service's document are not checked.
    Raises RequestError, which names the file and the key.
    """
    document = _object(_load(text, path), path)
    for key in document:
        if key not in ("version", "deployment", "services") and key not in _ORCHESTRATED:
            raise RequestError(f"{path}: unknown key {key!r}", "known here: deployment, services, version")
    if document.get("version", VERSION) != VERSION:
        raise RequestError(f"{path}: version: {document['version']!r} is unknown", f"this Chandler reads {VERSION}")
    deployment = document.get("deployment", "")
    if not isinstance(deployment, str):
        raise RequestError(f"{path}: deployment: {deployment!r} is not a string")
    services = _object(document.get("services"), f"{path}: services")
    if not name and len(services) == 1:
        name = next(iter(services))
    if name not in services:
        problem = f"has no service {name!r}" if name else "has several services" if services else "has no services"
        raise RequestError(f"{path} {problem}", f"it has {', '.join(services) or 'none'}; choose one with --service")
    source = f"{path}: service {name}"
    whole = _object(services[name], source)
    request = {key: value for key, value in whole.items() if key not in _SERVICE_ORCHESTRATED}
    ignored = [key for key in document if key in _ORCHESTRATED] + [
        f"services.{name}.{key}" for key in whole if key not in request
    ]
    for key in request:
        if key not in common.ENTRIES:
            try:
                schema.rare_entry(common.ENTRIES, key, "")
            except RequestError as error:
                raise error.within(source) from None
    return DeployedService(deployment, name, request, ignored, source)


def _load(text: str, path: str) -> Any:
    try:
        value = yamltext.load(text)
        jsontext.check_value(value)
        return value
    except ChandlerError as error:
        raise RequestError(f"{path}: {error.what}", error.todo) from None


def _object(value: Any, where: str) -> Document:
    if not isinstance(value, dict):
        raise RequestError(f"{where} is not an object" if value is not None else f"{where} is empty")
    return value
