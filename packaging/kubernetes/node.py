"""node.py install | cleanup | wait | nri: what the image does in a pod of its DaemonSets.

install lays Chandler out on the node that is mounted at --host and gives it to containerd as a runtime handler; cleanup
takes everything away again, once no container needs it; wait holds a pod that has nothing left to do; nri is the plugin.

On the node, PREFIX/versions holds a directory for each version, with an interpreter of its own, and PREFIX/bin is a link
to the programs of the one in force.  A version is laid out, and started once, before the link is changed; the version
before stays, for what was started from it.  Whatever fails puts back what was changed.
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
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Optional

HOME = os.path.dirname(sys.prefix)  # the version's directory in this image
VERSION = os.path.basename(HOME)
sys.path.insert(0, f"{HOME}/lib/chandler")

from shim import errors  # noqa: E402
from shim.errors import ChandlerError  # noqa: E402
from shim.node import config  # noqa: E402

CONFIG = "/etc/chandler/config.d/50-kubernetes.toml"
STATE = "/run/chandler"
# Where containerd, and k3s's, keep the bundles of what runs.
TASKS = ("/run/containerd/io.containerd.runtime.v2.task", "/run/k3s/containerd/io.containerd.runtime.v2.task")
LABEL = "chandler.oci/runtime"
UNFINISHED = ".unfinished"
TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
# Systems that are made so that nobody adds programs to them.
CLOSED = {"talos": "Talos", "bottlerocket": "Bottlerocket"}
INSTEAD = "use the NRI DaemonSet, nri.yaml, which puts nothing on the node"
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_IGNORE_CHROOT": "1"}
LIBC = ctypes.CDLL(None)
PAUSE = 2.0  # seconds between two looks at what still runs
PATIENCE = 300  # seconds for a step on the node, more than `chandler configure` has for a restart
ANSWER = 30  # seconds for the API server


class Tree(NamedTuple):
    """This version as the image has it for one prefix."""

    prefix: str
    source: int  # a descriptor of its directory

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


def _options(arguments: List[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chandler-node", description=(__doc__ or "").partition("\n\n")[2])
    modes = parser.add_subparsers(required=True, metavar="install | cleanup | wait | nri")
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
    if arguments[:1] == ["nri"]:
        return argparse.Namespace(run=_nri, arguments=arguments[1:])
    return parser.parse_args(arguments)


def _install(options: argparse.Namespace) -> int:
    trees = [
        Tree(prefix, os.open(f"{prefix}/versions/{VERSION}", os.O_RDONLY | os.O_DIRECTORY)) for prefix in _prefixes()
    ]
    policy: Optional[bytes] = None
    if options.config:
        with open(options.config, "rb") as file:
            policy = file.read()
    config.compile_config([(CONFIG, policy or b"")])  # what it imports is needed on the node
    status = _on_node(options.host, lambda: _lay_out(trees, policy, options))
    if status == 0 and options.label:
        _set_label("ready")
    return status


def _cleanup(options: argparse.Namespace) -> int:
    if options.label:  # before all else, so that no more pods come
        _set_label(None)
    prefixes = _prefixes()
    return _on_node(options.host, lambda: _take_away(prefixes, options))


def _wait(options: argparse.Namespace) -> int:
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    return 0


def _nri(options: argparse.Namespace) -> int:
    sys.argv[1:] = options.arguments
    from shim.nri.main import main as plugin

    return plugin()


def _prefixes() -> List[str]:
    """The directories that this image has a tree for, the usual one first."""
    found = [
        path.rpartition("/versions/")[0]
        for pattern in ("/*/chandler", "/home/*/*/chandler")
        for path in glob.glob(f"{pattern}/versions/{VERSION}")
    ]
    return sorted(found, key=lambda prefix: prefix != HOME.rpartition("/versions/")[0])


# --- on the node ------------------------------------------------------------------------------------------------------


def _on_node(host: str, work: Callable[[], None]) -> int:
    """Does `work` in a process whose root is the node's, so that every path and link means what it means there.  The
    exit status; a SIGTERM to us ends it in order."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGTERM, _ended)
            os.chroot(host)
            os.chdir("/")
            sys.path.clear()  # from here on nothing is imported: these would be the node's files
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


