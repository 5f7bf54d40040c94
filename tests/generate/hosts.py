"""Hosts as trees: what /proc, /sys, /dev and a driver's directories contain on each kind of machine.

Device nodes are entries of a table, because tests may not make them; a HostTree answers for them from that table.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from lab import ldsocache

from shim.errors import HostError
from shim.generate.model import NvmlUnavailable
from shim.generate.tree import HostTree

VERSION = "550.54.15"
PARAMS = "EnableMSI: 1\nModifyDeviceFiles: 1\nDeviceFileUID: 0\nDeviceFileGID: 0\nDeviceFileMode: 438\n"
DEVICES = (
    "Character devices:\n  1 mem\n195 nvidia\n195 nvidia-modeset\n195 nvidiactl\n226 drm\n234 nvidia-caps\n"
    "510 nvidia-uvm\n\nBlock devices:\n  8 sd\n"
)
LIBRARIES = (
    "libcuda.so",
    "libnvidia-ml.so",
    "libnvidia-ptxjitcompiler.so",
    "libGLX_nvidia.so",
    "libnvidia-opticalflow.so",
)


class Host:
    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.links: dict[str, str] = {}
        self.sockets: list[str] = []
        self.nodes: dict[str, tuple[str, int, int, int, int]] = {}
        self.nvml: dict[str, Any] | None = None
        self.prefix = ""

    def file(self, path: str, text: str = "") -> Host:
        self.files[path] = text
        return self

    def link(self, path: str, target: str) -> Host:
        self.links[path] = target
        return self

    def node(self, path: str, major: int, minor: int, mode: int = 0o666, group: int = 0) -> Host:
        self.nodes[path] = ("c", major, minor, mode, group)
        return self

    def add(self, other: Host) -> Host:
        """Combine both hosts in one machine."""
        self.files.update(other.files)
        self.links.update(other.links)
        self.nodes.update(other.nodes)
        self.sockets += other.sockets
        self.nvml = self.nvml or other.nvml
        return self

    def build(self, directory: str) -> HostTree:
        """Write the tree to disk. A second call adds what is new."""
        self.prefix = directory
        for path, text in {**self.files, **dict.fromkeys(self.nodes, "")}.items():
            self._parents(path)
            with open(directory + path, "w", encoding="utf-8") as file:
                file.write(text)
        for path, target in self.links.items():
            self._parents(path)
            if not os.path.lexists(directory + path):
                os.symlink(target, directory + path)
        for path in self.sockets:
            self._parents(path)
            with socket.socket(socket.AF_UNIX) as server:
                here = os.getcwd()
                os.chdir(os.path.dirname(directory + path))  # a socket's path is short
                server.bind(os.path.basename(path))
                os.chdir(here)
        return HostTree(directory, self.look)

    def _parents(self, path: str) -> None:
        os.makedirs(os.path.dirname(self.prefix + path), exist_ok=True)

    def look(self, path: str) -> tuple[str, int, int, int, int]:
        found = self.nodes.get(path.removeprefix(self.prefix))
        if found is None:
            raise HostError(f"{path} is not on this host")
        return found

    def ask(self, library: str) -> dict[str, Any]:
        """Replaces nvml.ask."""
        if self.nvml is None:
            raise NvmlUnavailable("this host has no NVML")
        return self.nvml


# --- NVIDIA ---------------------------------------------------------------------------------------------------


def uuid(index: int) -> str:
    return f"GPU-{index:08x}-5eed-4bad-8ace-0123456789ab"


def address(index: int) -> str:
    return f"0000:{0x1B + index * 0x10:02x}:00.0"


def libraries(host: Host, directory: str, root: str = "", version: str = VERSION) -> Host:
    """A driver's libraries with the links that its package makes."""
    workdir = root + directory
    for name in LIBRARIES:
        host.file(f"{workdir}/{name}.{version}", "\x7fELF")
        host.link(f"{workdir}/{name}.{0 if 'GLX' in name else 1}", f"{name}.{version}")
    host.link(f"{workdir}/libcuda.so", "libcuda.so.1")
    host.file(f"{workdir}/libnvidia-egl-gbm.so.1.1.1", "\x7fELF").link(
        f"{workdir}/libnvidia-egl-gbm.so.1", "libnvidia-egl-gbm.so.1.1.1"
    )
    host.file(f"{workdir}/vdpau/libvdpau_nvidia.so.{version}", "\x7fELF").link(
        f"{workdir}/vdpau/libvdpau_nvidia.so.1", f"libvdpau_nvidia.so.{version}"
    )
    host.file(f"{workdir}/libc.so.6", "\x7fELF").file(f"{workdir}/libGL.so.1.7.0", "\x7fELF")  # not the driver's
    return host


