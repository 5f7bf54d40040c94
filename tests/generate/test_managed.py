"""Files of Chandler on a host that changes: renewed, removed or left alone; and what a create would generate."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import NoReturn

import pytest
from generate import hosts
from generate.hosts import Host

from shim import paths
from shim.cdi.registry import Registry
from shim.errors import CdiError, ChandlerError
from shim.generate import cdi_file, driver_version, generators, managed, nvml
from shim.generate.model import Options
from shim.generate.tree import HostTree
from shim.gpu.vendors import VENDORS
from shim.host import trust
from shim.node import compiler, config, inventory

OWNERS = {os.geteuid(): "the caller", 0: "root"}


class Node:
    """A host, its CDI directories and its configuration."""

    def __init__(self, directory: pathlib.Path, host: Host) -> None:
        self.directory = directory
        self.host = host
        self.low, self.high = directory / "etc-cdi", directory / "run-cdi"
        self.low.mkdir()
        self.high.mkdir()
        self.config = config.compile_config([])
        self.config.update({"cdi.spec-dirs": [str(self.low), str(self.high)], "cdi.generate": ["nvidia"]})
        self.trees = 0

    @property
    def tree(self) -> HostTree:
        self.trees += 1
        return self.host.build(str(self.directory / f"tree{self.trees}"))

    @property
    def own(self) -> pathlib.Path:
        return self.high / "chandler-nvidia.json"

    def refresh(self) -> tuple[list[str], list[str]]:
        return managed.refresh(self.config, OWNERS, self.tree, self.host.ask)

    def names(self) -> list[str]:
        return [device["name"] for device in json.loads(self.own.read_bytes())["devices"]]


@pytest.fixture
def node(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(trust, "check_path", lambda path, owners: trust.path_steps(path))  # other tests cover trust
    host = hosts.mig(2, {1: 2})
    return Node(tmp_path, host)


def test_a_file_is_made_and_then_left_as_it_is(node: Node) -> None:
    assert node.refresh() == ([f"made {node.own}"], [])
    before = os.stat(node.own)
    assert before.st_mode & 0o777 == 0o644
    assert node.refresh() == ([], [])
    assert os.stat(node.own).st_ino == before.st_ino, "the file must not be written for an unchanged host"


def test_no_file_is_made_unless_configured(node: Node) -> None:
    node.config["cdi.generate"] = []
    assert node.refresh() == ([], []) and not node.own.exists()


def new_driver(host: Host) -> None:
    newer = hosts.mig(2, {1: 2})
    host.files = {
        path.replace(hosts.VERSION, "560.35.03"): text.replace(hosts.VERSION, "560.35.03")
        for path, text in newer.files.items()
    }
    host.links = {path: target.replace(hosts.VERSION, "560.35.03") for path, target in newer.links.items()}
    host.nvml = hosts.nvml(2, {1: 2}, "560.35.03")


def new_layout(host: Host) -> None:
    other = hosts.mig(2, {1: 3})
    host.files, host.nodes, host.nvml = other.files, other.nodes, other.nvml


def new_gpu(host: Host) -> None:
    other = hosts.mig(3, {1: 2})
    host.files, host.links, host.nodes, host.nvml = other.files, other.links, other.nodes, other.nvml


def new_numbers(host: Host) -> None:
    host.node("/dev/nvidia-uvm", 511, 0)


CHANGES: dict[Callable[[Host], None], str] = {
    new_driver: "driver 550.54.15 is now 560.35.03",
    new_layout: "renewed",
    new_gpu: "renewed",
    new_numbers: "renewed",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_host_renews_the_file(node: Node, change: Callable[[Host], None]) -> None:
    node.refresh()
    change(node.host)
    done, wrong = node.refresh()
    assert wrong == [] and len(done) == 1 and done[0].startswith(f"renewed {node.own}") and CHANGES[change] in done[0]
    made, _ = generators.describe("nvidia", node.tree, Options(), node.host.ask)
    assert made == json.loads(node.own.read_bytes())
    assert node.refresh() == ([], [])


def test_our_file_is_removed_without_gpus_and_made_again_with_them(node: Node) -> None:
    node.refresh()
    whole, node.host = node.host, Host()
    assert node.refresh() == ([f"removed {node.own}: this host has no device of kind nvidia.com/gpu"], [])
    assert not node.own.exists()
    node.host = whole
    assert node.refresh() == ([f"made {node.own}"], [])


def test_a_file_that_a_person_had_made_keeps_its_options_and_is_never_removed(node: Node) -> None:
    made, _ = generators.describe("nvidia", node.tree, Options(strategies=["type-index"], all=False), node.host.ask)
    assert made is not None
    path = node.low / "mine.yaml"
    path.write_bytes(cdi_file.render(made, "yaml"))
    new_driver(node.host)
    done, _ = node.refresh()
    assert done[0].startswith(f"renewed {path}") and not node.own.exists()
    again = managed.read(str(path), path.read_bytes())
    assert again is not None and [device["name"] for device in again.document["devices"]] == [
        "gpu0",
        "mig1:0",
        "mig1:1",
    ]
    assert path.read_bytes().startswith(b"---\n")
    node.host = Host()
    before = path.read_bytes()
    done, _ = node.refresh()
    assert "left as it is" in done[0] and path.read_bytes() == before


def test_a_file_that_a_person_changed_is_left_alone(node: Node) -> None:
    node.refresh()
    node.own.write_bytes(node.own.read_bytes().replace(b"NVIDIA_VISIBLE_DEVICES=void", b"NVIDIA_VISIBLE_DEVICES=none"))
    before = node.own.read_bytes()
    new_driver(node.host)
    done, _ = node.refresh()
    assert done == [f"{node.own} was changed since Chandler made it and is left as it is"]
    assert node.own.read_bytes() == before


def test_remove_deletes_the_files_that_need_chandler(node: Node) -> None:
    node.refresh()
    for name, hook in (("asked-for.json", ""), ("of-nvidia.json", "/usr/bin/nvidia-cdi-hook"), ("changed.json", "")):
        made, _ = generators.describe("nvidia", node.tree, Options(hook=hook), node.host.ask)
        assert made is not None
        (node.low / name).write_bytes(cdi_file.render(made))
    changed = node.low / "changed.json"
    changed.write_bytes(changed.read_bytes().replace(b"NVIDIA_VISIBLE_DEVICES=void", b"NVIDIA_VISIBLE_DEVICES=none"))
    (node.low / "other.yaml").write_text(OTHERS["nvidia.yaml"])
    done, left = managed.remove(node.config, OWNERS)
    assert sorted(done) == [f"removed {node.low}/asked-for.json", f"removed {node.own}"]
    assert left == [f"{changed} was changed since Chandler made it and is left as it is"]
    assert (
        sorted(os.listdir(node.low)) == ["changed.json", "of-nvidia.json", "other.yaml"] and os.listdir(node.high) == []
    )


OTHERS = {
    "nvidia.yaml": "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices: [{name: '0', containerEdits: {env: [A=b]}}]\n",
    "nvidia.json": '{"cdiVersion": "0.5.0", '
    '"kind": "nvidia.com/gpu", "devices": [{"name": "0", "containerEdits": {"env": ["A=b"]}}]}',
}


def identity(path: pathlib.Path) -> tuple[int, ...]:
    """The metadata that a write changes and a read does not."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@pytest.mark.parametrize("name", OTHERS)
