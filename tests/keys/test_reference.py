"""What each key of a request makes of a config.json: a row for every key and each way to write it.

A row has a document, and the places of config.json that it changes with their new values; no other place may change.
Rows of errors have words of the sentence.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from lab.local_node import Node, P, cdi

from shim import engine
from shim.errors import ChandlerError, HostError, RequestError
from shim.keys.process import CAPABILITIES
from shim.node import inventory

GONE = object()  # not there any more
MI, GI = 1 << 20, 1 << 30
CAPS = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"]
BASE: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {
        "args": ["/entry", "cmd"],
        "cwd": "/work",
        "env": ["PATH=/usr/bin", "TERM=xterm", "A=image"],
        "user": {"uid": 5, "gid": 6, "additionalGids": [7]},
        "capabilities": {"bounding": CAPS, "effective": CAPS, "permitted": CAPS},
        "noNewPrivileges": True,
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 1024}],
        "apparmorProfile": "engine",
    },
    "root": {"path": "rootfs"},
    "hostname": "old",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "relatime"]},
    ],
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "uts"}, {"type": "ipc"}, {"type": "mount"}],
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
        "cgroupsPath": "/kubepods/pod1/abc",
        "sysctl": {"net.ipv4.ping_group_range": "0 0", "kernel.msgmax": "1"},
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    },
    "annotations": {},
}
PASSWD = "root:x:0:0::/:/bin/sh\napp:x:1000:2000::/:/bin/sh\nodd:x:x:1\nshort\nbig:x:99999999999:1::/:\n"
GROUP = "root:x:0:\nvideo:x:44:app,other\nrender:x:105:app\nstaff:x:50:x\nodd:x:y:app\n"


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Any:
    monkeypatch = pytest.MonkeyPatch()
    node = Node(tmp_path_factory.mktemp("node"), monkeypatch)
    for name in ("data", "named", "bundle/rootfs/etc"):
        (node.directory / name).mkdir(parents=True)
    (node.directory / "bundle/rootfs/etc/passwd").write_text(PASSWD)
    (node.directory / "bundle/rootfs/etc/group").write_text(GROUP)
    node.put(
        "etc/config.toml",
        f"""
[cdi]
spec-dirs = ["{node.directory}/etc/cdi"]
[policy]
trust = "all"
[volumes]
data = "{node.directory}/named"
_anon_var_cache = "{node.directory}/named"
_s3_models_v1 = "{node.directory}/named"
_s3_plain_ = "{node.directory}/named"
lost = "{node.directory}/lost"
file = "/dev/null"
""",
    )
    node.spec("nvidia.json", cdi())
    monkeypatch.setenv("CHANDLER_TEST_VALUE", "from the host")
    monkeypatch.setitem(posix_environment(), b"CHANDLER_TEST_VALUE", b"from the host")
    try:
        yield node, node.compiled()
    finally:
        monkeypatch.undo()


def posix_environment() -> Any:
    import posix

    return posix.environ


def equipped(at: tuple[Node, inventory.Inventory], document: Any, base: dict[str, Any] | None = None) -> dict[str, Any]:
    node, compiled = at
    config = copy.deepcopy(BASE if base is None else base)
    text = json.dumps(document).replace("@", str(node.directory))
    config["annotations"] = {P + "service": text}
    before = copy.deepcopy(config)
    plan = engine.plan(
        config,
        compiled,
        call_facts={"bundle": str(node.directory / "bundle"), "id": "c1", "handler": "chandler-runtime"},
    )
    assert plan is not None
    result = engine.equip(config, plan.edits, False)
    assert config == before, "the input is never changed"
    again = engine.equip(result, plan.edits, False)
    assert again == result, "applying twice gives what applying once gives"
    return result


def changes(before: Any, after: Any, path: str = "") -> dict[str, Any]:
    """The places that differ: objects are compared member by member, lists as a whole."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, Any] = {}
        for key in before.keys() | after.keys():
            found.update(changes(before.get(key, GONE), after.get(key, GONE), f"{path}.{key}" if path else key))
        return found
    return {} if before == after and type(before) is type(after) else {path: after}


def bind(target: str, source: str = "@/data", options: tuple[str, ...] = ("rbind", "rprivate", "rw")) -> dict[str, Any]:
    return {"destination": target, "type": "bind", "source": source, "options": list(options)}


def tmpfs(target: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", *options]}


def mounts(*more: dict[str, Any]) -> dict[str, Any]:
    return {"mounts": [*BASE["mounts"], *sorted(more, key=lambda mount: str(mount["destination"]).count("/"))]}


def env(*more: str) -> dict[str, Any]:
    return {"process.env": ["PATH=/usr/bin", "TERM=xterm", "A=image", *more]}


def sets(names: list[str]) -> dict[str, Any]:
    return {f"process.capabilities.{key}": names for key in ("bounding", "effective", "permitted")}


def storage(**keys: Any) -> dict[str, Any]:
    return {"storage": [keys]}


def resources(**keys: Any) -> dict[str, Any]:
    return {"resources": keys}


def distributed(**keys: Any) -> dict[str, Any]:
    return {"resources": {"gpu": {"distributed": keys}}}


NULL = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "uid": 5, "gid": 6}
DENY = {"allow": False, "access": "rwm"}


def device(access: str) -> dict[str, Any]:
    return {
        "linux.devices": "null",
        "linux.resources.devices": [DENY, {"allow": True, "type": "c", "major": 1, "minor": 3, "access": access}],
    }


