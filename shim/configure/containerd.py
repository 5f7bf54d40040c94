"""containerd: adds runtime handlers to the CRI plugin, in config.toml or, from containerd 2.1 on, in a drop-in.

Versions 2 and 3 of the file have the CRI plugin's keys in different tables.  Before 2.1 an imported file replaces whole
plugins of the importing one, so there the file itself is edited; from 2.1 on tables are merged, if both files have the
same version.  Observed with 1.7.24 and 2.1.9.  Pure.
"""

from __future__ import annotations

import posixpath
from typing import Any, Callable, Dict, List, Optional, Tuple

from shim.configure import template, tomledit
from shim.configure.model import (
    ELEMENT,
    TABLE,
    TEMPLATE,
    TOML,
    VALUE,
    Changes,
    Edit,
    Read,
    Setting,
    Wish,
    lookup,
    merged,
    table,
    words,
)
from shim.errors import ConfigError

CONFIG = "/etc/containerd/config.toml"
SOCKET, K3S_SOCKET = "/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock"
DROP_IN = "conf.d/99-chandler.toml"
RUNC = "io.containerd.runc.v2"
# The name of the CRI plugin by version of the file.
CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
NRI = "io.containerd.nri.v1.nri"
VALIDATOR = ("plugins", NRI, "default_validator")
VALIDATES = (2, 2)  # the first version with NRI's default validator
PLUGIN = "chandler"  # the name with which chandler-nri registers
TOLERATE = (
    "tolerate-missing-nri-plugins.noderesource.dev"  # the annotation of a pod that may start without required plugins
)
MERGES = (2, 1)  # the first version that merges imported tables
# Where k3s and rke2 generate config.toml at every start, and from which templates (name: version of the file).
RANCHER = ("/rancher/k3s/agent/etc/containerd", "/rancher/rke2/agent/etc/containerd")
TEMPLATES = {"config.toml.tmpl": 2, "config-v3.toml.tmpl": 3}
# The keys that our handlers set themselves; all others are copied from runc's.
_OWN = ("pod_annotations", "container_annotations", "options", "runtime_path")


def plan(wish: Wish, read: Read) -> Changes:
    """What to write where.  Raises ConfigError, which names the file."""
    path = wish.config or CONFIG
    name = posixpath.basename(path)
    if name in TEMPLATES:
        return _template(wish, path, TEMPLATES[name])
    if posixpath.dirname(path).endswith(RANCHER):
        raise ConfigError(
            f"{path} is made anew at every start",
            f"--config {posixpath.dirname(path)}/config-v3.toml.tmpl "
            "(config.toml.tmpl before containerd 2.0) names the template that it is made from",
        )
    text = read.text(path)
    rancher = read.glob("/var/lib/rancher/*/agent/etc/containerd") if text is None and not wish.config else []
    if rancher:
        raise ConfigError(
            f"{path} is not there, and k3s or rke2 is, whose containerd reads another file",
            f"--config {rancher[0]}/config-v3.toml.tmpl (config.toml.tmpl before containerd 2.0)",
        )
    try:
        return _plan(wish, path, text, read)
    except ConfigError as error:
        raise error.within(path) if path not in error.what else error from None


def _plan(wish: Wish, path: str, text: Optional[str], read: Read) -> Changes:
    document = tomledit.parse(text or "")
    schema = _schema(wish, document)
    whole = _whole(path, document, read)
    notes = _notes(whole, schema)
    settings = handlers(wish, whole, schema)
    if _dropping(wish, document, schema, notes):
        imported = _imported(path, document, read)
        drop_in = wish.drop_in or _usual(path, imported)
        edits = [Edit(drop_in, TOML, [Setting(VALUE, ("version",), schema), *settings], own=True)]
        if drop_in not in imported and not (
            posixpath.dirname(drop_in) + "/*.toml" in imported and drop_in.endswith(".toml")
        ):
            edits.append(Edit(path, TOML, [Setting(ELEMENT, ("imports",), drop_in)]))
        elif wish.default:
            beside = [name for name in imported if "*" not in name and name > drop_in]
            notes += tomledit.overriders(
                beside, ("plugins", CRI[schema], "containerd", "default_runtime_name"), read.text
            )
        return Changes(edits, notes, command(wish))
    if not document:
        settings = [Setting(VALUE, ("version",), schema), *settings]
    return Changes([Edit(path, TOML, settings)], notes, command(wish))


def command(wish: Wish) -> Tuple[str, ...]:
    """The command that makes containerd read its configuration again."""
    path = wish.config
    service = "rke2-server" if RANCHER[1] in path else "k3s" if RANCHER[0] in path else "containerd"
    return ("systemctl", "restart", service)


