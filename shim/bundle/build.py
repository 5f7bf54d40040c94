"""Builds a bundle's config.json from a service of a deployment file, with the same steps as a request in annotations.

The deployment file belongs to the administrator, so the policy allows every class of request; its `deny` still counts.
On a node that keeps leases, a bundle that is only built must not hold GPUs.  So the GPU part of the request goes into
config.json as an annotation, and chandler-runtime chooses the GPUs when it creates the container.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from shim import engine, jsontext, pathtext
from shim.bundle import base, deployment, image, rootless
from shim.edits import ANNOTATION, merge
from shim.errors import BundleError, RequestError
from shim.host import cgroups, files
from shim.host.secrets import HIDDEN, Hidden
from shim.keys import storage
from shim.node.inventory import Account, Inventory
from shim.oci import config_file
from shim.request import parse, schema
from shim.sharing import setup

if TYPE_CHECKING:
    from shim.edits import Edit
    from shim.policy.caller import CallFacts
    from shim.shapes import Document
    from shim.sharing.terms import Sharing

MAX_HOSTNAME = 64  # sethostname(2)


class BuildOptions(NamedTuple):
    """The caller's settings.  They win over those of the deployment file.

    `args`: the command line, in place of the image's and the service's; None to keep that.
    `volumes`: for each volume, its directory on the host; see `volumes` below for the names.
    `cgroup_parent`: the parent control group that the environment names.
    `move`: the process that may be moved to make room for the container's control group; see choose_group of
    shim.host.cgroups.
    `hidden`: leave out secrets and variables of the host, because the result is printed.
    """

    id: str
    bundle: str = ""
    rootfs: str = ""
    hostname: str = ""
    env: Mapping[str, str] = {}
    cwd: str = ""
    args: Sequence[str] | None = None
    volumes: Mapping[str, str] = {}
    host_network: bool = False
    systemd: bool = False
    cgroup_parent: str = ""
    move: int | None = None
    hidden: bool = False


class Built(NamedTuple):
    """The result: config.json, and notes for --debug, one sentence each."""

    config: Document
    notes: list[str]


def build(
    service: deployment.DeployedService,
    image_config: image.Image,
    options: BuildOptions,
    inventory: Inventory,
    account: Account,
) -> Built:
    """Makes the config.json for a service.  Raises ChandlerError before anything on the host is changed.

    `image_config`: the image's configuration.  `account`: the caller and the paths of this node.
    """
    request = _checked(service.document, service.source)
    notes = [f"{service.source}: left to an orchestrator: {', '.join(service.ignored)}"] if service.ignored else []
    command = request.pop("command", {})
    host_network = bool(request.pop("host_network", False)) or options.host_network
    from_option = _checked({"hostname": options.hostname}, "--hostname") if options.hostname else {}
    hostname = {"hostname": options.id, **request, **from_option}["hostname"]
    request.pop("hostname", None)
    if len(hostname) > MAX_HOSTNAME:
        raise RequestError(
            f"{service.source}: the hostname {hostname!r} has more than {MAX_HOSTNAME} characters",
            "give one with --hostname",
        )
    if "env" in request:
        request["env"] = {name: value for name, value in request["env"].items() if name not in options.env}
    if image_config.user and "user" not in request:
        request.update(_checked({"user": image_config.user}, f"{service.source}: the image"))
    parent = request.pop("cgroup_parent", "")
    process = base.Process(
        list(options.args)
        if options.args
        else image.command(command.get("entrypoint"), command.get("args"), image_config),
        [*image_config.env, *(f"{name}={value}" for name, value in options.env.items())],
        _directory(options.cwd or command.get("workdir", ""), image_config.workdir, service.source),
    )
    if not process.args[0]:
        raise RequestError(f"{service.source}: the name of the program to run is empty")
    host = node(account)
    config = base.config(
        process,
        hostname,
        root_path(options.rootfs),
        host,
        host_network,
        bool(request.get("privileged")),
        not request.get("capabilities"),
    )
    gpu = _take_gpu(request, service.name)
    call_facts: CallFacts = {
        "id": options.id,
        "bundle": options.bundle,
        "volumes": volumes(options.volumes),
        "scope": service.deployment,
        "master": service.name,
        "built": True,
    }
    equipment = _Equipment(with_trusting_policy(inventory), account, service.source, call_facts, options.hidden, [])
    config = equipment.with_request(config, request)
    if gpu and inventory.config["gpu.allocator"] == "leases":
        if request.get("privileged"):
            raise RequestError(
                f"{service.source}: a privileged container can open every GPU, but this node leases each GPU to one "
                "container",
                'leave privileged out, or set allocator = "fixed" in [gpu]',
            )
        equipment.check(config, gpu)
        config["annotations"] = {f"{inventory.config['annotation-prefix']}service": jsontext.dumps(gpu).decode()}
        notes.append(f"{service.source}: GPUs are chosen when chandler-runtime creates the container")
    else:
        config = equipment.with_request(config, gpu)
    _check_ids(config, host, service.source)
    group = cgroups.choose_group(
        options.id,
        parent,
        options.cgroup_parent,
        options.systemd,
        account.rootless,
        options.move,
        needed=cgroups.controllers(config["linux"].get("resources") or {}),
    )
    if group.path:
        config["linux"]["cgroupsPath"] = group.path
    equipment.share()
    return Built(config, notes + group.notes)


def _check_ids(config: Document, host: base.Node, source: str) -> None:
    """Raises RequestError for a user or group of the process that the container's user namespace does not have."""
    user = config["process"]["user"]
    wanted = [
        ("uid", user["uid"], host.uids),
        *(("gid", gid, host.gids) for gid in (user["gid"], *user.get("additionalGids", ()))),
    ]
    for word, number, ids in wanted:
        if ids is not None and number not in ids:
            raise RequestError(
                f"{source}: user: {word} {number} is not among the ids that the caller has for containers",
                f"give the caller a range in /etc/sub{word}, or choose another user",
            )


