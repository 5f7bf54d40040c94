"""The hostile corpus: every request of somebody who may write annotations is refused in one sentence, or harmless.

Harmless means three things. The parts of config.json that decide what a process may do do not change. No path of the
host is used that CDI files do not name. No device is given that the policy does not allow.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from lab.local_node import CONFIG, NVIDIA, PROCESS, Node, P, cdi, unasked

from shim.errors import ChandlerError
from shim.node import inventory

BIG = "x" * 300_000
SPEC_MOUNTS = {"/proc", "/usr/lib/libcuda.so.1"}
ALLOWED = {"/dev/nvidiactl", *(f"/dev/nvidia{number}" for number in range(8))}


def gpu(**keys: Any) -> dict[str, Any]:
    return {"resources": {"gpu": keys}}


# --- documents --------------------------------------------------------------------------------------------------

# Keys of deployment files, of config.json and of other tools, at the top level and where they would do most harm.
DANGEROUS: dict[str, Any] = {
    "privileged": True,
    "capabilities": ["CAP_SYS_ADMIN"],
    "cap_add": ["ALL"],
    "cap_drop": [],
    "host_network": True,
    "hostNetwork": True,
    "hostPID": True,
    "hostIPC": True,
    "command": ["/bin/sh"],
    "entrypoint": ["sh"],
    "args": ["sh"],
    "workdir": "/",
    "user": "root",
    "cgroup_parent": "/",
    "cgroupsPath": "/",
    "sysctls": {"kernel.core_pattern": "|/x"},
    "ulimits": {"core": -1},
    "read_only_root_fs": False,
    "extra_groups": [0],
    "devices": [{"path": "/dev/sda"}],
    "storage": [{"type": "bind", "source": "/", "target": "/host"}],
    "mounts": [{"source": "/", "destination": "/h"}],
    "volumes": ["/:/host"],
    "hooks": {"prestart": [{"path": "/bin/sh"}]},
    "seccomp": {"defaultAction": "SCMP_ACT_ALLOW"},
    "apparmor": "unconfined",
    "apparmorProfile": "unconfined",
    "selinuxLabel": "x",
    "maskedPaths": [],
    "readonlyPaths": [],
    "namespaces": [],
    "rootfsPropagation": "shared",
    "noNewPrivileges": False,
    "process": {"args": ["sh"]},
    "linux": {"namespaces": []},
    "root": {"path": "/"},
    "root.path": "/",
    "hostname": "x",
    "annotations": {"a": "b"},
    "runtime": "/tmp/evil",
    "runtimes": ["/tmp/evil"],
    "config": "/tmp/x",
    "policy": {"trust": "all"},
    "trust": "all",
    "cdi": {"spec-dirs": ["/tmp"]},
    "spec-dirs": ["/tmp"],
    "granted": "x",
    "__proto__": {},
    "__class__": {},
    "intelRdt": {},
    "personality": {},
    "timeOffsets": {},
    "ociVersion": "9",
    "unified": {"memory.max": "max"},
    "blkio_weight": 1000,
    "oom_score_adj": -1000,
    "oomScoreAdj": -1000,
    "$schema": "x",
    "include": "/etc/passwd",
    "file": "/etc/shadow",
    "env_file": "/etc/shadow",
}
RESOURCES: dict[str, Any] = {
    "devices": [{"allow": True, "access": "rwm"}],
    "unified": {"memory.max": "max"},
    "oom_score_adj": -1000,
    "blkio_weight": 1000,
    "hugepages": 5,
    "network": {},
    "rdma": {},
    "blockIO": {},
    "memory": "2Gi",
    "memory_swap": -2,
    "cpu": "-1",
    "cpuset": "0-8191;",
    "pids_limit": "max",
    "cpu_shares": 0,
    "cpu_quota": -1,
    "disableOOMKiller": True,
    "kernel": -1,
    "swappiness": 100,
}
GPU: dict[str, Any] = {
    "count": -1,
    "vendor": "../../etc",
    "devices": ["../../dev/sda"],
    "sharing": "mps",
    "mps_pipe_dir": "/",
    "mps_log_dir": "/etc",
    "time_slicing_config_path": "/etc/shadow",
    "driver": "x",
    "capabilities": ["all"],
    "path": "/dev/sda",
    "major": 8,
    "options": {},
    "model": "*",
    "distributed": {"backend": "x"},
}
DEVICES = [
    "all",
    f"{NVIDIA}=all",
    "evil.com/x=0",
    "evil.com/x=all",
    "management.nvidia.com/gpu=all",
    "/dev/sda",
    "../nvidia0",
    "nvidia.com/gpu=../0",
    "nvidia.com/gpu",
    "=",
    "==",
    "/=",
    "a/b=",
    "a/b=c=d",
    "nvidia.com/gpu=0\n",
    "nvidia.com/gpu=0\t1",
    "nvidia.com/gpu=\u0660",
    "\u00b2",
    "0;1",
    "0 1",
    "-1",
    "999999999999",
    "9" * 500,
    "GPU-0/../GPU-1",
    "*",
    "?",
    "[0-9]",
    "nvidia.com/gpu=0,nvidia.com/gpu=1",
    "\ud800",
    "none",
    "void",
    "host",
    "none/none=none",
    "NVIDIA.COM/GPU=0",
    "nvidia.com/GPU=0",
    "nvidia.com//gpu=0",
    "//nvidia.com/gpu=0",
    ".",
    "..",
]
VARIABLES = {
    "LD_PRELOAD": "/tmp/x.so",
    "LD_LIBRARY_PATH": "/tmp",
    "LD_AUDIT": "/tmp/x",
    "PATH": "/tmp",
    "PYTHONPATH": "/tmp",
    "PYTHONSTARTUP": "/x",
    "GCONV_PATH": "/tmp",
    "GLIBC_TUNABLES": "x",
    "BASH_ENV": "/x",
    "ENV": "/x",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "ROCR_VISIBLE_DEVICES": "0",
    "HIP_VISIBLE_DEVICES": "0",
    "ZE_AFFINITY_MASK": "0",
    "CUDA_MPS_PIPE_DIRECTORY": "/",
    "A=B": "c",
    "A\0B": "c",
    "A\nLD_PRELOAD": "x",
    "": "x",
    " ": "x",
    "=": "x",
    "A": "$E:AWS_SECRET",
    "B": "$S:token",
    "C": "x\0LD_PRELOAD=/x",
    "\u202e": "x",
}
# Well-formed requests for more than a caller may have whom no rule names; then requests that are wrong for every
# caller.
REACHING: list[dict[str, Any]] = [
    {"user": "0:0"},
    {"user": "root"},
    {"capabilities": ["ALL"]},
    {"capabilities": ["SYS_ADMIN"], "cap_drop": ["ALL"]},
    {"extra_groups": [0]},
    {"sysctls": {"net.ipv4.ip_forward": "1"}},
    {"ulimits": {"nofile": -1}},
    {"ulimits": {"nproc": 1 << 40}},
    {"cgroup_parent": "/"},
    {"cgroup_parent": "system.slice"},
    {"hostname": "kubernetes"},
    {"command": {"entrypoint": ["/bin/sh"], "args": ["-c", "id"]}},
    {"command": {"workdir": "/"}},
    {"devices": ["/dev/mem"]},
    {"devices": [{"path": "/dev/sda", "mknod": True}]},
    {"devices": ["/dev/nvidia0"]},
    {"host_network": True, "privileged": False},
    {"privileged": True, "cap_drop": ["ALL"]},
    *(
        {"storage": [{"type": "bind", "source": source, "target": "/h"}]}
        for source in (
            "/",
            "/etc",
            "/proc",
            "/var/run/docker.sock",
            "/run/containerd",
            "/dev",
            "/root/.ssh",
            "/etc/chandler",
        )
    ),
    *(
        {"storage": [{"type": "tmpfs", "target": target}]}
        for target in ("/etc", "/proc", "/sys/fs/cgroup", "/dev", "/usr/lib")
    ),
    {"storage": [{"type": "named", "name": "data", "target": "/d"}]},
    {"storage": [{"type": "s3", "bucket": "b", "target": "/d"}]},
    {"storage": [{"type": "anonymous", "target": "/d"}]},
    {"env": {"A": "$E:PATH"}},
    {"env": {"A": "$S:x"}},
    {"env": {"A": "fine", "B": "$S:x"}},
    {"resources": {"oom_score_adj": -999}},
    {"read_only_root_fs": False, "env": {"A": "b"}},
    {"storage": [{"type": "bind", "source": "/a/../etc", "target": "/h"}]},
    {"storage": [{"type": "bind", "source": "etc", "target": "/h"}]},
    {"storage": [{"type": "bind", "source": "/etc", "target": "/h/../proc"}]},
    {"storage": [{"type": "bind", "source": "/etc\0", "target": "/h"}]},
    {"storage": [{"type": "tmpfs", "target": "/t", "size": "1Mi,exec"}]},
    {"storage": [{"type": "tmpfs", "target": "/t", "mode": "755,suid"}]},
    {"storage": [{"type": "tmpfs", "target": "/t", "options": ["suid"]}]},
    {"storage": {"type": "tmpfs", "target": "/t"}},
    {"storage": [{"type": ["bind"]}]},
    {"storage": [5]},
    {"storage": []},
    {"sysctls": {"net.a/../../kernel.core_pattern": "x"}},
    {"sysctls": {"net.a": "1\n2"}},
    {"sysctls": {"kernel.modprobe": "/x"}},
    {"sysctls": {"net..x": "1"}},
    {"cgroup_parent": "/../x"},
    {"cgroup_parent": "a.slice:b"},
    {"cgroup_parent": "../x.slice"},
    {"hostname": "a\nb"},
    {"hostname": "x" * 65},
    {"user": "0\n"},
    {"user": "-1"},
    {"user": "4294967296"},
    {"user": "\u0660"},
    {"extra_groups": [-1]},
    {"extra_groups": [True]},
    {"devices": ["/dev/../etc/shadow"]},
    {"devices": ["/proc/self/mem"]},
    {"devices": ["/dev/fd/0"]},
    {"devices": ["/dev/"]},
    {"capabilities": ["ALL", "NO"]},
    {"cap_drop": "ALL"},
    {"ulimits": {"../x": 1}},
    {"command": {"workdir": "/proc/self/fd/7"}},
    {"command": {"args": ["a\0b"]}},
    {"command": {"args": [["a"]]}},
    gpu(distributed={"master_addr": "a b"}),
    gpu(distributed={"interface": "x\ny"}),
    gpu(distributed={"rank": 1 << 40}),
]
REFUSED_DOCUMENTS: list[Any] = [
    *REACHING,
    *({key: value} for key, value in DANGEROUS.items()),
    *({"resources": {key: value}} for key, value in RESOURCES.items()),
    *(gpu(**{key: value}) for key, value in GPU.items()),
    *(gpu(devices=[name]) for name in DEVICES),
    *({"env": {name: value}} for name, value in VARIABLES.items()),
    gpu(count=5),
    gpu(count=4096),
    gpu(count=1 << 63),
    gpu(devices=["0"] * 2),
    gpu(devices=["0", "GPU-0"]),
    gpu(devices=["0"], count=2),
    gpu(vendor="amd"),
    gpu(vendor="evil.com/x"),
    gpu(vendor=f"{NVIDIA}\t0"),
    gpu(vendor=f"{NVIDIA}\n"),
    gpu(vendor="/"),
    gpu(vendor="evil.com/x", devices=["0"]),
    gpu(devices=[str(n) for n in range(5)]),
    gpu(devices=["0"] * 5000),
    [],
    None,
    5,
    "x",
    True,
    [gpu()],
    {"resources": [gpu()]},
    {"env": ["LD_PRELOAD=x"]},
    {"env": "LD_PRELOAD=x"},
    {BIG: 1},
    {"env": {"A": BIG}},
    {"env": {BIG: "x"}},
    {"resources": {"memory": BIG}},
    {"resources": {"cpu": "9" * 5000}},
]
REFUSED_TEXTS = [
    "",
    " ",
    "{",
    "}",
    "[",
    "nul",
    "NaN",
    "{}{}",
    "{} #",
    '{"env":{}}\x00',
    "\x00",
    "\xff",
    '{"env": {"A": "1"}, "env": {"LD_PRELOAD": "x"}}',
    '{"env": {"A": "1", "\\u0041": "2"}}',
    '{"resources": {"cpu": NaN}}',
    '{"resources": {"cpu": 1e999}}',
    '{"resources": {"cpu": -Infinity}}',
    '{"resources": {"gpu": {"count": 1.0}}}',
    '{"resources": {"gpu": {"count": 1e0}}}',
    '{"resources": {"gpu": {"count": "1"}}}',
    '{"resources": {"gpu": {"count": true}}}',
    '{"resources": {"memory": 99999999999999999999999}}',
    "[" * 100_000,
    '{"a":' * 50_000,
    "a: " * 50_000,
    "!!python/object/apply:os.system ['id']",
    "!!python/object/new:os.system [id]",
    "env: !!python/name:os.system",
    "env: !include /etc/passwd",
    "env: &a [*a]",
    "a: &a [x]\nb: &b [*a,*a]\n" * 2,
    "env: {LD_PRELOAD: x}",
    "env:\n  <<: {LD_PRELOAD: x}",
    "env: {A: 1}",
    "? env\n: {LD_PRELOAD: x}",
    "%YAML 9.9\n---\nenv: {}",
    "--- !!binary aGk=",
    "env: {A: !!binary AAAA}",
    "\t- x",
    "- - - -",
    "x: |\n " + "y" * 1000,
    "'" * 1001,
    "env: {A: b",
    "env: [A=b]",
    "privileged: yes",
    "{'env': {}}",
    "// x\n{}",
    "/* */{}",
    "<env/>",
    "env=A",
    "${jndi:ldap://x}",
    "$(id)",
    "`id`",
    "x" * (256 << 10),
    "{}" + " " * (256 << 10),
]
OTHER_REFUSED: list[dict[str, Any]] = [
    # half of a surrogate pair: in a value, in a name, in lists, in annotations as they are, in YAML
    {P + "service": '{"env": {"A": "\\ud800"}}'},
    {P + "service": '{"env": {"A\\udfff": "x"}}'},
    {P + "service": '{"resources": {"gpu": {"devices": ["\\udc80"]}}}'},
    {P + "env.A": "\ud800"},
    {P + "env.A\udcff": "x"},
    {P + "service": 'env: {A: "\\ud800"}'},
    {P + "services": '{"main": {"env": {"A": "x\\ud83dy"}}}'},
    {P + "service": '{"env": {"A": "\ud83d"}}'},
    {P + "granted": "nvidia.com/gpu=0"},
    {P + "granted": "", P + "service": "{}"},
    {P: "{}"},
    {P + "Service": "{}"},
    {P + "service.": "{}", "io.kubernetes.cri.container-type": 5, "io.kubernetes.cri.container-name": None},
    {P + "services": "[]"},
    {P + "services": '{"main": {"privileged": true}}'},
    {P + "services": '{"main": {}}', P + "service.main": "{}"},
    {P + "service.main": "privileged: true"},
    {P + "service": 5},
    {P + "service": None},
    {P + "service": {"env": {}}},
    {P + "service": ["{}"]},
    {P + "privileged": "true"},
    {P + "process.args": "sh"},
    {P + "env.LD_PRELOAD": "/x"},
    {P + "env.PATH": "/x"},
    {P + "env": "LD_PRELOAD=/x"},
    {P + "env.": "x"},
    {P + "resources.gpu.devices": "all"},
    {P + "resources.gpu.devices": "0,0"},
    {P + "resources.gpu.devices": ",".join(map(str, range(5)))},
    {P + "resources.gpu.count": "99"},
    {P + "resources.gpu.count": "\u0661"},
    {P + "resources.gpu.count": "\u00b2"},
    {P + "resources.gpu.count": "0x1"},
    {P + "resources.pids_limit": "max"},
    {P + "resources.memory": "1e99"},
    {P + "resources.memory": "2Gi"},
    {P + "resources.cpuset": "\u00b2"},
    {P + "resources.cpuset": "0-99999999999"},
    {P + "service": "{}", P + "services": "{"},
    {P + "\ud800": "x"},
    {P + "service\n": "{}"},
    {P + "../service": "{}"},
    {P + "service": '{"env": {"A": "1"}}', P + "env.A": "2"},
    {P + "x" * 300_000: "{}"},
    {f"{P}{n}": "x" for n in range(1000)},
    {P + "service": gpu()},
    {P + "granted/": "x"},
    {P + "resources": "{}"},
    {P + "resources.gpu": "{}"},
]
# Allowed requests that must do no more than they say.
HARMLESS: list[dict[str, Any]] = [
    {P + "service": "{}"},
    {P + "service": '{"env": {}}'},
    {P + "service": '{"resources": {"gpu": {}}}'},
    {P + "service": json.dumps(gpu(count=4))},
    {P + "service": json.dumps(gpu(devices=["GPU-3", "0"]))},
    {P + "service": json.dumps({"env": {"A": "\\u0000\nLD_PRELOAD=/x", "ld_preload": "/x"}})},
    {P + "service": '{"env": {"HOME": "/proc/self/fd/7"}}'},
    {P + "service": json.dumps({"env": {f"V{n}": "x" * 100 for n in range(500)}})},
    {P + "service": json.dumps({"env": {"args": "sh", "__proto__": "x"}})},
    {P + "env.A.B.C": "LD_PRELOAD=x"},
    {P + "service": '{"resources": {"memory": 1, "cpu": "1n", "pids_limit": 1, "cpu_shares": 2}}'},
    {P + "services": '{"other": {"privileged": true}}'},
    {P + "service.other": "{"},
    {"other/" + "x": BIG},
    {"chandler.ocix/service": '{"privileged": true}'},
    {"chandler.oci": '{"privileged": true}'},
    {"Chandler.oci/service": "{"},
    {"x" + P + "service": "{"},
    {"cdi.k8s.io/evil": "evil.com/x=all"},
    {P + "service": "\ufeff{}"},
    {P + "service": "env: {1: x}"},
    {P + "service": '{"resources": {"memory_swap": -1, "cpuset": "0-8191"}}'},
    {P + "service": "{", "io.kubernetes.cri.container-type": "sandbox"},
    {"org.systemd.property.ExecStart": "sh"},
    {"run.oci.hooks.stderr": "/etc/x", P + "service": "{}"},
]


def annotated(document: Any) -> dict[str, Any]:
    return {P + "service": json.dumps(document)}


REFUSED = [*map(annotated, REFUSED_DOCUMENTS), *({P + "service": text} for text in REFUSED_TEXTS), *OTHER_REFUSED]


@pytest.fixture
def node(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(tmp_path, monkeypatch)
    made.spec("evil.json", cdi(2, "evil.com/x"))
    made.later()
    return made


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One node for all tests, because nothing here changes it."""
    monkeypatch = pytest.MonkeyPatch()
    made = Node(tmp_path_factory.mktemp("node"), monkeypatch)
    made.spec("evil.json", cdi(2, "evil.com/x"))
    try:
        yield made, made.compiled()
    finally:
        monkeypatch.undo()


