"""`chandler configure` as a person uses it: its output, its refusals, and that it leaves nothing half done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configure.world import World, corpus

from shim.configure import containerd, selinux, store, tomledit
from shim.configure.containerd import TOLERATE
from shim.configure.model import TOML, VALUE, ConfigureRequest, Edit, Read, Setting, lookup, merged
from shim.doctor import engines, runtimes
from shim.doctor.model import HostReader, Subject
from shim.errors import ConfigError
from shim.node.inventory import Account

Make = Callable[..., World]
Said = pytest.CaptureFixture[str]
V2 = 'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\ndefault_runtime_name = "runc"\n'
RUNC = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]\nruntime_type = "io.containerd.runc.v2"\n'


def refused(world: World, capsys: Said, *options: str) -> str:
    """The one sentence of a refusal that changed nothing."""
    before = world.tree()
    capsys.readouterr()
    assert world.run(*options) == 1
    output = capsys.readouterr()
    assert world.tree() == before
    assert output.err.startswith("chandler: ") and output.err.count("\n") == 1
    return output.err


# --- containerd -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "schema", "drop_in"),
    [("1.6.20", 2, False), ("1.7.24", 2, False), ("2.0.5", 3, False), ("2.1.9", 3, False), ("2.2.0", 3, False)],
)
def test_no_file_at_all(world: Make, version: str, schema: int, drop_in: bool) -> None:
    """The file is created with the version that this containerd itself writes; 1.x keeps its own handler, too."""
    made = world("containerd", version)
    assert made.run() == 0
    document = tomledit.parse(made.file.read_text())
    assert document["version"] == schema and "imports" not in document
    runtimes = next(iter(document["plugins"].values()))["containerd"]["runtimes"]
    assert set(runtimes) == ({"runc", "chandler"} if schema == 2 else {"chandler"})
    assert made.run("--remove") == 0 and not made.file.exists()


@pytest.mark.parametrize(
    ("version", "options", "drops"),
    [
        ("1.7.24", (), False),
        ("2.0.5", (), False),
        ("2.1.9", (), True),
        ("2.1.9", ("--in-place",), False),
        ("", (), False),
        ("2.1.9", ("--drop-in",), True),
    ],
)
def test_a_drop_in_where_the_version_merges(world: Make, version: str, options: tuple[str, ...], drops: bool) -> None:
    made = world("containerd", version)
    made.file.write_text(V2 + RUNC)
    assert made.run(*options, "--programs", str(made.root)) == 0
    drop_in = made.file.parent / "conf.d/99-chandler.toml"
    assert drop_in.exists() == drops
    if drops:  # with the file's version: otherwise containerd ignores one of the two
        assert tomledit.parse(drop_in.read_text())["version"] == 2
        assert tomledit.parse(made.file.read_text())["imports"] == [str(drop_in)]


@pytest.mark.parametrize("name", ["conf.d", "config.d"])
def test_an_imported_directory_needs_no_option(world: Make, name: str) -> None:
    made = world("containerd", "2.1.9")
    text = f'version = 2\nimports = ["/elsewhere/*.toml", "{name}/*.toml"]\n' + RUNC
    made.file.write_text(text)
    before = made.tree()
    assert made.run() == 0 and made.file.read_text() == text
    assert (made.file.parent / name / "99-chandler.toml").exists()
    assert made.run("--drop-in", f"{made.file.parent}/{name}/50-other.toml") == 0 and made.file.read_text() == text
    assert os.listdir(made.file.parent / name) == ["50-other.toml"], "the edits of the first call are undone"
    assert made.run("--remove") == 0 and made.tree() == before


@pytest.mark.parametrize(
    "imports",
    ['[\n  "a.toml"\n# a remark\n]', '[ "a.toml", # one\n]', '["a.toml"]', "[]", "[\n]", "['a.toml',\n 'b.toml',\n]"],
)
def test_a_list_of_imports_in_any_spelling(world: Make, imports: str) -> None:
    made = world("containerd", "2.1.9")
    text = f"version = 2\nimports = {imports}\n" + RUNC
    made.file.write_text(text)
    assert made.run() == 0
    found = tomledit.parse(made.file.read_text())["imports"]
    assert str(made.file.parent / "conf.d/99-chandler.toml") in found and set(tomledit.parse(text)["imports"]) <= set(
        found
    )
    made.file.write_text(made.file.read_text() + "# theirs\n")
    assert made.run("--remove") == 0
    assert made.file.read_text().split() == (text + "# theirs\n").split()


def test_runc_in_an_imported_file_is_where_the_options_come_from(world: Make) -> None:
    made = world("containerd", "2.1.9")
    (made.file.parent / "conf.d").mkdir()
    (made.file.parent / "conf.d/10-runc.toml").write_text(
        "version = 2\n" + RUNC + RUNC.splitlines()[0].replace("runc]", "runc.options]") + "\nSystemdCgroup = true\n"
    )
    made.file.write_text(f'version = 2\nimports = ["{made.file.parent}/conf.d/*.toml"]\n')
    assert made.run("--default") == 0
    ours = tomledit.parse((made.file.parent / "conf.d/99-chandler.toml").read_text())["plugins"][
        "io.containerd.grpc.v1.cri"
    ]["containerd"]
    assert (
        ours["runtimes"]["chandler"]["options"]["SystemdCgroup"] is True and ours["default_runtime_name"] == "chandler"
    )


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("runc", {"BinaryName": "/usr/sbin/runc", "SystemdCgroup": True, "Root": "/r"}),
        ("nvidia", {"BinaryName": "nvidia-container-runtime", "SystemdCgroup": True}),
    ],
)
def test_options_of_the_handler_that_was_there(world: Make, path: str, options: dict[str, Any]) -> None:
    made = world("containerd")
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
    head = f'[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{path}'
    made.file.write_text(
        V2.replace('"runc"', f'"{path}"')
        + head
        + ']\nruntime_type = "io.containerd.runc.v2"\nprivileged_without_host_devices = true\n'
        + f'snapshotter = "devmapper"\npod_annotations = ["a/*"]\n{head}.options]\n{lines}'
    )
    assert made.run() == 0
    ours = tomledit.parse(made.file.read_text())["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"][
        "chandler"
    ]
    assert ours == {
        "runtime_type": "io.containerd.runc.v2",
        "privileged_without_host_devices": True,
        "snapshotter": "devmapper",
        "pod_annotations": ["a/*", "chandler.oci/*"],
        "container_annotations": ["chandler.oci/*"],
        "options": {**options, "BinaryName": str(made.root / "usr/bin/chandler-runtime")},
    }


def test_without_tomlkit(world: Make, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """Additions need no library; changing a value in place does, and the error says so."""
    monkeypatch.setitem(sys.modules, "tomlkit", None)
    made = world("containerd")
    made.file.write_text(V2 + RUNC)
    assert made.run("--cdi") == 0 and made.run("--remove") == 0
    assert "install python3-tomlkit" in refused(made, capsys, "--default")


@pytest.mark.parametrize(
    ("text", "version", "options", "words"),
    [
        ('disabled_plugins = ["cri"]\n', "1.7.24", (), "containerd config migrate"),
        ("version = 1\n", "2.1.9", (), "version 1"),
        ("version = 4\n", "2.1.9", (), "version 4"),
        ("version = 3\n", "1.7.24", (), "1.7.24 does not read"),
        ("version = [\n", "1.7.24", (), "not TOML"),
        ("version = 2\nversion = 2\n", "1.7.24", (), "not TOML"),
        (V2, "1.7.24", ("--drop-in",), "leave out --drop-in"),
        (V2, "2.0.9", ("--drop-in",), "leave out --drop-in"),
        (V2 + RUNC.replace("runc]", "chandler]"), "1.7.24", (), "'chandler' already"),
        (V2, "1.7.24", ("--engine-version", "new"), "is not a version"),
        (V2, "1.7.24", ("--handler", "No Name"), "RuntimeClass"),
        (V2, "1.7.24", ("--handler", "a", "--runtime", "runc", "--runtime", "crun"), "2 runtimes"),
        (V2, "1.7.24", ("--config", "relative.toml"), "is not an absolute path"),
        (V2, "1.7.24", ("--verify", "--remove"), "leave one of them out"),
    ],
)
def test_containerd_refusals(
    world: Make, capsys: Said, text: str, version: str, options: tuple[str, ...], words: str
) -> None:
    made = world("containerd", version)
    made.file.write_text(text)
    assert words in refused(made, capsys, *options)


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        *(
            ("containerd", text)
            for text in (
                "version = []\n",
                "version = 2\nplugins = 3\n",
                "version = 2\nimports = 3\n",
                "version = 2\ndisabled_plugins = 5\n",
                V2.replace('"runc"', "7"),
                'version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd]\nruntimes = 3\n',
                V2
                + RUNC.replace('"io.containerd.runc.v2"', '"io.containerd.runc.v2"\noptions = []\npod_annotations = 1'),
            )
        ),
        *(
            ("docker", text)
            for text in (
                '{"runtimes": 3}',
                '{"runtimes": {"chandler": null}}',
                '{"features": [], "runtimes": {"x": 1}}',
                '{"a": NaN}',
                "null",
                '"x"',
                "[" * 100,
            )
        ),
        *(
            ("crio", text)
            for text in ("crio = 1\n", "[crio.runtime]\nruntimes = 1\n", "[crio.runtime]\ndefault_runtime = 1\n")
        ),
        *(
            ("podman", text)
            for text in (
                "engine = 1\n",
                "[engine]\nruntime_supports_json = 1\nruntimes = []\n",
                '[engine]\nruntime_supports_json = ["crun", {append = true}]\n',
            )
        ),
    ],
)
def test_files_of_another_shape(world: Make, capsys: Said, engine: str, text: str) -> None:
    """Such a file is refused in one sentence, or written and restored by --remove."""
    made = world(engine, "2.1.9")
    made.file.write_text(text)
    before = made.tree()
    if made.run("--default", "--cdi", "--in-place"):
        assert made.tree() == before and capsys.readouterr().err.count("\n") == 1
    else:
        assert made.run("--remove") == 0 and made.tree() == before


def test_a_version_is_never_guessed(world: Make, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world("containerd", "")
    empty = str(made.root)  # no containerd in it
    assert "--engine-version" in refused(made, capsys, "--programs", empty)
    made.file.write_text(V2)
    assert "--engine-version" in refused(made, capsys, "--programs", empty, "--drop-in")
    assert made.run("--programs", empty) == 0 and "version is unknown" in capsys.readouterr().out
    for output, known in (
        ("containerd github.com/containerd/containerd v1.7.27 05044ec0", (1, 7, 27)),
        ("containerd github.com/containerd/containerd/v2 2.1.9+unknown ", (2, 1, 9)),
        ("containerd containerd.io 1.7.24~ds1 1.7.24~ds1-6+deb13u1", (1, 7, 24)),
    ):
        assert runtimes.parse_version(output) == known


def test_the_cri_plugin_is_disabled(world: Make, capsys: Said) -> None:
    made = world("containerd")
    made.file.write_text('disabled_plugins = ["io.containerd.grpc.v1.cri"]\n' + V2)
    assert made.run() == 0
    assert "note: the CRI plugin is in disabled_plugins" in capsys.readouterr().out


def test_files_that_are_read_later_are_named(world: Make, capsys: Said) -> None:
    made = world("containerd", "2.1.9")
    (made.file.parent / "conf.d").mkdir()
    later = made.file.parent / "conf.d/99-nvidia.toml"
    later.write_text(V2.replace('"runc"', '"nvidia"'))
    made.file.write_text(f'version = 2\nimports = ["{made.file.parent}/conf.d/*.toml"]\n' + RUNC)
    assert made.run("--default") == 0
    assert f"note: {later} is read later" in capsys.readouterr().out


# --- k3s and rke2 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plugin", "service"),
    [
        ("k3s/agent/etc/containerd/config-v3.toml.tmpl", "io.containerd.cri.v1.runtime", "k3s"),
        ("rke2/agent/etc/containerd/config.toml.tmpl", "io.containerd.grpc.v1.cri", "rke2-server"),
    ],
)
def test_templates(world: Make, capsys: Said, name: str, plugin: str, service: str) -> None:
    made = world("containerd")
    made.file = made.root / "etc/rancher" / name
    made.file.parent.mkdir(parents=True)
    before = made.tree()
    assert made.run("--runtime", "crun") == 0
    text = made.file.read_text()
    assert text.startswith('{{ template "base" . }}\n') and "SystemdCgroup = {{ .SystemdCgroup }}\n" in text
    assert f"now: systemctl restart {service}" in capsys.readouterr().out
    filled = tomledit.parse(
        text.replace('{{ template "base" . }}', "version = 3").replace("{{ .SystemdCgroup }}", "true")
    )
    assert set(filled["plugins"][plugin]["containerd"]["runtimes"]) == {"chandler", "chandler-crun"}
    after = made.tree()
    assert made.run("--runtime", "crun") == 0 and made.tree() == after
    assert made.run("--remove") == 0 and made.tree() == before
    # one that is there already, changed by somebody afterwards
    made.file.write_text("{{ if .NodeConfig }}\nversion = 3\n{{ end }}")
    assert made.run() == 0
    made.file.write_text("# first\n" + made.file.read_text() + "# last\n")
    assert made.run("--remove") == 0
    assert made.file.read_text() == "# first\n{{ if .NodeConfig }}\nversion = 3\n{{ end }}# last\n"
    assert "a template" in refused(made, capsys, "--default")


def test_a_file_that_k3s_generates_is_not_edited(world: Make, capsys: Said) -> None:
    made = world("containerd")
    made.file = made.root / "etc/rancher/k3s/agent/etc/containerd/config.toml"
    made.file.parent.mkdir(parents=True)
    made.file.write_text(V2)
    output = refused(made, capsys)
    assert "generates" in output and "config-v3.toml.tmpl" in output


def test_a_node_of_k3s_is_told_which_file_to_name() -> None:
    request = ConfigureRequest(
        "containerd",
        [("chandler", "/usr/bin/chandler-runtime")],
        ["chandler.oci/*"],
        False,
        False,
        False,
        "",
        None,
        False,
        (2, 1, 9),
        "",
    )
    directory = "/var/lib/rancher/k3s/agent/etc/containerd"
    with pytest.raises(ConfigError, match=f"--config {directory}/config-v3.toml.tmpl"):
        containerd.plan(request, Read(lambda _: None, lambda _: None, lambda _: [directory]))


VALIDATOR = "plugins", "io.containerd.nri.v1.nri", "default_validator"


def test_a_required_nri_plugin(world: Make) -> None:
    """It is added to the plugins that are required already, and --remove restores the file exactly."""
    made = world("containerd", "2.2.0")
    mine = (
        "version = 3\n[plugins.'io.containerd.nri.v1.nri'.default_validator]\nrequired_plugins = ['theirs']\n"
        "tolerate_missing_plugins_annotation = 'x/y'\n"
    )
    for text, plugins, annotation in (("version = 3\n", ["chandler"], TOLERATE), (mine, ["theirs", "chandler"], "x/y")):
        for where in ("--in-place", "--drop-in"):
            made.file.write_text(text)
            assert made.run("--nri-required", where) == 0
            whole = tomledit.parse(made.file.read_text())
            for name in made.file.parent.glob("conf.d/*.toml"):
                whole = merged(whole, tomledit.parse(name.read_text()))
            assert lookup(whole, VALIDATOR) == {
                "enable": True,
                "required_plugins": plugins,
                "tolerate_missing_plugins_annotation": annotation,
            }
            assert lookup(whole, (*VALIDATOR[:2], "disable")) is False
            assert made.run("--remove") == 0 and made.file.read_text() == text


@pytest.mark.parametrize(
    ("engine", "version", "words"),
    [
        ("containerd", "2.1.9", "containerd 2.1.9 cannot require an NRI plugin"),
        ("containerd", "1.7.24", "before 2.2"),
        ("crio", "", "--nri-required is for containerd"),
        ("podman", "", "--nri-required is for containerd"),
    ],
)
def test_a_required_nri_plugin_where_nothing_can_require_one(
    world: Make, capsys: Said, engine: str, version: str, words: str
) -> None:
    made = world(engine, version)
    made.file.write_text("version = 2\n" if engine == "containerd" else "")
    assert words in refused(made, capsys, "--nri-required")


# --- docker, CRI-O, podman ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ('{"a": 1, "a": 2}', (), "twice"),
        ('{"a": 1 // remark\n}', (), "comments"),
        ("[]", (), "not a JSON object"),
        ("{", (), "not JSON"),
        ('{"runtimes": []}', (), "runtimes"),
        ('{"runtimes": {"chandler": {"path": "/elsewhere"}}}', (), "'chandler' already"),
        ("{}", ("--nri",), "no NRI"),
        ("{}", ("--drop-in",), "no drop-ins"),
    ],
)
def test_docker_refusals(world: Make, capsys: Said, text: str, options: tuple[str, ...], words: str) -> None:
    made = world("docker")
    made.file.write_text(text)
    assert words in refused(made, capsys, *options)


@pytest.mark.parametrize(
    ("text", "options", "result"),
    [
        (
            '{\n  "a": {"b": [1, 2]},\n\n  "c": 1.50\n}\n',
            (),
            '{\n  "a": {"b": [1, 2]},\n\n  "c": 1.50,\n\n'
            '  "runtimes": {\n    "chandler": {\n      "path": "P"\n    }\n  }\n}\n',
        ),
        ('{"a":1}', (), '{"a":1, "runtimes": {"chandler": {"path": "P"}}}'),
        (
            '{\n\t"runtimes": {"x": {"path": "y"}}\n}',
            ("--default",),
            '{\n\t"runtimes": {"x": {"path": "y"}, "chandler": {\n\t\t\t"path": "P"\n\t\t}},\n'
            '\t"default-runtime": "chandler"\n}',
        ),
        (
            '{"default-runtime": "nvidia", "features": {"cdi": false}}',
            ("--default", "--cdi"),
            '{"default-runtime": "chandler", "features": {"cdi": true}, "runtimes": {"chandler": {"path": "P"}}}',
        ),
        ("", (), '{\n    "runtimes": {\n        "chandler": {\n            "path": "P"\n        }\n    }\n}\n'),
        (
            "\ufeff{}",
            (),
            '\ufeff{\n    "runtimes": {\n        "chandler": {\n            "path": "P"\n        }\n    }\n}',
        ),
    ],
)
def test_daemon_json_byte_for_byte(world: Make, text: str, options: tuple[str, ...], result: str) -> None:
    made = world("docker")
    made.file.write_text(text, newline="")
    assert made.run(*options) == 0
    assert made.file.read_bytes().decode().replace(str(made.root / "usr/bin/chandler-runtime"), "P") == result


def test_podman_keeps_what_supports_json(world: Make, capsys: Said) -> None:
    """A list in a drop-in replaces the earlier list, so Chandler's has all earlier entries and its own programs."""
    made = world("podman")
    (made.root / "usr/share").mkdir()
    (made.root / "usr/share/containers.conf").write_text('[engine]\nruntime_supports_json = ["crun", "special"]\n')
    made.file.write_text('[engine]\nruntime_supports_json = ["runc"]\n')
    assert made.run() == 0
    engine = tomledit.parse((made.root / "etc/containers/containers.conf.d/99-chandler.conf").read_text())["engine"]
    assert engine["runtime_supports_json"] == [
        "crun",
        "special",
        "runc",
        "chandler",
        "chandler-runtime",
        "chandler-runc",
        "chandler-youki",
        "chandler-crun",
    ]
    assert engine["runtimes"] == {"chandler": [str(made.root / "usr/bin/chandler-runtime")]}
    assert "now:" not in capsys.readouterr().out, "podman reads it at every call"
    assert "no NRI" in refused(made, capsys, "--nri")
    assert "would not be read" in refused(made, capsys, "--drop-in", str(made.root / "elsewhere.conf"))


