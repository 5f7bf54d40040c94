"""[[policy.rule]], the lists of the policy, secrets, and `chandler policy check`: who may ask for what."""

from __future__ import annotations

import copy
import json
import os
import posix
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab.local_node import CONFIG, Node, P

from shim import engine
from shim.cli.main import main
from shim.errors import ChandlerError, ConfigError, PolicyError
from shim.node import config as configuration
from shim.oci.writer import apply
from shim.policy import classes, patterns, rules
from shim.policy.caller import Caller
from shim.request import parse, schema
from shim.shapes import Config

CONTAINERD = {
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.sandbox-namespace": "team-a-1",
    "io.kubernetes.cri.sandbox-name": "pod",
    "io.kubernetes.cri.container-name": "main",
    "io.kubernetes.cri.image-name": "registry.example/team/app:1",
}
CRIO = {
    "io.kubernetes.cri-o.ContainerType": "container",
    "io.kubernetes.pod.namespace": "team-a-1",
    "io.kubernetes.pod.name": "pod",
    "io.kubernetes.container.name": "main",
}
KNOWN: Any = {"handler": "chandler", "user": ("0", "root")}


def called(engine_name: str) -> Any:
    """What the front end knows, including the calling engine."""
    return {**KNOWN, "caller": Caller(engine_name or "other")}


def compiled(text: str) -> Config:
    return configuration.compile_config([("/c.toml", text.encode())])


def service(document: Any) -> dict[str, str]:
    return {P + "service": json.dumps(document)}


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("", "", True),
        ("*", "", True),
        ("*", "x/y", True),
        ("a*", "a", True),
        ("a*", "ab", True),
        ("a*", "ba", False),
        ("*a", "ba", True),
        ("*a", "ab", False),
        ("a*b*c", "a-b-b-c", True),
        ("a*b*c", "acb", False),
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("a*a", "a", False),
        ("**", "x", True),
        ("a**b", "ab", True),
        ("?*", "", False),
        ("x", "", False),
        ("[a]", "a", False),
        ("*-x-*", "a-x-b", True),
        ("*ab*ab", "ab", False),
        ("*ab*ab", "abab", True),
    ],
)
def test_glob(pattern: str, text: str, fits: bool) -> None:
    assert patterns.glob(pattern, text) is fits


@given(st.text("ab*?", max_size=6), st.text("ab", max_size=8))
def test_glob_is_that_of_the_shell(pattern: str, text: str) -> None:
    from fnmatch import fnmatchcase

    assert patterns.glob(pattern, text) == fnmatchcase(text, pattern)


# --- identity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine_name", "annotations", "known"),
    [
        ("containerd", CONTAINERD, {"namespace", "pod", "container", "image"}),
        ("crio", CRIO, {"namespace", "pod", "container"}),
        ("", {**CONTAINERD, **CRIO}, set()),
        ("docker", {**CONTAINERD, **CRIO}, set()),
        ("podman", {**CONTAINERD, **CRIO}, set()),
        ("crio", CONTAINERD, set()),
        ("containerd", CRIO, set()),
        ("containerd", {key: value for key, value in CONTAINERD.items() if "type" not in key}, set()),
        ("containerd", {**CONTAINERD, "io.kubernetes.cri.sandbox-namespace": 5}, {"pod", "container", "image"}),
        (
            "crio",
            {
                **CRIO,
                "org.opencontainers.image.title": "x",
                "io.kubernetes.cri.image-name": "x",
                "io.kubernetes.cri-o.ImageName": "x",
            },
            {"namespace", "pod", "container"},
        ),
    ],
)
def test_identity(engine_name: str, annotations: dict[str, Any], known: set[str]) -> None:
    assert set(rules.identity(annotations, engine_name, {})) == known
    assert set(rules.identity(annotations, engine_name, KNOWN)) == known | {"handler", "user"}


RULES = """
[policy]
allow = ["gpu"]
[[policy.rule]]
name = "team-a"
match = {namespace = ["team-a-*"]}
allow = ["gpu", "env", "hostname"]
max-gpus = 1
[[policy.rule]]
name = "later"
match = {namespace = ["team-*"], handler = ["chandler*"]}
allow = ["sysctls"]
deny = ["gpu.count"]
"""


