"""A containerd with NRI, an installation of Chandler, and plugins: what a container of Kubernetes meets on a node."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING, Any

from lab.containerd import Containerd, Release
from lab.cri import CRI
from lab.engine import read
from lab.install import Installation
from lab.node import Node
from lab.nvidia import Commands
from lab.plugin import Plugin, until
from shim.state.leases import is_of_sandbox
from shim.state.ledger import Ledger

if TYPE_CHECKING:
    from shim.state.leases import Lease


class Scene:
    """A containerd, an installation whose runtime handler is `chandler`, and the plugin's options."""

    def __init__(self, release: Release, workdir: str, node: Node) -> None:
        self.node, self.workdir = node, workdir
        self.installation = Installation(os.path.join(workdir, "installed"))
        self.state = tempfile.mkdtemp(prefix="s-", dir="/var/lib")  # short: sockets of MPS daemons are below it
        os.chmod(self.state, 0o755)
        os.makedirs(self.installation.etc + "/config.d", exist_ok=True)
        with open(self.installation.etc + "/config.d/state.toml", "w", encoding="ascii") as file:
            file.write(f'state-dir = "{self.state}"\n')
        self.commands = Commands(os.path.join(workdir, "nv"))
        self.configure()
        self.containerd = Containerd(
            release, os.path.join(workdir, "c"), {"chandler": self.installation.program()}, node.cdi
        )
        self.containerd.start()
        self.cri = CRI(self.containerd.socket)
        self.cri.ready()
        self.plugins: list[Plugin] = []

    def configure(self, more: str = "", top: str = "") -> None:
        self.installation.configure(["/usr/sbin/runc"], [self.node.cdi], more)
        if top:
            file = os.path.join(self.installation.etc, "config.toml")
            with open(file, encoding="utf-8") as old:
                text = old.read()
            with open(file + ".new", "w", encoding="utf-8") as new:
                new.write(top + text)
            os.rename(file + ".new", file)

    def plugin(self, *options: str) -> Plugin:
        made = Plugin(
            self.installation.program("chandler-nri"),
            os.path.join(self.workdir, f"plugin-{len(self.plugins)}.log"),
            self.containerd.nri,
            *options,
        )
        self.plugins.append(made)
        return made

    def restart(self, **validator: bool | list[str]) -> None:
        """Start containerd again, with NRI's default validator. Plugins have to be started afterwards."""
        self.containerd.stop()
        self.containerd.configure(**validator)
        self.containerd.start()
        self.cri.ready()

    def records(self) -> list[str]:
        """The containers that have a grant record of the plugin."""
        directory = os.path.join(self.state, "nri/grants")
        return sorted(name.partition("-")[2][:-5] for name in os.listdir(directory)) if os.path.isdir(directory) else []

    def leases(self) -> list[Lease]:
        """Those of containers, without those of whole pods."""
        return [lease for lease in Ledger(self.state).read() if not is_of_sandbox(lease)]

    def idle(self) -> bool:
        """Whether no process works for any plugin. Helpers end by themselves, also when their plugin has ended."""
        return not any(
            self.installation.prefix in words and "shim.nri" in words
            for words in map(read, glob.glob("/proc/[0-9]*/cmdline"))
        )

    def forget(self) -> None:
        """Remove the state directory's contents."""
        until(self.idle, "the end of all work")
        shutil.rmtree(self.state)
        os.mkdir(self.state, 0o755)

    def close(self) -> None:
        for plugin in self.plugins:
            if plugin.process is not None:
                plugin.stop(signal.SIGKILL)
        self.cri.__exit__()
        self.containerd.stop()
        self.commands.end()
        shutil.rmtree(self.state)


def ask(**document: Any) -> dict[str, str]:
    return {"chandler.oci/service": json.dumps(document)}


def gpus(count: int) -> dict[str, Any]:
    return {"gpu": {"count": count}}


def opened(cri: CRI, container: str) -> list[int]:
    """The indexes of the GPUs that the container can open.

    Where it has no node for a GPU, it makes one with mknod and tries that.
    """
    return [n for n in range(8) if cri.exec(container, "sh", "-c", f"exec 3</dev/nvidia{n}").code == 0]
