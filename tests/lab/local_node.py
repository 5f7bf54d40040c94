"""A node below one directory, and creates on it in this process, from config.json to what the runtime would read."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shim import engine, paths
from shim.node import compiler, inventory
from shim.node.inventory import Account
from shim.policy.caller import Caller
from shim.runtime import wrapper
from shim.state import ledger

if TYPE_CHECKING:
    from shim.policy.caller import CallFacts

P = "chandler.oci/"
NVIDIA = "nvidia.com/gpu"
PROCESS = {
    "args": ["/bin/app"],
    "cwd": "/",
    "env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all"],
    "user": {"uid": 0, "gid": 0},
    "capabilities": {"bounding": ["CAP_KILL"]},
    "noNewPrivileges": True,
}
CONFIG: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": PROCESS,
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "h",
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "mount"}],
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "resources": {"devices": [{"allow": False, "access": "rwm"}], "memory": {"limit": 1 << 30}},
        "cgroupsPath": "/x",
        "unknown": {"a": [1]},
    },
    "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "main"},
    "x-unknown": [1, {"b": None}],
}


def cdi(count: int = 4, kind: str = NVIDIA) -> dict[str, Any]:
    """A CDI file of GPUs with an index and a UUID each, and one name for all."""

    def nodes(*numbers: int) -> list[dict[str, Any]]:
        return [
            {"path": f"/dev/nvidia{number}", "type": "c", "major": 195, "minor": number, "fileMode": 0o666}
            for number in numbers
        ]

    devices = [
        {"name": name, "containerEdits": {"deviceNodes": nodes(n)}}
        for n in range(count)
        for name in (str(n), f"GPU-{n}")
    ]
    return {
        "cdiVersion": "0.6.0",
        "kind": kind,
        "devices": [*devices, {"name": "all", "containerEdits": {"deviceNodes": nodes(*range(count))}}],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "hooks": [{"hookName": "createContainer", "path": "/bin/true", "args": ["true"]}],
            "mounts": [{"hostPath": "/dev/null", "containerPath": "/usr/lib/libcuda.so.1", "options": ["ro", "bind"]}],
            "deviceNodes": [{"path": "/dev/nvidiactl", "type": "c", "major": 195, "minor": 255, "fileMode": 0o666}],
        },
    }


class Node:
    """A node of its own below `directory`: configuration, CDI directory, state directory, one bundle."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.monkeypatch = monkeypatch
        for name in ("etc", "etc/cdi", "state", "bundle", "bin"):
            (directory / name).mkdir(mode=0o755)
        monkeypatch.setattr(paths, "CONFIG_DIR", str(directory / "etc"))
        monkeypatch.setattr(paths, "STATE_DIR", str(directory / "state"))
        monkeypatch.setenv(
            "XDG_RUNTIME_DIR", str(directory)
        )  # for commands that ask where they are themselves, if not as root
        monkeypatch.setattr(paths, "BINARY_DIRS", (str(directory / "bin"),))
        (directory / "bin/runc").touch(0o755)
        self.configure("")
        self.spec("nvidia.json", cdi())

    def configure(self, text: str, more: str = "") -> None:
        self.put(
            "etc/config.toml",
            f'engines = ["other"]\n{text}\n[cdi]\n'
            f'spec-dirs = ["{self.directory}/etc/cdi", "{self.directory}/etc/cdi2"]\n{more}',
        )

    def spec(self, name: str, document: Any) -> None:
        self.put(f"etc/cdi/{name}", document if isinstance(document, (str, bytes)) else json.dumps(document))

    def put(self, name: str, content: str | bytes) -> None:
        path = self.directory / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(0o644)

    def account(self, environment: dict[bytes, bytes] | None = None) -> Account:
        account = Account(environment or {})
        account.rootless = False  # the same for a caller that is not root
        account.state_dir = str(self.directory / "state")
        account.directory = f"{account.state_dir}/inventory/{account.directory.rpartition('/')[2]}"
        return account

    def later(self, seconds: float = 10) -> None:
        """Make the sources old enough to be trusted, as if nobody had changed them for a while."""
        real = time.clock_gettime_ns
        self.monkeypatch.setattr(time, "time_ns", lambda: real(time.CLOCK_REALTIME) + int(seconds * 1e9))

    def compiled(self) -> inventory.Inventory:
        return compiler.compile_now(self.account(), store=False)

    def equip(
        self,
        annotations: dict[str, Any],
        config: dict[str, Any] | None = None,
        at: inventory.Inventory | None = None,
        called: str = "",
    ) -> dict[str, Any] | None:
        """config.json as it would be written, or None when nothing is asked for; `called`: the engine that calls."""
        document = copy.deepcopy(CONFIG if config is None else config)
        document["annotations"] = {**(document.get("annotations") or {}), **annotations}
        before = copy.deepcopy(document)
        bundle = str(self.directory / "bundle")
        call_facts: CallFacts = {"bundle": bundle}
        if called:
            call_facts["caller"] = Caller(called)
        made = engine.plan(document, at or self.compiled(), call_facts=call_facts)
        result = None if made is None else engine.equip(document, made.edits, False, bundle)
        assert document == before, "the input is never changed"
        return result