def decided(engine_name: str, annotations: dict[str, Any]) -> Config:
    return rules.applied(
        compiled((f'engine = "{engine_name}"' if engine_name else "") + RULES), annotations, called(engine_name)
    )


@pytest.mark.parametrize(("engine_name", "annotations"), [("containerd", CONTAINERD), ("crio", CRIO)])
def test_the_first_rule_replaces_keys_and_every_denial_stays(engine_name: str, annotations: dict[str, Any]) -> None:
    found = decided(engine_name, annotations)
    assert (found["policy.by"], found["policy.allow"], found["policy.max-gpus"]) == (
        "rule 'team-a'",
        ["gpu", "env", "hostname"],
        1,
    )
    assert found["policy.kinds"] == compiled("")["policy.kinds"], "keys that a rule does not set stay"
    assert found["policy.denied-by"] == {"gpu.count": "rule 'later'"}


FORGED: list[tuple[str, dict[str, Any]]] = [
    ("crio", CONTAINERD),
    ("crio", {**CRIO, **CONTAINERD, "io.kubernetes.pod.namespace": "other"}),
    ("docker", CONTAINERD),
    ("docker", {**CONTAINERD, **CRIO}),
    ("podman", CRIO),
    ("", CONTAINERD),
    ("", CRIO),
    ("containerd", CRIO),
    ("containerd", {**CONTAINERD, **CRIO, "io.kubernetes.cri.sandbox-namespace": "other"}),
]


@pytest.mark.parametrize(("engine_name", "annotations"), FORGED)
def test_a_forged_namespace_grants_nothing(engine_name: str, annotations: dict[str, Any]) -> None:
    found = decided(engine_name, annotations)
    assert "policy.by" not in found and found["policy.allow"] == ["gpu"] and found["policy.max-gpus"] == 8
    namespaces = rules.identity(annotations, engine_name, {}).get("namespace")
    assert namespaces in (None, ("other",))
    assert found["policy.deny"] == ([] if namespaces else ["gpu.count"]), (
        "a rule still denies where its match is unknown"
    )


def test_a_rule_for_other_containers_has_no_effect() -> None:
    found = decided("containerd", {**CONTAINERD, "io.kubernetes.cri.sandbox-namespace": "other"})
    assert "policy.by" not in found and found["policy.deny"] == []
    handler = rules.applied(compiled(RULES), {}, {"handler": "runc"})
    assert handler["policy.deny"] == [], "a known value excludes the rule"


