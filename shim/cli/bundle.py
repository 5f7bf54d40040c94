"""`chandler bundle`: makes whole OCI bundles from a service of a deployment file."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from typing import Any

from shim import paths
from shim.bundle import build, deployment, image
from shim.errors import BundleError, ChangedError, RequestError
from shim.host import cgroups
from shim.node import compiler
from shim.node.inventory import Account, Stale
from shim.shapes import Document

# The characters of a container id.
_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-+")


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser("bundle", help="build a whole bundle from a deployment file", description=__doc__)
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, run, text in (
        ("create", create, "make the bundle"),
        ("spec", spec, "print config.json and change nothing"),
        ("write-config", write_config, "write config.json into a bundle that has a rootfs"),
        ("run", run_bundle, "make the bundle, run it with the configured runtime, remove it"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_options(action)
        if name == "run":
            action.add_argument(
                "--runtime-arg",
                metavar="WORD",
                action="append",
                default=[],
                help="an option of the runtime, such as --runtime-arg=--root=DIR; may be given again",
            )
        action.set_defaults(run=run)
    action = actions.add_parser(
        "remove", help="remove a bundle, never a root file system elsewhere", description=remove.__doc__
    )
    action.add_argument("bundle", metavar="BUNDLE")
    action.add_argument(
        "--all", action="store_true", help="also a root file system in the bundle itself, and any other file"
    )
    action.set_defaults(run=remove)


def _add_options(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "bundle", metavar="BUNDLE", nargs="?", help="the bundle's directory, before or after the --args"
    )
    action.add_argument("--spec", metavar="FILE", required=True, help="the deployment file")
    action.add_argument("--service", metavar="NAME", default="", help="one of its services (default: the only one)")
    action.add_argument(
        "--rootfs", metavar="DIR", default="", help="the root file system (default: rootfs in the bundle)"
    )
    action.add_argument(
        "--image-config", metavar="FILE", help="the image's configuration: entrypoint, cmd, environment, …"
    )
    action.add_argument(
        "--volume",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="where a volume lies on the host; NAME is a named volume's, an anonymous one's target, or s3://BUCKET/PREFIX",
    )
    action.add_argument("--env", metavar="K=V", action="append", default=[], help="a variable; wins over the service's")
    action.add_argument("--id", default="", help="the container (default: the name of BUNDLE)")
    action.add_argument("--hostname", default="")
    action.add_argument("--host-network", action="store_true", help="no network namespace of its own")
    action.add_argument("--systemd-cgroup", action="store_true", help="let systemd make the control groups")
    action.add_argument("--cwd", metavar="DIR", default="", help="the working directory")
    action.add_argument("--debug", action="store_true", help="print what was left out or chosen")
    action.add_argument(
        "--args", nargs=argparse.REMAINDER, help="what to run instead of the image's and the service's command"
    )


def create(arguments: argparse.Namespace) -> int:
    """Makes the bundle.  Returns exit status 0; raises ChandlerError."""
    bundle = _bundle(arguments)
    build.create(bundle, _config(arguments, bundle, os.getpid()))
    return 0


def write_config(arguments: argparse.Namespace) -> int:
    """Writes config.json into a bundle that has a rootfs.  Returns exit status 0; raises ChandlerError."""
    bundle = _bundle(arguments)
    if not arguments.rootfs and not build.exists(os.path.join(bundle, "rootfs")):
        raise BundleError(f"{bundle} has no rootfs", "unpack it there first, or use `chandler bundle create`")
    build.write_config(bundle, _config(arguments, bundle, os.getpid()))
    return 0


def spec(arguments: argparse.Namespace) -> int:
    """Prints the config.json that `create` would write."""
    bundle = os.path.abspath(arguments.bundle or arguments.service or "container")
    print(json.dumps(_config(arguments, bundle, None), indent=2))
    return 0


def run_bundle(arguments: argparse.Namespace) -> int:
    """Makes the bundle, runs it and removes it.  Returns the container's exit status."""
    bundle = _bundle(arguments)
    if not arguments.rootfs:
        raise RequestError(
            "run needs --rootfs", "for a bundle that has its own root file system, use `chandler bundle write-config`"
        )
    if os.path.lexists(bundle):
        raise BundleError(
            f"{bundle} exists already",
            "name a directory that does not exist: run makes its bundle and removes it afterwards",
        )
    config = _config(arguments, bundle, os.getpid())
    build.create(bundle, config)
    try:
        options = [*arguments.runtime_arg, *(["--systemd-cgroup"] if arguments.systemd_cgroup else [])]
        return _wait([_runtime(), *options, "run", "--bundle", bundle, _id(arguments, bundle)])
    finally:
        build.remove(bundle)


