"""A Kubernetes node to install on.

It consists of this machine's files under an overlay, a containerd in it, and the part of the kubelet that makes
containers of our manifests. It needs root. Everything is in a mount namespace that ends with the process that holds it,
so this machine does not change.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cri_api.v1 import api_pb2 as pb

from lab import REPOSITORY, image
from lab.containerd import IMAGE, PATIENCE, RELEASES
from lab.cri import CRI, Pod
from lab.install import PYTHON
from lab.manifests import one, pod_spec
from shim.paths import VERSION

NODE_IMAGE = f"registry.example/chandler-node:{VERSION}"
PROPAGATION = {"None": pb.PROPAGATION_PRIVATE, "HostToContainer": pb.PROPAGATION_HOST_TO_CONTAINER}
# Run in a mount namespace of the node's own. pivot_root and not chroot, because containers made after a chroot would
# have this machine's root. $1: the node's directory; $2: a directory that stays this machine's, since an overlay cannot
# have its upper directory on an overlay; $3: the image's files.
_MOUNTS = """set -e
mount -t tmpfs -o mode=755 tmpfs "$1/layer"; mkdir "$1/layer/upper" "$1/layer/work"
mount -t overlay overlay -o lowerdir=/,upperdir="$1/layer/upper",workdir="$1/layer/work" "$1/root"
cd "$1/root"
mount -t proc proc proc; mount --rbind /dev dev; mount --rbind /sys sys; mount -t tmpfs -o mode=755 tmpfs run
mkdir run/layer run/image run/old
mount --bind "$1/layer" run/layer; mount --bind "$2" ".$2"
mount --bind "$3" run/image; mount -t proc proc run/image/proc; mount --rbind . run/image/host
pivot_root . run/old; cd /; umount -l run/old; rmdir run/old; mount --make-rshared /
echo ready; exec sleep infinity"""


def build(directory: str, checkout: str = REPOSITORY) -> str:
    """The image's root file system."""
    subprocess.run(
        [PYTHON, os.path.join(checkout, "packaging/kubernetes/build.py"), directory],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return directory


class Node:
    """`tree`: the image's files. `without`: paths of this machine that the node does not have."""

    def __init__(self, place: str, tree: str, os_release: str = "", without: Sequence[str] = ()) -> None:
        self.place = place
        for name in ("layer", "root", "store"):
            os.makedirs(os.path.join(place, name), mode=0o755)
        self.holder = subprocess.Popen(
            [
                "unshare",
                "-m",
                "--propagation",
                "private",
                "sh",
                "-c",
                _MOUNTS,
                "sh",
                place,
                os.path.join(place, "store"),
                tree,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n"
        for path in without:
            os.unlink(self.root + path)
        if os_release:
            os.unlink(self.root + "/etc/os-release")
            self.write("/etc/os-release", os_release)

    @property
    def root(self) -> str:
        """The node's root as this process reaches it."""
        return f"/proc/{self.holder.pid}/root"

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        os.makedirs(os.path.dirname(self.root + path), exist_ok=True)
        with open(self.root + path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.root + path, mode)

    def command(self, *arguments: str) -> list[str]:
        """A command on the node."""
        return ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", *arguments]

    def inside(self, *arguments: str) -> list[str]:
        """Run the image's program as a container does that has the node's root at /host."""
        return self.command("chroot", "/run/image", "/python3", "-I", "-B", "/node.py", *arguments)

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run(self.command(*arguments), check)

    def image(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run(self.inside(*arguments), check)

    def _run(self, command: Sequence[str], check: bool) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            check=check,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )

    def changed(self) -> dict[str, str]:
        """Path to text of every file that differs from this machine's; "-" for a removed one.

        Files below versions/ are left out.
        """
        upper = self.root + "/run/layer/upper"
        found = {}
        for directory, directories, names in os.walk(upper):
            for path in (os.path.join(directory, name) for name in directories + names):
                inner = path[len(upper) :]
                if "/versions/" in inner:
                    continue
                if os.path.islink(path):
                    found[inner] = "-> " + os.readlink(path)
                elif os.path.isfile(path):
                    with open(path, encoding="utf-8", errors="replace") as file:
                        found[inner] = file.read()
                elif not os.path.isdir(path):
                    found[inner] = "-"
        return found

    def close(self) -> None:
        os.killpg(self.holder.pid, signal.SIGKILL)
        self.holder.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()


def replace_image(node: Node, tree: str) -> None:
    """Replace the image of the container in which `Node.image` runs."""
    node.run("mount", "--bind", tree, "/run/image")
    node.run("mount", "--rbind", "/", "/run/image/host")


class Containerd:
    """containerd 2 at the usual paths of a node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.release = RELEASES[1]
        self.process: subprocess.Popen[bytes] | None = None
        store = os.path.join(node.place, "store")
        node.write(
            "/etc/containerd/config.toml",
            "\n".join(
                [
                    "version = 3",
                    f"root = '{store}/root'",
                    "# the administrator's own words",
                    "[plugins.'io.containerd.internal.v1.opt']",
                    f"path = '{store}/opt'",
                    "[plugins.'io.containerd.cri.v1.images'.pinned_images]",
                    f"sandbox = '{IMAGE}'",
                    "[plugins.'io.containerd.cri.v1.runtime']",
                    "restrict_oom_score_adj = true",
                    "disable_apparmor = true",
                    "",
                ]
            ),
        )
        # systemd's part.
        node.write("/usr/local/sbin/systemctl", '#!/bin/sh\necho "$@" >>/run/systemctl.log\n', 0o755)
        os.makedirs(node.root + "/run/systemd/system")
        # `chandler configure` asks the program for its version.
        os.symlink(self.release.binary("containerd"), node.root + "/usr/local/bin/containerd")

    @property
    def socket(self) -> str:
        return self.node.root + "/run/containerd/containerd.sock"

    def start(self) -> None:
        path = f"{os.path.dirname(self.release.binary('x'))}:/usr/sbin:/usr/bin:/sbin:/bin"
        with open(os.path.join(self.node.place, "log"), "ab") as log:
            self.process = subprocess.Popen(
                self.node.command("containerd"),
                env={"HOME": "/root", "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + PATIENCE
        while self.ctr("version", check=False).returncode:
            assert self.process.poll() is None and time.monotonic() < until, "containerd does not answer"
            time.sleep(0.02)

    def ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.node.run(self.release.binary("ctr"), *arguments, check=check)

    def load(self, name: str, files: bytes | None = None, **configured: Any) -> None:
        archive = image.make(os.path.join(self.node.place, "store/image.tar"), name, files, **configured)
        self.ctr("-n", "k8s.io", "images", "import", archive)
        os.unlink(archive)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(PATIENCE)
            self.process = None


class Kubelet:
    """Makes containers of our manifests' pods, through CRI. `server`: the API server's port."""

    def __init__(self, node: Node, containerd: Containerd, server: int = 0) -> None:
        self.node, self.containerd, self.server = node, containerd, server
        self.cri = CRI(containerd.socket)
        self.cri.ready()

    def pod(self, file: str) -> tuple[Pod, dict[str, Any]]:
        """The pod of a DaemonSet, and its specification."""
        manifest = one(file, "DaemonSet")
        return self.cri.pod(manifest["metadata"]["name"], namespace=manifest["metadata"]["namespace"]), pod_spec(
            manifest
        )

    def start(self, pod: Pod, spec: Mapping[str, Any], container: Mapping[str, Any]) -> str:
        context = container["securityContext"]
        capabilities = context["capabilities"]
        mounts = []
        for mount in container.get("volumeMounts", ()):
            volume = next(each for each in spec["volumes"] if each["name"] == mount["name"])
            path = self._volume(volume) + ("/" + mount["subPath"] if "subPath" in mount else "")
            mounts.append(
                pb.Mount(
                    container_path=mount["mountPath"],
                    host_path=path,
                    readonly=mount.get("readOnly", False),
                    propagation=PROPAGATION[mount.get("mountPropagation", "None")],
                )
            )
        variables = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.server)}
        for each in container.get("env", ()):
            assert each["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
            variables[each["name"]] = "node-1"
        security = pb.LinuxContainerSecurityContext(
            namespace_options=pod.config.linux.security_context.namespace_options,
            readonly_rootfs=context["readOnlyRootFilesystem"],
            no_new_privs=not context["allowPrivilegeEscalation"],
            seccomp=pb.SecurityProfile(profile_type=pb.SecurityProfile.RuntimeDefault),
            capabilities=pb.Capability(
                add_capabilities=capabilities.get("add", ()), drop_capabilities=capabilities["drop"]
            ),
        )
        security.run_as_user.value = context["runAsUser"]
        memory = int(container["resources"]["limits"]["memory"].removesuffix("Mi")) << 20
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=container["name"]),
            image=pb.ImageSpec(image=container["image"]),
            args=container["args"],
            envs=[pb.KeyValue(key=key, value=value) for key, value in variables.items()],
            mounts=mounts,
            log_path=container["name"],
            linux=pb.LinuxContainerConfig(
                resources=pb.LinuxContainerResources(memory_limit_in_bytes=memory), security_context=security
            ),
        )
        pod.config.log_directory = "/run/log-" + pod.config.metadata.name
        os.makedirs(self.node.root + pod.config.log_directory, exist_ok=True)
        request = pb.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        made: str = self.cri.runtime.CreateContainer(request, timeout=PATIENCE).container_id
        return self.cri.start(made)

    def _volume(self, volume: Mapping[str, Any]) -> str:
        """The path of a volume on the node. Directories that the kubelet makes are writable for all."""
        path: str
        if "hostPath" in volume:
            path = volume["hostPath"]["path"]
            if volume["hostPath"]["type"] == "DirectoryOrCreate":
                os.makedirs(self.node.root + path, mode=0o755, exist_ok=True)
            return path
        path = f"/run/kubelet-{volume['name']}"
        if not os.path.isdir(self.node.root + path):
            if "configMap" in volume:
                for name, text in one("config.yaml", "ConfigMap")["data"].items():
                    self.node.write(f"{path}/{name}", text)
            else:
                os.makedirs(self.node.root + path)
                shutil.copy(os.path.join(self.node.place, "store/ca.crt"), self.node.root + path)
                self.node.write(path + "/token", "the-token")
            os.chmod(self.node.root + path, 0o777)
        return path

    def log(self, pod: Pod, container: str) -> str:
        with open(f"{self.node.root}{pod.config.log_directory}/{container}", encoding="utf-8") as file:
            return file.read()

    def result(self, container: str) -> int:
        """The exit status of a container that ends by itself."""
        until = time.monotonic() + PATIENCE
        while self.cri.running(container):
            assert time.monotonic() < until
            time.sleep(0.02)
        return int(
            self.cri.runtime.ContainerStatus(
                pb.ContainerStatusRequest(container_id=container), timeout=PATIENCE
            ).status.exit_code
        )


class API:
    """An API server that answers patches over TLS; `asked` records the requests."""

    def __init__(self, node: Node) -> None:
        key, certificate = (os.path.join(node.place, "store", name) for name in ("ca.key", "ca.crt"))
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                "/CN=test",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-days",
                "2",
                "-keyout",
                key,
                "-out",
                certificate,
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        asked: list[tuple[str, str, str, Any]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, self.headers["Authorization"], self.headers["Content-Type"], body))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self.asked = asked
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
