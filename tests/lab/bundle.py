"""OCI bundles: a busybox root file system and the config.json that containerd writes for a container of a pod.

    python3 tests/lab/bundle.py DIRECTORY [KEY=VALUE ANNOTATION...] -- COMMAND...

makes one. It uses the standard library only, because the demo runs it on a bare machine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

BUSYBOX = "/bin/busybox"
APPLETS = ("sh", "cat", "echo", "env", "id", "ls", "mknod", "sleep", "test", "true")
CAPABILITIES = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
]

# Name of this process' control groups, so that they can be told from those of other processes.
GROUPS = f"chandler-lab-{uuid.uuid4().hex[:8]}-"


def rootfs(directory: str) -> str:
    """A root file system with nothing but busybox."""
    for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "usr/lib", "var/run"):
        os.makedirs(os.path.join(directory, name), exist_ok=True)
    shutil.copy(BUSYBOX, os.path.join(directory, "bin/busybox"))  # never a link: a container may write to it
    for applet in APPLETS:
        os.symlink("busybox", os.path.join(directory, "bin", applet))
    with open(os.path.join(directory, "etc/passwd"), "w", encoding="ascii") as passwd:
        passwd.write("root:x:0:0:root:/root:/bin/sh\n")
    return directory


def config(
    args: Sequence[str], annotations: Mapping[str, str] | None = None, env: Sequence[str] = (), root: str = "rootfs"
) -> dict[str, Any]:
    """The config.json that containerd's CRI writes, without a seccomp filter, because the youki here lacks seccomp."""
    mounts = [
        mount("/proc", "proc", "nosuid", "noexec", "nodev"),
        mount("/dev", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount("/dev/pts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("/dev/shm", "tmpfs", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
        mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        mount("/sys/fs/cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
    ]
    mounts[3]["source"] = "shm"
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/bin", "HOSTNAME=lab", *env],
            "cwd": "/",
            "capabilities": {kind: CAPABILITIES for kind in ("bounding", "effective", "permitted")},
            "noNewPrivileges": True,
        },
        "root": {"path": root},
        "hostname": "lab",
        "mounts": mounts,
        "annotations": dict(annotations or {}),
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "cgroupsPath": f"/{GROUPS}{uuid.uuid4().hex[:8]}",
            "namespaces": [{"type": name} for name in ("pid", "ipc", "uts", "mount", "network")],
            "maskedPaths": [
                "/proc/acpi",
                "/proc/kcore",
                "/proc/keys",
                "/proc/latency_stats",
                "/proc/timer_list",
                "/proc/sched_debug",
                "/sys/firmware",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def pod(name: str = "main", namespace: str = "default", kind: str = "container") -> dict[str, str]:
    """The annotations with which containerd says which container of which pod this is."""
    prefix = "io.kubernetes.cri."
    return {
        prefix + "container-type": kind,
        prefix + "container-name": name,
        prefix + "image-name": "docker.io/library/busybox:1.36",
        prefix + "sandbox-id": "5" * 64,
        prefix + "sandbox-name": "trainer-0",
        prefix + "sandbox-namespace": namespace,
        prefix + "sandbox-uid": str(uuid.UUID(int=7)),
    }


def request(**document: Any) -> dict[str, str]:
    """The annotation that asks Chandler for `document`."""
    return {"chandler.oci/service": json.dumps(document)}


def services(count: int) -> list[str]:
    """The environment that Kubernetes gives every container for `count` services.

    It makes up most of a real config.json's length.
    """
    lines = []
    for n in range(count):
        name = f"TEAM_SERVICE_{n:03}"
        lines += [
            f"{name}_SERVICE_HOST=10.96.0.{n % 256}",
            f"{name}_SERVICE_PORT=443",
            f"{name}_PORT=tcp://10.96.0.{n % 256}:443",
            f"{name}_PORT_443_TCP_PROTO=tcp",
            f"{name}_PORT_443_TCP_ADDR=10.96.0.{n % 256}",
        ]
    return lines


class Bundle:
    """A bundle directory.

    `out`: the file for the container's output, since its streams outlive the call that creates it.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.path = os.path.join(directory, "config.json")
        self.out = os.path.join(directory, "out.log")
        self.log = os.path.join(directory, "log.json")
        self.pid_file = os.path.join(directory, "init.pid")

    @property
    def config(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.bytes)
        return result

    @config.setter
    def config(self, value: Mapping[str, Any]) -> None:
        with open(self.path, "w", encoding="utf-8") as file:
            json.dump(value, file, separators=(",", ":"))  # one line, as engines write it

    @property
    def bytes(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()

    def output(self) -> str:
        try:
            with open(self.out, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""


def make(
    directory: str,
    args: Sequence[str],
    annotations: Mapping[str, str] | None = None,
    env: Sequence[str] = (),
    root: str | None = None,
) -> Bundle:
    """A bundle in a new directory. `root`: another bundle's root file system, to share it."""
    os.makedirs(directory)
    bundle = Bundle(directory)
    if root is None:
        root = rootfs(os.path.join(directory, "rootfs"))
    bundle.config = config(args, annotations, env, root)
    return bundle


if __name__ == "__main__":
    split = sys.argv.index("--")
    make(sys.argv[1], sys.argv[split + 1 :], dict(word.split("=", 1) for word in sys.argv[2:split]))
