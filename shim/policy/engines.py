"""The engines that Chandler knows, and the annotations with which they name a container.

These names find a container's part of a pod's request.  The policy believes them only where the engine that called
(shim.policy.caller) sets them last itself, and `engines` of the configuration lists it.  Pure; part of the create path.

Seen with containerd 1.7.24 and 2.1.9 (CRI and ctr), dockerd 26.1 and 28.5, podman 4.3 (5.8 copies nothing, but Chandler
cannot tell it from 4.3), buildah 1.28, nerdctl 1.7.7; read in the sources of nerdctl 2.0 and 2.1, and of CRI-O.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, Optional, Tuple

    from shim.shapes import Document

# engine: the annotations that it sets last itself.  "kind" has the value "sandbox" or "container"; the others are
# fields of a rule's match.  Docker and podman set none: their callers can write every annotation.
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
# engine: the annotation with the id of the pod's sandbox, which it sets last itself.
SANDBOXES: Dict[str, str] = {"containerd": "io.kubernetes.cri.sandbox-id", "crio": "io.kubernetes.cri-o.SandboxID"}
OTHER, BUILDER, NERDCTL = "other", "bundle", "nerdctl"
# engine: (how Chandler recognises its calls, what it copies from an image into the annotations of a container)
ENGINES: Dict[str, Tuple[str, str]] = {
    "containerd": ("--root and bundle are of containerd's namespace k8s.io", "nothing"),
    "crio": ("the bundle is in containers/storage, whose record names a pod", "nothing"),
    "docker": ("--root and bundle are of a containerd namespace moby", "nothing"),
    "podman": ("the bundle is in containers/storage, whose record names no pod", "the annotations of its manifest"),
    NERDCTL: ("containerd's paths, and nerdctl's own annotations", "labels"),
    BUILDER: ("config.json is as `chandler bundle` wrote it", "nothing"),
    OTHER: ("neither --root nor the bundle's path is one of an engine that Chandler knows", "unknown"),
}


def called(annotations: Document, engine: str) -> str:
    """NAMESPACE/POD/CONTAINER, with which an engine of Kubernetes names a container; '' where it names none."""
    keys = KEYS[engine]
    names = [annotations.get(keys[field]) for field in ("namespace", "pod", "container")]
    return "/".join(str(name) for name in names) if all(type(name) is str for name in names) else ""


def container(annotations: Document, engine: str) -> Tuple[Optional[str], bool]:
    """(name of the container in its pod or None, whether it is the pod's sandbox).

    Only the keys of the engine that called count.  For an unknown engine, and for a bundle that `chandler bundle` made,
    the first engine counts whose keys are there.
    """
    if engine in KEYS:
        candidates = [KEYS[engine]]
    else:
        candidates = [] if engine in ENGINES and engine not in (OTHER, BUILDER) else list(KEYS.values())
    for keys in candidates:
        kind = annotations.get(keys["kind"])
        if kind is not None:
            name = annotations.get(keys["container"])
            return (name if isinstance(name, str) else None), kind == "sandbox"
    return None, False
