"""GPUs that other NRI plugins add to a container: by their device numbers, by their CDI names, and by device rules.

Only what the inventory knows is a GPU here.  Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Set, Tuple

from shim.nri import as_config
from shim.oci import reader

if TYPE_CHECKING:
    from shim.node.inventory import Inventory


def added(
    adjustment: Any, granted_names: Set[str], granted_keys: List[str], inventory: Inventory, known: Dict[str, str]
) -> Iterable[Tuple[str, str]]:
    """What an adjustment adds beyond a grant of ours: for each GPU a text that names it, and its key.

    `known`: what gpu.numbers gives.
    """
    granted = {number for key in granted_keys for number in key.split("+")}
    for device in adjustment.CDI_devices:
        if device.name not in granted_names and inventory.lookup(device.name) is not None:
            for key in inventory.key(device.name):
                if key.split("+")[0] in known and not granted.issuperset(key.split("+")):
                    yield device.name, key
    for node in adjustment.linux.devices:
        number = f"{node.type}{node.major}:{node.minor}"
        if number in known and number not in granted:
            yield f"{node.path} ({known[number]})", number
    rules = {"linux": {"resources": {"devices": [as_config.rule(each) for each in adjustment.linux.resources.devices]}}}
    for kind, major, minor, words in reader.opening_rules(rules, complete=False):
        for number, name in known.items():
            if number not in granted and reader.covers(number, kind, major, minor):
                yield f"{words.replace('the engine', 'a plugin')} ({name})", number
