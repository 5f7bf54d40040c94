"""What NRI tells of a container, as the config.json that the engine's road expects.

Only what the road reads: annotations, environment, mounts, namespaces, devices, resources, the user where the
runtime tells it.  The same checks then hold as in front of an OCI runtime.  Pure.
"""

from __future__ import annotations

from typing import Any, Dict

# (controller, key) of linux.resources: numbers that may be absent, and texts that are empty then
_OPTIONAL = (
    ("memory", "limit"),
    ("memory", "reservation"),
    ("memory", "swap"),
    ("cpu", "shares"),
    ("cpu", "quota"),
    ("cpu", "period"),
)
_TEXTS = (("cpu", "cpus"), ("cpu", "mems"))


def merged_annotations(pod: Any, container: Any) -> Dict[str, str]:
    """The container's annotations over its pod's, as an engine that passes all of them would write them."""
    return {**pod.annotations, **container.annotations}


def build(container: Any, annotations: Dict[str, str]) -> Dict[str, Any]:
    """config.json as far as NRI knows it."""
    process: Dict[str, Any] = {"args": list(container.args), "env": list(container.env)}
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


def _resources(resources: Any) -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for controller, key in _OPTIONAL:
        message = getattr(resources, controller)
        if message.HasField(key):
            found.setdefault(controller, {})[key] = getattr(message, key).value
    for controller, key in _TEXTS:
        value = getattr(getattr(resources, controller), key)
        if value:
            found.setdefault(controller, {})[key] = value
    if resources.HasField("pids"):
        found["pids"] = {"limit": resources.pids.limit}
    if resources.devices:
        found["devices"] = [rule(each) for each in resources.devices]
    if resources.unified:
        found["unified"] = dict(resources.unified)
    return found


def rule(given: Any) -> Dict[str, Any]:
    """A device rule of NRI's as linux.resources.devices has it."""
    made: Dict[str, Any] = {"allow": given.allow, "type": given.type or "a", "access": given.access}
    for key in ("major", "minor"):
        if given.HasField(key):
            made[key] = getattr(given, key).value
    return made