def test_crio_drop_in_is_like_the_default_handler(world: Make, capsys: Said) -> None:
    """The handler has the default handler's experimental annotations.

    It has no annotation that CRI-O does not know, because CRI-O would not start with it.
    """
    made = world("crio")
    directory = made.root / "etc/crio/crio.conf.d"
    directory.mkdir()
    (directory / "10-crio.conf").write_bytes(
        next(path for path in corpus("crio") if path.name == "packaged-crun.conf").read_bytes()
    )
    assert made.run("--nri", "--cdi") == 0
    ours = tomledit.parse((directory / "99-chandler.conf").read_text())["crio"]
    assert ours["runtime"]["runtimes"]["chandler"] == {
        "runtime_path": str(made.root / "usr/bin/chandler-runtime"),
        "runtime_type": "oci",
        "runtime_root": "/run/crun",
        "monitor_path": "/usr/libexec/crio/conmon",
        "allowed_annotations": ["io.containers.trace-syscall", "io.kubernetes.cri-o.Devices"],
    }
    assert ours["nri"] == {"enable_nri": True}
    assert "note: CRI-O injects CDI devices by itself" in capsys.readouterr().out
    # CRI-O reads every file of this directory, whatever its name: only the drop-in may be added to it
    assert sorted(os.listdir(directory)) == ["10-crio.conf", "99-chandler.conf"]


