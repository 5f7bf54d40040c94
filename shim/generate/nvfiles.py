"""The files of an NVIDIA driver: libraries, configuration, firmware, programs, sockets; and the hooks they need.  Pure.

Everything is looked for inside the driver root and named by what its links end at, so that a mount never depends on a
link that the host would resolve in another root.  Source: NVIDIA Container Toolkit, pkg/nvcdi.
"""

from __future__ import annotations

from shim.generate import ldcache, nvproc
from shim.generate.answers import OUR_PROGRAM, SOCKET_OPTIONS, links, merged, mount

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, List, Tuple

    from shim.generate.answers import Block, Options
    from shim.generate.tree import HostTree

_MULTIARCH = ("x86_64-linux-gnu", "aarch64-linux-gnu")
_DIRECTORIES = (
    "/usr/lib64",
    *(f"/usr/lib/{arch}{more}" for arch in _MULTIARCH for more in ("", "/nvidia/current")),
    "/lib64",
    *(f"/lib/{arch}{more}" for arch in _MULTIARCH for more in ("", "/nvidia/current")),
    "/usr/lib",
    "/run/opengl-driver/lib",
)
_MARKERS = ("libcuda.so.", "libnvidia-ml.so.")

# Libraries with versions of their own: how their names start.
_OTHER_VERSIONS = (
    "libnvidia-nvvm",
    "libnvidia-egl-gbm.so.",
    "libnvidia-egl-wayland.so.",
    "libnvidia-egl-wayland2.so.",
    "libnvidia-egl-xcb.so.",
    "libnvidia-egl-xlib.so.",
    "libnvidia-vulkan-producer.so",
)
_XORG = ("/usr/lib/xorg/modules", "/usr/lib64/xorg/modules", *(f"/usr/lib/{arch}/nvidia/xorg" for arch in _MULTIARCH))

_SHARES = ("/etc", "/usr/share", "/usr/local/share", "/run/opengl-driver/share")
_CONFIGURATION = (
    "glvnd/egl_vendor.d/10_nvidia.json",
    "egl/egl_external_platform.d/09_nvidia_wayland2.json",
    "egl/egl_external_platform.d/10_nvidia_wayland.json",
    "egl/egl_external_platform.d/15_nvidia_gbm.json",
    "egl/egl_external_platform.d/20_nvidia_xcb.json",
    "egl/egl_external_platform.d/20_nvidia_xlib.json",
    "OpenCL/vendors/nvidia.icd",
    "vulkan/icd.d/nvidia_icd.json",
    "vulkan/icd.d/nvidia_layers.json",
    "vulkan/implicit_layer.d/nvidia_layers.json",
    "vulkansc/icd.d/nvidia_icd_vksc.json",
    "nvidia/nvoptix.bin",
    "X11/xorg.conf.d/10-nvidia.conf",
    "X11/xorg.conf.d/nvidia-drm-outputclass.conf",
)
_BINARIES = (
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
    "nvidia-imex",
    "nvidia-imex-ctl",
)
_PROGRAM_DIRS = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/bin", "/sbin", "/run/current-system/sw/bin")
_SOCKETS = ("nvidia-persistenced/socket", "nvidia-fabricmanager/socket")
_FIRMWARE = ("updates/{0}", "updates", "{0}", "")  # below /lib/firmware, the kernel's order; {0}: its release
_MAX_CACHE = 32 << 20


class Driver:
    """A driver in its root: `version`, `directory` of its libraries, `library` (libnvidia-ml.so.1) on the host."""

    __slots__ = ("version", "directory", "library")

    def __init__(self, version: str, directory: str, library: str) -> None:
        self.version = version
        self.directory = directory
        self.library = library


def driver(tree: HostTree, options: Options) -> Driver:
    """The driver's libraries and version, with nothing where there is nothing."""
    root = options.driver_root
    wanted = nvproc.kernel_version(tree)
    for directory in (*_DIRECTORIES, *_cached(tree, root)):
        versions = _versions(tree, root, directory)
        if versions:
            version = wanted if wanted in versions else _linked(tree, root, directory, versions)
            real = tree.real(f"{directory}/libnvidia-ml.so.1", root) or tree.real(
                f"{directory}/libnvidia-ml.so.{version}", root
            )
            return Driver(version, directory, root + real if real else "")
    return Driver(wanted, "", "")


