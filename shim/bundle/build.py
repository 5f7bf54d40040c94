"""Builds a bundle's config.json from a service of a deployment file, along the road that annotations take.

The file is the administrator's own, so the policy trusts it: every class of request is allowed (a `deny` of the policy
still wins).  Where the node keeps leases the GPUs are chosen when the container is created, by chandler-runtime, which
finds that part of the request as an annotation: a bundle that is only built holds no GPU.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Dict, List, Mapping, NamedTuple, Optional, Sequence

from shim import engine, jsontext, pathtext
from shim.bundle import base, deployment, image, rootless
from shim.edits import ANNOTATION, merge
from shim.errors import BundleError, RequestError
from shim.host import cgroups, files
from shim.host.secrets import HIDDEN, Hidden
from shim.node.inventory import Inventory, Place
from shim.oci import config_file
from shim.policy import classes
from shim.request import parse, schema
from shim.sharing import setup

if TYPE_CHECKING:
    from shim.edits import Edit
    from shim.policy.caller import Known
    from shim.shapes import Document

MAX_HOSTNAME = 64  # sethostname(2)


class BuildOptions(NamedTuple):
    """What the builder's caller says beside the deployment file; it wins over that."""

    id: str
    bundle: str = ""
    rootfs: str = ""
    hostname: str = ""
    env: Mapping[str, str] = {}
    cwd: str = ""
    args: Optional[Sequence[str]] = None
    volumes: Mapping[str, str] = {}
    host_network: bool = False
    systemd: bool = False
    cgroup_parent: str = ""  # of the environment
    move: Optional[int] = None  # the process that may be moved to make room for the container's group
    hidden: bool = False  # secrets and the host's variables are left out, since the result is shown


class Built(NamedTuple):
    """config.json, and what is worth a line to somebody who asks for it."""

    config: Document
    notes: List[str]


def build(
    service: deployment.DeployedService, found: image.Image, options: BuildOptions, inventory: Inventory, place: Place
) -> Built:
    """The configuration for a service; raises ChandlerError before anything is changed."""
    wish = _checked(service.document, service.source)
    notes = [f"{service.source}: left to an orchestrator: {', '.join(service.ignored)}"] if service.ignored else []
    command = wish.pop("command", {})
    host_network = bool(wish.pop("host_network", False)) or options.host_network
    said = _checked({"hostname": options.hostname}, "--hostname") if options.hostname else {}
    hostname = {"hostname": options.id, **wish, **said}["hostname"]
    wish.pop("hostname", None)
    if len(hostname) > MAX_HOSTNAME:
        raise RequestError(
            f"{service.source}: the hostname {hostname!r} has more than {MAX_HOSTNAME} characters",
            "give one with --hostname",
        )
    if "env" in wish:
        wish["env"] = {name: value for name, value in wish["env"].items() if name not in options.env}
    if found.user and "user" not in wish:
        wish.update(_checked({"user": found.user}, f"{service.source}: the image"))
    parent = wish.pop("cgroup_parent", "")
    process = base.Process(
        list(options.args) if options.args else image.command(command.get("entrypoint"), command.get("args"), found),
        [*found.env, *(f"{name}={value}" for name, value in options.env.items())],
        _directory(options.cwd or command.get("workdir", ""), found.workdir, service.source),
    )
    if not process.args[0]:
        raise RequestError(f"{service.source}: the name of the program to run is empty")
    here = node(place)
    config = base.config(
        process,
        hostname,
        root_path(options.rootfs),
        here,
        host_network,
        bool(wish.get("privileged")),
        not wish.get("capabilities"),
    )
    gpu = _take_gpu(wish, service.name)
    known: Known = {
        "id": options.id,
        "bundle": options.bundle,
        "volumes": volumes(options.volumes),
        "scope": service.deployment,
        "master": service.name,
        "built": True,
    }
    equip = _Equipment(trusting(inventory), place, service.source, known, options.hidden)
    config = equip.with_request(config, wish)
    if gpu and inventory.config["gpu.allocator"] == "leases":
        if wish.get("privileged"):
            raise RequestError(
                f"{service.source}: a privileged container can open every GPU, "
                "and this node leases each to one container",
                'leave privileged out, or set allocator = "fixed" in [gpu]',
            )
        equip.check(config, gpu)
        config["annotations"] = {f"{inventory.config['annotation-prefix']}service": jsontext.dumps(gpu).decode()}
        notes.append(f"{service.source}: GPUs are chosen when chandler-runtime creates the container")
    else:
        config = equip.with_request(config, gpu)
    _check_ids(config, here, service.source)
    placed = cgroups.place(
        options.id,
        parent,
        options.cgroup_parent,
        options.systemd,
        place.rootless,
        options.move,
        needed=cgroups.controllers(config["linux"].get("resources") or {}),
    )
    if placed.path:
        config["linux"]["cgroupsPath"] = placed.path
    return Built(config, notes + placed.notes)


