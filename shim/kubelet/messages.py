"""The kubelet's device plugin API as a table of fields with their numbers, from which classes are made.

Source: Kubernetes, staging/src/k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto.  The table has only the fields
that the plugin and its tests read or write.
"""

from __future__ import annotations

from shim.ttrpc import proto

VERSION = "v1beta1"
PLUGIN_SERVICE = VERSION + ".DevicePlugin"  # the kubelet calls the plugin
REGISTRATION_SERVICE = VERSION + ".Registration"  # the plugin calls the kubelet
HEALTHY, UNHEALTHY = "Healthy", "Unhealthy"

_CLASSES = proto.build(
    VERSION,
    {
        "Empty": {},
        "RegisterRequest": {
            "version": (1, "string"),
            "endpoint": (2, "string"),  # the name of the plugin's socket, in the directory of the kubelet's
            "resource_name": (3, "string"),
            "options": (4, "DevicePluginOptions"),
        },
        "DevicePluginOptions": {
            "pre_start_required": (1, "bool"),
            "get_preferred_allocation_available": (2, "bool"),
        },
        "ListAndWatchResponse": {"devices": (1, "*Device")},
        "Device": {"ID": (1, "string"), "health": (2, "string"), "topology": (3, "TopologyInfo")},
        "TopologyInfo": {"nodes": (1, "*NUMANode")},
        "NUMANode": {"ID": (1, "int64")},
        "PreferredAllocationRequest": {"container_requests": (1, "*ContainerPreferredAllocationRequest")},
        "ContainerPreferredAllocationRequest": {
            "available_deviceIDs": (1, "*string"),
            "must_include_deviceIDs": (2, "*string"),
            "allocation_size": (3, "int32"),
        },
        "PreferredAllocationResponse": {"container_responses": (1, "*ContainerPreferredAllocationResponse")},
        "ContainerPreferredAllocationResponse": {"deviceIDs": (1, "*string")},
        "AllocateRequest": {"container_requests": (1, "*ContainerAllocateRequest")},
        "ContainerAllocateRequest": {"devices_ids": (1, "*string")},
        "AllocateResponse": {"container_responses": (1, "*ContainerAllocateResponse")},
        "ContainerAllocateResponse": {"annotations": (4, "{string}")},
        "PreStartContainerRequest": {"devices_ids": (1, "*string")},
        "PreStartContainerResponse": {},
    },
)

Empty = _CLASSES["Empty"]
RegisterRequest = _CLASSES["RegisterRequest"]
DevicePluginOptions = _CLASSES["DevicePluginOptions"]
ListAndWatchResponse = _CLASSES["ListAndWatchResponse"]
Device = _CLASSES["Device"]
PreferredAllocationRequest = _CLASSES["PreferredAllocationRequest"]
PreferredAllocationResponse = _CLASSES["PreferredAllocationResponse"]
AllocateRequest = _CLASSES["AllocateRequest"]
AllocateResponse = _CLASSES["AllocateResponse"]
PreStartContainerRequest = _CLASSES["PreStartContainerRequest"]
PreStartContainerResponse = _CLASSES["PreStartContainerResponse"]
