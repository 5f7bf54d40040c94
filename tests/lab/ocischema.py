"""The OCI runtime specification's own JSON schema, as Debian's golang-github-opencontainers-specs-dev 1.0.2.118 has it
(Apache-2.0), without the parts for other systems, and tightened: a key that it does not list is an error."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

import jsonschema
from referencing import Registry
from referencing.jsonschema import DRAFT4

HERE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "bundle/schema")


@functools.cache
def validator() -> Any:
    resources: list[tuple[str, Any]] = []
    for name in os.listdir(HERE):
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            schema = tightened(json.load(file))
        if name == "config-schema.json":
            for other in ("solaris", "windows", "vm", "zos"):
                schema["properties"].pop(other, None)
        resources.append((name, DRAFT4.create_resource(schema)))
    made: Registry[Any] = Registry()
    return jsonschema.Draft4Validator({"$ref": "config-schema.json"}, registry=made.with_resources(resources))


def tightened(schema: Any) -> Any:
    if isinstance(schema, list):
        return [tightened(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: tightened(item) for key, item in schema.items()}
    if (
        isinstance(result.get("properties"), dict)
        and "additionalProperties" not in result
        and "patternProperties" not in result
    ):
        result["additionalProperties"] = False
    return result


def check(config: Any) -> None:
    errors = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator().iter_errors(config)
    ]
    assert not errors, errors