def _wait(command: list[str]) -> int:
    """Runs a command, passes it the signals that this process gets, and returns its exit status."""
    with subprocess.Popen(command) as process:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, lambda which, _: process.send_signal(which))
        return process.wait()


def remove(arguments: argparse.Namespace) -> int:
    """Remove a bundle: its config.json and its directory, never a root file system elsewhere."""
    build.remove(arguments.bundle.rstrip("/"), arguments.all)
    return 0


def _bundle(arguments: argparse.Namespace) -> str:
    """The bundle's absolute path.

    BUNDLE may stand after --args, where argparse has taken it for the last word of the container's command.
    """
    if arguments.bundle is None and arguments.args:
        arguments.bundle = arguments.args.pop()
    bundle: str = arguments.bundle or ""
    if not bundle:
        raise RequestError("BUNDLE is missing", "name the bundle's directory")
    return os.path.abspath(bundle)


def _id(arguments: argparse.Namespace, bundle: str) -> str:
    """The container's id: --id, else the name of the bundle's directory.  Raises RequestError."""
    name: str = arguments.id or os.path.basename(bundle)
    if not name or set(name) - _ID_CHARACTERS or name in (".", ".."):
        raise RequestError(f"{name!r} is not a container id", "choose one with --id NAME")
    return name


def _config(arguments: argparse.Namespace, bundle: str, move: Any) -> Document:
    """The content of config.json.  With --debug, notes about it go to standard error.

    `move`: the process that may be moved to make room for the container's control group, None for `spec`.
    """
    account = Account(dict(os.environb))
    inventory = compiler.load(account)
    text = build.read(arguments.spec, deployment.MAX_FILE).decode("utf-8", "surrogateescape")
    service = deployment.service(text, arguments.spec, arguments.service)
    image_config = image.Image()
    if arguments.image_config:
        image_config = image.parse(build.read(arguments.image_config, image.MAX_IMAGE_CONFIG), arguments.image_config)
    options = build.BuildOptions(
        id=_id(arguments, bundle),
        bundle=bundle,
        rootfs=arguments.rootfs,
        hostname=arguments.hostname,
        env=_pairs("--env", arguments.env),
        cwd=arguments.cwd,
        args=arguments.args,
        volumes=_pairs("--volume", arguments.volume),
        host_network=arguments.host_network,
        systemd=arguments.systemd_cgroup,
        cgroup_parent=os.environ.get(cgroups.VARIABLE, ""),
        move=move,
        hidden=move is None,
    )
    try:
        built = build.build(service, image_config, options, inventory, account)
    except (Stale, ChangedError):
        # the inventory lost a part while it was read, or a device has changed since it was compiled
        built = build.build(service, image_config, options, compiler.refresh(account), account)
    for note in built.notes if arguments.debug else ():
        print(f"chandler: debug: {note}", file=sys.stderr)
    return built.config


def _pairs(option: str, words: list[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals or "\0" in value:
            raise RequestError(f"{option} {word!r} does not have the form NAME=VALUE")
        pairs[name] = value
    return pairs


def _runtime() -> str:
    """The path of chandler-runtime: beside the hook program, else in the checkout that this module runs from."""
    program = os.path.join(os.path.dirname(paths.HOOK), "chandler-runtime")
    if os.access(program, os.X_OK):
        return program
    return os.path.join(
        os.path.dirname(os.path.dirname(os.path.realpath(paths.__file__))), "packaging/bin/chandler-runtime"
    )
