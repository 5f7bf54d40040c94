"""Built configurations, from a service, the builder's caller and the image.

Each row is one situation or one branch of the builder; every configuration is checked against the OCI schema.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from lab import ocischema, served

from shim.bundle import base, build, deployment, image
from shim.errors import ChandlerError
from shim.host import cgroups, userns
from shim.node.inventory import Account, Inventory

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SURVEY = cgroups.Survey("v1", "/sys/fs/cgroup", "/", False, True, True, ["cpu", "memory", "pids"], [])
IMAGE = image.Image(["/entry"], ["serve"], ["PATH=/img", "LANG=C", "A=image"], "/srv", "1000:2000")


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with cgroup version 1 and root as the caller, whatever this host is."""
    monkeypatch.setattr(cgroups, "survey", lambda tree=None: SURVEY)
    monkeypatch.setattr("posix.geteuid", lambda: 0)
    monkeypatch.setattr(userns, "user_namespace", lambda: userns.INITIAL_NAMESPACE)
    monkeypatch.setattr(Account, "trusted_state_dir", lambda self, configured="": str(tmp_path / "state"))


def fixed(text: bytes | None = None, **more: Any) -> Inventory:
    """A node without leases: GPUs are resolved when a bundle is built."""
    return served.inventory(text, gpu__allocator="fixed", **more)


def build_service(
    document: dict[str, Any],
    image_config: image.Image | None = None,
    inventory: Inventory | None = None,
    id: str = "web-1",
    **options: Any,
) -> build.Built:
    service = deployment.service(
        json.dumps({"version": "v1", "deployment": "test", "services": {"web": document}}), "d.yaml", "web"
    )
    built = build.build(
        service, image_config or image.Image(), build.BuildOptions(id, **options), inventory or fixed(), Account({})
    )
    ocischema.check(built.config)
    json.dumps(built.config)
    return built


def config(document: dict[str, Any], *rest: Any, **options: Any) -> dict[str, Any]:
    return build_service(document, *rest, **options).config


def env(result: dict[str, Any]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in result["process"]["env"]]
    assert len({name for name, _, _ in pairs}) == len(pairs), "a variable is set twice"
    return {name: value for name, _, value in pairs}


def at(result: dict[str, Any], path: str) -> Any:
    """A value by its dotted path, or by name: `env NAME`, `mount /destination`, `device /path`. None if missing."""
    kind, _, name = path.partition(" ")
    if kind == "env":
        return env(result).get(name)
    if kind == "mount":
        return next((mount for mount in result["mounts"] if mount["destination"] == name), None)
    if kind == "device":
        return next((device for device in result["linux"].get("devices", ()) if device["path"] == name), None)
    if kind == "rule":
        kind, numbers = name.split(" ")
        return next(
            (
                rule.get("access")
                for rule in result["linux"]["resources"]["devices"]
                if rule["allow"]
                and f"{rule.get('type')} {rule.get('major')}:{rule.get('minor', '*')}" == f"{kind} {numbers}"
            ),
            None,
        )
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


MINIMAL: dict[str, Any] = {
    "rtype": "service",
    "image": {"name": "test:latest"},
    "endpoints": [{"name": "http", "protocol": "http", "port": 8080}],
}
DEFAULT_CAPABILITIES = sorted(base.CAPABILITIES)

