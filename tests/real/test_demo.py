"""The demo that README begins with: packaging/demo."""

from __future__ import annotations

import os
import subprocess

from lab import REPOSITORY


def test_the_demo_prints_real_results(lab: str) -> None:
    """Uses `lab` for its conditions, because the demo needs root, too."""
    before = kept()
    done = subprocess.run(
        [os.path.join(REPOSITORY, "packaging/demo")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Operation not permitted" in done.stdout and "All of it was checked and is true." in done.stdout
    assert kept() == before, "the demo left something behind"


def kept() -> set[str]:
    return {
        os.path.join(directory, name)
        for directory in ("/var/lib", "/run/chandler", "/run/chandler/inventory")
        if os.path.isdir(directory)
        for name in os.listdir(directory)
    }
