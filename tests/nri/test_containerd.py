"""The plugin with real containerds: pods through CRI, containers on runc, devices that open or do not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lab import cgroups
from lab.bundle import GROUPS
from lab.containerd import NEWEST_NRI, RELEASES
from lab.cri import CRI, Refused, reason
from lab.engine import read
from lab.install import Installation
from lab.node import KIND, Node, uuid
from lab.plugin import Plugin, launcher, until
from lab.scene import Scene, ask, gpus, opened
from lab.workdir import within


@pytest.fixture(scope="module", params=[*RELEASES, NEWEST_NRI], ids=lambda release: release.label)
def scene(request: pytest.FixtureRequest, lab: str, node: Node) -> Iterator[Scene]:
    if request.param.missing:
        pytest.skip(request.param.missing)
    with within(lab) as directory:
        made = Scene(request.param, directory, node)
        yield made
        made.close()


@pytest.fixture
def cri(scene: Scene) -> Iterator[CRI]:
    """With the plugin at work on the default configuration; the pods of the test end with it."""
    scene.configure()
    scene.plugin().start()
    yield scene.cri
    for pod in list(scene.cri.pods):
        scene.cri.end(pod)
    for plugin in scene.plugins:
        if plugin.process is not None:
            plugin.stop()
    scene.forget()


def limits(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec["linux"]["resources"].items() if key != "devices"}


def test_a_pod_with_a_request(scene: Scene, cri: CRI) -> None:
    pod = cri.pod(
        "full",
        ask(resources={**gpus(2), "memory": "64Mi", "cpu": "0.5", "cpuset": "0"}, env={"EPOCHS": "3", "PATH2": "/x"}),
    )
    container = cri.run(pod, env={"NVIDIA_VISIBLE_DEVICES": "all", "EPOCHS": "1"})
    assert opened(cri, container) == [0, 1]
    env = cri.env(container)
    assert (env["EPOCHS"], env["PATH2"], env["NVIDIA_VISIBLE_DEVICES"], env["CUDA_VISIBLE_DEVICES"]) == (
        "3",
        "/x",
        "void",
        "0,1",
    )
    spec = cri.spec(container)
    assert limits(spec) == {
        "memory": {"limit": 64 << 20, "swap": 64 << 20},
        "cpu": {"quota": 50000, "period": 100000, "cpus": "0"},
    }
    assert spec["annotations"]["chandler.oci/granted"] == f"{KIND}=0,{KIND}=1"
    assert len(spec["hooks"]["createContainer"]) == 2
    # another GPU's number, made by hand, is refused by the kernel
    third = scene.node.gpus[2]
    assert (
        "not permitted"
        in cri.exec(container, "sh", "-c", f"mknod /tmp/g c {third.major} {third.minor} && exec 3</tmp/g").err
    )
    assert cgroups.limit("memory", "memory.limit_in_bytes", "memory.max", cri.info(container)["pid"]) == 64 << 20
    assert scene.records() == [container]
    cri.remove(container)
    until(lambda: scene.records() == [], "the grant's end")


def test_a_pod_without_a_request_is_unchanged(scene: Scene, cri: CRI) -> None:
    with_us = cri.spec(cri.run(cri.pod("plain")))
    assert scene.records() == []
    scene.plugins[-1].stop()
    without = cri.spec(cri.run(cri.pod("plain-2")))
    for spec in (with_us, without):
        for key in ("io.kubernetes.cri.sandbox-id", "io.kubernetes.cri.sandbox-name", "io.kubernetes.cri.sandbox-uid"):
            spec["annotations"].pop(key)
        spec["linux"].pop("cgroupsPath")
        spec["linux"].pop("namespaces")
        for mount in spec["mounts"]:
            mount.pop("source", None)
    assert with_us == without


def test_mounts_of_a_driver(scene: Scene, cri: CRI) -> None:
    """A mount of a CDI file is there, and one file for two devices gives it once."""
    source = os.path.join(scene.workdir, "library.so")
    with open(source, "w", encoding="ascii") as file:
        file.write("library")
    spec = os.path.join(scene.node.cdi, "extra.json")
    with open(spec + ".new", "w", encoding="utf-8") as file:
        json.dump(
            {
                "cdiVersion": "0.5.0",
                "kind": "intel.com/gpu",
                "devices": [
                    {
                        "name": "x",
                        "containerEdits": {
                            "mounts": [
                                {"hostPath": source, "containerPath": "/usr/lib/library.so", "options": ["ro", "rbind"]}
                            ]
                        },
                    }
                ],
            },
            file,
        )
    reloads = scene.plugins[-1]
    os.rename(spec + ".new", spec)
    try:
        pod = cri.pod("mounts", ask(resources={"gpu": {"devices": ["intel.com/gpu=x"]}}))
        # seen by inotify, without a signal: the request is refused until then
        container = cri.start(until(lambda: attempt(cri, pod), "a reload after a new CDI file"))
        assert cri.exec(container, "cat", "/usr/lib/library.so").out == "library"
        assert cri.exec(container, "sh", "-c", "echo >> /usr/lib/library.so").code != 0
    finally:
        os.unlink(spec)
    assert reloads.times_serving() == 1, "the connection was kept"


def attempt(cri: CRI, pod: Any, **more: Any) -> str:
    """A container, or nothing when it is refused."""
    try:
        return cri.create(pod, **more)
    except Refused:
        return ""


REFUSED = {
    "an unknown key": (ask(gpus=1), "unknown key 'gpus'"),
    "more than the node has": (ask(resources=gpus(9)), "this node has 8"),
    "no such device": (ask(resources={"gpu": {"devices": ["77"]}}), "77"),
    "our mark": ({"chandler.oci/granted": "all"}, "Chandler's own mark"),
    "code": (ask(env={"LD_PRELOAD": "/tmp/x.so"}), "LD_PRELOAD"),
    "a limit that NRI has no word for": (
        ask(resources={"memory_reservation": "1Mi"}),
        "resources.memory_reservation through NRI",
    ),
    "a group that is no document": ({"chandler.oci/service": "{"}, "chandler.oci/service"),
}


def test_refusals_reach_the_kubelet_word_for_word(scene: Scene, cri: CRI) -> None:
    for name, (asked, words) in REFUSED.items():
        pod = cri.pod("refused-" + str(len(cri.pods)), asked)
        with pytest.raises(Refused) as error:
            cri.create(pod)
        assert words in reason(error) and "chandler: " in reason(error), name
    assert scene.records() == []
    assert cri.running(cri.run(cri.pod("after"))), "the plugin is still there"


def test_a_failed_create_gives_its_grant_back(scene: Scene, cri: CRI) -> None:
    """Refused after us, by the engine itself: what we had granted ends."""
    bad = scene.plugin("--idx", "90", "--name", "late").start()
    pod = cri.pod("failing", ask(resources=gpus(1)))
    with pytest.raises(Refused):  # two plugins set one field
        cri.create(pod)
    until(lambda: scene.records() == [], "the grant's end")
    bad.stop()
    assert cri.run(pod)


def test_two_plugins_with_different_prefixes_do_not_disturb_each_other(scene: Scene, cri: CRI) -> None:
    """Another instance, with another prefix, serves its own annotations, and none disturbs the other."""
    other = Installation(os.path.join(scene.workdir, "other"))
    other.configure(["/usr/sbin/runc"], [scene.node.cdi])
    with open(os.path.join(other.etc, "config.toml"), "r+", encoding="utf-8") as file:
        text = file.read()
        file.seek(0)
        file.write('annotation-prefix = "other.example/"\n' + text)
    second = Plugin(
        other.program("chandler-nri"),
        os.path.join(scene.workdir, "other.log"),
        scene.containerd.nri,
        "--idx",
        "60",
        "--name",
        "other",
    )
    scene.plugins.append(second)
    second.start()
    both = {**ask(resources=gpus(1), env={"A": "1"}), "other.example/service": json.dumps({"env": {"B": "2"}})}
    env = cri.env(cri.run(cri.pod("both", both)))
    assert (env["A"], env["B"], env["CUDA_VISIBLE_DEVICES"]) == ("1", "2", "0")
    second.stop()


def test_a_plugin_killed_and_started_again(scene: Scene, cri: CRI) -> None:
    pod = cri.pod("life", ask(resources=gpus(1)))
    first = cri.run(pod, "first")
    scene.plugins[-1].stop(signal.SIGKILL)
    unserved = cri.run(pod, "second")
    assert opened(cri, unserved) == [], "NRI fails open"
    plugin = scene.plugin().start()
    assert opened(cri, first) == [0]
    third = cri.run(pod, "third")
    assert opened(cri, third) == [0], "what the pod has"
    assert plugin.record(container=unserved)["unadjusted"].startswith("it runs without what it asked for")
    assert scene.records() == sorted((first, third))


def test_an_unserved_container_is_evicted_where_the_policy_says_so(scene: Scene, cri: CRI) -> None:
    scene.plugins[-1].stop()
    container = cri.run(cri.pod("evicted", ask(resources=gpus(1))))
    scene.configure("[policy]\nevict-unadjusted = true\n")
    plugin = scene.plugin().start()
    assert plugin.record(container=container)["evicted"] is True
    until(lambda: not cri.running(container), "eviction")


def test_the_plugin_survives_a_restart_of_containerd(scene: Scene, cri: CRI) -> None:
    plugin = scene.plugins[-1]
    before = cri.run(cri.pod("before", ask(resources=gpus(1))))
    times = plugin.times_serving()
    scene.containerd.stop()
    scene.containerd.start()
    plugin.serving(times)
    assert cri.ready() and opened(cri, before) == [0] and before in scene.records()
    assert opened(cri, cri.run(cri.pod("after", ask(resources=gpus(2))))) == [1, 2]


def test_a_signal_reloads_the_configuration(scene: Scene, cri: CRI) -> None:
    """SIGHUP, the connection kept; a configuration that is wrong changes nothing and is named."""
    plugin = scene.plugins[-1]
    scene.configure("[policy]\nmax-gpus = 1\n")
    os.kill(plugin.pid, signal.SIGHUP)
    pod = cri.pod("reloaded", ask(resources=gpus(2)))
    until(lambda: refused_with(cri, pod, "max-gpus of [policy] is 1"), "the new limit")
    scene.configure("[policy]\nmax-gpu = 8\n")
    os.kill(plugin.pid, signal.SIGHUP)
    until(
        lambda: any("max-gpu" in str(line.get("msg")) and "stays in force" in line["msg"] for line in plugin.records()),
        "the complaint",
    )
    assert refused_with(cri, pod, "max-gpus of [policy] is 1")
    assert plugin.times_serving() == 1


def refused_with(cri: CRI, pod: Any, words: str) -> bool:
    try:
        container = cri.create(pod)
    except Refused as error:
        return words in str(error.details())
    cri.remove(container)
    return False


def test_leases(scene: Scene, cri: CRI) -> None:
    """Exclusive devices: those of a container that has ended are free at once."""
    scene.configure('[gpu]\nallocator = "leases"\n')
    os.kill(scene.plugins[-1].pid, signal.SIGHUP)
    until(lambda: leases_are_kept(scene, cri), "the new allocator")
    services = {name: {"resources": gpus(4)} for name in ("first", "second", "main")}
    pod = cri.pod("holders", {"chandler.oci/services": json.dumps(services)})
    first, second = cri.run(pod, "first"), cri.run(pod, "second", command=["sh", "-c", "exec sleep 3600"])
    assert opened(cri, first) == [0, 1, 2, 3] and opened(cri, second) == [4, 5, 6, 7]
    assert refused_with(cri, pod, "4 devices")
    os.kill(cri.info(first)["pid"], signal.SIGKILL)
    third = until(lambda: attempt(cri, pod), "devices of a container that has ended")
    assert opened(cri, cri.start(third)) == [0, 1, 2, 3]


def leases_are_kept(scene: Scene, cri: CRI) -> bool:
    cri.remove(cri.create(cri.pod("probe", ask(resources=gpus(1)))))
    cri.end(cri.pods[-1])
    return os.path.exists(os.path.join(scene.state, "leases"))


def test_a_hundred_pods(scene: Scene, cri: CRI) -> None:
    """Four at a time on eight GPUs: each has as many as it asked for, and in the end nobody holds any."""

    def live(number: int) -> tuple[int, int]:
        with CRI(scene.containerd.socket) as own:
            pod = own.pod(f"crowd-{number}", ask(resources=gpus(number % 2 + 1), env={"N": str(number)}))
            container = own.create(pod)
            spec = own.spec(container)
            assert f"N={number}" in spec["process"]["env"]
            return number % 2 + 1, sum(device["path"][-1].isdigit() for device in spec["linux"]["devices"])

    with ThreadPoolExecutor(4) as pool:
        assert all(asked == found for asked, found in pool.map(live, range(100)))
    plugin = scene.plugins[-1]
    until(lambda: scene.records() == [] and scene.leases() == [], "the grants' end")
    assert plugin.times_serving() == 1
    assert plugin.resident() < 40_000


# --- with the wrapper as runtime handler, too ------------------------------------------------------------------------


def seen(cri: CRI, container: str) -> dict[str, Any]:
    """What the container itself can tell."""
    variables = {key: value for key, value in cri.env(container).items() if key != "HOSTNAME"}
    nodes = sorted(cri.exec(container, "sh", "-c", "stat -c '%n %t %T %a %u %g' /dev/nvidia*").out.splitlines())
    mounts = sorted(line.split()[1] for line in cri.exec(container, "cat", "/proc/mounts").out.splitlines())
    return {"env": variables, "nodes": nodes, "mounts": mounts, "opens": opened(cri, container)}


def compared(scene: Scene, cri: CRI, annotations: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What a pod comes to through NRI, through the wrapper, and through both at once, which must be all the same."""
    views = {}
    for way in ("nri", "both", "wrapper"):
        if way == "wrapper":
            scene.plugins[-1].stop()
            scene.forget()
        pod = cri.pod(way, annotations, handler="runc" if way == "nri" else "chandler")
        container = cri.start(until(partial(attempt, cri, pod, memory_limit_in_bytes=128 << 20), "a container"))
        views[way] = seen(cri, container)
        with open(os.path.join(scene.containerd.bundle(container), "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        views[way]["limits"] = limits(config)
        # a token and, of older runtimes, what they do not tell the plugin, are each way's own
        views[way]["hooks"] = {
            stage: [
                (hook["path"], hook["args"][: 4 if hook["args"][1] == "mps-ready" else 3], hook.get("env"))
                for hook in hooks
            ]
            for stage, hooks in config["hooks"].items()
        }
        edited = os.path.exists(os.path.join(scene.containerd.bundle(container), "config.json.chandler-original"))
        assert edited == (way == "wrapper")
        cri.end(pod)
        until(lambda: scene.leases() == [], "the end of the lease")
    assert views["nri"] == views["both"] == views["wrapper"]
    return views


def test_the_same_pod_through_the_handler_and_through_nri(scene: Scene, cri: CRI) -> None:
    """The wrapper leaves alone what the plugin has done."""
    asked = {"gpu": {"devices": [uuid(3), "5"]}, "memory": "64Mi", "cpu": "1", "cpuset": "0"}
    assert compared(scene, cri, ask(resources=asked, env={"A": "b"}))["nri"]["opens"] == [3, 5]


def test_limits_of_the_process_and_its_control_group(scene: Scene, cri: CRI) -> None:
    """Through NRI and through the handler; what a runtime is not told is refused."""
    newer = scene.containerd.release.schema == 3
    asked = ask(
        ulimits={"nofile": "100:200"},
        cgroup_parent=f"/{GROUPS}nri",
        resources={"cpuset": "0", **({"oom_score_adj": 950} if newer else {})},
    )
    scene.plugins[-1].stop()
    scene.configure('[policy]\ntrust = "all"\n')
    scene.plugin().start()
    views = []
    for handler in ("runc", "chandler"):
        if handler == "chandler":
            scene.plugins[-1].stop()
        container = cri.run(
            cri.pod("limited-" + handler, asked, handler=handler),
            oom_score_adj=900,
            cpu_quota=50000,
            cpu_period=100000,
            cpu_shares=512,
        )
        lines = cri.exec(container, "sh", "-c", "cat /proc/1/oom_score_adj /proc/1/limits").out.splitlines()
        assert lines[0] == ("950" if newer else "900") and ["100", "200"] in [
            line.split()[3:5] for line in lines if line.startswith("Max open files")
        ]
        with open(f"/proc/{cri.info(container)['pid']}/cgroup", encoding="ascii") as table:
            assert f"/{GROUPS}nri/{container}\n" in table.read()
        with open(os.path.join(scene.containerd.bundle(container), "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        views.append((config["process"]["rlimits"], config["process"]["oomScoreAdj"], limits(config)))
    assert views[0] == views[1]
    scene.plugin().start()
    for key, value in {
        "hugepages": {"2Mi": "2Mi"},
        "blkio_weight": 100,
        **({} if newer else {"oom_score_adj": 950}),
    }.items():
        assert refused_with(cri, cri.pod("refused-" + key, ask(resources={key: value})), "runtimeClassName")


# --- shared GPUs ------------------------------------------------------------------------------------------------------


def sharing(scene: Scene, mps: str, **more: Any) -> Plugin:
    """The plugin anew, on a node that shares."""
    scene.plugins[-1].stop()
    scene.configure(scene.commands.toml(mps, **more) + '[policy]\ntrust = "all"\n')
    return scene.plugin().start()


@pytest.fixture
def go(scene: Scene) -> Iterator[Path]:
    """MPS daemons come up once this file is there."""
    file = Path(scene.workdir, "go")
    scene.commands.mood(scene.commands.control, ready=str(file))
    yield file
    file.unlink(missing_ok=True)
    scene.commands.mood(scene.commands.control)


def test_a_sharing_pod_through_the_handler_and_through_nri(scene: Scene, cri: CRI) -> None:
    sharing(scene, "managed", mps_patience=30)
    asked = {"gpu": {"sharing": "mps", "mps_active_thread_percentage": 30, "mps_pinned_memory": "1Gi"}}
    view = compared(scene, cri, ask(resources=asked))["nri"]
    assert view["opens"] == [0] and view["env"]["CUDA_MPS_PIPE_DIRECTORY"] == "/tmp/nvidia-mps"
    assert "/tmp/nvidia-mps" in view["mounts"] and view["mounts"].count("/dev/shm") == 1
    assert [args[1] for _, args, _ in view["hooks"]["createRuntime"] + view["hooks"]["poststop"]] == [
        "mps-ready",
        "release",
    ]
    until(lambda: not os.path.exists(scene.state + "/shared"), "the share's end")
    assert not scene.commands.running()


def test_a_slow_daemon_refuses_once_and_the_retry_finds_it_ready(scene: Scene, cri: CRI, go: Path) -> None:
    """What the kubelet sees, and that other pods go on meanwhile."""
    plugin, started = sharing(scene, "managed", mps_patience=60), len(scene.commands.started())
    pod, words = cri.pod("slow", ask(resources={"gpu": {"sharing": "mps"}})), f"MPS for {uuid(0)} is starting, retry"
    other = cri.pod("other", ask(resources=gpus(1)))
    for _ in range(2):
        assert refused_with(cri, pod, words)
    with pytest.raises(Refused) as error:
        cri.create(cri.pod("another", ask(resources={"gpu": {"sharing": "mps", "devices": ["0"]}})))
    assert words in reason(error)
    assert opened(cri, cri.run(other)) == [1]
    assert len(scene.commands.running()) == 1 and len(scene.leases()) == 2
    go.touch()
    container = cri.start(until(lambda: attempt(cri, pod), "the retry"))
    assert cri.exec(container, "ls", "/tmp/nvidia-mps").out == "control\n" and opened(cri, container) == [0]
    assert (
        len(scene.commands.started()) == started + 1 and plugin.record(container=container)["sharing"]["mode"] == "mps"
    )
    cri.remove(container)
    until(lambda: not os.path.exists(scene.state + "/shared"), "the share's end")
    assert not scene.commands.running() and len(scene.leases()) == 1
    assert plugin.times_serving() == 1 and plugin.resident() < 40_000
    cri.end(other)
    until(lambda: scene.leases() == [] and scene.records() == [], "the leases' end")


def test_the_retry_reports_a_daemon_that_failed_slowly(scene: Scene, cri: CRI, go: Path) -> None:
    sharing(scene, "managed", mps_patience=2)
    pod = cri.pod("failing", ask(resources={"gpu": {"sharing": "mps"}}))
    assert refused_with(cri, pod, "is starting, retry")
    until(lambda: scene.leases() == [], "the failure")
    assert (
        refused_with(cri, pod, "gives no answer in 2 seconds") and scene.leases() == [] and not scene.commands.running()
    )


def test_a_pod_that_goes_away_while_its_daemon_starts(scene: Scene, cri: CRI, go: Path) -> None:
    sharing(scene, "managed", mps_patience=60)
    pod = cri.pod("gone", ask(resources={"gpu": {"sharing": "mps"}}))
    assert refused_with(cri, pod, "is starting, retry") and len(scene.leases()) == 1
    cri.end(pod)
    go.touch()
    until(lambda: scene.leases() == [] and not scene.commands.running(), "the end of what nobody wants")


def test_a_plugin_killed_while_a_daemon_starts(scene: Scene, cri: CRI, go: Path) -> None:
    """What it began goes on; the next plugin holds it for the retry."""
    plugin, started = sharing(scene, "managed", mps_patience=60), len(scene.commands.started())
    pod = cri.pod("killed", ask(resources={"gpu": {"sharing": "mps"}}))
    assert refused_with(cri, pod, "is starting, retry")
    plugin.stop(signal.SIGKILL)
    scene.plugin().start()
    assert refused_with(cri, pod, "is starting, retry") and len(scene.leases()) == 1
    go.touch()
    container = cri.start(until(partial(attempt, cri, pod), "the retry"))
    assert len(scene.commands.started()) == started + 1 and [lease["id"] for lease in scene.leases()] == [container]
    cri.remove(container)
    until(lambda: scene.leases() == [] and not os.path.exists(scene.state + "/shared"), "the end of the share")


def test_a_container_of_another_user_does_not_start(scene: Scene, cri: CRI) -> None:
    """containerd 1.7 and 2.1 do not tell who the user is; the hook sees. A newer one tells."""
    sharing(scene, "managed", mps_patience=30)
    pod = cri.pod("user", ask(resources={"gpu": {"sharing": "mps"}}))
    container = until(lambda: attempt(cri, pod, user=1000), "a container")
    if scene.containerd.release == NEWEST_NRI:
        assert cri.running(cri.start(container))
    else:
        with pytest.raises(Refused) as error:
            cri.start(container)
        assert "runs as uid 1000" in reason(error)
    cri.remove(container)
    until(lambda: scene.leases() == [] and not scene.commands.running(), "the end of the share")


def test_require_grant(scene: Scene, cri: CRI) -> None:
    """NRI fails open, so the wrapper closes: a container that asked and was not served does not start."""
    scene.configure(top="require-grant = true\n")
    pod = cri.pod("strict", ask(resources=gpus(1)), handler="chandler")
    served = cri.run(pod, "served")
    assert opened(cri, served) == [0]
    scene.plugins[-1].stop()
    unserved = cri.create(pod, "unserved")
    with pytest.raises(Refused) as error:
        cri.start(unserved)
    assert "require-grant" in reason(error) and "chandler-nri" in reason(error)
    assert cri.running(cri.run(cri.pod("plain", handler="chandler")))


def test_a_record_without_devices_in_config_json_is_not_believed(scene: Scene, cri: CRI) -> None:
    """A reply that came too late leaves a record; config.json lacks the devices, so the wrapper equips."""
    scene.plugins[-1].stop()
    container = cri.create(cri.pod("late", ask(resources=gpus(1)), handler="chandler"))
    directory = os.path.join(scene.state, "nri/grants")
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, f"00000000-{container}.json"), "w", encoding="ascii") as file:
        json.dump({"id": container, "root": "", "owner": "nri", "devices": [], "nodes": []}, file)
    assert opened(cri, cri.start(container)) == [0]


def test_launched_by_containerd(scene: Scene, cri: CRI) -> None:
    scene.plugins[-1].stop()
    log = os.path.join(scene.workdir, "launched.log")
    program = launcher(
        scene.containerd.nri_plugins, f"{scene.installation.program('chandler-nri')} 2>>{log}", "10-chandler"
    )
    scene.containerd.stop()
    try:
        scene.containerd.start()
        until(lambda: "serving containerd" in read(log), "the launched plugin")
        assert cri.ready() and opened(cri, cri.run(cri.pod("launched", ask(resources=gpus(1))))) == [0]
    finally:
        os.unlink(program)
        scene.containerd.stop()
        scene.containerd.start()
        cri.ready()


def test_invalid_options_are_refused(scene: Scene, cri: CRI) -> None:
    program = scene.installation.program("chandler-nri")
    for options, word in (
        (["--idx", "5"], "two digits"),
        (["--name", "a/b"], "--name"),
        (["--metrics", "0.0.0.0:9"], "--metrics"),
    ):
        done = subprocess.run(
            [program, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode and word in done.stderr.splitlines()[-1], done.stderr
