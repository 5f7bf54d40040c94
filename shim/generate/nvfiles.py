"""Finds the files of an NVIDIA driver (libraries, configuration, firmware, programs, sockets) and their hooks.  Pure.

Every file is looked up inside the driver root, and a mount names the end of its links.  So no mount depends on a link
that the host would resolve in another root.  Source: NVIDIA Container Toolkit, pkg/nvcdi.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.generate import ldcache, nvproc
from shim.generate.model import OUR_PROGRAM, SOCKET_OPTIONS, links, merged, mount

if TYPE_CHECKING:
    from shim.generate.model import Block, Options
    from shim.generate.tree import HostTree
    from shim.shapes import Document

_MULTIARCH = ("x86_64-linux-gnu", "aarch64-linux-gnu")
_DIRECTORIES = (
    "/usr/lib64",
    *(f"/usr/lib/{arch}{more}" for arch in _MULTIARCH for more in ("", "/nvidia/current")),
    "/lib64",
    *(f"/lib/{arch}{more}" for arch in _MULTIARCH for more in ("", "/nvidia/current")),
    "/usr/lib",
    "/run/opengl-driver/lib",
)
# The libraries whose names end in the driver version.
_MARKERS = ("libcuda.so.", "libnvidia-ml.so.")

# Driver libraries that do not have the driver's version: how their names start.
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
# Directories below /lib/firmware, in the kernel's search order.  {0}: the kernel release.
_FIRMWARE = ("updates/{0}", "updates", "{0}", "")
_MAX_CACHE = 32 << 20  # bytes of the dynamic loader's cache


class Driver:
    """A driver: its version, the directory of its libraries in the driver root, and libnvidia-ml.so.1 on the host.

    Each is "" when it was not found.
    """

    __slots__ = ("version", "directory", "library")

    def __init__(self, version: str, directory: str, library: str) -> None:
        self.version = version
        self.directory = directory
        self.library = library


def driver(tree: HostTree, options: Options) -> Driver:
    """Finds the driver's libraries and version.  The loaded kernel module's version is preferred."""
    root = options.driver_root
    kernel_version = nvproc.kernel_version(tree)
    for directory in (*_DIRECTORIES, *_cached_directories(tree, root)):
        versions = _versions(tree, root, directory)
        if versions:
            version = kernel_version if kernel_version in versions else _linked(tree, root, directory, versions)
            real = tree.real(f"{directory}/libnvidia-ml.so.1", root) or tree.real(
                f"{directory}/libnvidia-ml.so.{version}", root
            )
            return Driver(version, directory, root + real if real else "")
    return Driver(kernel_version, "", "")


def _cached_directories(tree: HostTree, root: str) -> list[str]:
    cache = tree.data(root + "/etc/ld.so.cache", _MAX_CACHE)
    return [
        path.rpartition("/")[0]
        for name in ("libcuda.so.1", "libnvidia-ml.so.1")
        for path in ldcache.paths(cache, name)
        if path.startswith("/")
    ]


def _versions(tree: HostTree, root: str, directory: str) -> list[str]:
    """The driver versions in the names of a directory's libraries, from the first of _MARKERS that is there."""
    names = tree.names(root + tree.real(directory, root)) if tree.real(directory, root) else []
    for marker in _MARKERS:
        versions = [
            name[len(marker) :] for name in names if name.startswith(marker) and nvproc.is_version(name[len(marker) :])
        ]
        if versions:
            return versions
    return []


def _linked(tree: HostTree, root: str, directory: str, versions: list[str]) -> str:
    """The version that programs load: the one to which libcuda.so.1 links, else the highest."""
    for marker in _MARKERS:
        target = tree.real(f"{directory}/{marker}1", root)
        version = target.rpartition("/")[2][len(marker) :]
        if target and version in versions:
            return version
    return max(versions, key=lambda version: [int(part) for part in version.split(".")])


def common(tree: HostTree, options: Options, driver: Driver, compat: bool = False) -> Block:
    """The edits for every container with a GPU of this driver, except device nodes.

    `compat`: whether every GPU supports CUDA forward compatibility, with a newer libcuda from the image.
    """
    libraries, pairs, folders = _libraries(tree, options, driver)
    mounts = libraries + _configuration(tree, options) + _firmware(tree, options, driver) + _programs(tree, options)
    sockets = [
        (real, path)
        for path in (f"/run/{name}" for name in _SOCKETS)
        for real in [tree.real(path, options.driver_root)]
        if tree.kind(options.driver_root + real) == "socket"
    ]
    mounts += [mount(options, real, path, SOCKET_OPTIONS) for real, path in sockets]
    lock_nodes: Block = {}
    if nvproc.params(tree).get("ModifyDeviceFiles") == "1":
        lock_nodes = {"calls": [["disable-device-node-modification"]]}
    # With `void` NVIDIA's own runtime hook, where that is installed too, does not inject a second time.
    files: Block = {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "mounts": mounts}
    compat_call: Block = (
        {"calls": [["enable-cuda-compat", "--host-driver-version=" + driver.version]]}
        if compat and driver.version
        else {}
    )
    # NVIDIA's compat hook needs the cache update after it.  Ours puts its entry first into the cache, so it runs later.
    our_hook = options.hook.endswith("/" + OUR_PROGRAM)
    return merged(
        files,
        links(pairs),
        *((cache_call(folders), compat_call) if our_hook else (compat_call, cache_call(folders))),
        lock_nodes,
    )


