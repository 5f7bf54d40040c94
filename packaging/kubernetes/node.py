"""node.py install | cleanup | wait | nri | device-plugin: what the image does in a pod of its DaemonSets.

install lays Chandler out on the node whose root is mounted at --host, and makes it a runtime handler of containerd.
cleanup removes everything again, once no container needs it.  wait keeps a pod alive that has nothing left to do.
nri runs the NRI plugin, device-plugin the kubelet's.

On the node, PREFIX/versions has a directory for each version, with its own interpreter, and PREFIX/bin is a link to the
programs of the version in force.  The installer lays a version out and starts it once before it changes the link.  The
previous version stays for processes that were started from it.  When a step fails, everything is put back.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import glob
import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import time
import urllib.request
from typing import Any, Callable, NamedTuple, NoReturn

HOME = os.path.dirname(sys.prefix)  # the version's directory in this image
VERSION = os.path.basename(HOME)
sys.path.insert(0, f"{HOME}/lib/chandler")

from shim import errors  # noqa: E402
from shim.errors import ChandlerError  # noqa: E402
from shim.node import config  # noqa: E402

CONFIG = "/etc/chandler/config.d/50-kubernetes.toml"
STATE = "/run/chandler"
KEPT = "/var/lib/chandler"
# The directories in which containerd, of its own or in k3s, keeps the bundles of running containers.
TASKS = ("/run/containerd/io.containerd.runtime.v2.task", "/run/k3s/containerd/io.containerd.runtime.v2.task")
LABEL = "chandler.oci/runtime"
UNFINISHED = ".unfinished"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
# os-release ID: name, of systems to which no programs can be added.
CLOSED = {"talos": "Talos", "bottlerocket": "Bottlerocket"}
INSTEAD = "use the NRI DaemonSet, nri.yaml, which installs nothing on the node"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_IGNORE_CHROOT": "1"}
LIBC = ctypes.CDLL(None)
PAUSE = 2.0  # seconds between two looks at the containers that still run
PATIENCE = 300  # seconds for a command on the node, more than `chandler configure` waits for a restart
ANSWER = 30  # seconds for an answer of the API server


class Tree(NamedTuple):
    """The files of this version in the image for one prefix."""

    prefix: str
    source: int  # a descriptor of their directory, which stays open across chroot

    @property
    def home(self) -> str:
        return f"{self.prefix}/versions/{VERSION}"


def main() -> int:
    os.umask(0o022)
    options = _options(sys.argv[1:])
    try:
        status: int = options.run(options)
        return status
    except ChandlerError as error:
        print(f"chandler-node: {error}", file=sys.stderr)
    except OSError as error:
        print(f"chandler-node: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chandler-node", description=(__doc__ or "").partition("\n\n")[2])
    modes = parser.add_subparsers(required=True, metavar="install | cleanup | wait | nri | device-plugin")
    for name, run in (("install", _install), ("cleanup", _cleanup)):
        mode = modes.add_parser(name)
        mode.set_defaults(run=run)
        mode.add_argument("--host", default="/host", help="where the node's root is mounted")
        mode.add_argument(
            "--engine",
            choices=("containerd", "none"),
            default="containerd",
            help="whose handler it is; none: files alone",
        )
        mode.add_argument(
            "--engine-config", metavar="FILE", help="the engine's configuration, where it is not in its usual place"
        )
        mode.add_argument("--label", action="store_true", help=f"keep the label {LABEL} of node $NODE_NAME")
        mode.add_argument(
            "--no-restart", dest="restart", action="store_false", help="leave it to others to restart the engine"
        )
        if name == "install":
            mode.add_argument("--config", metavar="FILE", help=f"the nodes' policy, for {CONFIG}")
            mode.add_argument(
                "--runtime",
                action="append",
                default=[],
                choices=("runc", "youki", "crun"),
                help="also a handler with this runtime fixed",
            )
    modes.add_parser("wait").set_defaults(run=_wait)
    for name, run in (("nri", _nri), ("device-plugin", _device_plugin)):
        if arguments[:1] == [name]:
            return argparse.Namespace(run=run, arguments=arguments[1:])
    return parser.parse_args(arguments)


def _install(options: argparse.Namespace) -> int:
    trees = [
        Tree(prefix, os.open(f"{prefix}/versions/{VERSION}", os.O_RDONLY | os.O_DIRECTORY)) for prefix in _prefixes()
    ]
    policy: bytes | None = None
    if options.config:
        with open(options.config, "rb") as file:
            policy = file.read()
    config.compile_config([(CONFIG, policy or b"")])  # imports what the node's side needs, before chroot
    status = _on_node(options.host, lambda: _lay_out(trees, policy, options))
    if status == 0 and options.label:
        _set_label("ready")
    return status


def _cleanup(options: argparse.Namespace) -> int:
    if options.label:  # first, so that no more pods are scheduled here
        _set_label(None)
    prefixes = _prefixes()
    return _on_node(options.host, lambda: _take_away(prefixes, options))


def _wait(options: argparse.Namespace) -> int:
    ends = {signal.SIGTERM, signal.SIGINT}
    # sigwait takes only signals that wait.  Process 1 of a pod would lose one that is neither blocked nor handled.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    signal.sigwait(ends)
    return 0


def _nri(options: argparse.Namespace) -> int:
    sys.argv[1:] = options.arguments
    from shim.nri.main import main as plugin

    return plugin()


def _device_plugin(options: argparse.Namespace) -> int:
    sys.argv[1:] = options.arguments
    from shim.kubelet.main import main as plugin

    return plugin()


def _prefixes() -> list[str]:
    """The prefixes for which this image has files, the usual one first."""
    prefixes = [
        path.rpartition("/versions/")[0]
        for pattern in ("/*/chandler", "/home/*/*/chandler")
        for path in glob.glob(f"{pattern}/versions/{VERSION}")
    ]
    return sorted(prefixes, key=lambda prefix: prefix != HOME.rpartition("/versions/")[0])


# --- on the node ------------------------------------------------------------------------------------------------------


def _on_node(host: str, work: Callable[[], None]) -> int:
    """Does `work` in a child process whose root is the node's, so that paths and links mean what they mean there.

    Returns the child's exit status.  On SIGTERM the child stops and puts everything back.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGTERM, _stop_on_sigterm)
            os.chroot(host)
            os.chdir("/")
            sys.path.clear()  # import nothing from here on: the files would be the node's
            work()
            status = 0
        except ChandlerError as error:
            print(f"chandler-node: {error}", file=sys.stderr)
        except OSError as error:
            print(f"chandler-node: {error.filename or host}: {error.strerror}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _stop_on_sigterm(*_: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not end the code that puts things back
    raise errors.HostError("SIGTERM ended the installer before it was done", "the next pod starts again")


def _lay_out(trees: list[Tree], policy: bytes | None, options: argparse.Namespace) -> None:
    """Installs on the node, in its root.  Raises ChandlerError or OSError after undoing what it did."""
    system = _system()
    if system.get("ID") in CLOSED:
        raise errors.HostError(f"this node runs {_name(system)}, on which programs cannot be installed", INSTEAD)
    tree = _choose(trees, system)
    if policy is not None:
        _check_policy(policy)
    os.makedirs(f"{tree.prefix}/versions", exist_ok=True)
    with _locked(f"{tree.prefix}/versions"), contextlib.ExitStack() as undo:
        undo.callback(_remove_empty, f"{tree.prefix}/versions", tree.prefix)
        before = _target(f"{tree.prefix}/bin")
        _copy(tree, undo)
        if policy is not None:
            _write(CONFIG, policy, undo)
        _switch(tree, before, undo)
        if options.engine != "none":
            _configure(tree.prefix, not before, options, undo)
        _chandler(tree.prefix, "refresh", "--quiet")
        undo.pop_all()
        _prune(tree, before)
    print(f"chandler-node: {tree.home} is in force on {_name(system)}", flush=True)


def _system() -> dict[str, str]:
    """The variables of os-release(5); {} on a system without it."""
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            return {
                key: value.strip().strip("\"'")
                for key, equals, value in (line.partition("=") for line in file)
                if equals
            }
    return {}


def _name(system: dict[str, str]) -> str:
    return (
        system.get("PRETTY_NAME")
        or CLOSED.get(system.get("ID", ""), "")
        or system.get("ID")
        or "a system without os-release"
    )


def _choose(trees: list[Tree], system: dict[str, str]) -> Tree:
    """The first prefix that is writable and from which programs may run.  A prefix that is in use is tried first."""
    reasons = []
    for tree in sorted(trees, key=lambda tree: not os.path.islink(f"{tree.prefix}/bin")):
        existing = tree.prefix
        while not os.path.isdir(existing):
            existing = os.path.dirname(existing)
        flags = os.statvfs(existing).f_flag
        if flags & os.ST_RDONLY:
            reasons.append(f"{existing} is read-only")
        elif flags & os.ST_NOEXEC:
            reasons.append(f"{existing} is mounted noexec")
        elif not os.access(existing, os.W_OK):
            reasons.append(f"{existing} cannot be written")
        else:
            return tree
    raise errors.HostError(
        f"this node runs {_name(system)} and has no directory for programs: {', '.join(reasons)}", INSTEAD
    )


def _check_policy(policy: bytes) -> None:
    """Raises ConfigError when this policy is not valid together with the node's own configuration."""
    texts = {CONFIG: policy}
    for path in ("/etc/chandler/config.toml", *glob.glob(f"{os.path.dirname(CONFIG)}/*.toml")):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            texts.setdefault(path, file.read())
    # in the order in which Chandler reads them: config.toml, then config.d by name
    config.compile_config(
        sorted(texts.items(), key=lambda text: (text[0].startswith(os.path.dirname(CONFIG)), text[0]))
    )


@contextlib.contextmanager
def _locked(directory: str) -> Any:
    """Lets in one installer at a time.  During an update the new pod may start before the old one has ended."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _copy(tree: Tree, undo: contextlib.ExitStack) -> None:
    """Copies the version to its directory on the node, and checks that it starts there."""
    if not os.path.isdir(tree.home):
        unfinished = f"{tree.prefix}/versions/.{VERSION}.new"
        shutil.rmtree(unfinished, ignore_errors=True)  # an installer that was killed may have left it
        undo.callback(shutil.rmtree, unfinished, True)
        _copy_files(tree.source, unfinished)
        _sync(unfinished)  # or a power failure after the rename could leave empty files
        os.rename(unfinished, tree.home)
        undo.callback(shutil.rmtree, tree.home, True)
    _run(f"{tree.home}/bin/chandler", "--version")


def _sync(directory: str) -> None:
    """Syncs only the file system that a directory is on, since syncing another one may hang."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        LIBC.syncfs(descriptor)
    finally:
        os.close(descriptor)


def _copy_files(source: int, target: str) -> None:
    """Copies a directory tree from an open descriptor of the image."""
    for path, directories, names, descriptor in os.fwalk(".", dir_fd=source):
        directory = os.path.normpath(f"{target}/{path}")
        os.mkdir(directory, 0o755)
        for name in names + directories:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                os.symlink(os.readlink(name, dir_fd=descriptor), f"{directory}/{name}")
            elif stat.S_ISREG(status.st_mode):
                with (
                    open(os.open(name, os.O_RDONLY, dir_fd=descriptor), "rb") as source_file,
                    open(f"{directory}/{name}", "xb") as target_file,
                ):
                    shutil.copyfileobj(source_file, target_file)
                    os.fchmod(target_file.fileno(), 0o755 if status.st_mode & 0o100 else 0o644)


def _write(path: str, data: bytes, undo: contextlib.ExitStack) -> None:
    """Writes a file, and registers in `undo` how to put it back."""
    directory = os.path.dirname(path)
    missing = [each for each in (directory, os.path.dirname(directory)) if not os.path.isdir(each)]
    os.makedirs(directory, exist_ok=True)
    undo.callback(_remove_empty, *missing)
    try:
        with open(path, "rb") as file:
            former: bytes | None = file.read()
    except FileNotFoundError:
        former = None
    if data == former:
        return
    if former is None:
        undo.callback(_unlink, path)
    else:
        undo.callback(_replace, path, former)
    _replace(path, data)


def _replace(path: str, data: bytes) -> None:
    """Replaces a file in one step."""
    with open(f"{path}.new", "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o644)
        file.flush()
        os.fsync(file.fileno())  # or a power failure could leave an empty file
    os.rename(f"{path}.new", path)


def _switch(tree: Tree, before: str, undo: contextlib.ExitStack) -> None:
    undo.callback(_link, f"{tree.prefix}/bin", before)
    _link(f"{tree.prefix}/bin", f"versions/{VERSION}/bin")


def _link(path: str, target: str) -> None:
    """Makes a link lead to `target` in one step; removes it for ""."""
    if not target:
        _unlink(path)
    elif _target(path) != target:
        _unlink(f"{path}.new")
        os.symlink(target, f"{path}.new")
        os.rename(f"{path}.new", path)


def _target(path: str) -> str:
    """The target of a link; "" where the path does not exist."""
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def _prune(tree: Tree, before: str) -> None:
    """Removes all versions except the one in force and the previous one, whose launchers may still be starting."""
    kept = {VERSION, before.split("/")[1] if before else ""}
    for name in os.listdir(f"{tree.prefix}/versions"):
        if name not in kept:
            shutil.rmtree(f"{tree.prefix}/versions/{name}", ignore_errors=True)


def _engine_options(options: argparse.Namespace, restart: bool = True) -> list[str]:
    """The options of `chandler configure` that concern the engine."""
    return [
        *(["--config", options.engine_config] if options.engine_config else []),
        *(["--restart"] if options.restart and restart else []),
    ]


def _configure(prefix: str, first: bool, options: argparse.Namespace, undo: contextlib.ExitStack) -> None:
    """Writes the handlers into the engine's configuration, and restarts the engine when that has changed it.

    An installer that is killed in between leaves a mark.  Without the mark the next installer would find nothing to
    change, and would not restart the engine.
    """
    mark = f"{prefix}/versions/{UNFINISHED}"
    if os.path.exists(mark):
        _chandler(prefix, "configure", options.engine, "--remove", *_engine_options(options, restart=False))
    with open(mark, "wb"):
        pass
    if first:
        undo.callback(_unlink, mark)
        undo.callback(_take_back, prefix, options)
    _chandler(
        prefix,
        "configure",
        options.engine,
        *_engine_options(options),
        *(f"--runtime={each}" for each in options.runtime),
    )
    _unlink(mark)


def _take_back(prefix: str, options: argparse.Namespace) -> None:
    try:
        _chandler(prefix, "configure", options.engine, "--remove", *_engine_options(options))
    except ChandlerError as error:
        print(f"chandler-node: cannot undo the engine's configuration: {error}", file=sys.stderr)


def _chandler(prefix: str, *arguments: str) -> None:
    _run(f"{prefix}/bin/chandler", *arguments)


def _run(*command: str) -> None:
    """Runs a command on the node.  Raises HostError with its output when it fails."""
    try:
        done = subprocess.run(
            command,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
        )
    except OSError as error:
        raise errors.HostError(f"{command[0]} cannot be started on this node: {error.strerror}", INSTEAD) from None
    except subprocess.TimeoutExpired:
        raise errors.HostError(f"`{' '.join(command)}` did not end within {PATIENCE} seconds") from None
    if done.returncode:
        raise errors.HostError(f"`{' '.join(command)}` failed: {' '.join(done.stdout.split()) or done.returncode}")
    print(done.stdout, end="", flush=True)


# --- cleanup ----------------------------------------------------------------------------------------------------------


def _take_away(prefixes: list[str], options: argparse.Namespace) -> None:
    for prefix in prefixes:
        if not os.path.islink(f"{prefix}/bin"):
            continue
        _wait_for_containers(prefix)
        if options.engine != "none":
            _chandler(prefix, "configure", options.engine, "--remove", *_engine_options(options))
        _unlink(f"{prefix}/bin")
        shutil.rmtree(f"{prefix}/versions")
        _remove_empty(prefix)
        _unlink(CONFIG)
        _unlink("/etc/chandler/launch")
        shutil.rmtree("/etc/chandler/launch.d", ignore_errors=True)
        _remove_empty(os.path.dirname(CONFIG), "/etc/chandler")
        if not os.path.exists(f"{STATE}/nri"):  # the NRI plugin may still run
            shutil.rmtree(STATE, ignore_errors=True)
            shutil.rmtree(KEPT, ignore_errors=True)
        print(f"chandler-node: {prefix} is gone", flush=True)


def _wait_for_containers(prefix: str) -> None:
    """Waits until no container needs the prefix.

    The engine stops and deletes a container with the runtime that created it, which then runs its hooks.
    """
    reported: list[str] = []
    while True:
        users = _users(prefix)
        if not users:
            return
        if users != reported:
            print(
                f"chandler-node: {len(users)} containers still need {prefix}; "
                f"it goes when they have ended: {', '.join(users)}",
                flush=True,
            )
            reported = users
        time.sleep(PAUSE)


def _users(prefix: str) -> list[str]:
    """The ids of containers whose runtime is ours.  containerd's shim writes the runtime's path beside config.json."""
    ids = []
    for path in sorted(each for tasks in TASKS for each in glob.glob(f"{tasks}/*/*/runtime")):
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
            if file.read().startswith(f"{prefix}/bin/"):
                ids.append(path.split("/")[-2])
    return ids


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_empty(*directories: str) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            os.rmdir(directory)


# --- the node's label -------------------------------------------------------------------------------------------------


def _set_label(value: str | None) -> None:
    """Sets the node's label to `value`, or removes it for None.  Raises HostError."""
    name, server = os.environ.get("NODE_NAME"), os.environ.get("KUBERNETES_SERVICE_HOST")
    if not name or not server:
        raise errors.HostError(
            "--label needs NODE_NAME and KUBERNETES_SERVICE_HOST in the environment",
            "leave --label out, or see installer.yaml",
        )
    server = f"[{server}]" if ":" in server else server
    try:
        with open(f"{TOKEN}/token", encoding="ascii") as file:
            token = file.read().strip()
        trusted = ssl.create_default_context(cafile=f"{TOKEN}/ca.crt")
        request = urllib.request.Request(
            f"https://{server}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}/api/v1/nodes/{name}",
            method="PATCH",
            data=json.dumps({"metadata": {"labels": {LABEL: value}}}).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"},
        )
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)
        )
        opener.open(request, timeout=ANSWER).close()
    except OSError as error:
        raise errors.HostError(
            f"the label {LABEL} of node {name} cannot be set: {error}", "see ClusterRole chandler-node"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
