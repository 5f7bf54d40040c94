"""Deployment files: YAML with services, of which one becomes a bundle.

A service's keys are those of the request document (shim.request.parse).  Keys that only an orchestrator can honour are
passed over and told of; any other is an error.  Pure.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple

from shim import jsontext
from shim.cdi import yamltext
from shim.errors import ChandlerError, RequestError
from shim.request import schema
from shim.shapes import Document

MAX_FILE = 4 << 20
VERSION = "v1"

# Keys beside `services` and of a service that need somebody who runs many containers on many machines.
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
    """One service: `document` as the file has it, less the keys in `ignored`; `source` names file and service."""

    deployment: str
    name: str
    document: Document
    ignored: List[str]
    source: str


def service(text: str, path: str, name: str) -> DeployedService:
    """The service `name` of a deployment file; '' for the only one.  Raises RequestError, which names file and key.

    The service's document is not checked yet.
    """
    document = _object(_load(text, path), path)
    for key in document:
        if key not in ("version", "deployment", "services") and key not in _ORCHESTRATED:
            raise RequestError(f"{path}: unknown key {key!r}", "known here: deployment, services, version")
    if document.get("version", VERSION) != VERSION:
        raise RequestError(f"{path}: version: {document['version']!r} is not known", f"this Chandler reads {VERSION}")
    deployment = document.get("deployment", "")
    if not isinstance(deployment, str):
        raise RequestError(f"{path}: deployment: {deployment!r} is not a text")
    services = _object(document.get("services"), f"{path}: services")
    if not name and len(services) == 1:
        name = next(iter(services))
    if name not in services:
        asked = f"no service {name!r}" if name else "several services"
        raise RequestError(f"{path}: {asked}", f"it has {', '.join(services) or 'none'}; choose with --service")
    source = f"{path}: service {name}"
    own = _object(services[name], source)
    known = {key: value for key, value in own.items() if key not in _SERVICE_ORCHESTRATED}
    ignored = [key for key in document if key in _ORCHESTRATED] + [
        f"services.{name}.{key}" for key in own if key not in known
    ]
    for key in known:
        if key not in schema.SCHEMA:
            raise RequestError(f"{source}: unknown key {key!r}", f"known here: {', '.join(sorted(schema.SCHEMA))}")
    return DeployedService(deployment, name, known, ignored, source)


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