def address(path: str, text: Optional[str]) -> str:
    """The socket of the containerd that reads this configuration file."""
    try:
        named = lookup(tomledit.parse(text or ""), ("grpc", "address"))
    except ConfigError:
        named = None  # a template
    return (
        named if isinstance(named, str) and named else K3S_SOCKET if any(each in path for each in RANCHER) else SOCKET
    )


def places(wish: Wish, read: Read) -> List[str]:
    """The files in which Chandler may have written."""
    path = wish.config or CONFIG
    found = [wish.drop_in] if wish.drop_in else []
    if posixpath.basename(path) not in TEMPLATES:
        found.append(f"{posixpath.dirname(path)}/{DROP_IN}")
        try:
            found += [name for name in _imported(path, tomledit.parse(read.raw(path) or ""), read) if "*" not in name]
        except ConfigError:
            pass  # whoever needs the file says so
    return [path, *found]


def _schema(wish: Wish, document: Dict[str, Any]) -> int:
    """The version of the file.  Raises ConfigError for one that is not supported."""
    if not document:
        if not wish.version:
            raise ConfigError(
                "it is not there, and no containerd that would say its version",
                "--engine-version X.Y, or --programs DIR where containerd is",
            )
        return 3 if wish.version >= (2,) else 2
    version = document.get("version", 1)
    if version not in tuple(CRI):
        raise ConfigError(
            f"it has version {version}, and only 2 and 3 have runtime handlers that can be configured here",
            "`containerd config migrate` prints it as a newer one",
        )
    if version == 3 and wish.version and wish.version < (2,):
        raise ConfigError(
            f"it has version 3, which containerd {_dotted(wish.version)} does not read", "give it version = 2"
        )
    return int(version)


def _dropping(wish: Wish, document: Dict[str, Any], schema: int, notes: List[str]) -> bool:
    """Whether to write a drop-in.  Raises ConfigError when one was asked for and would not work."""
    merges = wish.version >= MERGES
    if wish.drop_in is not None:
        if not wish.version:
            raise ConfigError(
                "a drop-in needs containerd 2.1 or newer, and which one this is is not known",
                "--engine-version X.Y, or --programs DIR where containerd is",
            )
        if not merges:
            raise ConfigError(
                f"containerd {_dotted(wish.version)} would lose the rest of the CRI plugin's configuration to a drop-in",
                "leave out --drop-in: then the file itself is edited",
            )
        return True
    if not wish.version:
        notes.append("containerd's version is not known: the file itself is edited, which every version reads")
    # a file that is not there is better written than imported from
    return merges and bool(document) and not wish.in_place


def _imported(path: str, document: Dict[str, Any], read: Read) -> List[str]:
    """The patterns that a file imports, each followed by the files that match it."""
    found: List[str] = []
    for pattern in words(document, ("imports",)):
        pattern = posixpath.join(posixpath.dirname(path), pattern)
        found += [pattern, *read.glob(pattern)]
    return found


def _usual(path: str, imported: List[str]) -> str:
    """The drop-in's usual path: in a directory beside the file that is imported already, if there is one."""
    here = posixpath.dirname(path)
    there = [
        posixpath.dirname(pattern)
        for pattern in imported
        if pattern.startswith(here + "/") and pattern.endswith("/*.toml")
    ]
    return f"{there[0]}/{posixpath.basename(DROP_IN)}" if there else f"{here}/{DROP_IN}"


def _whole(path: str, document: Dict[str, Any], read: Read) -> Dict[str, Any]:
    """The document merged with those that it imports."""
    whole = document
    for name in _imported(path, document, read):
        text = None if "*" in name else read.text(name)
        if text:
            try:
                whole = merged(whole, tomledit.parse(text))
            except ConfigError as error:
                raise error.within(name) from None
    return whole


def _notes(document: Dict[str, Any], schema: int) -> List[str]:
    if {CRI[schema], CRI[2], "cri"} & set(words(document, ("disabled_plugins",))):
        return ["the CRI plugin is in disabled_plugins, so that no pod reaches a handler: take it out there"]
    return []


