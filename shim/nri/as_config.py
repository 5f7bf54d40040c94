"""Turns NRI's description of a container into a config.json (OCI runtime spec), which shim.engine can read.

So the same checks apply as in front of an OCI runtime.  The result has only what the engine reads: annotations,
environment, mounts, namespaces, devices, resources, and the user where the runtime tells it.  Pure.
"""

from __future__ import annotations

from typing import Any

from shim.shapes import Document

# (controller, key) of linux.resources.  _OPTIONAL: numbers in messages of their own, which may be absent; _TEXTS:
# texts, empty when absent.
_OPTIONAL = (
    ("memory", "limit"),
    ("memory", "reservation"),
    ("memory", "swap"),
    ("cpu", "shares"),
    ("cpu", "quota"),
    ("cpu", "period"),
)
_TEXTS = (("cpu", "cpus"), ("cpu", "mems"))


def merged_annotations(pod: Any, container: Any) -> dict[str, str]:
    """The container's annotations merged over its pod's, as an engine that passes both writes them to config.json."""
    return {**pod.annotations, **container.annotations}


def build(container: Any, annotations: dict[str, str]) -> Document:
    """The parts of config.json that NRI tells, with `annotations` as its annotations."""
    process: Document = {"args": list(container.args), "env": list(container.env)}
    if container.HasField("user"):
        process["user"] = {
            "uid": container.user.uid,
            "gid": container.user.gid,
            "additionalGids": list(container.user.additional_gids),
        }
    if container.rlimits:
        process["rlimits"] = [
            {"type": limit.type, "hard": limit.hard, "soft": limit.soft} for limit in container.rlimits
        ]
    linux = container.linux
    if linux.HasField("oom_score_adj"):
        process["oomScoreAdj"] = linux.oom_score_adj.value
    return {
        "annotations": annotations,
        "process": process,
        "mounts": [
            {
                "destination": mount.destination,
                "type": mount.type,
                "source": mount.source,
                "options": list(mount.options),
            }
            for mount in container.mounts
        ],
        "linux": {
            "namespaces": [{"type": namespace.type, "path": namespace.path} for namespace in linux.namespaces],
            "devices": [
                {"path": device.path, "type": device.type, "major": device.major, "minor": device.minor}
                for device in linux.devices
            ],
            "resources": _resources(linux.resources),
            "cgroupsPath": linux.cgroups_path,
        },
    }


def _resources(resources: Any) -> Document:
    result: Document = {}
    for controller, key in _OPTIONAL:
        message = getattr(resources, controller)
        if message.HasField(key):
            result.setdefault(controller, {})[key] = getattr(message, key).value
    for controller, key in _TEXTS:
        value = getattr(getattr(resources, controller), key)
        if value:
            result.setdefault(controller, {})[key] = value
    if resources.HasField("pids"):
        result["pids"] = {"limit": resources.pids.limit}
    if resources.devices:
        result["devices"] = [rule(device_rule) for device_rule in resources.devices]
    if resources.unified:
        result["unified"] = dict(resources.unified)
    return result


def rule(device_rule: Any) -> Document:
    """A LinuxDeviceCgroup of NRI as an entry of linux.resources.devices."""
    result: Document = {"allow": device_rule.allow, "type": device_rule.type or "a", "access": device_rule.access}
    for key in ("major", "minor"):
        if device_rule.HasField(key):
            result[key] = getattr(device_rule, key).value
    return result
