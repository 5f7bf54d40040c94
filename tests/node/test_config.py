"""The configuration: every key with good and bad values, and errors that help."""

from __future__ import annotations

from typing import Any

import pytest

from shim.errors import ConfigError
from shim.keys import common, table
from shim.node import config
from shim.policy.classes import known_words
from shim.shapes import Config


def compiled(*texts: str) -> Any:
    return config.compile_config([(f"/etc/{n}.toml", text.encode()) for n, text in enumerate(texts)])


def toml(key: str, value: str) -> str:
    table, dot, name = key.rpartition(".")
    return f"[{table}]\n{name} = {value}\n" if dot else f"{key} = {value}\n"


GOOD: dict[str, list[tuple[str, Any]]] = {
    "runtimes": [('["crun"]', ["crun"]), ('["/usr/bin/runc", "youki"]', ["/usr/bin/runc", "youki"])],
    "annotation-prefix": [('"example.com/"', "example.com/"), ('"a-b.c1/"', "a-b.c1/")],
    "state-dir": [('"/var/x"', "/var/x")],
    "engine": [
        ('"containerd"', ["containerd"]),
        ('"crio"', ["crio"]),
        ('"podman"', ["podman"]),
        ('"docker"', ["docker"]),
    ],
    "engines": [
        ("[]", []),
        ('["crio", "containerd", "crio"]', ["crio", "containerd"]),
        ('["podman", "docker", "other"]', ["podman", "docker", "other"]),
    ],
    "cdi.spec-dirs": [('["/a", "/b/c"]', ["/a", "/b/c"]), ("[]", [])],
    "cdi.annotations": [("true", True), ("false", False)],
    "kubernetes.resources": [
        ("{}", {}),
        (
            '{amd = "amd.com/gpu", "example.com/npu" = "example.com/NPU_1"}',
            {"amd": "amd.com/gpu", "example.com/npu": "example.com/NPU_1"},
        ),
    ],
    "gpu.allocator": [('"fixed"', "fixed")],
    "gpu.fallback": [('"off"', "off"), ('"devices"', "devices")],
    "gpu.mps": [('"off"', "off"), ('"external"', "external"), ('"managed"', "managed")],
    "gpu.mps-pipe-dir": [('"/run/mps"', "/run/mps")],
    "gpu.mps-shm-dir": [('"/run/shm"', "/run/shm")],
    "gpu.mps-limits": [('"advisory"', "advisory"), ('"enforced"', "enforced")],
    "gpu.mps-patience": [("1", 1), ("60", 60)],
    "gpu.max-sharers": [("0", 0), ("4", 4)],
    "gpu.mps-control": [('"/opt/mps"', "/opt/mps")],
    "gpu.nvidia-smi": [('"/opt/smi"', "/opt/smi")],
    "log.file": [('""', ""), ('"journal"', "journal"), ('"/var/log/x"', "/var/log/x")],
    "policy.trust": [('"all"', "all"), ('"policy"', "policy")],
    "policy.allow": [
        ("[]", []),
        ('["gpu", "gpu.all", "env", "resources.cpu"]', ["gpu", "gpu.all", "env", "resources.cpu"]),
    ],
    "policy.deny": [('["gpu.devices"]', ["gpu.devices"])],
    "policy.max-gpus": [("0", 0), ("16", 16)],
    "policy.kinds": [('["x.com/y"]', ["x.com/y"])],
    "policy.max-cpu": [("0", 0), ("4", 4000), ("1.5", 1500), ('"500m"', 500)],
    "policy.max-memory": [("0", 0), ("4096", 4096), ('"16Gi"', 16 << 30)],
    "policy.bind-sources": [('["/data/team-a", "/srv/"]', ["/data/team-a", "/srv/"])],
    "policy.volumes": [('["data-*"]', ["data-*"])],
    "policy.host-variables": [('["HTTP_*"]', ["HTTP_*"])],
    "policy.secrets": [('["token"]', ["token"])],
    "policy.devices": [('["/dev/fuse"]', ["/dev/fuse"])],
    "policy.cgroup-parents": [('["/team", "team-*.slice"]', ["/team", "team-*.slice"])],
    "policy.capabilities": [('["net_admin", "CAP_CHOWN", "all"]', ["CAP_NET_ADMIN", "CAP_CHOWN", "ALL"])],
    "secrets.directory": [('""', ""), ('"/run/secrets/{scope}"', "/run/secrets/{scope}")],
    "secrets.command": [("[]", []), ('["/usr/bin/vault", "get"]', ["/usr/bin/vault", "get"])],
    "volumes": [('{data = "/srv/data"}', {"data": "/srv/data"})],
    "policy.rule": [
        (
            '[{name = "a", match = {namespace = ["x-*"]}, allow = ["bind", "gpu"], deny = ["tmpfs"], max-cpu = 2}]',
            [
                {
                    "name": "a",
                    "match": {"namespace": ["x-*"]},
                    "policy.allow": ["storage.bind", "gpu"],
                    "policy.deny": ["storage.tmpfs"],
                    "policy.max-cpu": 2000,
                }
            ],
        )
    ],
    "require-grant": [("true", True), ("false", False)],
    "policy.evict-unadjusted": [("true", True), ("false", False)],
    "cdi.generate": [("[]", []), ('["nvidia"]', ["nvidia"])],
    "cdi.generate-dir": [('""', ""), ('"/var/run/cdi"', "/var/run/cdi")],
    "cdi.hook": [('""', ""), ('"/usr/bin/chandler-hook"', "/usr/bin/chandler-hook")],
}
BAD: dict[str, list[str]] = {
    "runtimes": [
        "[]",
        '""',
        '[""]',
        '["a b"]',
        '["bin/runc"]',
        '["./runc"]',
        '["../runc"]',
        "[1]",
        "5",
        '["/usr/bin/r\\tc"]',
        '["a\\nb"]',
        '"runc"',
        "true",
        "{}",
    ],
    "annotation-prefix": [
        '""',
        '"/"',
        '"x"',
        '"a/b/"',
        '"a b/"',
        '"a_b/"',
        '"é/"',
        '"a\\u0000/"',
        '"a\\"b/"',
        "5",
        "[]",
        '"a*/"',
        '"a|b/"',
        '"a\\\\/"',
    ],
    "state-dir": ['"relative"', '""', "5", '"/a\\nb"', '"/a\\u0000"', "[]"],
    "engine": ['"Docker"', '""', "5", '["podman"]', '"cri-o"'],
    "engines": ['"containerd"', '[""]', "5", '["cri-o"]', '[["crio"]]', "true"],
    "cdi.spec-dirs": ['"/etc/cdi"', '["etc"]', '[""]', "[5]", '["/a\\nb"]', "{}"],
    "cdi.annotations": ['"true"', "1", "[]"],
    "kubernetes.resources": [
        "[]",
        '"nvidia.com/gpu"',
        '{nvidia = "gpu"}',
        '{nvidia = "kubernetes.io/gpu"}',
        '{nvidia = "x.kubernetes.io/gpu"}',
        '{nvidia = "x.com/a/b"}',
        "{nvidia = 1}",
        '{unknown = "x.com/gpu"}',
        '{npu = "x.com/npu"}',
        '{nvidia = "x.com/gpu", amd = "x.com/gpu"}',
    ],
    "gpu.allocator": ['"fast"', "5", '""'],
    "gpu.fallback": ["false", '""', '"on"', "[]"],
    "gpu.mps": ["true", '""', '"on"'],
    "gpu.mps-pipe-dir": ['""', '"mps"', "5"],
    "gpu.mps-shm-dir": ['""', '"shm"', "[]"],
    "gpu.mps-limits": ["true", '"none"'],
    "gpu.mps-patience": ["0", "61", "true", "1.5", '"5"'],
    "gpu.max-sharers": ["-1", "true", '"8"'],
    "gpu.mps-control": ['"nvidia-cuda-mps-control"', '""'],
    "gpu.nvidia-smi": ['"nvidia-smi"', '""'],
    "log.file": ['"relative"', "5", '"stderr"', '"/a\\nb"'],
    "policy.trust": ['"none"', "true", '""'],
    "policy.allow": ['"gpu"', '["gpus"]', "[5]", '["GPU"]', '["gpu.model"]', "[[]]", '[""]'],
    "policy.deny": ['["*"]', '"env"', "[true]"],
    "policy.max-gpus": ["-1", "1.0", '"8"', "true", "[]", "nan", "inf"],
    "policy.kinds": ['"x.com/y"', "[5]", '[""]'],
    "policy.max-cpu": ["-1", '"x"', "true", "[]", '""'],
    "policy.max-memory": ["-1", '"16 GiB"', "true", "[]"],
    "policy.bind-sources": ['"/a"', '["a"]', '["/a/../b"]', '["/a//b"]', '["/a/."]', "[5]"],
    "policy.volumes": ['"x"', '[""]', "[5]"],
    "policy.host-variables": ['"x"', '[""]', "[5]"],
    "policy.secrets": ['"x"', '[""]', "[5]"],
    "policy.devices": ['"x"', '[""]', "[5]"],
    "policy.cgroup-parents": ['"/a"', '["a"]', '["/a/.."]', '["a/b.slice"]'],
    "policy.capabilities": ['"CHOWN"', '["NO_SUCH"]', '[""]', "[5]"],
    "secrets.directory": ['"x"', "5", '"/a/../b"'],
    "secrets.command": ['"/bin/x"', '["x"]', "[5]", '[""]'],
    "volumes": ["5", '{a = "x"}', "{a = 5}", '{"" = "/x"}'],
    "policy.rule": ["5", "[5]", "{}"],
    "require-grant": ["1", '"true"', "[]"],
    "policy.evict-unadjusted": ["0", '"no"', "{}"],
    "cdi.generate": ["true", '"nvidia"', '["nobody"]', "[5]"],
    "cdi.generate-dir": ['"relative"', "5", "[]"],
    "cdi.hook": ['"chandler-hook"', "5", "[]"],
}


