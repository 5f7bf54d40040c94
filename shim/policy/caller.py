"""Finds out which engine calls, and refuses annotations that may come from the container's image.

An engine is recognised by what only the engine decides: the runtime's --root and the path of the bundle.  Annotations
never prove who calls: an annotation can only make Chandler trust the caller less.  An image must not ask for anything.
So an annotation counts only where the engine copies none from images, or where the image's manifest does not have it.
Part of the create path.
"""

from __future__ import annotations

from shim import errors
from shim.policy import engines
from shim.request.parse import MARK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, List, Mapping, Optional, Tuple, TypedDict

    from shim.shapes import Config, Document

    class CallFacts(TypedDict, total=False):
        """What a front end knows for certain of a container that it equips."""

        caller: Caller
        id: str
        bundle: str  # the bundle's directory; '' before there is one
        handler: str  # the name of the runtime that the engine called
        namespace: str
        pod: str
        sandbox: str  # the id of the pod's sandbox
        called: str  # NAMESPACE/POD/CONTAINER
        container: str  # its name in the pod
        image: str
        user: Tuple[str, ...]  # who starts the container (shim.keys.host_facts.caller)
        volumes: Mapping[str, str]  # directories of prepared volumes by name
        scope: str  # of secrets (shim.host.secrets)
        master: str  # the default of distributed.master_addr
        seconds: float  # the time limit of a provider of secrets
        devices: List[str]  # those that it must get: a restored container's, or those that the kubelet allocated
        built: bool  # whether Chandler's bundle builder wrote config.json
        rootless: bool


_TASK = "io.containerd.runtime.v"  # containerd's bundles: …/io.containerd.runtime.v2.task/NAMESPACE/ID
_CDI = "cdi.k8s.io/"


class Caller:
    """Who calls.

    `engine`: a name of shim.policy.engines.ENGINES.  `why`: how Chandler came to that name.
    `podman_record`: podman's record of the container (shim.policy.containers_storage.Container), which reads the
    image's manifests; None for other engines.
    `problem`: the error for which that record could not be read, or None.
    `restores`: whether the annotations come from a checkpoint, which may be an image, and not from a create that
    Chandler has seen.
    """

    __slots__ = ("engine", "why", "podman_record", "problem", "restores")

    def __init__(
        self, engine: str, why: str = "", podman_record: Any = None, problem: Optional[errors.ChandlerError] = None
    ) -> None:
        self.engine = engine
        self.why = why or engines.ENGINES[engine][0]
        self.podman_record = podman_record
        self.problem = problem
        self.restores = False

    def believed_engine(self, config: Config) -> str:
        """The engine, where its identity annotations count as proof for a rule; else ''."""
        return self.engine if self.engine in engines.KEYS and self.engine in config["engines"] else ""

    def check(self, annotations: Document, config: Config) -> None:
        """Raises PolicyError, which names the annotation, where a request may come from the image."""
        prefix = config["annotation-prefix"]
        keys = [
            key
            for key in annotations
            if key.startswith(prefix) and key != prefix + MARK or config["cdi.annotations"] and key.startswith(_CDI)
        ]
        if not keys:
            return
        key = f"annotation {keys[0]}"
        if self.problem is not None:
            raise errors.PolicyError(
                f"{key}: whether it comes from the image is not known: {self.problem.what}", self.problem.todo
            )
        if self.restores and self.engine in (*engines.KEYS, "podman"):
            raise errors.PolicyError(
                f"{key}: a restore takes it from the checkpoint, which may be an image, and an image may not ask",
                "create the container anew",
            )
        if self.engine == "podman":
            self._check_image(keys, annotations)
        elif self.engine == engines.NERDCTL:
            raise errors.PolicyError(
                f"{key}: nerdctl makes annotations of an image's labels, and an image may not ask",
                "start the container through CRI, Docker or podman",
            )
        elif self.engine == engines.OTHER and engines.OTHER not in config["engines"]:
            raise errors.PolicyError(
                f"{key}: it may be the image that asks, since Chandler does not know who calls ({self.why})",
                f'list "{engines.OTHER}" in engines of the configuration if no such caller copies labels or '
                "annotations of images",
            )

    def _check_image(self, keys: List[str], annotations: Document) -> None:
        """Refuses annotations that a manifest of the image has with the same value: podman may have copied them."""
        try:
            image_annotations = self.podman_record.annotations() if self.podman_record is not None else {}
        except errors.ChandlerError as error:
            raise errors.PolicyError(
                f"annotation {keys[0]}: whether it comes from the image is not known: {error.what}", error.todo
            ) from None
        for key in keys:
            value = annotations[key]
            if type(value) is str and value in image_annotations.get(key, ()):
                raise errors.PolicyError(
                    f"annotation {key}: it comes from the image, whose manifest has it with this value, and an image "
                    "may not ask",
                    "take it out of the image, ask by --annotation with another value, or start the container with "
                    "another runtime (podman --runtime)",
                )


def recognise(root: Optional[str], bundle: str, container: str, document: Document, built: bool = False) -> Caller:
    """Who calls to create a container.

    `root`: the runtime's --root; '' when none is given, None when it is not known.
    `bundle`: the directory of the bundle.  `container`: the container's id, or ''.  `document`: config.json.
    `built`: whether config.json is as `chandler bundle` wrote it.
    """
    parts = bundle.split("/")
    if bundle.startswith("/") and len(parts) > 3 and type(document) is dict:
        if parts[-3].startswith(_TASK) and container in ("", parts[-1]):
            return _of_containerd(root, parts[-2], document)
        if parts[-1] == "userdata" and parts[-3].endswith("-containers") and container in ("", parts[-2]):
            return _of_storage(bundle, parts[-2], document)
    return Caller(engines.BUILDER if built else engines.OTHER)


def _of_containerd(root: Optional[str], namespace: str, document: Document) -> Caller:
    """Who calls for a bundle of containerd: CRI, Docker, nerdctl, or another client of containerd."""
    parent, _, root_name = ("" if root is None else root).rpartition("/")
    if root is not None and root_name != namespace:
        return Caller(
            engines.OTHER, f"the bundle is of containerd's namespace {namespace}, and --root {root or '(none)'} is not"
        )
    annotations = document.get("annotations")
    if type(annotations) is dict and any(key.startswith("nerdctl/") for key in annotations):
        return Caller(engines.NERDCTL)
    if namespace == "k8s.io":
        return Caller("containerd")
    if namespace.partition("-")[0] == "moby" and (root is None or parent.rpartition("/")[2].startswith("runtime-")):
        return Caller("docker")
    return Caller(
        engines.OTHER,
        f"containerd's namespace {namespace} is neither CRI's nor Docker's, and nothing says what its client copies",
    )


def _of_storage(bundle: str, container: str, document: Document) -> Caller:
    """Who calls for a bundle in containers/storage: CRI-O, whose record names the pod, or podman."""
    from shim.policy import containers_storage

    try:
        record = containers_storage.Container(bundle, container, document)
    except errors.ChandlerError as error:
        return Caller(engines.OTHER, f"the bundle is podman's or CRI-O's, and {error.what}", problem=error)
    return Caller("crio") if record.in_pod else Caller("podman", podman_record=record)