def _check_ids(config: Document, here: base.Node, source: str) -> None:
    """Raises RequestError for a user or a group that the container's user namespace does not have."""
    user = config["process"]["user"]
    wanted = [
        ("uid", user["uid"], here.uids),
        *(("gid", gid, here.gids) for gid in (user["gid"], *user.get("additionalGids", ()))),
    ]
    for word, number, ids in wanted:
        if ids is not None and number not in ids:
            raise RequestError(
                f"{source}: user: {word} {number} is not among the ids that the caller has for containers",
                f"give him a range in /etc/sub{word}, or run as another user",
            )


def _take_gpu(wish: Document, master: str) -> Document:
    """The part of a request that is about GPUs, taken out of it: it comes last, or when the container is created."""
    if "gpu" not in wish.get("resources", {}):
        return {}
    resources = wish["resources"] = dict(wish["resources"])
    gpu = dict(resources.pop("gpu"))
    if "distributed" in gpu:
        gpu["distributed"] = {"master_addr": master, **gpu["distributed"]}
    if not resources:
        del wish["resources"]
    return {"resources": {"gpu": gpu}}


class _Equipment(NamedTuple):
    """What edits are made with; `hidden`: values that are nobody's to see are left out."""

    inventory: Inventory
    place: Place
    source: str
    known: Known
    hidden: bool

    def check(self, config: Document, wish: Document) -> None:
        """Whether this node has the devices that a request is for, whoever holds them.  Raises ChandlerError."""
        engine.plan(config, self.inventory, held=[], wish=parse.Request(wish, self.source), known=self.known)

    def with_request(self, config: Document, wish: Document) -> Document:
        """A configuration with what a request asks for."""
        if not wish:
            return config
        made = engine.plan(config, self.inventory, wish=parse.Request(wish, self.source), known=self.known)
        assert made is not None  # since there is a request
        edits = made.edits
        if made.sharing is not None:
            edits = merge(
                edits, setup.begin(made.sharing, self.place.trusted_state_dir(self.inventory.config["state-dir"]))
            )
        kept: List[Edit] = []
        for edit in edits.items:
            if edit[0] == ANNOTATION:
                continue  # our own mark, which a create would take for a forgery
            kept.append((*edit[:2], HIDDEN, edit[3]) if self.hidden and isinstance(edit[2], Hidden) else edit)
        return engine.equip(config, edits.with_values(kept), self.place.rootless, self.known["bundle"])


def volumes(given: Mapping[str, str]) -> Dict[str, str]:
    """Directories by the names that storage has for them.  An anonymous volume is named by its target, `/app/cache`,
    and a bucket as `s3://bucket/prefix`.  Raises RequestError."""
    found = {}
    for name, path in given.items():
        if not path.startswith("/"):
            raise RequestError(f"the volume {name!r} is to be in {path!r}, which is no absolute path")
        if name.startswith("/"):
            name = classes.volume({"type": "anonymous", "target": name})
        elif name.startswith("s3://"):
            bucket, _, prefix = name[len("s3://") :].partition("/")
            name = classes.volume({"type": "s3", "bucket": bucket, "prefix": prefix})
        found[name] = path
    return found


def trusting(inventory: Inventory) -> Inventory:
    """The same devices under a policy that trusts its caller."""
    trusted = copy.copy(inventory)
    trusted.config = {**inventory.config, "policy.trust": "all", "policy.rule": []}
    return trusted


def _checked(document: Document, source: str) -> Document:
    """A request document in normal form.  Raises RequestError with its source."""
    try:
        return schema.check(document)
    except RequestError as error:
        raise error.within(source) from None


def _directory(own: str, of_image: str, source: str) -> str:
    """A working directory; an image's may lack its slash.  None is below /proc, where descriptors of the host may be
    open (CVE-2024-21626)."""
    path = own or pathtext.clean("/" + of_image)
    where = source if own else f"{source}: the image"
    return str(_checked({"command": {"workdir": path}}, where)["command"]["workdir"])