BUILDER: list[tuple[str, dict[str, Any], dict[str, Any], image.Image, dict[str, Any]]] = [
    # the base
    ("version", MINIMAL, {}, image.Image(), {"ociVersion": "1.0.2"}),
    ("root", MINIMAL, {}, image.Image(), {"root": {"path": "rootfs", "readonly": False}}),
    ("terminal", MINIMAL, {}, image.Image(), {"process.terminal": False}),
    ("user", MINIMAL, {}, image.Image(), {"process.user": {"uid": 0, "gid": 0}}),
    ("directory", MINIMAL, {}, image.Image(), {"process.cwd": "/"}),
    ("shell", MINIMAL, {}, image.Image(), {"process.args": ["/bin/sh"]}),
    ("hostname is the id", MINIMAL, {}, image.Image(), {"hostname": "web-1"}),
    ("propagation", MINIMAL, {}, image.Image(), {"linux.rootfsPropagation": "private"}),
    (
        "masked",
        MINIMAL,
        {},
        image.Image(),
        {"linux.maskedPaths": list(base.MASKED), "linux.readonlyPaths": list(base.READONLY)},
    ),
    ("no new privileges", MINIMAL, {}, image.Image(), {"process.noNewPrivileges": True}),
    (
        "default rules",
        MINIMAL,
        {},
        image.Image(),
        {"rule c 1:3": "rwm", "rule c 136:*": "rwm", "rule c 5:2": "rwm", "rule c 10:237": None},
    ),
    ("no annotations", MINIMAL, {}, image.Image(), {"annotations": None, "hooks": None, "linux.devices": None}),
    ("no group of one's own", MINIMAL, {}, image.Image(), {"linux.cgroupsPath": None, "linux.uidMappings": None}),
    # namespaces
    (
        "namespaces",
        MINIMAL,
        {},
        image.Image(),
        {"linux.namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    ),
    (
        "host network by the caller",
        MINIMAL,
        {"host_network": True},
        image.Image(),
        {"linux.namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    ),
    (
        "host network by the service",
        {"host_network": True},
        {},
        image.Image(),
        {"linux.namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]},
    ),
    (
        "no host network",
        {"host_network": False},
        {},
        image.Image(),
        {"linux.namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    ),
    # mounts
    (
        "proc",
        MINIMAL,
        {},
        image.Image(),
        {
            "mount /proc": {
                "destination": "/proc",
                "type": "proc",
                "source": "proc",
                "options": ["nosuid", "noexec", "nodev"],
            }
        },
    ),
    (
        "dev",
        MINIMAL,
        {},
        image.Image(),
        {
            "mount /dev": {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            }
        },
    ),
    (
        "pts",
        MINIMAL,
        {},
        image.Image(),
        {
            "mount /dev/pts": {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            }
        },
    ),
    (
        "shm",
        MINIMAL,
        {},
        image.Image(),
        {
            "mount /dev/shm": {
                "destination": "/dev/shm",
                "type": "tmpfs",
                "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            }
        },
    ),
    (
        "mqueue",
        MINIMAL,
        {},
        image.Image(),
        {
            "mount /dev/mqueue": {
                "destination": "/dev/mqueue",
                "type": "mqueue",
                "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"],
            }
        },
    ),
    (
        "sys",
        MINIMAL,
        {},
        image.Image(),
        {
            "mount /sys": {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"],
            }
        },
    ),
    # environment: image, PATH and TERM, service, caller
    ("PATH and TERM", MINIMAL, {}, image.Image(), {"env PATH": PATH, "env TERM": "xterm"}),
    (
        "the image's PATH",
        MINIMAL,
        {},
        IMAGE,
        {"env PATH": "/img", "env TERM": "xterm", "env LANG": "C", "env A": "image"},
    ),
    (
        "the service's over the image's",
        {"env": {"A": "service", "PATH": "/own"}},
        {},
        IMAGE,
        {"env A": "service", "env PATH": "/own", "env LANG": "C"},
    ),
    (
        "the caller's over all",
        {"env": {"A": "service"}},
        {"env": {"A": "caller", "LANG": "de"}},
        IMAGE,
        {"env A": "caller", "env LANG": "de"},
    ),
    (
        "the caller's is no reference",
        MINIMAL,
        {"env": {"A": "$E:HOME", "B": "$S:x"}},
        image.Image(),
        {"env A": "$E:HOME", "env B": "$S:x"},
    ),
    (
        "the caller's stands for a reference",
        {"env": {"A": "$E:NOT_THERE"}},
        {"env": {"A": "1"}},
        image.Image(),
        {"env A": "1"},
    ),
    (
        "a reference to the host",
        {"env": {"A": "$E:CHANDLER_TEST_VALUE"}},
        {},
        image.Image(),
        {"env A": "from the host"},
    ),
    (
        "a reference that is shown",
        {"env": {"A": "$E:CHANDLER_TEST_VALUE", "B": "b"}},
        {"hidden": True},
        image.Image(),
        {"env A": "***", "env B": "b"},
    ),
    ("an image that repeats a variable", MINIMAL, {}, image.Image(env=["A=1", "B=2", "A=3"]), {"env A": "3"}),
    # command
    ("the image's command", MINIMAL, {}, IMAGE, {"process.args": ["/entry", "serve"]}),
    ("the service's entrypoint", {"command": {"entrypoint": ["/own"]}}, {}, IMAGE, {"process.args": ["/own"]}),
    ("the service's args", {"command": {"args": ["x"]}}, {}, IMAGE, {"process.args": ["/entry", "x"]}),
    (
        "the service's args without an image",
        {"command": {"args": ["x", "y"]}},
        {},
        image.Image(),
        {"process.args": ["x", "y"]},
    ),
    ("both", {"command": {"entrypoint": ["/own"], "args": ["x"]}}, {}, IMAGE, {"process.args": ["/own", "x"]}),
    ("no args are none", {"command": {"args": []}}, {}, IMAGE, {"process.args": ["/entry", "serve"]}),
    (
        "the caller's args",
        {"command": {"entrypoint": ["/own"], "args": ["x"]}},
        {"args": ["sleep", "1"]},
        IMAGE,
        {"process.args": ["sleep", "1"]},
    ),
    # directory
    ("the image's directory", MINIMAL, {}, IMAGE, {"process.cwd": "/srv"}),
    ("the service's directory", {"command": {"workdir": "/own"}}, {}, IMAGE, {"process.cwd": "/own"}),
    ("the caller's directory", {"command": {"workdir": "/own"}}, {"cwd": "/caller"}, IMAGE, {"process.cwd": "/caller"}),
    ("an image's directory without its slash", MINIMAL, {}, image.Image(workdir="srv/"), {"process.cwd": "/srv"}),
    # user
    ("the image's user", MINIMAL, {}, IMAGE, {"process.user": {"uid": 1000, "gid": 2000}}),
    ("a uid alone", MINIMAL, {}, image.Image(user="1000"), {"process.user": {"uid": 1000, "gid": 1000}}),
    ("the service's user", {"user": "7:8"}, {}, IMAGE, {"process.user": {"uid": 7, "gid": 8}}),
    # hostname
    ("the service's hostname", {"hostname": "own"}, {}, image.Image(), {"hostname": "own"}),
    ("the caller's hostname", {"hostname": "own"}, {"hostname": "caller"}, image.Image(), {"hostname": "caller"}),
    # capabilities
    (
        "default capabilities",
        MINIMAL,
        {},
        image.Image(),
        {"process.capabilities": {kind: list(base.CAPABILITIES) for kind in ("bounding", "effective", "permitted")}},
    ),
    (
        "privileged",
        {"privileged": True},
        {},
        image.Image(),
        {"process.noNewPrivileges": False, "linux.maskedPaths": [], "linux.readonlyPaths": []},
    ),
    (
        "privileged devices",
        {"privileged": True},
        {},
        image.Image(),
        {"linux.resources.devices": [{"allow": True, "access": "rwm"}]},
    ),
    (
        "privileged sys",
        {"privileged": True},
        {},
        image.Image(),
        {
            "mount /sys": {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev"],
            }
        },
    ),
    ("a capability asked for", {"capabilities": ["NET_ADMIN"]}, {}, image.Image(), {"process.noNewPrivileges": False}),
    # resources
    (
        "cpu",
        {"resources": {"cpu": 0.5}},
        {},
        image.Image(),
        {"linux.resources.cpu": {"period": 100000, "quota": 50000}},
    ),
    ("cpu in thousandths", {"resources": {"cpu": "1500m"}}, {}, image.Image(), {"linux.resources.cpu.quota": 150000}),
    ("memory", {"resources": {"memory": "512Mi"}}, {}, image.Image(), {"linux.resources.memory.limit": 512 << 20}),
    ("Gi", {"resources": {"memory": "1Gi"}}, {}, image.Image(), {"linux.resources.memory.limit": 1 << 30}),
    ("G", {"resources": {"memory": "2G"}}, {}, image.Image(), {"linux.resources.memory.limit": 2 * 10**9}),
    ("bytes", {"resources": {"memory": 1024}}, {}, image.Image(), {"linux.resources.memory.limit": 1024}),
    ("Ki", {"resources": {"memory": "512Ki"}}, {}, image.Image(), {"linux.resources.memory.limit": 512 << 10}),
    ("a fraction", {"resources": {"memory": "12.5Mi"}}, {}, image.Image(), {"linux.resources.memory.limit": 13107200}),
    (
        "the rest",
        {
            "resources": {
                "memory": "1Gi",
                "memory_swap": "2Gi",
                "memory_reservation": "512Mi",
                "cpu_shares": 512,
                "cpuset": "0-1",
                "pids_limit": 64,
                "oom_score_adj": 100,
                "blkio_weight": 300,
            }
        },
        {},
        image.Image(),
        {
            "linux.resources.memory": {"limit": 1 << 30, "swap": 2 << 30, "reservation": 512 << 20},
            "linux.resources.cpu": {"shares": 512, "cpus": "0-1"},
            "linux.resources.pids.limit": 64,
            "process.oomScoreAdj": 100,
            "linux.resources.blockIO.weight": 300,
        },
    ),
    (
        "limits of processes",
        {"ulimits": {"nofile": 1024}},
        {},
        image.Image(),
        {"process.rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024}]},
    ),
    (
        "sysctls",
        {"sysctls": {"net.core.somaxconn": "1024"}},
        {},
        image.Image(),
        {"linux.sysctl": {"net.core.somaxconn": "1024"}},
    ),
    ("a read-only root", {"read_only_root_fs": True}, {}, image.Image(), {"root.readonly": True}),
    ("extra groups", {"extra_groups": [44]}, {}, image.Image(), {"process.user.additionalGids": [44]}),
    # devices
    ("a device", {"devices": [{"path": "/dev/kmsg", "mknod": True}]}, {}, image.Image(), {"rule c 1:11": "rwm"}),
    ("a device to read", {"devices": [{"path": "/dev/kmsg", "write": False}]}, {}, image.Image(), {"rule c 1:11": "r"}),
    # storage
    (
        "bind",
        {"storage": [{"type": "bind", "source": "/etc", "target": "/app/config", "readonly": True}]},
        {},
        image.Image(),
        {
            "mount /app/config": {
                "destination": "/app/config",
                "type": "bind",
                "source": "/etc",
                "options": ["rbind", "rprivate", "ro"],
            }
        },
    ),
    (
        "named",
        {"storage": [{"type": "named", "name": "my-volume", "target": "/app/data"}]},
        {"volumes": {"my-volume": "/var"}},
        image.Image(),
        {
            "mount /app/data": {
                "destination": "/app/data",
                "type": "bind",
                "source": "/var",
                "options": ["rbind", "rprivate", "rw"],
            }
        },
    ),
    (
        "anonymous",
        {"storage": [{"type": "anonymous", "target": "/app/cache"}]},
        {"volumes": {"/app/cache": "/tmp"}},
        image.Image(),
        {
            "mount /app/cache": {
                "destination": "/app/cache",
                "type": "bind",
                "source": "/tmp",
                "options": ["rbind", "rprivate", "rw"],
            }
        },
    ),
    (
        "anonymous by its generated name",
        {"storage": [{"type": "anonymous", "target": "/app/cache"}]},
        {"volumes": {"_anon_app_cache": "/tmp"}},
        image.Image(),
        {
            "mount /app/cache": {
                "destination": "/app/cache",
                "type": "bind",
                "source": "/tmp",
                "options": ["rbind", "rprivate", "rw"],
            }
        },
    ),
    (
        "s3",
        {"storage": [{"type": "s3", "bucket": "b", "prefix": "p/q", "target": "/s3", "readonly": True}]},
        {"volumes": {"s3://b/p/q": "/var"}},
        image.Image(),
        {"mount /s3": {"destination": "/s3", "type": "bind", "source": "/var", "options": ["rbind", "rprivate", "ro"]}},
    ),
    (
        "tmpfs",
        {"storage": [{"type": "tmpfs", "target": "/app/tmp", "size": "256Mi", "mode": "1777"}]},
        {},
        image.Image(),
        {
            "mount /app/tmp": {
                "destination": "/app/tmp",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "nodev", "size=268435456", "mode=1777"],
            }
        },
    ),
    (
        "several",
        {
            "storage": [
                {"type": "bind", "source": "/etc", "target": "/app/config"},
                {"type": "named", "name": "d", "target": "/app/data"},
                {"type": "tmpfs", "target": "/app/tmp"},
            ]
        },
        {"volumes": {"d": "/var"}},
        image.Image(),
        {
            "mount /app/config.type": None,
            "mount /proc": {
                "destination": "/proc",
                "type": "proc",
                "source": "proc",
                "options": ["nosuid", "noexec", "nodev"],
            },
            "mount /app/tmp": {
                "destination": "/app/tmp",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "nodev"],
            },
        },
    ),
    # control groups
    (
        "a parent of the service's",
        {"cgroup_parent": "/team"},
        {"cgroup_parent": "/env"},
        image.Image(),
        {"linux.cgroupsPath": "/team/web-1"},
    ),
    (
        "a parent of the environment's",
        MINIMAL,
        {"cgroup_parent": "/env"},
        image.Image(),
        {"linux.cgroupsPath": "/env/web-1"},
    ),
    (
        "systemd's form",
        {"cgroup_parent": "team.slice"},
        {"systemd": True},
        image.Image(),
        {"linux.cgroupsPath": "team.slice:chandler:web-1"},
    ),
    (
        "systemd's own slice",
        MINIMAL,
        {"systemd": True},
        image.Image(),
        {"linux.cgroupsPath": "system.slice:chandler:web-1"},
    ),
    # GPUs
    (
        "a GPU",
        {"resources": {"gpu": {"count": 1}}},
        {},
        image.Image(),
        {"env NVIDIA_VISIBLE_DEVICES": "void", "rule c 195:0": "rwm", "rule c 195:1": None, "annotations": None},
    ),
    (
        "two GPUs",
        {"resources": {"gpu": {"count": 2}}},
        {},
        image.Image(),
        {"rule c 195:0": "rwm", "rule c 195:1": "rwm", "rule c 195:2": None},
    ),
    (
        "all GPUs",
        {"resources": {"gpu": {"devices": ["all"]}}},
        {},
        image.Image(),
        {"rule c 195:0": "rwm", "rule c 195:7": "rwm"},
    ),
    (
        "GPUs over the caller's and the service's",
        {"resources": {"gpu": {}}},
        {"env": {"NVIDIA_VISIBLE_DEVICES": "all"}},
        image.Image(env=["CUDA_VISIBLE_DEVICES=9"]),
        {"env NVIDIA_VISIBLE_DEVICES": "void", "env CUDA_VISIBLE_DEVICES": "0"},
    ),
    (
        "training",
        {"resources": {"gpu": {"distributed": {}}}},
        {},
        image.Image(),
        {"env MASTER_PORT": "29500", "env MASTER_ADDR": "web", "env NCCL_SOCKET_IFNAME": "eth0", "env RANK": None},
    ),
    (
        "training with gloo",
        {
            "resources": {
                "gpu": {
                    "distributed": {
                        "backend": "gloo",
                        "master_port": 1,
                        "rank": 1,
                        "world_size": 2,
                        "master_addr": "zero",
                    }
                }
            }
        },
        {},
        image.Image(),
        {
            "env MASTER_PORT": "1",
            "env MASTER_ADDR": "zero",
            "env GLOO_SOCKET_IFNAME": "eth0",
            "env NCCL_SOCKET_IFNAME": None,
            "env RANK": "1",
            "env WORLD_SIZE": "2",
        },
    ),
    (
        "a time slice",
        {"resources": {"gpu": {"count": 3, "sharing": "time-slice", "time_slice_index": 2}}},
        {},
        image.Image(),
        {"env CUDA_VISIBLE_DEVICES": "2"},
    ),
    (
        "no sharing",
        {"resources": {"gpu": {}}},
        {},
        image.Image(),
        {"env CUDA_MPS_PIPE_DIRECTORY": None, "mount /tmp/nvidia-mps": None},
    ),
    (
        "a GPU's node belongs to the user",
        {"user": "7:8", "resources": {"gpu": {}}},
        {},
        image.Image(),
        {
            "device /dev/nvidia0": {
                "path": "/dev/nvidia0",
                "type": "c",
                "major": 195,
                "minor": 0,
                "fileMode": 0o666,
                "uid": 7,
                "gid": 8,
            }
        },
    ),
]


@pytest.mark.parametrize(
    ("document", "options", "image_config", "expected"), [row[1:] for row in BUILDER], ids=[row[0] for row in BUILDER]
)
def test_every_row_builds_a_valid_config(
    monkeypatch: pytest.MonkeyPatch,
    document: dict[str, Any],
    options: dict[str, Any],
    image_config: image.Image,
    expected: dict[str, Any],
) -> None:
    monkeypatch.setattr("posix.environ", {b"CHANDLER_TEST_VALUE": b"from the host"})
    built = config(document, image_config, **options)
    assert {path: at(built, path) for path in expected} == expected


def test_ignored_orchestrator_keys_are_reported() -> None:
    assert build_service(MINIMAL).notes == [
        "d.yaml: service web: left to an orchestrator: services.web.rtype, services.web.image, services.web.endpoints"
    ]


@pytest.mark.parametrize("privileged", [True, False])
def test_capabilities(privileged: bool) -> None:
    """Privileged means all that this process can hand on; a requested one is added to the default ones."""
    result = config({"privileged": True} if privileged else {"capabilities": ["net_admin"], "cap_drop": ["CAP_MKNOD"]})[
        "process"
    ]["capabilities"]
    if privileged:
        assert {"CAP_SYS_ADMIN", "CAP_NET_ADMIN"} <= set(result["bounding"])
    else:
        assert sorted(result["bounding"]) == sorted({*DEFAULT_CAPABILITIES, "CAP_NET_ADMIN"} - {"CAP_MKNOD"})
    assert (
        result["bounding"] == result["effective"] == result["permitted"]
        and not result.get("ambient")
        and not result.get("inheritable")
    )


@pytest.mark.parametrize("seed", range(60))
def test_any_rows_can_be_combined(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whatever the keys, the result fits the schema and is the same a second time. The service does not change."""
    monkeypatch.setattr("posix.environ", {b"CHANDLER_TEST_VALUE": b"from the host"})
    picked = random.Random(seed).sample(BUILDER, 6)
    document: dict[str, Any] = {}
    options: dict[str, Any] = {
        "volumes": {"my-volume": "/var", "d": "/var", "/app/cache": "/tmp", "s3://b/p/q": "/var"}
    }
    for _, own, more, _, _ in picked:
        for key, value in own.items():
            document[key] = {**document[key], **value} if key == "resources" and key in document else value
        options.update((key, value) for key, value in more.items() if key not in ("volumes", "systemd"))
    if document.get("host_network") or options.get("host_network"):
        document.pop("sysctls", None)
    if document.get("cgroup_parent", "").endswith(".slice"):
        options["systemd"] = True
        options.pop("cgroup_parent", None)
    before = json.dumps(document)
    first = config(document, picked[0][3], **options)
    assert config(document, picked[0][3], **options) == first and json.dumps(document) == before


WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "an unprepared volume",
        {"storage": [{"type": "named", "name": "data", "target": "/d"}]},
        {},
        "the volume 'data' (for /d) is not prepared",
    ),
    ("an unprepared anonymous one", {"storage": [{"type": "anonymous", "target": "/app/cache"}]}, {}, "not prepared"),
    ("an unmounted bucket", {"storage": [{"type": "s3", "bucket": "b", "target": "/s3"}]}, {}, "not prepared"),
    ("a volume somewhere", {}, {"volumes": {"a": "relative"}}, "'relative' of the volume 'a' is not an absolute path"),
    (
        "a source that is not there",
        {"storage": [{"type": "bind", "source": "/no/such", "target": "/d"}]},
        {},
        "/no/such",
    ),
    ("a device that is not there", {"devices": [{"path": "/dev/no-such"}]}, {}, "/dev/no-such"),
    ("an unknown capability", {"capabilities": ["FLY"]}, {}, "'FLY' is no capability"),
    ("an unknown user", {"user": "nobody-knows"}, {}, "nobody-knows"),
    ("a number that is none", {"resources": {"memory": "abc"}}, {}, "resources.memory"),
    ("too large", {"resources": {"memory": "9000000Ti"}}, {}, "too large"),
    ("a reference that leads nowhere", {"env": {"A": "$E:NO_SUCH_VARIABLE"}}, {}, "NO_SUCH_VARIABLE"),
    ("a secret without a provider", {"env": {"A": "$S:token"}}, {}, "env.A"),
    (
        "nine GPUs",
        {"resources": {"gpu": {"count": 9}}},
        {},
        "resources.gpu asks for 9 devices of nvidia.com/gpu; this node has 8",
    ),
    ("an unknown GPU", {"resources": {"gpu": {"devices": ["nvidia.com/gpu=99"]}}}, {}, "nvidia.com/gpu=99"),
    ("an unknown vendor", {"resources": {"gpu": {"vendor": "apple"}}}, {}, "apple"),
    ("what Chandler sets itself", {"env": {"CUDA_VISIBLE_DEVICES": "0"}}, {}, "is set by Chandler"),
    ("a long hostname", {}, {"id": "x" * 65}, "more than 64 characters"),
    ("no program", {"command": {"entrypoint": [""]}}, {}, "the name of the program"),
    (
        "a sysctl of the host's network",
        {"host_network": True, "sysctls": {"net.core.somaxconn": "1"}},
        {},
        "net.core.somaxconn",
    ),
    ("no cgroup", {"cgroup_parent": "a.slice"}, {}, "cgroup_parent"),
    ("a hostname that is none", {}, {"hostname": "a b"}, "--hostname: hostname: 'a b'"),
    ("a directory that is none", {}, {"cwd": "relative"}, "command.workdir: 'relative' is not a plain absolute path"),
    ("a descriptor as directory", {}, {"cwd": "/proc/self/fd/7"}, "below /proc"),
    ("no root", {}, {"rootfs": "/no/such"}, "/no/such is not a directory"),
]


@pytest.mark.parametrize(("document", "options", "message"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_services_are_refused(document: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ChandlerError) as failed:
        build_service(document, **options)
    assert message in str(failed.value)


def test_an_image_cannot_start_in_a_descriptor_of_the_host() -> None:
    with pytest.raises(ChandlerError, match="the image: command.workdir: '/proc/self/fd/7' is below /proc"):
        build_service({}, image.Image(workdir="/proc/self/fd/7"))


def test_with_leases_a_bundle_holds_no_gpu() -> None:
    """The request stays an annotation that the wrapper reads; everything else is done by the builder."""
    built = build_service(
        {"env": {"A": "b"}, "resources": {"cpu": 1, "gpu": {"count": 2, "distributed": {"rank": 0}}}},
        inventory=served.inventory(),
    )
    assert json.loads(built.config["annotations"]["chandler.oci/service"]) == {
        "resources": {"gpu": {"count": 2, "distributed": {"rank": 0, "master_addr": "web"}}}
    }
    assert (
        "devices" not in built.config["linux"]
        and env(built.config)["A"] == "b"
        and "NVIDIA_VISIBLE_DEVICES" not in env(built.config)
    )
    assert built.config["linux"]["resources"]["cpu"]["quota"] == 100000
    assert built.notes == ["d.yaml: service web: GPUs are chosen when chandler-runtime creates the container"]


@pytest.mark.parametrize("gpu", [{"count": 9}, {"devices": ["99"]}, {"vendor": "apple"}, {"sharing": "mps"}])
def test_with_leases_a_gpu_that_the_node_lacks_is_refused(gpu: dict[str, Any]) -> None:
    with pytest.raises(ChandlerError, match="9 devices|99|apple|runs no MPS"):
        build_service({"resources": {"gpu": gpu}}, inventory=served.inventory())


def cdi(*names: str) -> bytes:
    """A CDI file with a hook and a mount."""
    devices = [
        {
            "name": name,
            "containerEdits": {
                "deviceNodes": [served.node(f"/dev/nvidia{name}", int(name))],
                "env": [f"NVIDIA_VISIBLE_DEVICES={name}"],
            },
        }
        for name in names
    ]
    common = {
        "hooks": [{"hookName": "createContainer", "path": "/bin/true", "args": ["true", "prestart"]}],
        "mounts": [{"hostPath": "/etc", "containerPath": "/usr/lib/driver", "options": ["ro", "rbind"]}],
    }
    return json.dumps(
        {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": common}
    ).encode()


def test_edits_of_a_cdi_file() -> None:
    result = config({"resources": {"gpu": {"count": 1, "vendor": "nvidia"}}}, inventory=fixed(cdi("0")))
    assert at(result, "device /dev/nvidia0")["major"] == 195 and env(result)["NVIDIA_VISIBLE_DEVICES"] == "0"
    assert result["hooks"]["createContainer"] == [
        {"path": "/bin/true", "args": ["true", "prestart"], "env": result["hooks"]["createContainer"][0]["env"]}
    ]
    assert (
        at(result, "mount /usr/lib/driver")["source"] == "/etc"
        and result["mounts"][-1]["destination"] == "/usr/lib/driver"
    )


def test_two_devices_bring_the_file_s_own_edits_once() -> None:
    result = config({"resources": {"gpu": {"count": 2}}}, inventory=fixed(cdi("0", "1")))
    assert (
        at(result, "device /dev/nvidia0")
        and at(result, "device /dev/nvidia1")
        and len(result["hooks"]["createContainer"]) == 1
    )
    with pytest.raises(ChandlerError, match="asks for 2 devices of nvidia.com/gpu; this node has 1"):
        build_service({"resources": {"gpu": {"count": 2}}}, inventory=fixed(cdi("0")))


def test_without_a_cdi_file_and_without_a_fallback_there_is_no_gpu() -> None:
    with pytest.raises(ChandlerError, match="nvidia.com/gpu"):
        build_service(
            {"resources": {"gpu": {}}},
            inventory=fixed(
                b'{"cdiVersion": "0.6.0", "kind": "other.com/x", '
                b'"devices": [{"name": "0", "containerEdits": {"env": ["A=b"]}}]}',
                gpu__fallback="off",
            ),
        )


def test_mps_with_an_external_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The directories of a daemon that the builder does not manage; other tests check whether it answers."""
    with pytest.raises(ChandlerError, match="this node runs no MPS"):
        build_service({"resources": {"gpu": {"sharing": "mps"}}})
    from shim.sharing import mps

    asked = []
    monkeypatch.setattr(mps, "check_external", lambda share: asked.append(share.uid))
    result = config(
        {
            "user": "7:8",
            "resources": {
                "gpu": {
                    "sharing": "mps",
                    "mps_pipe_dir": "/run/mps",
                    "mps_log_dir": "/var/log",
                    "mps_active_thread_percentage": 30,
                }
            },
        },
        inventory=fixed(gpu__mps="external"),
    )
    assert asked == [7], "the MPS server would run as the container's user"
    assert (
        at(result, "mount /tmp/nvidia-mps")["source"] == "/run/mps"
        and at(result, "mount /var/log")["source"] == "/var/log"
    )
    assert {name: value for name, value in env(result).items() if name.startswith("CUDA_MPS")} == {
        "CUDA_MPS_PIPE_DIRECTORY": "/tmp/nvidia-mps",
        "CUDA_MPS_LOG_DIRECTORY": "/var/log",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30",
    }
    with pytest.raises(ChandlerError, match="leases"):
        build_service({"resources": {"gpu": {"sharing": "mps"}}}, inventory=fixed(gpu__mps="managed"))


@pytest.mark.usefixtures("needs_root")
def test_a_time_slicing_file(tmp_path: Path) -> None:
    file = tmp_path / "slices.yaml"
    with pytest.raises(ChandlerError, match="slices.yaml"):
        build_service({"resources": {"gpu": {"sharing": "time-slice", "time_slicing_config_path": str(file)}}})
    file.write_text("version: v1\n")
    result = config({"resources": {"gpu": {"sharing": "time-slice", "time_slicing_config_path": str(file)}}})
    assert (
        at(result, "mount /etc/nvidia/gpu-time-slicing.yaml")["source"] == str(file)
        and "ro" in at(result, "mount /etc/nvidia/gpu-time-slicing.yaml")["options"]
    )


def test_allow_of_the_policy_does_not_limit_a_service_and_deny_does() -> None:
    strict = fixed(policy__allow=[], policy__max_gpus=0)
    assert at(config({"privileged": True, "resources": {"gpu": {"count": 2}}}, inventory=strict), "rule c *:*") is None
    with pytest.raises(ChandlerError, match="refused by 'gpu'"):
        build_service({"resources": {"gpu": {}}}, inventory=fixed(policy__deny=["gpu"]))


def test_the_root_file_system_is_named_by_its_real_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert config({}, rootfs=str(tmp_path / "link"))["root"]["path"] == str(tmp_path / "real")


def test_names_of_the_image_are_looked_up_in_it(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\napp:x:1234:99::/:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\nvideo:x:44:app\n")
    assert config({}, image.Image(user="app"), rootfs=str(tmp_path))["process"]["user"] == {
        "uid": 1234,
        "gid": 99,
        "additionalGids": [44],
    }
    assert config({"extra_groups": ["video"]}, rootfs=str(tmp_path))["process"]["user"]["additionalGids"] == [44]


# --- rootless -------------------------------------------------------------------------------------------------


def rootless(monkeypatch: pytest.MonkeyPatch, lent: str = "", unified: bool = True) -> None:
    uids, gids = (
        [{"containerID": 0, "hostID": 1000, "size": 1}]
        + ([{"containerID": 1, "hostID": 100000, "size": 65536}] if lent else [])
        for _ in range(2)
    )
    from shim.bundle.rootless import Ids

    monkeypatch.setattr(build, "node", lambda account: base.Node(unified, True, uids, gids, Ids(uids), Ids(gids)))


@pytest.mark.parametrize("lent", ["", "all"])
def test_a_rootless_container(monkeypatch: pytest.MonkeyPatch, lent: str) -> None:
    rootless(monkeypatch, lent)
    result = config({})
    assert [entry["type"] for entry in result["linux"]["namespaces"]] == [
        "pid",
        "ipc",
        "uts",
        "mount",
        "network",
        "user",
        "cgroup",
    ]
    assert result["linux"]["uidMappings"] == result["linux"]["gidMappings"] and len(result["linux"]["uidMappings"]) == (
        2 if lent else 1
    )
    assert "resources" not in result["linux"], "an unprivileged user cannot allow devices"
    pts = at(result, "mount /dev/pts")["options"]
    assert ("gid=5" in pts) == bool(lent), "a mount cannot use a group that is not mapped"


def test_a_rootless_container_s_gpu_is_the_host_s_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rootless runtimes cannot make nodes. A node at another path is mounted.

    A node that the host lacks is an error of the build, not of the start.
    """
    rootless(monkeypatch)
    for host_path, message in (("/dev/null", ""), ("/dev/none-such", "/dev/none-such is not on this host")):
        node = {"path": "/dev/nvidia0", "hostPath": host_path, "type": "c", "major": 1, "minor": 3}
        text = json.dumps(
            {
                "cdiVersion": "0.5.0",
                "kind": "nvidia.com/gpu",
                "devices": [{"name": "0", "containerEdits": {"deviceNodes": [node]}}],
            }
        )
        if message:
            with pytest.raises(ChandlerError, match=message):
                config({"resources": {"gpu": {"count": 1}}}, inventory=fixed(text.encode()))
        else:
            result = config({"resources": {"gpu": {"count": 1}}}, inventory=fixed(text.encode()))
            assert (
                at(result, "mount /dev/nvidia0")["source"] == "/dev/null" and at(result, "device /dev/nvidia0") is None
            )
            assert at(result, "rule c 1:3") == "rwm"


def test_a_user_that_is_not_mapped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rootless(monkeypatch)
    with pytest.raises(ChandlerError, match="uid 1000 is not among the ids"):
        config({}, IMAGE)
    rootless(monkeypatch, "all")
    assert config({}, IMAGE)["process"]["user"] == {"uid": 1000, "gid": 2000}


def test_a_rootless_container_in_the_host_s_network_has_the_host_s_sys(monkeypatch: pytest.MonkeyPatch) -> None:
    rootless(monkeypatch)
    assert at(config({"host_network": True}), "mount /sys") == {
        "destination": "/sys",
        "type": "none",
        "source": "/sys",
        "options": ["rbind", "nosuid", "noexec", "nodev", "ro"],
    }


def test_cgroup_v2_gets_a_cgroup_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "survey", lambda tree=None: SURVEY._replace(version="v2"))
    assert {"type": "cgroup"} in config({})["linux"]["namespaces"]


@pytest.mark.parametrize("refusal", ["ids", "groups"])
def test_a_refusal_leaves_no_shared_gpu(monkeypatch: pytest.MonkeyPatch, refusal: str) -> None:
    """Sharing is set up last."""
    from shim.sharing import setup

    begun: list[Any] = []
    monkeypatch.setattr(setup, "begin", lambda share, state_dir: begun.append(share))

    def refuse(*_: Any, **__: Any) -> Any:
        raise ChandlerError("refused")

    request = {"resources": {"gpu": {"devices": ["0"], "sharing": "mps"}}}
    with monkeypatch.context() as patched:
        patched.setattr(*((build, "_check_ids") if refusal == "ids" else (cgroups, "choose_group")), refuse)
        with pytest.raises(ChandlerError, match="refused"):
            config(request, inventory=fixed(gpu__mps="external"))
    assert begun == []
    config(request, inventory=fixed(gpu__mps="external"))
    assert len(begun) == 1
