"""What counts as a change of the sources, with inotify and without."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.node.watch import Watch


@pytest.fixture(params=[True, False], ids=["inotify", "polled"])
def watch(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Watch]:
    made = Watch(use_inotify=request.param)
    assert (made.fileno() >= 0) == request.param
    for name in ("etc", "cdi"):
        (tmp_path / name).mkdir()
    (tmp_path / "etc/config.toml").write_text("a")
    (tmp_path / "cdi/b.yaml").write_text("b")
    made.set(
        {
            str(tmp_path / "etc"): ("config.toml",),
            str(tmp_path / "etc/config.d"): (".toml",),
            str(tmp_path / "cdi"): (".json", ".yaml"),
            str(tmp_path / "late/cdi"): (".json",),
        }
    )
    assert not made.changed()
    yield made
    made.close()


def replace(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.rename(new, path)


NEWS: dict[str, Callable[[Path], object]] = {
    "the configuration is replaced": lambda top: replace(top / "etc/config.toml", "longer"),
    "the configuration is written": lambda top: (top / "etc/config.toml").write_text("longer"),
    "a CDI file comes": lambda top: replace(top / "cdi/new.json", "{}"),
    "a CDI file goes": lambda top: os.unlink(top / "cdi/b.yaml"),
    "a CDI file gets another mode": lambda top: os.chmod(top / "cdi/b.yaml", 0o600),
    "config.d comes": lambda top: (top / "etc/config.d").mkdir(),
    "a CDI directory goes": lambda top: shutil.rmtree(top / "cdi"),
    "the way to a directory comes": lambda top: (top / "late").mkdir(),
}
NO_NEWS: dict[str, Callable[[Path], object]] = {
    "what compiling leaves beside the configuration": lambda top: replace(top / "etc/launch", "1"),
    "a temporary file": lambda top: (top / "cdi/b.yaml.new").write_text("x"),
    "a file elsewhere": lambda top: (top / "other.json").write_text("x"),
    "nothing": lambda top: None,
}


@pytest.mark.parametrize("change", NEWS.values(), ids=NEWS)
def test_a_change_of_a_source_is_noticed(watch: Watch, tmp_path: Path, change: Callable[[Path], object]) -> None:
    change(tmp_path)
    assert watch.changed()
    assert not watch.changed()


@pytest.mark.parametrize("change", NO_NEWS.values(), ids=NO_NEWS)
def test_other_changes_are_ignored(watch: Watch, tmp_path: Path, change: Callable[[Path], object]) -> None:
    change(tmp_path)
    assert not watch.changed()


def test_a_new_directory_is_watched_after_set(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "late/cdi").mkdir(parents=True)
    assert watch.changed()
    watch.set({str(tmp_path / "late/cdi"): (".json",)})
    watch.changed()
    (tmp_path / "late/cdi/x.json").write_text("{}")
    assert watch.changed()
    (tmp_path / "etc/config.toml").write_text("not watched any more")
    assert not watch.changed()