def _take_gpu(request: Document, master: str) -> Document:
    """Takes resources.gpu out of a request, and returns a request with only that ({} without it).

    GPUs are handled after the rest of the request, or later, when the container is created.
    `master`: the name of the service, the default of distributed.master_addr.
    """
    if "gpu" not in request.get("resources", {}):
        return {}
    resources = request["resources"] = dict(request["resources"])
    gpu = dict(resources.pop("gpu"))
    if "distributed" in gpu:
        gpu["distributed"] = {"master_addr": master, **gpu["distributed"]}
    if not resources:
        del request["resources"]
    return {"resources": {"gpu": gpu}}


class _Equipment(NamedTuple):
    """Turns requests into edits of config.json.

    `source`: the file and the service, for errors.  `call_facts`: what the front end knows (shim.engine.plan).
    `hidden`: as in BuildOptions.  `shared`: collects how the container shares its GPUs.
    """

    inventory: Inventory
    account: Account
    source: str
    call_facts: CallFacts
    hidden: bool
    shared: list[Sharing]

    def state_dir(self) -> str:
        """The state directory.  Raises TrustError or HostError."""
        return self.account.trusted_state_dir(self.inventory.config["state-dir"])

    def share(self) -> None:
        """Sets up on the host what sharing needs, after everything that may refuse.  Raises ChandlerError."""
        for share in self.shared:
            setup.begin(share, self.state_dir())

    def check(self, config: Document, request: Document) -> None:
        """Raises ChandlerError when this node lacks a device that a request asks for.  Leases do not matter here."""
        engine.plan(
            config, self.inventory, held=[], request=parse.Request(request, self.source), call_facts=self.call_facts
        )

    def with_request(self, config: Document, request: Document) -> Document:
        """Returns the configuration with the edits for a request.  Raises ChandlerError."""
        if not request:
            return config
        planned = engine.plan(
            config, self.inventory, request=parse.Request(request, self.source), call_facts=self.call_facts
        )
        assert planned is not None  # since there is a request
        edits = planned.edits
        if planned.sharing is not None:
            self.shared.append(planned.sharing)
            edits = merge(edits, setup.container_edits(planned.sharing, self.state_dir()))
        kept: list[Edit] = []
        for edit in edits.items:
            if edit[0] == ANNOTATION:
                continue  # Chandler's mark: a create would refuse it as forged
            kept.append((*edit[:2], HIDDEN, edit[3]) if self.hidden and isinstance(edit[2], Hidden) else edit)
        return engine.equip(config, edits.with_values(kept), self.account.rootless, self.call_facts["bundle"])


def volumes(given: Mapping[str, str]) -> dict[str, str]:
    """The directories of volumes by the names that policy.volumes uses (shim.policy.classes.volume).

    `given`: directories by the names that a caller writes: the name of a named volume, the target of an anonymous one
    (/app/cache), or s3://BUCKET/PREFIX.  Raises RequestError.
    """
    directories = {}
    for name, path in given.items():
        if not path.startswith("/"):
            raise RequestError(
                f"the directory {path!r} of the volume {name!r} is not an absolute path", "write the whole path"
            )
        if name.startswith("/"):
            name = storage.volume({"type": "anonymous", "target": name})
        elif name.startswith("s3://"):
            bucket, _, prefix = name[len("s3://") :].partition("/")
            name = storage.volume({"type": "s3", "bucket": bucket, "prefix": prefix})
        directories[name] = path
    return directories


def with_trusting_policy(inventory: Inventory) -> Inventory:
    """A copy of an inventory, with the same devices and a policy that trusts the caller."""
    trusted = copy.copy(inventory)
    trusted.config = {**inventory.config, "policy.trust": "all", "policy.rule": []}
    return trusted