def _cached(tree: HostTree, root: str) -> List[str]:
    cache = tree.data(root + "/etc/ld.so.cache", _MAX_CACHE)
    return [
        path.rpartition("/")[0]
        for name in ("libcuda.so.1", "libnvidia-ml.so.1")
        for path in ldcache.paths(cache, name)
        if path.startswith("/")
    ]


def _versions(tree: HostTree, root: str, directory: str) -> List[str]:
    """The driver versions that libraries in a directory carry; those of the first library that has any."""
    names = tree.names(root + tree.real(directory, root)) if tree.real(directory, root) else []
    for marker in _MARKERS:
        found = [
            name[len(marker) :] for name in names if name.startswith(marker) and nvproc.is_version(name[len(marker) :])
        ]
        if found:
            return found
    return []


def _linked(tree: HostTree, root: str, directory: str, versions: List[str]) -> str:
    """The version that programs get: the one that libcuda.so.1 ends at, else the highest."""
    for marker in _MARKERS:
        target = tree.real(f"{directory}/{marker}1", root)
        version = target.rpartition("/")[2][len(marker) :]
        if target and version in versions:
            return version
    return max(versions, key=lambda version: [int(part) for part in version.split(".")])


def common(tree: HostTree, options: Options, found: Driver, compat: bool = False) -> Block:
    """What every container with a GPU of this driver gets, besides nodes.

    `compat`: whether every GPU takes the newer CUDA library that an image may bring.
    """
    libraries, pairs, folders = _libraries(tree, options, found)
    mounts = libraries + _configuration(tree, options) + _firmware(tree, options, found) + _programs(tree, options)
    sockets = [
        (real, path)
        for path in (f"/run/{name}" for name in _SOCKETS)
        for real in [tree.real(path, options.driver_root)]
        if tree.kind(options.driver_root + real) == "socket"
    ]
    mounts += [mount(options, real, path, SOCKET_OPTIONS) for real, path in sockets]
    last: Block = {}
    if nvproc.params(tree).get("ModifyDeviceFiles") == "1":
        last = {"calls": [["disable-device-node-modification"]]}
    # so that NVIDIA's own runtime hook, where it is installed too, does not inject a second time
    own: Block = {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "mounts": mounts}
    newer: Block = (
        {"calls": [["enable-cuda-compat", "--host-driver-version=" + found.version]]}
        if compat and found.version
        else {}
    )
    # NVIDIA's hook leaves the cache to the next one; ours puts entries first, and so comes last
    ours = options.hook.endswith("/" + OUR_PROGRAM)
    return merged(own, links(pairs), *((cache_call(folders), newer) if ours else (newer, cache_call(folders))), last)


def cache_call(folders: List[str]) -> Block:
    """For a hook: to make the container's loader know some folders; nothing for none."""
    return (
        {"calls": [["update-ldcache", *(word for folder in folders for word in ("--folder", folder))]]}
        if folders
        else {}
    )


