"""A simulated GPU node: a directory of real character devices, and the CDI files that describe them.

    python3 tests/lab/node.py DIRECTORY [GPUS]

makes DIRECTORY/dev/nvidia0… and DIRECTORY/cdi/nvidia.yaml. Each GPU stands for a character device of the host that can
be opened and that no runtime allows by default. So tests can check both: a granted one opens, another one gives EPERM.
It uses the standard library only, because the demo runs it on a bare machine.
"""

from __future__ import annotations

import os
import stat
import sys
from typing import NamedTuple

VCS, MISC = 7, 10
# Opening these does nothing to the host. Left out on purpose: watchdog (opening arms it), tun (older runtimes allow it
# by default), /dev/kmsg (the kernel itself gives EPERM to most containers).
HARMLESS = (
    "loop-control",
    "fuse",
    "autofs",
    "kvm",
    "vsock",
    "vga_arbiter",
    "userfaultfd",
    "btrfs-control",
    "cpu_dma_latency",
    "hw_random",
)
CONTROLS = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
KIND = "nvidia.com/gpu"
# A hook that does nothing but read what the runtime writes to it: crun 1.8 fails when a hook ends before that.
HOOK = ("/bin/dd", "dd", "of=/dev/null", "status=none")


class Device(NamedTuple):
    """`host` is the node in the simulated tree, `inside` the path that a container sees."""

    host: str
    inside: str
    major: int
    minor: int


class Node(NamedTuple):
    directory: str
    gpus: list[Device]
    controls: list[Device]

    @property
    def cdi(self) -> str:
        return os.path.join(self.directory, "cdi")

    @property
    def spec(self) -> str:
        return os.path.join(self.cdi, "nvidia.yaml")


def uuid(index: int) -> str:
    return f"GPU-{index:08x}-5eed-4bad-8ace-0123456789ab"


def candidates() -> list[tuple[int, int]]:
    """Device numbers that may open here. The consoles' memory comes first: these are many, and all alike."""
    consoles = [(VCS, kind + n) for n in range(8) for kind in (0, 64, 128)]
    with open("/proc/misc", encoding="ascii") as table:
        misc = {name: int(minor) for minor, name in (line.split() for line in table)}
    return consoles + [(MISC, misc[name]) for name in HARMLESS if name in misc]


def opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def make(directory: str, gpus: int = 8) -> Node:
    """Make the devices and the plain CDI file.

    Raises OSError if this process may not make devices, or if too few of the host's devices open.
    """
    dev = os.path.join(directory, "dev")
    os.makedirs(dev, exist_ok=True)
    names = list(CONTROLS) + [f"nvidia{n}" for n in range(gpus)]
    # The control nodes get the last candidates, so that the GPUs are of one kind where the host has enough of it.
    made: list[Device] = []
    for major, minor in candidates():
        if len(made) == len(names):
            break
        name = names[-1 - len(made)]
        host = os.path.join(dev, name)
        os.mknod(host, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        if opens(host):
            os.chmod(host, 0o666)  # mknod is subject to the umask
            made.append(Device(host, "/dev/" + name, major, minor))
        else:
            os.unlink(host)
    if len(made) < len(names):
        raise OSError(f"only {len(made)} character devices open on this machine, {len(names)} are needed")
    made.reverse()
    node = Node(directory, made[len(CONTROLS) :], made[: len(CONTROLS)])
    os.makedirs(node.cdi, exist_ok=True)
    write(node.spec, spec(node))
    return node


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def spec(
    node: Node,
    kind: str = KIND,
    mounts: list[tuple[str, str]] | None = None,
    extra: list[Device] | None = None,
    hooks: int = 2,
) -> str:
    """A CDI file as nvidia-ctk writes them: every GPU by index and by UUID, and `all` of them."""
    lines = [
        "---",
        "cdiVersion: 0.5.0",
        f"kind: {kind}",
        "containerEdits:",
        "  env:",
        "  - NVIDIA_VISIBLE_DEVICES=void",
    ]
    lines += nodes(node.controls + (extra or []), "  ")
    lines += ["  hooks:"]
    for size in (f"bs={512 << n}" for n in range(hooks)):
        lines += [
            "  - hookName: createContainer",
            f"    path: {HOOK[0]}",
            "    env:",
            "    - NVIDIA_CTK_DEBUG=false",
            "    args:",
        ]
        lines += [f"    - {argument}" for argument in (*HOOK[1:], size)]
    if mounts:
        lines += ["  mounts:"]
        for source, destination in mounts:
            lines += [
                f"  - hostPath: {source}",
                f"    containerPath: {destination}",
                "    options: [ro, nosuid, nodev, rbind, rprivate]",
            ]
    lines += ["devices:"]
    for index, gpu in enumerate(node.gpus):
        for name in (str(index), uuid(index)):
            lines += [f"- name: {quoted(name)}", "  containerEdits:", *nodes([gpu], "    ")]
    lines += ["- name: all", "  containerEdits:", *nodes(node.gpus, "    ")]
    return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    return '"' + text + '"'


def nodes(devices: list[Device], indent: str) -> list[str]:
    lines = [f"{indent}deviceNodes:"]
    for device in devices:
        lines += [f"{indent}- path: {device.inside}", f"{indent}  hostPath: {device.host}"]
    return lines


def driver(node: Node, files: int = 60) -> str:
    """The plain CDI file with the length of a real driver's: `files` mounted libraries, 17 device nodes, 5 hooks.

    Makes the libraries, too.
    """
    libraries = os.path.join(node.directory, "lib")
    os.makedirs(libraries, exist_ok=True)
    mounts = []
    for n in range(files):
        name = f"libnvidia-part{n:02}.so.550.54.15"
        write(os.path.join(libraries, name), "")
        mounts.append((os.path.join(libraries, name), "/usr/lib/x86_64-linux-gnu/" + name))
    more = 17 - len(node.gpus) - len(node.controls)
    extra = [
        device._replace(inside=f"/dev/nvidia-caps/nvidia-cap{n}")
        for n, device in enumerate((node.controls * more)[: max(more, 0)])
    ]
    return spec(node, mounts=mounts, extra=extra, hooks=5)


if __name__ == "__main__":
    try:
        make(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8)
    except OSError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
