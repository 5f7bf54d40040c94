"""containers/storage, where podman and CRI-O keep containers and images: whose a container is, what its image says.

    GRAPHROOT/DRIVER-containers/containers.json, volatile-containers.json    a record of every container
    GRAPHROOT/DRIVER-containers/ID/userdata                                  the bundle; CRI-O's, and of a transient
                                                                             store, the same below the run root
    GRAPHROOT/DRIVER-images/IMAGE/manifest, =BASE64 of manifest-sha256:…     every manifest that an image was pulled with

Only the engine writes there.  Whatever is not as expected is an error: what cannot be read decides nothing.  Loaded only
for a bundle in such a place.  Seen with podman 4.3 and 5.8.
"""

from __future__ import annotations

import posix

from shim import errors, jsontext
from shim.host import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, List, Set, Tuple

MAX_RECORDS = 64 << 20  # bytes of one file of records: some kilobytes a container
MAX_MANIFEST = 4 << 20  # as podman's own limit
MAX_MANIFESTS = 64  # of one image
_RECORDS = ("containers.json", "volatile-containers.json")
_SUFFIX = "-containers"
_MANIFEST = ("manifest", "=bWFuaWZlc3Qt")  # the latter: what base64 makes of "manifest-"
_ENGINES = "see that podman's or CRI-O's storage is whole, and its image in a store of its own"


class Container:
    """A container's record.  Raises HostError where there is none that is certain."""

    __slots__ = ("in_pod", "_image", "_driver", "_roots")

    def __init__(self, bundle: str, container: str, document: Dict[str, Any]) -> None:
        above, _, name = bundle.rpartition("/userdata")[0].rpartition("/")[0].rpartition("/")
        self._driver = name[: -len(_SUFFIX)]
        self._roots = [above]
        root = document.get("root")
        path = root.get("path") if type(root) is dict else None
        if type(path) is str and path.startswith("/"):
            graph = path.rpartition(f"/{self._driver}/")[0]  # …/overlay/LAYER/merged, …/vfs/dir/LAYER
            if graph and not _same(graph, above):
                self._roots.append(graph)
        found = [
            record
            for graph in self._roots
            for record in self._records(f"{graph}/{name}")
            if record.get("id") == container
        ]
        if len(found) != 1:
            raise errors.HostError(f"{len(found)} records of {container} are in {' and '.join(self._roots)}", _ENGINES)
        self._image = found[0].get("image", "")
        try:
            metadata = jsontext.loads(found[0].get("metadata", "{}").encode())
            self.in_pod = type(metadata) is dict and bool(metadata.get("pod-id"))
        except (AttributeError, UnicodeEncodeError, errors.JsonError):
            raise errors.HostError(
                f"the record of {container} in {above}/{name} says nothing that can be read", _ENGINES
            ) from None

    def annotations(self) -> Dict[str, Set[str]]:
        """Every key of the image's manifests, at whatever place in them, with its values; none without an image.

        Raises HostError.
        """
        if self._image == "":
            return {}
        found: Dict[str, Set[str]] = {}
        for path in self._manifests():
            for key, value in _members(_parsed(path, MAX_MANIFEST, unique=True)):
                try:
                    (key + value).encode()
                except UnicodeEncodeError:  # half a character, which engines write as another one
                    raise errors.HostError(f"{path} has a text that is no Unicode", "make the image anew") from None
                found.setdefault(key, set()).add(value)
        return found

    def _manifests(self) -> List[str]:
        for graph in self._roots if type(self._image) is str and self._image.isalnum() else ():
            directory = f"{graph}/{self._driver}-images/{self._image}"
            try:
                names = posix.listdir(directory)
            except OSError:
                continue
            manifests = [
                f"{directory}/{name}" for name in names if name == _MANIFEST[0] or name.startswith(_MANIFEST[1])
            ]
            if 0 < len(manifests) <= MAX_MANIFESTS:
                return manifests
        raise errors.HostError(
            f"the manifest of the image {self._image} is not in {' nor in '.join(self._roots)}", _ENGINES
        )

    @staticmethod
    def _records(directory: str) -> Iterator[Dict[str, Any]]:
        for name in _RECORDS:
            path = f"{directory}/{name}"
            try:
                records = _parsed(path, MAX_RECORDS)
            except FileNotFoundError:
                continue
            if type(records) is not list:
                raise errors.HostError(f"{path} is no list of records", _ENGINES)
            yield from (record for record in records if type(record) is dict)


def _same(one: str, other: str) -> bool:
    """Whether two paths are of one directory, as they are where one of them leads through a link."""
    try:
        found, known = posix.stat(one), posix.stat(other)
    except OSError:
        return one == other
    return (found.st_dev, found.st_ino) == (known.st_dev, known.st_ino)


def _parsed(path: str, limit: int, unique: bool = False) -> Any:
    """A file's JSON.  Raises HostError, or FileNotFoundError."""
    try:
        value = jsontext.loads(files.read(path, limit)[0], unique)
        jsontext.check_value(value)
        return value
    except FileNotFoundError:
        raise
    except OSError as error:
        raise errors.HostError(f"{path} cannot be read: {error.strerror}", _ENGINES) from None
    except errors.JsonError as error:
        raise errors.HostError(f"{path}: {error.what}", _ENGINES) from None


def _members(value: Any) -> Iterator[Tuple[str, str]]:
    """Every key of a JSON value that has a text, with it: Go takes "Annotations" for "annotations", so no place is spared."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if type(item) is dict:
            yield from ((key, text) for key, text in item.items() if type(text) is str)
            waiting.extend(item.values())
        elif type(item) is list:
            waiting.extend(item)
