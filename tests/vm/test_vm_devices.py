"""A leased GPU is its container's until the container ends, whatever changes its control group."""

from __future__ import annotations

import pytest
from lab import bundle, runtimes
from lab.containerd import RELEASES
from lab.cri import CRI, Refused, reason
from lab.engine import Engine
from lab.install import Installation
from lab.node import Node
from lab.units import systemctl

LEASES = '[gpu]\nallocator = "leases"\n'
RUNTIMES = ("runc", "newer-runc", "crun", "newer-crun")
# What administrators, scripts of packages or a kubelet do while containers run.
EVENTS = (
    ("daemon-reload",),
    ("reset-failed",),
    ("set-property", "--runtime", "system.slice", "CPUWeight=90"),
    ("daemon-reexec",),
)


def opened(cri: CRI, container: str, *paths: str) -> list[str]:
    """Those that a container can open for reading and writing."""
    return cri.exec(
        container, "sh", "-c", "; ".join(f"test -c {path} && (exec 3<>{path}) && echo {path}" for path in paths)
    ).out.split()


@pytest.mark.parametrize("containerd", RELEASES[-1:], indirect=True, ids=lambda release: release.label)
def test_a_lease_of_a_pod(cri: CRI, chandler: Installation, gpus: Node) -> None:
    chandler.configure([runtimes.named("runc").path], [gpus.cdi], LEASES)
    one = bundle.request(resources={"gpu": {"count": 1}})
    first = cri.run(cri.pod("first", one, "chandler", cgroup_parent="kubepods.slice"))
    second = cri.run(cri.pod("second", one, "chandler", cgroup_parent="kubepods.slice"))
    # Neither the host's /dev nor a node made inside opens a GPU without a lease.
    third = cri.run(cri.pod("none", None, "chandler", cgroup_parent="kubepods.slice"), mounts={"/host": "/dev"})
    cri.exec(third, "mknod", "/made", "c", "195", "0")
    cri.exec(second, "mknod", "/made", "c", "195", "0")

    def right() -> None:
        assert opened(cri, first, "/dev/nvidia0", "/dev/nvidiactl") == ["/dev/nvidia0", "/dev/nvidiactl"]
        assert opened(cri, second, "/dev/nvidia1", "/made") == ["/dev/nvidia1"]
        assert opened(cri, third, "/host/null", "/host/nvidia0", "/made") == ["/host/null"]

    right()
    assert "not permitted" in cri.exec(third, "sh", "-c", "exec 3<>/host/nvidia0").err
    fourth = cri.create(cri.pod("late", one, "chandler", cgroup_parent="kubepods.slice"))
    with pytest.raises(Refused) as error:
        cri.start(fourth)
    assert "pod default/first (main) holds nvidia.com/gpu=0" in reason(error)
    systemctl("daemon-reload")
    right()
    for container in (first, second, third):
        cri.update(container, memory_limit_in_bytes=64 << 20, cpu_quota=20000, cpu_period=100000)
    for words in EVENTS:
        systemctl(*words)
    right()
    assert chandler.leases() == {
        id: [f"nvidia.com/gpu={number}"]
        for number, ids in enumerate(((first, cri.pods[0].id), (second, cri.pods[1].id)))
        for id in ids
    }
    cri.remove(first)
    cri.end(cri.pods[0])
    assert chandler.leases().keys() == {second, cri.pods[0].id}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_lease_under_each_runtime(runtime: str, chandler: Installation, gpus: Node, workdir: str) -> None:
    """With an update by the runtime itself."""
    chandler.configure([runtimes.named(runtime).path], [gpus.cdi], LEASES)
    engine = Engine([chandler.program(), "--systemd-cgroup"], workdir + "/root")
    made = bundle.make(workdir + "/b", ["sleep", "60"], bundle.request(resources={"gpu": {"devices": ["1"]}}))
    config = made.config
    config["linux"]["cgroupsPath"] = f"system.slice:lab:{runtime}"
    made.config = config
    engine.create(made, runtime)
    engine.call("start", runtime)

    def right() -> None:
        done = engine.exec(
            runtime,
            "sh",
            "-c",
            "test -c /dev/nvidia1 || echo no nvidia1 >&2; exec 3<>/dev/nvidia1; "
            "test -e /made || mknod /made c 195 0; exec 3<>/made",
            check=False,
        )
        assert "/made: Operation not permitted" in done.stderr and "nvidia1" not in done.stderr

    right()
    for change in (("--memory", str(64 << 20)), ("--pids-limit", "50")):
        engine.call("update", *change, runtime)
    right()
    systemctl("daemon-reload")
    right()
    assert chandler.leases().keys() == {runtime}
    engine.delete(runtime, "--force")
    assert chandler.leases() == {}
