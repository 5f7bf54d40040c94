"""The CDI files of the node's directories, as bytes.  Part of the create path, but read by one that compiles alone."""

from __future__ import annotations

import posix

from shim import errors
from shim.errors import ChandlerError
from shim.host import trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Dict, List, Optional, Tuple, Union

    # A CDI directory as it was read: its path, why it could not be, and each file's bytes or why it has none.
    SpecDir = Tuple[str, Optional[ChandlerError], List[Tuple[str, Union[bytes, ChandlerError]]]]

MAX_CDI_FILE = 16 << 20  # bytes
MAX_CDI_FILES = 1024


def spec_names(directory: str) -> List[str]:
    """The sorted names of the CDI files in a directory: .json and .yaml alone (CDI Go library,
    pkg/cdi/spec-dirs.go)."""
    return sorted(name for name in posix.listdir(directory) if name.endswith((".json", ".yaml")))


def read_spec_dirs(directories: List[str], owners: Dict[int, str]) -> List[SpecDir]:
    """The CDI files of all directories, from low to high priority; what cannot be read carries its error."""
    result: List[SpecDir] = []
    count = 0
    for directory in directories:
        found: List[Tuple[str, Union[bytes, ChandlerError]]] = []
        error: Optional[ChandlerError] = None
        try:
            trust.check_way(directory, owners)
            names = spec_names(directory)
        except FileNotFoundError:
            names = []
        except OSError as failed:
            names, error = [], errors.HostError(f"the CDI directory {directory} cannot be read: {failed.strerror}")
        except errors.TrustError as failed:
            names, error = [], failed
        count += len(names)
        if count > MAX_CDI_FILES:
            names, error = [], errors.HostError(f"more than {MAX_CDI_FILES} CDI files, with those in {directory}")
        for name in names:
            found.append((name, read_spec(f"{directory}/{name}", owners)))
        result.append((directory, error, found))
    return result


def read_spec(path: str, owners: Dict[int, str]) -> Union[bytes, ChandlerError]:
    """The bytes of one CDI file, or why they are not to be had."""
    try:
        return trust.read_trusted(path, MAX_CDI_FILE, owners)
    except ChandlerError as error:
        return error
    except OSError as failed:
        return errors.HostError(f"{path} cannot be read: {failed.strerror}")
