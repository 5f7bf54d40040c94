"""NVIDIA's other device classes: management, WSL, Tegra's lists, GPUDirect storage and copy, verbs, switches, IMEX.  Pure.

Source: NVIDIA Container Toolkit, pkg/nvcdi and `nvidia-ctk cdi generate --help` (--mode).
"""

from __future__ import annotations

from shim.generate import nvfiles, pci
from shim.generate.answers import Device, Found, links, merged, mount, node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Tuple

    from shim.generate.answers import Block, Options
    from shim.generate.tree import HostTree

_WSL_LIBRARIES = "/usr/lib/wsl/lib"
_WSL_STORE = "/usr/lib/wsl/drivers"
_TEGRA_LISTS = "/etc/nvidia-container-runtime/host-files-for-container.d"
_CHANNELS = "/dev/nvidia-caps-imex-channels"


def automatic(tree: HostTree) -> str:
    """The mode that this host asks for; `auto` is NVML, or /proc where there is none."""
    if tree.kind("/proc/driver/nvidia/version"):
        return "auto"
    if tree.node("/dev/dxg"):
        return "wsl"
    return "csv" if tree.kind("/etc/nv_tegra_release") and tree.names(_TEGRA_LISTS) else "auto"


def _nodes(tree: HostTree, options: Options, folder: str, wanted: Callable[[str], bool]) -> List[Block]:
    """The device nodes of a directory whose names are wanted."""
    names = tree.names(options.dev_root + folder) or tree.names(folder)
    found = (node(tree, options, f"{folder}/{name}") for name in names if wanted(name))
    return [block for block in found if block is not None]


def _one(kind: str, blocks: List[Block], common: Block, layout: str, driver: str = "") -> Found:
    """A single device with all nodes, called `all`."""
    own = merged(*blocks)
    names = dict.fromkeys(("index", "uuid", "type-index"), "all")
    devices = [Device(names, own, layout)] if own.get("deviceNodes") else []
    return Found(kind, devices, common, driver, watch=["/dev"])


def _management(tree: HostTree, options: Options) -> Found:
    driver = nvfiles.driver(tree, options)
    blocks = _nodes(tree, options, "/dev", lambda name: name.startswith("nvidia"))
    for folder in ("/dev/nvidia-caps", _CHANNELS):
        blocks += _nodes(tree, options, folder, lambda name: True)
    return _one(
        "management.nvidia.com/gpu",
        blocks,
        nvfiles.common(tree, options, driver),
        "every node of the driver",
        driver.version,
    )


def _wsl(tree: HostTree, options: Options) -> Found:
    """Windows' own driver, seen through /dev/dxg: all of its store that holds libcuda, and the loader's libraries."""
    root = options.driver_root
    stores = [
        f"{_WSL_STORE}/{name}"
        for name in tree.names(root + _WSL_STORE)
        if tree.kind(f"{root}{_WSL_STORE}/{name}/libcuda.so.1.1") == "file"
    ]
    mounts = [
        mount(options, f"{store}/{name}", f"{store}/{name}")
        for store in stores
        for name in tree.names(root + store)
        if (".so" in name or name in ("nvidia-smi", "nvcubins.bin")) and tree.kind(f"{root}{store}/{name}") == "file"
    ]
    mounts += [
        mount(options, f"{_WSL_LIBRARIES}/{name}", f"{_WSL_LIBRARIES}/{name}")
        for name in ("libdxcore.so",)
        if tree.kind(f"{root}{_WSL_LIBRARIES}/{name}") == "file"
    ]
    pairs = [
        ("/usr/bin/nvidia-smi", f"{store}/nvidia-smi") for store in stores if tree.kind(f"{root}{store}/nvidia-smi")
    ]
    common: Block = {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "mounts": mounts}
    folders = [
        *stores,
        *([_WSL_LIBRARIES] if len(mounts) and mounts[-1]["containerPath"].startswith(_WSL_LIBRARIES) else []),
    ]
    return _one(
        "nvidia.com/gpu",
        [node(tree, options, "/dev/dxg") or {}],
        merged(common, links(pairs), nvfiles.cache_call(folders)),
        "WSL " + " ".join(stores),
    )