def test_a_drop_in_of_another_program(world: Make, capsys: Said) -> None:
    made = world("crio")
    (made.root / "etc/crio/crio.conf.d").mkdir()
    (made.root / "etc/crio/crio.conf.d/99-chandler.conf").write_text("[crio.runtime]\n")
    assert "Chandler did not write it" in refused(made, capsys)
    assert made.run("--drop-in", str(made.root / "etc/crio/crio.conf.d/50-other.conf")) == 0
    assert made.run("--remove") == 0
    assert (made.root / "etc/crio/crio.conf.d/99-chandler.conf").read_text() == "[crio.runtime]\n"


def test_a_drop_in_that_somebody_has_added_to(world: Make) -> None:
    made = world("podman")
    path = made.root / "etc/containers/containers.conf.d/99-chandler.conf"
    assert made.run("--default") == 0
    path.write_text(path.read_text() + "\n[network]\nnetwork_backend = 'netavark' # mine\n")
    assert made.run() == 0  # added lines stay, also after a call with other options
    assert "runtime" not in tomledit.parse(path.read_text())["engine"] and "# mine" in path.read_text()
    assert made.run("--remove") == 0
    assert (
        tomledit.parse(path.read_text()) == {"network": {"network_backend": "netavark"}, "engine": {"runtimes": {}}}
        or path.read_text().strip() == "[network]\nnetwork_backend = 'netavark' # mine"
    )


