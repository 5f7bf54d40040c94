"""The node's policy: what it allows, what it refuses, and that a request never loosens a limit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.errors import BundleError, ChandlerError, PolicyError
from shim.jsontext import Number
from shim.keys import common
from shim.node.config import KEYS
from shim.oci import reader, writer
from shim.policy import permission
from shim.request import schema
from shim.request.parse import Request

DEFAULTS = {key: default for key, (_, _, default) in KEYS.items()}


def config(**more: Any) -> Any:
    return {**DEFAULTS, **{"policy." + key.replace("_", "-"): value for key, value in more.items()}}


def request_of(document: dict[str, Any]) -> Request:
    return Request(schema.check(document), "annotation a")


def gpu(**keys: Any) -> dict[str, Any]:
    return {"resources": {"gpu": keys}}


def limits(**keys: Any) -> dict[str, Any]:
    """A config.json with limits, each as controller_key."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        controller, _, name = key.partition("_")
        found.setdefault(controller, {})[name] = value
    return {"linux": {"resources": found}}


def refused(
    document: dict[str, Any], by: Any, engine: dict[str, Any] | None = None, names: tuple[str, ...] = ()
) -> str:
    with pytest.raises(PolicyError) as caught:
        permission.check(request_of(document), engine or {}, by, names)
    assert str(caught.value).startswith("annotation a: ")
    return str(caught.value)


# --- allow and deny -------------------------------------------------------------------------------------------

ALL = gpu(devices=["all"])


@pytest.mark.parametrize(
    ("document", "more"),
    [
        ({}, {}),
        ({}, {"allow": []}),
        ({"env": {}}, {"allow": []}),
        ({"env": {"A": "b"}}, {}),
        (gpu(), {}),
        (gpu(count=2), {}),
        (gpu(devices=["0"]), {}),
        (gpu(vendor="amd"), {}),
        ({"resources": {"cpu": 1, "memory": 1, "pids_limit": 1}}, {}),
        (gpu(count=1), {"allow": ["gpu.count"]}),
        (gpu(count=1), {"allow": ["gpu.count"], "deny": ["gpu.devices", "env"]}),
        (gpu(devices=["all"]), {"allow": ["gpu", "gpu.all"]}),
        (gpu(devices=["x.com/y=all"]), {"allow": ["gpu.devices", "gpu.all", "gpu.vendor"]}),
        (gpu(devices=["nvidia.com/gpu=all"]), {"allow": ["gpu.devices", "gpu.all"]}),
        (gpu(), {"allow": ["gpu.count"]}),
        ({"resources": {"cpu": 1}}, {"allow": ["resources.cpu"]}),
        (ALL, {"trust": "all"}),
        ({"env": {"A": "b"}}, {"trust": "all", "allow": []}),
        (gpu(devices=["small", "overall"]), {}),
    ],
)
def test_allowed(document: dict[str, Any], more: dict[str, Any]) -> None:
    permission.check(request_of(document), {}, config(**more))