def handlers(wish: Wish, document: Dict[str, Any], schema: int) -> List[Setting]:
    """The settings of all handlers and options."""
    cri: Tuple[str, ...] = ("plugins", CRI[schema])
    runtimes = table(document, (*cri, "containerd", "runtimes"))
    default = lookup(document, (*cri, "containerd", "default_runtime_name")) or "runc"
    settings = []
    if not runtimes and not wish.version >= (2,):
        # 1.x takes the file's handlers in place of its own single one
        settings.append(Setting(TABLE, (*cri, "containerd", "runtimes", "runc"), {"runtime_type": RUNC}))
    there: List[Dict[str, Any]] = [table(runtimes, (str(name),)) for name in ("runc", default)]
    like = next((each for each in there if each.get("runtime_type") == RUNC), {})
    for name, program in wish.handlers:
        made = _handler(wish, like, program)
        if name in runtimes and runtimes[name] != made:
            raise ConfigError(
                f"there is a handler {name!r} already, which this command has not written",
                "--handler NAME gives ours another name; or take that one out",
            )
        settings.append(Setting(TABLE, (*cri, "containerd", "runtimes", name), made))
    if wish.default:
        settings.append(Setting(VALUE, (*cri, "containerd", "default_runtime_name"), wish.handlers[0][0]))
    if wish.cdi:
        settings.append(Setting(VALUE, (*cri, "enable_cdi"), True))
    if wish.nri:
        settings.append(Setting(VALUE, ("plugins", NRI, "disable"), False))
    if wish.nri_required:
        settings += _required(wish, document)
    return settings


def _required(wish: Wish, document: Dict[str, Any]) -> List[Setting]:
    """The settings that refuse containers while chandler-nri is not connected.  Raises ConfigError."""
    if not wish.version:
        raise ConfigError(
            "--nri-required needs containerd 2.2 or newer, and which one this is is not known",
            "--engine-version X.Y, or --programs DIR where containerd is",
        )
    if wish.version < VALIDATES:
        raise ConfigError(
            f"containerd {_dotted(wish.version)} cannot require an NRI plugin: its NRI has no validator before 2.2, so that a "
            "container which is created while chandler-nri is not connected starts unserved",
            "--nri instead, or the runtime handler with require-grant, or a newer containerd",
        )
    settings = [Setting(VALUE, (*VALIDATOR, "enable"), True)]
    plugins = words(document, (*VALIDATOR, "required_plugins"))
    if PLUGIN not in plugins:
        settings.append(Setting(VALUE, (*VALIDATOR, "required_plugins"), [*plugins, PLUGIN]))
    if not lookup(document, (*VALIDATOR, "tolerate_missing_plugins_annotation")):
        settings.append(Setting(VALUE, (*VALIDATOR, "tolerate_missing_plugins_annotation"), TOLERATE))
    return settings


def rejects_hooks(path: str, text: Callable[[str], Optional[str]], names: Callable[[str], List[str]]) -> bool:
    """Whether NRI's default validator rejects every create for which a plugin adds OCI hooks.  `text`, `names`: as in Read.

    Raises ConfigError.
    """
    try:
        validator = table(_whole(path, tomledit.parse(text(path) or ""), Read(text, text, names)), VALIDATOR)
    except ConfigError as error:
        raise error.within(path) if path not in error.what else error from None
    return validator.get("enable") is True and validator.get("reject_oci_hook_adjustment") is True


def _handler(wish: Wish, like: Dict[str, Any], program: str) -> Dict[str, Any]:
    """A handler like runc's (`like`), but for the program and the annotations that it gets."""
    made = {"runtime_type": RUNC, **{key: value for key, value in like.items() if key not in _OWN}}
    for key in ("pod_annotations", "container_annotations"):
        made[key] = [*(item for item in words(like, (key,)) if item not in wish.annotations), *wish.annotations]
    options = {key: value for key, value in table(like, ("options",)).items() if key != "BinaryName"}
    return {**made, "options": {"BinaryName": program, **options}}


def _template(wish: Wish, path: str, schema: int) -> Changes:
    """A template of k3s or rke2: a block at its end."""
    if wish.default or wish.cdi or wish.nri or wish.nri_required or wish.drop_in is not None:
        raise ConfigError(
            f"{path} is a template, to which handlers can be added and nothing else",
            "k3s and rke2 have default-runtime in their own config.yaml; CDI and NRI are written into the template by hand",
        )
    # k3s knows the node's cgroup driver when it fills the template in
    cri = ("plugins", CRI[schema], "containerd", "runtimes")
    settings = []
    for name, program in wish.handlers:
        made = _handler(wish, {}, program)
        made["options"]["SystemdCgroup"] = template.raw("{{ .SystemdCgroup }}")
        settings.append(Setting(TABLE, (*cri, name), made))
    agent = command(wish)[-1].replace("-server", "") + "-agent"
    return Changes([Edit(path, TEMPLATE, settings)], [f"on an agent the service is {agent}"], command(wish))


def _dotted(version: Tuple[int, ...]) -> str:
    return ".".join(map(str, version))