# --- Chandler's own key ---------------------------------------------------------------------------------------------


def test_every_configured_engine_is_in_chandlers_configuration(world: Make) -> None:
    """Engines add up. docker and podman are not listed: their callers may write any annotation, so none is believed."""
    made = world("crio")
    keys = made.root / "etc/chandler/config.d"
    assert made.run() == 0 and tomledit.parse((keys / "50-engine-crio.toml").read_text()) == {"engines": ["crio"]}
    subject = Subject(HostReader(str(made.root)), Account({}))
    subject.config = {**subject.config, "engines": ["crio"]}
    found = engines.configured_engines(subject)
    assert found.data["crio"]["configured"] is True and found.data["crio"]["identity"] is True and found.problems == []
    for engine in ("docker", "podman"):
        assert world(engine).run() == 0
        assert os.listdir(keys) == ["50-engine-crio.toml"]
    other = world("containerd", "2.1.9")
    assert other.run("--keep-engine") == 0 and os.listdir(keys) == ["50-engine-crio.toml"]
    assert other.run() == 0 and sorted(os.listdir(keys)) == ["50-engine-containerd.toml", "50-engine-crio.toml"]
    before = other.tree()
    assert other.run("--keep-engine") == 0 and other.tree() == before
    assert other.run("--remove") == 0 and os.listdir(keys) == ["50-engine-crio.toml"], "the remaining file is CRI-O's"
    assert made.run("--remove") == 0 and not keys.exists()


