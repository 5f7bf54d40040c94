"""NRI's messages as a table of fields with their numbers.  The classes are made from it when this module is imported.

The table has only the fields that the plugin and its tests read or write: a receiver skips fields that it does not
know.  Enums are plain numbers here.

Source of the field numbers: NRI, pkg/api/api.proto.  They are checked against the descriptors inside containerd 1.7.24
and 2.1.9, and those that are newer against the definition of VERSION.
"""

from __future__ import annotations

from shim.ttrpc import proto

PACKAGE = "nri.pkg.api.v1alpha1"
VERSION = "v0.12.5"  # the NRI version that these messages are checked against
PLUGIN_SERVICE = PACKAGE + ".Plugin"  # the runtime calls the plugin
RUNTIME_SERVICE = PACKAGE + ".Runtime"  # the plugin calls the runtime

# Events by number.  In the mask of Configure's answer, event N is bit N - 1.
STOP_POD_SANDBOX = 2
CREATE_CONTAINER = 4
START_CONTAINER = 6
STOP_CONTAINER = 10
REMOVE_CONTAINER = 11
VALIDATE_CONTAINER_ADJUSTMENT = 14

# States of a container that has not ended.
LIVE_STATES = frozenset((1, 2, 3))  # created, paused, running

_POD = {"pod": (1, "PodSandbox")}
_CONTAINER: dict[str, tuple[int, str]] = {**_POD, "container": (2, "Container")}
_VALUE = {kind: {"value": (1, kind)} for kind in ("int64", "uint32", "uint64")}

TABLE: dict[str, dict[str, tuple[int, str]]] = {
    # --- the plugin calls the runtime
    "RegisterPluginRequest": {"plugin_name": (1, "string"), "plugin_idx": (2, "string"), "NRI_version": (3, "string")},
    # --- the runtime calls the plugin
    "ConfigureRequest": {
        "config": (1, "string"),
        "runtime_name": (2, "string"),
        "runtime_version": (3, "string"),
        "registration_timeout": (4, "int64"),
        "request_timeout": (5, "int64"),
        "NRI_version": (6, "string"),
    },
    "ConfigureResponse": {"events": (2, "int32"), "failure_policy": (3, "FailurePolicy")},
    "FailurePolicy": {"fail_request": (1, "bool"), "keep_connected": (2, "bool")},
    "SynchronizeRequest": {"pods": (1, "*PodSandbox"), "containers": (2, "*Container"), "more": (3, "bool")},
    "SynchronizeResponse": {"update": (1, "*ContainerUpdate"), "more": (2, "bool")},
    "StopPodSandboxRequest": _POD,
    "CreateContainerRequest": _CONTAINER,
    "CreateContainerResponse": {"adjust": (1, "ContainerAdjustment"), "update": (2, "*ContainerUpdate")},
    "UpdateContainerRequest": {**_CONTAINER, "linux_resources": (3, "LinuxResources")},
    "UpdateContainerResponse": {"update": (1, "*ContainerUpdate")},
    "StartContainerRequest": _CONTAINER,
    "StopContainerRequest": _CONTAINER,
    "StopContainerResponse": {"update": (1, "*ContainerUpdate")},
    "RemoveContainerRequest": _CONTAINER,
    "StateChangeEvent": {"event": (1, "int32"), "pod": (2, "PodSandbox"), "container": (3, "Container")},
    "ValidateContainerAdjustmentRequest": {
        **_CONTAINER,
        "adjust": (3, "ContainerAdjustment"),
        "update": (4, "*ContainerUpdate"),
    },
    "ValidateContainerAdjustmentResponse": {"reject": (1, "bool"), "reason": (2, "string")},
    "Empty": {},
    # --- pods and containers
    "PodSandbox": {
        "id": (1, "string"),
        "name": (2, "string"),
        "uid": (3, "string"),
        "namespace": (4, "string"),
        "labels": (5, "{string}"),
        "annotations": (6, "{string}"),
        "runtime_handler": (7, "string"),
        "pid": (9, "uint32"),
    },
    "Container": {
        "id": (1, "string"),
        "pod_sandbox_id": (2, "string"),
        "name": (3, "string"),
        "state": (4, "int32"),
        "labels": (5, "{string}"),
        "annotations": (6, "{string}"),
        "args": (7, "*string"),
        "env": (8, "*string"),
        "mounts": (9, "*Mount"),
        "hooks": (10, "Hooks"),
        "linux": (11, "LinuxContainer"),
        "pid": (12, "uint32"),
        "rlimits": (13, "*POSIXRlimit"),
        "CDI_devices": (20, "*CDIDevice"),
        "user": (21, "User"),
    },
    "LinuxContainer": {
        "namespaces": (1, "*LinuxNamespace"),
        "devices": (2, "*LinuxDevice"),
        "resources": (3, "LinuxResources"),
        "oom_score_adj": (4, "OptionalInt"),
        "cgroups_path": (5, "string"),
    },
    "User": {"uid": (1, "uint32"), "gid": (2, "uint32"), "additional_gids": (3, "*uint32")},
    "LinuxNamespace": {"type": (1, "string"), "path": (2, "string")},
    # --- what a container is made of, and how it is changed
    "ContainerAdjustment": {
        "annotations": (2, "{string}"),
        "mounts": (3, "*Mount"),
        "env": (4, "*KeyValue"),
        "hooks": (5, "Hooks"),
        "linux": (6, "LinuxContainerAdjustment"),
        "rlimits": (7, "*POSIXRlimit"),
        "CDI_devices": (8, "*CDIDevice"),
    },
    "LinuxContainerAdjustment": {
        "devices": (1, "*LinuxDevice"),
        "resources": (2, "LinuxResources"),
        "cgroups_path": (3, "string"),
        "oom_score_adj": (4, "OptionalInt"),
    },
    "ContainerUpdate": {
        "container_id": (1, "string"),
        "linux": (2, "LinuxContainerUpdate"),
        "ignore_failure": (3, "bool"),
    },
    "LinuxContainerUpdate": {"resources": (1, "LinuxResources")},
    "KeyValue": {"key": (1, "string"), "value": (2, "string")},
    "Mount": {"destination": (1, "string"), "type": (2, "string"), "source": (3, "string"), "options": (4, "*string")},
    "Hooks": {
        "prestart": (1, "*Hook"),
        "create_runtime": (2, "*Hook"),
        "create_container": (3, "*Hook"),
        "start_container": (4, "*Hook"),
        "poststart": (5, "*Hook"),
        "poststop": (6, "*Hook"),
    },
    "Hook": {"path": (1, "string"), "args": (2, "*string"), "env": (3, "*string"), "timeout": (4, "OptionalInt")},
    "LinuxDevice": {
        "path": (1, "string"),
        "type": (2, "string"),
        "major": (3, "int64"),
        "minor": (4, "int64"),
        "file_mode": (5, "OptionalFileMode"),
        "uid": (6, "OptionalUInt32"),
        "gid": (7, "OptionalUInt32"),
    },
    "CDIDevice": {"name": (1, "string")},
    "POSIXRlimit": {"type": (1, "string"), "hard": (2, "uint64"), "soft": (3, "uint64")},
    "LinuxResources": {
        "memory": (1, "LinuxMemory"),
        "cpu": (2, "LinuxCPU"),
        "unified": (6, "{string}"),
        "devices": (7, "*LinuxDeviceCgroup"),
        "pids": (8, "LinuxPids"),
    },
    "LinuxDeviceCgroup": {
        "allow": (1, "bool"),
        "type": (2, "string"),
        "major": (3, "OptionalInt64"),
        "minor": (4, "OptionalInt64"),
        "access": (5, "string"),
    },
    "LinuxMemory": {"limit": (1, "OptionalInt64"), "reservation": (2, "OptionalInt64"), "swap": (3, "OptionalInt64")},
    "LinuxCPU": {
        "shares": (1, "OptionalUInt64"),
        "quota": (2, "OptionalInt64"),
        "period": (3, "OptionalUInt64"),
        "cpus": (6, "string"),
        "mems": (7, "string"),
    },
    "LinuxPids": {"limit": (1, "int64")},
    # A scalar that may be absent is a message with one field.
    "OptionalInt": _VALUE["int64"],
    "OptionalInt64": _VALUE["int64"],
    "OptionalUInt32": _VALUE["uint32"],
    "OptionalUInt64": _VALUE["uint64"],
    "OptionalFileMode": _VALUE["uint32"],
}

