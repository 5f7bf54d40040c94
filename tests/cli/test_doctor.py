"""`chandler doctor` on hosts that are only files: every problem comes with a remedy, and a healthy host has none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shim.cli import doctor, main
from shim.doctor import runtimes
from shim.doctor.model import Check, HostReader
from shim.node.inventory import Account
from shim.state import ledger

CDI = (
    '{"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": [{"name": "0", "containerEdits": {"env": ["A=b"]}}]}'
)


class Machine:
    """A healthy host with cgroup version 2, runc, containerd and an NVIDIA GPU; each test breaks something."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "host"
        self.host = HostReader(str(self.directory))
        self.settings = {
            "runtimes": '["runc"]',
            "engine": '"containerd"',
            "cdi": f'{{spec-dirs = ["{directory}/cdi"]}}',
            "state-dir": f'"{directory}/state"',
        }
        self.config = directory / "config.toml"
        self.account = Account({})
        self.account.config_path = str(self.config)
        self.account.rootless = False
        self.put("/proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        self.put("/proc/self/cgroup", "0::/system.slice/x.service\n")
        self.put("/proc/1/cgroup", "0::/init.scope\n")
        self.put("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n")
        self.put("/sys/fs/cgroup/system.slice/x.service/cgroup.subtree_control", "memory pids\n")
        self.runtime("runc", "runc version 1.3.6+ds1")
        self.put("/usr/bin/containerd")
        self.put("/etc/containerd/config.toml", 'BinaryName = "/usr/bin/chandler-runtime"\n')
        self.put("/var/run/nri/nri.sock")
        self.put("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
        self.put("/sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n")
        self.put("/sys/bus/pci/devices/0000:00:02.0/vendor", "0x8086\n")
        self.put("/sys/bus/pci/devices/0000:00:02.0/class", "0x030000\n")
        self.put("/sys/module/nvidia/version", "550.54.15\n")
        self.put("/sys/module/nvidia_uvm/refcnt")
        for node in ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"):
            self.put("/dev/" + node)
        (directory / "cdi").mkdir()
        (directory / "cdi/nvidia.json").write_text(CDI)

    def put(self, path: str, text: str = "") -> None:
        file = self.directory / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def drop(self, path: str) -> None:
        os.unlink(self.directory / path.lstrip("/"))

    def runtime(self, name: str, says: str) -> None:
        self.put(f"/usr/bin/{name}", f"#!/bin/sh\necho '{says}'\n")
        os.chmod(self.directory / f"usr/bin/{name}", 0o755)

    def checks(self) -> dict[str, Check]:
        self.config.write_text("".join(f"{key} = {value}\n" for key, value in self.settings.items()))
        return {check.name: check for check in doctor.examine(self.host, self.account)}

    def problems(self) -> list[tuple[str, str, str]]:
        return [
            (check.name, problem["problem"], problem["remedy"])
            for check in self.checks().values()
            for problem in check.problems
        ]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("validator", "rejected"),
    [
        ("enable = true\nreject_oci_hook_adjustment = true\n", True),
        ("reject_oci_hook_adjustment = true\n", False),
        ("enable = true\n", False),
    ],
)
@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("etc", ["/etc/containerd", "/var/lib/rancher/k3s/agent/etc/containerd"])
def test_hooks_that_containerd_rejects(
    machine: Machine, validator: str, rejected: bool, imported: bool, etc: str
) -> None:
    if etc != "/etc/containerd":
        machine.drop("/etc/containerd/config.toml")
    text = f"version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\n{validator}"
    handler = "[plugins.x]\nBinaryName = '/usr/bin/chandler-runtime'\n"
    if imported:
        machine.put("/etc/containerd/conf.d/10-validator.toml", text)
        text = "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n"
    machine.put(f"{etc}/config.toml", text + handler)
    check = machine.checks()["nri"]
    assert (check.data.get("hooks") == "rejected") == (
        f"reject_oci_hook_adjustment in {etc}/config.toml" in check.text
    ) == rejected and not check.problems


def test_a_healthy_host(machine: Machine) -> None:
    found = machine.checks()
    assert [check.problems for check in found.values()] == [[]] * len(found)
    assert list(found) == [
        "configuration",
        "caller",
        "cgroups",
        "runtimes",
        "cdi",
        "gpu drivers",
        "nri",
        "engines",
        "state",
        "leases",
    ]
    assert found["runtimes"].data == [{"kind": "runc", "path": "/usr/bin/runc", "version": "1.3.6", "configured": True}]
    assert found["cdi"].data["devices"] == {"nvidia.com/gpu": 1}
    assert found["gpu drivers"].data == {
        "nvidia": {
            "on_bus": 1,
            "modules": ["nvidia", "nvidia_uvm"],
            "nodes": ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"],
            "version": "550.54.15",
        },
        "intel": {"on_bus": 1, "modules": [], "nodes": [], "version": ""},
    }
    assert found["engines"].data == {
        "containerd": {
            "installed": True,
            "configured": True,
            "identity": True,
            "from_image": "nothing",
            "known_by": "--root and bundle are of containerd's namespace k8s.io",
        }
    }
    assert found["nri"].data == {"socket": "/var/run/nri/nri.sock"}
    assert "delegated memory pids" in found["cgroups"].text


def spoil(machine: Machine, what: str) -> None:
    directory = machine.directory.parent
    if what == "no runtime":
        machine.drop("/usr/bin/runc")
    elif what == "old runc":
        machine.runtime("runc", "runc version 1.1.5+ds1")
    elif what == "newer runc":
        machine.runtime("runc", "runc version 1.2.4")
    elif what == "runc 1.3":
        machine.runtime("runc", "runc version 1.3.0")
    elif what == "silent runc":
        machine.runtime("runc", "hello")
    elif what == "crun":
        machine.settings["runtimes"] = '["crun", "runc"]'
        machine.runtime("crun", "crun version 1.8.1")
    elif what == "crun on hybrid":
        machine.settings["runtimes"] = '["crun", "runc"]'
        machine.runtime("crun", "crun version 1.28")
        machine.put(
            "/proc/self/mountinfo",
            "31 29 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory,cpu,pids\n"
            "45 29 0:41 / /sys/fs/cgroup/unified rw - cgroup2 c rw\n",
        )
        (machine.directory / "sys/fs/cgroup/memory/system.slice/x.service").mkdir(parents=True)
    elif what == "no cgroups":
        machine.put("/proc/self/mountinfo", "")
    elif what == "bad cdi":
        (directory / "cdi/broken.json").write_text("{")
    elif what == "conflict":
        (directory / "cdi/second.json").write_text(CDI)
    elif what == "no driver":
        for module in ("nvidia/version", "nvidia_uvm/refcnt"):
            machine.drop("/sys/module/" + module)
        for module in ("nvidia", "nvidia_uvm"):
            os.rmdir(machine.directory / "sys/module" / module)
    elif what == "no uvm":
        machine.drop("/dev/nvidia-uvm")
    elif what == "no cdi":
        machine.settings["gpu"] = '{fallback = "off"}'
        os.unlink(directory / "cdi/nvidia.json")
    elif what == "containerd's configuration is no TOML":
        machine.put("/etc/containerd/config.toml", '[ # BinaryName = "/usr/bin/chandler-runtime"\n')
    elif what == "no nri":
        machine.settings["require-grant"] = "true"
        machine.drop("/var/run/nri/nri.sock")
    elif what == "engine elsewhere":
        machine.put("/etc/containerd/config.toml", "version = 2\n")
    elif what == "no engine":
        del machine.settings["engine"]
    elif what == "bad configuration":
        machine.settings["nonsense"] = "1"
    elif what == "leases":
        (directory / "state").mkdir()
        (directory / "state/leases").write_text("{")
    elif what == "state":
        (directory / "state").mkdir()
        os.chmod(directory / "state", 0o777)
    else:
        raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "check", "problem", "remedy"),
    [
        ("no runtime", "runtimes", "none of the configured runtimes (runc)", "install runc"),
        ("old runc", "runtimes", "/usr/bin/runc 1.1.5: a container can reach the host", "runc 1.1.12"),
        ("newer runc", "runtimes", "CVE-2025-31133", "runc 1.2.8"),
        ("runc 1.3", "runtimes", "CVE-2025-31133", "runc 1.3.3"),
        ("silent runc", "runtimes", "does not say its version", "see whether it starts"),
        ("crun", "runtimes", "refuses ociVersion 1.2", "a newer crun"),
        ("crun on hybrid", "runtimes", "refuses control groups of version 1 and 2", "runc or youki first"),
        ("no cgroups", "cgroups", "no control groups are mounted", "mount -t cgroup2"),
        ("bad cdi", "cdi", "broken.json", "correct "),
        ("conflict", "cdi", "is defined by", "keep one of them"),
        ("no driver", "gpu drivers", "1 devices of nvidia are on the PCI bus", "nvidia-modprobe"),
        ("no uvm", "gpu drivers", "/dev/nvidia-uvm is missing", "nvidia-modprobe"),
        ("no cdi", "gpu drivers", "no CDI file describes nvidia.com/gpu", "chandler cdi generate"),
        ("no nri", "nri", "require-grant is set", "enable NRI"),
        ("containerd's configuration is no TOML", "nri", "/etc/containerd/config.toml", "correct it"),
        (
            "engine elsewhere",
            "engines",
            'engines of the configuration has "containerd"',
            "chandler configure containerd",
        ),
        (
            "no engine",
            "engines",
            'engines of the configuration does not have "containerd"',
            "chandler configure containerd",
        ),
        ("bad configuration", "configuration", "unknown key 'nonsense'", "remove it"),
        ("leases", "leases", "is damaged", "`chandler leases rebuild`"),
        ("state", "state", "can be written by others", "chmod go-w"),
    ],
)
def test_a_problem_and_its_remedy(machine: Machine, what: str, check: str, problem: str, remedy: str) -> None:
    spoil(machine, what)
    found = machine.problems()
    assert any(name == check and problem in said and remedy in todo for name, said, todo in found), found
    assert all(todo for _, _, todo in found)
    if what not in ("bad configuration", "conflict"):  # which bring others with them
        assert {name for name, _, _ in found} == {check}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("runc version 1.1.5+ds1", (1, 1, 5)),
        ("crun version 1.28", (1, 28)),
        ("youki version: 0.7.0", (0, 7, 0)),
        ("runc version 1.2.0-rc.1", (1, 2, 0)),
        ("crun 1.14.1~deb", (1, 14, 1)),
        ("", ()),
        ("hello", ()),
        ("version x.y", ()),
        ("1", ()),
    ],
)
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert runtimes.parse_version(text) == version