@pytest.mark.parametrize(("key", "text", "value"), [(key, *case) for key, cases in GOOD.items() for case in cases])
def test_valid_values(key: str, text: str, value: Any) -> None:
    assert compiled(toml(key, text)) == {**compiled(), "engines" if key == "engine" else key: value}


@pytest.mark.parametrize(("key", "text"), [(key, text) for key, texts in BAD.items() for text in texts])
def test_invalid_values(key: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compiled(toml(key, text))
    assert str(caught.value).startswith(f"/etc/0.toml: {key} = ")
    assert "; it must be " in str(caught.value)


def test_every_key_is_tried() -> None:
    assert set(GOOD) == set(BAD) == set(config.KEYS)


def test_every_default_is_good() -> None:
    unset = {"state-dir", "engine"}  # not to be written: their defaults mean that nothing is said
    for key, (check, _, default) in config.KEYS.items():
        assert check(default) or key in unset, key
    assert compiled() == {key: default for key, (_, _, default) in config.KEYS.items() if key != "engine"}


def test_defaults_of_the_policy() -> None:
    """By default no class is allowed that reaches the host or is dangerous."""
    assert compiled()["policy.allow"] == ["gpu", "env", "resources"]
    assert compiled()["policy.trust"] == "policy"
    assert compiled()["policy.max-gpus"] == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('runtime = ["runc"]', "unknown key 'runtime'; did you mean 'runtimes'?"),
        ("[policy]\nmax_gpus = 2", "unknown key 'policy.max_gpus'; did you mean 'policy.max-gpus'?"),
        ("max-gpus = 2", "unknown key 'max-gpus'; did you mean 'policy.max-gpus'?"),
        ("[cdi]\nspec-dir = []", "unknown key 'cdi.spec-dir'; did you mean 'cdi.spec-dirs'?"),
        ("zzz = 1", "unknown key 'zzz'; remove it"),
        ("[zzz]\nx = 1", "unknown key 'zzz'; remove it"),
        ("cdi = 1", "unknown key 'cdi'"),
        ("[[policy]]\nallow = []", "unknown key 'policy'"),
        ("[policy.allow]\ngpu = true", "policy.allow = {'gpu': True} is wrong"),
        ('"" = 1', "unknown key ''"),
    ],
)
def test_unknown_keys(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compiled("", text)
    assert str(caught.value).startswith(f"/etc/1.toml: {words}")


@pytest.mark.parametrize(
    "text", ["x", "a = ", "a = 1\na = 2", "[a", "\0", "a = 'x", "[cdi]\nannotations = true\n[cdi]\n", "= 1"]
)
def test_a_configuration_that_is_not_toml(text: str) -> None:
    with pytest.raises(ConfigError, match="^/etc/0.toml is not TOML: "):
        compiled(text)


def test_a_configuration_that_is_not_utf_8() -> None:
    with pytest.raises(ConfigError, match="^/a is not TOML: .*utf-8"):
        config.compile_config([("/a", b'engine = "\xff"')])


def test_later_files_win_key_by_key() -> None:
    found = compiled('state-dir = "/a"\n[policy]\nmax-gpus = 2\nallow = ["env"]', "[policy]\nmax-gpus = 4")
    assert (found["state-dir"], found["policy.max-gpus"], found["policy.allow"]) == ("/a", 4, ["env"])


def test_engines_of_all_files_add_up() -> None:
    """Each engine is configured by its own file; the older key names one engine."""
    assert compiled('engine = "crio"', 'engines = ["docker", "crio"]', 'engine = "containerd"')["engines"] == [
        "crio",
        "docker",
        "containerd",
    ]


def test_an_invalid_value_is_refused_even_when_a_later_file_replaces_it() -> None:
    with pytest.raises(ConfigError, match="^/etc/0.toml: "):
        compiled("[policy]\nmax-gpus = -1", "[policy]\nmax-gpus = 4")


@pytest.mark.parametrize(
    ("texts", "prefix"),
    [
        ([], "chandler.oci/"),
        (['annotation-prefix = "a/"'], "a/"),
        (['annotation-prefix = "a/"', 'annotation-prefix = "b/"'], "b/"),
        (['annotation-prefix = "a/"\nzzz = 1', "x"], "a/"),
        (['annotation-prefix = "a b/"'], "chandler.oci/"),
        (["annotation-prefix = 5"], "chandler.oci/"),
    ],
)
def test_the_annotation_prefix_of_an_invalid_configuration(texts: list[str], prefix: str) -> None:
    assert config.annotation_prefix([(f"/{n}", text.encode()) for n, text in enumerate(texts)]) == prefix


def test_the_policy_knows_every_key_of_a_request() -> None:
    words = {
        *(f"gpu.{key}" for key in common.GPU),
        *(f"resources.{key}" for key in common.LIMITS),
        *(path.replace("resources.gpu.", "gpu.") for path in table.ROWS),
    }
    assert words < set(known_words())
    assert config._classes(sorted(words)) and not config._classes(["hostnames"])


def test_the_type_has_every_key() -> None:
    assert Config.__required_keys__ == config.KEYS.keys() - {"engine"} == compiled().keys()