def nvidia(
    count: int = 1, directory: str = "/usr/lib/x86_64-linux-gnu", root: str = "", version: str = VERSION
) -> Host:
    """A server with `count` GPUs, its driver below `root`."""
    host = libraries(Host(), directory, root, version)
    host.file(
        "/proc/driver/nvidia/version",
        f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Tue Mar  5 22:23:56 UTC 2024\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
    )
    host.file("/proc/driver/nvidia/params", PARAMS).file("/proc/devices", DEVICES).file(
        "/proc/sys/kernel/osrelease", "6.1.0-18-amd64\n"
    )
    for name, minor in (("nvidiactl", 255), ("nvidia-modeset", 254)):
        host.node(f"/dev/{name}", 195, minor)
    host.node("/dev/nvidia-uvm", 510, 0).node("/dev/nvidia-uvm-tools", 510, 1)
    for index in range(count):
        bdf = address(index)
        host.file(
            f"/proc/driver/nvidia/gpus/{bdf}/information",
            f"Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 6{index}\nGPU UUID: \t {uuid(index)}\n"
            "Video BIOS: \t 96.00.74.00.01\n"
            f"Bus Type: \t PCIe\nBus Location: \t {bdf}\nDevice Minor: \t {index}\nGPU Excluded:\t No\n",
        )
        host.node(f"/dev/nvidia{index}", 195, index)
        drm(host, f"/sys/bus/pci/devices/{bdf}", index + 1, bdf)
    host.file(f"{root}/usr/bin/nvidia-smi").file(f"{root}/usr/bin/nvidia-persistenced").file(
        f"{root}/usr/bin/nvidia-cuda-mps-control"
    )
    host.file(f"{root}/usr/share/glvnd/egl_vendor.d/10_nvidia.json").file(f"{root}/etc/OpenCL/vendors/nvidia.icd")
    host.file(f"{root}/lib/firmware/nvidia/{version}/gsp_ga10x.bin").file(
        f"{root}/lib/firmware/nvidia/{version}/gsp_tu10x.bin"
    )
    return host


def drm(host: Host, directory: str, number: int, bdf: str = "") -> None:
    """The DRM nodes of a device; card for the group `video` (44), render for `render` (105), as udev makes them."""
    for name, minor, group in ((f"card{number}", number, 44), (f"renderD{128 + number}", 128 + number, 105)):
        host.file(f"{directory}/drm/{name}/dev", f"226:{minor}\n")
        host.node(f"/dev/dri/{name}", 226, minor, 0o660, group)
        if bdf:
            host.link(f"/dev/dri/by-path/pci-{bdf}-{'card' if name.startswith('card') else 'render'}", f"../{name}")


def nvml(count: int, mig: dict[int, int] | None = None, version: str = VERSION) -> dict[str, Any]:
    """What nvml.read answers on such a server; `mig` says how many instances a GPU in MIG mode has."""
    gpus = []
    for index in range(count):
        parts = [
            {"index": part, "uuid": f"MIG-{index:08x}-{part:04x}-5bad-8ace-0123456789ab", "gi": part + 7, "ci": 0}
            for part in range((mig or {}).get(index, 0))
        ]
        gpus.append(
            {
                "index": index,
                "minor": index,
                "uuid": uuid(index),
                "bdf": "0000" + address(index).upper(),
                "name": "NVIDIA H100 80GB HBM3",
                "mig": index in (mig or {}),
                "coherent": False,
                "parts": parts,
            }
        )
    return {"driver": version, "gpus": gpus}


def mig(count: int, instances: dict[int, int]) -> Host:
    """The server with MIG on some of its GPUs."""
    host = nvidia(count)
    host.nvml = nvml(count, instances)
    lines, cap = ["config 1", "monitor 2"], 10
    for gpu in range(count):
        for instance in range(7, 14):
            for name in (f"gpu{gpu}/gi{instance}/access", f"gpu{gpu}/gi{instance}/ci0/access"):
                cap += 1
                lines.append(f"{name} {cap}")
                if instance - 7 < instances.get(gpu, 0):
                    host.node(f"/dev/nvidia-caps/nvidia-cap{cap}", 234, cap, 0o444)
                    host.file(
                        f"/proc/driver/nvidia/capabilities/gpu{gpu}/mig/{name.partition('/')[2]}",
                        f"DeviceFileMinor: {cap}\n",
                    )
    return host.file("/proc/driver/nvidia-caps/mig-minors", "\n".join(lines) + "\n")


def nixos() -> Host:
    """Everything in a store, behind links from /run."""
    store = "/nix/store/0x1y2z-nvidia-x11-550.54.15-6.6.30"
    host = libraries(nvidia(1, store + "/lib"), store + "/lib")
    for name in LIBRARIES:
        host.link(f"/run/opengl-driver/lib/{name}.{VERSION}", f"{store}/lib/{name}.{VERSION}")
        host.link(f"/run/opengl-driver/lib/{name}.1", f"{store}/lib/{name}.1")
    for path in [path for path in host.files if path.startswith(("/usr/", "/etc/OpenCL", "/lib/"))]:
        del host.files[path]
    host.file(f"{store}-bin/bin/nvidia-smi").link(
        "/run/current-system/sw/bin/nvidia-smi", f"{store}-bin/bin/nvidia-smi"
    )
    return host.file("/proc/devices", DEVICES)


