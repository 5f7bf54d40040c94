"""Reads the CDI files of the node's directories, as bytes.  Loaded by a create only when it compiles the inventory."""

from __future__ import annotations

import posix

from shim import errors
from shim.errors import ChandlerError
from shim.host import trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional, Union

    # A CDI directory: its path; the error if it cannot be read; (name, bytes or error) of each file.
    SpecDir = tuple[str, Optional[ChandlerError], list[tuple[str, Union[bytes, ChandlerError]]]]

MAX_CDI_FILE = 16 << 20  # bytes
MAX_CDI_FILES = 1024
# How the names of the files begin that shim.kubelet.dra writes for claims.  They are for the engine alone: their
# devices are those of other files, for containers that the kubelet names.
CLAIMS = "gpu.chandler.oci-claim_"


def spec_names(directory: str) -> list[str]:
    """The sorted names of the CDI files in a directory, those ending in .json or .yaml, but not those of claims.

    Raises OSError.

    Source: CDI Go library, pkg/cdi/spec-dirs.go.
    """
    return sorted(
        name for name in posix.listdir(directory) if name.endswith((".json", ".yaml")) and not name.startswith(CLAIMS)
    )


def read_spec_dirs(directories: list[str], owners: dict[int, str]) -> list[SpecDir]:
    """The CDI files of all directories, from low to high priority; an error in place of what cannot be read."""
    result: list[SpecDir] = []
    count = 0
    for directory in directories:
        contents: list[tuple[str, bytes | ChandlerError]] = []
        error: ChandlerError | None = None
        try:
            trust.check_path(directory, owners)
            names = spec_names(directory)
        except FileNotFoundError as failed:
            names = []
            if trust.broken_link(directory):
                error = errors.HostError(f"the CDI directory {directory} cannot be read: {failed.strerror}")
        except OSError as failed:
            names, error = [], errors.HostError(f"the CDI directory {directory} cannot be read: {failed.strerror}")
        except errors.TrustError as failed:
            names, error = [], failed
        count += len(names)
        if count > MAX_CDI_FILES:
            names, error = [], errors.HostError(f"more than {MAX_CDI_FILES} CDI files, with those in {directory}")
        for name in names:
            contents.append((name, read_spec(f"{directory}/{name}", owners)))
        result.append((directory, error, contents))
    return result


def read_spec(path: str, owners: dict[int, str]) -> bytes | ChandlerError:
    """The bytes of one CDI file, or the error if it cannot be read or somebody else could have written it."""
    try:
        return trust.read_trusted(path, MAX_CDI_FILE, owners)
    except ChandlerError as error:
        return error
    except OSError as failed:
        return errors.HostError(f"{path} cannot be read: {failed.strerror}")