@pytest.mark.parametrize(
    "says", ['engine = "containerd"', 'engines = ["crio", "containerd"]', 'engine = "docker"', "engines = []"]
)
def test_the_engine_that_the_administrator_has_written(world: Make, says: str) -> None:
    made = world("containerd", "2.1.9")
    (made.root / "etc/chandler/config.toml").write_text(f"{says}\n")
    assert made.run() == 0 and (made.root / "etc/chandler/config.d").exists() is ("containerd" not in says)


@pytest.mark.parametrize("engine", ["containerd", "docker"])
def test_the_file_of_an_earlier_release(world: Make, engine: str) -> None:
    """It had one name for every engine; configuring or removing its engine removes it."""
    made = world(engine, "2.1.9")
    old = made.root / "etc/chandler/config.d/50-engine.toml"

    def earlier() -> None:
        change = store.change(
            store.read_stored(str(old), {0: "root", os.geteuid(): "the caller"}),
            Edit(str(old), TOML, [Setting(VALUE, ("engine",), engine)], own=True),
            engine,
        )
        store.apply([change])

    earlier()
    assert tomledit.parse(old.read_text()) == {"engine": engine}
    assert world("crio").run() == 0 and old.exists()
    assert (
        made.run() == 0
        and not old.exists()
        and (old.parent / "50-engine-containerd.toml").exists() is (engine == "containerd")
    )
    earlier()
    assert made.run("--remove") == 0 and os.listdir(old.parent) == ["50-engine-crio.toml"]


