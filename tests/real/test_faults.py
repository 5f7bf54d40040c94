"""Creates on damaged bundles and full disks, and killed creates: config.json is always complete, and none blocks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from lab import bundle
from lab.engine import Engine, records
from lab.install import Installation
from lab.node import Node

SEED = 20260
KILLS = 100
ASKED = bundle.request(resources={"gpu": {"count": 2}}, env={"A": "b"})


class Bench:
    """Chandler over a runtime that only records its arguments, and a bundle with a request.

    Without leases, which would put another token into each config.json; other modules test them.
    """

    def __init__(self, installation: Installation, node: Node, workdir: str) -> None:
        self.workdir = workdir
        self.note = os.path.join(workdir, "started")
        runtime = os.path.join(workdir, "runc")
        with open(runtime, "w", encoding="utf-8") as script:
            script.write(f'#!/bin/sh\necho "$@" >> {self.note}\n')
        os.chmod(runtime, 0o755)
        installation.configure([runtime], [node.cdi], '[gpu]\nallocator = "fixed"\n')
        self.engine = Engine([installation.program()], os.path.join(workdir, "root"))
        self.bundle = bundle.make(os.path.join(workdir, "b"), ["true"], ASKED)
        # Outside the bundle, because some tests make that read-only or full.
        self.bundle.log, self.bundle.out = os.path.join(workdir, "log.json"), os.path.join(workdir, "out.log")

    def create(self) -> subprocess.CompletedProcess[str]:
        return self.engine.create(self.bundle, "c1", check=False, timeout=20)

    def started(self) -> bool:
        return os.path.exists(self.note)

    def refused(self) -> str:
        done = self.create()
        assert done.returncode == 1
        assert not self.started()
        (sentence,) = done.stderr.splitlines()
        (record,) = records(self.bundle.log)
        assert record["level"] == "error" and "Traceback" not in sentence
        return sentence

    def handed_over(self) -> None:
        assert self.create().returncode == 0
        assert self.started()

    # The engine's text and the digest of ours stay by design; nothing else does.
    def leftovers(self) -> set[str]:
        return set(os.listdir(self.bundle.directory)) - {
            "config.json",
            "config.json.chandler-original",
            "config.json.chandler-edited",
            "rootfs",
        }


@pytest.fixture
def bench(installation: Installation, node: Node, workdir: str) -> Iterator[Bench]:
    yield Bench(installation, node, workdir)


def test_a_read_only_bundle(bench: Bench) -> None:
    directory = bench.bundle.directory
    before = bench.bundle.bytes
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)
        assert directory in bench.refused()
    finally:
        subprocess.run(["umount", directory], check=True)
    assert bench.bundle.bytes == before and not bench.leftovers()


def test_a_full_disk(bench: Bench) -> None:
    small = os.path.join(bench.workdir, "small")
    os.mkdir(small)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "small", small], check=True)
    try:
        directory = os.path.join(small, "b")
        os.mkdir(directory)
        data = bench.bundle.bytes
        bench.bundle.directory, bench.bundle.path = directory, os.path.join(directory, "config.json")
        bench.bundle.pid_file = os.path.join(bench.workdir, "init.pid")
        with open(bench.bundle.path, "wb") as file:
            file.write(data)
        filler = os.open(os.path.join(small, "filler"), os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(filler, b"x" * 4096)
        os.close(filler)
        sentence = bench.refused()
        assert "space" in sentence.lower() or directory in sentence
        assert bench.bundle.bytes == data and not bench.leftovers()
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not JSON chandler.oci/service",
        b'{"annotations": {"chandler.oci/service": "{}"}',
        b"\xff\xfechandler.oci/",
    ],
    ids=["empty", "not JSON", "cut off", "not UTF-8"],
)
def test_a_config_that_is_no_json(bench: Bench, text: bytes) -> None:
    """Without the prefix in its text the runtime judges it; where it may have a request, nothing starts."""
    with open(bench.bundle.path, "wb") as file:
        file.write(text)
    if text:
        assert bench.bundle.path in bench.refused()
    else:
        bench.handed_over()
    assert bench.bundle.bytes == text and not bench.leftovers()


def test_a_config_that_is_missing(bench: Bench) -> None:
    os.unlink(bench.bundle.path)
    bench.handed_over()


def test_a_config_that_is_a_directory(bench: Bench) -> None:
    os.unlink(bench.bundle.path)
    os.mkdir(bench.bundle.path)
    bench.handed_over()


def test_a_config_that_is_a_fifo(bench: Bench) -> None:
    """Nothing writes to the FIFO, so opening it to read would block for ever.

    The create is refused, because the runtime might read a request from it.
    """
    os.unlink(bench.bundle.path)
    os.mkfifo(bench.bundle.path)
    assert "is not a regular file" in bench.refused()


def test_a_fifo_that_somebody_writes_a_request_to(bench: Bench) -> None:
    data = bench.bundle.bytes
    os.unlink(bench.bundle.path)
    os.mkfifo(bench.bundle.path)
    descriptor = os.open(bench.bundle.path, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(descriptor, data)
        assert "is not a regular file" in bench.refused()
        assert os.read(descriptor, 1 << 20) == data
    finally:
        os.close(descriptor)


def test_a_config_that_is_a_symlink(bench: Bench) -> None:
    target = os.path.join(bench.workdir, "elsewhere.json")
    os.rename(bench.bundle.path, target)
    os.symlink(target, bench.bundle.path)
    before = bench.bundle.bytes
    assert bench.bundle.path in bench.refused()
    assert os.path.islink(bench.bundle.path) and bench.bundle.bytes == before


def test_a_config_with_another_name(bench: Bench) -> None:
    """Replacing config.json would leave the old text under the other hard link.

    Writing in place would change that other file.
    """
    other = os.path.join(bench.workdir, "other.json")
    os.link(bench.bundle.path, other)
    before = bench.bundle.bytes
    assert bench.bundle.path in bench.refused()
    assert bench.bundle.bytes == before and os.stat(other).st_nlink == 2


def test_a_config_that_is_a_mount(bench: Bench) -> None:
    """A mount cannot be replaced by rename(2)."""
    source = os.path.join(bench.workdir, "source.json")
    with open(source, "wb") as file:
        file.write(bench.bundle.bytes)
    subprocess.run(["mount", "--bind", source, bench.bundle.path], check=True)
    try:
        before = bench.bundle.bytes
        assert bench.bundle.path in bench.refused()
        assert bench.bundle.bytes == before and not bench.leftovers()
    finally:
        subprocess.run(["umount", bench.bundle.path], check=True)


def test_a_config_of_64_mib(bench: Bench) -> None:
    config = bench.bundle.config
    config["padding"] = "x" * (64 << 20)
    bench.bundle.config = config
    size = os.stat(bench.bundle.path).st_size
    assert bench.bundle.path in bench.refused()
    assert os.stat(bench.bundle.path).st_size == size


def test_a_bundle_that_is_missing(bench: Bench) -> None:
    """The caller gets the runtime's own message, which it knows."""
    bench.bundle.directory = os.path.join(bench.workdir, "nowhere")
    bench.handed_over()