@pytest.mark.parametrize(
    ("kind", "version", "bad"),
    [
        ("runc", (1, 1, 11), 1),
        ("runc", (1, 1, 12), 1),
        ("runc", (1, 2, 7), 1),
        ("runc", (1, 2, 8), 0),
        ("runc", (1, 3, 2), 1),
        ("runc", (1, 3, 3), 0),
        ("runc", (1, 4, 0), 0),
        ("crun", (1, 8, 1), 2),
        ("crun", (1, 21), 1),
        ("crun", (1, 28), 0),
        ("youki", (0, 7, 0), 1),
        ("runc", (), 0),
        ("other", (0, 1), 0),
    ],
)
def test_known_bad_versions(kind: str, version: tuple[int, ...], bad: int) -> None:
    assert len(runtimes.known_defects(kind, version)) == bad


def test_an_unprivileged_user(machine: Machine) -> None:
    machine.account.rootless, machine.account.euid = True, 54321
    os.chmod(machine.directory / "sys/fs/cgroup", 0o755)
    found = [problem for check, problem, _ in machine.problems() if check == "caller"]
    assert any("no range in /etc/subuid" in each for each in found) and any(
        "newuidmap is not installed" in each for each in found
    )
    for path in ("/etc/subuid", "/etc/subgid"):
        machine.put(path, "54321:100000:65536\n")
    for program in ("newuidmap", "newgidmap"):
        machine.put("/usr/bin/" + program)
    caller = machine.checks()["caller"]
    assert caller.problems == [] and caller.data == {"uid": 54321, "rootless": True, "ranges": 2}


