"""Devices on the PCI bus in sysfs, and the DRM nodes of a device.  Pure.

Source: Documentation/ABI/testing/sysfs-bus-pci; systemd's 60-drm.rules for the links by path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.generate.model import links, merged, node

if TYPE_CHECKING:
    from shim.generate.model import Block, Options
    from shim.generate.tree import HostTree

DEVICES = "/sys/bus/pci/devices"
BY_PATH = "/dev/dri/by-path"


def address(text: str) -> str:
    """A PCI address as sysfs writes it: lower case, the domain of four digits where NVML gives eight."""
    domain, colon, rest = text.lower().partition(":")
    return f"{domain[4:] if len(domain) == 8 and domain.startswith('0000') else domain}{colon}{rest}"


def is_address(text: str) -> bool:
    """Whether a text is a PCI address, such as 0000:41:00.0.  The domain may be longer, as with Intel's VMD."""
    domain, _, rest = text.partition(":")
    return (
        len(domain) >= 4
        and len(rest) == 7
        and rest[2] == ":"
        and rest[5] == "."
        and not (domain + rest.replace(":", "", 1).replace(".", "", 1)).strip("0123456789abcdef")
    )


def number(name: str, prefix: str) -> int:
    """The number after a prefix, as in card12; -1 for any other name."""
    digits = name[len(prefix) :]
    return natural_number(digits) if name.startswith(prefix) and len(digits) < 10 else -1


def natural_number(text: str) -> int:
    """A non-negative number from /proc or /sys, of at most 20 digits; -1 for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else -1


def numbered(names: list[str], prefix: str) -> list[str]:
    """The names that consist of a prefix and a number, sorted by number."""
    return sorted((name for name in names if number(name, prefix) >= 0), key=lambda name: number(name, prefix))


def drm(tree: HostTree, options: Options, directory: str, bdf: str = "") -> tuple[Block, list[str]]:
    """The edits for the DRM nodes of the device at a sysfs directory, and the nodes that sysfs knows and /dev lacks.

    `bdf`: the PCI address of a device on the bus.  Its nodes get their links in /dev/dri/by-path, too.
    """
    names = tree.names(directory + "/drm")
    blocks: list[Block] = []
    missing: list[str] = []
    pairs: list[tuple[str, str]] = []
    for prefix, kind in (("card", "card"), ("renderD", "render")):
        for name in numbered(names, prefix):
            block = node(tree, options, f"/dev/dri/{name}", numbers(tree, f"{directory}/drm/{name}"))
            if block is None:
                missing.append(f"/dev/dri/{name}")
                continue
            blocks.append(block)
            link = f"{BY_PATH}/pci-{bdf}-{kind}"
            if bdf and name in (tree.link(options.dev_root + link) or tree.link(link)).split("/"):
                pairs.append((link, f"../{name}"))
    return merged(*blocks, links(pairs)), missing


def numbers(tree: HostTree, directory: str) -> tuple[str, int, int, int, int] | None:
    """A node's values (type, major, minor, mode, group) from sysfs, which has its numbers even before udev makes it."""
    major, _, minor = tree.text(directory + "/dev").partition(":")
    # what a dev_t of Linux holds
    if not (0 < natural_number(major) < 1 << 12 and 0 <= natural_number(minor) < 1 << 20):
        return None
    return "c", int(major), int(minor), 0o660, 0