def test_a_configuration_that_is_wrong(world: Make, capsys: Said) -> None:
    """`configure` refuses to work with a wrong configuration, but --remove still works."""
    made = world("docker")
    assert made.run() == 0
    (made.root / "etc/chandler/config.toml").write_text("nonsense = 1\n")
    assert "unknown key 'nonsense'" in refused(made, capsys)
    assert made.run("--remove") == 0 and not made.file.exists()


def test_passed_annotations_follow_the_prefix(world: Make) -> None:
    made = world("containerd")
    (made.root / "etc/chandler/config.toml").write_text(
        'annotation-prefix = "example.com/"\n[cdi]\nannotations = true\n'
    )
    made.file.write_text(V2)
    assert made.run() == 0
    ours = tomledit.parse(made.file.read_text())["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"][
        "chandler"
    ]
    assert ours["pod_annotations"] == ours["container_annotations"] == ["example.com/*", "cdi.k8s.io/*"]


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_and_shows_everything(world: Make, capsys: Said) -> None:
    made = world("docker")
    made.file.write_text('{"a": 1}')
    before = made.tree()
    assert made.run("--dry-run", "--restart") == 0 and made.tree() == before
    output = capsys.readouterr().out
    assert (
        f"--- {made.file}\n+++ {made.file}\n" in output
        and '-{"a": 1}\n\\ No newline at end of file\n+{"a": 1, "runtimes"' in output
    )
    assert made.run() == 0
    capsys.readouterr()
    assert made.run("--dry-run") == 0 and capsys.readouterr().out == ""
    assert made.run("--dry-run", "--remove") == 0 and '+{"a": 1}\n' in capsys.readouterr().out