def _csv(tree: HostTree, options: Options) -> Found:
    """Tegra: what the lists of the board's packages name, each line `dev|dir|lib|sym, path`; what is missing is left out."""
    root = options.driver_root
    blocks: List[Block] = []
    mounts: List[Dict[str, object]] = []
    pairs: List[Tuple[str, str]] = []
    folders: Dict[str, None] = {}
    for name in tree.names(root + _TEGRA_LISTS):
        for line in tree.text(f"{root}{_TEGRA_LISTS}/{name}").split("\n") if name.endswith(".csv") else ():
            kind, _, path = (part.strip() for part in line.partition(","))
            if not path.startswith("/"):
                continue
            if kind == "dev":
                blocks.append(node(tree, options, path) or {})
            elif kind == "sym" and tree.link(root + path):
                pairs.append((path, tree.link(root + path)))
            elif kind in ("lib", "dir") and tree.real(path, root):
                mounts.append(mount(options, tree.real(path, root), path))
                if kind == "lib" and ".so" in path:
                    folders[path.rpartition("/")[0]] = None
    common: Block = {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "mounts": mounts}
    return _one(
        "nvidia.com/gpu",
        blocks,
        merged(common, links(pairs), nvfiles.cache_call(list(folders))),
        "Tegra",
        tree.text(root + "/etc/nv_tegra_release").partition("\n")[0].lstrip("# "),
    )


def _gds(tree: HostTree, options: Options) -> Found:
    places = [path for path in ("/etc/cufile.json", "/run/udev") if tree.real(path, options.driver_root)]
    mounts = [mount(options, tree.real(path, options.driver_root), path) for path in places]
    return _one(
        "nvidia.com/gds",
        _nodes(tree, options, "/dev", lambda name: name.startswith("nvidia-fs")),
        {"mounts": mounts} if mounts else {},
        "GPUDirect storage",
    )


def _gdrcopy(tree: HostTree, options: Options) -> Found:
    return _one("nvidia.com/gdrcopy", _nodes(tree, options, "/dev", lambda name: name == "gdrdrv"), {}, "GDRCopy")


def _mofed(tree: HostTree, options: Options) -> Found:
    blocks = _nodes(tree, options, "/dev/infiniband", lambda name: pci.number(name, "uverbs") >= 0 or name == "rdma_cm")
    return _one("nvidia.com/mofed", blocks, {}, "InfiniBand verbs")


def _nvswitch(tree: HostTree, options: Options) -> Found:
    return _one(
        "nvidia.com/nvswitch",
        _nodes(tree, options, "/dev", lambda name: name.startswith("nvidia-nvswitch")),
        {},
        "NVSwitch",
    )


def _imex(tree: HostTree, options: Options) -> Found:
    """Each IMEX channel is a device, called by its number."""
    names = tree.names(options.dev_root + _CHANNELS) or tree.names(_CHANNELS)
    devices: List[Device] = []
    for name in pci.numbered(names, "channel"):
        made = node(tree, options, f"{_CHANNELS}/{name}")
        number = name[len("channel") :]
        if made is not None:
            devices.append(Device(dict.fromkeys(("index", "uuid", "type-index"), number), made, name))
    return Found("nvidia.com/imex-channel", devices, watch=[_CHANNELS])


MODES: Dict[str, Callable[[HostTree, Options], Found]] = {
    "management": _management,
    "wsl": _wsl,
    "csv": _csv,
    "gds": _gds,
    "gdrcopy": _gdrcopy,
    "mofed": _mofed,
    "nvswitch": _nvswitch,
    "imex": _imex,
}
