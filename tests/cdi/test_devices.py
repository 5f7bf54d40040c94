"""Which names are one piece of hardware, and which devices are taken when a request has only a count."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.cdi import devices
from shim.cdi.registry import Registry
from shim.errors import CdiError, HostError


def nothing(path: str) -> Any:
    raise HostError(f"{path} is not on this host")


def node(path: str, *numbers: int, kind: str = "c") -> Any:
    return {"path": path, "type": kind, "major": numbers[0], "minor": numbers[1]} if numbers else {"path": path}


def gpu(index: int) -> Any:
    return node(f"/dev/nvidia{index}", 195, index)


CONTROL = node("/dev/nvidiactl", 195, 255)
KFD = node("/dev/kfd", 510, 0)


def amd(index: int) -> list[dict[str, Any]]:
    return [KFD, node(f"/dev/dri/card{index}", 226, index), node(f"/dev/dri/renderD{128 + index}", 226, 128 + index)]


def mig(parent: int, first_cap: int) -> list[dict[str, Any]]:
    return [gpu(parent), node("/dev/cap", 238, first_cap), node("/dev/cap", 238, first_cap + 1)]


Nodes = dict[str, list[Any]]
NVIDIA: Nodes = {str(n): [gpu(n)] for n in range(11)}
NVIDIA.update({f"GPU-{n}": [gpu(n)] for n in range(11)}, all=[gpu(n) for n in range(11)])

KEYS: dict[str, tuple[Nodes, dict[str, tuple[str, ...]]]] = {
    "numbers of the nodes": ({"0": [gpu(0)], "1": [gpu(1)]}, {"0": ("c195:0",), "1": ("c195:1",)}),
    "less what all share": ({"0": [gpu(0), CONTROL], "1": [CONTROL, gpu(1)]}, {"0": ("c195:0",), "1": ("c195:1",)}),
    "everything, if all is shared": (
        {"0": [gpu(0)], "GPU-x": [gpu(0)], "all": [gpu(0)]},
        dict.fromkeys(("0", "GPU-x", "all"), ("c195:0",)),
    ),
    "everything, if it is the only device": ({"0": [gpu(0), CONTROL]}, {"0": ("c195:0", "c195:255")}),
    "the name, without nodes": ({"a": [], "b": [gpu(0)]}, {"a": ("a",), "b": ("c195:0",)}),
    "the path, if nobody knows the numbers": (
        {"a": [node("/dev/a")], "b": [{"path": "/dev/c", "hostPath": "/dev/b"}]},
        {"a": ("/dev/a",), "b": ("/dev/b",)},
    ),
    "u is c": (
        {"a": [node("/dev/a", 1, 2, kind="u")], "b": [node("/dev/b", 1, 3, kind="b")]},
        {"a": ("c1:2",), "b": ("b1:3",)},
    ),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize(("nodes", "keys"), KEYS.values(), ids=KEYS)
def test_keys(nodes: Nodes, keys: dict[str, tuple[str, ...]]) -> None:
    assert devices.device_keys(nodes, nothing) == keys


def test_numbers_that_are_left_open_come_from_the_host() -> None:
    def stat(path: str) -> Any:
        return {"/dev/b": ("c", 7, 8, 0o666), "/dev/fifo": ("p", 0, 0, 0o666)}.get(path)

    nodes: Nodes = {
        "a": [{"path": "/dev/x", "hostPath": "/dev/b"}],
        "typed": [{"path": "/dev/b", "type": "c"}],
        "major": [{"path": "/dev/b", "major": 9, "minor": 3}],
        "fifo": [{"path": "/dev/fifo"}],
        "gone": [{"path": "/dev/gone"}],
    }
    assert devices.device_keys(nodes, stat) == {
        "a": ("c7:8",),
        "typed": ("c7:8",),
        "major": ("c9:3",),
        "fifo": ("/dev/fifo",),
        "gone": ("/dev/gone",),
    }


PICKS: dict[str, tuple[Nodes, list[str]]] = {
    "index names in natural order, never all, each GPU once": (NVIDIA, [str(n) for n in range(11)]),
    "UUIDs, if there is nothing else": ({f"GPU-{n}": [gpu(n)] for n in (2, 1)}, ["GPU-1", "GPU-2"]),
    "type-index names": ({"all": [gpu(0), gpu(1)], "gpu1": [gpu(1)], "gpu0": [gpu(0)]}, ["gpu0", "gpu1"]),
    "one GPU, and all is it": ({"all": [gpu(0)], "0": [gpu(0)]}, ["0"]),
    "MIG devices of one GPU": ({"0:1": mig(0, 5), "0:0": mig(0, 3), "all": mig(0, 3) + mig(0, 5)}, ["0:0", "0:1"]),
    "MIG devices beside a whole GPU": (
        {"0:0": mig(0, 3), "0:1": mig(0, 5), "1": [gpu(1)], "all": mig(0, 3) + mig(0, 5) + [gpu(1)]},
        ["0:0", "0:1", "1"],
    ),
    "a whole GPU hides its own parts": ({"0": [gpu(0)], "0:0": mig(0, 3), "1": [gpu(1)]}, ["0", "1"]),
    "AMD, with a node that all share": ({"0": amd(0), "1": amd(1), "all": [*amd(0), *amd(1)[1:]]}, ["0", "1"]),
    "cards": ({"card10": amd(10), "card9": amd(9), "0000-03-00.0-0x56a0": amd(9)}, ["card9", "card10"]),
    "devices without nodes": ({"b": [], "a": []}, ["a", "b"]),
    "none": ({}, []),
}


@pytest.mark.parametrize(("nodes", "names"), PICKS.values(), ids=PICKS)
def test_picks(nodes: Nodes, names: list[str]) -> None:
    keys = devices.device_keys(nodes, nothing)
    assert devices.pick(keys, 1000) == names
    assert devices.pick(dict(reversed(keys.items())), 1000) == names, "the order of the file does not matter"
    for count in range(len(names)):
        assert devices.pick(keys, count) == names[:count]


def test_groups_put_the_best_name_first() -> None:
    keys = devices.device_keys({"GPU-a": [gpu(0)], "gpu0": [gpu(0)], "0": [gpu(0)], "1": [gpu(1)]}, nothing)
    assert [names for _, names in devices.groups(keys)] == [["0", "gpu0", "GPU-a"], ["1"]]


@given(
    st.dictionaries(
        st.sampled_from("0 1 2 gpu0 GPU-a all 0:1 x".split()), st.lists(st.integers(0, 4).map(gpu), max_size=5)
    )
)
def test_a_picked_device_is_never_part_of_another(nodes: Nodes) -> None:
    keys = devices.device_keys(nodes, nothing)
    names = devices.pick(keys, 9)
    sets = [set(keys[name]) for name in names]
    assert not any(one <= other for one in sets for other in sets if one is not other)
    assert keys == devices.device_keys(dict(reversed(nodes.items())), nothing)


def test_a_registry_picks_among_the_devices_that_resolve() -> None:
    def file(*names: str) -> bytes:
        devices_ = "".join(
            f'\n- {{name: "{n}", containerEdits: '
            f"{{deviceNodes: [{{path: /dev/g{n}, type: c, major: 195, minor: {n}}}]}}}}"
            for n in names
        )
        return f"cdiVersion: 0.5.0\nkind: v.com/gpu\ndevices:{devices_}\n".encode()

    registry = Registry.build(
        [
            ("/a", None, [("f.yaml", file("0", "1", "2"))]),
            ("/b", None, [("g.yaml", file("2", "3")), ("h.yaml", file("3", "4"))]),
        ]
    )
    assert registry.pick("v.com/gpu", 4, nothing) == [f"v.com/gpu={n}" for n in (0, 1, 2, 4)]
    with pytest.raises(CdiError, match="5 devices of v.com/gpu are asked for, but there are 4"):
        registry.pick("v.com/gpu", 5, nothing)
    with pytest.raises(CdiError, match="there are 0"):
        registry.pick("w.com/gpu", 1, nothing)
