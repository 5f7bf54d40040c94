"""An API server that knows nodes, ResourceClaims and ResourceSlices, for tests that play the cluster."""

from __future__ import annotations

import http.server
import json
import os
import ssl
import subprocess
import threading
from typing import Any
from urllib.parse import parse_qs, urlsplit

SLICES = "/apis/resource.k8s.io/v1/resourceslices"


class ApiServer:
    """Its certificate and a pod's token are in `directory`."""

    def __init__(self, directory: str) -> None:
        self.account = directory
        os.makedirs(directory)
        key, certificate = os.path.join(directory, "key"), os.path.join(directory, "ca.crt")
        made = ["openssl", "req", "-x509", "-days", "2", "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1"]
        made += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", certificate]
        subprocess.run(made, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        self.objects: dict[str, dict[str, Any]] = {
            "/api/v1/nodes/here": {"metadata": {"name": "here", "uid": "node-uid"}}
        }
        self.writes: list[tuple[str, str]] = []  # method and path
        self.knows_taints = True
        self._version = 0
        self.renew("first")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        self._server = server
        self.environment = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(server.server_address[1]),
        }
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def renew(self, token: str) -> None:
        """Another token; the one before is not valid any more."""
        self.token = token
        path = os.path.join(self.account, "token")
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(token + "\n")
        os.rename(path + ".new", path)

    def slices(self) -> list[dict[str, Any]]:
        return [each for path, each in sorted(self.objects.items()) if path.startswith(SLICES)]

    def devices(self) -> dict[str, dict[str, Any]]:
        """Those of all slices, by name."""
        return {device["name"]: device for each in self.slices() for device in each["spec"]["devices"]}

    def add_claim(self, name: str, uid: str, *devices: str, **more: Any) -> None:
        """A claim to which the scheduler has allocated devices. `more`: members of the allocation's devices."""
        results = [
            {"request": f"gpu-{number}", "driver": "gpu.chandler.oci", "pool": "here", "device": device}
            for number, device in enumerate(devices)
        ]
        self.objects[f"/apis/resource.k8s.io/v1/namespaces/team/resourceclaims/{name}"] = {
            "metadata": {"name": name, "namespace": "team", "uid": uid},
            "status": {"allocation": {"devices": {"results": results, **more}}},
        }

    def answer(self, method: str, path: str, sent: Any) -> tuple[int, dict[str, Any]]:
        url = urlsplit(path)
        if method == "GET" and url.path == SLICES:
            wanted = dict(each.split("=") for each in parse_qs(url.query)["fieldSelector"][0].split(","))
            assert wanted == {"spec.nodeName": "here", "spec.driver": "gpu.chandler.oci"}
            return 200, {"items": self.slices()}
        present = self.objects.get(url.path)
        if method == "POST":
            url = url._replace(path=f"{url.path}/{sent['metadata']['name']}")
            if url.path in self.objects:
                return 409, {"message": f"{url.path} already exists"}
        elif present is None:
            return 404, {"message": f"{url.path} not found"}
        if method == "GET":
            assert present is not None
            return 200, present
        self.writes.append((method, url.path))
        if method == "DELETE":
            return 200, self.objects.pop(url.path)
        if (
            method == "PUT"
            and present
            and sent["metadata"]["resourceVersion"] != present["metadata"]["resourceVersion"]
        ):
            return 409, {"message": "the object has been modified"}
        if not self.knows_taints:
            for device in sent["spec"]["devices"]:
                device.pop("taints", None)
        self._version += 1
        sent["metadata"]["resourceVersion"] = str(self._version)
        self.objects[url.path] = sent
        return 201 if method == "POST" else 200, sent

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        played = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                sent = json.loads(self.rfile.read(length)) if length else None
                if self.headers["Authorization"] != f"Bearer {played.token}":
                    status, answer = 401, {"message": "Unauthorized"}
                else:
                    status, answer = played.answer(self.command, self.path, sent)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_PUT = do_DELETE = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