ROWS: list[tuple[str, Any, dict[str, Any]]] = [
    ("nothing", {}, {}),
    # the environment: what is asked for wins over the image, PATH and TERM stay
    ("env new", {"env": {"B": "1"}}, env("B=1")),
    ("env over the image", {"env": {"A": "mine"}}, {"process.env": ["PATH=/usr/bin", "TERM=xterm", "A=mine"]}),
    ("env TERM", {"env": {"TERM": "dumb"}}, {"process.env": ["PATH=/usr/bin", "TERM=dumb", "A=image"]}),
    ("env PATH", {"env": {"PATH": "/bin"}}, {"process.env": ["PATH=/bin", "TERM=xterm", "A=image"]}),
    ("env empty", {"env": {"B": ""}}, env("B=")),
    ("env equals", {"env": {"B": "x=y"}}, env("B=x=y")),
    ("env of the host", {"env": {"B": "$E:CHANDLER_TEST_VALUE"}}, env("B=from the host")),
    ("env dollar", {"env": {"B": "$EX", "C": "$", "D": "a$E:b"}}, env("B=$EX", "C=$", "D=a$E:b")),
    # limits
    ("cpu half", resources(cpu="0.5"), {"linux.resources.cpu": {"quota": 50000, "period": 100000}}),
    ("cpu milli", resources(cpu="500m"), {"linux.resources.cpu": {"quota": 50000, "period": 100000}}),
    ("cpu two", resources(cpu=2), {"linux.resources.cpu": {"quota": 200000, "period": 100000}}),
    ("cpu floor", resources(cpu="1m"), {"linux.resources.cpu": {"quota": 1000, "period": 100000}}),
    ("memory Mi", resources(memory="512Mi"), {"linux.resources.memory": {"limit": 512 * MI}}),
    ("memory Ki", resources(memory="512Ki"), {"linux.resources.memory": {"limit": 512 << 10}}),
    ("memory Gi", resources(memory="1Gi"), {"linux.resources.memory": {"limit": GI}}),
    ("memory Ti", resources(memory="1Ti"), {"linux.resources.memory": {"limit": 1 << 40}}),
    ("memory G", resources(memory="2G"), {"linux.resources.memory": {"limit": 2 * 10**9}}),
    ("memory k", resources(memory="4k"), {"linux.resources.memory": {"limit": 4000}}),
    ("memory M", resources(memory="4M"), {"linux.resources.memory": {"limit": 4 * 10**6}}),
    ("memory bytes", resources(memory="1024"), {"linux.resources.memory": {"limit": 1024}}),
    ("memory number", resources(memory=1024), {"linux.resources.memory": {"limit": 1024}}),
    ("memory fraction", resources(memory="12.5Mi"), {"linux.resources.memory": {"limit": 25 * MI // 2}}),
    ("memory exponent", resources(memory="1e3"), {"linux.resources.memory": {"limit": 1000}}),
    ("swap", resources(memory="1Gi", memory_swap="2Gi"), {"linux.resources.memory": {"limit": GI, "swap": 2 * GI}}),
    ("swap unlimited", resources(memory_swap=-1), {"linux.resources.memory": {"swap": -1}}),
    ("reservation", resources(memory_reservation="1Mi"), {"linux.resources.memory": {"reservation": MI}}),
    ("shares", resources(cpu_shares=512), {"linux.resources.cpu": {"shares": 512}}),
    ("cpuset", resources(cpuset="0-1"), {"linux.resources.cpu": {"cpus": "0-1"}}),
    ("pids", resources(pids_limit=9), {"linux.resources.pids": {"limit": 9}}),
    ("oom score", resources(oom_score_adj=500), {"process.oomScoreAdj": 500}),
    ("oom score none", resources(oom_score_adj=0), {"process.oomScoreAdj": 0}),
    ("blkio", resources(blkio_weight=10), {"linux.resources.blockIO": {"weight": 10}}),
    (
        "hugepages Mi",
        resources(hugepages={"2Mi": "1Gi"}),
        {"linux.resources.hugepageLimits": [{"pageSize": "2MB", "limit": GI}]},
    ),
    (
        "hugepages MB",
        resources(hugepages={"2MB": 0}),
        {"linux.resources.hugepageLimits": [{"pageSize": "2MB", "limit": 0}]},
    ),
    (
        "hugepages two",
        resources(hugepages={"1Gi": "2Gi", "64Ki": "1Mi"}),
        {"linux.resources.hugepageLimits": [{"pageSize": "1GB", "limit": 2 * GI}, {"pageSize": "64KB", "limit": MI}]},
    ),
    # the command
    ("entrypoint and args", {"command": {"entrypoint": ["/a"], "args": ["b", ""]}}, {"process.args": ["/a", "b", ""]}),
    ("entrypoint alone drops the image's cmd", {"command": {"entrypoint": ["/a", "x"]}}, {"process.args": ["/a", "x"]}),
    ("args alone", {"command": {"args": ["b", "c"]}}, {"process.args": ["b", "c"]}),
    ("empty args", {"command": {"args": []}}, {}),
    ("empty command", {"command": {}}, {}),
    ("empty entrypoint", {"command": {"entrypoint": [], "args": ["x"]}}, {"process.args": ["x"]}),
    ("workdir", {"command": {"workdir": "/srv"}}, {"process.cwd": "/srv"}),
    ("workdir slash", {"command": {"workdir": "/srv/"}}, {"process.cwd": "/srv"}),
    ("workdir root", {"command": {"workdir": "/"}}, {"process.cwd": "/"}),
    # the user
    ("uid and gid", {"user": "1:2"}, {"process.user.uid": 1, "process.user.gid": 2}),
    ("uid alone is the gid, too", {"user": "1000"}, {"process.user.uid": 1000, "process.user.gid": 1000}),
    ("uid a number", {"user": 8}, {"process.user.uid": 8, "process.user.gid": 8}),
    ("root", {"user": "0"}, {"process.user.uid": 0, "process.user.gid": 0}),
    (
        "user by name",
        {"user": "app"},
        {"process.user.uid": 1000, "process.user.gid": 2000, "process.user.additionalGids": [7, 44, 105]},
    ),
    ("user and group by name", {"user": "app:staff"}, {"process.user.uid": 1000, "process.user.gid": 50}),
    ("name and number", {"user": "app:9"}, {"process.user.uid": 1000, "process.user.gid": 9}),
    ("number and name", {"user": "9:video"}, {"process.user.uid": 9, "process.user.gid": 44}),
    ("extra groups", {"extra_groups": [44, "105"]}, {"process.user.additionalGids": [7, 44, 105]}),
    ("extra group there already", {"extra_groups": [7]}, {}),
    ("extra groups by name", {"extra_groups": ["staff", 1]}, {"process.user.additionalGids": [7, 50, 1]}),
    # capabilities
    ("add", {"capabilities": ["NET_ADMIN"]}, sets([*CAPS, "CAP_NET_ADMIN"])),
    ("add lower case", {"capabilities": ["net_admin"]}, sets([*CAPS, "CAP_NET_ADMIN"])),
    ("add with its prefix", {"capabilities": ["CAP_NET_ADMIN"]}, sets([*CAPS, "CAP_NET_ADMIN"])),
    ("add with its prefix in lower case", {"capabilities": ["cap_net_admin"]}, sets([*CAPS, "CAP_NET_ADMIN"])),
    ("add one that is there", {"capabilities": ["KILL"]}, {}),
    ("add one twice", {"capabilities": ["FOWNER", "CAP_FOWNER"]}, sets([*CAPS, "CAP_FOWNER"])),
    ("add two", {"capabilities": ["FOWNER", "SETUID"]}, sets([*CAPS, "CAP_FOWNER", "CAP_SETUID"])),
    (
        "add all",
        {"capabilities": ["ALL"]},
        {f"process.capabilities.{key}": "every" for key in ("bounding", "effective", "permitted")},
    ),
    ("drop", {"cap_drop": ["KILL"]}, sets(["CAP_CHOWN", "CAP_NET_RAW"])),
    ("drop what is not there", {"cap_drop": ["SYS_ADMIN"]}, {}),
    ("drop all", {"cap_drop": ["ALL"]}, sets([])),
    ("drop all and add", {"cap_drop": ["ALL"], "capabilities": ["SETUID"]}, sets(["CAP_SETUID"])),
    (
        "drop and add",
        {"cap_drop": ["KILL"], "capabilities": ["SETUID"]},
        sets(["CAP_CHOWN", "CAP_NET_RAW", "CAP_SETUID"]),
    ),
    (
        "privileged",
        {"privileged": True},
        {
            **{f"process.capabilities.{key}": "every" for key in ("bounding", "effective", "permitted")},
            "process.noNewPrivileges": False,
            "process.apparmorProfile": GONE,
            "linux.maskedPaths": [],
            "linux.readonlyPaths": [],
            "linux.seccomp": GONE,
            "linux.resources.devices": [DENY, {"allow": True, "access": "rwm"}],
            "mounts": [
                BASE["mounts"][0],
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["relatime"]},
            ],
        },
    ),
    ("not privileged", {"privileged": False}, {}),
    # names and namespaces
    ("hostname", {"hostname": "trainer-0.example.com"}, {"hostname": "trainer-0.example.com"}),
    (
        "host network",
        {"host_network": True},
        {
            "linux.namespaces": [{"type": "pid"}, {"type": "uts"}, {"type": "ipc"}, {"type": "mount"}],
            "linux.sysctl.net.ipv4.ping_group_range": GONE,
        },
    ),
    ("no host network", {"host_network": False}, {}),
    ("sysctl of the network", {"sysctls": {"net.core.somaxconn": "1024"}}, {"linux.sysctl.net.core.somaxconn": "1024"}),
    ("sysctl a number", {"sysctls": {"net.core.somaxconn": 1024}}, {"linux.sysctl.net.core.somaxconn": "1024"}),
    ("sysctl with slashes", {"sysctls": {"net/core/somaxconn": "9"}}, {"linux.sysctl.net.core.somaxconn": "9"}),
    (
        "sysctl of IPC",
        {"sysctls": {"kernel.shmmax": "1", "fs.mqueue.msg_max": "5"}},
        {"linux.sysctl.kernel.shmmax": "1", "linux.sysctl.fs.mqueue.msg_max": "5"},
    ),
    ("sysctl over the engine's", {"sysctls": {"kernel.msgmax": "2"}}, {"linux.sysctl.kernel.msgmax": "2"}),
    ("cgroup parent", {"cgroup_parent": "/team"}, {"linux.cgroupsPath": "/team/abc"}),
    ("cgroup parent slash", {"cgroup_parent": "/team/"}, {"linux.cgroupsPath": "/team/abc"}),
    ("cgroup parent root", {"cgroup_parent": "/"}, {"linux.cgroupsPath": "/abc"}),
    (
        "ulimit one number",
        {"ulimits": {"core": 0}},
        {"process.rlimits": [*BASE["process"]["rlimits"], {"type": "RLIMIT_CORE", "hard": 0, "soft": 0}]},
    ),
    (
        "ulimit pair",
        {"ulimits": {"nofile": {"soft": 10, "hard": 20}}},
        {"process.rlimits": [{"type": "RLIMIT_NOFILE", "hard": 20, "soft": 10}]},
    ),
    (
        "ulimit text",
        {"ulimits": {"nofile": "10:20"}},
        {"process.rlimits": [{"type": "RLIMIT_NOFILE", "hard": 20, "soft": 10}]},
    ),
    (
        "ulimit one text",
        {"ulimits": {"RLIMIT_NOFILE": "10"}},
        {"process.rlimits": [{"type": "RLIMIT_NOFILE", "hard": 10, "soft": 10}]},
    ),
    (
        "ulimit unlimited",
        {"ulimits": {"memlock": -1}},
        {
            "process.rlimits": [
                *BASE["process"]["rlimits"],
                {"type": "RLIMIT_MEMLOCK", "hard": 2**64 - 1, "soft": 2**64 - 1},
            ]
        },
    ),
    (
        "ulimit unlimited in words",
        {"ulimits": {"memlock": "5:unlimited"}},
        {"process.rlimits": [*BASE["process"]["rlimits"], {"type": "RLIMIT_MEMLOCK", "hard": 2**64 - 1, "soft": 5}]},
    ),
    ("read-only root", {"read_only_root_fs": True}, {"root.readonly": True}),
    ("writable root", {"read_only_root_fs": False}, {"root.readonly": False}),
    # devices
    ("device", {"devices": [{"path": "/dev/null"}]}, device("rw")),
    ("device as a text", {"devices": ["/dev/null"]}, device("rw")),
    ("device read", {"devices": [{"path": "/dev/null", "write": False}]}, device("r")),
    ("device write", {"devices": [{"path": "/dev/null", "read": False}]}, device("w")),
    ("device mknod", {"devices": [{"path": "/dev/null", "mknod": True}]}, device("rwm")),
    (
        "device mknod alone",
        {"devices": [{"path": "/dev/null", "read": False, "write": False, "mknod": True}]},
        device("m"),
    ),
    # storage
    ("bind", storage(type="bind", source="@/data", target="/app/data"), mounts(bind("/app/data"))),
    (
        "bind read-only",
        storage(type="bind", source="@/data", target="/app/data", readonly=True),
        mounts(bind("/app/data", options=("rbind", "rprivate", "ro"))),
    ),
    (
        "bind writable",
        storage(type="bind", source="@/data", target="/app/data", readonly=False),
        mounts(bind("/app/data")),
    ),
    ("bind of a file", storage(type="bind", source="/dev/null", target="/app/x"), mounts(bind("/app/x", "/dev/null"))),
    (
        "bind over the engine's",
        storage(type="bind", source="@/data", target="/proc"),
        {"mounts": [bind("/proc"), *BASE["mounts"][1:]]},
    ),
    ("named", storage(type="named", name="data", target="/d"), mounts(bind("/d", "@/named"))),
    (
        "named read-only",
        storage(type="named", name="data", target="/d", readonly=True),
        mounts(bind("/d", "@/named", ("rbind", "rprivate", "ro"))),
    ),
    (
        "named with tier and size",
        storage(type="named", name="data", target="/d", tier="network", size="1Gi"),
        mounts(bind("/d", "@/named")),
    ),
    ("anonymous", storage(type="anonymous", target="/var/cache"), mounts(bind("/var/cache", "@/named"))),
    (
        "anonymous with tier",
        storage(type="anonymous", target="/var/cache/", tier="local"),
        mounts(bind("/var/cache", "@/named")),
    ),
    ("tmpfs", storage(type="tmpfs", target="/t"), mounts(tmpfs("/t"))),
    ("tmpfs size", storage(type="tmpfs", target="/t", size="256Mi"), mounts(tmpfs("/t", f"size={256 * MI}"))),
    ("tmpfs size number", storage(type="tmpfs", target="/t", size=4096), mounts(tmpfs("/t", "size=4096"))),
    ("tmpfs size half", storage(type="tmpfs", target="/t", size="0.5Gi"), mounts(tmpfs("/t", f"size={512 * MI}"))),
    ("tmpfs mode", storage(type="tmpfs", target="/t", mode=1777), mounts(tmpfs("/t", "mode=1777"))),
    ("tmpfs mode text", storage(type="tmpfs", target="/t", mode="0755"), mounts(tmpfs("/t", "mode=0755"))),
    ("tmpfs mode short", storage(type="tmpfs", target="/t", mode=700), mounts(tmpfs("/t", "mode=0700"))),
    (
        "tmpfs both",
        storage(type="tmpfs", target="/t", mode="1770", size="1M"),
        mounts(tmpfs("/t", "size=1000000", "mode=1770")),
    ),
    ("s3", storage(type="s3", bucket="plain", target="/m"), mounts(bind("/m", "@/named"))),
    (
        "s3 prefix",
        storage(type="s3", bucket="models", prefix="v1", target="/m", readonly=True),
        mounts(bind("/m", "@/named", ("rbind", "rprivate", "ro"))),
    ),
    (
        "s3 endpoint and credentials",
        storage(type="s3", bucket="plain", target="/m", endpoint="https://x", credentials={"key": "x"}),
        mounts(bind("/m", "@/named")),
    ),
    (
        "several",
        {
            "storage": [
                {"type": "bind", "source": "@/data", "target": "/app/b/c"},
                {"type": "named", "name": "data", "target": "/app"},
                {"type": "tmpfs", "target": "/app/b"},
            ]
        },
        mounts(bind("/app/b/c"), bind("/app", "@/named"), tmpfs("/app/b")),
    ),
]

# document, the first variables that training adds
TRAINING: list[tuple[str, dict[str, Any], list[str]]] = [
    ("defaults: no rank is equipped up", {}, ["MASTER_PORT=29500", "NCCL_SOCKET_IFNAME=eth0"]),
    ("nccl", {"backend": "nccl"}, ["MASTER_PORT=29500", "NCCL_SOCKET_IFNAME=eth0"]),
    ("gloo", {"backend": "gloo"}, ["MASTER_PORT=29500", "GLOO_SOCKET_IFNAME=eth0"]),
    ("mpi", {"backend": "mpi"}, ["MASTER_PORT=29500"]),
    (
        "mpi and an interface",
        {"backend": "mpi", "interface": "ib0"},
        ["MASTER_PORT=29500", "OMPI_MCA_btl_tcp_if_include=ib0"],
    ),
    ("an interface", {"interface": "ib0"}, ["MASTER_PORT=29500", "NCCL_SOCKET_IFNAME=ib0"]),
    ("a port", {"master_port": 1234}, ["MASTER_PORT=1234", "NCCL_SOCKET_IFNAME=eth0"]),
    (
        "an address",
        {"master_addr": "trainer-0"},
        ["MASTER_ADDR=trainer-0", "MASTER_PORT=29500", "NCCL_SOCKET_IFNAME=eth0"],
    ),
    ("a world", {"world_size": 4}, ["MASTER_PORT=29500", "WORLD_SIZE=4", "NCCL_SOCKET_IFNAME=eth0"]),
    ("a rank", {"rank": 0}, ["MASTER_PORT=29500", "RANK=0", "NCCL_SOCKET_IFNAME=eth0"]),
    (
        "all",
        {"world_size": 4, "rank": 3, "local_rank": 1, "backend": "gloo"},
        ["MASTER_PORT=29500", "WORLD_SIZE=4", "RANK=3", "LOCAL_RANK=1", "GLOO_SOCKET_IFNAME=eth0"],
    ),
]

ERRORS: list[tuple[Any, str]] = [
    # references: the name, never a value
    (
        {"env": {"B": "$E:CHANDLER_TEST_UNSET"}},
        "env.B: Chandler's own environment has no variable 'CHANDLER_TEST_UNSET'",
    ),
    ({"env": {"B": "$E:"}}, "env.B: Chandler's own environment has no variable ''"),
    ({"env": {"B": "$S:token"}}, "env.B: the secret token cannot be read: this node has no provider of secrets"),
    ({"env": {"B": "$S:../x"}}, "env.B: '../x' is no name of a secret"),
    ({"env": {"B": "$S:"}}, "env.B: '' is no name of a secret"),
    # quantities that are easily misread
    (resources(memory="8388608Ti"), "resources.memory: '8388608Ti' is too large"),
    (resources(memory="abc"), "resources.memory: 'abc' is no quantity"),
    (resources(memory=""), "resources.memory: '' is not a text"),
    (resources(oom_score_adj=1001), "resources.oom_score_adj: 1001 is not between -1000 and 1000"),
    (resources(oom_score_adj=-1), "resources.oom_score_adj = -1 loosens the engine's 0"),
    (resources(blkio_weight=9), "resources.blkio_weight: 9 is not between 10 and 1000"),
    (resources(hugepages={"3Mi": 1}), "resources.hugepages: '3Mi' is no size of a page"),
    (resources(hugepages={"2Mi": "-1"}), "resources.hugepages: 2Mi: '-1' is negative"),
    (resources(hugepages={"2Mi": 1, "2MB": 1}), "'2MB' is the second key that means '2MB'"),
    # the command
    ({"command": {"entrypoint": [""]}}, "command: the program's name is empty"),
    ({"command": {"args": "sh"}}, "command.args: 'sh' is not a list"),
    ({"command": {"workdir": "srv"}}, "command.workdir: 'srv' is not a plain absolute path"),
    ({"command": {"workdir": "/proc/self/fd/7"}}, "command.workdir: '/proc/self/fd/7' is below /proc"),
    ({"command": {"shell": "x"}}, "unknown key 'command.shell'"),
    # an unparsable user is never root
    ({"user": ""}, "user: '' is not a text"),
    ({"user": "1:2:3"}, "user: '1:2:3' is no user"),
    ({"user": ":1"}, "user: ':1' is no user"),
    ({"user": "1:"}, "user: '1:' is no user"),
    ({"user": -1}, "user: '-1' is no user"),
    ({"user": "4294967295"}, "user: '4294967295' has a number of 2147483648 or more"),
    ({"user": "nobody-there"}, "user: the image's /etc/passwd has no user 'nobody-there'"),
    ({"user": "odd"}, "user: the image's /etc/passwd has no user 'odd'"),
    ({"user": "big"}, "user: the image's /etc/passwd has no user 'big'"),
    ({"user": "app:lost"}, "user: the image's /etc/group has no group 'lost'"),
    ({"extra_groups": ["lost"]}, "extra_groups: the image's /etc/group has no group 'lost'"),
    ({"extra_groups": []}, "extra_groups: the list is empty"),
    # unknown capabilities are errors
    ({"capabilities": ["NO_SUCH"]}, "capabilities: 'NO_SUCH' is no capability that Chandler knows"),
    ({"cap_drop": ["sys-admin"]}, "cap_drop: 'sys-admin' is no capability"),
    ({"capabilities": []}, "capabilities: the list is empty"),
    ({"privileged": "yes"}, "privileged: 'yes' is neither true nor false"),
    ({"hostname": "a_b"}, "hostname: 'a_b' is no name of a host"),
    ({"hostname": "-a"}, "hostname: '-a' is no name of a host"),
    ({"sysctls": {"kernel.core_pattern": "|/x"}}, "sysctls: kernel.core_pattern belongs to the whole host"),
    ({"sysctls": {"vm.swappiness": "1"}}, "sysctls: vm.swappiness belongs to the whole host"),
    (
        {"sysctls": {"net.core.somaxconn": "1"}, "host_network": True},
        "sysctls: net.core.somaxconn would be set for the whole host",
    ),
    ({"cgroup_parent": "team"}, "cgroup_parent: 'team' is neither an absolute path"),
    ({"cgroup_parent": "/a/../b"}, "cgroup_parent: '/a/../b' is not a plain absolute path"),
    ({"cgroup_parent": "team.slice"}, "cgroup_parent: 'team.slice' does not fit the engine's cgroupsPath"),
    ({"ulimits": {"files": 1}}, "ulimits: 'files' is no limit"),
    ({"ulimits": {"nofile": "20:10"}}, "ulimits: nofile: the soft limit 20 is above the hard one, 10"),
    ({"ulimits": {"nofile": {"soft": 1}}}, "ulimits: nofile: has no 'hard'"),
    ({"ulimits": {"nofile": -2}}, "ulimits: nofile: soft: -2 is not between -1"),
    # missing devices are errors
    ({"devices": [{"path": "/dev/chandler-none"}]}, "devices: /dev/chandler-none is not on this host"),
    ({"devices": [{"path": "/dev/shm"}]}, "devices: /dev/shm is not a device node"),
    ({"devices": [{"path": "/etc/passwd"}]}, "devices: path: '/etc/passwd' is not below /dev"),
    ({"devices": [{"path": "/dev/../etc/x"}]}, "devices: path: '/dev/../etc/x' is not a plain absolute path"),
    (
        {"devices": [{"path": "/dev/null", "read": False, "write": False}]},
        "devices: /dev/null is asked for without any access",
    ),
    ({"devices": ["/dev/null", "/dev/null"]}, "devices: /dev/null is named twice"),
    ({"devices": [{"read": True}]}, "devices: has no 'path'"),
    # storage
    (storage(type="bind", source="@/none", target="/d"), "none is not on this host"),
    (storage(type="bind", source="@/data"), "storage: bind: has no 'target'"),
    (storage(type="bind", source="data", target="/d"), "storage: bind: source: 'data' is not a plain absolute path"),
    (storage(type="bind", source="@/data", target="/"), "storage: bind: target: / cannot be mounted over"),
    (
        storage(type="named", name="unprepared", target="/d"),
        "storage: the volume 'unprepared' (for /d) is not prepared",
    ),
    (storage(type="named", name="lost", target="/d"), "storage: the volume 'lost' is to be in "),
    (
        storage(type="named", name="file", target="/d"),
        "storage: the volume 'file' is to be in /dev/null, which is no directory",
    ),
    (storage(type="named", name="../x", target="/d"), "storage: named: name: '../x' is no name"),
    (storage(type="named", name="data", target="/d", tier="tape"), "storage: named: tier: 'tape' is not one of local"),
    (
        storage(type="anonymous", target="/var/lib"),
        "storage: the volume '_anon_var_lib' (for /var/lib) is not prepared",
    ),
    (storage(type="s3", bucket="other", target="/m"), "storage: the volume '_s3_other_' (for /m) is not prepared"),
    (storage(type="tmpfs", target="/t", size="0"), "storage: tmpfs: size: a size of 0 is no limit"),
    (storage(type="tmpfs", target="/t", mode=888), "storage: tmpfs: mode: 888 is no mode"),
    (storage(type="tmpfs", target="/t", mode=511), "storage: tmpfs: mode: 511 may be meant as 777"),
    (storage(type="tmpfs", target="/t", mode="77777"), "storage: tmpfs: mode: '77777' is no mode"),
    (storage(type="nfs", target="/t"), "storage: 'nfs' is no type of storage"),
    (
        {"storage": [{"type": "tmpfs", "target": "/t"}, {"type": "tmpfs", "target": "/t/"}]},
        "storage: /t is mounted twice",
    ),
    # training
    (distributed(backend="x"), "resources.gpu.distributed.backend: 'x' is not one of nccl, gloo, mpi"),
    (distributed(master_port=0), "resources.gpu.distributed.master_port: 0 is not between 1 and 65535"),
    (distributed(rank=4, world_size=4), "resources.gpu.distributed.rank: 4 is not below world_size, 4"),
    (distributed(rank=-1), "resources.gpu.distributed.rank: -1 is not between"),
]


def test_the_table_is_long() -> None:
    assert len(ROWS) + len(TRAINING) + len(ERRORS) >= 150


@pytest.mark.parametrize(("document", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_edits_of_a_key(at: tuple[Node, inventory.Inventory], document: Any, expected: dict[str, Any]) -> None:
    wanted = json.loads(
        json.dumps({key: value for key, value in expected.items() if value is not GONE}).replace(
            "@", str(at[0].directory)
        )
    )
    found = changes({**BASE, "annotations": None}, {**equipped(at, document), "annotations": None})
    assert found.keys() == expected.keys()
    for key, value in wanted.items():
        if value == "every":
            value = every(found[key])
        if value == "null":
            (node,) = found[key]
            assert node.pop("fileMode") == os.stat("/dev/null").st_mode & 0o777
            found[key], value = node, NULL
        assert found[key] == value, key
    assert all(found[key] is GONE for key, value in expected.items() if value is GONE)


def every(found: list[str]) -> list[str]:
    """All capabilities that this process could hand on, the old ones first."""
    with open("/proc/self/status", encoding="ascii") as file:
        bounding = int(next(line for line in file if line.startswith("CapBnd:")).split()[1], 16)
    there = {name for number, name in enumerate(CAPABILITIES) if bounding >> number & 1}
    assert set(found) >= there and len(found) == len(set(found))
    return found


@pytest.mark.parametrize(("document", "variables"), [row[1:] for row in TRAINING], ids=[row[0] for row in TRAINING])
def test_the_variables_of_a_distributed_training(
    at: tuple[Node, inventory.Inventory], document: dict[str, Any], variables: list[str]
) -> None:
    plain, found = (
        equipped(at, {"resources": {"gpu": {"devices": ["0"], **more}}}) for more in ({}, {"distributed": document})
    )
    assert found["process"]["env"] == plain["process"]["env"] + variables
    assert {**changes(plain, found), "annotations." + P + "service": 0}.keys() == {
        "process.env",
        "annotations." + P + "service",
    }


@pytest.mark.parametrize(("document", "words"), ERRORS, ids=[words[:60] for _, words in ERRORS])
def test_a_wrong_request_is_refused(at: tuple[Node, inventory.Inventory], document: Any, words: str) -> None:
    with pytest.raises(ChandlerError) as caught:
        equipped(at, document)
    text = str(caught.value)
    assert words in text and text.startswith("annotation chandler.oci/service: ") and "\n" not in text
    assert "from the host" not in text


def without(*path: str) -> dict[str, Any]:
    base = copy.deepcopy(BASE)
    inner = base
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return base


def with_linux(**more: Any) -> dict[str, Any]:
    base = copy.deepcopy(BASE)
    base["linux"].update(more)
    return base


SLICED = "system.slice:cri-containerd:abc"
NAMELESS = with_linux(namespaces=[{"type": "mount"}])


@pytest.mark.parametrize(
    ("base", "document", "member", "value"),
    [
        (
            with_linux(cgroupsPath=SLICED),
            {"cgroup_parent": "team.slice"},
            "linux.cgroupsPath",
            "team.slice:cri-containerd:abc",
        ),
        (without("linux", "cgroupsPath"), {"cgroup_parent": "/team"}, "linux.cgroupsPath", "/team/c1"),
        (
            without("process", "capabilities"),
            {"capabilities": ["CHOWN"]},
            "process.capabilities",
            {key: ["CAP_CHOWN"] for key in ("bounding", "effective", "permitted")},
        ),
        (without("process", "user"), {"user": "3"}, "process.user", {"uid": 3, "gid": 3}),
        (
            without("process", "rlimits"),
            {"ulimits": {"core": 1}},
            "process.rlimits",
            [{"type": "RLIMIT_CORE", "hard": 1, "soft": 1}],
        ),
        (without("root"), {"read_only_root_fs": True}, "root", {"readonly": True}),
        (without("hostname"), {"hostname": "x"}, "hostname", "x"),
        (without("linux", "sysctl"), {"sysctls": {"net.a": "1"}}, "linux.sysctl", {"net.a": "1"}),
        (
            with_linux(namespaces=[{"type": "network", "path": "/proc/1/ns/net"}, {"type": "ipc"}]),
            {"sysctls": {"net.a": "1"}},
            "linux.sysctl.net.a",
            "1",
        ),
        (without("mounts"), {"storage": [{"type": "tmpfs", "target": "/t"}]}, "mounts", [tmpfs("/t")]),
    ],
)
def test_the_config_of_another_engine(
    at: tuple[Node, inventory.Inventory], base: dict[str, Any], document: Any, member: str, value: Any
) -> None:
    found = changes({**base, "annotations": None}, {**equipped(at, document, base), "annotations": None})
    assert found == {member: value}


@pytest.mark.parametrize(
    ("base", "document", "words"),
    [
        (with_linux(cgroupsPath=SLICED), {"cgroup_parent": "/team"}, "write a systemd slice"),
        (NAMELESS, {"hostname": "x"}, "hostname: the container shares the host's name"),
        (NAMELESS, {"sysctls": {"net.a": "1"}}, "the container has no network namespace of its own"),
        (NAMELESS, {"sysctls": {"kernel.shmmax": "1"}}, "the container has no ipc namespace of its own"),
    ],
)
def test_a_request_that_does_not_fit_the_config_of_another_engine(
    at: tuple[Node, inventory.Inventory], base: dict[str, Any], document: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        equipped(at, document, base)


def test_names_need_the_image(at: tuple[Node, inventory.Inventory]) -> None:
    config = {**copy.deepcopy(BASE), "annotations": {P + "user": "app"}}
    with pytest.raises(
        HostError,
        match="user: the user 'app' cannot be looked up: the container's root file system is not known; write numbers",
    ):
        engine.plan(config, at[1])


@pytest.mark.parametrize("name", ["passwd", "group"])
@pytest.mark.parametrize("kind", ["link out", "dots", "fifo", "missing", "directory", "huge"])
def test_a_hostile_image(at: tuple[Node, inventory.Inventory], tmp_path: Path, name: str, kind: str) -> None:
    """A hostile image: nothing outside the image is read, and nothing blocks."""
    etc = tmp_path / "rootfs/etc"
    etc.mkdir(parents=True)
    (tmp_path / "outside").write_text("app:x:4242:4242:\n")
    (etc / "passwd").write_text(PASSWD)
    path = etc / name
    path.unlink(missing_ok=True)
    if kind == "link out":
        path.symlink_to(tmp_path / "outside")
    elif kind == "dots":
        path.symlink_to("../../outside")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 30)
    base = {**copy.deepcopy(BASE), "annotations": {P + "user": "app:app"}, "root": {"path": str(tmp_path / "rootfs")}}
    with pytest.raises(HostError, match=f"user: the (user|group) 'app' cannot be looked up: the image's /etc/{name}: "):
        engine.plan(base, at[1])


def test_a_link_within_the_image_is_followed(at: tuple[Node, inventory.Inventory], tmp_path: Path) -> None:
    (tmp_path / "rootfs/etc").mkdir(parents=True)
    (tmp_path / "rootfs/run").mkdir()
    (tmp_path / "rootfs/run/accounts").write_text("app:x:12:13::/:\n")
    (tmp_path / "rootfs/etc/passwd").symlink_to("/run/accounts")
    base = {**copy.deepcopy(BASE), "annotations": {P + "user": "app"}, "root": {"path": str(tmp_path / "rootfs")}}
    plan = engine.plan(base, at[1])
    assert plan is not None and engine.equip(base, plan.edits, False)["process"]["user"] == {
        "uid": 12,
        "gid": 13,
        "additionalGids": [7],
    }


def test_the_node_of_a_gpu_is_refused_under_devices(
    at: tuple[Node, inventory.Inventory], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shim.host import device_nodes

    look = device_nodes.lstat_device
    monkeypatch.setattr(
        device_nodes, "lstat_device", lambda path: ("c", 195, 1, 0o666) if path == "/dev/nvidia1" else look(path)
    )
    with pytest.raises(
        RequestError, match="devices: /dev/nvidia1 belongs to nvidia.com/gpu=1; ask for it in resources.gpu"
    ):
        equipped(at, {"devices": ["/dev/nvidia1"]})


def test_annotations_of_single_values_in_normal_form(at: tuple[Node, inventory.Inventory]) -> None:
    node, compiled = at
    values = {
        "capabilities": "NET_ADMIN, chown",
        "cap_drop": "KILL",
        "privileged": "false",
        "user": "1:2",
        "hostname": "x",
        "extra_groups": "1,2",
        "read_only_root_fs": "true",
        "command.args": "a, b",
        "command.workdir": "/w",
        "sysctls.net.core.somaxconn": "5",
        "ulimits.nofile": "1:2",
        "resources.hugepages.2Mi": "1Mi",
        "resources.oom_score_adj": "7",
        "devices": "/dev/null,/dev/zero",
        "storage": '[{"type": "tmpfs", "target": "/t"}]',
        "cgroup_parent": "/p",
        "host_network": "false",
    }
    base = {**copy.deepcopy(BASE), "annotations": {P + key: value for key, value in values.items()}}
    plan = engine.plan(base, compiled, call_facts={"bundle": str(node.directory / "bundle")})
    assert plan is not None
    assert plan.request.document == {
        "capabilities": ["CAP_NET_ADMIN", "CAP_CHOWN"],
        "cap_drop": ["CAP_KILL"],
        "privileged": False,
        "user": "1:2",
        "hostname": "x",
        "extra_groups": [1, 2],
        "read_only_root_fs": True,
        "command": {"args": ["a", "b"], "workdir": "/w"},
        "sysctls": {"net.core.somaxconn": "5"},
        "ulimits": {"nofile": {"soft": 1, "hard": 2}},
        "resources": {"hugepages": {"2MB": MI}, "oom_score_adj": 7},
        "devices": [{"path": path, "read": True, "write": True, "mknod": False} for path in ("/dev/null", "/dev/zero")],
        "storage": [{"type": "tmpfs", "target": "/t"}],
        "cgroup_parent": "/p",
        "host_network": False,
    }


def test_the_names_of_capabilities_are_the_kernels() -> None:
    assert (
        len(CAPABILITIES) == 41
        and CAPABILITIES.index("CAP_SYS_ADMIN") == 21
        and CAPABILITIES.index("CAP_CHECKPOINT_RESTORE") == 40
    )
