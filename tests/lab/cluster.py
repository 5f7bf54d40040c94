"""A Kubernetes cluster on this machine: a control plane, and nodes with simulated GPUs, a containerd and a kubelet.

Each of them is in namespaces of its own, with kube/manager.py as process 1, so several clusters can run side by side
with the same addresses, and everything of a cluster ends with the process that made it. It needs root. There is no
registry, DNS or kube-proxy: images are loaded from files, and the API server is the only service that has an address.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from lab import bundle, cgroups, image
from lab import node as gpu_node
from lab.containerd import IMAGE, NEWEST_NRI
from lab.engine import read
from lab.install import PYTHON
from lab.kubenode import NODE_IMAGE, OVERLAY, PATIENCE, PIVOT, PYTHONS, Machine
from lab.plugin import until
from lab.runtimes import CACHE

DIRECTORY = f"{CACHE}/kubernetes-1.37"
PARTS = f"{CACHE}/kubernetes-parts/root/usr"  # etcd and CNI plugins
PROGRAMS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kube")
CONTROL, SERVICE = "10.0.0.1", "10.96.0.1"  # the control plane's own address, and that of the service `kubernetes`
PATH = f"{os.path.dirname(NEWEST_NRI.binary('x'))}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CONTROL = f"""set -e
echo 1 >/proc/sys/net/ipv4/ip_forward
ip -batch - <<END
link set lo up
address add {SERVICE}/32 dev lo
link add cluster type bridge
address add {CONTROL}/24 dev cluster
link set cluster up
END
"""
# The files of sysctls that the kubelet sets, with its values: they are this machine's, which shall not change.
_TUNABLES = {
    "kernel/keys/root_maxbytes": 25000000,
    "kernel/keys/root_maxkeys": 1000000,
    "kernel/panic": 10,
    "kernel/panic_on_oops": 1,
    "vm/overcommit_memory": 1,
    "vm/panic_on_oom": 0,
}
# The node's own /dev; the cache, in which its programs are; and what others on this machine put where a node has its
# own. $1: the node's directory; $2: its name.
_NODE = f"""mount -t sysfs sysfs sys
CGROUPS
mount -t tmpfs -o mode=755 tmpfs dev
while read -r name mode minor; do mknod -m "$mode" "dev/$name" c $minor; done <<END
null 666 1 3
zero 666 1 5
full 666 1 7
random 666 1 8
urandom 666 1 9
tty 666 5 0
kmsg 640 1 11
fuse 666 10 229
END
mkdir dev/pts dev/shm; ln -s pts/ptmx dev/ptmx
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs tmpfs dev/shm; ln -s /proc/self/fd dev/fd; for n in 0 1 2; do ln -s fd/$n dev/std$n; done
mkdir -p ".{CACHE}"; mount --bind {CACHE} ".{CACHE}"
rm -rf etc/cdi etc/chandler etc/containerd etc/cni opt/chandler var/lib/kubelet var/lib/containerd var/log/pods
mkdir -p etc/cdi etc/containerd etc/cni/net.d var/lib/kubelet var/lib/containerd run/systemd/system run/tunables
mount --bind "$1/kubelet" var/lib/kubelet; mount --bind "$1/containerd" var/lib/containerd
while read -r name value; do
    file=run/tunables/${{name##*/}}; echo "$value" >"$file"; mount --bind "$file" "proc/sys/$name"
done <<END
{"".join(f"{name} {value}" + chr(10) for name, value in _TUNABLES.items())}END
echo 1 >proc/sys/net/ipv4/ip_forward
ulimit -n "$(ulimit -Hn)"
hostname "$2"
"""
_CONTAINERD = f"""version = 3
# the administrator's own words
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '{IMAGE}'
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
disable_apparmor = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['{PARTS}/lib/cni']
"""


def _network(pods: str) -> dict[str, Any]:
    """A CNI configuration for a node's pods."""
    addresses = {"type": "host-local", "ranges": [[{"subnet": pods}]], "routes": [{"dst": "0.0.0.0/0"}]}
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipam": addresses}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}


def _kubelet(identities: Identities) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "authentication": {"x509": {"clientCAFile": identities.file("ca.crt")}, "anonymous": {"enabled": False}},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "resolvConf": "",
        "makeIPTablesUtilChains": False,
        "oomScoreAdj": 0,  # this machine may forbid less
        # Its disk may be as full as it likes.
        "evictionHard": {"memory.available": "50Mi"},
        "imageGCHighThresholdPercent": 100,
    }


def missing() -> str:
    """Why there can be no cluster; '' if it can be."""
    for path in (f"{DIRECTORY}/bin/kubelet", f"{PARTS}/bin/etcd"):
        if not os.access(path, os.X_OK):
            return f"not installed: {path[len(CACHE) + 1 :].partition('/')[0]}"
    return NEWEST_NRI.missing


def namespaces(*kinds: str) -> list[str]:
    """A command in namespaces of its own, which are killed with everything in them when this thread ends."""
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *kinds, "--propagation", "private", "--fork", "--kill-child"]


