"""`chandler bundle`: whole OCI bundles from a service of a deployment file."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from typing import Any, Dict, List

from shim import paths
from shim.bundle import build, deployment, image
from shim.errors import BundleError, ChangedError, RequestError
from shim.host import cgroups
from shim.node import compiler
from shim.node.inventory import Place, Stale

_ID = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-+")


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
                help="an option of the runtime's, such as --runtime-arg=--root=DIR; may be given again",
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
    action.add_argument("--systemd-cgroup", action="store_true", help="control groups are made by systemd")
    action.add_argument("--cwd", metavar="DIR", default="", help="the working directory")
    action.add_argument("--debug", action="store_true", help="say what was left out or chosen")
    action.add_argument(
        "--args", nargs=argparse.REMAINDER, help="what to run instead of the image's and the service's command"
    )


def create(arguments: argparse.Namespace) -> int:
    """Exit status 0 when the bundle is there."""
    bundle = _bundle(arguments)
    build.create(bundle, _config(arguments, bundle, os.getpid()))
    return 0


def write_config(arguments: argparse.Namespace) -> int:
    """Exit status 0 when config.json is there."""
    bundle = _bundle(arguments)
    if not arguments.rootfs and not build.exists(os.path.join(bundle, "rootfs")):
        raise BundleError(f"{bundle} has no rootfs", "unpack it there first, or use `chandler bundle create`")
    build.write_config(bundle, _config(arguments, bundle, os.getpid()))
    return 0


def spec(arguments: argparse.Namespace) -> int:
    """Prints what create would write."""
    bundle = os.path.abspath(arguments.bundle or arguments.service or "container")
    print(json.dumps(_config(arguments, bundle, None), indent=2))
    return 0


def run_bundle(arguments: argparse.Namespace) -> int:
    """The exit status is the container's."""
    bundle = _bundle(arguments)
    if not arguments.rootfs:
        raise RequestError("run needs --rootfs", "a bundle with a root file system of its own is for write-config")
    if os.path.lexists(bundle):
        raise BundleError(f"{bundle} is there already", "run makes its bundle and removes it: name another directory")
    config = _config(arguments, bundle, os.getpid())
    build.create(bundle, config)
    try:
        options = [*arguments.runtime_arg, *(["--systemd-cgroup"] if arguments.systemd_cgroup else [])]
        return _wait([_runtime(), *options, "run", "--bundle", bundle, _id(arguments, bundle)])
    finally:
        build.remove(bundle)


def _wait(command: List[str]) -> int:
    """The exit status of a command that gets the signals that are meant for it."""
    with subprocess.Popen(command) as process:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, lambda which, _: process.send_signal(which))
        return process.wait()


def remove(arguments: argparse.Namespace) -> int:
    """Remove a bundle: its config.json and its directory, never a root file system elsewhere."""
    build.remove(arguments.bundle.rstrip("/"), arguments.all)
    return 0


def _bundle(arguments: argparse.Namespace) -> str:
    """BUNDLE, which may have come after the words of --args."""
    if arguments.bundle is None and arguments.args:
        arguments.bundle = arguments.args.pop()
    named: str = arguments.bundle or ""
    if not named:
        raise RequestError("no BUNDLE is named")
    return os.path.abspath(named)


def _id(arguments: argparse.Namespace, bundle: str) -> str:
    name: str = arguments.id or os.path.basename(bundle)
    if not name or set(name) - _ID or name in (".", ".."):
        raise RequestError(f"{name!r} is no container id", "give one with --id")
    return name


def _config(arguments: argparse.Namespace, bundle: str, move: Any) -> Dict[str, Any]:
    """The configuration; what is noteworthy goes to stderr."""
    place = Place(dict(os.environb))
    inventory = compiler.load(place)
    text = build.read(arguments.spec, deployment.MAX_FILE).decode("utf-8", "surrogateescape")
    service = deployment.service(text, arguments.spec, arguments.service)
    found = image.Image()
    if arguments.image_config:
        found = image.parse(build.read(arguments.image_config, image.MAX_IMAGE_CONFIG), arguments.image_config)
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
        built = build.build(service, found, options, inventory, place)
    except (Stale, ChangedError):  # it lost a part while we read it, or a device is another one by now
        built = build.build(service, found, options, compiler.refresh(place), place)
    for note in built.notes if arguments.debug else ():
        print(f"chandler: debug: {note}", file=sys.stderr)
    return built.config


def _pairs(option: str, words: List[str]) -> Dict[str, str]:
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals or "\0" in value:
            raise RequestError(f"{option} {word!r} is no NAME=VALUE")
        found[name] = value
    return found


def _runtime() -> str:
    """chandler-runtime, beside the hook program, or in a checkout."""
    program = os.path.join(os.path.dirname(paths.HOOK), "chandler-runtime")
    if os.access(program, os.X_OK):
        return program
    return os.path.join(
        os.path.dirname(os.path.dirname(os.path.realpath(paths.__file__))), "packaging/bin/chandler-runtime"
    )