@pytest.mark.parametrize(
    ("document", "more", "key", "rule"),
    [
        ({"env": {"A": "b"}}, {"allow": ["gpu"]}, "env is not allowed", "has no 'env'"),
        (gpu(), {"allow": ["env"]}, "resources.gpu (a count of 1, the default) is not allowed", "has no 'gpu.count'"),
        (
            gpu(),
            {"allow": ["gpu.vendor"]},
            "resources.gpu (a count of 1, the default) is not allowed",
            "has no 'gpu.count'",
        ),
        (
            gpu(vendor="nvidia"),
            {"allow": ["gpu.vendor"]},
            "resources.gpu (a count of 1, the default) is not allowed",
            "has no 'gpu.count'",
        ),
        (
            gpu(sharing="mps"),
            {"allow": ["gpu.sharing"]},
            "resources.gpu (a count of 1, the default) is not allowed",
            "has no 'gpu.count'",
        ),
        (gpu(), {"deny": ["gpu.count"]}, "resources.gpu (a count of 1, the default) is refused", "'gpu.count' in deny"),
        (
            gpu(vendor="amd"),
            {"deny": ["gpu.count"], "trust": "all"},
            "resources.gpu (a count of 1, the default) is refused",
            "'gpu.count' in deny",
        ),
        (
            gpu(devices=["amd.com/gpu=0"]),
            {"deny": ["gpu.vendor"]},
            "resources.gpu.devices: amd.com/gpu=0 is refused",
            "'gpu.vendor' in deny",
        ),
        (
            gpu(devices=["0", "amd.com/gpu=0"]),
            {"allow": ["gpu.devices"]},
            "resources.gpu.devices: amd.com/gpu=0 is not allowed",
            "has no 'gpu.vendor'",
        ),
        (
            {"privileged": True},
            {"allow": ["privileged"], "deny": ["capabilities"]},
            "privileged is refused",
            "'capabilities' in deny",
        ),
        ({"privileged": True}, {"trust": "all", "deny": ["devices"]}, "privileged is refused", "'devices' in deny"),
        ({"privileged": True}, {"trust": "all", "deny": ["gpu"]}, "privileged is refused", "'gpu' in deny"),
        ({"privileged": True}, {"trust": "all", "deny": ["gpu.all"]}, "privileged is refused", "'gpu.all' in deny"),
        (gpu(count=1), {"allow": ["gpu.devices"]}, "resources.gpu.count is not allowed", "has no 'gpu.count'"),
        (gpu(count=1), {"allow": ["resources"]}, "resources.gpu.count is not allowed", "has no 'gpu.count'"),
        (gpu(vendor="amd", count=1), {"allow": ["gpu.count"]}, "resources.gpu.vendor", "has no 'gpu.vendor'"),
        (ALL, {}, 'resources.gpu.devices: "all" is not allowed', "has no 'gpu.all'"),
        (gpu(devices=["0", "nvidia.com/gpu=all"]), {}, '"all" is not allowed', "has no 'gpu.all'"),
        (ALL, {"allow": ["gpu.all"]}, "resources.gpu.devices is not allowed", "has no 'gpu.devices'"),
        (
            {"resources": {"cpu": 1}},
            {"allow": ["gpu", "env"]},
            "resources.cpu is not allowed",
            "has no 'resources.cpu'",
        ),
        (
            {"resources": {"memory_swap": 1}},
            {"allow": ["resources.memory"]},
            "resources.memory_swap is not allowed",
            "has no 'resources.memory_swap'",
        ),
        ({"env": {"A": "b"}}, {"deny": ["env"]}, "env is refused", "'env' in deny"),
        ({"env": {"A": "b"}}, {"deny": ["env"], "trust": "all"}, "env is refused", "'env' in deny"),
        (gpu(count=1), {"deny": ["gpu"]}, "resources.gpu.count is refused", "'gpu' in deny"),
        (gpu(), {"deny": ["gpu"]}, "resources.gpu (a count of 1, the default) is refused", "'gpu' in deny"),
        (gpu(devices=["0"]), {"deny": ["gpu.devices"]}, "resources.gpu.devices is refused", "'gpu.devices' in deny"),
        (ALL, {"deny": ["gpu.all"], "trust": "all"}, '"all" is refused', "'gpu.all' in deny"),
        (ALL, {"allow": ["gpu", "gpu.all"], "deny": ["gpu.all"]}, '"all" is refused', "'gpu.all' in deny"),
        (ALL, {"allow": ["gpu", "gpu.all"], "deny": ["gpu"]}, "resources.gpu.devices is refused", "'gpu' in deny"),
        ({"resources": {"cpu": 1}}, {"deny": ["resources"]}, "resources.cpu is refused", "'resources' in deny"),
    ],
)
def test_refused_with_rule_and_key(document: dict[str, Any], more: dict[str, Any], key: str, rule: str) -> None:
    words = refused(document, config(**more))
    assert key in words and rule in words