def _libraries(
    tree: HostTree, options: Options, found: Driver
) -> Tuple[List[Dict[str, Any]], List[Tuple[str, str]], List[str]]:
    """Mounts of libraries, links to them as (path, what it says), and folders for the loader's cache."""
    root, directory = options.driver_root, found.directory
    if not directory:
        return [], [], []
    mounts: List[Dict[str, Any]] = []
    pairs: List[Tuple[str, str]] = []
    folders: List[str] = []
    suffix = ".so." + found.version
    for folder in (directory, directory + "/vdpau"):
        place = root + (tree.real(folder, root) or folder)
        names = tree.names(place)
        targets: Dict[str, str] = {}
        for name in names:
            if name.endswith(suffix) or (name.startswith(_OTHER_VERSIONS) and ".so" in name):
                real = tree.real(f"{folder}/{name}", root)
                if tree.kind(root + real) == "file" and len(name) > len(targets.get(real, "")):
                    targets[real] = name
        linked = {
            name: tree.real(f"{folder}/{name}", root)
            for name in names
            if ".so" in name and name.startswith("lib") and tree.link(f"{place}/{name}")
        }
        # of several names for one file the longest is the file's own; the others are its links
        for name, real in linked.items():
            if real in targets and len(name) > len(targets[real]):
                targets[real] = name
        mounts += [mount(options, real, f"{folder}/{name}") for real, name in targets.items()]
        pairs += [
            (f"{folder}/{name}", _says(tree, root, folder, name, targets[real]))
            for name, real in linked.items()
            if real in targets and targets[real] != name
        ]
        if targets:
            folders.append(folder)
    pairs += _missing_links(mounts, pairs, directory)
    if tree.kind(f"{root}{directory}/gbm/nvidia-drm_gbm.so"):
        pairs.append((f"{directory}/gbm/nvidia-drm_gbm.so", "../libnvidia-allocator.so.1"))
    for folder in _XORG:
        for name in (
            "drivers/nvidia_drv.so",
            f"extensions/libglxserver_nvidia{suffix}",
            "nvidia_drv.so",
            f"libglxserver_nvidia{suffix}",
        ):
            real = tree.real(f"{folder}/{name}", root)
            if tree.kind(root + real) == "file":
                mounts.append(mount(options, real, f"{folder}/{name}"))
                if name.endswith(suffix):
                    pairs.append((f"{folder}/{name[: -len(suffix)]}.so", name.rpartition("/")[2]))
    return mounts, pairs, folders


def _says(tree: HostTree, root: str, folder: str, name: str, target: str) -> str:
    """What a link in the container says: the next link in the same folder as on the host, else the library itself."""
    said = tree.link(f"{root}{folder}/{name}")
    return said if said and "/" not in said and tree.kind(f"{root}{folder}/{said}") else target


# Links that programs ask for, where a driver's package leaves them to others: path, what it says.
_EXPECTED = (
    ("libcuda.so", "libcuda.so.1"),
    ("libnvidia-opticalflow.so", "libnvidia-opticalflow.so.1"),
    ("libGLX_indirect.so.0", "libGLX_nvidia.so.0"),
)


def _missing_links(mounts: List[Dict[str, Any]], pairs: List[Tuple[str, str]], directory: str) -> List[Tuple[str, str]]:
    there = {item["containerPath"] for item in mounts} | {path for path, _ in pairs}
    return [
        (f"{directory}/{name}", says)
        for name, says in _EXPECTED
        if f"{directory}/{name}" not in there and f"{directory}/{says}" in there
    ]


def _first(tree: HostTree, options: Options, places: List[str]) -> List[Dict[str, Any]]:
    """A mount of the first of some paths that is a file; none where none is."""
    for path in places:
        real = tree.real(path, options.driver_root)
        if real and tree.kind(options.driver_root + real) == "file":
            return [mount(options, real, path)]
    return []


def _configuration(tree: HostTree, options: Options) -> List[Dict[str, Any]]:
    return [item for name in _CONFIGURATION for item in _first(tree, options, [f"{share}/{name}" for share in _SHARES])]


def _programs(tree: HostTree, options: Options) -> List[Dict[str, Any]]:
    found = [
        item for name in _BINARIES for item in _first(tree, options, [f"{folder}/{name}" for folder in _PROGRAM_DIRS])
    ]
    for item in found:  # programs of a package manager's own directory are looked for in /usr/bin
        if not item["containerPath"].startswith("/usr/"):
            item["containerPath"] = "/usr/bin/" + item["containerPath"].rpartition("/")[2]
    return found


def _firmware(tree: HostTree, options: Options, found: Driver) -> List[Dict[str, Any]]:
    """The GPU system processor's firmware, where the kernel looks for it first."""
    own = tree.text("/sys/module/firmware_class/parameters/path")
    release = tree.text("/proc/sys/kernel/osrelease")
    places = [own] if own.startswith("/") else []
    places += [f"/lib/firmware/{place.format(release)}".rstrip("/") for place in _FIRMWARE]
    for place in places:
        folder = f"{place}/nvidia/{found.version}"
        real = tree.real(folder, options.driver_root)
        names = (
            [
                name
                for name in tree.names(options.driver_root + real)
                if name.startswith("gsp") and name.endswith(".bin")
            ]
            if real
            else []
        )
        if names:
            return [mount(options, f"{real}/{name}", f"{folder}/{name}") for name in names]
    return []
