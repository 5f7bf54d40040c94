"""`chandler-nri`: the NRI plugin as a command."""

from __future__ import annotations

import argparse
import glob
import os
import sys

from shim import paths, report
from shim.errors import ChandlerError, ConfigError
from shim.node import compiler
from shim.node.inventory import Account, Inventory

SOCKET = "/var/run/nri/nri.sock"


def main() -> int:
    """The exit status: 0 after SIGTERM, or when the runtime that launched the plugin has ended the connection; 1 for an
    error, which is printed."""
    options = _options(sys.argv[1:])
    try:
        # protobuf is the only package that the plugin needs, so a missing one gets a sentence of its own.
        try:
            import google.protobuf  # noqa: F401
        except ImportError:
            raise ConfigError("the Python package protobuf is not installed", "install python3-protobuf") from None
        _run(options)
    except ChandlerError as error:
        print(f"chandler-nri: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from shim.nri import socket
    from shim.nri.plugin import Connection
    from shim.nri.service import Service

    account = Account(dict(os.environb))

    def load() -> Inventory:
        return compiler.compile_now(account)

    service = Service(
        account,
        load(),
        lambda line: report.log_of_service(service.inventory.config["log.file"], line),
        lambda: options.no_hooks or _hooks_rejected(),
    )
    given_socket = socket.inherited_socket(int(options.given)) if options.given else None
    socket.Loop(
        service,
        options.socket,
        given_socket,
        lambda: Connection(options.name, options.idx, service),
        load,
        lambda inventory: compiler.watched_names(account, inventory),
        options.metrics,
    ).run()


def _hooks_rejected() -> bool:
    """Whether containerd's configuration rejects the OCI hooks of NRI plugins.  Raises ConfigError."""
    from shim.configure import containerd

    return bool(containerd.config_rejecting_hooks(_text, lambda pattern: sorted(glob.glob(pattern))))


def _text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _options(arguments: list[str]) -> argparse.Namespace:
    environment = os.environ
    parser = argparse.ArgumentParser(
        prog="chandler-nri",
        description="Equips containers as their annotations ask, through containerd's or CRI-O's NRI.",
        epilog="Launched by the runtime itself, it takes name, index and socket from NRI_PLUGIN_NAME, "
        "NRI_PLUGIN_IDX and NRI_PLUGIN_SOCKET.",
    )
    parser.add_argument("--socket", metavar="PATH", default=SOCKET, help=f"the runtime's NRI socket (default {SOCKET})")
    parser.add_argument(
        "--name",
        default=environment.get("NRI_PLUGIN_NAME", "chandler"),
        help="name to register with (default chandler)",
    )
    parser.add_argument(
        "--idx",
        metavar="NN",
        default=environment.get("NRI_PLUGIN_IDX", "50"),
        help="two digits: plugins are called in this order (default 50)",
    )
    parser.add_argument(
        "--metrics", metavar="ADDRESS", default="", help="serve Prometheus metrics at unix:PATH or 127.0.0.1:PORT"
    )
    parser.add_argument(
        "--no-hooks",
        action="store_true",
        help="give containers no OCI hooks, for a runtime whose validator rejects them; found out where containerd's "
        "configuration can be read",
    )
    parser.add_argument("--version", action="version", version=f"chandler-nri {paths.VERSION}")
    options = parser.parse_args(arguments)
    options.given = environment.get("NRI_PLUGIN_SOCKET", "")
    if len(options.idx) != 2 or not options.idx.isdigit() or not options.idx.isascii():
        parser.error(f"--idx {options.idx}: an index is exactly two digits")
    if not options.name or "/" in options.name:
        parser.error("--name: a name has at least one letter and no slash")
    if options.given and not (options.given.isdigit() and options.given.isascii() and len(options.given) < 5):
        parser.error(f"NRI_PLUGIN_SOCKET={options.given} is no file descriptor")
    return options


if __name__ == "__main__":
    sys.exit(main())
