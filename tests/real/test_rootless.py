"""An unprivileged user in a user namespace of his own, as rootless podman calls a runtime.

CDI files and runtimes belong to root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from lab import bundle, runtimes
from lab.engine import Engine
from lab.install import Installation
from lab.runtimes import Runtime

UID = 12345
# In a user namespace no device can be made, so runtimes mount the host's. A device that everybody may see stands for
# the GPU.
DEVICE = "/dev/kmsg"
SPEC = f"""
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
- name: "0"
  containerEdits:
    env: [FROM_CDI=yes]
    deviceNodes: [{{path: {DEVICE}}}]
"""
USER = ("setpriv", "--reuid", str(UID), "--regid", str(UID), "--clear-groups", "unshare", "-Ur")


@pytest.fixture
def home(workdir: str) -> str:
    directory = os.path.join(workdir, "home")
    os.mkdir(directory)
    os.chown(directory, UID, UID)
    return directory


@pytest.fixture
def user(needs_kmsg: None, runtime: Runtime, installation: Installation, workdir: str, home: str) -> Iterator[Engine]:
    specs = os.path.join(workdir, "cdi")
    os.mkdir(specs, 0o755)
    with open(os.path.join(specs, "nvidia.yaml"), "w", encoding="utf-8") as file:
        file.write(SPEC)
    installation.configure([runtime.path], [specs])
    # USER tells runc that it may go without control groups.
    engine = Engine(
        [*runtime.wrap, *USER, installation.program()],
        os.path.join(home, "root"),
        env={"USER": "lab", "HOME": home, "XDG_RUNTIME_DIR": home},
    )
    if runtime.kind == "crun":
        engine.command += ["--cgroup-manager", "disabled"]
    yield engine
    engine.clean()


def make(home: str, *args: str, **document: object) -> bundle.Bundle:
    made = bundle.make(os.path.join(home, "b"), list(args), bundle.request(**document))
    config = made.config
    del config["linux"]["cgroupsPath"], config["linux"]["resources"]
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] != "cgroup"]
    for mount in config["mounts"]:
        mount["options"] = [option for option in mount["options"] if not option.startswith("gid=")]
    made.config = config
    for directory, _, names in os.walk(made.directory):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            os.lchown(path, UID, UID)
    return made


@pytest.mark.parametrize(
    "runtime", [found.label for found in runtimes.known() if found.kind != "youki" and found.limits], indirect=True
)
def test_a_container_of_an_unprivileged_user(user: Engine, home: str) -> None:
    made = make(
        home, "sh", "-c", f"test -c {DEVICE} && echo device; env", resources={"gpu": {"count": 1}}, env={"A": "b"}
    )
    seen = user.run(made, "c1").stdout.splitlines()
    assert {"device", "A=b", "FROM_CDI=yes"} <= set(seen)


def test_an_unprivileged_users_cdi_file_is_refused_in_the_nodes_directory(
    installation: Installation, workdir: str, home: str
) -> None:
    """Root must not trust a file that an unprivileged user could write."""
    runtime = runtimes.named("runc")
    if runtime.missing:
        pytest.skip(runtime.missing)
    spec = os.path.join(home, "nvidia.yaml")
    with open(spec, "w", encoding="utf-8") as file:
        file.write(SPEC)
    os.chown(spec, UID, UID)
    installation.configure([runtime.path], [home])
    engine = Engine([installation.program()], os.path.join(workdir, "root"))
    made = bundle.make(os.path.join(workdir, "b"), ["true"], bundle.request(resources={"gpu": {"count": 1}}))
    done = engine.create(made, "c1", check=False)
    assert done.returncode == 1 and home in done.stderr
