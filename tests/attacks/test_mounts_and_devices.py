"""CDI edits as real runtimes carry them out: which mount covers which, owners of files, dangerous device numbers."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import bundle
from lab.engine import Engine
from lab.install import Installation
from lab.runtimes import Runtime

KIND = "mount.test/dev"
Serve = Callable[..., Engine]


@functools.cache
def installed(lab: str, runtime: Runtime) -> Installation:
    return Installation(os.path.join(lab, "mounts-" + runtime.label))


@pytest.fixture(params=["warm"])
def serve(request: pytest.FixtureRequest, runtime: Runtime, lab: str, workdir: str) -> Iterator[Serve]:
    """Chandler over the runtime with a CDI file of one device, compiled before the create or by it."""
    engines = []

    def make(edits: dict[str, Any]) -> Engine:
        installation = installed(lab, runtime)
        os.makedirs(workdir + "/cdi")
        file = {"cdiVersion": "1.1.0", "kind": KIND, "devices": [{"name": "0", "containerEdits": edits}]}
        with open(workdir + "/cdi/file.json", "w", encoding="utf-8") as out:
            json.dump(file, out)
        installation.configure([runtime.path], [workdir + "/cdi"], f'[policy]\nkinds = ["{KIND}"]\nallow = ["gpu"]\n')
        installation.forget()
        if request.param == "warm":
            installation.refresh()
        engines.append(
            Engine(
                [*runtime.wrap, installation.program()], os.path.join(workdir, "root"), hangs=runtime.kind == "youki"
            )
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.clean()


def asking(workdir: str, *args: str) -> bundle.Bundle:
    return bundle.make(
        os.path.join(workdir, "b"), list(args), bundle.request(resources={"gpu": {"vendor": KIND, "devices": ["0"]}})
    )


def folder(workdir: str, name: str) -> str:
    """A directory of the host with a file `who` that holds its name, and mount points below it."""
    path = os.path.join(workdir, "host", name)
    os.makedirs(path + "/b/c")
    os.mkdir(path + "/c")
    for where in ("", "/b", "/c", "/b/c"):
        with open(f"{path}{where}/who", "w", encoding="ascii") as file:
            file.write(name)
    return path


# Destinations of the engine's mounts and of ours, in order; and whose file a container reads where.
ORDERS: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "ours below the engine's": (["/a"], ["/a/b"], {"/a": "engine0", "/a/b": "own0", "/a/b/c": "own0"}),
    "ours above the engine's": (["/a/b"], ["/a"], {"/a": "own0", "/a/b": "engine0"}),
    "ours between two": (["/a", "/a/b/c"], ["/a/b"], {"/a": "engine0", "/a/b": "own0", "/a/b/c": "engine1"}),
    "ours in the place of one": (["/a", "/a/b"], ["/a"], {"/a": "own0", "/a/b": "engine1"}),
    "the engine covers its own": (["/a/b", "/a"], ["/z"], {"/a": "engine1", "/a/b": "engine1", "/z": "own0"}),
    "ours where the engine covered its own": (["/a/b", "/a"], ["/a/b"], {"/a": "engine1", "/a/b": "own0"}),
    "the engine covers its own below ours": (
        ["/a/b/c", "/a"],
        ["/a/b"],
        {"/a": "engine1", "/a/b": "own0", "/a/b/c": "own0"},
    ),
    "two of ours, the deeper one first": ([], ["/a/b", "/a"], {"/a": "own1", "/a/b": "own0"}),
    "through a link of the image": (["/a"], ["/link/b"], {"/a": "engine0", "/a/b": "own0"}),
}


@pytest.mark.parametrize("runtime", ["runc", "crun", "newer-runc", "newer-crun"], indirect=True)
@pytest.mark.parametrize(("engine", "ours", "read"), ORDERS.values(), ids=ORDERS)
def test_what_a_container_sees(
    serve: Serve, workdir: str, engine: list[str], ours: list[str], read: dict[str, str]
) -> None:
    mounts = [
        {"hostPath": folder(workdir, f"own{number}"), "containerPath": path, "options": ["rbind", "ro"]}
        for number, path in enumerate(ours)
    ]
    chandler = serve({"mounts": mounts})
    made = asking(workdir, "cat", *(f"{path}/who" for path in read))
    os.symlink("a", made.directory + "/rootfs/link")
    config = made.config
    own = [
        {"destination": path, "type": "bind", "source": folder(workdir, f"engine{number}"), "options": ["rbind", "ro"]}
        for number, path in enumerate(engine)
    ]
    config["mounts"] += own
    made.config = config
    assert chandler.run(made, "c1").stdout == "".join(read.values())
    kept = [mount["source"] for mount in made.config["mounts"] if mount in own]
    assert kept == [mount["source"] for mount in own if mount["source"] in kept], "the engine's mounts keep their order"


# --- user namespaces --------------------------------------------------------------------------------------------

MAPPING = [{"containerID": 0, "hostID": 200000, "size": 65536}]
NOBODY, OWNERS = "65534 65534", "0 5"
# What each runtime makes of idmap and ridmap: the owners that the container sees for files of the host's uids 0 and 5.
# None: the runtime refuses to start the container.
SEEN: dict[str, dict[str, dict[str, str | None]]] = {
    "runc": {"new": {"bind": NOBODY, "rbind": NOBODY}, "joined": {"bind": None, "rbind": None}},
    "newer-runc": {"new": {"bind": OWNERS, "rbind": OWNERS}, "joined": {"bind": OWNERS, "rbind": OWNERS}},
    "crun": {"new": {"bind": OWNERS, "rbind": NOBODY}, "joined": {"bind": OWNERS, "rbind": NOBODY}},
    "newer-crun": {"new": {"bind": OWNERS, "rbind": OWNERS}, "joined": {"bind": OWNERS, "rbind": OWNERS}},
    "youki": {"new": {"bind": NOBODY, "rbind": NOBODY}, "joined": {"bind": NOBODY, "rbind": NOBODY}},
}


@pytest.fixture
def namespace() -> Iterator[str]:
    """The path of a user namespace with the mapping, which a container can join."""
    holder = subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "\n"
        for table in ("uid_map", "gid_map"):
            with open(f"/proc/{holder.pid}/{table}", "w", encoding="ascii") as file:
                file.write("0 200000 65536")
        yield f"/proc/{holder.pid}/ns/user"
    finally:
        holder.communicate()


@pytest.mark.parametrize("runtime", SEEN, indirect=True)
@pytest.mark.parametrize("how", ["new", "joined"])
@pytest.mark.parametrize("bind", ["bind", "rbind"])
def test_owners_of_files(serve: Serve, runtime: Runtime, workdir: str, namespace: str, how: str, bind: str) -> None:
    source = folder(workdir, "own")
    os.chown(source + "/b/who", 5, 5)
    chandler = serve({"mounts": [{"hostPath": source, "containerPath": "/m", "options": ["ro", bind]}]})
    made = asking(workdir, "busybox", "stat", "-c", "%u", "/m/who", "/m/b/who")
    subprocess.run(["chown", "-R", "200000:200000", made.directory + "/rootfs"], check=True)
    config = made.config
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]
    config["linux"]["namespaces"].append({"type": "user", **({"path": namespace} if how == "joined" else {})})
    if how == "new":
        config["linux"].update(uidMappings=MAPPING, gidMappings=MAPPING)
    made.config = config
    done = chandler.run(made, "c1", check=False)
    assert (" ".join(done.stdout.split()) or None) == SEEN[runtime.label][how][bind], done.stderr
    assert ("idmap" in json.dumps(made.config["mounts"])) is (runtime.kind != "youki")


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", ["runc", "crun"], indirect=True)
@pytest.mark.parametrize("serve", ["cold"], indirect=True)  # such a file is not compiled, and a refresh says so
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("major", -1),
        ("minor", -1),
        ("major", 4096 + 1),
        ("minor", (1 << 20) + 3),
        ("minor", 3.5),
        ("fileMode", 0o60666),
        ("uid", (1 << 32) - 1),
    ],
)
def test_a_number_that_would_be_another_device(serve: Serve, workdir: str, field: str, value: float) -> None:
    """-1 in a rule of a control group stands for every device; the kernel truncates numbers that are too large."""
    chandler = serve(
        {
            "deviceNodes": [
                {"path": "/dev/x", "hostPath": "/dev/null", "type": "c", "major": 1, "minor": 3, field: value}
            ]
        }
    )
    made = asking(workdir, "sh", "-c", "echo started")
    before = made.bytes
    done = chandler.run(made, "c1", check=False)
    assert done.returncode == 1 and "started" not in done.stdout and made.bytes == before
    assert f"deviceNodes[0].{field}: must be " in done.stderr