@pytest.mark.parametrize("engine", ["containerd", "docker", "crio", "podman"])
def test_an_engine_that_has_no_configuration_at_all(world: Make, engine: str) -> None:
    """Its directory does not exist, either; it is removed with the last file."""
    made = world(engine)
    made.file.parent.rmdir()
    before = made.tree()
    assert made.run() == 0 and made.tree() != before
    assert made.run("--remove") == 0
    if made.file.parent.exists():  # above the drop-ins' directory
        made.file.parent.rmdir()
    assert made.tree() == before


def test_a_link_is_followed(world: Make) -> None:
    made = world("docker")
    target = made.root / "etc/real.json"
    target.write_text("{}")
    made.file.symlink_to(target)
    assert made.run() == 0 and made.file.is_symlink() and "chandler" in target.read_text()
    assert made.run("--remove") == 0 and made.file.is_symlink() and target.read_text() == "{}"


def test_files_that_others_can_write_are_refused(world: Make, capsys: Said) -> None:
    made = world("docker")
    made.file.write_text("{}")
    made.file.chmod(0o666)
    assert "can be written by others" in refused(made, capsys)
    made.file.chmod(0o644)
    made.file.parent.chmod(0o777)
    assert "can be written by others" in refused(made, capsys)
    made.file.parent.chmod(0o755)
    made.file.unlink()
    made.file.symlink_to(made.root / "nowhere.json")
    assert "which is not there" in refused(made, capsys)
    made.file.unlink()
    made.file.mkdir()
    assert "not a regular file" in refused(made, capsys)


def test_the_program_must_be_there(world: Make, capsys: Said) -> None:
    made = world("docker")
    (made.root / "usr/bin/chandler-youki").unlink()
    assert "install Chandler first" in refused(made, capsys, "--runtime", "youki")
    (made.root / "usr/bin/chandler-runtime").chmod(0o777)
    assert "can be written by others" in refused(made, capsys)


@pytest.mark.parametrize("when", range(8))
def test_killed_in_the_middle(world: Make, when: int) -> None:
    """At each rename: every file has its old or its new text, and --remove and a second call both work."""
    made = world("containerd", "2.1.9")
    made.file.write_text(V2 + RUNC)
    before = made.tree()
    child = os.fork()
    if not child:
        rename, left = os.rename, [when]

        def dying(*arguments: Any) -> None:
            if not left[0]:
                os._exit(9)
            left[0] -= 1
            rename(*arguments)

        os.rename = dying  # type: ignore[assignment]
        made.run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if when < 5 else 0), "five files are written"
    for name, (data, _) in made.tree().items():
        if name.endswith(".toml"):
            tomledit.parse(data.decode())
    assert made.run("--remove") == 0
    unfinished = {name for name in made.tree() if ".chandler-" in name and name not in before}
    assert {
        name: seen for name, seen in made.tree().items() if name not in unfinished and not name.endswith(".d")
    } == before
    assert made.run() == 0 and (made.file.parent / "conf.d/99-chandler.toml").exists()