_CLASSES = proto.build(PACKAGE, TABLE)

RegisterPluginRequest = _CLASSES["RegisterPluginRequest"]
ConfigureRequest = _CLASSES["ConfigureRequest"]
ConfigureResponse = _CLASSES["ConfigureResponse"]
SynchronizeRequest = _CLASSES["SynchronizeRequest"]
SynchronizeResponse = _CLASSES["SynchronizeResponse"]
StopPodSandboxRequest = _CLASSES["StopPodSandboxRequest"]
CreateContainerRequest = _CLASSES["CreateContainerRequest"]
CreateContainerResponse = _CLASSES["CreateContainerResponse"]
UpdateContainerRequest = _CLASSES["UpdateContainerRequest"]
UpdateContainerResponse = _CLASSES["UpdateContainerResponse"]
StartContainerRequest = _CLASSES["StartContainerRequest"]
StopContainerRequest = _CLASSES["StopContainerRequest"]
StopContainerResponse = _CLASSES["StopContainerResponse"]
RemoveContainerRequest = _CLASSES["RemoveContainerRequest"]
StateChangeEvent = _CLASSES["StateChangeEvent"]
ValidateContainerAdjustmentRequest = _CLASSES["ValidateContainerAdjustmentRequest"]
ValidateContainerAdjustmentResponse = _CLASSES["ValidateContainerAdjustmentResponse"]
Empty = _CLASSES["Empty"]
PodSandbox = _CLASSES["PodSandbox"]
Container = _CLASSES["Container"]
ContainerAdjustment = _CLASSES["ContainerAdjustment"]
