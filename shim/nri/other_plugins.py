"""Finds GPUs that other NRI plugins add to a container: by device numbers, by CDI names, and by device rules.

Only devices that the inventory knows as GPUs count.  Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from shim.nri import as_config
from shim.oci import reader

if TYPE_CHECKING:
    from shim.node.inventory import Inventory


def added(
    adjustment: Any, granted_names: set[str], granted_keys: list[str], inventory: Inventory, gpu_names: dict[str, str]
) -> Iterable[tuple[str, str]]:
    """The GPUs that an adjustment adds beyond Chandler's grant, each as (text that names it, key).

    `granted_names`, `granted_keys`: the CDI names and device keys of the grant.  `gpu_names`: the GPUs by device
    number, as choose.gpu_names_by_number gives them.
    """
    granted = {number for key in granted_keys for number in key.split("+")}
    for device in adjustment.CDI_devices:
        if device.name not in granted_names and inventory.lookup(device.name) is not None:
            for key in inventory.key(device.name):
                if key.split("+")[0] in gpu_names and not granted.issuperset(key.split("+")):
                    yield device.name, key
    for node in adjustment.linux.devices:
        number = f"{node.type}{node.major}:{node.minor}"
        if number in gpu_names and number not in granted:
            yield f"{node.path} ({gpu_names[number]})", number
    rules = {"linux": {"resources": {"devices": [as_config.rule(rule) for rule in adjustment.linux.resources.devices]}}}
    for kind, major, minor, words in reader.opening_rules(rules, complete=False):
        for number, name in gpu_names.items():
            if number not in granted and reader.rule_covers(number, kind, major, minor):
                yield f"{words.replace('the engine', 'a plugin')} ({name})", number