@pytest.mark.parametrize(
    ("match", "yes"),
    [
        ('handler = ["chandler"]', True),
        ('handler = ["runc"]', False),
        ('user = ["root"]', True),
        ('user = ["1000"]', False),
        ('image = ["registry.example/*"]', True),
        ('pod = ["pod"], container = ["side", "main"]', True),
        ('pod = ["pod"], container = ["side"]', False),
    ],
)
def test_fields_of_a_match(match: str, yes: bool) -> None:
    text = f'engine = "containerd"\n[[policy.rule]]\nname = "r"\nmatch = {{{match}}}\ntrust = "all"'
    assert (rules.applied(compiled(text), CONTAINERD, called("containerd"))["policy.trust"] == "all") is yes


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("match = {pod = ['x']}", "policy.rule number 1 has no name"),
        ("name = 'a'", "policy.rule 'a' has no match"),
        ("name = 'a'\nmatch = {}", "'a' has no match"),
        ("name = 'a'\nmatch = {pod = 'x'}", "'a': match.pod = 'x' is wrong"),
        ("name = 'a'\nmatch = {label = ['x']}", "match.label"),
        ("name = 'a'\nmatch = {pod = ['x']}\nallows = []", "unknown key 'allows'"),
        ("name = 'a'\nmatch = {pod = ['x']}\nallow = ['x']", "allow = ['x'] is wrong"),
        ("name = 'a'\nmatch = {pod = ['x']}\nrule = []", "unknown key 'rule'"),
        ("name = 'a'\nmatch = {pod = ['x']}\nevict-unadjusted = true", "unknown key 'evict-unadjusted'"),
    ],
)
def test_wrong_rules_are_named(rule: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compiled(f"[[policy.rule]]\n{rule}")
    assert words in str(caught.value) and str(caught.value).startswith("/c.toml: ")


def test_rules_of_later_files_come_after() -> None:
    rule = '[[policy.rule]]\nname = "{}"\nmatch = {{pod = ["x"]}}\n'
    found = configuration.compile_config([("/a", rule.format("a").encode()), ("/b", rule.format("b").encode())])
    assert [each["name"] for each in found["policy.rule"]] == ["a", "b"]


# --- the lists ------------------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(tmp_path, monkeypatch)
    for name in ("data/team-a/sub", "data/team-b", "secrets/team-a-1", "bundle/rootfs/etc", "vol"):
        (tmp_path / name).mkdir(parents=True)
    return made


def equip_with(
    node: Node,
    policy: str,
    document: Any,
    engine_name: str = "",
    more: str = "",
    annotations: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    text = f'engine = "{engine_name}"' if engine_name else ""
    node.configure(text, f"{more}\n[policy]\n{policy}".replace("@", str(node.directory)))
    asked = json.loads(json.dumps(document).replace("@", str(node.directory)))
    config = copy.deepcopy(CONFIG)
    config["linux"]["namespaces"] += [{"type": kind} for kind in ("uts", "network", "ipc")]
    config["annotations"] = dict(annotations or {})
    return node.equip(service(asked), config, called=engine_name)


BIND = {"storage": [{"type": "bind", "source": "@/data/team-a/sub", "target": "/d"}]}
NAMED = {"storage": [{"type": "named", "name": "data", "target": "/d"}]}
VOLUMES = '[volumes]\ndata = "@/vol"'
# document, what allows it, the same without its list (or None), words of the refusal then
REACH: list[tuple[Any, str, str | None, str]] = [
    (
        BIND,
        'allow = ["bind"]\nbind-sources = ["@/data/team-a"]',
        'allow = ["bind"]\nbind-sources = ["@/data/team"]',
        "bind-sources of [policy] has no prefix of ",
    ),
    (NAMED, 'allow = ["storage.named"]\nvolumes = ["da*"]', 'allow = ["storage"]', "volumes of [policy] has no data"),
    ({"storage": [{"type": "tmpfs", "target": "/t"}]}, 'allow = ["tmpfs"]', None, ""),
    (
        {"devices": ["/dev/null"]},
        'allow = ["devices"]\ndevices = ["/dev/n*"]',
        'allow = ["devices"]\ndevices = ["/dev/zero"]',
        "devices of [policy] has no /dev/null",
    ),
    (
        {"capabilities": ["CHOWN"]},
        'allow = ["capabilities"]\ncapabilities = ["chown"]',
        'allow = ["capabilities"]\ncapabilities = ["kill"]',
        "capabilities of [policy] has no CAP_CHOWN",
    ),
    (
        {"cgroup_parent": "/team/x"},
        'allow = ["cgroup_parent"]\ncgroup-parents = ["/team"]',
        'allow = ["cgroup_parent"]\ncgroup-parents = ["/te"]',
        "cgroup-parents of [policy] has no /team/x",
    ),
    (
        {"env": {"B": "$E:CHANDLER_TEST_VALUE"}},
        'host-variables = ["CHANDLER_*"]',
        'allow = ["env"]',
        "host-variables of [policy] has no CHANDLER_TEST_VALUE",
    ),
    ({"hostname": "x"}, 'allow = ["hostname"]', None, ""),
    ({"command": {"args": ["x"]}}, 'allow = ["command"]', None, ""),
    ({"user": "5"}, 'allow = ["user"]', None, ""),
    ({"extra_groups": [5]}, 'allow = ["extra_groups"]', None, ""),
    ({"sysctls": {"net.a": "1"}}, 'allow = ["sysctls"]', None, ""),
    ({"ulimits": {"core": 1}}, 'allow = ["ulimits"]', None, ""),
    ({"host_network": True}, 'allow = ["host_network"]', None, ""),
    ({"privileged": True}, 'allow = ["privileged"]', None, ""),
]
WORDS = {"env": "env.host"}


@pytest.mark.parametrize(("document", "allowed", "without", "words"), REACH, ids=[str(row[0])[:40] for row in REACH])
def test_each_key_needs_its_word(
    node: Node, monkeypatch: pytest.MonkeyPatch, document: Any, allowed: str, without: str | None, words: str
) -> None:
    monkeypatch.setitem(posix.environ, b"CHANDLER_TEST_VALUE", b"value-that-is-not-shown")
    assert equip_with(node, allowed, document, more=VOLUMES) is not None
    assert equip_with(node, 'trust = "all"', document, more=VOLUMES) is not None
    with pytest.raises(PolicyError) as caught:
        equip_with(node, "", document, more=VOLUMES)
    assert " is not allowed: allow of [policy] has no " in str(caught.value) or "host-variables" in str(caught.value), (
        "denied by default"
    )
    if without is not None:
        with pytest.raises(PolicyError) as caught:
            equip_with(node, without, document, more=VOLUMES)
        assert words in str(caught.value) and "value-that" not in str(caught.value)
    (key,) = document
    word = WORDS.get(key, key)
    for policy in (allowed, 'trust = "all"'):
        with pytest.raises(PolicyError, match=f"is refused by '{word}' in deny of .policy."):
            equip_with(node, f'{policy}\ndeny = ["{word}"]', document, more=VOLUMES)


@pytest.mark.parametrize(
    "document",
    [
        {"cap_drop": ["CAP_KILL"]},
        {"read_only_root_fs": True},
        {"privileged": False},
        {"host_network": False},
        {"resources": {"hugepages": {"2Mi": 1}}},
        {"resources": {"oom_score_adj": 1}},
    ],
)
def test_keys_that_tighten_need_no_word(node: Node, document: Any) -> None:
    assert equip_with(node, 'allow = ["resources"]', document) is not None


@pytest.mark.parametrize("target", ["/proc", "/proc/sys", "/sys", "/sys/fs/cgroup/x"])
def test_files_of_the_kernel_cannot_be_mounted_over(node: Node, target: str) -> None:
    with pytest.raises(PolicyError, match="is the kernel's and cannot be mounted over"):
        equip_with(node, 'allow = ["storage"]', {"storage": [{"type": "tmpfs", "target": target}]})


def test_max_cpu_and_max_memory(node: Node) -> None:
    policy = 'max-cpu = "1500m"\nmax-memory = "512Mi"'
    assert equip_with(node, policy, {"resources": {"cpu": "1.5", "memory": "512Mi", "memory_swap": "512Mi"}})
    for asked, words in (
        ({"cpu": 2}, "resources.cpu = 2000m is above max-cpu of [policy], 1500m"),
        ({"memory": "513Mi"}, "max-memory"),
        ({"memory_swap": -1}, "resources.memory_swap = -1 is above max-memory"),
    ):
        with pytest.raises(PolicyError) as caught:
            equip_with(node, policy, {"resources": asked})
        assert words in str(caught.value)
        assert equip_with(node, policy + '\ntrust = "all"', {"resources": asked})


@pytest.mark.parametrize("kind", ["link", "link inside", "dots", "link below", "others write", "missing"])
def test_bind_sources_are_resolved_before_they_are_compared(node: Node, kind: str) -> None:
    base = node.directory / "data/team-a"
    source = str(base / "x")
    if kind == "link":
        (base / "x").symlink_to("/etc")
    elif kind == "link inside":
        (base / "x").symlink_to(base / "sub")
    elif kind == "dots":
        source = f"{base}/../team-b"
    elif kind == "link below":
        (base / "l").symlink_to(node.directory / "data/team-b")
        source = str(base / "l/x")
    elif kind == "others write":
        (base / "w").mkdir()
        (base / "w/x").mkdir()
        (base / "w").chmod(0o777)
        source = str(base / "w/x")
    with pytest.raises(ChandlerError) as caught:
        equip_with(
            node,
            f'allow = ["bind"]\nbind-sources = ["{base}"]',
            {"storage": [{"type": "bind", "source": source, "target": "/d"}]},
        )
    assert "storage" in str(caught.value)


# --- secrets --------------------------------------------------------------------------------------------------

VALUE = "hunter2-and-more"
SECRET = {"env": {"TOKEN": "$S:token"}}
ALLOWED = 'allow = ["env"]\nsecrets = ["tok*"]'


def put_secret(node: Node, name: str = "secrets/token") -> None:
    node.put(name, VALUE + "\n")
    (node.directory / name).chmod(0o400)


def test_a_secret_from_a_directory(node: Node) -> None:
    put_secret(node)
    result = equip_with(node, ALLOWED, SECRET, more='[secrets]\ndirectory = "@/secrets"')
    assert result is not None and f"TOKEN={VALUE}" in result["process"]["env"]


def test_secrets_of_a_scope(node: Node) -> None:
    put_secret(node, "secrets/team-a-1/token")
    scoped = '[secrets]\ndirectory = "@/secrets/{scope}"'
    result = equip_with(node, ALLOWED, SECRET, "containerd", scoped, CONTAINERD)
    assert result is not None and f"TOKEN={VALUE}" in result["process"]["env"]
    for engine_name, forged in FORGED[:6]:
        with pytest.raises(ChandlerError, match="env.TOKEN: the secret token ") as caught:
            equip_with(node, ALLOWED, SECRET, engine_name, scoped, forged)
        assert VALUE not in str(caught.value)
    with pytest.raises(ChandlerError, match="is no name of a secret"):
        equip_with(
            node,
            ALLOWED,
            SECRET,
            "containerd",
            scoped,
            {**CONTAINERD, "io.kubernetes.cri.sandbox-namespace": "../team-a-1"},
        )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (f"echo {VALUE}", ""),
        (f"echo {VALUE}; exit 3", "ended with status 3"),
        (f"echo {VALUE} >&2; exit 1", "ended with status 1"),
        (f"printf '{VALUE}\\000'", "holds a NUL"),
        (f"printf '{VALUE}\\377'", "is not UTF-8"),
        (f"echo {VALUE}; exec head -c 70000 /dev/zero", "has more than 65536 bytes"),
        ('test "$1" = token || exit 9; test -z "$HOME" || exit 8; echo ' + VALUE, ""),
    ],
)
def test_a_secret_from_a_command(node: Node, script: str, words: str) -> None:
    node.put("provider", f"#!/bin/sh\n{script}\n")
    (node.directory / "provider").chmod(0o755)
    more = '[secrets]\ncommand = ["@/provider"]'
    if not words:
        result = equip_with(node, ALLOWED, SECRET, more=more)
        assert result is not None and f"TOKEN={VALUE}" in result["process"]["env"]
        return
    with pytest.raises(ChandlerError, match=words) as caught:
        equip_with(node, ALLOWED, SECRET, more=more)
    assert VALUE not in str(caught.value) and "env.TOKEN" in str(caught.value)


