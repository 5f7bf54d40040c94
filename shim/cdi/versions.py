"""The released CDI versions, and which version a file needs for the fields that it uses.

Source: CDI SPEC.md, "Released versions".
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.shapes import Document

KNOWN = ("0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0")
FLOOR = "0.3.0"  # the lowest version that a file may declare


def normal(version: str) -> str | None:
    """A known version without a leading `v`; None for any other text."""
    bare = version[1:] if version.startswith("v") else version
    return bare if bare in KNOWN else None


def older(one: str, other: str) -> bool:
    """Whether known version `one` came before known version `other`."""
    return KNOWN.index(one) < KNOWN.index(other)


def _rdt(edits: Document) -> Document:
    rdt: Document = edits.get("intelRdt") or {}
    return rdt


# (version, what needs it, whether a block of container edits has it).  Of equal versions, minimum() names the first.
_EDITS = (
    ("1.1.0", "intelRdt.schemata", lambda edits: "schemata" in _rdt(edits)),
    ("1.1.0", "intelRdt.enableMonitoring", lambda edits: _rdt(edits).get("enableMonitoring")),
    ("1.1.0", "netDevices", lambda edits: edits.get("netDevices")),
    ("0.7.0", "intelRdt", lambda edits: "intelRdt" in edits),
    ("0.7.0", "additionalGids", lambda edits: edits.get("additionalGids")),
    ("0.5.0", "a device node's hostPath", lambda edits: any(n.get("hostPath") for n in edits.get("deviceNodes", ()))),
    ("0.4.0", "a mount's type", lambda edits: any(m.get("type") for m in edits.get("mounts", ()))),
)
# The same for the whole file.
_FILE = (
    ("0.6.0", "annotations", lambda file: file.get("annotations")),
    ("0.6.0", "annotations of a device", lambda file: any(d.get("annotations") for d in _devices(file))),
    ("0.6.0", "a dot in the class", lambda file: "." in file.get("kind", "").partition("/")[2]),
    ("0.5.0", "a device name that starts with a digit", lambda file: any(_digit(d) for d in _devices(file))),
)


def _devices(file: Document) -> list[Document]:
    devices: list[Document] = file.get("devices") or []
    return devices


def _digit(device: Document) -> bool:
    return device.get("name", "")[:1] in tuple("0123456789")


def minimum(file: Document) -> tuple[str, str]:
    """(the lowest version that a decoded file may declare, what in the file needs it); '' where it is FLOOR."""
    blocks = [file.get("containerEdits") or {}, *(device.get("containerEdits") or {} for device in _devices(file))]
    needs = [rule[:2] for rule in _FILE if rule[2](file)]
    for block in blocks:
        needs += [rule[:2] for rule in _EDITS if rule[2](block)]
    return max(needs, key=lambda need: KNOWN.index(need[0]), default=(FLOOR, ""))