def cache_call(folders: list[str]) -> Block:
    """A call that adds folders to the cache of the container's loader; an empty block for none."""
    return (
        {"calls": [["update-ldcache", *(word for folder in folders for word in ("--folder", folder))]]}
        if folders
        else {}
    )


def _libraries(
    tree: HostTree, options: Options, driver: Driver
) -> tuple[list[Document], list[tuple[str, str]], list[str]]:
    """Mounts of libraries, links to them as (path, target), and folders for the loader's cache."""
    root, directory = options.driver_root, driver.directory
    if not directory:
        return [], [], []
    mounts: list[Document] = []
    pairs: list[tuple[str, str]] = []
    folders: list[str] = []
    suffix = ".so." + driver.version
    for folder in (directory, directory + "/vdpau"):
        host_folder = root + (tree.real(folder, root) or folder)
        names = tree.names(host_folder)
        targets: dict[str, str] = {}
        for name in names:
            if name.endswith(suffix) or (name.startswith(_OTHER_VERSIONS) and ".so" in name):
                real = tree.real(f"{folder}/{name}", root)
                if tree.kind(root + real) == "file" and len(name) > len(targets.get(real, "")):
                    targets[real] = name
        links_here = {
            name: tree.real(f"{folder}/{name}", root)
            for name in names
            if ".so" in name and name.startswith("lib") and tree.link(f"{host_folder}/{name}")
        }
        # Of several names for one file the longest becomes the file's name, and the others become links to it.
        for name, real in links_here.items():
            if real in targets and len(name) > len(targets[real]):
                targets[real] = name
        mounts += [mount(options, real, f"{folder}/{name}") for real, name in targets.items()]
        pairs += [
            (f"{folder}/{name}", _link_target(tree, root, folder, name, targets[real]))
            for name, real in links_here.items()
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


def _link_target(tree: HostTree, root: str, folder: str, name: str, library: str) -> str:
    """The target of a link in the container: the same as on the host within the same folder, else the library."""
    host_target = tree.link(f"{root}{folder}/{name}")
    return (
        host_target
        if host_target and "/" not in host_target and tree.kind(f"{root}{folder}/{host_target}")
        else library
    )


# Links that programs open, and that some driver packages leave to other packages: name, target.
_EXPECTED = (
    ("libcuda.so", "libcuda.so.1"),
    ("libnvidia-opticalflow.so", "libnvidia-opticalflow.so.1"),
    ("libGLX_indirect.so.0", "libGLX_nvidia.so.0"),
)


def _missing_links(mounts: list[Document], pairs: list[tuple[str, str]], directory: str) -> list[tuple[str, str]]:
    present = {item["containerPath"] for item in mounts} | {path for path, _ in pairs}
    return [
        (f"{directory}/{name}", target)
        for name, target in _EXPECTED
        if f"{directory}/{name}" not in present and f"{directory}/{target}" in present
    ]


def _mount_first(tree: HostTree, options: Options, paths: list[str]) -> list[Document]:
    """A mount of the first path that is a file; an empty list without one."""
    for path in paths:
        real = tree.real(path, options.driver_root)
        if real and tree.kind(options.driver_root + real) == "file":
            return [mount(options, real, path)]
    return []


def _configuration(tree: HostTree, options: Options) -> list[Document]:
    return [
        item
        for name in _CONFIGURATION
        for item in _mount_first(tree, options, [f"{share}/{name}" for share in _SHARES])
    ]


def _programs(tree: HostTree, options: Options) -> list[Document]:
    mounts = [
        item
        for name in _BINARIES
        for item in _mount_first(tree, options, [f"{folder}/{name}" for folder in _PROGRAM_DIRS])
    ]
    # A program from a package manager's own directory of the host goes to /usr/bin, where containers look for it.
    for item in mounts:
        if not item["containerPath"].startswith("/usr/"):
            item["containerPath"] = "/usr/bin/" + item["containerPath"].rpartition("/")[2]
    return mounts


def _firmware(tree: HostTree, options: Options, driver: Driver) -> list[Document]:
    """Mounts of the GPU system processor's firmware, from the first directory of the kernel's search order."""
    configured = tree.text("/sys/module/firmware_class/parameters/path")
    release = tree.text("/proc/sys/kernel/osrelease")
    directories = [configured] if configured.startswith("/") else []
    directories += [f"/lib/firmware/{name.format(release)}".rstrip("/") for name in _FIRMWARE]
    for directory in directories:
        folder = f"{directory}/nvidia/{driver.version}"
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
