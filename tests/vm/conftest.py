"""Every test of this directory runs inside the lab's machine (lab/vm.py), where systemd is process 1.

Outside, a plugin hands the selected tests to a pytest inside the machine and shows its reports here. A test is
therefore written like any other and can use the usual fixtures. One boot serves all modules, and each leaves the
machine as it was. A module with OWN_MACHINE = True gets a boot of its own, and may install, start and break what it
likes.

`lab` and `workdir` are directories on a tmpfs, so that overlays can have their upper directory there. `chandler` is an
installation from this checkout below /usr, /etc and /run, with its units loaded in systemd; a test that needs another
one, for example from a package, does not use this fixture. `gpus` are two devices, /dev/nvidia0 and /dev/nvidia1, that
can be opened. `containerd` is each release in turn, with systemd's control groups, the runtime handler `chandler` and
NRI. `cri` is its kubelet, whose pods end with the test.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import REPOSITORY, cuse, vm
from lab.containerd import RELEASES, Containerd
from lab.cri import CRI
from lab.install import Installation
from lab.node import Device, Node, spec, write
from lab.plugin import until

HERE = Path(__file__).parent
INSIDE = "CHANDLER_MACHINE" in os.environ
PATIENCE = 300.0  # seconds for all tests of one boot
LAID_OUT = "/share/installed"


def machine(item: pytest.Item) -> str:
    """The name of the boot that a test belongs to; "" for tests of other directories."""
    if item.path.parent != HERE:
        return ""
    module = item.getparent(pytest.Module)
    return item.path.name if module and getattr(module.obj, "OWN_MACHINE", False) else "shared"


# --- outside --------------------------------------------------------------------------------------------------------


class Outside:
    """Replaces the tests by the reports from inside."""

    def __init__(self) -> None:
        self.reports: dict[str, list[pytest.TestReport]] = {}
        self.share: tempfile.TemporaryDirectory[str] | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if not machine(item):
            return None
        if vm.missing():
            item.add_marker(pytest.mark.skip(vm.missing()))
            return None
        if machine(item) not in self.reports:
            self.reports[machine(item)] = self.boot(
                [other for other in item.session.items if machine(other) == machine(item)]
            )
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports[machine(item)]:
            if report.nodeid == item.nodeid:
                item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def boot(self, items: list[pytest.Item]) -> list[pytest.TestReport]:
        """The reports of these tests; a failure for each test without a report."""
        try:
            share = self.lay_out()
            for outside in dict.fromkeys(getattr(item.module, "outside", None) for item in items):  # type: ignore[attr-defined]
                if outside:
                    outside(share)
            story = self.run(items, share)
            hook = items[0].config.hook
            reports = [
                hook.pytest_report_from_serializable(config=items[0].config, data=json.loads(line))
                for line in (share / "reports").read_text().splitlines()
            ]
        except (OSError, subprocess.CalledProcessError) as error:
            reports, story = [], str(error)
        done = {report.nodeid for report in reports if report.when == "teardown"}
        return reports + [
            pytest.TestReport(item.nodeid, item.location, {}, "failed", story, "call")
            for item in items
            if item.nodeid not in done
        ]

    def lay_out(self) -> Path:
        """The directory that the machine shares with this host, with an installation in it."""
        if self.share is None:
            made = tempfile.TemporaryDirectory(prefix="machine-")
            # Outside, where there are more processors: the machine only has to copy it.
            subprocess.run(
                [f"{REPOSITORY}/packaging/install"],
                check=True,
                stdin=subprocess.DEVNULL,
                env={"PATH": os.environ["PATH"], "DESTDIR": os.path.join(made.name, os.path.basename(LAID_OUT))},
            )
            self.share = made
        return Path(self.share.name)

    def run(self, items: list[pytest.Item], share: Path) -> str:
        """Run the tests in the machine; returns the message for tests that gave no report."""
        (share / "reports").write_text("")
        variables = {
            "CHANDLER_MACHINE": "/share",
            **{name: os.environ[name] for name in ("CHANDLER_TEST_CACHE", "CI") if name in os.environ},
        }
        command = [sys.executable, "-m", "pytest", "--color=no", *(item.nodeid for item in items)]
        words = shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command])
        ended = vm.run(f"cd {shlex.quote(str(items[0].config.rootpath))} && exec {words}", str(share), PATIENCE)
        return (
            f"the machine ended (status {ended.status}) before this test did\n"
            f"{ended.output[-4000:]}\n{ended.console[-4000:]}"
        )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Inside(config) if INSIDE else Outside())


# --- inside ---------------------------------------------------------------------------------------------------------


class Inside:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        with open("/share/reports", "a", encoding="utf-8") as file:
            print(
                json.dumps(self.config.hook.pytest_report_to_serializable(config=self.config, report=report)), file=file
            )


@pytest.fixture(scope="session")
def lab() -> str:
    return "/mnt"


@pytest.fixture(scope="session")
def chandler() -> Installation:
    """As `make install` leaves it; the test writes the configuration."""
    subprocess.run(["cp", "-a", LAID_OUT + "/.", "/"], check=True)
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    return Installation.placed("/usr", "/etc/chandler", "/run/chandler")


@pytest.fixture(scope="session")
def gpus() -> Iterator[Node]:
    """/dev/nvidia0 and /dev/nvidia1, 195:0 and 195:1, /dev/nvidiactl, 195:255, and a CDI file for them in /etc/cdi."""
    subprocess.run(["busybox", "modprobe", "cuse"], check=True)
    devices = [
        Device("/dev/" + name, "/dev/" + name, 195, minor)
        for name, minor in (("nvidia0", 0), ("nvidia1", 1), ("nvidiactl", 255))
    ]
    served = [
        subprocess.Popen(
            [sys.executable, cuse.__file__, os.path.basename(device.host), str(device.major), str(device.minor)]
        )
        for device in devices
    ]
    for device in devices:
        until(functools.partial(os.path.exists, device.host), device.host)
        os.chmod(device.host, 0o666)
    node = Node("/etc", devices[:2], devices[2:])
    os.makedirs(node.cdi, exist_ok=True)
    write(node.spec, spec(node))
    yield node
    for process in served:
        process.kill()
        process.wait()


@pytest.fixture(scope="session", params=RELEASES, ids=lambda release: release.label)
def containerd(request: pytest.FixtureRequest, lab: str, chandler: Installation, gpus: Node) -> Iterator[Containerd]:
    """Its NRI socket is where chandler-nri.service looks for it, too."""
    if request.param.missing:
        pytest.skip(request.param.missing)
    made = Containerd(
        request.param, os.path.join(lab, request.param.label), {"chandler": chandler.program()}, gpus.cdi, systemd=True
    )
    os.makedirs("/run/nri", exist_ok=True)
    os.symlink(made.nri, "/run/nri/nri.sock")
    made.start()
    yield made
    made.stop()
    os.unlink("/run/nri/nri.sock")


@pytest.fixture
def cri(containerd: Containerd) -> Iterator[CRI]:
    with CRI(containerd.socket) as made:
        made.ready()
        yield made