def _checked(document: Document, source: str) -> Document:
    """A request document in normal form.  Raises RequestError, which begins with `source`."""
    try:
        return schema.check(document)
    except RequestError as error:
        raise error.within(source) from None


def _directory(chosen: str, of_image: str, source: str) -> str:
    """The container's working directory: `chosen` by the caller or the service, else the image's.

    An image's working directory may lack the slash at its beginning.
    Raises RequestError also for a path below /proc, where descriptors of the host may be open (CVE-2024-21626).
    """
    path = chosen or pathtext.clean("/" + of_image)
    where = source if chosen else f"{source}: the image"
    return str(_checked({"command": {"workdir": path}}, where)["command"]["workdir"])


def node(account: Account) -> base.Node:
    """The facts about this host that config.json depends on, for the user who calls."""
    unified = cgroups.survey().version == "v2"
    if not account.rootless:
        return base.Node(unified)
    if account.euid == 0:  # the caller is root of a user namespace already, and the container will be in the same one
        uids, gids = (rootless.Ids(rootless.of_map(rootless.read(f"/proc/self/{word}_map"))) for word in ("uid", "gid"))
        return base.Node(unified, True, uids=uids, gids=gids)
    names = names_of_user(account.euid)
    uid_map = rootless.mappings(account.euid, rootless.ranges(rootless.read("/etc/subuid"), names))
    gid_map = rootless.mappings(os.getegid(), rootless.ranges(rootless.read("/etc/subgid"), names))
    return base.Node(unified, True, uid_map, gid_map, rootless.Ids(uid_map), rootless.Ids(gid_map))


def names_of_user(uid: int) -> list[str]:
    """The words by which /etc/subuid and /etc/subgid can name a user: the uid as text, and the user's name, if any."""
    import pwd

    try:
        return [str(uid), pwd.getpwuid(uid).pw_name]
    except KeyError:
        return [str(uid)]


# --- the bundle on disk -----------------------------------------------------------------------------------------


def write_config(bundle: str, config: Document) -> None:
    """Writes config.json, readable for its owner only (it may hold secrets), into a bundle that exists.

    Raises BundleError or OSError.
    """
    if not os.path.isdir(bundle):
        raise BundleError(
            f"the bundle {bundle} does not exist", "make it and its rootfs first, or use `chandler bundle create`"
        )
    for leftover in _ours(bundle):
        os.unlink(leftover)  # it belongs to the config.json that is replaced now
    path = os.path.join(bundle, "config.json")
    data = jsontext.dumps(config) + b"\n"
    files.replace(path, data, 0o600)
    if "annotations" in config:  # mark the file, so that chandler-runtime sees that this request is Chandler's own
        os.symlink(files.digest(data), path + config_file.BUILT)


def create(bundle: str, config: Document) -> None:
    """Makes the bundle's directory with config.json, and an empty rootfs in it when the configuration names no other.

    Raises BundleError or OSError.
    """
    os.makedirs(bundle, mode=0o711, exist_ok=True)
    if config["root"]["path"] == base.ROOTFS:
        os.makedirs(os.path.join(bundle, base.ROOTFS), exist_ok=True)
    write_config(bundle, config)


def root_path(rootfs: str) -> str:
    """The path of a root file system for config.json; '' means rootfs in the bundle.  Raises BundleError.

    The path is resolved, since runc refuses a path with a symbolic link.
    """
    if not rootfs:
        return base.ROOTFS
    if not os.path.isdir(rootfs):
        raise BundleError(f"the root file system {rootfs} is not a directory")
    return os.path.realpath(rootfs)


def remove(bundle: str, everything: bool = False) -> None:
    """Removes a bundle, but never a root file system outside it.  Does nothing when there is no bundle.

    `everything`: also remove a root file system in the bundle itself, and files that are not Chandler's; without it,
    such a bundle stays and BundleError is raised.  Raises BundleError also for a directory that is not a bundle.
    """
    if not os.path.lexists(bundle):
        return
    if os.path.islink(bundle) or not os.path.isdir(bundle):
        raise BundleError(f"{bundle} is not a directory")
    names = set(os.listdir(bundle))
    if names and not names & {"config.json", base.ROOTFS}:
        raise BundleError(f"{bundle} is not a bundle: it has neither config.json nor {base.ROOTFS}")
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
            f"{bundle} also holds {', '.join(sorted(others))}", "`chandler bundle remove --all` removes that as well"
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


def _ours(bundle: str) -> list[str]:
    """The paths of the files that Chandler has put beside config.json."""
    return [os.path.join(bundle, name) for name in os.listdir(bundle) if name.startswith("config.json.chandler-")]


def read(path: str, limit: int) -> bytes:
    """The content of a file that the caller names, of at most `limit` bytes.  Raises OSError or HostError."""
    return files.read(path, limit, follow=True)[0]


def exists(path: str) -> bool:
    """Whether `path` exists; symbolic links are followed."""
    return files.exists(path)