def test_another_tools_file_comes_first_and_is_never_touched(node: Node, name: str) -> None:
    other = node.low / name
    other.write_text(OTHERS[name])
    assert node.refresh() == ([], []) and not node.own.exists()
    other.unlink()
    node.refresh()
    other.write_text(OTHERS[name])
    before = identity(other)
    done, wrong = node.refresh()
    assert done == [f"removed {node.own}: {other} describes nvidia.com/gpu"] and wrong == []
    assert identity(other) == before and os.listdir(node.high) == []


def test_a_file_of_others_under_our_name_stays(node: Node) -> None:
    node.own.write_text("rubbish: [")
    done, wrong = node.refresh()
    assert done == [] and wrong == [f"{node.own} is in the way: it is not a file that Chandler made"]
    assert node.own.read_text() == "rubbish: ["


def test_a_device_that_cannot_be_described_leaves_the_file_and_is_reported(node: Node) -> None:
    node.refresh()
    before = node.own.read_bytes()
    del node.host.nodes["/dev/nvidia-caps/nvidia-cap25"]
    done, wrong = node.refresh()
    assert done == [] and wrong[0].startswith(f"{node.own} may be stale: ") and "nvidia-cap25" in wrong[0]
    assert node.own.read_bytes() == before


@pytest.mark.parametrize("options", ["{", "[]", '{"mode": "x"}', '{"names": []}', '{"names": 7}'])
def test_invalid_options_in_a_file(node: Node, options: str) -> None:
    made, _ = generators.describe("nvidia", node.tree, Options(), node.host.ask)
    assert made is not None
    made["annotations"][cdi_file.OPTIONS] = options
    made["annotations"][cdi_file.DIGEST] = cdi_file.own_digest(made)
    (node.low / "x.json").write_bytes(cdi_file.render(made))
    done, wrong = node.refresh()
    assert (
        done == [] and len(wrong) == 1 and str(node.low / "x.json") in wrong[0] and "recorded in the file" in wrong[0]
    )


