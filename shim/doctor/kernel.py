"""Checks of the kernel: control groups and the drivers of GPUs."""

from __future__ import annotations

from typing import Any

from shim.doctor.model import Check, HostReader, Subject, problem
from shim.gpu import vendors
from shim.host import cgroups

_DISPLAY = ("0x03", "0x12")  # PCI classes: display controller, processing accelerator


def control_groups(subject: Subject) -> Check:
    """Version, mount, and what may be written."""
    survey = subject.cgroups
    words = [survey.version + ("" if survey.version == "none" else f" at {survey.mount}")]
    words.append("in a container" if survey.nested else "on the host")
    words.append("writable" if (survey.own_writable if survey.nested else survey.root_writable) else "not writable")
    if survey.controllers:
        words.append(f"controllers {' '.join(survey.controllers)}")
    if survey.version == "v2":
        words.append(f"delegated {' '.join(survey.delegated) or 'none'}")
    return Check("cgroups", ", ".join(words), survey._asdict(), cgroups.remedy(survey, subject.account.rootless))


def drivers(subject: Subject) -> Check:
    """For each vendor: devices on the PCI bus, the driver, its device nodes."""
    host = subject.host
    by_vendor: dict[str, Any] = {}
    problems: list[dict[str, str]] = []
    cards = _cards(host)
    for vendor in vendors.with_gpus():
        loaded = [module for module in vendor.modules if host.exists(f"/sys/module/{module}")]
        nodes = [
            *vendor.control_nodes,
            *(directory for directory in vendors.node_directories(vendor) if directory != "/dev"),
        ]
        present = [node for node in nodes if host.exists(node)]
        on_bus = cards.count(vendor.pci)
        if not loaded and not on_bus:
            continue
        version = host.read(f"/sys/module/{vendor.modules[0]}/version").strip()
        by_vendor[vendor.name] = {"on_bus": on_bus, "modules": loaded, "nodes": present, "version": version}
        if not loaded and not vendor.integrated:
            problems.append(
                problem(f"{on_bus} devices of {vendor.name} are on the PCI bus, and no driver is loaded", vendor.load)
            )
        elif loaded and on_bus and len(present) < len(nodes) and not vendor.integrated:
            missing = ", ".join(node for node in nodes if node not in present)
            problems.append(problem(f"the driver of {vendor.name} is loaded, and {missing} is missing", vendor.load))
        elif loaded and vendor.kind not in subject.kinds and subject.config["gpu.fallback"] == "off":
            problems.append(
                problem(
                    f"no CDI file describes {vendor.kind}, and gpu.fallback is off",
                    'chandler cdi generate --output /etc/cdi/, or gpu.fallback = "devices"',
                )
            )
    words = [
        f"{name} {each['version']}".rstrip()
        + f" ({each['on_bus']} on the bus, {' '.join(each['modules']) or 'no driver'})"
        for name, each in by_vendor.items()
    ]
    return Check("gpu drivers", ", ".join(words) or "none", by_vendor, problems)


def _cards(host: HostReader) -> list[str]:
    """The PCI vendor of each device whose class may be that of a GPU or an accelerator."""
    devices = "/sys/bus/pci/devices"
    return [
        host.read(f"{devices}/{name}/vendor").strip()
        for name in host.names(devices)
        if host.read(f"{devices}/{name}/class").startswith(_DISPLAY)
    ]
