"""podman with its own images, containers and state, as root or as an unprivileged user, on the host's network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lab import cgroups, image
from lab.plugin import until
from lab.runtimes import CACHE

PATIENCE = 60.0
IMAGE = "docker.io/local/busybox:1"
# A real user of every Debian, to whom nothing on the host belongs.
UID, NAME = 1, "daemon"
LENT = 100000


class Release(NamedTuple):
    """`directory`: where podman and its helpers are; "" for the host's podman."""

    label: str
    directory: str

    @property
    def missing(self) -> str:
        return "" if os.access(self.binary("podman"), os.X_OK) else f"not installed: {self.label}"

    def binary(self, name: str) -> str:
        return os.path.join(self.directory or "/usr", "bin", name)


RELEASES = (Release("podman-4", ""), Release("podman-5", f"{CACHE}/podman-5"))


class Podman:
    """podman in a mount namespace of its own, where /etc/containers is the directory `etc` here."""

    def __init__(self, release: Release, directory: str, rootless: bool = False) -> None:
        self.release = release
        self.directory = directory
        self.rootless = rootless
        self.cdi = ""  # where podman itself looks for CDI files, unless that is the usual directory
        self.etc, self.home = (os.path.join(directory, name) for name in ("etc", "home"))
        # podman 4 takes no path of more than 50 characters for this
        self.state = tempfile.mkdtemp(prefix="podman-", dir="/run")
        for path in (directory, self.etc, self.home):
            os.mkdir(path)
            os.chmod(path, 0o755)
        changes = [f"mount --bind {self.etc} /etc/containers", "mount --make-rshared /"]
        if cgroups.mode() == "hybrid":  # with which crun does not work
            changes.append(f"umount {cgroups.SYSFS}/unified")
        if rootless:
            for path in (self.home, self.state):
                os.chown(path, UID, UID)
            self._write("subids", f"{NAME}:{LENT}:65536\n")
            changes += [f"mount --bind {directory}/subids /etc/{name}" for name in ("subuid", "subgid")]
        # No systemd, no right to raise limits, and only the host's network (podman 5 needs a network helper even so).
        helpers = (
            [f'helper_binaries_dir = ["{release.directory}/bin"]', f'conmon_path = ["{release.binary("conmon")}"]']
            if release.directory
            else []
        )
        self._write(
            "etc/containers.conf",
            "\n".join(
                [
                    "[containers]",
                    'default_ulimits = ["nofile=512:512", "nproc=512:512"]',
                    'netns = "host"',
                    "[engine]",
                    'cgroup_manager = "cgroupfs"',
                    'events_logger = "file"',
                    f'infra_image = "{IMAGE}"',
                    *helpers,
                ]
            )
            + "\n",
        )
        self._write("etc/policy.json", '{"default": [{"type": "insecureAcceptAnything"}]}')
        self._write("etc/registries.conf", "")
        self.holder = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                f"{' && '.join(changes)} && echo ready && exec cat",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout and self.holder.stdout.readline() == "ready\n"

    def _write(self, name: str, text: str) -> None:
        with open(os.path.join(self.directory, name), "w", encoding="utf-8") as file:
            file.write(text)

    def call(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as the user, in podman's mount namespace."""
        user = ["setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups"] if self.rootless else []
        done = subprocess.run(
            ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", "--wdns=/", *user, *command],
            check=False,
            input="",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=self.env,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done

    @property
    def env(self) -> dict[str, str]:
        """root has no directory of his own at run time: crun would keep its state there."""
        user = {"XDG_RUNTIME_DIR": self.state} if self.rootless else {}
        return {
            "HOME": self.home,
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
            **user,
        }

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        places = [f"--root={self.home}/images", f"--runroot={self.state}/run", f"--tmpdir={self.state}/tmp"]
        if self.cdi:
            places.append(f"--cdi-spec-dir={self.cdi}")
        # vfs works on every file system that the tests may run on.
        return self.call(self.release.binary("podman"), *places, "--storage-driver=vfs", *arguments, check=check)

    def load(self) -> None:
        """Load the image."""
        self.cli("load", "--input", image.make(os.path.join(self.directory, "image.tar"), IMAGE))

    def run(
        self,
        runtime: str,
        *options: str,
        annotations: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        asked = [self.annotation(f"{key}={value}") for key, value in (annotations or {}).items()]
        return self.cli(f"--runtime={runtime}", "run", *asked, *options, IMAGE, *command, check=check)

    def annotation(self, text: str) -> str:
        """podman 4 reads the option as a line of comma-separated values."""
        return "--annotation=" + (text if self.release.directory else '"' + text.replace('"', '""') + '"')

    def inspect(self, container: str) -> Any:
        return json.loads(self.cli("inspect", container).stdout)[0]

    def bundle(self, container: str) -> str:
        return os.path.dirname(str(self.inspect(container)["OCIConfigPath"]))

    def logs(self, container: str, end: str) -> list[str]:
        """The lines that a container has written, as soon as `end` is one of them."""
        lines: list[str] = until(
            lambda: end in (found := self.cli("logs", container).stdout.splitlines()) and found,
            f"{end} from {container}",
        )
        return lines

    def clean(self) -> None:
        """Remove every pod and container."""
        self.cli("pod", "rm", "--all", "--force", "--time=0")
        self.cli("rm", "--all", "--force", "--time=0")

    def close(self) -> None:
        self.clean()
        if self.rootless:
            self.cli("system", "migrate")  # ends the process that keeps the user's namespace
        self.holder.send_signal(signal.SIGKILL)
        self.holder.communicate()
        shutil.rmtree(self.state, ignore_errors=True)
