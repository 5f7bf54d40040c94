"""From a CDI file to config.json, category by category.

Source: CDI SPEC.md, "OCI Edits"; CDI Go library, pkg/cdi/container-edits.go.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cdi import spec
from shim.cdi.compile import SAFE_HOOK_ENV, compile_edits
from shim.edits import Edits, merge
from shim.errors import ChandlerError, HostError
from shim.host import device_nodes
from shim.oci import writer

HOST: dict[str, tuple[str, int, int, int] | None] = {
    "/dev/null": ("c", 1, 3, 0o666),
    "/dev/gpu": ("c", 195, 7, 0o660),
    "/dev/loop0": ("b", 7, 0, 0o640),
    "/dev/fifo": ("p", 0, 0, 0o600),
}


def lstat(path: str) -> Any:
    if path == "/dev/file":
        raise HostError("/dev/file is not a device node")
    if path not in HOST:
        raise HostError(f"{path} is not on this host")
    return HOST[path]


def edits_of(block: dict[str, Any], hook_env: Any = None) -> Edits:
    file = {"cdiVersion": "1.1.0", "kind": "v.com/c", "devices": [{"name": "d", "containerEdits": block}]}
    return Edits(spec.parse(json.dumps(file).encode(), "f", hook_env).devices["d"])


def inject(config: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    before = copy.deepcopy(config)
    edits = device_nodes.complete(edits_of(block), lstat)
    result = writer.apply(config, edits)
    assert config == before, "the input is not changed"
    assert writer.apply(result, edits) == result, "applying twice is applying once"
    return result


def user(uid: int, gid: int) -> dict[str, Any]:
    return {"process": {"user": {"uid": uid, "gid": gid}}}


ENV: dict[str, tuple[list[str], list[str], list[str]]] = {
    "appended": (["A=1"], ["B=2"], ["A=1", "B=2"]),
    "replaced in place": (["A=1", "B=1"], ["A=2"], ["A=2", "B=1"]),
    "of duplicates the last one is replaced": (["A=1", "B=1", "A=2"], ["A=3"], ["A=1", "B=1", "A=3"]),
    "a longer name is another variable": (["AB=1"], ["A=2"], ["AB=1", "A=2"]),
    "the last of two edits wins": ([], ["A=1", "B=2", "A=3"], ["A=3", "B=2"]),
    "a value may hold =": ([], ["A=b=c"], ["A=b=c"]),
    "a variable without = counts by its name": (["A", "B=1"], ["A=2"], ["A=2", "B=1"]),
}


@pytest.mark.parametrize(("before", "edits", "after"), ENV.values(), ids=ENV)
def test_env(before: list[str], edits: list[str], after: list[str]) -> None:
    assert inject({"process": {"env": before}}, {"env": edits})["process"]["env"] == after


# CDI node -> OCI device, or the error
NODES: dict[str, tuple[dict[str, Any], Any]] = {
    "valid, path alone": (
        {"path": "/dev/null"},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666},
    ),
    "valid, another host path": (
        {"path": "/dev/x", "hostPath": "/dev/gpu"},
        {"path": "/dev/x", "type": "c", "major": 195, "minor": 7, "fileMode": 0o660},
    ),
    "valid, a block device": (
        {"path": "/dev/loop0"},
        {"path": "/dev/loop0", "type": "b", "major": 7, "minor": 0, "fileMode": 0o640},
    ),
    "valid, a FIFO has no numbers": (
        {"path": "/dev/fifo"},
        {"path": "/dev/fifo", "type": "p", "major": 0, "minor": 0, "fileMode": 0o600},
    ),
    "valid, the file's mode stays": (
        {"path": "/dev/null", "fileMode": 0o600},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600},
    ),
    "valid, mode 0 is a mode": (
        {"path": "/dev/null", "fileMode": 0},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0},
    ),
    "valid, in full, and the host lacks it": (
        {"path": "/dev/gone", "type": "c", "major": 5, "minor": 6},
        {"path": "/dev/gone", "type": "c", "major": 5, "minor": 6},
    ),
    "valid, in full, the mode still comes from the host": (
        {"path": "/dev/null", "type": "c", "major": 5, "minor": 6},
        {"path": "/dev/null", "type": "c", "major": 5, "minor": 6, "fileMode": 0o666},
    ),
    "valid, in full, the type is not checked": (
        {"path": "/dev/null", "type": "b", "major": 5, "minor": 6},
        {"path": "/dev/null", "type": "b", "major": 5, "minor": 6, "fileMode": 0o666},
    ),
    "valid, in full, and a file there is no matter": (
        {"path": "/dev/file", "type": "c", "major": 5, "minor": 6},
        {"path": "/dev/file", "type": "c", "major": 5, "minor": 6},
    ),
    "valid, a FIFO that the host lacks": (
        {"path": "/dev/gone", "type": "p"},
        {"path": "/dev/gone", "type": "p", "major": 0, "minor": 0},
    ),
    "valid, type without numbers": (
        {"path": "/dev/null", "type": "c"},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666},
    ),
    "valid, with major 0 the minor comes from the host, too": (
        {"path": "/dev/null", "type": "c", "minor": 9},
        {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666},
    ),
    "valid, a major without type is kept": (
        {"path": "/dev/null", "major": 9, "minor": 8},
        {"path": "/dev/null", "type": "c", "major": 9, "minor": 8, "fileMode": 0o666},
    ),
    "invalid, the host lacks it": ({"path": "/dev/gone"}, "f v.com/c=d: /dev/gone is not on this host"),
    "invalid, type alone and the host lacks it": ({"path": "/dev/gone", "type": "c"}, "not on this host"),
    "invalid, major alone and the host lacks it": ({"path": "/dev/gone", "major": 3}, "not on this host"),
    "invalid, a regular file": ({"path": "/dev/file"}, "not a device node"),
    "invalid, another type than the host's": ({"path": "/dev/null", "type": "b"}, "of type 'c', not 'b'"),
    "invalid, the host path is what is looked at": (
        {"path": "/dev/null", "hostPath": "/dev/gone"},
        "/dev/gone is not on this host",
    ),
}


@pytest.mark.parametrize(("node", "device"), NODES.values(), ids=NODES)
def test_device_nodes(node: dict[str, Any], device: Any) -> None:
    if isinstance(device, str):
        with pytest.raises(ChandlerError, match=device):
            inject({}, {"deviceNodes": [node]})
    else:
        assert inject({}, {"deviceNodes": [node]})["linux"]["devices"] == [device]


OWNERS: dict[str, tuple[dict[str, int], tuple[int, int], dict[str, int]]] = {
    "root owns nothing in particular": ({}, (0, 0), {}),
    "the process's own ids": ({}, (1000, 1001), {"uid": 1000, "gid": 1001}),
    "only the group": ({}, (0, 5), {"gid": 5}),
    "an explicit owner stays": ({"uid": 7, "gid": 8}, (1000, 1001), {"uid": 7, "gid": 8}),
    "an explicit 0 stays": ({"uid": 0, "gid": 0}, (1000, 1001), {"uid": 0, "gid": 0}),
    "one explicit, one not": ({"uid": 0}, (1000, 1001), {"uid": 0, "gid": 1001}),
}


@pytest.mark.parametrize(("node", "ids", "owner"), OWNERS.values(), ids=OWNERS)
def test_owners(node: dict[str, int], ids: tuple[int, int], owner: dict[str, int]) -> None:
    (device,) = inject(user(*ids), {"deviceNodes": [{"path": "/dev/null", **node}]})["linux"]["devices"]
    assert {key: device[key] for key in ("uid", "gid") if key in device} == owner


RULES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "a character device": (
        {"path": "/dev/null"},
        [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
    ),
    "a block device": ({"path": "/dev/loop0"}, [{"allow": True, "type": "b", "major": 7, "minor": 0, "access": "rwm"}]),
    "a FIFO has no rule": ({"path": "/dev/fifo"}, []),
    "an unbuffered device has no rule": ({"path": "/dev/x", "type": "u", "major": 1, "minor": 1}, []),
    "permissions as written": (
        {"path": "/dev/null", "permissions": "mr"},
        [{"allow": True, "type": "c", "major": 1, "minor": 3, "access": "mr"}],
    ),
    "none is an empty access": (
        {"path": "/dev/null", "permissions": "none"},
        [{"allow": True, "type": "c", "major": 1, "minor": 3}],
    ),
}


@pytest.mark.parametrize(("node", "rules"), RULES.values(), ids=RULES)
def test_cgroup_rules(node: dict[str, Any], rules: list[dict[str, Any]]) -> None:
    deny = {"allow": False, "access": "rwm"}
    config = {"linux": {"resources": {"devices": [deny]}}}
    assert inject(config, {"deviceNodes": [node]})["linux"]["resources"]["devices"] == [deny, *rules]


DEVICE_ORDERS: dict[str, tuple[list[str], list[str]]] = {
    "appended": (["a"], ["a", "null"]),
    "one of that path is removed first": (["null", "a"], ["a", "null"]),
    "of two the first is removed, the second overwritten": (["null", "a", "null", "b"], ["a", "null", "b"]),
}


@pytest.mark.parametrize(("before", "after"), DEVICE_ORDERS.values(), ids=DEVICE_ORDERS)
def test_the_order_of_devices(before: list[str], after: list[str]) -> None:
    config = {"linux": {"devices": [{"path": f"/dev/{name}", "type": "c", "major": 99, "minor": 1} for name in before]}}
    edits = device_nodes.complete(edits_of({"deviceNodes": [{"path": "/dev/null"}]}), lstat)
    devices = writer.apply(config, edits)["linux"]["devices"]
    assert [device["path"] for device in devices] == [f"/dev/{name}" for name in after]
    assert all(device["major"] == 1 for device in devices if device["path"] == "/dev/null")


def mounts(*destinations: str, source: str = "/s") -> list[dict[str, Any]]:
    return [{"containerPath": destination, "hostPath": source} for destination in destinations]


MOUNTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "appended": (["/a"], ["/b"], ["/a", "/b"]),
    "the same destination is replaced where it is": (["/a", "/b"], ["/a"], ["/a", "/b"]),
    "the engine's keep their order": (["/a/b/c", "/a"], ["/x/y"], ["/a/b/c", "/a", "/x/y"]),
    "/ comes before all": (["/z"], ["/"], ["/", "/z"]),
    "one place in several spellings": (["/a/"], ["//a//", "/a/b/.."], ["/a/b/.."]),
    "equal depths keep their order": (["/c/1", "/b/1"], ["/a/1"], ["/c/1", "/b/1", "/a/1"]),
}


@pytest.mark.parametrize(("before", "added", "after"), MOUNTS.values(), ids=MOUNTS)
def test_mounts(before: list[str], added: list[str], after: list[str]) -> None:
    config = {"mounts": [{"destination": destination} for destination in before]}
    found = inject(config, {"mounts": mounts(*added)})["mounts"]
    assert [mount["destination"] for mount in found] == after


def test_mounts_stay_as_they_are_if_none_is_added() -> None:
    config = {"mounts": [{"destination": "/a/b"}, {"destination": "/a"}]}
    assert inject(config, {"env": ["A=1"]})["mounts"] == config["mounts"]


IDMAPS: dict[str, tuple[dict[str, Any], Any]] = {
    "type bind": ({"type": "bind"}, ["idmap"]),
    "option bind": ({"options": ["ro", "bind"]}, ["ro", "bind", "idmap"]),
    "option rbind": ({"options": ["rbind", "ro"]}, ["rbind", "ro", "ridmap"]),
    "type bind and option rbind": ({"type": "bind", "options": ["rbind"]}, ["rbind", "ridmap"]),
    "the last one counts": ({"options": ["rbind", "bind"]}, ["rbind", "bind", "idmap"]),
    "idmap is kept": ({"options": ["rbind", "idmap"]}, ["rbind", "idmap"]),
    "ridmap is kept": ({"type": "bind", "options": ["ridmap"]}, ["ridmap"]),
    "no bind at all": ({"type": "tmpfs"}, None),
}


@pytest.mark.parametrize(("mount", "options"), IDMAPS.values(), ids=IDMAPS)
def test_bind_mounts_in_a_user_namespace_are_idmapped(mount: dict[str, Any], options: Any) -> None:
    block = {"mounts": [{"hostPath": "/s", "containerPath": "/d", **mount}]}
    config = {"linux": {"namespaces": [{"type": "user", "path": "/proc/5/ns/user"}]}}
    (found,) = inject(config, block)["mounts"]
    assert found.get("options") == options
    assert found.get("type") == mount.get("type")
    (found,) = inject({"linux": {"namespaces": [{"type": "pid"}]}}, block)["mounts"]
    assert found.get("options") == mount.get("options")


def test_hooks_are_appended_in_order() -> None:
    hooks = [{"hookName": "prestart", "path": f"/{n}", "args": ["x"], "timeout": n} for n in range(3)]
    hooks.append({"hookName": "poststop", "path": "/z", "env": ["A=1"]})
    found = inject({"hooks": {"prestart": [{"path": "/old"}]}}, {"hooks": hooks})["hooks"]
    assert [hook["path"] for hook in found["prestart"]] == ["/old", "/0", "/1", "/2"]
    assert found["prestart"][1] == {"path": "/0", "args": ["x"], "timeout": 0}
    assert found["poststop"] == [{"path": "/z", "env": ["A=1"]}]


def test_net_devices_overwrite_by_host_interface() -> None:
    config = {"linux": {"netDevices": {"eth0": {"name": "old"}, "eth1": {"name": "stays"}}}}
    block = {"netDevices": [{"hostInterfaceName": "eth0", "name": "new"}]}
    assert inject(config, block)["linux"]["netDevices"] == {"eth0": {"name": "new"}, "eth1": {"name": "stays"}}


def test_intel_rdt_is_replaced_whole() -> None:
    config = {"linux": {"intelRdt": {"closID": "old", "memBwSchema": "x"}}}
    assert inject(config, {"intelRdt": {"closID": "new"}})["linux"]["intelRdt"] == {"closID": "new"}
    assert inject(config, {"intelRdt": {}})["linux"]["intelRdt"] == {}
    one, two = (edits_of({"intelRdt": {"closID": name}}) for name in "ab")
    assert writer.apply(config, merge(one, two))["linux"]["intelRdt"] == {"closID": "b"}


def test_group_ids_are_added_once_and_never_0() -> None:
    config = {"process": {"user": {"uid": 0, "gid": 0, "additionalGids": [5]}}}
    found = inject(config, {"additionalGids": [0, 7, 5, 7, 6]})
    assert found["process"]["user"]["additionalGids"] == [5, 7, 6]


def test_nothing_is_applied_when_a_device_fails() -> None:
    config: dict[str, Any] = {"process": {"env": []}}
    with pytest.raises(ChandlerError):
        inject(config, {"env": ["A=1"], "deviceNodes": [{"path": "/dev/gone"}]})
    assert config == {"process": {"env": []}}


def test_unknown_keys_survive() -> None:
    config = {"x": {"y": 1}, "linux": {"z": [1]}, "process": {"w": None}}
    block = {"env": ["A=1"], "deviceNodes": [{"path": "/dev/null"}], "mounts": mounts("/m"), "additionalGids": [4]}
    result = inject(config, block)
    assert (result["x"], result["linux"]["z"], result["process"]["w"]) == ({"y": 1}, [1], None)


# --- compiling, appending -------------------------------------------------------------------------------------


def test_a_hook_without_an_environment_gets_a_harmless_one() -> None:
    block = {"hooks": [{"hookName": "prestart", "path": "/a"}, {"hookName": "prestart", "path": "/b", "env": ["X=1"]}]}
    plain, safe = compile_edits(block, "o", None), compile_edits(block, "o")
    assert [hook.get("env") for _, _, hook, _ in plain] == [None, ["X=1"]]
    assert [hook.get("env") for _, _, hook, _ in safe] == [list(SAFE_HOOK_ENV), ["X=1"]]
    assert not any(variable.startswith("LD_") for variable in SAFE_HOOK_ENV)


APPENDED: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any]]] = {
    "nothing to nothing": ({}, {}, []),
    "something to nothing": ({}, {"env": ["A=1"]}, ["A"]),
    "nothing to something": ({"env": ["A=1"]}, {}, ["A"]),
    "more of the same": ({"env": ["A=1"]}, {"env": ["B=1"]}, ["A", "B"]),
    "of every category": (
        {
            "env": ["A=1"],
            "mounts": mounts("/m"),
            "hooks": [{"hookName": "prestart", "path": "/h"}],
            "additionalGids": [3],
        },
        {
            "env": ["A=2"],
            "mounts": mounts("/n"),
            "hooks": [{"hookName": "prestart", "path": "/h"}],
            "additionalGids": [4],
        },
        ["A", "prestart", 3, "/n", "prestart", 4],
    ),
}


@pytest.mark.parametrize("one", [case[0] for case in APPENDED.values()], ids=APPENDED)
@pytest.mark.parametrize("two", [case[1] for case in APPENDED.values()], ids=APPENDED)
def test_appending_keeps_the_edits_of_both(one: dict[str, Any], two: dict[str, Any]) -> None:
    merged = merge(Edits(compile_edits(one, "a")), Edits(compile_edits(two, "b")))
    keys = {(kind, key) for kind, key, _, _ in (*compile_edits(one, "a"), *compile_edits(two, "b"))}
    assert {(kind, key) for kind, key, _, _ in merged.items} == keys
    for kind, key, value, _ in compile_edits(two, "b"):
        assert any(item[:3] == (kind, key, value) for item in merged.items), "the later one counts"


names = st.sampled_from(["/dev/null", "/dev/gpu", "/dev/loop0"])
block = st.fixed_dictionaries(
    {},
    optional={
        "env": st.lists(st.sampled_from(["A=1", "A=2", "B=1", "TERM=x"]), max_size=3),
        "deviceNodes": st.lists(
            st.fixed_dictionaries({"path": names}, optional={"permissions": st.sampled_from(["r", "none"])}), max_size=3
        ),
        "mounts": st.lists(st.sampled_from(["/a", "/a/b", "/", "/c"]).map(lambda path: mounts(path)[0]), max_size=3),
        "hooks": st.lists(st.just({"hookName": "prestart", "path": "/h"}), max_size=2),
        "additionalGids": st.lists(st.integers(0, 3), max_size=3),
        "netDevices": st.lists(st.just({"hostInterfaceName": "e", "name": "n"}), max_size=1),
        "intelRdt": st.fixed_dictionaries({}, optional={"closID": st.just("x")}),
    },
)
config = st.fixed_dictionaries(
    {"unknown": st.just({"kept": [1]})},
    optional={
        "process": st.fixed_dictionaries(
            {"user": st.just({"uid": 5, "gid": 0})},
            optional={"env": st.lists(st.sampled_from(["A=0", "TERM=y", "B"]), max_size=3)},
        ),
        "mounts": st.lists(
            st.sampled_from(["/c", "/a/b", "/proc"]).map(lambda path: {"destination": path}), max_size=3, unique_by=str
        ),
    },
)


@given(config, block, block)
def test_injection_is_idempotent_and_changes_no_input(
    before: dict[str, Any], one: dict[str, Any], two: dict[str, Any]
) -> None:
    # The CDI Go library's rule removes only the first of two mounts with one destination, so `before` has none.
    copies = copy.deepcopy((before, one, two))
    edits = device_nodes.complete(merge(Edits(compile_edits(one, "1")), Edits(compile_edits(two, "2"))), lstat)
    frozen = copy.deepcopy(edits.items)
    once = writer.apply(before, edits)
    assert writer.apply(once, edits) == once
    assert device_nodes.complete(edits, lstat) == edits
    assert once["unknown"] == {"kept": [1]}
    assert (before, one, two) == copies
    assert edits.items == frozen


@given(st.permutations(["/dev/null", "/dev/gpu", "/dev/loop0"]))
def test_the_order_of_independent_devices_changes_only_their_order(order: list[str]) -> None:
    found = inject({}, {"deviceNodes": [{"path": path} for path in order]})["linux"]
    assert [device["path"] for device in found["devices"]] == order
    assert sorted(map(str, found["resources"]["devices"])) == sorted(
        map(
            str,
            inject({}, {"deviceNodes": [{"path": path} for path in sorted(order)]})["linux"]["resources"]["devices"],
        )
    )