def service(document: Any) -> dict[str, str]:
    return {P + "service": json.dumps(document)}


def devices(config: dict[str, Any] | None) -> list[str]:
    assert config is not None
    found = [device["path"] for device in config["linux"]["devices"]]
    rules = config["linux"]["resources"]["devices"]
    assert rules[0] == {"allow": False, "access": "rwm"} and len(rules) == len(found) + 1, "every device has its rule"
    return found


def unasked(config: dict[str, Any]) -> dict[str, Any]:
    """The parts of config.json that no request changes."""
    process = {key: value for key, value in config["process"].items() if key not in ("env", "user")}
    linux = {key: value for key, value in config["linux"].items() if key not in ("devices", "resources")}
    rest = {
        key: value for key, value in config.items() if key not in ("process", "linux", "mounts", "hooks", "annotations")
    }
    return {"process": process, "linux": linux, **rest}


class Ended(BaseException):
    """Raised where the runtime would have been started."""


class Front:
    """The wrapper's main function in this process; records what it starts and what it prints."""

    def __init__(self, node: Node, capfd: pytest.CaptureFixture[str]) -> None:
        self.node = node
        self.capfd = capfd
        self.config = node.directory / "bundle/config.json"
        self.log = node.directory / "log.json"
        self.binary_starts = True
        self.started: list[str] = []
        node.monkeypatch.setattr(wrapper, "_exec", self._exec)
        node.monkeypatch.setattr(wrapper, "Account", lambda _: node.account())

    def _exec(self, binary: str, rest: list[str], environment: dict[bytes, bytes]) -> None:
        if not self.binary_starts:
            raise OSError(8, "Exec format error")
        self.started = [binary, *rest]
        raise Ended

    def write(self, annotations: dict[str, Any], config: dict[str, Any] | None = None) -> bytes:
        document = {**(config or CONFIG), "annotations": {**CONFIG["annotations"], **annotations}}
        self.config.write_text(json.dumps(document))
        return self.config.read_bytes()

    def create(self, container: str = "c") -> None:
        with pytest.raises(Ended):
            self.main(container)
        assert self.started == [str(self.node.directory / "bin/runc"), *self.arguments(container)]

    def arguments(self, container: str) -> list[str]:
        return [
            "--root",
            str(self.node.directory / "root"),
            "--log",
            str(self.log),
            "--log-format",
            "json",
            "create",
            "--bundle",
            str(self.config.parent),
            container,
        ]

    def main(self, container: str) -> None:
        wrapper.main(["/usr/bin/chandler-runtime", *self.arguments(container)])

    def restore(self, container: str) -> None:
        arguments = [word if word != "create" else "restore" for word in self.arguments(container)]
        with pytest.raises(Ended):
            wrapper.main(["/usr/bin/chandler-runtime", *arguments])

    def ends(self, *containers: str) -> None:
        """What their poststop hooks do."""
        book = ledger.Ledger(str(self.node.directory / "state"))
        book.release({lease["token"] for lease in book.read() if lease["id"] in containers})

    def refused(self) -> str:
        """The sentence on stderr, which is in the log, too. No runtime was started, and config.json did not change."""
        before = self.config.read_bytes()
        beside = sorted(os.listdir(self.config.parent))
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            self.main("c")
        assert ended.value.code == 1 and not self.started
        assert self.config.read_bytes() == before
        assert sorted(os.listdir(self.config.parent)) == beside, "no temporary file"
        message = self.capfd.readouterr().err
        record = json.loads(self.log.read_text().splitlines()[-1])
        assert message == f"chandler-runtime: {record['msg']}\n" and record["level"] == "error"
        return str(record["msg"])

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.config.read_text())
        return found

    def grant(self) -> dict[str, Any] | None:
        directory = self.node.directory / "state/grants"
        names = os.listdir(directory) if directory.exists() else []
        assert len(names) <= 1
        return json.loads((directory / names[0]).read_text()) if names else None
