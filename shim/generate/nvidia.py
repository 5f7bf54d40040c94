"""Describes NVIDIA's GPUs and their MIG devices.  Pure: a function from the caller asks NVML.

Source: NVIDIA Container Toolkit, pkg/nvcdi; NVIDIA, "Multi-Instance GPU User Guide", "Device Nodes and Capabilities"
(/proc/driver/nvidia-caps).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from shim.errors import HostError
from shim.generate import nvfiles, nvmodes, nvproc, pci
from shim.generate.model import Description, Device, NvmlUnavailable, merged, node

if TYPE_CHECKING:
    from shim.generate.model import Block, Options
    from shim.generate.tree import HostTree
    from shim.gpu.vendors import Vendor
    from shim.shapes import Document

    Ask = Callable[[str], Document]
    Node = tuple[str, int, int, int, int]

_CAPS = "/dev/nvidia-caps/nvidia-cap"
# Control node: (its driver's names in /proc/devices, minor, whether containers can compute without it).
_CONTROLS = {
    "/dev/nvidia-modeset": (("nvidia-modeset",), 254, True),
    "/dev/nvidia-uvm-tools": (("nvidia-uvm",), 1, False),
    "/dev/nvidia-uvm": (("nvidia-uvm",), 0, False),
    "/dev/nvidiactl": (("nvidiactl", "nvidia", "nvidia-frontend"), 255, False),
}
_FRONTEND = ("nvidia", "nvidia-frontend")
_WATCH = ("/sys/module/nvidia", "/dev/nvidiactl", "/dev/nvidia-caps", "/dev/dxg")


def gpus(vendor: Vendor, tree: HostTree, options: Options, ask: Ask) -> Description:
    """Finds the devices of the chosen mode.  `ask` is nvml.ask, which raises NvmlUnavailable where there is no NVML.

    Raises HostError for a MIG device without its capability nodes, and where the chosen mode cannot work.
    """
    mode = options.mode if options.mode != "auto" else nvmodes.automatic(tree)
    if mode in nvmodes.MODES:
        return nvmodes.MODES[mode](tree, options)
    driver = nvfiles.driver(tree, options)
    notes: list[str] = []
    kernel = nvproc.kernel_version(tree)
    answer: Document | None = None
    if mode != "proc" and (mode == "nvml" or kernel):
        try:
            answer = ask(driver.library)
        except NvmlUnavailable as reason:
            if mode == "nvml":
                raise HostError(f"NVML cannot be asked: {reason}", "generate with --mode proc") from None
    by_proc = answer is None
    if answer is None:
        answer = nvproc.read(tree)
    if not answer["gpus"]:
        return Description(vendor.kind, [], notes=notes, watch=_WATCH)
    if not driver.directory:
        notes.append("the driver's libraries were not found; containers get only its device nodes")
    elif kernel and driver.version != kernel:
        notes.append(
            f"the kernel module is version {kernel} and the libraries are {driver.version}; "
            "reboot, or load the new module"
        )
    version = answer["driver"] or driver.version
    majors, params = nvproc.majors(tree), nvproc.params(tree)
    controls = _controls(tree, options, majors, params, notes)
    devices: list[Device] = []
    for gpu in answer["gpus"]:
        devices += _devices(tree, options, gpu, majors, params, notes)
    if by_proc and any(gpu["parts"] for gpu in answer["gpus"]):
        notes.append("without NVML, MIG devices are numbered in the order of their GPU instances and have no UUID")
    if not devices:
        notes.append("every GPU is in MIG mode and has no MIG device; make one with `nvidia-smi mig -cgi … -C`")
    watch = [*_WATCH, *(item["path"] for device in devices for item in device.edits["deviceNodes"])]
    watch += [f"/dev/nvidia{len(answer['gpus'])}"]  # the node of a GPU that is added later
    if driver.library:
        watch.append(driver.library)
    # CUDA forward compatibility is for data centre GPUs.  On others the newer library fails and the host's would work.
    compat = all(
        gpu["name"] and not any(word in gpu["name"] for word in ("GeForce", "TITAN")) for gpu in answer["gpus"]
    )
    common = merged(controls, nvfiles.common(tree, options, driver, compat))
    return Description(vendor.kind, devices, common, version, notes, dict.fromkeys(watch))


def _controls(
    tree: HostTree, options: Options, majors: dict[str, int], params: dict[str, str], notes: list[str]
) -> Block:
    blocks: list[Block] = []
    for path, (names, minor, optional) in _CONTROLS.items():
        block = node(tree, options, path, _expected_node(majors, params, names, minor))
        if block is not None:
            blocks.append(block)
        elif not optional:
            notes.append(f"{path} is missing and the kernel does not say its number; run `nvidia-modprobe -u -c 0`")
    return merged(*blocks)


def _expected_node(majors: dict[str, int], params: dict[str, str], names: tuple[str, ...], minor: int) -> Node | None:
    """What a missing node would be: the kernel's major, and the mode and group from the module's parameters."""
    major = next((majors[name] for name in names if name in majors), None)
    if major is None:
        return None
    mode = pci.natural_number(params.get("DeviceFileMode", ""))
    group = pci.natural_number(params.get("DeviceFileGID", ""))
    return "c", major, minor, mode & 0o777 if mode >= 0 else 0o666, group if 0 <= group < 1 << 32 else 0


def _devices(
    tree: HostTree,
    options: Options,
    gpu: Document,
    majors: dict[str, int],
    params: dict[str, str],
    notes: list[str],
) -> list[Device]:
    """The GPU as one device, or its MIG devices when MIG is on.  Raises HostError when the GPU's node is unknown."""
    index, bdf = gpu["index"], pci.address(gpu["bdf"])
    path = f"/dev/nvidia{gpu['minor']}"
    gpu_node = node(tree, options, path, _expected_node(majors, params, _FRONTEND, gpu["minor"]))
    if gpu_node is None:
        raise HostError(
            f"{path} of GPU {index} ({bdf}) is missing and the kernel does not say its number",
            f"run `nvidia-modprobe -c {gpu['minor']}`",
        )
    coherent = {"chandler.oci/coherent": "true"} if gpu["coherent"] else {}
    if not gpu["mig"]:
        screens, _ = pci.drm(tree, options, f"{pci.DEVICES}/{bdf}", bdf)
        names = {"index": str(index), "type-index": f"gpu{index}", "uuid": gpu["uuid"]}
        return [Device(names, merged(gpu_node, screens), f"{index} {gpu['uuid'] or '-'} {bdf}", coherent)]
    minors = _cap_minors(tree)
    mig_devices = []
    for part in gpu["parts"]:
        label = f"{index}:{part['index']}"
        folder = f"gpu{gpu['minor']}/gi{part['gi']}"
        caps = [
            _capability(tree, options, f"{folder}/{file}", label, minors, majors)
            for file in ("access", f"ci{part['ci']}/access")
        ]
        names = {"index": label, "type-index": f"mig{label}", "uuid": part["uuid"]}
        layout = f"{label} {part['uuid'] or '-'} {bdf} gi{part['gi']} ci{part['ci']}"
        mig_devices.append(Device(names, merged(gpu_node, *caps), layout, coherent))
    return mig_devices


