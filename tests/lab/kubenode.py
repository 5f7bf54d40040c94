"""A Kubernetes node to install on, without Kubernetes: this machine's files under an overlay, and the image's files.

It needs root. Everything is in a mount namespace that ends with the process that holds it, so this machine does not
change.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

from lab import REPOSITORY
from lab.install import PYTHON
from shim.paths import VERSION

PATIENCE = 60.0
NODE_IMAGE = f"registry.example/chandler-node:{VERSION}"
PYTHONS = sorted(f"/usr/bin/{name}" for name in os.listdir("/usr/bin") if name.startswith("python3"))
# For a shell in a mount namespace of the node's own; $1 is the node's directory.
OVERLAY = """set -e
mount -t tmpfs -o mode=755 tmpfs "$1/layer"; mkdir "$1/layer/upper" "$1/layer/work"
mount -t overlay overlay -o lowerdir=/,upperdir="$1/layer/upper",workdir="$1/layer/work" "$1/root"
cd "$1/root"
mount -t proc proc proc; mount -t tmpfs -o mode=755 tmpfs run
mkdir run/layer run/old; mount --bind "$1/layer" run/layer
"""
# pivot_root and not chroot, because containers made after a chroot would have this machine's root.
PIVOT = "pivot_root . run/old; cd /; umount -l run/old; rmdir run/old; mount --make-rshared /\n"
# $2: a directory that stays this machine's, since an overlay cannot have its upper directory on an overlay; $3: the
# image's files.
_NODE = """mount --rbind /dev dev; mount --rbind /sys sys; mount --bind "$2" ".$2"
mkdir run/image; mount --bind "$3" run/image; mount -t proc proc run/image/proc; mount --rbind . run/image/host
"""


def build(directory: str, checkout: str = REPOSITORY) -> str:
    """The image's root file system."""
    subprocess.run(
        [PYTHON, os.path.join(checkout, "packaging/kubernetes/build.py"), directory],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return directory


class Machine:
    """Namespaces that live as long as a command in them, which prints `ready` when they are as they shall be.

    `without`: files of this machine that it does not have.
    """

    def __init__(self, workdir: str, command: Sequence[str], without: Sequence[str] = ()) -> None:
        self.workdir = workdir
        self.holder = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "ready\n"
        for path in without:
            os.unlink(self.root + path)

    @property
    def root(self) -> str:
        """Its root as this process reaches it."""
        return f"/proc/{self.holder.pid}/root"

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        os.makedirs(os.path.dirname(self.root + path), exist_ok=True)
        with open(self.root + path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.root + path, mode)

    def command(self, *arguments: str) -> list[str]:
        """A command on it."""
        return ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", *arguments]

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run(self.command(*arguments), check)

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


class Node(Machine):
    """A machine and a container of the image on it. `tree`: the image's files."""

    def __init__(self, workdir: str, tree: str, os_release: str = "", without: Sequence[str] = ()) -> None:
        for name in ("layer", "root", "store"):
            os.makedirs(os.path.join(workdir, name), mode=0o755)
        script = OVERLAY + _NODE + PIVOT + "echo ready; exec sleep infinity"
        shell = ["sh", "-c", script, "sh", workdir, os.path.join(workdir, "store"), tree]
        super().__init__(workdir, ["unshare", "-m", "--propagation", "private", *shell], without)
        if os_release:
            os.unlink(self.root + "/etc/os-release")
            self.write("/etc/os-release", os_release)

    def inside(self, *arguments: str) -> list[str]:
        """Run the image's program as a container does that has the node's root at /host."""
        return self.command("chroot", "/run/image", "/python3", "-I", "-B", "/node.py", *arguments)

    def image(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self._run(self.inside(*arguments), check)


def replace_image(node: Node, tree: str) -> None:
    """Replace the image of the container in which `Node.image` runs."""
    node.run("mount", "--bind", tree, "/run/image")
    node.run("mount", "--rbind", "/", "/run/image/host")