def test_another_directory(node: Node) -> None:
    node.config["cdi.generate-dir"] = str(node.directory / "new/place")
    done, _ = node.refresh()
    assert done == [f"made {node.directory}/new/place/chandler-nvidia.json"]
    assert node.refresh() == ([], [])


# --- differences ----------------------------------------------------------------------------------------------


def test_nothing_differs_from_itself(node: Node) -> None:
    made, _ = generators.describe("nvidia", node.tree, Options(), node.host.ask)
    assert made is not None and managed.differences(made, made) == []


def test_changes_are_reported_by_path(node: Node) -> None:
    before, _ = generators.describe("nvidia", node.tree, Options(), node.host.ask)
    new_driver(node.host)
    new_numbers(node.host)
    assert node.host.nvml is not None
    node.host.nvml["gpus"][1]["parts"].pop()
    now, _ = generators.describe("nvidia", node.tree, Options(), node.host.ask)
    assert before is not None and now is not None
    lines = managed.differences(before, now)
    assert lines[:3] == [
        "driver version: 550.54.15 -> 560.35.03",
        "- device 1:1",
        "- device MIG-00000001-0001-5bad-8ace-0123456789ab",
    ]
    assert (
        "- mounts /usr/lib/x86_64-linux-gnu/libcuda.so.550.54.15" in lines
        and "+ mounts /usr/lib/x86_64-linux-gnu/libcuda.so.560.35.03" in lines
    )
    assert any(line.startswith('~ deviceNodes /dev/nvidia-uvm: {"path"') for line in lines)
    assert "device all: - deviceNodes /dev/nvidia-caps/nvidia-cap27" in lines
    assert any(line.startswith("~ hooks createContainer /usr/bin/chandler-hook create-symlinks") for line in lines)


# --- the fallback ---------------------------------------------------------------------------------------------


def account_with_fallback(node: Node, monkeypatch: pytest.MonkeyPatch, fallback: str) -> inventory.Account:
    etc = node.directory / "etc"
    etc.mkdir()
    (etc / "config.toml").write_text(
        f'[cdi]\nspec-dirs = ["{node.low}", "{node.high}"]\n[gpu]\nfallback = "{fallback}"\n'
    )
    monkeypatch.setattr(managed, "HostTree", lambda: node.tree)
    monkeypatch.setattr(nvml, "ask", node.host.ask)
    monkeypatch.setattr(managed.fallback, "__defaults__", (None, node.host.ask))
    monkeypatch.setattr(trust, "check_trust", lambda *args, **kwargs: None)
    return inventory.Account({b"CHANDLER_CONFIG": str(etc / "config.toml").encode()})


