"""`chandler cdi generate` and `chandler cdi diff`, as a person uses them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import lab
import pytest
from generate import hosts
from generate.hosts import Host

from shim.cli import generate
from shim.cli.main import main
from shim.generate import cdi_file, nvml

REPOSITORY = pathlib.Path(lab.REPOSITORY)


class Machine:
    def __init__(self, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.host = Host()
        self.trees = 0
        monkeypatch.setattr(generate, "HostTree", self.tree)
        monkeypatch.setattr(nvml, "ask", lambda library: self.host.ask(library))

    def tree(self) -> Any:
        self.trees += 1
        return self.host.build(str(self.directory / f"tree{self.trees}"))


@pytest.fixture
def machine(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.delenv("CHANDLER_CONFIG", raising=False)
    return Machine(tmp_path, monkeypatch)


def run(command: str, *arguments: object) -> int:
    return main(["cdi", command, *map(str, arguments)])


def test_to_standard_output(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.host = hosts.nvidia(2)
    assert run("generate") == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert [device["name"] for device in made["devices"]] == [
        "0",
        hosts.uuid(0),
        "1",
        hosts.uuid(1),
        "all",
    ] and err == ""
    assert run("generate", "--format", "yaml", "--vendor", "nvidia") == 0
    assert capsys.readouterr().out.startswith('---\ncdiVersion: "0.7.0"\nkind: "nvidia.com/gpu"\n')


def test_names_modes_and_all(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.host = hosts.nvidia(2)
    machine.host.nvml = hosts.nvml(2)
    assert run("generate", "--device-name-strategy", "uuid", "--device-name-strategy", "type-index", "--no-all") == 0
    assert [device["name"] for device in json.loads(capsys.readouterr().out)["devices"]] == [
        hosts.uuid(0),
        "gpu0",
        hosts.uuid(1),
        "gpu1",
    ]
    assert run("generate", "--mode", "management") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "management.nvidia.com/gpu"
    assert run("generate", "--mode", "gds") == 1
    assert "this host has no device of kind nvidia.com/gds" in capsys.readouterr().err
    assert run("generate", "--mode", "gds", "--vendor", "amd") == 1
    assert "is a mode of NVIDIA's devices; leave --vendor out" in capsys.readouterr().err


def test_without_devices_nothing_is_written(
    machine: Machine, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("generate", "--output", tmp_path / "x.json") == 1
    out, err = capsys.readouterr()
    assert out == "" and err == (
        "chandler: this host has no device of kind nvidia.com/gpu, amd.com/gpu, intel.com/gpu, intel.com/gaudi, "
        "intel.com/npu; nothing was generated\n"
    )
    assert not (tmp_path / "x.json").exists()


def test_writing_the_same_file_twice_changes_nothing(
    machine: Machine, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.host = hosts.nvidia(1)
    path = tmp_path / "new/nvidia.json"
    assert run("generate", "--output", path, "--dry-run") == 0
    assert (
        capsys.readouterr().err == f"{path}: would be written (1 device of nvidia.com/gpu, CDI 0.7.0)\n"
        and not path.exists()
    )
    assert run("generate", "--output", path) == 0
    assert f"{path}: written" in capsys.readouterr().err
    assert os.stat(path).st_mode & 0o777 == 0o644
    before = os.stat(path).st_ino
    assert run("generate", "--output", path) == 0
    assert "is up to date" in capsys.readouterr().err and os.stat(path).st_ino == before


def test_several_vendors_need_a_directory(
    machine: Machine, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.host = hosts.nvidia(1).add(hosts.gaudi(1))
    assert run("generate") == 1
    assert "this host has devices of nvidia, gaudi" in capsys.readouterr().err
    assert run("generate", "--output", f"{tmp_path}/cdi/") == 0
    assert sorted(os.listdir(tmp_path / "cdi")) == ["chandler-gaudi.json", "chandler-nvidia.json"]


def test_wrong_calls_are_refused(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.host = hosts.mig(1, {0: 1})
    del machine.host.nodes["/dev/nvidia-caps/nvidia-cap11"]
    assert run("generate") == 1
    out, err = capsys.readouterr()
    assert (
        out == "" and err.startswith("chandler: /dev/nvidia-caps/nvidia-cap11, the capability") and err.count("\n") == 1
    )


def test_diff(machine: Machine, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.host = hosts.nvidia(1)
    path = tmp_path / "nvidia.json"
    run("generate", "--output", path, "--device-name-strategy", "type-index")
    assert run("diff", path) == 0
    assert capsys.readouterr().out == "nothing changed\n"
    machine.host = hosts.nvidia(2)
    assert run("diff", path) == 1
    assert "+ device gpu1\n" in capsys.readouterr().out
    machine.host = Host()
    assert run("diff", path, "--format", "json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (
        told["ours"]
        and not told["edited"]
        and told["changes"][0] == "this host has no device of kind nvidia.com/gpu at present"
    )
    path.write_bytes(path.read_bytes().replace(b"=void", b"=none"))
    machine.host = hosts.nvidia(1)
    assert run("diff", path) == 1
    out, err = capsys.readouterr()
    assert "was changed since Chandler made it" in err and "+ env NVIDIA_VISIBLE_DEVICES=void" in out


def test_diff_of_another_tools_file(
    machine: Machine, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.host = hosts.nvidia(2)
    path = tmp_path / "nvidia.yaml"
    path.write_text(
        "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: gpu0\n"
        "  containerEdits: {deviceNodes: [{path: /dev/nvidia0}]}\n"
    )
    assert run("diff", path) == 1
    out = capsys.readouterr().out
    assert "+ device gpu1" in out and "device 1\n" not in out
    path.write_text(
        "cdiVersion: 0.5.0\nkind: example.com/gpu\ndevices:\n- name: gpu0\n  containerEdits: {env: [A=b]}\n"
    )
    assert run("diff", path) == 1
    assert "Chandler does not describe devices of kind example.com/gpu" in capsys.readouterr().err


PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:3]
from generate import hosts
from shim.cli import generate
from shim.generate import nvml
host = hosts.nvidia(8)
host.nvml = hosts.nvml(8)
tree = host.build(sys.argv[3])
generate.HostTree = lambda: tree
nvml.ask = host.ask
from shim.cli.main import main
status = main(["cdi", "generate", "--output", sys.argv[3] + "/nvidia.json"])
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
with open("/proc/self/status") as file:  # ru_maxrss would be the parent's, who forked
    memory = next(line.split()[1] for line in file if line.startswith("VmHWM:"))
print(memory, used.ru_utime + used.ru_stime)
sys.exit(status)
"""


def test_the_whole_command_for_eight_gpus(tmp_path: pathlib.Path) -> None:
    """Under half a second of CPU time and 100 MiB, including the interpreter's start and the fixture."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(REPOSITORY / "tests"), str(REPOSITORY), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    memory, seconds = done.stdout.split()
    assert int(memory) < 100 << 10 and float(seconds) < 0.5
    made = json.loads((tmp_path / "nvidia.json").read_bytes())
    assert len(made["devices"]) == 17 and cdi_file.is_untouched(made)
