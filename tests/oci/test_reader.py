"""shim.oci.writer and shim.oci.reader: how each kind of edit changes config.json, and the laws of `apply`."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim import pathtext
from shim.edits import ANNOTATION, DEVICE, ENV, GID, HOOK, MOUNT, NET_DEVICE, RDT, RESOURCE, Edits, merge
from shim.errors import BundleError, ChandlerError
from shim.jsontext import Number
from shim.oci import reader, writer


def edit(kind: str, key: Any, value: Any) -> Edits:
    return Edits([(kind, key, value, "test")])


def env(name: str, value: str) -> Edits:
    return edit(ENV, name, value)


def node(path: str = "/dev/x", **more: Any) -> Edits:
    return edit(DEVICE, path, {"path": path, "type": "c", "major": 10, "minor": 5, **more})


def mount(destination: str, **more: Any) -> Edits:
    return edit(MOUNT, destination, {"destination": destination, "source": "/host", **more})


def hook(stage: str, path: str = "/bin/hook") -> Edits:
    return edit(HOOK, stage, {"path": path})


# --- env ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, ["A=1"]),
        ([], ["A=1"]),
        (["B=2"], ["B=2", "A=1"]),
        (["A=0", "B=2"], ["A=1", "B=2"]),
        (["A=0", "B=2", "A=3"], ["A=0", "B=2", "A=1"]),
        (["A"], ["A=1"]),
        (["AA=0", "a=0"], ["AA=0", "a=0", "A=1"]),
        ([5, None, "A=0"], [5, None, "A=1"]),
    ],
)
def test_env_is_replaced_in_place(before: Any, after: Any) -> None:
    config = {"process": {} if before is None else {"env": before}}
    assert writer.apply(config, env("A", "1")) == {"process": {"env": after}}


def test_env_values_are_kept_whole() -> None:
    assert writer.apply({}, merge(env("A", "x=y\n"), env("B", "")))["process"]["env"] == ["A=x=y\n", "B="]


# --- devices --------------------------------------------------------------------------------------------------


def test_a_device_is_in_both_lists() -> None:
    linux = writer.apply({}, node(fileMode=0o660))["linux"]
    assert linux["devices"] == [{"path": "/dev/x", "type": "c", "major": 10, "minor": 5, "fileMode": 0o660}]
    assert linux["resources"]["devices"] == [{"allow": True, "type": "c", "major": 10, "minor": 5, "access": "rwm"}]


@pytest.mark.parametrize(
    ("permissions", "rule"),
    [
        (None, {"access": "rwm"}),
        ("", {"access": "rwm"}),
        ("r", {"access": "r"}),
        ("rw", {"access": "rw"}),
        ("none", {}),
    ],
)
def test_access(permissions: Any, rule: dict[str, str]) -> None:
    rules = writer.apply({}, node(permissions=permissions))["linux"]["resources"]["devices"]
    assert rules == [{"allow": True, "type": "c", "major": 10, "minor": 5, **rule}]


@pytest.mark.parametrize(("kind", "rules"), [("c", 1), ("b", 1), ("p", 0)])
def test_only_devices_have_rules(kind: str, rules: int) -> None:
    linux = writer.apply({}, node(type=kind))["linux"]
    assert len(linux["devices"]) == 1
    assert len(linux["resources"]["devices"]) == rules


def test_an_equal_rule_is_not_added_twice() -> None:
    mine = {"allow": True, "type": "c", "major": 10, "minor": 5, "access": "rwm"}
    deny = {"allow": False, "access": "rwm"}
    config = {"linux": {"resources": {"devices": [deny, mine]}}}
    assert writer.apply(config, merge(node("/dev/x"), node("/dev/y")))["linux"]["resources"]["devices"] == [deny, mine]


def test_rules_come_after_the_engines_denial() -> None:
    deny = {"allow": False, "access": "rwm"}
    rules = writer.apply({"linux": {"resources": {"devices": [deny]}}}, node())["linux"]["resources"]["devices"]
    assert rules[0] == deny and len(rules) == 2


def test_each_node_of_one_path_gives_its_rule_and_the_last_is_the_device() -> None:
    linux = writer.apply({}, merge(node(minor=1), node(minor=2)))["linux"]
    assert [device["minor"] for device in linux["devices"]] == [2]
    assert [rule["minor"] for rule in linux["resources"]["devices"]] == [1, 2]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["/dev/a"], ["/dev/a", "/dev/x!"]),
        (["/dev/x", "/dev/a"], ["/dev/a", "/dev/x!"]),
        (["/dev/x", "/dev/a", "/dev/x"], ["/dev/a", "/dev/x!"]),
        ([None, 5, "/dev/a"], [None, 5, "/dev/a", "/dev/x!"]),
    ],
)
def test_position_of_a_device(before: list[Any], after: list[Any]) -> None:
    """The first entry of the path goes, a second one is overwritten where it is."""
    config = {"linux": {"devices": [{"path": path} if isinstance(path, str) else path for path in before]}}
    found = writer.apply(config, node())["linux"]["devices"]
    assert [
        entry["path"] + ("!" if "major" in entry else "") if isinstance(entry, dict) else entry for entry in found
    ] == after


@pytest.mark.parametrize(
    ("user", "own", "owner"),
    [
        ({}, {}, {}),
        ({"uid": 0, "gid": 0}, {}, {}),
        ({"uid": 1000, "gid": 100}, {}, {"uid": 1000, "gid": 100}),
        ({"uid": 1000, "gid": 100}, {"uid": 0, "gid": 0}, {"uid": 0, "gid": 0}),
        ({"uid": 1000}, {"gid": 44}, {"uid": 1000, "gid": 44}),
        ({"uid": "1000", "gid": True}, {}, {}),
        ({"uid": -1}, {}, {}),
        (None, {}, {}),
        ([], {}, {}),
    ],
)
def test_owner(user: Any, own: dict[str, Any], owner: dict[str, int]) -> None:
    device = writer.apply({"process": {"user": user}}, node(**own))["linux"]["devices"][0]
    assert {key: device[key] for key in ("uid", "gid") if key in device} == owner


# --- mounts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "added", "after"),
    [
        ([], ["/a"], ["/a"]),
        (["/b", "/a"], ["/c"], ["/b", "/a", "/c"]),
        (["/a/b", "/a"], ["/c"], ["/a/b", "/a", "/c"]),  # the engine covers one of its mounts, and goes on doing so
        (["/a/b", "/a"], ["/a/b"], ["/a/b", "/a", "/a/b"]),
        (["/a/b/c", "/a"], ["/a/b"], ["/a/b/c", "/a", "/a/b"]),
        (["/a", "/a/b/c", "/z"], ["/a/b"], ["/a", "/a/b", "/a/b/c", "/z"]),
        (["/a/b/c", "/"], ["/z", "/a/b"], ["/a/b/c", "/", "/z", "/a/b"]),
        ([], ["/a/b", "/a", "/"], ["/", "/a", "/a/b"]),
        (
            ["/proc", "/dev", "/dev/pts", "/sys"],
            ["/dev/shm/x", "/dev/dri"],
            ["/proc", "/dev", "/dev/pts", "/sys", "/dev/dri", "/dev/shm/x"],
        ),
        (
            ["/run", "/x"],
            ["/var/run/y"],
            ["/run", "/x", "/var/run/y"],
        ),  # though it lies below none: /var/run may be a link to /run
        (["/x", "/y"], ["/x"], ["/x", "/y"]),
        (["/x", "/x/y", "/x"], ["/x"], ["/x", "/x/y", "/x"]),
        (["/x/"], ["/x"], ["/x"]),
        (["x", "x/z"], ["/x"], ["/x", "x/z"]),
        (["/a/../b/c", "//d//"], ["/e", "/b"], ["/b", "/a/../b/c", "//d//", "/e"]),
        (["/ab"], ["/a"], ["/ab", "/a"]),
    ],
)
def test_order_of_mounts(before: list[str], added: list[str], after: list[str]) -> None:
    config = {"mounts": [{"destination": path, "source": "old"} for path in before]}
    found = writer.apply(config, merge(*map(mount, added)))["mounts"]
    assert [entry["destination"] for entry in found] == after
    assert {entry["destination"] for entry in found if entry["source"] == "/host"} == set(added)


deep_paths = st.lists(st.sampled_from("ab"), max_size=3).map(lambda parts: "/" + "/".join(parts))


def visible(mounts: list[Any], path: str) -> Any:
    """The mount that a path is on: the last one made at the path or above it."""
    return next(
        (entry for entry in reversed(mounts) if f"{path}/".startswith(f"{entry['destination'].rstrip('/')}/")), None
    )


@given(st.lists(deep_paths, max_size=6), st.lists(deep_paths, max_size=4), deep_paths)
def test_what_a_container_sees_of_mounts(before: list[str], added: list[str], path: str) -> None:
    engine = [{"destination": one, "source": str(number)} for number, one in enumerate(before)]
    result = writer.apply({"mounts": engine}, merge(*map(mount, added)))["mounts"]
    assert [entry for entry in result if entry in engine] == [entry for entry in engine if entry in result], (
        "in the engine's order"
    )
    own = max((one for one in added if f"{path}/".startswith(f"{one.rstrip('/')}/")), key=len, default=None)
    expected = visible(engine, path)
    if own is not None and (expected is None or len(expected["destination"]) <= len(own)):
        expected = {"destination": own, "source": "/host"}  # ours covers what is above it, and nothing below it
    assert visible(result, path) == expected


def steps(factor: int) -> int:
    """The number of executed lines of shim.oci for 30 mounts of the engine and 60 of ours, both times `factor`."""
    engine = [{"destination": f"/volumes/{number}"} for number in range(30 * factor)]
    edits = merge(*(mount(f"/usr/lib/{number}.so") for number in range(60 * factor)), mount("/volumes"))
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename != reader.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        writer.apply({"mounts": engine}, edits)
    finally:
        sys.settrace(before)
    return count


def test_the_cost_of_mounts_grows_linearly() -> None:
    assert steps(10) < 11 * steps(1)


def test_mounts_are_not_sorted_when_none_is_added() -> None:
    config = {"mounts": [{"destination": "/a/b"}, {"destination": "/a"}]}
    assert writer.apply(config, env("A", "1"))["mounts"] == config["mounts"]


@pytest.mark.parametrize(
    "odd",
    [None, 5, "x", [], {}, {"destination": None}, {"destination": 5}, {"destination": ["/x"]}, {"destination": {}}],
)
def test_odd_mounts_survive(odd: Any) -> None:
    found = writer.apply({"mounts": [odd, {"destination": "/a"}]}, mount("/x"))["mounts"]
    assert odd in found and len(found) == 3


@pytest.mark.parametrize(
    ("path", "cleaned"),
    [
        ("", "."),
        ("/", "/"),
        ("//", "/"),
        (".", "."),
        ("/a/", "/a"),
        ("/a/./b", "/a/b"),
        ("/a/../b", "/b"),
        ("/..", "/"),
        ("/../../a", "/a"),
        ("a/..", "."),
        ("../a", "../a"),
        ("a/../../b", "../b"),
        ("/a//b", "/a/b"),
    ],
)
def test_clean(path: str, cleaned: str) -> None:
    assert pathtext.clean(path) == cleaned


@given(st.text("/.ab", max_size=8))
def test_a_relative_destination_starts_at_the_containers_root(path: str) -> None:
    assert pathtext.absolute(path) == pathtext.clean("/" + path)


MAPPINGS = {
    "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
    "gidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
}
USERNS: dict[str, Any] = {"linux": {"namespaces": [{"type": "pid"}, {"type": "user"}], **MAPPINGS}}


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"options": ["ro", "bind"]}, ["ro", "bind", "idmap"]),
        ({"options": ["rbind", "ro"]}, ["rbind", "ro", "ridmap"]),
        ({"options": ["bind", "rbind"]}, ["bind", "rbind", "ridmap"]),
        ({"options": ["rbind", "bind"]}, ["rbind", "bind", "idmap"]),
        ({"type": "bind"}, ["idmap"]),
        ({"type": "bind", "options": ["ro"]}, ["ro", "idmap"]),
        ({"options": ["bind", "idmap"]}, ["bind", "idmap"]),
        ({"options": ["rbind", "ridmap"]}, ["rbind", "ridmap"]),
        ({"type": "tmpfs", "options": ["ro"]}, ["ro"]),
        ({}, None),
    ],
)
def test_binds_in_a_user_namespace(more: dict[str, Any], options: Any) -> None:
    edits = mount("/x", **more)
    found = writer.apply(USERNS, edits)["mounts"][0]
    assert found.get("options") == options
    assert found.get("type") == more.get("type"), "a mount type idmap does not exist"
    assert writer.apply(USERNS, edits, idmap=False)["mounts"] == [edits.items[0][2]]
    assert writer.apply({}, edits)["mounts"] == [edits.items[0][2]]


@pytest.mark.parametrize(
    ("linux", "mapped"),
    [
        ({}, False),
        (MAPPINGS, False),
        ({"namespaces": [{"type": "mount", "path": "/x"}], **MAPPINGS}, False),
        ({"namespaces": [{"type": "user"}]}, False),
        ({"namespaces": [{"type": "user"}], "uidMappings": MAPPINGS["uidMappings"]}, False),
        ({"namespaces": [{"type": "user", "path": ""}]}, False),
        ({"namespaces": [{"type": "user"}], **MAPPINGS, "gidMappings": []}, False),
        ({"namespaces": [{"type": "user"}], **MAPPINGS}, True),
        ({"namespaces": [{"type": "user", "path": "/proc/5/ns/user"}]}, True),
        ({"namespaces": [{"type": "user", "path": "/proc/5/ns/user"}], **MAPPINGS}, True),
    ],
)
def test_owners_are_mapped_where_runtimes_know_how(linux: dict[str, Any], mapped: bool) -> None:
    found = writer.apply({"linux": linux}, mount("/x", options=["bind"]))["mounts"][0]
    assert ("idmap" in found["options"]) is mapped


# --- hooks, rdt, groups, network devices, resources, annotations -----------------------------------------------


def test_hooks_are_appended_by_stage() -> None:
    config = {"hooks": {"prestart": [{"path": "/old"}], "x": 5}}
    found = writer.apply(config, merge(hook("prestart", "/one"), hook("createContainer"), hook("prestart", "/two")))[
        "hooks"
    ]
    assert found == {
        "prestart": [{"path": "/old"}, {"path": "/one"}, {"path": "/two"}],
        "x": 5,
        "createContainer": [{"path": "/bin/hook"}],
    }


def test_equal_hooks_are_all_kept() -> None:
    assert len(writer.apply({}, merge(hook("prestart"), hook("prestart")))["hooks"]["prestart"]) == 2


def test_rdt_is_replaced_whole() -> None:
    edits = merge(edit(RDT, "", {"closID": "a", "x": 1}), edit(RDT, "", {"closID": "b"}))
    assert writer.apply({"linux": {"intelRdt": {"closID": "old", "y": 2}}}, edits)["linux"]["intelRdt"] == {
        "closID": "b"
    }


def test_groups() -> None:
    edits = merge(edit(GID, 44, None), edit(GID, 105, None), edit(GID, 44, None))
    assert writer.apply({"process": {"user": {"additionalGids": [105, 7]}}}, edits)["process"]["user"][
        "additionalGids"
    ] == [105, 7, 44]


def test_net_devices() -> None:
    config = {"linux": {"netDevices": {"eth0": {"name": "old"}, "eth1": {"name": "b"}}}}
    assert writer.apply(config, edit(NET_DEVICE, "eth0", "net0"))["linux"]["netDevices"] == {
        "eth0": {"name": "net0"},
        "eth1": {"name": "b"},
    }
    with pytest.raises(BundleError, match="network interface eth1 as b, and .* gives it eth0 under the same name"):
        writer.apply(config, edit(NET_DEVICE, "eth0", "b"))


def test_resources() -> None:
    config = {"linux": {"resources": {"cpu": {"shares": 2, "quota": 5}, "x": 1}}}
    edits = merge(edit(RESOURCE, ("cpu", "quota"), 7), edit(RESOURCE, ("pids", "limit"), 9))
    assert writer.apply(config, edits)["linux"]["resources"] == {
        "cpu": {"shares": 2, "quota": 7},
        "x": 1,
        "pids": {"limit": 9},
    }


def test_annotations() -> None:
    assert writer.apply({"annotations": {"a": "b"}}, edit(ANNOTATION, "c", "d"))["annotations"] == {"a": "b", "c": "d"}


@pytest.mark.parametrize("value", [0, 5, -1, None])
def test_reading_a_resource(value: Any) -> None:
    assert reader.resource({"linux": {"resources": {"cpu": {"quota": value}}}}, "cpu", "quota") == value


@pytest.mark.parametrize("value", [True, "5", Number("5.0"), 5.0, [], {}])
def test_a_resource_of_another_type(value: Any) -> None:
    with pytest.raises(BundleError, match="linux.resources.cpu.quota is not a whole number"):
        reader.resource({"linux": {"resources": {"cpu": {"quota": value}}}}, "cpu", "quota")
    with pytest.raises(BundleError, match="linux.resources.cpu.cpus is not a text"):
        reader.resource({"linux": {"resources": {"cpu": {"cpus": value if value != "5" else 5}}}}, "cpu", "cpus", str)


# --- laws -----------------------------------------------------------------------------------------------------

EACH = {
    ENV: env("A", "1"),
    DEVICE: node(),
    NET_DEVICE: edit(NET_DEVICE, "eth0", "net0"),
    MOUNT: mount("/x", options=["bind"]),
    HOOK: hook("prestart"),
    RDT: edit(RDT, "", {"closID": "a"}),
    GID: edit(GID, 5, None),
    RESOURCE: edit(RESOURCE, ("cpu", "quota"), 5),
    ANNOTATION: edit(ANNOTATION, "a", "b"),
}
EVERY = merge(*EACH.values())
ODD: list[Any] = [None, True, 0, 5, Number("1.5"), "", "x", [], [None], [5], [[]], [{}], ["x"], {}, {"x": 1}]
SHAPES = [
    ("process",),
    ("process", "env"),
    ("process", "user"),
    ("process", "user", "uid"),
    ("process", "user", "additionalGids"),
    ("linux",),
    ("linux", "devices"),
    ("linux", "resources"),
    ("linux", "resources", "devices"),
    ("linux", "resources", "cpu"),
    ("linux", "namespaces"),
    ("linux", "netDevices"),
    ("linux", "intelRdt"),
    ("mounts",),
    ("hooks",),
    ("hooks", "prestart"),
    ("annotations",),
]


def shaped(member: tuple[str, ...], value: Any) -> Any:
    for key in reversed(member):
        value = {key: value}
    return value


@pytest.mark.parametrize("member", SHAPES, ids=".".join)
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_config_of_any_shape_is_edited_or_refused(member: tuple[str, ...], value: Any) -> None:
    config = shaped(member, value)
    before = copy.deepcopy(config)
    for edits in (*EACH.values(), EVERY):
        try:
            result = writer.apply(config, edits)
        except BundleError as error:
            assert member[-1] in str(error)
        else:
            assert writer.apply(result, edits) == result
        assert config == before


@pytest.mark.parametrize("member", SHAPES, ids=".".join)
def test_null_counts_as_missing(member: tuple[str, ...]) -> None:
    if member != ("process", "user", "uid") and member != ("linux", "namespaces"):
        for key in member:
            assert key in str(writer.apply(shaped(member, None), EVERY))


def test_every_category_has_a_rule() -> None:
    assert [kind for kind, _ in writer._APPLY] == list(EACH)
    for kind, edits in EACH.items():
        assert writer.apply({}, edits), kind


paths = st.sampled_from(["/a", "/b", "/a/b", "/a/b/c"])
small = st.integers(0, 2)
any_edit = st.one_of(
    st.builds(env, st.sampled_from("ABC"), st.sampled_from(["", "1"])),
    st.builds(
        lambda path, minor, permissions: node(path, minor=minor, permissions=permissions),
        paths,
        small,
        st.sampled_from([None, "r", "none"]),
    ),
    st.builds(lambda path, source: mount(path, source=source, options=["bind"]), paths, st.sampled_from(["/1", "/2"])),
    st.builds(hook, st.sampled_from(["prestart", "poststop"]), st.sampled_from(["/1", "/2"])),
    st.builds(lambda gid: edit(GID, gid, None), st.integers(1, 3)),
    st.builds(lambda value: edit(RDT, "", {"closID": value}), st.sampled_from("ab")),
    st.builds(lambda key, value: edit(NET_DEVICE, key, value), st.sampled_from("ab"), st.sampled_from("cd")).filter(
        lambda edits: edits.items[0][1:3] in (("a", "c"), ("b", "d"))
    ),
    st.builds(
        lambda key, value: edit(RESOURCE, key, value), st.sampled_from([("cpu", "quota"), ("memory", "limit")]), small
    ),
    st.builds(lambda key, value: edit(ANNOTATION, key, value), st.sampled_from("ab"), st.sampled_from("cd")),
)
some_edits = st.lists(any_edit, max_size=8).map(lambda parts: merge(*parts))
unknown = st.dictionaries(st.sampled_from(["x", "y"]), st.one_of(st.none(), st.integers(), st.text(max_size=2)))
# At most two entries for each device path: with more, the CDI Go library's own order is not idempotent.
configs = st.builds(
    lambda top, process, linux, env_, devices, mounts, rules, hooks, namespaces: {
        **top,
        "mounts": mounts,
        "hooks": {"prestart": hooks},
        "process": {**process, "env": env_},
        "linux": {**linux, "namespaces": namespaces, "devices": devices, "resources": {**linux, "devices": rules}},
    },
    unknown,
    unknown,
    unknown,
    st.lists(st.sampled_from(["A=0", "B=0", "A=2", "Z"])),
    st.lists(paths, max_size=4, unique=True).map(lambda found: [{"path": path, "odd": 1} for path in found]),
    st.lists(paths, max_size=4).map(lambda found: [{"destination": path, "odd": 1} for path in found]),
    st.just([{"allow": False, "access": "rwm"}]),
    st.lists(st.sampled_from([{"path": "/1"}, {"path": "/3"}]), max_size=3),
    st.sampled_from([[], [{"type": "user"}]]),
)


@given(configs, some_edits)
def test_apply_twice_is_apply_once(config: Any, edits: Edits) -> None:
    once = writer.apply(config, edits)
    assert writer.apply(once, edits) == once


@given(configs, some_edits)
def test_inputs_are_never_changed(config: Any, edits: Edits) -> None:
    before = copy.deepcopy((config, edits.items))
    result = writer.apply(config, edits)
    assert (config, edits.items) == before
    for part in (result, result.get("process", {}), result.get("linux", {})):  # nor through what the result shares
        for key, value in part.items():
            if isinstance(value, list):
                value.append("changed")
    assert edits.items == before[1]


@given(configs, some_edits)
def test_keys_that_no_edit_is_about_survive(config: Any, edits: Edits) -> None:
    result = writer.apply(config, edits)
    for before, after in ((config, result), (config["process"], result["process"]), (config["linux"], result["linux"])):
        assert {key: value for key, value in before.items() if key in "xy"} == {
            key: value for key, value in after.items() if key in "xy"
        }
    kinds = {item[0] for item in edits.items}
    if DEVICE not in kinds:
        assert result["linux"]["devices"] == config["linux"]["devices"]
    if ENV not in kinds:
        assert result["process"]["env"] == config["process"]["env"]
    if MOUNT not in kinds:
        assert result["mounts"] == config["mounts"]
    named = {item[1] for item in edits.of(MOUNT)}
    assert [
        entry for entry in config["mounts"] if entry["destination"] not in named and entry not in result["mounts"]
    ] == []


@given(configs, some_edits)
def test_every_device_is_in_both_lists(config: Any, edits: Edits) -> None:
    linux = writer.apply(config, edits)["linux"]
    for _, path, value, _ in edits.of(DEVICE):
        assert path in [device["path"] for device in linux["devices"]]
        assert any(rule.get("minor") == value["minor"] and rule["allow"] for rule in linux["resources"]["devices"])


def test_the_empty_edits_change_nothing() -> None:
    config = {"mounts": None, "linux": 5}
    assert writer.apply(config, Edits()) == config


def test_every_error_is_a_chandler_error() -> None:
    with pytest.raises(ChandlerError, match="config.json: 'env' is not a list"):
        writer.apply({"process": {"env": {}}}, env("A", "1"))
    with pytest.raises(ChandlerError, match="config.json: 'process' is not an object"):
        writer.apply({"process": []}, env("A", "1"))
