"""The engines that Chandler knows, and who a container is by their annotations.

Names in annotations are for finding a container's part of a pod's request; they are authority for a policy only where the
engine that called (shim.policy.caller) sets them last itself and `engines` of the configuration names it.  Pure; part of the
create path.

Seen with containerd 1.7.24 and 2.1.9 (CRI and ctr), dockerd 26.1 and 28.5, podman 4.3 (5.8 copies nothing, and the two
cannot be told apart), buildah 1.28, nerdctl 1.7.7; read in the sources of nerdctl 2.0 and 2.1, and of CRI-O.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional, Tuple

# engine: the annotations that it sets last itself; "kind" is "sandbox" or "container", the others are fields of a rule's
# match.  Docker and podman set none: their callers write every annotation.
KEYS: Dict[str, Dict[str, str]] = {
    "containerd": {
        "kind": "io.kubernetes.cri.container-type",
        "namespace": "io.kubernetes.cri.sandbox-namespace",
        "pod": "io.kubernetes.cri.sandbox-name",
        "container": "io.kubernetes.cri.container-name",
        "image": "io.kubernetes.cri.image-name",
    },
    "crio": {
        "kind": "io.kubernetes.cri-o.ContainerType",
        "namespace": "io.kubernetes.pod.namespace",
        "pod": "io.kubernetes.pod.name",
        "container": "io.kubernetes.container.name",
    },
}
OTHER, BUILDER, NERDCTL = "other", "bundle", "nerdctl"
# engine: (how a call of it is known, what comes from an image into its containers' annotations)
ENGINES: Dict[str, Tuple[str, str]] = {
    "containerd": ("--root and bundle are of containerd's namespace k8s.io", "nothing"),
    "crio": ("the bundle is in containers/storage, whose record names a pod", "nothing"),
    "docker": ("--root and bundle are of a containerd namespace moby", "nothing"),
    "podman": ("the bundle is in containers/storage, whose record names no pod", "the annotations of its manifest"),
    NERDCTL: ("containerd's paths, and nerdctl's own annotations", "labels"),
    BUILDER: ("config.json is as `chandler bundle` wrote it", "nothing"),
    OTHER: ("neither --root nor the bundle's path is one of an engine that Chandler knows", "nobody knows what"),
}


def container(annotations: Dict[str, Any], engine: str) -> Tuple[Optional[str], bool]:
    """(name of the container in its pod or None, whether it is the pod's sandbox).

    Only the keys of the engine that called count; of one that is not known, those of the first engine that left any.
    """
    if engine in KEYS:
        families = [KEYS[engine]]
    else:
        families = [] if engine in ENGINES and engine not in (OTHER, BUILDER) else list(KEYS.values())
    for keys in families:
        kind = annotations.get(keys["kind"])
        if kind is not None:
            name = annotations.get(keys["container"])
            return (name if isinstance(name, str) else None), kind == "sandbox"
    return None, False
