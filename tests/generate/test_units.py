"""When `chandler refresh` runs without a person: systemd's units and udev's rule, as installed."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import lab
import pytest

REPOSITORY = pathlib.Path(lab.REPOSITORY)
ETC, STATE, KEEP = "/opt/x/etc", "/opt/x/state", "/opt/x/kept"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An installation for another prefix, as a package would make it."""
    root = tmp_path_factory.mktemp("root")
    subprocess.run(
        [str(REPOSITORY / "packaging/install")],
        check=True,
        stdin=subprocess.DEVNULL,
        env={
            "PATH": os.environ["PATH"],
            "DESTDIR": str(root),
            "PREFIX": "/opt/x",
            "SYSCONFDIR": ETC,
            "STATEDIR": STATE,
            "KEEPDIR": KEEP,
        },
    )
    return root


def values(path: pathlib.Path, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", path.read_text(), re.MULTILINE)


def test_the_service_runs_what_is_installed(installed: pathlib.Path) -> None:
    unit = installed / "opt/x/lib/systemd/system/chandler-refresh.service"
    assert values(unit, "ExecStart") == ["/opt/x/bin/chandler refresh --quiet"]
    assert (installed / "opt/x/bin/chandler").exists()
    assert values(unit, "Type") == ["oneshot"]


@pytest.mark.parametrize("name", ["chandler-nri", "chandler-kubelet-plugin"])
def test_the_plugins_run_what_is_installed(installed: pathlib.Path, name: str) -> None:
    unit = installed / f"opt/x/lib/systemd/system/{name}.service"
    assert values(unit, "ExecStart") == [f"/opt/x/bin/{name}"] and (installed / f"opt/x/bin/{name}").exists()
    assert values(unit, "Type") == ["notify"] and "/var/lib/chandler" not in unit.read_text()


def test_the_device_plugin_may_write_where_it_keeps_its_key(installed: pathlib.Path) -> None:
    unit = installed / "opt/x/lib/systemd/system/chandler-kubelet-plugin.service"
    assert f"+/bin/mkdir -p {KEEP}" in values(unit, "ExecStartPre")
    (writable,) = values(unit, "ReadWritePaths")
    assert f"-{KEEP}" in writable.split()
    code = (installed / "opt/x/lib/chandler/shim/paths.py").read_text()
    assert f'KEEP_DIR = "{KEEP}"' in code


def test_no_watched_path_is_one_that_refresh_writes_to(installed: pathlib.Path) -> None:
    """Otherwise the unit would start itself for ever. A CDI file that is up to date is not written."""
    watched = values(installed / "opt/x/lib/systemd/system/chandler-refresh.path", "PathChanged")
    assert watched == [
        "/etc/cdi",
        "/run/cdi",
        f"{ETC}/chandler/config.toml",
        f"{ETC}/chandler/config.d",
        "/dev/nvidia-caps",
    ]


def test_the_rule_is_one_that_udev_reads(installed: pathlib.Path) -> None:
    rule = (installed / "opt/x/lib/udev/rules.d/70-chandler.rules").read_text()
    lines = [line for line in rule.splitlines() if line and not line.startswith("#")]
    labels = re.findall(r'LABEL="(\w+)"', rule)
    assert set(re.findall(r'GOTO="(\w+)"', rule)) == set(labels)
    assert all(re.fullmatch(r'((\w+)(==|!=|\+=|=)"[^"]*"(, )?)+', line) for line in lines)


def test_hooks_are_those_of_the_installation(installed: pathlib.Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from shim.generate.model import Options; print(Options().hook)"
    )
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-c", program, str(installed / "opt/x/lib/chandler")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "/opt/x/bin/chandler-hook\n"
    assert os.access(installed / "opt/x/bin/chandler-hook", os.X_OK)
