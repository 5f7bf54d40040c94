"""Types for mypy of values that many packages pass on: JSON documents, and the node's configuration.

Imported for types alone (under TYPE_CHECKING), so a create never loads it.  A type that belongs to one module is there:
Lease in shim.state.leases, GrantRecord in shim.state.grants, and so on.
"""

from __future__ import annotations

from typing import Any, TypedDict

# A JSON object in somebody else's format: config.json, a CDI file, an engine's file, a request before it is checked, or
# an answer for people.
Document = dict[str, Any]

# [gpu] of the configuration: what sharing a GPU needs.
SharingConfig = TypedDict(
    "SharingConfig",
    {
        "gpu.allocator": str,
        "gpu.fallback": str,
        "gpu.max-sharers": int,
        "gpu.mps": str,
        "gpu.mps-control": str,
        "gpu.mps-limits": str,
        "gpu.mps-patience": int,  # seconds
        "gpu.mps-pipe-dir": str,
        "gpu.mps-shm-dir": str,
        "gpu.nvidia-smi": str,
    },
)

_Denied = TypedDict("_Denied", {"policy.deny": list[str]}, total=False)


class Rule(_Denied):
    """One [[policy.rule]].  It may have any key of [policy], too; shim.policy.rules copies those as they are."""

    name: str
    match: dict[str, list[str]]  # field: patterns


_Node = TypedDict(
    "_Node",
    {
        "annotation-prefix": str,
        "engines": list[str],
        "require-grant": bool,
        "runtimes": list[str],
        "state-dir": str,
        "volumes": dict[str, str],
        "cdi.annotations": bool,
        "cdi.generate": list[str],
        "cdi.generate-dir": str,
        "cdi.hook": str,
        "cdi.spec-dirs": list[str],
        "kubernetes.resources": dict[str, str],  # of the device plugin: vendor or CDI kind, name
        "log.file": str,
        "policy.allow": list[str],
        "policy.bind-sources": list[str],
        "policy.capabilities": list[str],
        "policy.cgroup-parents": list[str],
        "policy.deny": list[str],
        "policy.devices": list[str],
        "policy.evict-unadjusted": bool,
        "policy.host-variables": list[str],
        "policy.kinds": list[str],
        "policy.max-cpu": int,  # thousandths of a CPU; 0: no maximum
        "policy.max-gpus": int,
        "policy.max-memory": int,  # bytes; 0: no maximum
        "policy.rule": list[Rule],
        "policy.secrets": list[str],
        "policy.trust": str,
        "policy.volumes": list[str],
        "secrets.command": list[str],
        "secrets.directory": str,
    },
)

# What shim.policy.rules adds for one container.
_Applied = TypedDict("_Applied", {"policy.by": str, "policy.denied-by": dict[str, str]}, total=False)


class Config(SharingConfig, _Node, _Applied):
    """The node's configuration, as shim.node.config checks it: a flat dict with dotted keys."""
