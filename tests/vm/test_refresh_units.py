"""chandler-refresh.path and .service: a change is compiled once, before the next create, and then nothing runs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from lab import bundle
from lab.engine import Engine, read
from lab.install import Installation
from lab.node import Node, spec, write
from lab.plugin import until
from lab.units import Unit, systemctl

PATH, SERVICE = Unit("chandler-refresh.path"), Unit("chandler-refresh.service")


def runs() -> int:
    """How many refreshes have ended."""
    return SERVICE.log().count("Finished ")


def quiet() -> bool:
    """Whether systemd has nothing to do: no job and no running refresh."""
    jobs = subprocess.run(["systemctl", "list-jobs", "--no-legend"], capture_output=True, text=True, check=True).stdout
    return not jobs.strip() and SERVICE.state == "inactive"


def waits() -> bool:
    """Whether a refresh sleeps."""
    pid = SERVICE.pid
    return bool(pid) and read(f"/proc/{pid}/wchan").startswith("hrtimer_")  # with what follows kernels differ


def inventories(chandler: Installation) -> dict[str, tuple[int, int]]:
    """Every compiled file, with what shows that it was replaced."""
    found = {}
    for directory, _, names in os.walk(chandler.state + "/inventory"):
        for name in names:
            status = os.stat(os.path.join(directory, name))
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


@pytest.fixture
def watched(chandler: Installation, gpus: Node) -> Iterator[Installation]:
    chandler.configure(["/usr/sbin/runc"], [gpus.cdi])
    chandler.refresh()
    systemctl("start", PATH.name)
    yield chandler
    systemctl("stop", PATH.name, SERVICE.name)


class Files:
    """CDI files beside the node's own, which are removed after the test."""

    def __init__(self, gpus: Node) -> None:
        self.gpus = gpus
        self.made: list[str] = []

    def add(self, kind: str) -> None:
        file = os.path.join(self.gpus.cdi, kind.replace("/", "-") + ".yaml")
        self.made.append(file)
        write(file, spec(self.gpus, kind=kind))


@pytest.fixture
def files(gpus: Node) -> Iterator[Files]:
    made = Files(gpus)
    yield made
    for file in made.made:
        os.unlink(file)


def test_a_new_device_is_known_before_a_create(watched: Installation, files: Files, workdir: str) -> None:
    before, compiled = runs(), inventories(watched)
    files.add("intel.com/gpu")
    until(waits, "a refresh, until the file is old enough to be believed")
    files.add("amd.com/gpu")  # while it is at work, when no path is watched
    until(quiet, "its end")
    assert runs() == before + 1 and inventories(watched) != compiled
    compiled = inventories(watched)
    engine = Engine([watched.program()], workdir + "/root")
    for vendor in ("intel", "amd"):
        made = bundle.make(f"{workdir}/{vendor}", ["true"], bundle.request(resources={"gpu": {"vendor": vendor}}))
        engine.create(made, vendor)
        assert made.config["annotations"]["chandler.oci/granted"] == vendor + ".com/gpu=0"
        engine.delete(vendor, "--force")
    assert inventories(watched) == compiled, "the creates found it compiled"
    assert quiet() and runs() == before + 1, "neither a refresh nor a create starts another refresh"


def test_a_configuration_that_changes_is_compiled(watched: Installation, gpus: Node) -> None:
    before = runs()
    watched.configure(["/usr/sbin/runc"], [gpus.cdi], "[policy]\nmax-gpus = 1\n")
    compiled = inventories(watched)
    until(lambda: runs() > before and quiet(), "a refresh")
    assert inventories(watched) != compiled
    assert runs() == before + 1, "what a refresh writes is no change"


def test_it_can_be_enabled(watched: Installation) -> None:
    """As a package or a person does."""
    systemctl("enable", PATH.name, SERVICE.name)
    try:
        for unit, target in ((PATH, "paths.target"), (SERVICE, "multi-user.target")):
            assert os.path.islink(f"/etc/systemd/system/{target}.wants/{unit.name}")
    finally:
        systemctl("disable", PATH.name, SERVICE.name)