def short(value: Any) -> str:
    return ascii(value)[:60]


def check_harmless(before: dict[str, Any], after: dict[str, Any] | None) -> None:
    if after is None:
        return
    json.dumps(after)
    assert unasked(after) == unasked(before)
    assert {mount["destination"] for mount in after["mounts"]} <= SPEC_MOUNTS
    assert all(
        hook["path"] == "/bin/true" and hook["env"] for hooks in after.get("hooks", {}).values() for hook in hooks
    )
    assert {device["path"] for device in after["linux"].get("devices", [])} <= ALLOWED
    assert all(rule.get("major") == 195 for rule in after["linux"]["resources"]["devices"] if rule["allow"])
    assert after["process"]["user"]["uid"] == before["process"]["user"]["uid"]
    variables = [entry for entry in after["process"]["env"] if entry not in before["process"]["env"]]
    assert not [
        entry
        for entry in variables
        if entry.startswith(("LD_", "PYTHON", "PATH=", "GCONV_PATH", "GLIBC_TUNABLES", "BASH_ENV", "ENV="))
    ]
    kept = {
        key: value for key, value in after["annotations"].items() if key not in (*before["annotations"], P + "granted")
    }
    assert all(
        key.startswith(
            (
                "chandler.oci",
                "other/",
                "chandler.ocix/",
                "Chandler.oci/",
                "x" + P,
                "cdi.k8s.io/",
                "org.systemd",
                "run.oci",
                "io.kubernetes",
            )
        )
        for key in kept
    ), "no annotation with a known prefix may be added"