def container_driver() -> Host:
    """A driver container: its root below /run/nvidia/driver, with links that are absolute inside it."""
    root = "/run/nvidia/driver"
    host = nvidia(1, "/usr/lib/x86_64-linux-gnu", root)
    host.file(f"{root}/etc/alternatives/libnvidia-ml.so.real", "\x7fELF")
    host.link(f"{root}/usr/lib/x86_64-linux-gnu/libnvidia-cfg.so.{VERSION}", "/etc/alternatives/libnvidia-ml.so.real")
    return host


def cached() -> Host:
    """Libraries that only the loader's cache lists."""
    host = nvidia(1, "/opt/nvidia/lib")
    return host.file(
        "/etc/ld.so.cache",
        ldsocache.write([(0x0303, b"libcuda.so.1", b"/opt/nvidia/lib/libcuda.so.1", 0, 0)]).decode("latin-1"),
    )


# --- AMD ------------------------------------------------------------------------------------------------------


def amd(count: int = 1, partitions: int = 1, kfd: bool = True) -> Host:
    """Servers with amdgpu, each GPU in `partitions` parts; and the processor's two KFD nodes."""
    host = Host().file("/sys/module/amdgpu/version", "6.8.5\n")
    if kfd:
        host.node("/dev/kfd", 235, 0, 0o660, 105)
    nodes = "/sys/class/kfd/kfd/topology/nodes"
    for number in (0, 1):
        host.file(
            f"{nodes}/{number}/properties",
            "cpu_cores_count 64\nsimd_count 0\ndrm_render_minor 0\nlocation_id 0\ndomain 0\nunique_id 0\n",
        )
    platform, number = 0, 2
    for index in range(count):
        bus = 0x0C + index * 0x10
        bdf = f"0000:{bus:02x}:00.0"
        for part in range(partitions):
            minor = index * partitions + part
            if part == 0:
                directory = f"/sys/module/amdgpu/drivers/pci:amdgpu/{bdf}"
                drm(host, directory, minor, bdf)
            else:
                directory = f"/sys/devices/platform/amdgpu_xcp_{platform}"
                platform += 1
                drm(host, directory, minor)
            host.file(
                f"{nodes}/{number}/properties",
                f"cpu_cores_count 0\nsimd_count 1216\ndrm_render_minor {128 + minor}\n"
                f"location_id {bus << 8}\ndomain 0\nunique_id {0x1F2E3D4C5B6A0000 + index}\n",
            )
            number += 1
    return host


# --- Intel ----------------------------------------------------------------------------------------------------


def intel(driver: str, *cards: tuple[str, str, int]) -> Host:
    """GPUs as (PCI address, model, number of the card)."""
    host = Host()
    for bdf, model, number in cards:
        directory = f"/sys/bus/pci/devices/{bdf}"
        host.file(f"{directory}/vendor", "0x8086\n").file(f"{directory}/class", "0x038000\n").file(
            f"{directory}/device", model + "\n"
        )
        host.link(f"{directory}/driver", f"../../../bus/pci/drivers/{driver}")
        drm(host, directory, number, bdf)
    # a network card of the same maker, and a GPU that is passed to a virtual machine
    host.file("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x8086\n").file(
        "/sys/bus/pci/devices/0000:01:00.0/class", "0x020000\n"
    )
    host.file("/sys/bus/pci/devices/0000:02:00.0/vendor", "0x8086\n").file(
        "/sys/bus/pci/devices/0000:02:00.0/class", "0x030000\n"
    )
    return host.link("/sys/bus/pci/devices/0000:02:00.0/driver", "../../../bus/pci/drivers/vfio-pci")


def gaudi(count: int) -> Host:
    host = Host()
    for index in range(count):
        directory = f"/sys/bus/pci/drivers/habanalabs/0000:{0x19 + index:02x}:00.0"
        host.file(f"{directory}/accel/accel{index}/dev", f"261:{index}\n").file(
            f"{directory}/accel/accel_controlD{index}/dev", f"261:{64 + index}\n"
        )
        host.file(f"{directory}/device", "0x1020\n").file(f"{directory}/module_id", f"{7 - index}\n")
        host.file(f"{directory}/infiniband_verbs/uverbs{index}/dev", f"231:{192 + index}\n")
        host.node(f"/dev/accel/accel{index}", 261, index, 0o660, 105).node(
            f"/dev/accel/accel_controlD{index}", 261, 64 + index, 0o660, 105
        )
        host.node(f"/dev/infiniband/uverbs{index}", 231, 192 + index)
    return host


def npu() -> Host:
    directory = "/sys/bus/pci/drivers/intel_vpu/0000:00:0b.0"
    host = (
        Host()
        .file(f"{directory}/accel/accel0/dev", "261:0\n")
        .file(f"{directory}/device", "0x7d1d\n")
        .file(f"{directory}/module")
    )
    return host.node("/dev/accel/accel0", 261, 0, 0o660, 105)