def test_a_provider_that_others_can_write_is_not_run(node: Node) -> None:
    node.put("provider", "#!/bin/sh\necho x\n")
    (node.directory / "provider").chmod(0o777)
    with pytest.raises(ChandlerError, match="can be written by others"):
        equip_with(node, ALLOWED, SECRET, more='[secrets]\ncommand = ["@/provider"]')
    put_secret(node)
    (node.directory / "secrets/token").chmod(0o666)
    with pytest.raises(ChandlerError, match="can be written by others"):
        equip_with(node, ALLOWED, SECRET, more='[secrets]\ndirectory = "@/secrets"')


@pytest.mark.parametrize("form", ["text", "json"])
def test_explain_shows_no_secret(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    put_secret(node)
    monkeypatch.setitem(posix.environ, b"CHANDLER_TEST_VALUE", b"of-the-host")
    asked = {"env": {"TOKEN": "$S:token", "HOSTS": "$E:CHANDLER_TEST_VALUE", "PLAIN": "shown"}}
    node.configure(
        "", f'[secrets]\ndirectory = "{node.directory}/secrets"\n[policy]\nsecrets = ["*"]\nhost-variables = ["*"]'
    )
    node.put("bundle/config.json", json.dumps({**CONFIG, "annotations": service(asked)}))
    assert main(["explain", "--bundle", str(node.directory / "bundle"), "--format", form]) == 0
    shown = capsys.readouterr().out
    assert (
        VALUE not in shown
        and "of-the-host" not in shown
        and "TOKEN=***" in shown
        and "HOSTS=***" in shown
        and "PLAIN=shown" in shown
    )
    for directory, _, names in os.walk(node.directory / "state"):
        for name in names:
            assert VALUE.encode() not in (Path(directory) / name).read_bytes()


# --- chandler policy check ------------------------------------------------------------------------------------


def test_policy_check(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.configure('engine = "containerd"', RULES)
    node.put(
        "bundle/config.json",
        json.dumps({**CONFIG, "annotations": {**CONTAINERD, **service({"user": "5", "env": {"A": "b"}})}}),
    )
    arguments = [
        "policy",
        "check",
        "--config",
        str(node.directory / "bundle/config.json"),
        "--handler",
        "chandler",
        "--engine",
        "containerd",
    ]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert shown.startswith(
        "engine      containerd (--engine says so); its identity annotations are believed; "
        "taken from the image: nothing\n"
    )
    assert (
        "* rule 'team-a' matches: namespace team-a-1" in shown
        and "  rule 'later' matches: namespace team-a-1, handler chandler; it denies gpu.count" in shown
    )
    assert (
        "decided by  rule 'team-a'" in shown
        and "asked for   user (dangerous)" in shown
        and "allow of rule 'team-a' has no 'user'" in shown
    )
    node.put(
        "bundle/config.json", json.dumps({**CONFIG, "annotations": {**CRIO, **service({"resources": {"gpu": {}}})}})
    )
    assert main([*arguments, "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (
        found["by"] == "[policy]"
        and "namespace" in found["unknown"]
        and [rule["verdict"] for rule in found["rules"]] == ["cannot be told"] * 2
    )
    assert (
        found["policy"]["deny"] == ["gpu.count"]
        and "a count of 1, the default) is refused by 'gpu.count' in deny of rule 'later'" in found["refusal"]
    )


# --- properties -----------------------------------------------------------------------------------------------

documents = st.fixed_dictionaries(
    {},
    optional={
        "env": st.dictionaries(st.sampled_from(["A", "B", "C"]), st.sampled_from(["", "x", "y=z"]), min_size=1),
        "command": st.fixed_dictionaries({"args": st.lists(st.sampled_from(["a", "b"]), min_size=1)}),
        "capabilities": st.lists(st.sampled_from(["CHOWN", "cap_kill", "ALL"]), min_size=1),
        "cap_drop": st.lists(st.sampled_from(["CHOWN", "KILL", "ALL"]), min_size=1),
        "privileged": st.booleans(),
        "host_network": st.booleans(),
        "hostname": st.sampled_from(["a", "b.c"]),
        "user": st.sampled_from(["1", "0:0", "7:8"]),
        "ulimits": st.dictionaries(st.sampled_from(["core", "nofile"]), st.sampled_from([0, "1:2", -1]), min_size=1),
        "read_only_root_fs": st.booleans(),
        "extra_groups": st.lists(st.integers(0, 5), min_size=1),
        "devices": st.just(["/dev/null"]),
        "storage": st.just([{"type": "tmpfs", "target": "/t", "size": "1Mi", "mode": "1777"}]),
        "cgroup_parent": st.just("/team"),
        "resources": st.fixed_dictionaries(
            {},
            optional={
                "oom_score_adj": st.integers(-5, 5),
                "blkio_weight": st.integers(10, 1000),
                "cpu": st.sampled_from(["500m", 2]),
                "memory": st.sampled_from(["1Mi", 4096]),
                "hugepages": st.just({"2Mi": "4Mi"}),
            },
        ),
    },
)
# word: the members of config.json that it may change
PLACES = {
    "env": {"process.env"},
    "command": {"process.args", "process.cwd"},
    "capabilities": {"process.capabilities"},
    "cap_drop": {"process.capabilities"},
    "hostname": {"hostname"},
    "user": {"process.user"},
    "extra_groups": {"process.user"},
    "ulimits": {"process.rlimits"},
    "read_only_root_fs": {"root"},
    "devices": {"linux.devices", "linux.resources"},
    "storage": {"mounts"},
    "cgroup_parent": {"linux.cgroupsPath"},
    "host_network": {"linux.namespaces", "linux.sysctl"},
    "resources": {"linux.resources", "process.oomScoreAdj"},
    "privileged": {
        "process.capabilities",
        "process.noNewPrivileges",
        "process.apparmorProfile",
        "linux.maskedPaths",
        "linux.readonlyPaths",
        "linux.seccomp",
        "linux.resources",
        "mounts",
    },
}
TRUSTING = compiled('[policy]\ntrust = "all"')
BASE: dict[str, Any] = copy.deepcopy(CONFIG)
BASE["linux"]["namespaces"] += [{"type": kind} for kind in ("uts", "network", "ipc")]
BASE["process"]["rlimits"] = [{"type": "RLIMIT_CORE", "hard": 5, "soft": 5}]


class EmptyInventory:
    """An inventory without devices."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def kinds(self) -> list[str]:
        return []

    def picks(self, kind: str) -> list[str]:
        return []

    def lookup(self, name: str) -> None:
        return None


def planned(document: Any, config: Config) -> dict[str, Any] | None:
    """config.json afterwards; None when the request is refused."""
    base = {**BASE, "annotations": service(document)}
    try:
        made = engine.plan(base, EmptyInventory(config), call_facts={"id": "c", "bundle": "/nowhere"})  # type: ignore[arg-type]
    except PolicyError:
        return None
    assert made is not None
    return apply(base, made.edits)


def members(config: dict[str, Any]) -> dict[str, Any]:
    """The members of config.json, with those of process and linux one by one, as in PLACES."""
    found = {f"{key}.{inner}": value for key in ("process", "linux") for inner, value in config[key].items()}
    return {**found, **{key: value for key, value in config.items() if key not in ("process", "linux", "annotations")}}


def changed_members(after: dict[str, Any]) -> set[str]:
    before, now = members(BASE), members(after)
    return {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}


def places_of(words: set[str]) -> set[str]:
    return {place for word in words for place in PLACES[word]}


easy = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


@easy
@given(documents)
def test_only_what_is_asked_for_changes(document: dict[str, Any]) -> None:
    after = planned(document, TRUSTING)
    assert after is None or changed_members(after) <= places_of(set(document))


@easy
@given(
    documents,
    st.lists(st.sampled_from(sorted(set(PLACES) - {"devices"})), max_size=6, unique=True),
    st.lists(st.sampled_from(sorted(PLACES)), max_size=3, unique=True),
)
def test_deny_wins_and_only_allowed_keys_change_anything(
    document: dict[str, Any], allow: list[str], deny: list[str]
) -> None:
    config = compiled(
        f"[policy]\nallow = {json.dumps(allow)}\ndeny = {json.dumps(deny)}\n"
        'capabilities = ["ALL"]\ncgroup-parents = ["/team"]'
    )
    after = planned(document, config)
    if after is None:
        return
    request = parse.Request(schema.check(document), "a")
    asked = {word.partition(".")[0] for word, _, _ in classes.asked(request, BASE)} | {
        key for key in ("env", "resources") if document.get(key)
    }
    assert not asked & set(deny)
    assert planned(document, {**TRUSTING, "policy.deny": deny}) is not None, "trust = all must not allow less"
    assert changed_members(after) <= places_of(
        (set(allow) | {"cap_drop", "read_only_root_fs", "ulimits"}) & document.keys()
    )


@easy
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "cap_drop": st.lists(st.sampled_from(["KILL", "CHOWN", "ALL"]), min_size=1),
            "read_only_root_fs": st.booleans(),
            "ulimits": st.fixed_dictionaries({"core": st.integers(-1, 9)}),
            "resources": st.fixed_dictionaries({"oom_score_adj": st.integers(-9, 9)}),
        },
    )
)
def test_keys_that_tighten_never_loosen(document: dict[str, Any]) -> None:
    after = planned(document, compiled(""))
    if after is None:
        return
    for key, names in after["process"]["capabilities"].items():
        assert set(names) <= set(BASE["process"]["capabilities"].get(key, ()))
    assert after["root"]["readonly"] is True
    assert all(limit["hard"] <= 5 and limit["soft"] <= 5 for limit in after["process"]["rlimits"])
    assert after["process"].get("oomScoreAdj", 0) >= 0


@easy
@given(documents)
def test_a_printed_request_parses_to_itself(document: dict[str, Any]) -> None:
    normal = schema.check(document)
    written = copy.deepcopy(normal)
    if "cpu" in written.get("resources", ()):
        written["resources"]["cpu"] = f"{written['resources']['cpu']}m"
    assert schema.check(parse.parse_document(json.dumps(written))) == normal