def test_the_corpus_is_large() -> None:
    assert len(REFUSED) + len(HARMLESS) > 250


@pytest.mark.parametrize("annotations", REFUSED, ids=short)
def test_hostile_requests_are_refused_in_one_sentence(
    at: tuple[Node, inventory.Inventory], annotations: dict[str, Any]
) -> None:
    node, compiled = at
    with pytest.raises(ChandlerError) as caught:
        node.equip(annotations, at=compiled)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700_000
    assert "annotation" in str(caught.value)


@pytest.mark.parametrize(
    "document",
    REACHING[REACHING.index({"storage": [{"type": "bind", "source": "/a/../etc", "target": "/h"}]}) :],
    ids=short,
)
def test_invalid_requests_are_refused_for_every_caller(
    at: tuple[Node, inventory.Inventory], document: dict[str, Any]
) -> None:
    node, compiled = at
    trusting = inventory.Inventory(
        {**compiled.config, "policy.trust": "all"}, "", lambda name: b"", compiled.explain_missing, False
    )
    with pytest.raises(ChandlerError) as caught:
        node.equip(annotated(document), at=trusting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("annotations", HARMLESS, ids=short)
def test_allowed_requests_are_harmless(at: tuple[Node, inventory.Inventory], annotations: dict[str, Any]) -> None:
    node, compiled = at
    check_harmless(CONFIG, node.equip(annotations, at=compiled))


# --- what the engine wrote ---------------------------------------------------------------------------------------

ODD: list[Any] = [
    None,
    True,
    5,
    -1,
    "x",
    "\u00b2",
    [],
    [None],
    [5],
    [[]],
    [{}],
    {},
    {"x": [1]},
    [{"path": ["/x"]}],
    [{"destination": {}}],
    [{"type": 5}],
]
PLACES = [
    ("process", "env"),
    ("process", "user"),
    ("process", "user", "uid"),
    ("process", "user", "additionalGids"),
    ("process",),
    ("linux",),
    ("linux", "devices"),
    ("linux", "resources"),
    ("linux", "resources", "devices"),
    ("linux", "resources", "memory"),
    ("linux", "resources", "memory", "limit"),
    ("linux", "resources", "memory", "swap"),
    ("linux", "resources", "cpu"),
    ("linux", "resources", "cpu", "quota"),
    ("linux", "resources", "cpu", "period"),
    ("linux", "resources", "cpu", "cpus"),
    ("linux", "resources", "pids"),
    ("linux", "resources", "unified"),
    ("linux", "namespaces"),
    ("mounts",),
    ("hooks",),
    ("hooks", "createContainer"),
    ("annotations",),
    ("annotations", "io.kubernetes.cri.container-type"),
    ("annotations", "io.kubernetes.cri.container-name"),
]
EVERYTHING = annotated(
    {
        "env": {"A": "b"},
        "resources": {
            "gpu": {"count": 2},
            "memory": "1Mi",
            "cpu": 1,
            "cpuset": "0",
            "pids_limit": 5,
            "cpu_shares": 5,
            "memory_reservation": 1,
        },
    }
)


@pytest.mark.parametrize("member", PLACES, ids=".".join)
def test_odd_shapes_of_config_json(at: tuple[Node, inventory.Inventory], member: tuple[str, ...]) -> None:
    """A result or one sentence, never a traceback. Whatever was not asked for does not change."""
    node, compiled = at
    for odd in ODD:
        config: Any = json.loads(json.dumps(CONFIG))
        config["linux"]["resources"]["cpu"] = {"quota": 100000}
        inner = config
        for key in member[:-1]:
            inner = inner.setdefault(key, {})
        inner[member[-1]] = odd
        if member == ("annotations",) and not isinstance(odd, dict):
            continue
        try:
            result = node.equip(EVERYTHING, config, compiled)
        except ChandlerError as error:
            assert "\n" not in str(error)
        else:
            assert (
                result is None or type(odd) is not dict and member == ("linux",) or unasked(result) == unasked(config)
            )


def test_cdi_edits_reach_no_more_than_the_cdi_file_says(node: Node) -> None:
    result = node.equip(EVERYTHING)
    check_harmless(CONFIG, result)
    assert result is not None
    assert [device["path"] for device in result["linux"]["devices"]] == [
        "/dev/nvidiactl",
        "/dev/nvidia0",
        "/dev/nvidia1",
    ]
    assert result["process"]["args"] == PROCESS["args"]


# --- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "[",
        "policy = 5",
        "[policy]\ntrust = true",
        '[policy]\nallow = "all"',
        '[policy]\nallow = ["*"]',
        '[policy]\ndeny = ["nothing"]',
        "[policy]\nmax-gpus = -1",
        "[policy]\nmax-gpus = 1e3",
        'annotation-prefix = ""',
        'annotation-prefix = "/"',
        "runtimes = []",
        'runtimes = ["../runc"]',
        'state-dir = "x"',
        "[[policy.rule]]\nname = 5",
        "a = " + "[" * 500,
        "\x00",
        "privileged = true",
        '[policy]\nallow = ["gpu"]\n[policy]\nallow = ["env"]',
        '[log]\nfile = "x"',
        '[gpu]\nfallback = "on"',
    ],
)
def test_a_wrong_configuration_grants_nothing(node: Node, text: str) -> None:
    node.put("etc/config.toml", text)
    with pytest.raises(ChandlerError) as caught:
        node.equip(annotated(gpu()))
    assert "etc/config.toml" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "x: &a [*a]",
        "\x00",
        '{"cdiVersion": "0.6.0"}',
        '{"cdiVersion": "9.0.0", "kind": "nvidia.com/gpu", "devices": []}',
        "a: " + "[" * 5000,
    ],
)
def test_a_damaged_cdi_file_grants_nothing_of_its_own(node: Node, content: str) -> None:
    node.spec("zz.json", content)
    check_harmless(CONFIG, node.equip(annotated(gpu(count=2))))
    with pytest.raises(ChandlerError, match="zz.json"):
        node.equip(annotated(gpu(vendor="amd")))