def run(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    machine.checks()  # writes the configuration
    monkeypatch.setattr(doctor, "HostReader", lambda: machine.host)
    monkeypatch.setattr(doctor, "Account", lambda _: machine.account)
    return main.main(["doctor", *arguments]), capsys.readouterr().out


def test_the_command(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(machine, monkeypatch, capsys)
    assert status == 0 and text.endswith("nothing is wrong\n")
    spoil(machine, "old runc")
    status, text = run(machine, monkeypatch, capsys)
    assert (
        status == 1
        and "problem: /usr/bin/runc" in text
        and "remedy:  runc 1.1.12" in text
        and text.endswith("1 problem\n")
    )
    status, text = run(machine, monkeypatch, capsys, "--format", "json")
    document: dict[str, Any] = json.loads(text)
    assert status == 1 and [problem["check"] for problem in document["problems"]] == ["runtimes"]
    assert document["checks"]["cgroups"]["version"] == "v2" and document["checks"]["caller"]["rootless"] is False


def test_doctor_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever this machine is like, every problem comes with a remedy."""
    assert main.main(["doctor", "--format", "json"]) in (0, 1)
    assert all(problem["remedy"] for problem in json.loads(capsys.readouterr().out)["problems"])


def test_what_is_damaged_is_not_counted(machine: Machine) -> None:
    (machine.directory.parent / "state").mkdir()
    for name in ("leases", "leases.copy"):
        (machine.directory.parent / "state" / name).touch()
    found = machine.checks()["leases"]
    assert found.text == "not known" and found.data["held"] is None and "damaged" in found.problems[0]["problem"]


def test_held_and_stale_leases_are_counted(machine: Machine) -> None:
    assert machine.checks()["leases"].text == "0 held"
    (machine.directory.parent / "state").mkdir()
    leases = [
        {
            **ledger.oci_lease("gone", str(machine.directory), "/bin/false", 0),
            "started": 1,  # another process had the pid then
            "names": ["0"],
            "keys": ["c195:0"],
        },
        {**ledger.nri_lease("there", "pod", 0), "names": ["1"], "keys": ["c195:1"]},
    ]
    (machine.directory.parent / "state/leases").write_text(json.dumps(leases))
    found = machine.checks()["leases"]
    assert (
        found.text == "2 held, 1 of them by containers that are gone (`chandler leases release --stale`)"
        and not found.problems
    )
    machine.settings["gpu"] = '{allocator = "fixed"}'
    assert machine.checks()["leases"].text == 'none are kept (allocator = "fixed")'
