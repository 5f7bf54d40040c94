"""cgroup v2 under systemd: limits and paths of groups, read back from inside and from the machine's tree."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from lab import bundle, runtimes
from lab.containerd import Containerd
from lab.cri import CRI
from lab.engine import Engine, read
from lab.install import Installation
from lab.plugin import until
from lab.units import systemctl

WISH = {
    "cpu": "500m",
    "memory": "64Mi",
    "memory_swap": "96Mi",
    "pids_limit": 77,
    "cpu_shares": 512,
    "oom_score_adj": 500,
}
# What the kernel then says. Swap is without memory there; runtimes make two different weights of 512 shares.
LIMITS = {
    "cpu.max": {"50000 100000"},
    "memory.max": {str(64 << 20)},
    "memory.swap.max": {str(32 << 20)},
    "pids.max": {"77"},
    "cpu.weight": {"20", "59"},
}
FILES = (
    f"cd /sys/fs/cgroup; for file in {' '.join(LIMITS)}; do echo $file=$(cat $file); done; "
    "echo oom=$(cat /proc/self/oom_score_adj)"
)
RUNTIMES = ("runc", "newer-runc", "crun", "newer-crun")


def told(output: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in output.splitlines())


def check(limits: dict[str, str]) -> None:
    assert limits["oom"] == "500"
    for name, right in LIMITS.items():
        assert limits[name] in right, f"{name} is {limits[name]}"


def group(pid: int) -> str:
    with open(f"/proc/{pid}/cgroup", encoding="ascii") as table:
        return table.read().strip().removeprefix("0::")


def limits_of(path: str) -> dict[str, str]:
    """The limits as the machine sees them."""
    found = {}
    for name in LIMITS:
        with open(f"/sys/fs/cgroup{path}/{name}", encoding="ascii") as file:
            found[name] = file.read().strip()
    return found


def policy(runtime: str) -> tuple[list[str], list[str], str]:
    return (
        [runtimes.named(runtime).path],
        ["/etc/cdi"],
        '[policy]\nallow = ["resources", "cgroup_parent"]\ncgroup-parents = ["chandler.slice"]\n',
    )


def test_limits_of_a_pod(cri: CRI, chandler: Installation) -> None:
    chandler.configure(*policy("runc"))
    pod = cri.pod(
        "limits",
        bundle.request(resources=WISH, cgroup_parent="chandler.slice"),
        "chandler",
        cgroup_parent="kubepods.slice",
    )
    container = cri.run(pod)
    check(told(cri.exec(container, "sh", "-c", FILES).out))
    path = group(cri.info(container)["pid"])
    assert path.startswith("/chandler.slice/") and path.endswith(f"-{container}.scope")
    check({**limits_of(path), "oom": "500"})


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_slice_for_a_runtime_that_is_told_to_use_systemd(runtime: str, chandler: Installation, workdir: str) -> None:
    chandler.configure(*policy(runtime))
    engine = Engine([chandler.program(), "--systemd-cgroup"], workdir + "/root")
    made = bundle.make(
        workdir + "/b",
        ["sh", "-c", FILES + "; sleep 60"],
        bundle.request(resources=WISH, cgroup_parent="chandler.slice"),
    )
    config = made.config
    config["linux"]["cgroupsPath"] = f"system.slice:lab:{runtime}"
    config["linux"]["namespaces"].append({"type": "cgroup"})
    made.config = config
    engine.create(made, runtime)
    engine.call("start", runtime)
    path = group(engine.state(runtime)["pid"])
    scope = path.removesuffix("/container")  # crun's own
    assert scope == f"/chandler.slice/lab-{runtime}.scope"
    check({**limits_of(path), "oom": "500"})
    until(lambda: "oom=" in made.output(), "the container's word")
    check(told(made.output()))
    systemctl("daemon-reload")
    check({**limits_of(path), "oom": "500"})
    engine.delete(runtime, "--force")
    assert not os.path.exists("/sys/fs/cgroup" + scope)


@pytest.mark.parametrize("runtime", ("runc", "crun", "youki"))
def test_a_path_for_a_runtime_that_makes_groups_itself(runtime: str, chandler: Installation, workdir: str) -> None:
    paths, dirs, more = policy(runtime)
    chandler.configure(paths, dirs, more.replace("chandler.slice", "/chandler"))
    engine = Engine([chandler.program()], workdir + "/root")
    made = bundle.make(workdir + "/b", ["sleep", "60"], bundle.request(resources=WISH, cgroup_parent="/chandler"))
    config = made.config
    config["linux"]["cgroupsPath"] = f"/kubepods/{runtime}"
    config["linux"]["namespaces"].append({"type": "cgroup"})
    made.config = config
    engine.create(made, runtime)
    engine.call("start", runtime)
    pid = engine.state(runtime)["pid"]
    path = group(pid)
    assert path.removesuffix("/container") == f"/chandler/{runtime}"
    check({**limits_of(path), "oom": read(f"/proc/{pid}/oom_score_adj").strip()})
    engine.delete(runtime, "--force")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("parent", ["chandler.slice", ""])
def test_a_bundle_that_systemd_makes_room_for(runtime: str, parent: str, chandler: Installation, workdir: str) -> None:
    chandler.configure(*policy(runtime))
    file = workdir + "/deployment.json"
    service = {"image": {"name": "busybox"}, "resources": WISH, "command": {"args": ["sh", "-c", FILES + "; cat"]}}
    with open(file, "w", encoding="ascii") as text:
        json.dump(
            {
                "version": "v1",
                "deployment": "lab",
                "services": {"web": {**service, **({"cgroup_parent": parent} if parent else {})}},
            },
            text,
        )
    with subprocess.Popen(
        [
            chandler.program("chandler"),
            "bundle",
            "run",
            "--systemd-cgroup",
            "--spec",
            file,
            "--rootfs",
            bundle.rootfs(workdir + "/image"),
            workdir + "/web",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        scope = f"/{parent or 'system.slice'}/chandler-web.scope"
        assert (
            until(lambda: run.poll() is not None or os.path.exists("/sys/fs/cgroup" + scope), scope)
            and run.poll() is None
        )
        output, _ = run.communicate()
    assert run.returncode == 0
    check(told(output))
    assert not os.path.exists("/sys/fs/cgroup" + scope) and not os.path.exists(workdir + "/web")


def contained(chandler: Installation, workdir: str, runtime: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a builder in a delegated group that its cgroup namespace shows as the root.

    `program`: a shell script with BUILD in place of the builder's command.
    """
    chandler.configure(*policy(runtime))
    file, unit = workdir + "/deployment.json", f"lab-builder-{os.path.basename(workdir)}.service"
    with open(file, "w", encoding="ascii") as text:
        json.dump(
            {
                "version": "v1",
                "deployment": "lab",
                "services": {
                    "web": {"image": {"name": "busybox"}, "resources": WISH, "command": {"args": ["sh", "-c", FILES]}}
                },
            },
            text,
        )
    build = program.replace(
        "BUILD", f"chandler bundle run --spec {file} --rootfs {bundle.rootfs(workdir + '/image')} {workdir}/web"
    )
    return subprocess.run(
        [
            "systemd-run",
            "--quiet",
            "--pipe",
            "--wait",
            f"--unit={unit}",
            "--property=Delegate=yes",
            "unshare",
            "--cgroup",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            f"umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && {build}",
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("runtime", ("runc", "crun", "youki"))
def test_a_builder_in_a_container_makes_room(runtime: str, chandler: Installation, workdir: str) -> None:
    """It moves into a leaf group, and limits hold for containers beside it."""
    done = contained(chandler, workdir, runtime, "exec BUILD")
    assert done.returncode == 0, done.stderr
    check(told(done.stdout))


def test_a_builder_with_neighbours_in_its_group(chandler: Installation, workdir: str) -> None:
    """Its group cannot enable controllers for others; the kernel's error would be "device or resource busy"."""
    done = contained(chandler, workdir, "runc", "BUILD")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert (
        "other processes are in it, such as " in done.stderr
        and "start the builder in a group of its own that has it" in done.stderr
    )


def test_doctor_on_such_a_machine(chandler: Installation, containerd: Containerd) -> None:
    """Nothing that is right is reported as a problem."""
    chandler.configure(*policy("newer-runc"))
    os.makedirs("/etc/containerd", exist_ok=True)
    shutil.copy(os.path.join(containerd.directory, "config.toml"), "/etc/containerd/config.toml")
    done = subprocess.run(
        [chandler.program("chandler"), "doctor", "--format", "json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    os.unlink("/etc/containerd/config.toml")
    seen = json.loads(done.stdout)
    groups = seen["checks"]["cgroups"]
    assert groups["version"] == "v2" and not groups["nested"] and groups["root_writable"]
    assert {"cpu", "io", "memory", "pids"} <= set(groups["controllers"])
    assert seen["checks"]["cdi"]["devices"] == {"nvidia.com/gpu": 5}
    assert (done.returncode, seen["problems"]) == (0, [])
