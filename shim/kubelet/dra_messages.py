"""The kubelet's APIs for DRA drivers as tables of fields with their numbers, from which classes are made.

Sources: Kubernetes, staging/src/k8s.io/kubelet/pkg/apis/dra/v1/api.proto and pkg/apis/pluginregistration/v1/api.proto.
The tables have only the fields that the driver and its tests read or write.
"""

from __future__ import annotations

from shim.ttrpc import proto

_DRA, _REGISTRATION = "k8s.io.kubelet.pkg.apis.dra.v1", "pluginregistration"
DRA_SERVICE = _DRA + ".DRAPlugin"
REGISTRATION_SERVICE = _REGISTRATION + ".Registration"  # the kubelet calls it first, at a socket that it finds
TYPE = "DRAPlugin"
VERSION = "v1.DRAPlugin"  # one of the versions of PluginInfo

_CLASSES = {
    **proto.build(
        _REGISTRATION,
        {
            "InfoRequest": {},
            "PluginInfo": {
                "type": (1, "string"),
                "name": (2, "string"),
                "endpoint": (3, "string"),  # the path of the socket of DRA_SERVICE; '' for the same socket
                "supported_versions": (4, "*string"),
            },
            "RegistrationStatus": {"plugin_registered": (1, "bool"), "error": (2, "string")},
            "RegistrationStatusResponse": {},
        },
    ),
    **proto.build(
        _DRA,
        {
            "Claim": {"namespace": (1, "string"), "uid": (2, "string"), "name": (3, "string")},
            "Device": {
                "request_names": (1, "*string"),
                "pool_name": (2, "string"),
                "device_name": (3, "string"),
                "cdi_device_ids": (4, "*string"),
            },
            "NodePrepareResourcesRequest": {"claims": (1, "*Claim")},
            "NodePrepareResourceResponse": {"devices": (1, "*Device"), "error": (2, "string")},
            "NodePrepareResourcesResponse": {"claims": (1, "{NodePrepareResourceResponse}")},  # by uid
            "NodeUnprepareResourcesRequest": {"claims": (1, "*Claim")},
            "NodeUnprepareResourceResponse": {"error": (1, "string")},
            "NodeUnprepareResourcesResponse": {"claims": (1, "{NodeUnprepareResourceResponse}")},
        },
    ),
}

InfoRequest = _CLASSES["InfoRequest"]
PluginInfo = _CLASSES["PluginInfo"]
RegistrationStatus = _CLASSES["RegistrationStatus"]
RegistrationStatusResponse = _CLASSES["RegistrationStatusResponse"]
Claim = _CLASSES["Claim"]
NodePrepareResourcesRequest = _CLASSES["NodePrepareResourcesRequest"]
NodePrepareResourceResponse = _CLASSES["NodePrepareResourceResponse"]
NodePrepareResourcesResponse = _CLASSES["NodePrepareResourcesResponse"]
NodeUnprepareResourcesRequest = _CLASSES["NodeUnprepareResourcesRequest"]
NodeUnprepareResourceResponse = _CLASSES["NodeUnprepareResourceResponse"]
NodeUnprepareResourcesResponse = _CLASSES["NodeUnprepareResourcesResponse"]
