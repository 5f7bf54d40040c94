"""NVIDIA's other device classes and platforms, one function for each --mode.  Pure.

They are management, WSL, Tegra (csv), GPUDirect Storage, GDRCopy, InfiniBand verbs (mofed), NVSwitch and IMEX.

Source: NVIDIA Container Toolkit, pkg/nvcdi and `nvidia-ctk cdi generate --help` (--mode).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from shim.generate import nvfiles, pci
from shim.generate.model import Description, Device, links, merged, mount, node

if TYPE_CHECKING:
    from shim.generate.model import Block, Options
    from shim.generate.tree import HostTree

_WSL_LIBRARIES = "/usr/lib/wsl/lib"
_WSL_STORE = "/usr/lib/wsl/drivers"
_TEGRA_LISTS = "/etc/nvidia-container-runtime/host-files-for-container.d"
_CHANNELS = "/dev/nvidia-caps-imex-channels"


def automatic(tree: HostTree) -> str:
    """The mode for this host.  `auto` means NVML, or /proc where there is no NVML."""
    if tree.kind("/proc/driver/nvidia/version"):
        return "auto"
    if tree.node("/dev/dxg"):
        return "wsl"
    return "csv" if tree.kind("/etc/nv_tegra_release") and tree.names(_TEGRA_LISTS) else "auto"


def _nodes(tree: HostTree, options: Options, folder: str, wanted: Callable[[str], bool]) -> list[Block]:
    """The device nodes of a directory whose names `wanted` accepts."""
    names = tree.names(options.dev_root + folder) or tree.names(folder)
    blocks = (node(tree, options, f"{folder}/{name}") for name in names if wanted(name))
    return [block for block in blocks if block is not None]


def _single_device(kind: str, blocks: list[Block], common: Block, layout: str, driver: str = "") -> Description:
    """One device that has all nodes and is named `all`."""
    edits = merged(*blocks)
    names = dict.fromkeys(("index", "uuid", "type-index"), "all")
    devices = [Device(names, edits, layout)] if edits.get("deviceNodes") else []
    return Description(kind, devices, common, driver, watch=["/dev"])


def _management(tree: HostTree, options: Options) -> Description:
    driver = nvfiles.driver(tree, options)
    blocks = _nodes(tree, options, "/dev", lambda name: name.startswith("nvidia"))
    for folder in ("/dev/nvidia-caps", _CHANNELS):
        blocks += _nodes(tree, options, folder, lambda name: True)
    return _single_device(
        "management.nvidia.com/gpu",
        blocks,
        nvfiles.common(tree, options, driver),
        "every node of the driver",
        driver.version,
    )


def _wsl(tree: HostTree, options: Options) -> Description:
    """The driver of Windows behind /dev/dxg: the files of each driver store that has libcuda, and libdxcore.so."""
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
    # The mount of libdxcore.so, if there is one, is the last.
    has_dxcore = bool(mounts) and mounts[-1]["containerPath"].startswith(_WSL_LIBRARIES)
    folders = [*stores, *([_WSL_LIBRARIES] if has_dxcore else [])]
    return _single_device(
        "nvidia.com/gpu",
        [node(tree, options, "/dev/dxg") or {}],
        merged(common, links(pairs), nvfiles.cache_call(folders)),
        "WSL " + " ".join(stores),
    )


def _csv(tree: HostTree, options: Options) -> Description:
    """Tegra: the files in the lists of the board's packages.

    Each line has the form `dev|dir|lib|sym, path`.  Paths that are missing are left out.
    """
    root = options.driver_root
    blocks: list[Block] = []
    mounts: list[dict[str, object]] = []
    pairs: list[tuple[str, str]] = []
    folders: dict[str, None] = {}
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
    return _single_device(
        "nvidia.com/gpu",
        blocks,
        merged(common, links(pairs), nvfiles.cache_call(list(folders))),
        "Tegra",
        tree.text(root + "/etc/nv_tegra_release").partition("\n")[0].lstrip("# "),
    )


def _gds(tree: HostTree, options: Options) -> Description:
    paths = [path for path in ("/etc/cufile.json", "/run/udev") if tree.real(path, options.driver_root)]
    mounts = [mount(options, tree.real(path, options.driver_root), path) for path in paths]
    return _single_device(
        "nvidia.com/gds",
        _nodes(tree, options, "/dev", lambda name: name.startswith("nvidia-fs")),
        {"mounts": mounts} if mounts else {},
        "GPUDirect storage",
    )


def _gdrcopy(tree: HostTree, options: Options) -> Description:
    return _single_device(
        "nvidia.com/gdrcopy", _nodes(tree, options, "/dev", lambda name: name == "gdrdrv"), {}, "GDRCopy"
    )


def _mofed(tree: HostTree, options: Options) -> Description:
    blocks = _nodes(tree, options, "/dev/infiniband", lambda name: pci.number(name, "uverbs") >= 0 or name == "rdma_cm")
    return _single_device("nvidia.com/mofed", blocks, {}, "InfiniBand verbs")


def _nvswitch(tree: HostTree, options: Options) -> Description:
    return _single_device(
        "nvidia.com/nvswitch",
        _nodes(tree, options, "/dev", lambda name: name.startswith("nvidia-nvswitch")),
        {},
        "NVSwitch",
    )


def _imex(tree: HostTree, options: Options) -> Description:
    """Each IMEX channel is a device, named after its number."""
    names = tree.names(options.dev_root + _CHANNELS) or tree.names(_CHANNELS)
    devices: list[Device] = []
    for name in pci.numbered(names, "channel"):
        block = node(tree, options, f"{_CHANNELS}/{name}")
        number = name[len("channel") :]
        if block is not None:
            devices.append(Device(dict.fromkeys(("index", "uuid", "type-index"), number), block, name))
    return Description("nvidia.com/imex-channel", devices, watch=[_CHANNELS])


MODES: dict[str, Callable[[HostTree, Options], Description]] = {
    "management": _management,
    "wsl": _wsl,
    "csv": _csv,
    "gds": _gds,
    "gdrcopy": _gdrcopy,
    "mofed": _mofed,
    "nvswitch": _nvswitch,
    "imex": _imex,
}