@pytest.mark.parametrize(
    ("names", "more", "words"),
    [
        (
            ("nvidia.com/gpu=0",),
            {"allow": ["env"]},
            "cdi.k8s.io is not allowed: allow of [policy] has no 'gpu.devices'",
        ),
        (("nvidia.com/gpu=0",), {"deny": ["gpu"]}, "cdi.k8s.io is refused by 'gpu'"),
        (("nvidia.com/gpu=0", "nvidia.com/gpu=all"), {}, "has no 'gpu.all'"),
    ],
)
def test_devices_of_other_annotations_need_the_same_words(
    names: tuple[str, ...], more: dict[str, Any], words: str
) -> None:
    assert words in refused({}, config(**more), names=names)


RULES = ["gpu", "gpu.all", "gpu.count", "gpu.devices", "env", "resources", "resources.cpu"]
rules = st.lists(st.sampled_from(RULES), max_size=4)
asked = st.sampled_from(
    [
        {"env": {"A": "b"}},
        gpu(),
        gpu(count=1),
        gpu(devices=["0"]),
        ALL,
        {"resources": {"cpu": 1}},
        {"resources": {"cpu": 1}, "env": {"A": "b"}},
    ]
)


def passes(document: dict[str, Any], by: Any) -> bool:
    try:
        permission.check(request_of(document), {}, by)
    except PolicyError:
        return False
    return True


@given(asked, rules, rules, st.sampled_from(RULES), st.sampled_from(["policy", "all"]))
def test_adding_to_deny_never_allows_and_adding_to_allow_never_refuses(
    document: dict[str, Any], allow: list[str], deny: list[str], more: str, trust: str
) -> None:
    before = passes(document, config(allow=allow, deny=deny, trust=trust))
    assert not passes(document, config(allow=allow, deny=[*deny, more], trust=trust)) or before
    assert passes(document, config(allow=[*allow, more], deny=deny, trust=trust)) or not before


@given(asked, rules)
def test_a_denied_word_is_refused_whatever_is_allowed(document: dict[str, Any], deny: list[str]) -> None:
    if not passes(document, config(allow=RULES, deny=deny)):
        assert not passes(document, config(allow=RULES, deny=deny, trust="all"))


# --- devices --------------------------------------------------------------------------------------------------


def test_max_gpus() -> None:
    permission.check_devices(request_of({}), ["nvidia.com/gpu=0"], 2, [], config(max_gpus=2))
    with pytest.raises(PolicyError, match="asks for 3 devices; max-gpus of .policy. is 2"):
        permission.check_devices(request_of({}), ["nvidia.com/gpu=all"], 3, [], config(max_gpus=2))
    permission.check_devices(request_of({}), ["nvidia.com/gpu=all"], 3, [], config(max_gpus=2, trust="all"))


def test_a_device_that_stands_for_all_needs_gpu_all_whatever_its_name() -> None:
    permission.check_devices(
        request_of({}), ["nvidia.com/gpu=every"], 3, ["nvidia.com/gpu=every"], config(allow=["gpu", "gpu.all"])
    )
    with pytest.raises(
        PolicyError,
        match="nvidia.com/gpu=every, which stands for every device of its kind, is not allowed: "
        "allow of .policy. has no 'gpu.all'",
    ):
        permission.check_devices(request_of({}), ["nvidia.com/gpu=every"], 3, ["nvidia.com/gpu=every"], config())
    with pytest.raises(PolicyError, match="is refused by 'gpu.all' in deny"):
        permission.check_devices(
            request_of({}), ["nvidia.com/gpu=every"], 3, ["nvidia.com/gpu=every"], config(trust="all", deny=["gpu.all"])
        )


