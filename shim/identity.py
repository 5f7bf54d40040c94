"""Who a container is, as its engine says in annotations of its own.

Names are for finding a container's part of a pod's request.  They are authority for a policy only when they
come from the engine that the configuration names (reference: every engine lets a pod set the others' keys).
Pure; part of the create path.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Optional, Tuple

# engine: (key of the container's type, key of its name); a sandbox has the type "sandbox" with all of them
_FAMILIES = {
    "containerd": ("io.kubernetes.cri.container-type", "io.kubernetes.cri.container-name"),
    "crio": ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.container.name"),
}
_NO_FAMILY = ("docker", "podman")


def container(annotations: Dict[str, Any], engine: str) -> Tuple[Optional[str], bool]:
    """(name of the container in its pod or None, whether it is the pod's sandbox).

    With an `engine` only its own keys count; without one, those of the first engine that left any.
    """
    if engine in _NO_FAMILY:
        return None, False
    families = [_FAMILIES[engine]] if engine else _FAMILIES.values()
    for type_key, name_key in families:
        kind = annotations.get(type_key)
        if kind is not None:
            name = annotations.get(name_key)
            return (name if isinstance(name, str) else None), kind == "sandbox"
    return None, False