def test_the_fallback_describes_what_no_file_does(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler.compile_now(account_with_fallback(node, monkeypatch, "generate"), store=False)
    assert made.picks("nvidia.com/gpu") == ["0", "1:0", "1:1"]
    found = made.lookup("nvidia.com/gpu=1:1")
    assert found is not None and found[2][0][1] == "/dev/nvidia1"
    assert found[2][0][3].startswith("generated by chandler/nvidia.json")


def test_a_file_is_better_than_the_fallback(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (node.low / "nvidia.yaml").write_text(OTHERS["nvidia.yaml"])
    assert compiler.compile_now(account_with_fallback(node, monkeypatch, "generate"), store=False).picks(
        "nvidia.com/gpu"
    ) == ["0"]


def test_the_fallback_is_stored_like_a_file(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A create on such a node reads the inventory and nothing else, until the host changes."""
    monkeypatch.setattr(paths, "STATE_DIR", str(node.directory / "state"))
    monkeypatch.setattr(compiler, "SETTLED_NS", 0)
    (node.directory / "dev").mkdir()
    account = account_with_fallback(node, monkeypatch, "generate")
    account.state_dir = str(node.directory / "state")  # the same for a caller that is not root
    account.directory = f"{account.state_dir}/inventory/{account.directory.rpartition('/')[2]}"
    watched = str(node.directory / "dev/nvidia8")
    real = managed.fallback
    monkeypatch.setattr(managed, "fallback", lambda kinds, config: (real(kinds, config)[0], [watched, "/proc/version"]))
    compiler.refresh(account)

    def never(names: list[str]) -> NoReturn:
        raise AssertionError(names)

    stored = inventory.load(account, never)
    assert stored.picks("nvidia.com/gpu") == ["0", "1:0", "1:1"] and stored.lookup("nvidia.com/gpu=0") is not None
    with open(watched, "w", encoding="ascii"):
        pass
    with pytest.raises(inventory.Stale):
        inventory.load(account, never)


@pytest.mark.parametrize("word", ["devices", "off"])
def test_nothing_is_generated_unless_asked_for(node: Node, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    assert compiler.compile_now(account_with_fallback(node, monkeypatch, word), store=False).kinds() == []


def test_an_invalid_file_may_describe_the_kind_so_there_is_no_fallback(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    (node.low / "nvidia.yaml").write_text("kind: [")
    made = compiler.compile_now(account_with_fallback(node, monkeypatch, "generate"), store=False)
    assert made.kinds() == [] and made.problems


def test_the_reason_of_a_failed_generation_is_reported(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    del node.host.nodes["/dev/nvidia-caps/nvidia-cap25"]
    made = compiler.compile_now(account_with_fallback(node, monkeypatch, "generate"), store=False)
    with pytest.raises(CdiError, match="nvidia-cap25"):
        made.explain_missing(["nvidia.com/gpu=0"])


def test_sources_of_the_fallback_are_watched(tmp_path: pathlib.Path) -> None:
    """Nodes and libraries by all that lstat returns; loaded drivers by their inode."""
    library, absent = tmp_path / "libnvidia-ml.so.1", tmp_path / "nvidia8"
    library.write_text("")
    os.utime(library, (1, 1))
    sources = compiler.Sources()
    sources.watch(["/proc/version", "/sys/module/no-such-module", str(library), str(absent)])
    assert sources.unchanged() and "/proc/version" in sources.ways
    absent.write_text("")
    assert not sources.unchanged()
    absent.unlink()
    assert sources.unchanged()
    library.write_text("another")
    assert not sources.unchanged()


def test_every_vendor_names_the_paths_to_watch(tmp_path: pathlib.Path) -> None:
    for vendor in (each.name for each in VENDORS):
        _, found = generators.describe(vendor, Host().build(str(tmp_path)), Options(), Host().ask)
        assert found.watch and all(path.startswith("/") for path in found.watch)


def test_generated_entries_are_a_registry(node: Node) -> None:
    entries, _ = managed.fallback(["amd.com/gpu"], node.config, node.tree, node.host.ask)
    registry = Registry.build([(managed.GENERATED, None, entries)])
    assert registry.problems == {} and "nvidia.com/gpu=all" in registry.devices
    assert not any(isinstance(content, ChandlerError) for _, content in entries)


# --- stale files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, words",
    [
        ("/usr/lib64/libcuda.so.535.183.01", "made for driver 535.183.01 and this host runs 550.54.15"),
        ("/lib/firmware/nvidia/535.183.01/gsp_ga10x.bin", "made for driver 535.183.01"),
        (f"/usr/lib64/libcuda.so.{hosts.VERSION}", "older than the driver"),
        ("/run/nvidia-persistenced/socket", "older than the driver"),
    ],
)
def test_a_stale_file_is_reported_with_both_drivers(path: str, words: str, tmp_path: pathlib.Path) -> None:
    assert words in driver_version.remedy(path, hosts.nvidia(1).build(str(tmp_path)))


def test_a_stale_file_without_any_driver(tmp_path: pathlib.Path) -> None:
    assert "runs no NVIDIA driver" in driver_version.remedy(
        "/usr/lib64/libcuda.so.535.183.01", Host().build(str(tmp_path))
    )