class Services:
    """The services of a machine: what its manager starts, in a directory of its own."""

    def __init__(self, workdir: str, commands: Mapping[str, Sequence[str]]) -> None:
        self.directory = os.path.join(workdir, "manager")
        os.mkdir(self.directory)
        for name in ("asked", "answer"):
            os.mkfifo(os.path.join(self.directory, name))
        for name in ("manager.py", "systemctl"):
            shutil.copy(os.path.join(PROGRAMS, name), self.directory)
        environment = {"HOME": "/root", "PATH": PATH}
        self.names = list(commands)
        services = {name: {"command": command, "environment": environment} for name, command in commands.items()}
        with open(os.path.join(self.directory, "services.json"), "w", encoding="utf-8") as file:
            json.dump(services, file)

    @property
    def manager(self) -> str:
        """A shell's words to become process 1, which says `ready`."""
        return f"exec {PYTHON} -I {self.directory}/manager.py {self.directory}"

    def systemctl(self, *words: str) -> str:
        done = subprocess.run(
            [os.path.join(self.directory, "systemctl"), *words],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return done.stdout

    def pid(self, name: str) -> str:
        """In the machine; "0" where it does not run."""
        return self.systemctl("show", "--property=MainPID", "--value", name).strip()

    def log(self, name: str) -> str:
        return read(os.path.join(self.directory, name + ".log"))


class Identities:
    """The cluster's certificate authority, and those that it knows."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.mkdir(directory)
        self._request("ca", "/CN=cluster", "-addext", "keyUsage=critical,keyCertSign")
        subprocess.run(
            ["openssl", "genrsa", "-out", self.file("accounts.key"), "2048"], check=True, capture_output=True
        )

    def file(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def issue(self, name: str, subject: str, *more: str) -> None:
        """Make NAME.key, NAME.crt and NAME.conf, a configuration of clients, for a subject as openssl-req(1) has it."""
        self._request(name, subject, "-CA", self.file("ca.crt"), "-CAkey", self.file("ca.key"), *more)
        server = {"server": f"https://{CONTROL}", "certificate-authority": self.file("ca.crt")}
        user = {"client-certificate": self.file(f"{name}.crt"), "client-key": self.file(f"{name}.key")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": server}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        with open(self.file(f"{name}.conf"), "w", encoding="utf-8") as file:
            json.dump(config, file)

    def _request(self, name: str, subject: str, *more: str) -> None:
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", self.file(f"{name}.key")]
        command = ["openssl", "req", "-x509", "-days", "2", "-subj", subject, *key, "-out", self.file(f"{name}.crt")]
        subprocess.run([*command, *more], check=True, stdin=subprocess.DEVNULL, capture_output=True)


class Control(Machine):
    """etcd, API server, controllers and scheduler, on this machine's own files."""

    def __init__(self, workdir: str, identities: Identities) -> None:
        os.mkdir(workdir)
        file, etcd = identities.file, "http://127.0.0.1:2379"
        config = [f"--{use}kubeconfig=" for use in ("", "authentication-", "authorization-")]
        tls = [f"--tls-cert-file={file('server.crt')}", f"--tls-private-key-file={file('server.key')}"]
        accounts = [f"--service-account-{use}key-file={file('accounts.key')}" for use in ("", "signing-")]
        self.services = Services(
            workdir,
            {
                "etcd": [
                    f"{PARTS}/bin/etcd",
                    f"--data-dir={workdir}/etcd",
                    f"--listen-client-urls={etcd}",
                    f"--advertise-client-urls={etcd}",
                    "--unsafe-no-fsync",
                    "--log-level=warn",
                ],
                "kube-apiserver": [
                    f"{DIRECTORY}/bin/kube-apiserver",
                    f"--etcd-servers={etcd}",
                    "--secure-port=443",
                    f"--advertise-address={CONTROL}",
                    f"--service-cluster-ip-range={SERVICE[:-1]}0/24",
                    f"--client-ca-file={file('ca.crt')}",
                    *tls,
                    *accounts,
                    "--service-account-issuer=https://kubernetes.default.svc",
                    "--authorization-mode=Node,RBAC",
                    "--enable-admission-plugins=NodeRestriction",
                    f"--kubelet-client-certificate={file('admin.crt')}",
                    f"--kubelet-client-key={file('admin.key')}",
                    "--kubelet-preferred-address-types=InternalIP",
                    "--allow-privileged=true",
                ],
                "kube-controller-manager": [
                    f"{DIRECTORY}/bin/kube-controller-manager",
                    *(f"{option}{file('controllers.conf')}" for option in config),
                    f"--service-account-private-key-file={file('accounts.key')}",
                    f"--root-ca-file={file('ca.crt')}",
                    "--use-service-account-credentials=true",
                    "--leader-elect=false",
                ],
                "kube-scheduler": [
                    f"{DIRECTORY}/bin/kube-scheduler",
                    *(f"{option}{file('scheduler.conf')}" for option in config),
                    "--leader-elect=false",
                ],
            },
        )
        script = _CONTROL + self.services.manager
        super().__init__(workdir, [*namespaces("-m", "-p", "-n", "--mount-proc"), "sh", "-c", script])
        self.services.systemctl("start", *self.services.names)

    def command(self, *arguments: str) -> list[str]:
        return _in_network(self.holder.pid, *arguments)


class Node(Machine):
    """Without Python, as most nodes. `number`: 1, 2 …; its name is node-NUMBER."""

    def __init__(self, workdir: str, number: int, gpus: int, control: Control, identities: Identities) -> None:
        self.name, self.address, self.pods = f"node-{number}", f"10.0.0.{10 + number}", f"10.244.{number}.0/24"
        for name in ("layer", "root", "kubelet", "containerd"):
            os.makedirs(os.path.join(workdir, name), mode=0o755)
        self.services = Services(
            workdir,
            {
                "containerd": [NEWEST_NRI.binary("containerd")],
                "kubelet": [
                    f"{DIRECTORY}/bin/kubelet",
                    "--config=/etc/kubernetes/kubelet.json",
                    f"--kubeconfig={identities.file(self.name)}.conf",
                    f"--hostname-override={self.name}",
                    f"--node-ip={self.address}",
                ],
            },
        )
        identities.issue(self.name, f"/O=system:nodes/CN=system:node:{self.name}")
        self.group = cgroups.Group(f"{bundle.GROUPS}{os.path.basename(os.path.dirname(workdir))}-{self.name}")
        script = OVERLAY + _NODE.replace("CGROUPS\n", self.group.mounts) + PIVOT + self.services.manager
        super().__init__(
            workdir,
            [*namespaces("-m", "-p", "-n", "-u", "-i"), *self.group.wrap, "sh", "-c", script, "sh", workdir, self.name],
            PYTHONS,
        )
        self._connect(control)
        os.symlink(f"{self.services.directory}/systemctl", self.root + "/usr/local/sbin/systemctl")
        # `chandler configure` asks the program for its version.
        os.symlink(NEWEST_NRI.binary("containerd"), self.root + "/usr/local/bin/containerd")
        self.write("/etc/containerd/config.toml", _CONTAINERD)
        self.write("/etc/cni/net.d/10-bridge.conflist", json.dumps(_network(self.pods)))
        self.write("/etc/kubernetes/kubelet.json", json.dumps(_kubelet(identities)))
        simulated = gpu_node.make(self.root, gpus)
        self.write("/etc/cdi/nvidia.yaml", read(simulated.spec).replace(self.root, ""))
        shutil.rmtree(simulated.cdi)
        self.services.systemctl("start", *self.services.names)

    def command(self, *arguments: str) -> list[str]:
        spaces = f"/proc/{self.holder.pid}/ns"
        entered = [f"--{name}={spaces}/{file}" for name, file in (("mount", "mnt"), ("net", "net"), ("uts", "uts"))]
        return ["nsenter", *entered, f"--pid={spaces}/pid_for_children", *arguments]

    def _connect(self, control: Control) -> None:
        """A cable to the control plane, which routes between the nodes' pods."""
        _ip(
            control.holder.pid,
            f"link add {self.name} type veth peer name eth0 netns {self.holder.pid}",
            f"link set {self.name} master cluster up",
            f"route add {self.pods} via {self.address}",
        )
        _ip(
            self.holder.pid,
            "link set lo up",
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {CONTROL}",
        )

    def ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(NEWEST_NRI.binary("ctr"), "-n", "k8s.io", *arguments, check=check)

    def answers(self) -> bool:
        """Whether containerd does."""
        return self.ctr("version", check=False).returncode == 0

    def leases(self) -> dict[str, list[str]]:
        """Container to the names of the devices that it holds."""
        path = self.root + "/run/chandler/leases"
        held = json.loads(read(path))["leases"] if os.path.exists(path) else []
        return {each["id"]: each["keys"] for each in held}

    def files(self) -> dict[str, str]:
        """What an administrator would see of `changed`: without the engine's and the kubelet's own data."""
        return {path: text for path, text in self.changed().items() if path.startswith(("/etc/", "/opt/", "/usr/"))}

    def close(self) -> None:
        super().close()
        self.group.remove()


def _in_network(pid: int, *arguments: str) -> list[str]:
    """A command in the network of a process."""
    return ["nsenter", f"--net=/proc/{pid}/ns/net", *arguments]


def _ip(pid: int, *commands: str) -> None:
    """Commands of ip(8) in the network of a process."""
    subprocess.run(
        _in_network(pid, "ip", "-batch", "-"),
        check=True,
        input="".join(command + "\n" for command in commands),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


class Cluster:
    """In `workdir`, a directory that only root can write to, as all directories above it."""

    def __init__(self, workdir: str) -> None:
        self.workdir = workdir
        self.machines: list[Machine] = []
        self.identities = Identities(os.path.join(workdir, "identities"))
        self.identities.issue("admin", "/O=system:masters/CN=admin")
        self.identities.issue("controllers", "/CN=system:kube-controller-manager")
        self.identities.issue("scheduler", "/CN=system:kube-scheduler")
        self.identities.issue("server", "/CN=server", "-addext", f"subjectAltName=IP:{CONTROL},IP:{SERVICE}")

    def start(self, tree: str, nodes: int = 2, gpus: int = 2) -> None:
        """Returns when all nodes are ready. They have busybox's image, and Chandler's with the files in `tree`."""
        self.control = Control(os.path.join(self.workdir, "control"), self.identities)
        self.machines.append(self.control)
        for number in range(1, nodes + 1):
            directory = os.path.join(self.workdir, f"node-{number}")
            self.machines.append(Node(directory, number, gpus, self.control, self.identities))
        until(lambda: all(node.answers() for node in self.nodes), "an answer of containerd", PATIENCE)
        self.load(IMAGE)
        self.load_tree(NODE_IMAGE, tree)
        until(lambda: self.kubectl("get", "--raw", "/readyz", check=False).returncode == 0, "the API server", PATIENCE)
        self.kubectl("wait", "--for=create", *(f"node/{node.name}" for node in self.nodes), "--timeout=60s")
        self.kubectl("wait", "--for=condition=Ready", "nodes", "--all", "--timeout=60s")
        # The account of a namespace, without which no pod is admitted.
        self.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")

    @property
    def nodes(self) -> list[Node]:
        return [machine for machine in self.machines if isinstance(machine, Node)]

    def load(self, name: str, files: bytes | None = None, **configured: Any) -> None:
        """An image for every node."""
        archive = image.make(os.path.join(self.workdir, "image.tar"), name, files, **configured)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            for done in [threads.submit(node.ctr, "images", "import", archive) for node in self.nodes]:
                done.result()
        os.unlink(archive)

    def load_tree(self, name: str, tree: str) -> None:
        """An image of Chandler for every node."""
        self.load(name, image.packed(tree), Entrypoint=["/python3", "-I", "-B", "/node.py"], Cmd=["wait"])

    def kubectl(self, *arguments: str, input: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.control.command(f"{DIRECTORY}/bin/kubectl", *arguments),
            check=False,
            input=input,
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
            env={"HOME": self.workdir, "KUBECONFIG": self.identities.file("admin.conf"), "PATH": PATH},
        )
        if check and done.returncode:
            raise AssertionError(f"kubectl {' '.join(arguments)} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def get(self, *arguments: str) -> Any:
        return json.loads(self.kubectl("get", "-o", "json", *arguments).stdout)

    def close(self) -> None:
        for machine in reversed(self.machines):
            machine.close()
