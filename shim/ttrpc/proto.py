"""Builds protobuf message classes from a table, when a program starts.

There is no generated code, because code that protoc wrote for one version of the protobuf package does not load in
another one.  Descriptors have been the same since version 3.  A table maps message names to fields,
`name: (number, type)`:

    string, bytes, bool, int32, int64, uint32, uint64    a scalar (an enum is an int32 on the wire)
    Name        a message of the same table
    *TYPE       repeated
    {TYPE}      a map from string to TYPE
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Fields = Mapping[str, tuple[int, str]]

_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "string": _FIELD.TYPE_STRING,
    "bytes": _FIELD.TYPE_BYTES,
    "bool": _FIELD.TYPE_BOOL,
    "int32": _FIELD.TYPE_INT32,
    "int64": _FIELD.TYPE_INT64,
    "uint32": _FIELD.TYPE_UINT32,
    "uint64": _FIELD.TYPE_UINT64,
}


def build(package: str, table: Mapping[str, Fields]) -> dict[str, Any]:
    """The classes of all messages in a table, by name."""
    file = descriptor_pb2.FileDescriptorProto(name=package + ".proto", package=package, syntax="proto3")
    for name, fields in table.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _add(message, f".{package}", name, field, number, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(file.SerializeToString())
    return {name: _message_class(pool.FindMessageTypeByName(f"{package}.{name}"), pool) for name in table}


def _add(message: Any, package: str, owner: str, field: str, number: int, kind: str) -> None:
    repeated = kind[0] in "*{"
    descriptor = message.field.add(
        name=field, number=number, label=_FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
    )
    if kind.startswith("{"):
        entry = message.nested_type.add(name="".join(part.capitalize() for part in field.split("_")) + "Entry")
        entry.options.map_entry = True
        _add(entry, package, "", "key", 1, "string")
        _add(entry, package, "", "value", 2, kind[1:-1])
        kind = f"{owner}.{entry.name}"
    kind = kind.lstrip("*")
    if kind in _SCALARS:
        descriptor.type = _SCALARS[kind]
    else:
        descriptor.type, descriptor.type_name = _FIELD.TYPE_MESSAGE, f"{package}.{kind}"


def _message_class(descriptor: Any, pool: Any) -> Any:
    if hasattr(message_factory, "GetMessageClass"):  # protobuf 4.22 and later
        return message_factory.GetMessageClass(descriptor)
    return message_factory.MessageFactory(pool).GetPrototype(descriptor)