def test_kinds() -> None:
    permission.check_devices(
        request_of({}), ["amd.com/gpu=0", "x.com/y=0"], 2, [], config(kinds=["x.com/y", "amd.com/gpu"])
    )
    for name in ("nvidia.com/gpux=0", "nvidia.com/gp=0", "x.com/y=0", "nvidia.com/gpu.x=nvidia.com/gpu"):
        with pytest.raises(PolicyError, match="kinds of .policy. has no " + name.partition("=")[0]):
            permission.check_devices(request_of({}), [name], 1, [], config())
        permission.check_devices(request_of({}), [name], 1, [], config(trust="all"))


# --- variables ------------------------------------------------------------------------------------------------

OURS = [
    "NVIDIA_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "X_VISIBLE_DEVICES",
    "_VISIBLE_DEVICES",
    "CUDA_MPS_PIPE_DIRECTORY",
    "CUDA_MPS_",
    "ZE_AFFINITY_MASK",
]
LOADER = [
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "LD_",
    "PATH",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "PYTHON",
    "GCONV_PATH",
    "GLIBC_TUNABLES",
    "BASH_ENV",
    "ENV",
]
FREE = [
    "A",
    "VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES_X",
    "XLD_PRELOAD",
    "MYPATH",
    "PATHX",
    "ld_preload",
    "OLD_X",
    "NVIDIA_DRIVER_CAPABILITIES",
    "ENVX",
    "CUDA_MP",
]


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("trust", ["policy", "all"])
def test_variables_that_chandler_sets(name: str, trust: str) -> None:
    assert f"env.{name} is set by Chandler" in refused({"env": {"A": "b", name: "x"}}, config(trust=trust))


@pytest.mark.parametrize("name", LOADER)
def test_variables_that_load_code(name: str) -> None:
    words = refused({"env": {name: "x"}}, config())
    assert f"env.{name} decides which code is loaded" in words and 'trust = "all"' in words
    permission.check(request_of({"env": {name: "x"}}), {}, config(trust="all"))


@pytest.mark.parametrize("name", FREE)
def test_other_variables(name: str) -> None:
    permission.check(request_of({"env": {name: "$E x $S: C:\\$E:"}}), {}, config())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("$E:HOME", "env.A: host-variables of [policy] has no HOME"),
        ("$S:token", "env.A: secrets of [policy] has no token"),
        ("$E:", "host-variables of [policy] has no "),
        ("$S:x y", "secrets of [policy] has no x y"),
    ],
)
def test_references_to_the_host(value: str, words: str) -> None:
    assert words in refused({"env": {"A": value}}, config())


# --- limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "engine"),
    [
        ("memory", 100, limits(memory_limit=100)),
        ("memory", 100, limits(memory_limit=-1)),
        ("memory", 100, limits(memory_limit=0)),
        ("memory", 100, {}),
        ("memory", 100, {"linux": None}),
        ("memory_swap", 100, limits(memory_swap=100)),
        ("memory_swap", -1, {}),
        ("memory_swap", -1, limits(memory_swap=-1)),
        ("memory_reservation", 5, limits(memory_reservation=5)),
        ("cpu", "2", limits(cpu_quota=200000)),
        ("cpu", "2", limits(cpu_quota=100000, cpu_period=50000)),
        ("cpu", "2", limits(cpu_quota=-1)),
        ("cpu", "500m", limits(cpu_quota=50000)),
        ("cpu_shares", 2, limits(cpu_shares=2)),
        ("cpuset", "0-1", limits(cpu_cpus="0-3")),
        ("cpuset", "1,3", limits(cpu_cpus="0-3")),
        ("cpuset", "5", limits(cpu_cpus="")),
        ("pids_limit", 5, limits(pids_limit=5)),
        ("pids_limit", -1, limits(pids_limit=-1)),
        ("pids_limit", 0, {}),
        ("pids_limit", 0, limits(pids_limit=0)),
    ],
)
def test_tightening_is_allowed(key: str, value: Any, engine: dict[str, Any]) -> None:
    permission.check(request_of({"resources": {key: value}}), engine, config())


