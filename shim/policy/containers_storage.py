"""Reads containers/storage, where podman and CRI-O keep containers and images: the record of a container, and the
annotations in the manifests of its image.

    GRAPHROOT/DRIVER-containers/containers.json, volatile-containers.json    a record of every container
    GRAPHROOT/DRIVER-containers/ID/userdata                                  the bundle (with CRI-O, and in a transient
                                                                             store, below the run root instead)
    GRAPHROOT/DRIVER-images/IMAGE/manifest, =BASE64 of manifest-sha256:…     every manifest of a pulled image

Only the engine writes there.  Anything unexpected is an error, so that an unreadable file never lets an image ask.
Loaded only for a bundle in such a directory.  Seen with podman 4.3 and 5.8.
"""

from __future__ import annotations

import posix

from shim import errors, jsontext
from shim.host import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from shim.shapes import Document

MAX_RECORDS = 64 << 20  # bytes of one file of records, which has a few kilobytes for each container
MAX_MANIFEST = 4 << 20  # bytes, as podman's own limit
MAX_MANIFESTS = 64  # for one image
_RECORDS = ("containers.json", "volatile-containers.json")
_SUFFIX = "-containers"
_MANIFEST = ("manifest", "=bWFuaWZlc3Qt")  # a whole name, and the base64 of "manifest-", with which a name begins
_TODO = "see that podman's or CRI-O's storage is whole, and its image in a store of its own"


class Container:
    """The record of a container.  `in_pod`: whether it names a pod, as only CRI-O's records do.

    Raises HostError unless there is exactly one record, and it can be read.
    """

    __slots__ = ("in_pod", "_image", "_driver", "_roots")

    def __init__(self, bundle: str, container: str, document: Document) -> None:
        root, _, name = bundle.rpartition("/userdata")[0].rpartition("/")[0].rpartition("/")
        self._driver = name[: -len(_SUFFIX)]
        # the root that the bundle is below, and the graph root, which config.json's root.path is below
        self._roots = [root]
        rootfs = document.get("root")
        path = rootfs.get("path") if type(rootfs) is dict else None
        if type(path) is str and path.startswith("/"):
            graph_root = path.rpartition(f"/{self._driver}/")[0]  # …/overlay/LAYER/merged, …/vfs/dir/LAYER
            if graph_root and not _same(graph_root, root):
                self._roots.append(graph_root)
        records = [
            record
            for directory in self._roots
            for record in self._records(f"{directory}/{name}")
            if record.get("id") == container
        ]
        if len(records) != 1:
            raise errors.HostError(f"{len(records)} records of {container} are in {' and '.join(self._roots)}", _TODO)
        self._image = records[0].get("image", "")
        try:
            metadata = jsontext.loads(records[0].get("metadata", "{}").encode())
            self.in_pod = type(metadata) is dict and bool(metadata.get("pod-id"))
        except (AttributeError, UnicodeEncodeError, errors.JsonError):
            raise errors.HostError(f"the record of {container} in {root}/{name} cannot be read", _TODO) from None

    def annotations(self) -> dict[str, set[str]]:
        """Every key of the image's manifests, wherever it is in them, with its values; {} without an image.

        Raises HostError.
        """
        if self._image == "":
            return {}
        values: dict[str, set[str]] = {}
        for path in self._manifests():
            for key, value in _members(_parsed(path, MAX_MANIFEST, unique=True)):
                try:
                    (key + value).encode()
                except UnicodeEncodeError:  # half a surrogate pair: engines write another character for it
                    raise errors.HostError(f"{path} has a text that is not Unicode", "make the image anew") from None
                values.setdefault(key, set()).add(value)
        return values

    def _manifests(self) -> list[str]:
        """The paths of the image's manifests.  Raises HostError where there are none, or too many."""
        for root in self._roots if type(self._image) is str and self._image.isalnum() else ():
            directory = f"{root}/{self._driver}-images/{self._image}"
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
            f"the manifest of the image {self._image} is not in {' nor in '.join(self._roots)}", _TODO
        )

    @staticmethod
    def _records(directory: str) -> Iterator[Document]:
        for name in _RECORDS:
            path = f"{directory}/{name}"
            try:
                records = _parsed(path, MAX_RECORDS)
            except FileNotFoundError:
                continue
            if type(records) is not list:
                raise errors.HostError(f"{path} is no list of records", _TODO)
            yield from (record for record in records if type(record) is dict)


def _same(first: str, second: str) -> bool:
    """Whether two paths lead to the same directory.  They can differ where one leads through a link."""
    try:
        first_stat, second_stat = posix.stat(first), posix.stat(second)
    except OSError:
        return first == second
    return (first_stat.st_dev, first_stat.st_ino) == (second_stat.st_dev, second_stat.st_ino)


def _parsed(path: str, limit: int, unique: bool = False) -> Any:
    """The JSON value in a file.  Raises HostError, or FileNotFoundError."""
    try:
        value = jsontext.loads(files.read(path, limit)[0], unique)
        jsontext.check_value(value)
        return value
    except FileNotFoundError:
        raise
    except OSError as error:
        raise errors.HostError(f"{path} cannot be read: {error.strerror}", _TODO) from None
    except errors.JsonError as error:
        raise errors.HostError(f"{path}: {error.what}", _TODO) from None


def _members(value: Any) -> Iterator[tuple[str, str]]:
    """Every pair of a key and a text in a JSON value, at any depth.

    Not the object `annotations` alone: engines in Go also accept "Annotations" and other spellings of the key.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if type(item) is dict:
            yield from ((key, text) for key, text in item.items() if type(text) is str)
            pending.extend(item.values())
        elif type(item) is list:
            pending.extend(item)
