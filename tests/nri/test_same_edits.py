"""One plan, two interpreters: an engine that applies the adjustment gets the config.json that shim.oci.writer makes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from lab.peer import container
from lab.served import inventory, spec

from shim import engine
from shim.nri import as_config
from shim.nri.adjust import Runtime, adjustment
from shim.oci import writer

OLD = Runtime("containerd", "1.7.24")
NAMES = st.sampled_from(("A", "B", "HOME", "NCCL_DEBUG", "TERM", "FROM_THE_FILE"))
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "env": st.dictionaries(
            NAMES, st.text(st.characters(codec="ascii", exclude_characters="\0$"), max_size=8), max_size=4
        ),
        "resources": st.fixed_dictionaries(
            {},
            optional={
                "gpu": st.one_of(
                    st.fixed_dictionaries({"count": st.integers(1, 8)}),
                    st.fixed_dictionaries(
                        {"devices": st.lists(st.sampled_from("01234567"), min_size=1, max_size=4, unique=True)}
                    ),
                ),
                "cpu": st.sampled_from(("0.1", "1", "2.5")),
                "cpu_shares": st.integers(2, 1024),
                "cpuset": st.sampled_from(("0", "0-1")),
                "memory": st.sampled_from(("1Mi", "64Mi")),
            },
        ),
    },
)
FILES = st.fixed_dictionaries(
    {},
    optional={
        "env": st.just(["FROM_THE_FILE=1"]),
        "mounts": st.lists(st.sampled_from(("/etc", "/proc", "/usr/lib/driver", "/a/b")), unique=True, max_size=3).map(
            lambda workdirs: [
                {"hostPath": "/etc", "containerPath": workdir, "options": ["ro", "rbind"]} for workdir in workdirs
            ]
        ),
        "hooks": st.lists(
            st.sampled_from(
                ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
            ),
            max_size=3,
        ).map(lambda stages: [{"hookName": stage, "path": "/bin/true", "args": ["true", stage]} for stage in stages]),
    },
)


def engines(config: dict[str, Any], made: Any) -> dict[str, Any]:
    """What containerd's NRI generator does with an adjustment, in the fields that we send."""
    config = copy.deepcopy(config)
    config["annotations"].update(made.annotations)
    env = dict(entry.split("=", 1) for entry in config["process"]["env"])
    env.update((entry.key, entry.value) for entry in made.env)
    config["process"]["env"] = [f"{key}={value}" for key, value in env.items()]
    hooks = config.setdefault("hooks", {})
    for stage, field in (
        ("prestart", "prestart"),
        ("createRuntime", "create_runtime"),
        ("createContainer", "create_container"),
        ("startContainer", "start_container"),
        ("poststart", "poststart"),
        ("poststop", "poststop"),
    ):
        hooks.setdefault(stage, []).extend(
            {"path": hook.path, "args": list(hook.args)} for hook in getattr(made.hooks, field)
        )
    linux = config["linux"]
    for device in made.linux.devices:
        linux["devices"] = [other for other in linux["devices"] if other["path"] != device.path]
        linux["devices"].append(
            {
                "path": device.path,
                "type": device.type,
                "major": device.major,
                "minor": device.minor,
                "fileMode": device.file_mode.value,
            }
        )
        linux["resources"].setdefault("devices", []).append(
            {"allow": True, "type": device.type, "major": device.major, "minor": device.minor}
        )
    cpu, memory = made.linux.resources.cpu, made.linux.resources.memory
    for key in ("shares", "quota", "period"):
        if cpu.HasField(key):
            linux["resources"].setdefault("cpu", {})[key] = getattr(cpu, key).value
    if cpu.cpus:
        linux["resources"].setdefault("cpu", {})["cpus"] = cpu.cpus
    if memory.limit.value:
        linux["resources"]["memory"] = {"limit": memory.limit.value}
    for mount in made.mounts:
        config["mounts"] = [other for other in config["mounts"] if other["destination"] != mount.destination]
        config["mounts"].append(
            {
                "destination": mount.destination,
                "type": mount.type,
                "source": mount.source,
                "options": list(mount.options),
            }
        )
    return config


def view(config: dict[str, Any]) -> dict[str, Any]:
    """What matters of a config.json, without the order and the defaults in which the two may differ."""
    resources = config["linux"]["resources"]
    return {
        "annotations": config["annotations"],
        "env": dict(entry.split("=", 1) for entry in config["process"]["env"]),
        "devices": {device["path"]: device for device in config["linux"]["devices"]},
        "rules": {(rule["type"], rule["major"], rule["minor"]) for rule in resources.get("devices", ())},
        "cpu": resources.get("cpu"),
        "memory": resources.get("memory"),
        "hooks": {
            stage: [(hook["path"], hook["args"]) for hook in hooks]
            for stage, hooks in config.get("hooks", {}).items()
            if hooks
        },
        "mounts": {
            mount["destination"]: (mount.get("type") or "", mount.get("source"), mount.get("options"))
            for mount in config["mounts"]
        },
    }


@settings(max_examples=150, deadline=None)
@given(REQUESTS, FILES)
def test_the_adjustment_has_the_same_effect_as_the_edits(request: dict[str, Any], file: dict[str, Any]) -> None:
    before = as_config.build(
        container(env=("PATH=/bin", "HOME=/", "TERM=xterm")), {"chandler.oci/service": json.dumps(request)}
    )
    plan = engine.plan(before, inventory(spec(file)), "main")
    assert plan is not None
    unchanged = copy.deepcopy(before)
    through_nri = engines(before, adjustment(plan, OLD, before))
    assert before == unchanged
    assert view(through_nri) == view(writer.apply(before, plan.edits))
