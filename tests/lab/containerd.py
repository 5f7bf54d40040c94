"""A private containerd with CRI and NRI: its sockets, state and runtime root are separate from others on this host."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import NamedTuple

from lab import image
from lab.runtimes import CACHE

PATIENCE = 60.0
IMAGE = "docker.io/local/busybox:1"


class Release(NamedTuple):
    """`schema`: version of the configuration file. `cri`, `images`: the plugins that the CRI service is made of."""

    label: str
    directory: str
    schema: int
    cri: str

    @property
    def missing(self) -> str:
        return "" if os.access(self.binary("containerd"), os.X_OK) else f"not installed: {self.label}"

    def binary(self, name: str) -> str:
        return os.path.join(self.directory, "root/usr/bin", name)


RELEASES = (
    Release("containerd-1.7", f"{CACHE}/containerd-1.7", 2, "io.containerd.grpc.v1.cri"),
    Release("containerd-2", f"{CACHE}/containerd-2", 3, "io.containerd.cri.v1.runtime"),
)
# containerd 2.4 with an NRI that no release of containerd has yet. It has the default validator and a failure policy
# for each plugin.
NEWEST_NRI = Release("containerd-2.4", f"{CACHE}/containerd-2.4", 3, "io.containerd.cri.v1.runtime")


class Containerd:
    """`handlers`: runtime handler to its binary. `systemd`: whether systemd makes the control groups."""

    def __init__(
        self, release: Release, directory: str, handlers: Mapping[str, str], cdi: str, systemd: bool = False
    ) -> None:
        self.release = release
        self.validator: dict[str, bool | list[str]] = {}
        self.systemd = systemd
        self.directory = directory
        self.handlers = {"runc": "/usr/sbin/runc", **handlers}
        self.cdi = cdi
        self.nri_plugins = os.path.join(directory, "nri-plugins")
        self.log = os.path.join(directory, "log")
        self.process: subprocess.Popen[bytes] | None = None
        for name in ("nri-plugins", "nri-conf.d", "cni", "bin"):
            os.makedirs(os.path.join(directory, name), exist_ok=True)
        self.configure()

    @property
    def config(self) -> str:
        return os.path.join(self.directory, "config.toml")

    def configure(self, **validator: bool | list[str]) -> None:
        """Write the configuration for the next start. `validator`: settings of NRI's default validator."""
        self.validator = validator
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(self._config())

    @property
    def socket(self) -> str:
        return os.path.join(self.directory, "c.sock")

    @property
    def nri(self) -> str:
        return os.path.join(self.directory, "nri.sock")

    def bundle(self, container: str) -> str:
        """Where the config.json of a container lies while it runs."""
        return os.path.join(self.directory, "state/io.containerd.runtime.v2.task/k8s.io", container)

    def _config(self) -> str:
        d, cri = self.directory, f"plugins.'{self.release.cri}'"
        lines = [
            f"version = {self.release.schema}",
            f"root = '{d}/root'",
            f"state = '{d}/state'",
            "[grpc]",
            f"address = '{self.socket}'",
            "[plugins.'io.containerd.internal.v1.opt']",
            f"path = '{d}/opt'",
            "[plugins.'io.containerd.nri.v1.nri']",
            "disable = false",
            f"socket_path = '{self.nri}'",
            f"plugin_path = '{self.nri_plugins}'",
            f"plugin_config_path = '{d}/nri-conf.d'",
        ]
        if self.validator:
            lines += [
                "[plugins.'io.containerd.nri.v1.nri'.default_validator]",
                *(
                    f"{key} = {str(value).lower() if isinstance(value, bool) else value}"
                    for key, value in self.validator.items()
                ),
            ]
        if self.release.schema == 3:
            lines += ["[plugins.'io.containerd.cri.v1.images'.pinned_images]", f"sandbox = '{IMAGE}'"]
        lines += [f"[{cri}]"]
        if self.release.schema == 2:
            lines += [f"sandbox_image = '{IMAGE}'"]
        # Where the host does not let us lower oom_score_adj, the daemon must not try.
        lines += [
            "restrict_oom_score_adj = true",
            "disable_apparmor = true",
            "enable_cdi = true",
            f"cdi_spec_dirs = ['{self.cdi}']",
            f"[{cri}.cni]",
            f"conf_dir = '{d}/cni'",
            f"bin_dirs = ['{d}/bin']" if self.release.schema == 3 else f"bin_dir = '{d}/bin'",
            f"[{cri}.containerd]",
            "default_runtime_name = 'runc'",
        ]
        for name, binary in self.handlers.items():
            runtime = f"{cri}.containerd.runtimes.{name}"
            lines += [
                f"[{runtime}]",
                "runtime_type = 'io.containerd.runc.v2'",
                "pod_annotations = ['chandler.oci/*']",
                "container_annotations = ['chandler.oci/*']",
                f"[{runtime}.options]",
                f"BinaryName = '{binary}'",
                f"Root = '{d}/runc-root'",
                f"SystemdCgroup = {str(self.systemd).lower()}",
            ]
        return "\n".join(lines) + "\n"

    def start(self) -> None:
        """Start the daemon; returns when it answers."""
        path = f"{os.path.dirname(self.release.binary('x'))}:/usr/sbin:/usr/bin:/sbin:/bin"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [self.release.binary("containerd"), "--config", self.config],
                env={"HOME": "/root", "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + PATIENCE
        while self.ctr("version", check=False).returncode:
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"containerd does not answer: {self.said()[-2000:]}")
            time.sleep(0.02)
        if IMAGE not in self.ctr("-n", "k8s.io", "images", "ls", "-q").stdout:
            self.ctr("-n", "k8s.io", "images", "import", image.make(os.path.join(self.directory, "image.tar"), IMAGE))

    def ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.release.binary("ctr"), "-a", self.socket, *arguments],
            check=check,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def stop(self) -> None:
        """End the daemon; containers live on."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(PATIENCE)
            finally:
                self.process = None

    def said(self) -> str:
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read()
