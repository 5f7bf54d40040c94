"""Edits as adjustments: what each runtime is told, and what is refused because it would be dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from lab.peer import Peer, container, pod
from lab.served import NVIDIA, service_of, spec

from shim.nri.adjust import CDI_NAMES, Runtime
from shim.ttrpc import errors
from shim.ttrpc.errors import RemoteError

Connect = Callable[..., Peer]
OLD, NEW = "1.7.24~ds1", "2.1.9+unknown"


def ask(**document: Any) -> dict[str, str]:
    return {"chandler.oci/service": json.dumps(document)}


def gpus(count: int = 2) -> dict[str, Any]:
    return {"gpu": {"count": count}}


def env(adjustment: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in adjustment.env}


def refused(peer: Peer, annotations: dict[str, str], made: Any = None) -> RemoteError:
    with pytest.raises(RemoteError) as error:
        peer.create(pod(annotations), made or container())
    assert error.value.message.startswith("chandler: ") and "\n" not in error.value.message
    return error.value


@pytest.mark.parametrize(
    "name, version, by_name",
    [
        ("containerd", "1.7.24~ds1", False),
        ("containerd", "v1.7.0", False),
        ("containerd", "2.0.0", True),
        ("containerd", "2.1.9+unknown", True),
        ("containerd", "v2.2.0-beta.1", True),
        ("containerd", "10.0", True),
        ("containerd", "", False),
        ("containerd", "unknown", False),
        ("cri-o", "1.34.0", False),
        ("something", "9.9", False),
        ("", "", False),
    ],
)
def test_features_of_a_runtimes_version(name: str, version: str, by_name: bool) -> None:
    takes = Runtime(name, version).takes
    assert (CDI_NAMES in takes, ("pids", "limit") in takes) == (by_name, by_name)
    assert ("memory", "limit") in takes and ("memory", "reservation") not in takes


def test_an_older_runtime_gets_every_device_node(peer: Connect) -> None:
    made = peer(OLD).create(pod(ask(resources=gpus(), env={"A": "b"})), container())
    assert not made.CDI_devices
    assert [(d.path, d.type, d.major, d.minor, d.file_mode.value) for d in made.linux.devices] == [
        ("/dev/nvidiactl", "c", 195, 255, 0o666),
        ("/dev/nvidia0", "c", 195, 0, 0o666),
        ("/dev/nvidia1", "c", 195, 1, 0o666),
    ]
    assert env(made) == {"A": "b", "NVIDIA_VISIBLE_DEVICES": "void", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert dict(made.annotations) == {"chandler.oci/granted": f"{NVIDIA}=0,{NVIDIA}=1"}


def test_a_newer_runtime_gets_cdi_names_and_the_other_edits(peer: Connect) -> None:
    made = peer(NEW).create(pod(ask(resources=gpus(), env={"A": "b"})), container())
    assert [device.name for device in made.CDI_devices] == [f"{NVIDIA}=0", f"{NVIDIA}=1"]
    assert not made.linux.devices and not made.mounts
    (release,) = made.hooks.poststop
    assert release.args[:2] == ["chandler-hook", "release"] and list(release.env) == [
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
    ]
    assert env(made) == {"A": "b", "CUDA_VISIBLE_DEVICES": "0,1"}


def test_variables_of_the_cdi_file_are_not_set_again(peer: Connect) -> None:
    text = spec({"env": ["MODE=of-the-file"]})
    assert "MODE" not in env(peer(NEW, text).create(pod(ask(resources=gpus(), env={"MODE": "mine"})), container()))
    assert (
        env(peer(OLD, text).create(pod(ask(resources=gpus(), env={"MODE": "mine"})), container(id="container-2")))[
            "MODE"
        ]
        == "of-the-file"
    )


def test_mounts_and_hooks_of_a_cdi_file(peer: Connect) -> None:
    text = spec(
        {
            "mounts": [{"hostPath": "/etc", "containerPath": "/driver", "options": ["ro", "rbind"]}],
            "hooks": [
                {
                    "hookName": "createContainer",
                    "path": "/bin/true",
                    "args": ["true", "x"],
                    "env": ["A=b"],
                    "timeout": 3,
                },
                {"hookName": "poststop", "path": "/bin/true"},
            ],
        }
    )
    made = peer(OLD, text).create(pod(ask(resources=gpus(1))), container())
    (mount,) = made.mounts
    assert (mount.destination, mount.source, list(mount.options)) == ("/driver", "/etc", ["ro", "rbind"])
    (hook,), (last, _) = made.hooks.create_container, made.hooks.poststop
    assert (hook.path, list(hook.args), list(hook.env), hook.timeout.value) == ("/bin/true", ["true", "x"], ["A=b"], 3)
    assert not last.HasField("timeout")


def in_user_namespace(source: str = "/dev/zero", path: str = "/dev/zero") -> tuple[bytes, Any]:
    """A CDI file of one device, and a container."""
    made = container()
    made.linux.namespaces.add(type="user")
    edits = {
        "deviceNodes": [{"path": path, "hostPath": source}],
        "mounts": [{"hostPath": "/etc", "containerPath": "/driver", "options": ["ro", "rbind"]}],
    }
    return json.dumps(
        {"cdiVersion": "0.8.0", "kind": NVIDIA, "devices": [{"name": "0", "containerEdits": edits}]}
    ).encode(), made


def test_bind_mounts_are_idmapped_in_a_user_namespace(peer: Connect) -> None:
    text, made = in_user_namespace()
    told = peer(OLD, text).create(pod(ask(resources=gpus(1))), made)
    assert "ridmap" in told.mounts[0].options and [device.path for device in told.linux.devices] == ["/dev/zero"]


@pytest.mark.parametrize("version", [OLD, NEW])
def test_a_device_with_another_number_in_a_user_namespace_is_refused(peer: Connect, version: str) -> None:
    text, made = in_user_namespace(path="/dev/nvidia0")
    message = refused(peer(version, text), ask(resources=gpus(1)), made).message
    assert "/dev/nvidia0, in a user namespace, is the host's /dev/zero" in message and "runtimeClassName" in message


def test_a_node_gets_the_containers_user_where_the_runtime_names_it(peer: Connect) -> None:
    made = container()
    made.user.uid, made.user.gid = 1000, 0
    (_, device) = peer(OLD).create(pod(ask(resources=gpus(1))), made).linux.devices
    assert device.uid.value == 1000 and not device.HasField("gid")


LIMITS = {"cpu": "1.5", "cpu_shares": 512, "cpuset": "0-1", "memory": "64Mi"}


def test_limits(peer: Connect) -> None:
    resources = peer(OLD).create(pod(ask(resources=LIMITS)), container()).linux.resources
    assert (resources.cpu.quota.value, resources.cpu.period.value, resources.cpu.shares.value, resources.cpu.cpus) == (
        150000,
        100000,
        512,
        "0-1",
    )
    assert resources.memory.limit.value == 64 << 20
    assert peer(NEW).create(pod(ask(resources={"pids_limit": 7})), container()).linux.resources.pids.limit == 7


def test_a_limit_is_checked_against_what_the_engine_has_set(peer: Connect) -> None:
    made = container()
    made.linux.resources.memory.limit.value = 32 << 20
    error = refused(peer(OLD), ask(resources={"memory": "64Mi"}), made)
    assert "loosens" in error.message and error.code == errors.PERMISSION_DENIED
    made.linux.resources.memory.swap.value = 32 << 20
    assert peer(OLD).create(pod(ask(resources={"memory": "16Mi"})), made).linux.resources.memory.limit.value == 16 << 20


REFUSED = {
    "pids on an older runtime": (OLD, {"resources": {"pids_limit": 7}}, None, "resources.pids_limit"),
    "reservation": (NEW, {"resources": {"memory_reservation": "1Mi"}}, None, "resources.memory_reservation"),
    "swap beyond memory": (NEW, {"resources": {"memory": "1Mi", "memory_swap": "2Mi"}}, None, "resources.memory_swap"),
    "swap alone": (NEW, {"resources": {"memory_swap": "2Mi"}}, None, "resources.memory_swap"),
    "a name that would take a variable out": (NEW, {"env": {"-HOME": ""}}, None, "env.-HOME"),
    "groups on an older runtime": (OLD, {"resources": gpus(1)}, spec({"additionalGids": [44]}), "additionalGid 44"),
    "read-only devices on an older runtime": (OLD, {"resources": gpus(1)}, spec(permissions="r"), "/dev/nvidia0"),
}


@pytest.mark.parametrize("version, document, text, words", REFUSED.values(), ids=REFUSED)
def test_edits_that_nri_cannot_express_are_refused_with_a_remedy(
    peer: Connect, version: str, document: Any, text: bytes | None, words: str
) -> None:
    connected = peer(version, text)
    message = refused(connected, ask(**document)).message
    assert words in message and version in message and "runtimeClassName" in message
    assert not service_of(connected).records()


def test_edits_that_cdi_names_cover_are_not_refused_on_a_newer_runtime(peer: Connect) -> None:
    assert (
        peer(NEW, spec({"additionalGids": [44]}, permissions="r"))
        .create(pod(ask(resources=gpus(1))), container())
        .CDI_devices[0]
        .name
        == f"{NVIDIA}=0"
    )


def test_swap_equal_to_memory_is_left_to_the_runtime(peer: Connect) -> None:
    assert (
        peer(OLD)
        .create(pod(ask(resources={"memory": "1Mi", "memory_swap": "1Mi"})), container())
        .linux.resources.memory.limit.value
        == 1 << 20
    )


@pytest.mark.parametrize(
    "document, what",
    [
        ({"command": {"args": ["x"]}}, "process args"),
        ({"user": "5"}, "user uid"),
        ({"capabilities": ["CHOWN"]}, "capability bounding"),
        ({"read_only_root_fs": True}, "root readonly"),
        ({"ulimits": {"nofile": 1}}, "another RLIMIT_NOFILE than the engine's"),
        ({"resources": {"hugepages": {"2Mi": 1}}}, "hugepages 2MB"),
        ({"resources": {"blkio_weight": 10}}, "resources.blockIO.weight"),
        ({"extra_groups": [5]}, "additionalGid 5"),
        ({"host_network": True}, "namespace network"),
        ({"privileged": True}, "capability bounding"),
    ],
)
@pytest.mark.parametrize("version", [OLD, NEW])
def test_keys_that_nri_cannot_carry_are_refused_by_name(
    peer: Connect, version: str, document: dict[str, Any], what: str
) -> None:
    made = container()
    made.rlimits.add(type="RLIMIT_NOFILE", soft=5, hard=5)
    message = refused(peer(version, policy__trust="all"), ask(**document), made).message
    assert f"cannot be told {what} through NRI" in message and "runtimeClassName" in message


def test_keys_that_nri_can_carry(peer: Connect) -> None:
    made = peer(OLD, policy__trust="all").create(pod(ask(devices=["/dev/null"])), container())
    assert [device.path for device in made.linux.devices] == ["/dev/null"]


def test_storage_needs_the_runtime_handler(peer: Connect) -> None:
    """Only there the root file system can be seen, and with it where a link of the image leads a target."""
    message = refused(peer(OLD, policy__trust="all"), ask(storage=[{"type": "tmpfs", "target": "/t"}])).message
    assert "/t cannot be resolved in the image" in message and "runtimeClassName" in message


@pytest.mark.parametrize("version", [OLD, NEW])
def test_rlimits_and_control_groups(peer: Connect, version: str) -> None:
    made = peer(version, policy__trust="all").create(
        pod(ask(ulimits={"nofile": "5:7", "core": -1}, cgroup_parent="/batch")), container()
    )
    assert [(limit.type, limit.soft, limit.hard) for limit in made.rlimits] == [
        ("RLIMIT_NOFILE", 5, 7),
        ("RLIMIT_CORE", 2**64 - 1, 2**64 - 1),
    ]
    assert made.linux.cgroups_path == "/batch/container-1"


def test_oom_score_adj(peer: Connect) -> None:
    """A newer runtime can be told; what the engine has set counts for both."""
    made = container()
    made.linux.oom_score_adj.value = 500
    assert peer(NEW).create(pod(ask(resources={"oom_score_adj": 600})), made).linux.oom_score_adj.value == 600
    assert (
        "cannot be told process oomScoreAdj" in refused(peer(OLD), ask(resources={"oom_score_adj": 600}), made).message
    )
    assert "loosens" in refused(peer(NEW), ask(resources={"oom_score_adj": 400}), made).message


@pytest.mark.parametrize(
    "match, given",
    [
        ({"namespace": ["def*"]}, True),
        ({"pod": ["trainer-0"], "container": ["main"]}, True),
        ({"namespace": ["other"]}, False),
        ({"image": ["*"]}, False),
    ],
)
def test_rules_match_the_identity_that_the_runtime_reports(peer: Connect, match: dict[str, Any], given: bool) -> None:
    rule = {"name": "r", "match": match, "policy.allow": ["ulimits"]}
    asked = pod(ask(ulimits={"core": 0}))
    if given:
        assert peer(policy__rule=[rule]).create(asked, container()).rlimits
    else:
        assert "ulimits is not allowed" in refused(peer(policy__rule=[rule]), ask(ulimits={"core": 0})).message


@pytest.mark.parametrize(
    ("rule", "opens"),
    [
        ({"allow": True, "access": "rwm"}, True),
        ({"allow": True, "type": "c", "major": 195, "access": "rwm"}, True),
        ({"allow": True, "type": "c", "major": 195, "minor": 5, "access": "r"}, True),
        ({"allow": True, "type": "c", "access": "m"}, False),
        ({"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}, False),
        ({"allow": False, "access": "rwm"}, False),
    ],
)
def test_a_device_rule_of_the_runtime_opens_no_other_gpu(peer: Connect, rule: dict[str, Any], opens: bool) -> None:
    made = container()
    told = made.linux.resources.devices.add(allow=rule["allow"], type=rule.get("type", ""), access=rule["access"])
    for key in ("major", "minor"):
        if key in rule:
            getattr(told, key).value = rule[key]
    if opens:
        assert "opens nvidia.com/gpu=" in refused(peer(NEW), ask(resources=gpus()), made).message
    else:
        assert peer(NEW).create(pod(ask(resources=gpus())), made).CDI_devices


@pytest.mark.parametrize("mark", ["checkpointedAt", "restored", "io.kubernetes.cri-o.annotations.checkpoint.name"])
def test_the_annotations_of_a_restored_container_are_no_request(peer: Connect, mark: str) -> None:
    """Its annotations are those of a checkpoint, which may be an image."""
    made = container()
    made.annotations[mark] = "true"
    assert "a restore takes it from the checkpoint" in refused(peer(NEW), ask(resources=gpus()), made).message
    peer(NEW).create(pod({}), made)  # one that asks for nothing starts
