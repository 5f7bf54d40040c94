"""The vendor table: every name of a vendor is accepted everywhere, and a new vendor is one entry."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import lab
import pytest
from generate import hosts
from lab.gpu_files import DEFAULTS, granted, inventory

from shim.cli import generate, main
from shim.generate import generators, nvml
from shim.gpu import vendors
from shim.node.config import compile_config

REPOSITORY = pathlib.Path(lab.REPOSITORY)


def look(path: str) -> tuple[str, int, int, int, int, str]:
    """A host that has every node."""
    return ("c", 261, int("".join(filter(str.isdigit, path)) or 0), 0o666, 0, "")


def test_every_entry_is_complete() -> None:
    names = [name for vendor in vendors.VENDORS for name in vendor.names]
    assert len(set(names)) == len(names)
    assert len({vendor.kind for vendor in vendors.VENDORS}) == len(vendors.VENDORS)
    for vendor in vendors.VENDORS:
        assert vendor.generator in generators.GENERATORS
        assert vendor.modules and vendor.load and vendor.pci.startswith("0x")
    assert DEFAULTS["policy.kinds"] == [vendor.kind for vendor in vendors.with_gpus()]
    assert vendors.of_kind("example.com/gpu").gpu_nodes == () == vendors.of_kind("intel.com/npu").gpu_nodes


def test_the_udev_rule_knows_the_modules_of_every_vendor() -> None:
    rule = (REPOSITORY / "packaging/udev/70-chandler.rules").read_text()
    listed = rule.partition('SUBSYSTEM=="module", KERNEL=="')[2].partition('"')[0].split("|")
    assert sorted(listed) == sorted(module for vendor in vendors.VENDORS for module in vendor.modules)


@pytest.mark.parametrize(("name", "vendor"), [(name, vendor) for vendor in vendors.VENDORS for name in vendor.names])
def test_names_and_aliases_are_accepted_everywhere(
    name: str,
    vendor: vendors.Vendor,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if vendor.gpu_nodes:
        assert granted({"vendor": name}, inventory(), look=look).names == [f"{vendor.kind}=0"]
    assert compile_config([("a", f'[cdi]\ngenerate = ["{name}", "{vendor.name}"]'.encode())])["cdi.generate"] == [
        vendor.name
    ]
    monkeypatch.setattr(generate, "HostTree", lambda: hosts.Host().build(str(tmp_path)))
    monkeypatch.setattr(nvml, "ask", hosts.Host().ask)
    assert main.main(["cdi", "generate", "--vendor", name]) == 1
    assert f"no device of kind {vendor.kind}" in capsys.readouterr().err


def test_gaudi_has_two_names() -> None:
    assert vendors.by_name("habana") is vendors.by_name("gaudi") is not None


ENTRY = """
    Vendor(
        ("acme", "acmecorp"), "acme.com/npu", "accel", "0x1ace", ("acme_npu",), "modprobe acme_npu",
        variables=("ACME_MASK",), gpu_nodes=("/dev/accel/accel{0}",),
    ),
"""
USE = """
import argparse, json, pathlib, sys
directory = sys.argv[1]
sys.path[:0] = sys.argv[2:]
from generate.hosts import Host
from lab.gpu_files import DEFAULTS, granted, inventory
from shim.cli import doctor
from shim.errors import PolicyError
from shim.generate import managed
from shim.node.config import compile_config
from shim.node.inventory import Account
from shim.policy import permission

found = granted({"vendor": "acmecorp"}, inventory(), look=lambda path: ("c", 261, 0, 0o666, 0, "0x1ace"))
assert found.names == ["acme.com/npu=0"]
assert [edit[1] for edit in found.edits.items] == ["/dev/accel/accel0", "ACME_MASK"]
try:
    permission._check_variable("ACME_MASK", "a", True)
    sys.exit("a request may set the variable")
except PolicyError:
    pass
assert "acme.com/npu" in DEFAULTS["policy.kinds"]
assert compile_config([("a", b'[cdi]\\ngenerate = ["acmecorp"]')])["cdi.generate"] == ["acme"]

host = Host()
at = "/sys/bus/pci/drivers/acme_npu/0000:19:00.0"
host.file(at + "/accel/accel0/dev", "261:0\\n").file(at + "/device", "0x0001\\n").node("/dev/accel/accel0", 261, 0)
entries, _ = managed.fallback([], DEFAULTS, host.build(directory + "/tree"), host.ask)
(made,) = [json.loads(data) for name, data in entries if name == "acme.json"]
assert made["kind"] == "acme.com/npu" and made["devices"]

pci = pathlib.Path(directory, "host/sys/bus/pci/devices/0000:19:00.0")
pci.mkdir(parents=True)
(pci / "vendor").write_text("0x1ace\\n")
(pci / "class").write_text("0x120000\\n")
account = Account({})
account.config_path = directory + "/absent.toml"
checks = doctor.examine(doctor.HostReader(directory + "/host"), account)
(drivers,) = [check for check in checks if check.name == "gpu drivers"]
assert drivers.data["acme"]["on_bus"] == 1
assert [problem["remedy"] for problem in drivers.problems] == ["modprobe acme_npu"]
"""


def test_a_new_vendor_is_one_entry(tmp_path: pathlib.Path) -> None:
    """One more entry in a copy's table: request, policy, configuration, generate and doctor know the vendor."""
    shutil.copytree(REPOSITORY / "shim", tmp_path / "shim", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "shim/gpu/vendors.py"
    before, mark, after = table.read_text().partition("\nVENDORS = (")
    table.write_text(before + mark + after.replace("\n)\n", ENTRY + ")\n", 1))
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path), str(tmp_path), str(REPOSITORY / "tests")],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