@pytest.mark.parametrize("name", ["config.toml", "config.toml.chandler-record", "50-engine-containerd.toml"])
def test_a_failed_write_restores_the_other_files(
    world: Make, capsys: Said, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = world("containerd", "2.1.9")
    made.file.write_text(V2 + RUNC)
    rename = os.rename

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("/" + name):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    assert "cannot be written: No space left on device; nothing was changed" in refused(made, capsys)


def test_a_damaged_record_is_refused(world: Make, capsys: Said) -> None:
    made = world("docker")
    made.file.write_text("{}")
    assert made.run() == 0
    Path(str(made.file) + store.RECORD).write_text("{")
    assert "chandler-record is damaged" in refused(made, capsys, "--remove")


def test_settings_written_by_hand_stay(world: Make, capsys: Said) -> None:
    made = world("docker")
    made.file.write_text('{"runtimes": {"mine": {"path": "/usr/bin/chandler-runtime"}}}')
    before = made.tree()
    assert made.run("--remove") == 0 and made.tree() == before
    assert "take it out by hand" in capsys.readouterr().out


def test_a_changed_handler_is_removed_too(world: Make) -> None:
    made = world("containerd")
    made.file.write_text(V2 + RUNC)
    assert made.run("--default") == 0
    made.file.write_text(
        made.file.read_text().replace(
            'container_annotations = ["chandler.oci/*"]', 'container_annotations = ["*"]\nsnapshotter = "x"'
        )
    )
    assert made.run("--remove") == 0
    assert tomledit.parse(made.file.read_text()) == tomledit.parse(V2 + RUNC)
    # but a default that somebody has set since then stays
    assert made.run("--default") == 0
    made.file.write_text(
        made.file.read_text().replace('default_runtime_name = "chandler"', 'default_runtime_name = "kata"')
    )
    assert made.run("--remove") == 0
    assert made.file.read_text().rstrip() == (V2 + RUNC).replace('"runc"', '"kata"').rstrip()


# --- around it ------------------------------------------------------------------------------------------------------


def test_selinux(tmp_path: Path) -> None:
    (tmp_path / "booleans").mkdir()
    assert selinux.notes(str(tmp_path)) == []
    for enforce, boolean, words in (
        ("1", "0 0", "setsebool -P container_use_devices on"),
        ("0", "0 0", "once SELinux is enforcing"),
        ("1", "1 1", ""),
    ):
        (tmp_path / "enforce").write_text(enforce)
        (tmp_path / "booleans/container_use_devices").write_text(boolean)
        output = selinux.notes(str(tmp_path))
        assert words in output[0] if words else output == []


def test_restart(world: Make, capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is needed after a change, also if the change came after the engine's start.

    This process stands for the engine.
    """
    made = world("docker")
    called: list[Any] = []
    failing: list[int] = []

    def run(command: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        if "show" in command:
            return subprocess.CompletedProcess(command, 0, f"{os.getpid()}\n", "")
        called.append(command)
        return subprocess.CompletedProcess(command, len(failing), "", "Job for docker.service failed\n")

    monkeypatch.setattr("shim.cli.configure.subprocess.run", run)
    monkeypatch.setattr(
        "shim.cli.configure.os.path.isdir",
        lambda path, known=os.path.isdir: path == "/run/systemd/system" or known(path),
    )
    assert made.run("--restart") == 0 and called == [("systemctl", "restart", "docker")]
    output = capsys.readouterr().out
    assert "restarted docker" in output and "now:" not in output
    os.utime(made.file, (0, 0))
    assert made.run("--restart") == 0 and len(called) == 1, "nothing has changed"
    assert made.run("--cdi") == 0
    os.utime(made.file, (2**32, 2**32))  # long after the start of this process
    assert made.run("--cdi", "--restart") == 0 and len(called) == 2, (
        "the engine was not restarted after the last change"
    )
    failing.append(1)
    assert made.run("--restart") == 1
    assert "Job for docker.service failed" in capsys.readouterr().err
    monkeypatch.setattr(
        "shim.cli.configure.os.path.isdir",
        lambda path, known=os.path.isdir: path != "/run/systemd/system" and known(path),
    )
    assert made.run("--cdi", "--restart") == 1
    assert "systemd does not run here" in capsys.readouterr().err