def test_owner_and_mode_stay(bench: Bench) -> None:
    os.chown(bench.bundle.path, 1234, 4321)
    os.chmod(bench.bundle.path, 0o640)
    bench.handed_over()
    status = os.stat(bench.bundle.path)
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 4321, 0o640)
    assert "A=b" in bench.bundle.config["process"]["env"]
    assert not bench.leftovers()


def test_a_reader_sees_the_old_or_the_new_text_only(bench: Bench) -> None:
    """While creates replace it, config.json is never missing and never half there."""
    old, seen, stop = bench.bundle.bytes, set(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(bench.bundle.bytes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    bench.handed_over()
    stop.set()
    watcher.join()
    assert seen <= {old, bench.bundle.bytes}


def test_killed_at_any_moment(bench: Bench) -> None:
    """kill -9 at random points of a create, a hundred times: config.json has the old text or the new one."""
    old = bench.bundle.bytes
    began = time.monotonic()
    bench.handed_over()
    whole = time.monotonic() - began
    new = bench.bundle.bytes
    assert new != old
    chance = random.Random(SEED)
    seen = set()
    for _ in range(KILLS):
        for name in os.listdir(bench.bundle.directory):
            if name.startswith("config.json"):
                os.unlink(os.path.join(bench.bundle.directory, name))
        with open(bench.bundle.path, "wb") as file:
            file.write(old)
        process = subprocess.Popen(
            bench.engine.argv("create", "--bundle", bench.bundle.directory, "c1"),
            env=bench.engine.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(chance.uniform(0, whole))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = bench.bundle.bytes
        assert found in (old, new)
        seen.add(found)
        # The next create works, whatever the killed one left.
        bench.handed_over()
        assert bench.bundle.bytes == new
        assert not bench.leftovers(), "a temporary file stayed behind"
    assert seen == {old, new}, "the kills came all too early or all too late to prove anything"


def test_an_inventory_that_is_damaged(bench: Bench, installation: Installation) -> None:
    """Loss or damage of the state costs time, never correctness."""
    bench.handed_over()
    new = bench.bundle.bytes
    chance = random.Random(SEED)
    for directory, _, names in os.walk(installation.state):
        for name in names:
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                data = file.read()
            with open(path, "wb") as file:
                file.write(data[: chance.randrange(len(data) + 1)])
    with open(bench.bundle.path, "w", encoding="utf-8") as text:
        json.dump(bundle.config(["true"], ASKED), text)
    done = bench.create()
    installation.forget()  # others use it after us, and grant records are damaged
    assert done.returncode == 0, done.stderr
    assert bench.bundle.config["linux"]["devices"] == json.loads(new)["linux"]["devices"]
