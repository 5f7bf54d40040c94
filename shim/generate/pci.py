"""Devices on the PCI bus as sysfs tells them, and the DRM nodes that belong to one.  Pure.

Source: Documentation/ABI/testing/sysfs-bus-pci; systemd's 60-drm.rules for the links by path.
"""

from __future__ import annotations

from shim.generate.answers import links, merged, node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Tuple

    from shim.generate.answers import Block, Options
    from shim.generate.tree import HostTree

DEVICES = "/sys/bus/pci/devices"
BY_PATH = "/dev/dri/by-path"


def address(text: str) -> str:
    """A PCI address as sysfs writes it: lower case, the domain of four digits where NVML gives eight."""
    domain, colon, rest = text.lower().partition(":")
    return f"{domain[4:] if len(domain) == 8 and domain.startswith('0000') else domain}{colon}{rest}"


def is_address(text: str) -> bool:
    """Whether a name is one, such as 0000:41:00.0 (the domain may be longer, as Intel's VMD makes it)."""
    domain, _, rest = text.partition(":")
    return (
        len(domain) >= 4
        and len(rest) == 7
        and rest[2] == ":"
        and rest[5] == "."
        and not (domain + rest.replace(":", "", 1).replace(".", "", 1)).strip("0123456789abcdef")
    )


def number(name: str, prefix: str) -> int:
    """The number behind a prefix, as in card12; -1 for any other name."""
    digits = name[len(prefix) :]
    return whole(digits) if name.startswith(prefix) and len(digits) < 10 else -1


def whole(text: str) -> int:
    """A number of /proc or /sys, of at most 64 bits; -1 for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else -1


def numbered(names: List[str], prefix: str) -> List[str]:
    """The names that are a prefix and a number, by number."""
    return sorted((name for name in names if number(name, prefix) >= 0), key=lambda name: number(name, prefix))


def drm(tree: HostTree, options: Options, directory: str, bdf: str = "") -> Tuple[Block, List[str]]:
    """The DRM nodes of the device at a sysfs directory with, for one on the PCI bus, their links by path; and the
    names of nodes that sysfs knows and /dev does not."""
    names = tree.names(directory + "/drm")
    blocks: List[Block] = []
    missing: List[str] = []
    pairs: List[Tuple[str, str]] = []
    for prefix, kind in (("card", "card"), ("renderD", "render")):
        for name in numbered(names, prefix):
            made = node(tree, options, f"/dev/dri/{name}", numbers(tree, f"{directory}/drm/{name}"))
            if made is None:
                missing.append(f"/dev/dri/{name}")
                continue
            blocks.append(made)
            link = f"{BY_PATH}/pci-{bdf}-{kind}"
            if bdf and name in (tree.link(options.dev_root + link) or tree.link(link)).split("/"):
                pairs.append((link, f"../{name}"))
    return merged(*blocks, links(pairs)), missing


def numbers(tree: HostTree, directory: str) -> Optional[Tuple[str, int, int, int, int]]:
    """A node's numbers from sysfs, where it stands even while udev has not made the node."""
    major, _, minor = tree.text(directory + "/dev").partition(":")
    if not (0 < whole(major) < 1 << 12 and 0 <= whole(minor) < 1 << 20):  # what a dev_t of Linux holds
        return None
    return "c", int(major), int(minor), 0o660, 0