@pytest.mark.parametrize(
    ("key", "value", "engine"),
    [
        ("memory", 101, limits(memory_limit=100)),
        ("memory_swap", 101, limits(memory_swap=100)),
        ("memory_swap", -1, limits(memory_swap=100)),
        ("memory_reservation", 6, limits(memory_reservation=5)),
        ("cpu", "2001m", limits(cpu_quota=200000)),
        ("cpu", "1", limits(cpu_quota=999, cpu_period=1000)),
        ("cpu_shares", 3, limits(cpu_shares=2)),
        ("cpuset", "0-4", limits(cpu_cpus="0-3")),
        ("cpuset", "4", limits(cpu_cpus="0")),
        ("pids_limit", 6, limits(pids_limit=5)),
        ("pids_limit", -1, limits(pids_limit=5)),
        ("pids_limit", 0, limits(pids_limit=5)),
    ],
)
@pytest.mark.parametrize("trust", ["policy", "all"])
def test_loosening_is_refused(key: str, value: Any, engine: dict[str, Any], trust: str) -> None:
    assert f"resources.{key} = " in refused({"resources": {key: value}}, config(trust=trust), engine)


UNIFIED = {
    "cpu": "cpu.max",
    "cpu_shares": "cpu.weight",
    "cpuset": "cpuset.cpus",
    "memory": "memory.max",
    "memory_swap": "memory.swap.max",
    "memory_reservation": "memory.low",
    "pids_limit": "pids.max",
}


@pytest.mark.parametrize(("key", "file"), UNIFIED.items())
def test_a_limit_that_the_engine_set_in_unified(key: str, file: str) -> None:
    value = {"cpuset": "0", "cpu_shares": 2}.get(key, 1)
    engine = {"linux": {"resources": {"unified": {file: "1"}}}}
    assert f"resources.{key}: the engine has set {file}" in refused({"resources": {key: value}}, config(), engine)


@pytest.mark.parametrize("odd", [True, "5", Number("5e0"), 1.5, [], {}])
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("memory", "memory_limit"),
        ("memory_swap", "memory_swap"),
        ("cpu", "cpu_quota"),
        ("cpu", "cpu_period"),
        ("pids_limit", "pids_limit"),
        ("cpu_shares", "cpu_shares"),
    ],
)
def test_engine_limits_of_odd_types_are_refused(key: str, name: str, odd: Any) -> None:
    engine = limits(**({"cpu_quota": 1000} if name == "cpu_period" else {}), **{name: odd})
    with pytest.raises(BundleError, match="is not a whole number"):
        permission.check(request_of({"resources": {key: 1 if key != "cpu_shares" else 2}}), engine, config())


@pytest.mark.parametrize("odd", [5, True, ["0"], {}, "x", "0-", "\u00b2"])
def test_odd_cpusets_of_the_engine_are_refused(odd: Any) -> None:
    with pytest.raises(ChandlerError):
        permission.check(request_of({"resources": {"cpuset": "0"}}), limits(cpu_cpus=odd), config())


amounts = st.integers(1, 1 << 40)
unlimited = st.one_of(st.none(), st.sampled_from([-1, 0]), amounts)
cpu_lists = st.sets(st.integers(0, 9), min_size=1).map(lambda found: ",".join(map(str, found)))
engines = st.fixed_dictionaries(
    {},
    optional={
        "cpu": st.fixed_dictionaries(
            {},
            optional={
                "quota": st.one_of(st.sampled_from([-1, 0]), st.integers(1000, 10**7)),
                "period": st.sampled_from([1000, 100000, 50000, 1000000]),
                "shares": st.integers(2, 262144),
                "cpus": cpu_lists,
            },
        ),
        "memory": st.fixed_dictionaries({}, optional={"limit": unlimited, "swap": unlimited, "reservation": unlimited}),
        "pids": st.fixed_dictionaries({}, optional={"limit": unlimited}),
    },
)
limit_requests = st.fixed_dictionaries(
    {},
    optional={
        "cpu": st.integers(1, 10**6).map(lambda value: f"{value}m"),
        "memory": amounts,
        "memory_swap": st.one_of(st.just(-1), amounts),
        "memory_reservation": amounts,
        "cpu_shares": st.integers(2, 262144),
        "cpuset": cpu_lists,
        "pids_limit": st.integers(-1, 1 << 30),
    },
)


