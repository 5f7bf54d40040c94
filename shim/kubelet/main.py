"""`chandler-kubelet-plugin`: tells the kubelet which GPUs this node has, so that the scheduler counts them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

from shim import paths, report
from shim.errors import ChandlerError, ConfigError

DIRECTORY = "/var/lib/kubelet/device-plugins"


def main() -> int:
    """The exit status: 0 after SIGTERM; 1 for an error, which is printed."""
    options = _options(sys.argv[1:])
    try:
        for module, package in (("google.protobuf", "protobuf"), ("grpc", "grpcio")):
            try:
                __import__(module)
            except ImportError:
                raise ConfigError(
                    f"the Python package {package} is not installed, so the kubelet cannot be told of any GPU",
                    f"install python3-{package}",
                ) from None
        _run(options)
    except ChandlerError as error:
        print(f"chandler-kubelet-plugin: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from shim.kubelet.service import Service
    from shim.node.inventory import Account

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    service = Service(
        Account(dict(os.environb)),
        options.directory,
        lambda line: report.log_of_service(service.inventory.config["log.file"], line),
    )
    service.run(stopped)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="chandler-kubelet-plugin",
        description="Tells the kubelet which GPUs this node has (a device plugin), so that the scheduler counts them.",
    )
    parser.add_argument(
        "--directory",
        default=DIRECTORY,
        help=f"the kubelet's directory of sockets of device plugins (default {DIRECTORY})",
    )
    parser.add_argument("--version", action="version", version=f"chandler-kubelet-plugin {paths.VERSION}")
    options = parser.parse_args(arguments)
    if not options.directory.startswith("/"):
        parser.error(f"--directory {options.directory} is not an absolute path")
    return options


if __name__ == "__main__":
    sys.exit(main())
