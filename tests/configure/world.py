"""A machine whose configuration is below one directory, on which `chandler configure` runs in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim import paths
from shim.cli import configure, main
from shim.configure import podman

CORPUS = Path(__file__).parent / "corpus"
# Engine: where its main file is.
FILES = {
    "containerd": "etc/containerd/config.toml",
    "docker": "etc/docker/daemon.json",
    "crio": "etc/crio/crio.conf",
    "podman": "etc/containers/containers.conf",
}


def corpus(engine: str) -> list[Path]:
    return sorted((CORPUS / engine).iterdir())


class World:
    """A machine with one engine.  `version`: the version that containerd reports."""

    def __init__(self, root: Path, engine: str, version: str = "1.7.24") -> None:
        self.root, self.engine, self.version = root, engine, version
        self.file = root / FILES[engine]
        self.file.parent.mkdir(parents=True)

    def run(self, *options: str) -> int:
        known = ["--engine-version", self.version] if self.engine == "containerd" and self.version else []
        return main.main(["configure", self.engine, "--config", str(self.file), *known, *options])

    def tree(self) -> dict[str, tuple[bytes, int]]:
        """Every file with its bytes and mode, and every directory."""
        found: dict[str, tuple[bytes, int]] = {}
        for path in sorted((self.root / "etc").rglob("*")):
            found[str(path.relative_to(self.root))] = (
                path.read_bytes() if path.is_file() else b"",
                path.lstat().st_mode,
            )
        return found


class TrustingAccount:
    """An Account that trusts files of the test's user, whoever runs the tests."""

    def __init__(self, root: Path) -> None:
        self.config_path = str(root / "etc/chandler/config.toml")
        self.rootless = False
        self.euid = os.geteuid()
        self.owners = {0: "root", os.geteuid(): "the caller"}


def use_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every absolute path outside of `root` is looked up below `root` from now on."""
    root.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(paths, "HOOK", str(root / "usr/bin/chandler-hook"))
    monkeypatch.setattr(paths, "CONFIG_DIR", str(root / "etc/chandler"))
    monkeypatch.setattr(podman, "VENDOR", str(root / "usr/share/containers.conf"))
    monkeypatch.setattr(podman, "CONFIG", str(root / "etc/containers/containers.conf"))
    monkeypatch.setattr(configure, "Account", lambda _: TrustingAccount(root))
    (root / "usr/bin").mkdir(parents=True)
    for name in ("chandler-runtime", "chandler-runc", "chandler-youki", "chandler-crun"):
        (root / "usr/bin" / name).write_text("#!/bin/sh\n")
        (root / "usr/bin" / name).chmod(0o755)
    (root / "etc/chandler").mkdir(parents=True)


def leaves(document: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every value of nested tables by its path."""
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, document