def room(value: Any) -> float:
    """A limit as an amount; without a limit it is infinite."""
    return value if isinstance(value, int) and value > 0 else float("inf")


def share_of_cpu(config_json: dict[str, Any]) -> float:
    quota = room(reader.resource(config_json, "cpu", "quota"))
    return quota / (reader.resource(config_json, "cpu", "period") or 100000)


@given(engines, limit_requests)
def test_an_allowed_request_never_loosens_a_limit(engine: dict[str, Any], keys: dict[str, Any]) -> None:
    """Applied to the engine's limits, a request that the policy allows never raises an amount."""
    before = {"linux": {"resources": engine}}
    kept = copy.deepcopy(before)
    asked = request_of({"resources": keys})
    try:
        permission.check(asked, before, config())
    except PolicyError:
        return
    after = writer.apply(before, common.edits(asked.resources, before, "a"))
    assert before == kept
    for controller, key in (
        ("memory", "limit"),
        ("memory", "swap"),
        ("memory", "reservation"),
        ("cpu", "shares"),
        ("pids", "limit"),
    ):
        assert room(reader.resource(after, controller, key)) <= room(reader.resource(before, controller, key))
    assert share_of_cpu(after) <= share_of_cpu(before)
    old, new = reader.resource(before, "cpu", "cpus", str), reader.resource(after, "cpu", "cpus", str)
    assert not old or common.cpus(new) <= common.cpus(old)


def test_the_swap_limit_does_not_grow() -> None:
    """memory and swap together may shrink while the part that may be swapped grows; cgroup v2 limits that part."""
    engine = {"process": {}, "linux": {"resources": {"memory": {"limit": 1 << 30, "swap": 1 << 30}}}}
    for asked in ({"memory": 1 << 29, "memory_swap": 1 << 29}, {"memory": 1 << 29}, {"memory_swap": 1 << 30}):
        permission.check(Request({"resources": asked}, "annotation"), engine, config())
    with pytest.raises(PolicyError, match="memory_swap"):
        permission.check(
            Request({"resources": {"memory": 1 << 29, "memory_swap": 1 << 30}}, "annotation"), engine, config()
        )


# --- the kernel's defaults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "unified", "most"),
    [
        ("cpu_shares", False, 1024),
        ("cpu_shares", True, 1024),
        ("blkio_weight", False, 100),
        ("blkio_weight", True, 19),
        ("memory_reservation", True, 0),
    ],
)
def test_a_limit_that_the_engine_did_not_set_is_at_most_the_kernels_default(
    document: str, unified: bool, most: int
) -> None:
    more = request_of({"resources": {document: most + 1}})
    with pytest.raises(PolicyError, match=f"resources.{document} = {most + 1} gives more than the kernel's default"):
        permission.check(more, {}, config(), unified=lambda: unified)
    if most:
        permission.check(request_of({"resources": {document: most}}), {}, config(), unified=lambda: unified)
    permission.check(more, {}, config(trust="all"), unified=lambda: unified)


def test_a_reservation_is_a_limit_with_cgroup_v1() -> None:
    permission.check(request_of({"resources": {"memory_reservation": 1 << 30}}), {}, config(), unified=lambda: False)
    engine = limits(memory_reservation=1 << 30)
    permission.check(request_of({"resources": {"memory_reservation": 1 << 30}}), engine, config(), unified=lambda: True)
    with pytest.raises(PolicyError, match="loosens the engine's limit"):
        permission.check(
            request_of({"resources": {"memory_reservation": (1 << 30) + 1}}), engine, config(), unified=lambda: True
        )