def _cap_minors(tree: HostTree) -> dict[str, int]:
    """The minors of the MIG capabilities by name, such as gpu0/gi1/access."""
    pairs = (line.split() for line in tree.text("/proc/driver/nvidia-caps/mig-minors").split("\n"))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pci.natural_number(pair[1]) >= 0}


def _capability(
    tree: HostTree, options: Options, name: str, label: str, minors: dict[str, int], majors: dict[str, int]
) -> Block:
    """The node of one capability.  Raises HostError without it, since a MIG device needs both of its capabilities."""
    if name not in minors:
        raise HostError(
            f"MIG device {label} has no capability {name} in /proc/driver/nvidia-caps/mig-minors",
            "the driver and its kernel module do not match, or /proc is not the host's",
        )
    path = f"{_CAPS}{minors[name]}"
    block = node(tree, options, path)
    if block is None or (majors and majors.get("nvidia-caps") not in (None, block["deviceNodes"][0]["major"])):
        what = "is missing" if block is None else "does not have the major number of nvidia-caps"
        raise HostError(
            f"{path}, the capability {name} of MIG device {label}, {what}",
            f"run `nvidia-modprobe -f /proc/driver/nvidia/capabilities/{name.replace('/gi', '/mig/gi', 1)}`",
        )
    return block
