"""The vendors that Chandler knows, one entry each.  A new vendor is added only here.

Requests, the default of policy.kinds, the fallback without CDI files, `chandler cdi generate` and `chandler doctor` all
read this table.  Pure; part of the create path, so the table has the names of the generators and does not import them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import List, Optional, Tuple


class Vendor:
    """One entry of the table.

    `names`: its names in requests, in `cdi.generate` and for --vendor.  Chandler itself writes the first one.
    `kind`: the CDI kind of its devices.
    `generator`: the function that describes its devices, a key of shim.generate.generators.GENERATORS.
    `pci`: the PCI vendor as in sysfs.  It is compared because the name of a node in /dev/dri or /dev/accel does not
    show the vendor.
    `modules`: the kernel modules of its drivers; `load`: the command that loads them.
    `variables`: environment variables that list the visible devices by their number inside the container.
    `control_nodes`: without a CDI file, the device nodes that every container gets.
    `gpu_nodes`: without a CDI file, the device nodes of one GPU.  {0} is its number and {1} is 128 + its number.  Only
    `chandler cdi generate` knows a vendor without `gpu_nodes`: no request can name it, and policy.kinds does not allow
    its kind by default.
    `integrated`: whether nearly every machine has such a device, so that a missing driver is no problem.
    """

    __slots__ = (
        "names",
        "name",
        "kind",
        "generator",
        "pci",
        "modules",
        "load",
        "variables",
        "control_nodes",
        "gpu_nodes",
        "integrated",
    )

    def __init__(
        self,
        names: Tuple[str, ...],
        kind: str,
        generator: str,
        pci: str,
        modules: Tuple[str, ...],
        load: str,
        variables: Tuple[str, ...] = (),
        control_nodes: Tuple[str, ...] = (),
        gpu_nodes: Tuple[str, ...] = (),
        integrated: bool = False,
    ) -> None:
        self.names = names
        self.name = names[0]
        self.kind = kind
        self.generator = generator
        self.pci = pci
        self.modules = modules
        self.load = load
        self.variables = variables
        self.control_nodes = control_nodes
        self.gpu_nodes = gpu_nodes
        self.integrated = integrated


VENDORS = (
    Vendor(
        ("nvidia",),
        "nvidia.com/gpu",
        "nvidia",
        "0x10de",
        ("nvidia", "nvidia_uvm"),
        "nvidia-modprobe -u -c 0",
        variables=("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        control_nodes=("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools"),
        gpu_nodes=("/dev/nvidia{0}",),
    ),
    Vendor(
        ("amd",),
        "amd.com/gpu",
        "amd",
        "0x1002",
        ("amdgpu",),
        "modprobe amdgpu",
        variables=("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
        control_nodes=("/dev/kfd",),
        gpu_nodes=("/dev/dri/renderD{1}", "/dev/dri/card{0}"),
    ),
    Vendor(
        ("intel",),
        "intel.com/gpu",
        "drm",
        "0x8086",
        ("i915", "xe"),
        "modprobe -a i915 xe",
        variables=("ZE_AFFINITY_MASK",),
        gpu_nodes=("/dev/dri/renderD{1}", "/dev/dri/card{0}"),
        integrated=True,
    ),
    Vendor(
        ("gaudi", "habana"),
        "intel.com/gaudi",
        "accel",
        "0x1da3",
        ("habanalabs",),
        "modprobe habanalabs",
        gpu_nodes=("/dev/accel/accel{0}", "/dev/accel/accel_controlD{0}"),
    ),
    Vendor(("npu",), "intel.com/npu", "accel", "0x8086", ("intel_vpu",), "modprobe intel_vpu"),
)
NVIDIA = VENDORS[0]
DEFAULT = NVIDIA  # the vendor of a request that names none


def by_name(name: str) -> Optional[Vendor]:
    """The vendor with a name, or None."""
    for vendor in VENDORS:
        if name in vendor.names:
            return vendor
    return None


def of_kind(kind: str) -> Vendor:
    """The vendor of a CDI kind.  For a kind that is not in the table: an entry without nodes and variables."""
    for vendor in VENDORS:
        if vendor.kind == kind:
            return vendor
    return Vendor(("",), kind, "", "", (), "")


def with_gpus() -> List[Vendor]:
    """The vendors that a request can name."""
    return [vendor for vendor in VENDORS if vendor.gpu_nodes]


def node_directories(vendor: Vendor) -> List[str]:
    """The directories that hold the nodes of a vendor's GPUs, such as /dev/dri."""
    return list(dict.fromkeys(node.rpartition("/")[0] for node in vendor.gpu_nodes))


def all_names() -> List[str]:
    """Every name of every vendor."""
    return [name for vendor in VENDORS for name in vendor.names]
