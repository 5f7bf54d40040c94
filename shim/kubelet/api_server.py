"""A client of the cluster's API server, for a pod: JSON over one connection, with the pod's own token.

The kubelet replaces the token before it expires, so the file is read for each call.
Source: Kubernetes, "Accessing the Kubernetes API from a Pod", "Kubernetes API Concepts".
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from shim.errors import ChandlerError, ConfigError, HostError
from shim.host import files
from shim.shapes import Document

SLICES = "/apis/resource.k8s.io/v1/resourceslices"
NOT_FOUND = 404
_PATIENCE = 10.0  # seconds for an answer
_MAX_ANSWER, _MAX_TOKEN = 16 << 20, 64 << 10  # bytes


class Refused(ChandlerError):
    """The API server has refused a call.  `status`: its HTTP status."""

    status = 0


class ApiServer:
    """The API server of the cluster in which this pod runs.  Threads may share it.

    `account`: the directory with the pod's token and the cluster's ca.crt.
    """

    def __init__(self, environment: Mapping[str, str], account: str) -> None:
        self._host = environment.get("KUBERNETES_SERVICE_HOST", "")
        port = environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not self._host or not port.isdigit():
            raise ConfigError(
                "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT do not name the API server",
                "start it in a pod, as dra.yaml does",
            )
        self._port = int(port)
        self._account = account
        self._lock = threading.Lock()
        self._connection: http.client.HTTPSConnection | None = None

    def slices(self, node: str, driver: str) -> list[Document]:
        """The ResourceSlices of a driver on a node.  Raises HostError or Refused."""
        selector = urlencode({"fieldSelector": f"spec.nodeName={node},spec.driver={driver}"})
        found: list[Document] = self._call("GET", f"{SLICES}?{selector}").get("items") or []
        return found

    def write_slice(self, made: Document) -> Document:
        """Creates a ResourceSlice, or replaces it where `made` has its resourceVersion; gives what is there now.

        Raises HostError or Refused.
        """
        if "resourceVersion" in made["metadata"]:
            return self._call("PUT", f"{SLICES}/{quote(made['metadata']['name'], safe='')}", made)
        return self._call("POST", SLICES, made)

    def delete_slice(self, name: str) -> None:
        """Deletes a ResourceSlice, if it is there.  Raises HostError or Refused."""
        try:
            self._call("DELETE", f"{SLICES}/{quote(name, safe='')}")
        except Refused as error:
            if error.status != NOT_FOUND:
                raise

    def claim(self, namespace: str, name: str) -> Document:
        """A ResourceClaim.  Raises HostError or Refused."""
        place = f"/apis/resource.k8s.io/v1/namespaces/{quote(namespace, safe='')}/resourceclaims/{quote(name, safe='')}"
        return self._call("GET", place)

    def node(self, name: str) -> Document:
        """A Node.  Raises HostError or Refused."""
        return self._call("GET", f"/api/v1/nodes/{quote(name, safe='')}")

    def close(self) -> None:
        """Ends the connection; another call makes another."""
        with self._lock:
            self._drop()

    def _call(self, method: str, path: str, sent: Document | None = None) -> Document:
        """The object that the API server answers.  Raises HostError or Refused."""
        body = None if sent is None else json.dumps(sent).encode()
        try:
            token = files.read(f"{self._account}/token", _MAX_TOKEN, follow=True)[0].decode("ascii").strip()
        except (OSError, ValueError) as error:
            raise HostError(
                f"the token {self._account}/token cannot be read: {getattr(error, 'strerror', error)}",
                "give the pod its service account, as dra.yaml does",
            ) from None
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json", "Content-Type": "application/json"}
        with self._lock:
            try:
                status, data = self._exchange(method, path, body, headers)
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                raise HostError(
                    f"the API server {self._host}:{self._port} gives no answer: {error or type(error).__name__}"
                ) from None
        answer = _decoded(data)
        if status >= 300 or answer is None:
            told = (answer or {}).get("message")
            refused = Refused(f"{method} {path.partition('?')[0]}: {told if isinstance(told, str) else status}")
            refused.status = status
            raise refused
        return answer

    def _exchange(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        """Status and bytes of the answer.  A connection that the server has closed meanwhile is made anew, once."""
        if self._connection is not None:
            try:
                return self._try(self._connection, method, path, body, headers)
            except (ConnectionError, http.client.HTTPException):
                self._drop()
        trusted = ssl.create_default_context(cafile=f"{self._account}/ca.crt")
        self._connection = http.client.HTTPSConnection(self._host, self._port, timeout=_PATIENCE, context=trusted)
        return self._try(self._connection, method, path, body, headers)

    def _try(
        self, connection: http.client.HTTPSConnection, method: str, path: str, body: bytes | None, headers: Any
    ) -> tuple[int, bytes]:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read(_MAX_ANSWER + 1)
        if len(data) > _MAX_ANSWER:
            self._drop()
            raise HostError(f"{method} {path}: the answer has more than {_MAX_ANSWER} bytes")
        return response.status, data

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def node_name(given: str) -> str:
    """The name of this node: `given`, or NODE_NAME of the environment.  Raises ConfigError."""
    name = given or os.environ.get("NODE_NAME", "")
    if not name:
        raise ConfigError("the name of this node is not known", "set NODE_NAME, as dra.yaml does, or use --node")
    return name


def _decoded(data: bytes) -> Document | None:
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
