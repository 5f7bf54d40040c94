"""The messages that carry a call and its answer.  Source: ttrpc, request.proto."""

from __future__ import annotations

from shim.ttrpc import proto

_CLASSES = proto.build(
    "ttrpc",
    {
        "Request": {
            "service": (1, "string"),
            "method": (2, "string"),
            "payload": (3, "bytes"),
            "timeout_nano": (4, "int64"),
            "metadata": (5, "*KeyValue"),
        },
        "Response": {"status": (1, "Status"), "payload": (2, "bytes")},
        "Status": {"code": (1, "int32"), "message": (2, "string")},
        "KeyValue": {"key": (1, "string"), "value": (2, "string")},
    },
)

Request = _CLASSES["Request"]
Response = _CLASSES["Response"]