def _ended(*_: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what puts things back is not to be ended, too
    raise errors.HostError("ended by SIGTERM before it was done", "the next pod starts anew")


def _lay_out(trees: List[Tree], policy: Optional[bytes], options: argparse.Namespace) -> None:
    system = _system()
    if system.get("ID") in CLOSED:
        raise errors.HostError(f"this node runs {_name(system)}, on which programs cannot be installed", INSTEAD)
    tree = _place(trees, system)
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


def _system() -> Dict[str, str]:
    """What os-release(5) says."""
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            return {
                key: value.strip().strip("\"'")
                for key, equals, value in (line.partition("=") for line in file)
                if equals
            }
    return {}


def _name(system: Dict[str, str]) -> str:
    return (
        system.get("PRETTY_NAME")
        or CLOSED.get(system.get("ID", ""), "")
        or system.get("ID")
        or "a system without os-release"
    )


def _place(trees: List[Tree], system: Dict[str, str]) -> Tree:
    """The first prefix that can be written and from which programs may run; one that is in use stays it."""
    why = []
    for tree in sorted(trees, key=lambda tree: not os.path.islink(f"{tree.prefix}/bin")):
        there = tree.prefix
        while not os.path.isdir(there):
            there = os.path.dirname(there)
        flags = os.statvfs(there).f_flag
        if flags & os.ST_RDONLY:
            why.append(f"{there} is read-only")
        elif flags & os.ST_NOEXEC:
            why.append(f"{there} is mounted noexec")
        elif not os.access(there, os.W_OK):
            why.append(f"{there} cannot be written")
        else:
            return tree
    raise errors.HostError(f"this node runs {_name(system)} and has no place for programs: {', '.join(why)}", INSTEAD)


def _check_policy(policy: bytes) -> None:
    """Raises ConfigError when the node's own texts and this one do not make a configuration."""
    texts = {CONFIG: policy}
    for path in ("/etc/chandler/config.toml", *glob.glob(f"{os.path.dirname(CONFIG)}/*.toml")):
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            texts.setdefault(path, file.read())
    # config.toml, then the others by name, as they are read
    config.compile_config(
        sorted(texts.items(), key=lambda text: (text[0].startswith(os.path.dirname(CONFIG)), text[0]))
    )


@contextlib.contextmanager
def _locked(directory: str) -> Any:
    """One installer at a time; the pod of an update may come before the old one's end."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _copy(tree: Tree, undo: contextlib.ExitStack) -> None:
    """The tree at its place, whole, and able to start there."""
    if not os.path.isdir(tree.home):
        made = f"{tree.prefix}/versions/.{VERSION}.new"
        shutil.rmtree(made, ignore_errors=True)  # of an installer that was killed
        undo.callback(shutil.rmtree, made, True)
        _copy_files(tree.source, made)
        _sync(made)  # a power cut after the rename must not leave empty files
        os.rename(made, tree.home)
        undo.callback(shutil.rmtree, tree.home, True)
    _run(f"{tree.home}/bin/chandler", "--version")


def _sync(directory: str) -> None:
    """Writes out the file system that a directory is on, and no other, which may hang."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        LIBC.syncfs(descriptor)
    finally:
        os.close(descriptor)


def _copy_files(source: int, target: str) -> None:
    for path, directories, names, descriptor in os.fwalk(".", dir_fd=source):
        at = os.path.normpath(f"{target}/{path}")
        os.mkdir(at, 0o755)
        for name in names + directories:
            found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                os.symlink(os.readlink(name, dir_fd=descriptor), f"{at}/{name}")
            elif stat.S_ISREG(found.st_mode):
                with (
                    open(os.open(name, os.O_RDONLY, dir_fd=descriptor), "rb") as one,
                    open(f"{at}/{name}", "xb") as other,
                ):
                    shutil.copyfileobj(one, other)
                    os.fchmod(other.fileno(), 0o755 if found.st_mode & 0o100 else 0o644)


def _write(path: str, data: bytes, undo: contextlib.ExitStack) -> None:
    directory = os.path.dirname(path)
    missing = [each for each in (directory, os.path.dirname(directory)) if not os.path.isdir(each)]
    os.makedirs(directory, exist_ok=True)
    undo.callback(_remove_empty, *missing)
    try:
        with open(path, "rb") as file:
            before: Optional[bytes] = file.read()
    except FileNotFoundError:
        before = None
    if data == before:
        return
    if before is None:
        undo.callback(_unlink, path)
    else:
        undo.callback(_replace, path, before)
    _replace(path, data)


def _replace(path: str, data: bytes) -> None:
    with open(f"{path}.new", "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o644)
        file.flush()
        os.fsync(file.fileno())  # or a power failure leaves the name without the text
    os.rename(f"{path}.new", path)


def _switch(tree: Tree, before: str, undo: contextlib.ExitStack) -> None:
    undo.callback(_link, f"{tree.prefix}/bin", before)
    _link(f"{tree.prefix}/bin", f"versions/{VERSION}/bin")


def _link(path: str, target: str) -> None:
    if not target:
        _unlink(path)
    elif _target(path) != target:
        _unlink(f"{path}.new")
        os.symlink(target, f"{path}.new")
        os.rename(f"{path}.new", path)


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def _prune(tree: Tree, before: str) -> None:
    """All versions go but the one in force and the one before, whose launchers may still be on their way."""
    kept = {VERSION, before.split("/")[1] if before else ""}
    for name in os.listdir(f"{tree.prefix}/versions"):
        if name not in kept:
            shutil.rmtree(f"{tree.prefix}/versions/{name}", ignore_errors=True)


def _engine(options: argparse.Namespace, restart: bool = True) -> List[str]:
    """Options of `chandler configure`."""
    return [
        *(["--config", options.engine_config] if options.engine_config else []),
        *(["--restart"] if options.restart and restart else []),
    ]


def _configure(prefix: str, first: bool, options: argparse.Namespace, undo: contextlib.ExitStack) -> None:
    """The handlers in the engine's configuration, and the engine restarted when that has changed.  An installer that was
    killed in between leaves a mark, without which the next one would find nothing to change and not restart it."""
    mark = f"{prefix}/versions/{UNFINISHED}"
    if os.path.exists(mark):
        _chandler(prefix, "configure", options.engine, "--remove", *_engine(options, restart=False))
    with open(mark, "wb"):
        pass
    if first:
        undo.callback(_unlink, mark)
        undo.callback(_take_back, prefix, options)
    _chandler(
        prefix, "configure", options.engine, *_engine(options), *(f"--runtime={each}" for each in options.runtime)
    )
    _unlink(mark)


def _take_back(prefix: str, options: argparse.Namespace) -> None:
    try:
        _chandler(prefix, "configure", options.engine, "--remove", *_engine(options))
    except ChandlerError as error:
        print(f"chandler-node: and back again: {error}", file=sys.stderr)


def _chandler(prefix: str, *arguments: str) -> None:
    _run(f"{prefix}/bin/chandler", *arguments)


def _run(*command: str) -> None:
    """A command on the node.  Raises HostError with what it says when it fails."""
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


# --- and off it again -------------------------------------------------------------------------------------------------


def _take_away(prefixes: List[str], options: argparse.Namespace) -> None:
    for prefix in prefixes:
        if not os.path.islink(f"{prefix}/bin"):
            continue
        _wait_for_containers(prefix)
        if options.engine != "none":
            _chandler(prefix, "configure", options.engine, "--remove", *_engine(options))
        _unlink(f"{prefix}/bin")
        shutil.rmtree(f"{prefix}/versions")
        _remove_empty(prefix)
        _unlink(CONFIG)
        _unlink("/etc/chandler/launch")
        shutil.rmtree("/etc/chandler/launch.d", ignore_errors=True)
        _remove_empty(os.path.dirname(CONFIG), "/etc/chandler")
        if not os.path.exists(f"{STATE}/nri"):  # the NRI plugin may still be at work
            shutil.rmtree(STATE, ignore_errors=True)
        print(f"chandler-node: {prefix} is gone", flush=True)


def _wait_for_containers(prefix: str) -> None:
    """Containers are stopped and deleted through the runtime that made them, and then run its hooks."""
    told: List[str] = []
    while True:
        users = _users(prefix)
        if not users:
            return
        if users != told:
            print(
                f"chandler-node: {len(users)} containers still need {prefix}; it goes when they have ended: {', '.join(users)}",
                flush=True,
            )
            told = users
        time.sleep(PAUSE)


def _users(prefix: str) -> List[str]:
    """The ids of containers whose runtime is ours.  containerd's shim leaves its path beside config.json."""
    found = []
    for path in sorted(each for tasks in TASKS for each in glob.glob(f"{tasks}/*/*/runtime")):
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
            if file.read().startswith(f"{prefix}/bin/"):
                found.append(path.split("/")[-2])
    return found


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_empty(*directories: str) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):
            os.rmdir(directory)


# --- the node's label -------------------------------------------------------------------------------------------------


def _set_label(value: Optional[str]) -> None:
    """`value` as the node's label, None for none.  Raises HostError."""
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
