"""Path lookup in an image, by the kernel and, where it cannot, step by step: both must give the same result."""

from __future__ import annotations

import errno
import os
import pathlib
import subprocess
import sys

import lab
import pytest

from shim.host.inroot import Root

REPOSITORY = pathlib.Path(lab.REPOSITORY)
WAYS = pytest.mark.parametrize("kernel", [True, False], ids=["openat2", "by steps"])


@pytest.fixture
def image(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "rootfs"
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/a").write_text("inside")
    (root / "etc").mkdir()
    (tmp_path / "outside").write_text("the host's")
    for path, target in {
        "abs": "/usr/lib/a",
        "lib": "usr/lib",
        "up": "../../../../usr/lib/a",
        "out": str(tmp_path / "outside"),
        "loop": "loop",
        "self": "/",
        "usr/back": "..",
        "chain": "self/self/lib/a",
        "gone": "/nothing",
    }.items():
        (root / path).symlink_to(target)
    os.mkfifo(root / "fifo")
    return root


@WAYS
@pytest.mark.parametrize(
    "path, found",
    [
        ("/usr/lib/a", "inside"),
        ("/abs", "inside"),
        ("/lib/a", "inside"),
        ("/up", "inside"),
        ("/chain", "inside"),
        ("/self/usr/back/lib/a", "inside"),
        ("/../../usr/lib/a", "inside"),
        ("//usr/./lib//a", "inside"),
        ("/usr/lib/../../abs", "inside"),
        ("/out", errno.ENOENT),
        ("/gone", errno.ENOENT),
        ("/loop", errno.ELOOP),
        ("/usr/lib/a/b", errno.ENOTDIR),
        ("/fifo/x", errno.ENOTDIR),
    ],
)
def test_lookup_stays_in_the_root(image: pathlib.Path, path: str, found: str | int, kernel: bool) -> None:
    root = Root(str(image), kernel)
    try:
        if isinstance(found, int):
            with pytest.raises(OSError) as caught:
                root.find(path)
            assert caught.value.errno == found
        else:
            descriptor = root.find(path)
            assert os.readlink(f"/proc/self/fd/{descriptor}") == str(image / "usr/lib/a")
            os.close(descriptor)
    finally:
        root.close()


@WAYS
def test_the_last_link_can_stay_unfollowed(image: pathlib.Path, kernel: bool) -> None:
    root = Root(str(image), kernel)
    descriptor = root.find("/usr/../abs", follow=False)
    assert os.readlink("", dir_fd=descriptor) == "/usr/lib/a"
    os.close(descriptor)
    root.close()


@WAYS
def test_no_descriptor_stays_open(image: pathlib.Path, kernel: bool) -> None:
    root = Root(str(image), kernel)
    before = len(os.listdir("/proc/self/fd"))
    for path in ("/chain", "/loop", "/out", "/usr/lib/a/b", "/fifo"):
        try:
            os.close(root.find(path))
        except OSError:
            pass
    os.close(root.directory("/new/folder", make=True))
    with pytest.raises(OSError):
        root.directory("/gone/x", make=True)
    with pytest.raises(NotADirectoryError):
        root.directory("/abs")
    assert len(os.listdir("/proc/self/fd")) == before
    root.close()


CROSSING = """
import errno, os, sys
sys.path.insert(0, sys.argv[2])
from shim.host.inroot import Root
root = Root(sys.argv[1], sys.argv[3] == "True")
for path in ("/usr/lib/a", "/lib/a", "/usr/lib"):
    try:
        root.find(path)
    except OSError as error:
        print(errno.errorcode[error.errno])
    os.close(root.find(path, cross=True))
os.close(root.find("/etc"))
os.close(root.find("/usr"))
"""


@pytest.mark.usefixtures("needs_mounts")
@WAYS
def test_mount_points_are_noticed_even_of_the_same_disk(image: pathlib.Path, kernel: bool) -> None:
    done = subprocess.run(
        [
            "unshare",
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            'mount --bind "$1/usr/lib" "$1/usr/lib"; shift; exec "$@"',
            "sh",
            str(image),
            sys.executable,
            "-I",
            "-c",
            CROSSING,
            str(image),
            str(REPOSITORY),
            str(kernel),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["EXDEV"] * 3, done.stderr
