"""What a CDI file must satisfy (CDI SPEC.md, "CDI JSON Specification" and "Released versions")."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from shim.cdi import spec, versions
from shim.errors import CdiError


def base(**changes: Any) -> dict[str, Any]:
    file: dict[str, Any] = {
        "cdiVersion": "1.1.0",
        "kind": "vendor.com/class",
        "devices": [{"name": "dev", "containerEdits": {"env": ["A=1"]}}],
    }
    file.update(changes)
    return {key: value for key, value in file.items() if value is not ...}


def problems(file: Any) -> dict[str, str]:
    return dict(spec.problems(json.dumps(file).encode(), "f"))


def node(**fields: Any) -> dict[str, Any]:
    return {"deviceNodes": [{"path": "/dev/x", **fields}]}


def hook(**fields: Any) -> dict[str, Any]:
    return {"hooks": [{"hookName": "prestart", "path": "/h", **fields}]}


VALID_EDITS: dict[str, dict[str, Any]] = {
    "valid, env": {"env": ["A=1", "B=", "C=x=y"]},
    "valid, device by path alone": node(),
    "valid, device in full": node(
        hostPath="/dev/y", type="c", major=1, minor=2, fileMode=0o666, permissions="rwm", uid=0, gid=0
    ),
    "valid, device types": {"deviceNodes": [{"path": "/dev/x", "type": kind} for kind in ("", "b", "c", "u", "p")]},
    "valid, permissions none": node(permissions="none"),
    "valid, permissions twice the same": node(permissions="rr"),
    "valid, permissions in any order": node(permissions="mwr"),
    "valid, every hook": {
        "hooks": [
            {"hookName": stage, "path": "/h"}
            for stage in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
        ]
    },
    "valid, hook in full": hook(args=["h", "x"], env=["A=1"], timeout=0),
    "valid, mount": {"mounts": [{"hostPath": "/a", "containerPath": "/b", "options": ["ro"], "type": "bind"}]},
    "valid, rdt empty": {"intelRdt": {}},
    "valid, rdt root class": {"intelRdt": {"closID": "/"}},
    "valid, rdt empty class": {"intelRdt": {"closID": ""}},
    "valid, rdt class of 4095 bytes": {"intelRdt": {"closID": "x" * 4095}},
    "valid, rdt in full": {
        "intelRdt": {
            "closID": "a",
            "l3CacheSchema": "b",
            "memBwSchema": "c",
            "schemata": ["d"],
            "enableMonitoring": True,
        }
    },
    "valid, gid 0 alone": {"additionalGids": [0]},
    "valid, gids": {"additionalGids": [1, 4294967294]},
    "valid, net devices": {
        "netDevices": [{"hostInterfaceName": "a", "name": "b"}, {"hostInterfaceName": "b", "name": "a"}]
    },
}
INVALID_EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "invalid, env without =": ({"env": ["A"]}, "env[0]"),
    "invalid, env that starts with =": ({"env": ["A=1", "=b"]}, "env[1]"),
    "invalid, env empty": ({"env": [""]}, "env[0]"),
    "invalid, env =": ({"env": ["="]}, "env[0]"),
    "invalid, device without path": ({"deviceNodes": [{"hostPath": "/x"}]}, "deviceNodes[0].path"),
    "invalid, device with empty path": (node(path=""), "deviceNodes[0].path"),
    "invalid, device type": (node(type="x"), "deviceNodes[0].type"),
    "invalid, two device types": (node(type="bc"), "deviceNodes[0].type"),
    "invalid, permissions": (node(permissions="rx"), "deviceNodes[0].permissions"),
    "invalid, permissions with a blank": (node(permissions="r w"), "deviceNodes[0].permissions"),
    "invalid, major for every device": (node(type="c", major=-1), "deviceNodes[0].major"),
    "invalid, minor for every device": (node(type="c", major=1, minor=-1), "deviceNodes[0].minor"),
    "invalid, mode of another type": (node(fileMode=0o60666), "deviceNodes[0].fileMode"),
    "invalid, owner that changes none": (node(uid=4294967295), "deviceNodes[0].uid"),
    "invalid, gid that is none": ({"additionalGids": [4294967295]}, "additionalGids[0]"),
    "invalid, hook name": (hook(hookName="onError"), "hooks[0].hookName"),
    "invalid, hook without name": ({"hooks": [{"path": "/h"}]}, "hooks[0].hookName"),
    "invalid, hook name in other case": (hook(hookName="Prestart"), "hooks[0].hookName"),
    "invalid, hook without path": ({"hooks": [{"hookName": "prestart"}]}, "hooks[0].path"),
    "invalid, hook env": (hook(env=["A=1", "B"]), "hooks[0].env[1]"),
    "invalid, mount without host path": ({"mounts": [{"containerPath": "/b"}]}, "mounts[0].hostPath"),
    "invalid, mount without container path": ({"mounts": [{"hostPath": "/b"}]}, "mounts[0].containerPath"),
    "invalid, rdt class .": ({"intelRdt": {"closID": "."}}, "intelRdt.closID"),
    "invalid, rdt class ..": ({"intelRdt": {"closID": ".."}}, "intelRdt.closID"),
    "invalid, rdt class with a slash": ({"intelRdt": {"closID": "a/b"}}, "intelRdt.closID"),
    "invalid, rdt class with a newline": ({"intelRdt": {"closID": "a\nb"}}, "intelRdt.closID"),
    "invalid, rdt class of 4096 bytes": ({"intelRdt": {"closID": "x" * 4096}}, "intelRdt.closID"),
    "invalid, net device without host name": ({"netDevices": [{"name": "b"}]}, "netDevices[0].hostInterfaceName"),
    "invalid, net device without name": ({"netDevices": [{"hostInterfaceName": "b"}]}, "netDevices[0].name"),
    "invalid, net device host name twice": (
        {"netDevices": [{"hostInterfaceName": "a", "name": "b"}, {"hostInterfaceName": "a", "name": "c"}]},
        "netDevices[1].hostInterfaceName",
    ),
    "invalid, net device name twice": (
        {"netDevices": [{"hostInterfaceName": "a", "name": "b"}, {"hostInterfaceName": "c", "name": "b"}]},
        "netDevices[1].name",
    ),
}
FILE_PREFIX = "containerEdits."
DEVICE_PREFIX = "devices[0].containerEdits."


@pytest.mark.parametrize("edits", VALID_EDITS.values(), ids=VALID_EDITS)
def test_valid_edits(edits: dict[str, Any]) -> None:
    assert problems(base(containerEdits=edits)) == {}
    assert problems(base(devices=[{"name": "dev", "containerEdits": edits}])) == {}


@pytest.mark.parametrize(("edits", "place"), INVALID_EDITS.values(), ids=INVALID_EDITS)
def test_invalid_edits(edits: dict[str, Any], place: str) -> None:
    assert FILE_PREFIX + place in problems(base(containerEdits=edits))
    found = problems(base(devices=[{"name": "dev", "containerEdits": edits}]))
    assert DEVICE_PREFIX + place in found
    with pytest.raises(CdiError, match="f: "):
        spec.parse(json.dumps(base(containerEdits=edits)).encode(), "f")


EMPTY_EDITS: list[Any] = [
    {},
    None,
    {"env": []},
    {"env": [], "mounts": [], "hooks": None, "additionalGids": []},
    {"intelRdt": None},
]


@pytest.mark.parametrize("edits", EMPTY_EDITS, ids=str)
def test_edits_may_be_empty_for_the_file_but_not_for_a_device(edits: Any) -> None:
    assert problems(base(containerEdits=edits)) == {}
    assert "devices[0].containerEdits" in problems(base(devices=[{"name": "dev", "containerEdits": edits}]))


FILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "valid, least": (base(), []),
    "valid, annotations": (base(annotations={"a": "b", "example.com/Key_x.y-z": "", "a.b-c.d/e": "x"}), []),
    "valid, annotation of a device": (
        base(devices=[{"name": "d", "annotations": {"a": "b"}, "containerEdits": {"env": ["A=1"]}}]),
        [],
    ),
    "valid, annotation prefix of 253": (base(annotations={".".join(["a" * 49] * 5) + "/k": ""}), []),
    "valid, annotation name of 63": (base(annotations={"k" * 63: ""}), []),
    "valid, several devices": (
        base(devices=[{"name": n, "containerEdits": {"env": ["A=1"]}} for n in ("a", "b", "1:0")]),
        [],
    ),
    "invalid, no version": (base(cdiVersion=...), ["cdiVersion"]),
    "invalid, unknown version": (base(cdiVersion="9.9.9"), ["cdiVersion"]),
    "invalid, no kind": (base(kind=...), ["kind"]),
    "invalid, kind without class": (base(kind="vendor.com"), ["kind"]),
    "invalid, kind without vendor": (base(kind="/class"), ["kind"]),
    "invalid, vendor": (base(kind="1vendor/class"), ["kind"]),
    "invalid, class": (base(kind="vendor/class-"), ["kind"]),
    "invalid, no devices": (base(devices=...), ["devices"]),
    "invalid, empty devices": (base(devices=[]), ["devices"]),
    "invalid, null devices": (base(devices=None), ["devices"]),
    "invalid, device without name": (base(devices=[{"containerEdits": {"env": ["A=1"]}}]), ["devices[0].name"]),
    "invalid, device name": (base(devices=[{"name": ":x", "containerEdits": {"env": ["A=1"]}}]), ["devices[0].name"]),
    "invalid, device without edits": (base(devices=[{"name": "x"}]), ["devices[0].containerEdits"]),
    "invalid, device name twice": (
        base(devices=[{"name": "d", "containerEdits": {"env": ["A=1"]}}] * 2),
        ["devices[1].name"],
    ),
    "invalid, annotation key with a blank": (base(annotations={"a b": "c"}), ["annotations.a b"]),
    "invalid, annotation key empty": (base(annotations={"": "c"}), ["annotations."]),
    "invalid, annotation key with two slashes": (base(annotations={"a/b/c": "c"}), ["annotations.a/b/c"]),
    "invalid, annotation prefix empty": (base(annotations={"/c": "c"}), ["annotations./c"]),
    "invalid, annotation prefix with an underscore": (base(annotations={"a_b/c": "c"}), ["annotations.a_b/c"]),
    "invalid, annotation name of 64": (base(annotations={"k" * 64: ""}), ["annotations." + "k" * 64]),
    "invalid, annotation prefix of 254": (
        base(annotations={"a" * 254 + "/k": ""}),
        ["annotations." + "a" * 254 + "/k"],
    ),
    "invalid, annotations too large": (base(annotations={"a": "x" * (256 << 10)}), ["annotations"]),
    "invalid, annotation key of a device": (
        base(devices=[{"name": "d", "annotations": {"-": "b"}, "containerEdits": {"env": ["A=1"]}}]),
        ["devices[0].annotations.-"],
    ),
    "invalid, everything at once": (
        {
            "cdiVersion": "x",
            "kind": "y",
            "foo": 1,
            "devices": [{"name": "-", "containerEdits": {"env": ["A"], "mounts": [{"type": 1}]}}],
        },
        [
            "foo",
            "cdiVersion",
            "kind",
            "devices[0].name",
            "devices[0].containerEdits.env[0]",
            "devices[0].containerEdits.mounts[0].hostPath",
            "devices[0].containerEdits.mounts[0].containerPath",
        ],
    ),
}


@pytest.mark.parametrize(("file", "places"), FILES.values(), ids=FILES)
def test_the_problems_of_a_file(file: dict[str, Any], places: list[str]) -> None:
    assert list(problems(file)) == places


def test_a_wrong_type_is_reported_once() -> None:
    assert problems(base(kind=["x"])) == {"kind": "must be a string, not a list"}


# --- versions -------------------------------------------------------------------------------------------------

VERSIONS = {
    "valid, 0.3.0": ("0.3.0", True),
    "valid, 0.8.0": ("0.8.0", True),
    "valid, 1.0.0": ("1.0.0", True),
    "valid, 1.1.0": ("1.1.0", True),
    "valid, with v": ("v0.3.0", True),
    "invalid, too old 0.1.0": ("0.1.0", False),
    "invalid, too old 0.2.0": ("0.2.0", False),
    "invalid, two v": ("vv1.0.0", False),
    "invalid, capital V": ("V1.0.0", False),
    "invalid, future": ("1.2.0", False),
    "invalid, two parts": ("1.0", False),
    "invalid, suffix": ("1.0.0-rc1", False),
    "invalid, blank": (" 1.0.0", False),
    "invalid, empty": ("", False),
}


@pytest.mark.parametrize(("version", "valid"), VERSIONS.values(), ids=VERSIONS)
def test_versions(version: str, valid: bool) -> None:
    assert ("cdiVersion" not in problems(base(cdiVersion=version))) == valid


def device(**changes: Any) -> dict[str, Any]:
    return {"name": "dev", "containerEdits": {"env": ["A=1"]}, **changes}


MINIMUM: dict[str, tuple[str, dict[str, Any], Any]] = {
    # minimum, edits (tried for the file and for a device), or a change of the file
    "the floor": ("0.3.0", {"env": ["A=1"]}, None),
    "an empty mount type": ("0.3.0", {"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": ""}]}, None),
    "a mount type": ("0.4.0", {"mounts": [{"hostPath": "/a", "containerPath": "/b", "type": "bind"}]}, None),
    "the second mount's type": (
        "0.4.0",
        {"mounts": [{"hostPath": "/a", "containerPath": "/b"}, {"hostPath": "/a", "containerPath": "/c", "type": "x"}]},
        None,
    ),
    "a host path": ("0.5.0", node(hostPath="/dev/y"), None),
    "a host path that equals the path": ("0.5.0", node(hostPath="/dev/x"), None),
    "an empty host path": ("0.3.0", node(hostPath=""), None),
    "empty rdt": ("0.7.0", {"intelRdt": {}}, None),
    "rdt class": ("0.7.0", {"intelRdt": {"closID": "x"}}, None),
    "rdt null schemata": ("0.7.0", {"intelRdt": {"schemata": None}}, None),
    "rdt no monitoring": ("0.7.0", {"intelRdt": {"enableMonitoring": False}}, None),
    "gids": ("0.7.0", {"additionalGids": [5]}, None),
    "gid 0": ("0.7.0", {"additionalGids": [0]}, None),
    "permissions none": ("0.3.0", node(permissions="none"), None),
    "rdt schemata": ("1.1.0", {"intelRdt": {"schemata": ["x"]}}, None),
    "rdt empty schemata": ("1.1.0", {"intelRdt": {"schemata": []}}, None),
    "rdt monitoring": ("1.1.0", {"intelRdt": {"enableMonitoring": True}}, None),
    "net devices": ("1.1.0", {"netDevices": [{"hostInterfaceName": "a", "name": "b"}]}, None),
    "empty net devices": ("0.3.0", {"env": ["A=1"], "netDevices": []}, None),
    "a device name with a digit first": ("0.5.0", {}, {"devices": [device(name="0")]}),
    "a device name with a digit later": ("0.3.0", {}, {"devices": [device(name="d0")]}),
    "a dot in the class": ("0.6.0", {}, {"kind": "v.com/c.d"}),
    "a dot in the vendor": ("0.3.0", {}, {"kind": "v.com/c"}),
    "annotations": ("0.6.0", {}, {"annotations": {"a": "b"}}),
    "empty annotations": ("0.3.0", {}, {"annotations": {}}),
    "annotations of a device": ("0.6.0", {}, {"devices": [device(annotations={"a": "b"})]}),
    "permissions": ("0.3.0", node(permissions="rw"), None),
    "a hook": ("0.3.0", hook(env=["A=1"], timeout=1), None),
    "a null rdt": ("0.3.0", {"env": ["A=1"], "intelRdt": None}, None),
    "empty gids": ("0.3.0", {"env": ["A=1"], "additionalGids": []}, None),
    "a second device's name with a digit first": ("0.5.0", {}, {"devices": [device(), device(name="1")]}),
    "an underscore in the class": ("0.3.0", {}, {"kind": "v.com/c_d"}),
    "the highest counts": (
        "1.1.0",
        {"netDevices": [{"hostInterfaceName": "a", "name": "b"}], **node(hostPath="/x")},
        {"kind": "v.com/c.d"},
    ),
}


@pytest.mark.parametrize(("minimum", "edits", "changes"), MINIMUM.values(), ids=MINIMUM)
def test_minimum_version(minimum: str, edits: dict[str, Any], changes: dict[str, Any] | None) -> None:
    files = [base(**(changes or {}), containerEdits=edits)]
    if edits:
        files.append(base(**{"devices": [device(), device(name="e", containerEdits=edits)], **(changes or {})}))
    for file in files:
        lower = versions.KNOWN[: versions.KNOWN.index(minimum)]
        assert all("cdiVersion" in problems({**file, "cdiVersion": version}) for version in lower)
        higher = versions.KNOWN[versions.KNOWN.index(minimum) :]
        assert all("cdiVersion" not in problems({**file, "cdiVersion": version}) for version in higher)


def test_the_error_names_the_field_and_the_version_that_it_needs() -> None:
    assert problems(base(cdiVersion="0.3.0", containerEdits={"intelRdt": {}})) == {
        "cdiVersion": "intelRdt needs 0.7.0, but the file declares 0.3.0"
    }


def test_validation_changes_no_input() -> None:
    from shim.cdi import schema, validate

    file = base(containerEdits={**node(), **hook(), "mounts": [{"hostPath": "/a", "containerPath": "/b"}]})
    before = copy.deepcopy(file)
    found: dict[str, str] = {}
    decoded = schema.SPEC(file, None, found)
    again = copy.deepcopy(decoded)
    validate.check(decoded, found)
    spec.Spec(decoded, "f", None)
    assert (file, decoded, found) == (before, again, {})