def node(place: Place) -> base.Node:
    """This host, as far as a container's configuration depends on it."""
    unified = cgroups.survey().version == "v2"
    if not place.rootless:
        return base.Node(unified)
    if place.euid == 0:  # in somebody's user namespace already, which will be the container's
        uids, gids = (rootless.Ids(rootless.of_map(rootless.read(f"/proc/self/{word}_map"))) for word in ("uid", "gid"))
        return base.Node(unified, True, uids=uids, gids=gids)
    names = owners(place.euid)
    own = rootless.mappings(place.euid, rootless.ranges(rootless.read("/etc/subuid"), names))
    groups = rootless.mappings(os.getegid(), rootless.ranges(rootless.read("/etc/subgid"), names))
    return base.Node(unified, True, own, groups, rootless.Ids(own), rootless.Ids(groups))


def owners(uid: int) -> List[str]:
    """The words by which /etc/subuid may mean a user: his number, and his name if he has one."""
    import pwd

    try:
        return [str(uid), pwd.getpwuid(uid).pw_name]
    except KeyError:
        return [str(uid)]


# --- the bundle on disk -----------------------------------------------------------------------------------------


def write_config(bundle: str, config: Document) -> None:
    """config.json in a bundle that is there; it may hold secrets.  Raises BundleError or OSError."""
    if not os.path.isdir(bundle):
        raise BundleError(f"{bundle} is not there", "make it and its rootfs first, or use `chandler bundle create`")
    for left in _ours(bundle):
        os.unlink(left)  # it belongs to the config.json that now goes
    path = os.path.join(bundle, "config.json")
    data = jsontext.dumps(config) + b"\n"
    files.replace(path, data, 0o600)
    if "annotations" in config:  # a request that chandler-runtime is to know for ours
        os.symlink(files.digest(data), path + config_file.BUILT)


def create(bundle: str, config: Document) -> None:
    """The bundle's directory with config.json; an empty rootfs in it when the configuration names no other."""
    os.makedirs(bundle, mode=0o711, exist_ok=True)
    if config["root"]["path"] == base.ROOTFS:
        os.makedirs(os.path.join(bundle, base.ROOTFS), exist_ok=True)
    write_config(bundle, config)


def root_path(rootfs: str) -> str:
    """A root file system as config.json names it: runc takes no link and no path through one.  Raises BundleError."""
    if not rootfs:
        return base.ROOTFS
    if not os.path.isdir(rootfs):
        raise BundleError(f"the root file system {rootfs} is not a directory")
    return os.path.realpath(rootfs)


def remove(bundle: str, everything: bool = False) -> None:
    """The bundle, but never a root file system elsewhere.  A bundle that is not there is fine.

    A root file system that lies in the bundle itself, and files that are not ours, go only with `everything`.
    Raises BundleError for a directory that is no bundle.
    """
    if not os.path.lexists(bundle):
        return
    if os.path.islink(bundle) or not os.path.isdir(bundle):
        raise BundleError(f"{bundle} is no directory")
    names = set(os.listdir(bundle))
    if names and not names & {"config.json", base.ROOTFS}:
        raise BundleError(f"{bundle} is no bundle: it has neither config.json nor {base.ROOTFS}")
    if everything:
        import shutil

        shutil.rmtree(bundle)
        return
    inside = os.path.join(bundle, base.ROOTFS)
    link = os.path.islink(inside)
    others = names - {base.ROOTFS, "config.json", *map(os.path.basename, _ours(bundle))}
    if not link and os.path.isdir(inside) and os.listdir(inside):
        others.add(base.ROOTFS)
    if others:
        raise BundleError(
            f"{bundle} holds {', '.join(sorted(others))}, too", "`chandler bundle remove --all` removes that as well"
        )
    if link:
        os.unlink(inside)
    elif base.ROOTFS in names:
        os.rmdir(inside)
    for path in _ours(bundle):
        os.unlink(path)
    if "config.json" in names:
        os.unlink(os.path.join(bundle, "config.json"))
    os.rmdir(bundle)


def _ours(bundle: str) -> List[str]:
    """What Chandler has put beside config.json."""
    return [os.path.join(bundle, name) for name in os.listdir(bundle) if name.startswith("config.json.chandler-")]


def read(path: str, limit: int) -> bytes:
    """A file that the caller names.  Raises OSError or HostError."""
    return files.read(path, limit, follow=True)[0]


def exists(path: str) -> bool:
    """Whether there is something at `path`."""
    return files.exists(path)
