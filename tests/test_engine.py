"""shim.engine and the wrapper around it, in this process: from config.json to what the runtime would read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lab import partial
from lab.local_node import CONFIG, NVIDIA, PROCESS, Front, Node, P, devices, service, unasked

from shim import engine, jsontext
from shim.errors import BundleError, ChandlerError, PolicyError
from shim.host import files


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    return Node(tmp_path, monkeypatch)


def test_two_gpus(node: Node) -> None:
    result = node.equip(service({"resources": {"gpu": {"count": 2}, "memory": "512Mi"}, "env": {"A": "b"}}))
    assert result is not None
    assert devices(result) == ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia1"]
    assert result["process"]["env"] == ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=void", "A=b", "CUDA_VISIBLE_DEVICES=0,1"]
    assert result["linux"]["resources"]["memory"] == {"limit": 512 << 20}
    assert result["mounts"][-1]["destination"] == "/usr/lib/libcuda.so.1"
    assert result["hooks"] == {
        "createContainer": [{"path": "/bin/true", "args": ["true"], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}]
    }
    assert result["annotations"][P + "granted"] == f"{NVIDIA}=0,{NVIDIA}=1"
    assert unasked(result) == unasked(CONFIG)


@pytest.mark.parametrize(
    "annotations",
    [
        {},
        {"other/x": "y"},
        {P + "services": '{"side": {}}'},
        {P + "service": "{", "io.kubernetes.cri.container-type": "sandbox"},
        {"cdi.k8s.io/x": f"{NVIDIA}=0"},
    ],
)
def test_a_container_without_a_request_is_not_equipped(node: Node, annotations: dict[str, str]) -> None:
    assert node.equip(annotations) is None


@pytest.mark.parametrize("annotations", [None, [], "x", 5])
def test_annotations_of_odd_shape(node: Node, annotations: Any) -> None:
    assert engine.plan({"annotations": annotations}, node.compiled()) is None


@pytest.mark.parametrize("process", [None, [], "x", 5])
def test_no_process_to_equip(node: Node, process: Any) -> None:
    with pytest.raises(BundleError, match="annotation chandler.oci/service: config.json has no process to equip"):
        node.equip(service({"env": {"A": "b"}}), {**CONFIG, "process": process})


def test_cdi_annotations_where_the_configuration_says_so(node: Node) -> None:
    node.configure("", "annotations = true")
    assert devices(node.equip({"cdi.k8s.io/x": f"{NVIDIA}=2"})) == ["/dev/nvidiactl", "/dev/nvidia2"]
    assert devices(
        node.equip({"cdi.k8s.io/x": f"{NVIDIA}=2", **service({"resources": {"gpu": {"devices": ["0"]}}})})
    ) == ["/dev/nvidiactl", "/dev/nvidia2", "/dev/nvidia0"]
    for value in (f"{NVIDIA}=all", f"{NVIDIA}=9", "", f"{NVIDIA}=0,", "x", f"{NVIDIA}=0,{NVIDIA}=GPU-0"):
        with pytest.raises(ChandlerError):
            node.equip({"cdi.k8s.io/x": value})
    node.configure("", 'annotations = true\n[policy]\nallow = ["env"]')
    with pytest.raises(PolicyError):
        node.equip({"cdi.k8s.io/x": f"{NVIDIA}=0"})


@pytest.mark.parametrize(
    ("policy", "document", "rule"),
    [
        ("max-gpus = 1", {"resources": {"gpu": {"count": 2}}}, "max-gpus"),
        ('kinds = ["amd.com/gpu"]', {"resources": {"gpu": {}}}, "kinds"),
        ('allow = ["gpu"]', {"env": {"A": "b"}}, "allow"),
        ('deny = ["gpu"]', {"resources": {"gpu": {}}}, "deny"),
        ("", {"resources": {"gpu": {"devices": ["all"]}}}, "gpu.all"),
        ("", {"resources": {"memory": "2Gi"}}, "loosens"),
        ('allow = ["gpu", "gpu.all"]\nmax-gpus = 3', {"resources": {"gpu": {"devices": ["all"]}}}, "max-gpus"),
    ],
)
def test_policy(node: Node, policy: str, document: dict[str, Any], rule: str) -> None:
    node.configure("", f"[policy]\n{policy}")
    with pytest.raises(PolicyError, match=rule):
        node.equip(service(document))


def test_another_prefix(node: Node) -> None:
    node.configure('annotation-prefix = "x.org/"')
    assert node.equip(service({"env": {"A": "b"}})) is None
    result = node.equip({"x.org/service": '{"env": {"A": "b"}}'})
    assert result is not None and result["annotations"]["x.org/granted"] == ""
    at = node.compiled().config
    assert engine.request_texts(at) == [b"x.org"]
    assert engine.mark(at) in jsontext.dumps(result)


def test_needles() -> None:
    assert engine.request_texts(partial({"annotation-prefix": P, "cdi.annotations": True})) == [
        b"chandler.oci",
        b"cdi.k8s.io",
    ]


# --- through the front end ------------------------------------------------------------------------------------

# For tests that create one container again and again in one process, which stays.
FIXED = '[gpu]\nallocator = "fixed"\n'


@pytest.fixture
def front(node: Node, capfd: pytest.CaptureFixture[str]) -> Front:
    return Front(node, capfd)


def test_create(front: Front) -> None:
    before = front.write(service({"resources": {"gpu": {"count": 2}}}))
    front.create()
    result = front.result()
    assert devices(result) == ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia1"]
    assert unasked(result) == unasked(CONFIG)
    record = front.grant()
    assert record is not None
    assert (record["id"], record["root"], record["devices"]) == (
        "c",
        str(front.node.directory / "root"),
        [f"{NVIDIA}=0", f"{NVIDIA}=1"],
    )
    assert record["physical"] == ["c195:0", "c195:1"]
    assert (record["before"], record["after"]) == (files.digest(before), files.digest(front.config.read_bytes()))
    assert (record["runtime"], record["source"]) == (str(front.node.directory / "bin/runc"), f"annotation {P}service")


def test_the_front_end_and_the_engine_agree(front: Front) -> None:
    front.node.configure("", FIXED)
    asked = service({"resources": {"gpu": {"devices": ["GPU-3"]}, "cpu": "1.5"}, "env": {"Ä": "\u2028"}})
    front.write(asked)
    front.create()
    assert front.result() == front.node.equip(asked)


def test_ten_creates_give_exactly_what_each_asks_for(front: Front) -> None:
    front.node.configure("", FIXED)
    front.write(service({"resources": {"gpu": {"count": 1}}}))
    for n in range(10):
        front.create()
        assert devices(front.result()) == ["/dev/nvidiactl", *(f"/dev/nvidia{number}" for number in range(n % 3 + 1))]
        front.write(service({"resources": {"gpu": {"count": (n + 1) % 3 + 1}}}))  # the engine makes the bundle anew


def test_repeated_creates_of_a_bundle_give_the_same_bytes(front: Front) -> None:
    front.node.configure("", FIXED)
    front.write(service({"resources": {"gpu": {"count": 2}}}))
    front.create()
    first = front.config.read_bytes()
    for _ in range(3):
        front.create()
        assert front.config.read_bytes() == first


@pytest.mark.parametrize(
    "config", [b"", b"{", b"[]", b"\xff", b'{"annotations": {}}', b'{"annotations": {"other": "x"}}']
)
def test_a_config_without_a_request_is_not_read(front: Front, config: bytes) -> None:
    front.config.write_bytes(config)
    front.create()
    assert front.config.read_bytes() == config and front.grant() is None
    assert os.listdir(front.config.parent) == ["config.json"]


def test_the_prefix_outside_annotations_is_no_request(front: Front) -> None:
    document = {**CONFIG, "process": {**PROCESS, "args": ["echo", P + "service"]}}
    before = front.write({}, document)
    front.create()
    assert front.config.read_bytes() == before and front.grant() is None


@pytest.mark.parametrize(
    "text",
    [
        '["chandler.oci/"]',
        '"chandler.oci/"',
        '{"chandler.oci/": ',
        '{"annotations": {"chandler.oci/service": NaN}}',
        "\x00chandler.oci/",
        '{"a": 1} chandler.oci/',
        "[" * 100_000 + "chandler.oci/",
        '{"annotations": {"chandler.oci/service": "{}"}, "process": 5}',
    ],
)
def test_damaged_files_with_a_mention_are_refused(front: Front, text: str) -> None:
    front.config.write_text(text)
    assert "config.json" in front.refused()
    assert front.grant() is None


@pytest.mark.parametrize(
    "document",
    [
        "{",
        {"x": 1},
        {"env": {"LD_PRELOAD": "x"}},
        {"resources": {"gpu": {"count": 9}}},
        {"resources": {"gpu": {"devices": ["all"]}}},
        {"resources": {"memory": "2Gi"}},
    ],
)
def test_refusals_leave_everything_as_it_was(front: Front, document: Any) -> None:
    front.write({P + "service": document} if isinstance(document, str) else service(document))
    assert f"annotation {P}service: " in front.refused()
    assert front.grant() is None


def test_half_a_surrogate_pair_in_a_key_is_refused(front: Front) -> None:
    front.write({P + "\ud800": "x"})
    assert "is no Unicode text" in front.refused()


def test_a_second_refused_create_keeps_the_first(front: Front) -> None:
    front.write(service({"resources": {"gpu": {}}}))
    front.create()
    grant = front.grant()
    front.started = []
    front.node.configure("", FIXED + '[policy]\ndeny = ["gpu"]')
    assert "deny" in front.refused()
    assert front.grant() == grant


def test_a_runtime_that_does_not_start(front: Front) -> None:
    before = front.write(service({"resources": {"gpu": {}}}))
    front.binary_starts = False
    with pytest.raises(SystemExit):
        front.main("c")
    assert "cannot be started: Exec format error" in front.log.read_text()
    assert front.config.read_bytes() == before, "the engine's own file must be restored"


def test_a_name_that_holds_a_lease_is_not_created_again(front: Front) -> None:
    front.write(service({"resources": {"gpu": {}}}))
    front.create()
    grant = front.grant()
    front.started = []
    assert f"a container of this name is there already: c holds {NVIDIA}=0 since" in front.refused()
    assert front.grant() == grant


def test_a_restored_container_has_the_devices_that_it_had(front: Front) -> None:
    for name, count in (("a", 1), ("b", 2)):
        front.write(service({"resources": {"gpu": {"count": count}}}))
        front.create(name)
    granted = front.result()["annotations"][P + "granted"]
    assert granted == f"{NVIDIA}=1,{NVIDIA}=2"
    front.ends("a", "b")
    front.write(service({"resources": {"gpu": {"count": 2}}}))
    front.restore("b")
    assert front.result()["annotations"][P + "granted"] == granted, (
        "the devices that it had, though lower ones are free"
    )
    front.ends("b")
    front.write(service({"resources": {"gpu": {"devices": ["2"]}}}))
    front.create("c")
    front.write(service({"resources": {"gpu": {"count": 2}}}))
    with pytest.raises(SystemExit):
        front.restore("b")
    assert f"{NVIDIA}=2 is not free: c holds" in front.log.read_text()


def test_a_secret_is_read_without_holding_the_ledger(front: Front) -> None:
    """The secret's command fails if the ledger's lock is held meanwhile."""
    if not os.access("/usr/bin/flock", os.X_OK):
        pytest.skip("not installed: flock")
    lock = f"{front.node.directory}/state/leases.lock"
    front.node.configure(
        "",
        '[policy]\nsecrets = ["*"]\nallow = ["gpu", "env"]\n'
        f'[secrets]\ncommand = ["/usr/bin/flock", "--nonblock", "{lock}", "/bin/echo", "{{name}}"]\n',
    )
    front.write(service({"resources": {"gpu": {}}, "env": {"TOKEN": "$S:the-secret"}}))
    front.create()
    assert "TOKEN=the-secret" in front.result()["process"]["env"]


def test_a_create_without_a_grant_record_is_refused(front: Front) -> None:
    front.write(service({"resources": {"gpu": {}}}))
    (front.node.directory / "state/grants").touch()
    assert "the grant cannot be recorded" in front.refused()


def test_a_wrong_configuration_refuses_creates(front: Front) -> None:
    front.write(service({"env": {"A": "b"}}))
    front.node.configure("zzz = 1")
    assert "unknown key 'zzz'" in front.refused()


def test_one_line_for_each_edited_create(front: Front) -> None:
    own = front.node.directory / "own.log"
    front.node.configure("", f'[log]\nfile = "{own}"')
    front.write({})
    front.create()
    assert not own.exists()
    front.write(service({"resources": {"gpu": {"count": 2}}, "env": {"A": "b"}}))
    front.create("id-1")
    (line,) = own.read_text().splitlines()
    record = json.loads(line)
    assert (record["container"], record["devices"], record["source"]) == (
        "id-1",
        [f"{NVIDIA}=0", f"{NVIDIA}=1"],
        f"annotation {P}service",
    )
    assert record["runtime"].endswith("/bin/runc") and record["after"] == files.digest(front.config.read_bytes())
    assert record["edits"] == {"env": 3, "device": 3, "mount": 1, "hook": 2, "annotation": 1}, (
        "one of the hooks is the lease's"
    )
    assert type(record["ms"]) is int


def test_secrets_are_not_logged(front: Front) -> None:
    own = front.node.directory / "own.log"
    front.node.configure("", f'[log]\nfile = "{own}"')
    front.write(service({"env": {"TOKEN": "s3cret"}}))
    front.create()
    assert "s3cret" not in own.read_text()
    assert "s3cret" not in json.dumps(front.grant())
