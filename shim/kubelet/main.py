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
REGISTRY = "/var/lib/kubelet/plugins_registry"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


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
    dra = None
    if options.dra:
        from shim.kubelet.api_server import ApiServer, node_name

        dra = ApiServer(os.environ, options.account), node_name(options.node), options.registry
    service = Service(
        Account(dict(os.environb)),
        options.directory,
        lambda line: report.log_of_service(service.inventory.config["log.file"], line),
        dra,
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
    parser.add_argument("--dra", action="store_true", help="also be a DRA driver, for pods with ResourceClaims")
    parser.add_argument("--node", default="", help="with --dra: the name of this node (default $NODE_NAME)")
    parser.add_argument(
        "--registry",
        metavar="DIRECTORY",
        default=REGISTRY,
        help=f"with --dra: where the kubelet looks for sockets of drivers (default {REGISTRY})",
    )
    parser.add_argument(
        "--account",
        metavar="DIRECTORY",
        default=ACCOUNT,
        help=f"with --dra: where the pod's token for the API server is (default {ACCOUNT})",
    )
    parser.add_argument("--version", action="version", version=f"chandler-kubelet-plugin {paths.VERSION}")
    options = parser.parse_args(arguments)
    for name in ("directory", "registry", "account"):
        path = getattr(options, name)
        if not path.startswith("/"):
            parser.error(f"--{name} {path} is not an absolute path")
    return options


if __name__ == "__main__":
    sys.exit(main())
