"""containerd: adds runtime handlers to the CRI plugin, in config.toml or, from containerd 2.1 on, in a drop-in.

Versions 2 and 3 of the file keep the CRI plugin's keys in different tables.  Before containerd 2.1 an imported file
replaces the whole configuration of each plugin that it names, so Chandler edits the main file itself there.  From 2.1
on containerd merges the tables of both files, if both files have the same version.  Observed with 1.7.24 and 2.1.9.
Pure.
"""

from __future__ import annotations

import posixpath
from typing import Callable

from shim.configure import template, tomledit
from shim.configure.model import (
    ELEMENT,
    TABLE,
    TEMPLATE,
    TOML,
    VALUE,
    Changes,
    ConfigureRequest,
    Edit,
    Read,
    Setting,
    lookup,
    merged,
    table,
    words,
)
from shim.errors import ConfigError
from shim.shapes import Document

CONFIG = "/etc/containerd/config.toml"
SOCKET, K3S_SOCKET = "/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock"
DROP_IN = "conf.d/99-chandler.toml"
RUNC = "io.containerd.runc.v2"
# Version of the file: name of the CRI plugin.
CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
NRI = "io.containerd.nri.v1.nri"
VALIDATOR = ("plugins", NRI, "default_validator")
VALIDATES = (2, 2)  # the first version with NRI's default validator
PLUGIN = "chandler"  # the name with which chandler-nri registers
# The annotation of a pod that may start while a required plugin is missing.
TOLERATE = "tolerate-missing-nri-plugins.noderesource.dev"
MERGES = (2, 1)  # the first version that merges imported tables
# The directories in which k3s and rke2 generate config.toml at every start, and the names of the templates that they
# generate it from (name: version of the file).
RANCHER = ("/rancher/k3s/agent/etc/containerd", "/rancher/rke2/agent/etc/containerd")
TEMPLATES = {"config.toml.tmpl": 2, "config-v3.toml.tmpl": 3}
# The keys that our handlers set themselves; all others are copied from runc's.
_OWN_KEYS = ("pod_annotations", "container_annotations", "options", "runtime_path")


def plan(request: ConfigureRequest, read: Read) -> Changes:
    """The files and settings to write.  Raises ConfigError, which names the file."""
    path = request.config or CONFIG
    name = posixpath.basename(path)
    if name in TEMPLATES:
        return _template(request, path, TEMPLATES[name])
    if posixpath.dirname(path).endswith(RANCHER):
        raise ConfigError(
            f"k3s or rke2 generates {path} anew at every start",
            f"--config {posixpath.dirname(path)}/config-v3.toml.tmpl "
            "(config.toml.tmpl before containerd 2.0) names the template that it is made from",
        )
    text = read.text(path)
    rancher = read.glob("/var/lib/rancher/*/agent/etc/containerd") if text is None and not request.config else []
    if rancher:
        raise ConfigError(
            f"{path} does not exist; this host has k3s or rke2, whose containerd reads another file",
            f"--config {rancher[0]}/config-v3.toml.tmpl (config.toml.tmpl before containerd 2.0)",
        )
    try:
        return _plan(request, path, text, read)
    except ConfigError as error:
        raise error.within(path) if path not in error.what else error from None


def _plan(request: ConfigureRequest, path: str, text: str | None, read: Read) -> Changes:
    document = tomledit.parse(text or "")
    schema = _schema(request, document)
    effective = _with_imports(path, document, read)
    notes = _notes(effective, schema)
    settings = handlers(request, effective, schema)
    if _uses_drop_in(request, document, schema, notes):
        imported = _imported(path, document, read)
        drop_in = request.drop_in or _usual_drop_in(path, imported)
        edits = [Edit(drop_in, TOML, [Setting(VALUE, ("version",), schema), *settings], own=True)]
        if drop_in not in imported and not (
            posixpath.dirname(drop_in) + "/*.toml" in imported and drop_in.endswith(".toml")
        ):
            edits.append(Edit(path, TOML, [Setting(ELEMENT, ("imports",), drop_in)]))
        elif request.default:
            later_files = [name for name in imported if "*" not in name and name > drop_in]
            notes += tomledit.notes_about_later_files(
                later_files, ("plugins", CRI[schema], "containerd", "default_runtime_name"), read.text
            )
        return Changes(edits, notes, command(request))
    if not document:
        settings = [Setting(VALUE, ("version",), schema), *settings]
    return Changes([Edit(path, TOML, settings)], notes, command(request))


def command(request: ConfigureRequest) -> tuple[str, ...]:
    """The command that makes containerd read its configuration again."""
    path = request.config
    service = "rke2-server" if RANCHER[1] in path else "k3s" if RANCHER[0] in path else "containerd"
    return ("systemctl", "restart", service)


def address(path: str, text: str | None) -> str:
    """The socket of the containerd that reads this configuration file."""
    try:
        socket = lookup(tomledit.parse(text or ""), ("grpc", "address"))
    except ConfigError:
        socket = None  # a Go template of k3s or rke2, which is not TOML
    return (
        socket
        if isinstance(socket, str) and socket
        else K3S_SOCKET
        if any(each in path for each in RANCHER)
        else SOCKET
    )


def possible_files(request: ConfigureRequest, read: Read) -> list[str]:
    """The files in which Chandler may have written."""
    path = request.config or CONFIG
    paths = [request.drop_in] if request.drop_in else []
    if posixpath.basename(path) not in TEMPLATES:
        paths.append(f"{posixpath.dirname(path)}/{DROP_IN}")
        try:
            paths += [name for name in _imported(path, tomledit.parse(read.raw(path) or ""), read) if "*" not in name]
        except ConfigError:
            pass  # whatever needs the file's content reports that it cannot be parsed
    return [path, *paths]


def _schema(request: ConfigureRequest, document: Document) -> int:
    """The version of the file.  Raises ConfigError for one that is not supported."""
    if not document:
        if not request.version:
            raise ConfigError(
                "it does not exist, and without containerd's program the version to write is unknown",
                "--engine-version X.Y, or --programs DIR where containerd is",
            )
        return 3 if request.version >= (2,) else 2
    version = document.get("version", 1)
    if version not in tuple(CRI):
        raise ConfigError(
            f"it has version {version}; this command can add runtime handlers to versions 2 and 3 only",
            "`containerd config migrate` prints it in a newer version",
        )
    if version == 3 and request.version and request.version < (2,):
        raise ConfigError(
            f"it has version 3, which containerd {_dotted(request.version)} does not read", "give it version = 2"
        )
    return int(version)


def _uses_drop_in(request: ConfigureRequest, document: Document, schema: int, notes: list[str]) -> bool:
    """Whether to write a drop-in.  Raises ConfigError when the request asks for one that would not work."""
    merges = request.version >= MERGES
    if request.drop_in is not None:
        if not request.version:
            raise ConfigError(
                "a drop-in needs containerd 2.1 or newer, and the version of containerd is unknown",
                "--engine-version X.Y, or --programs DIR where containerd is",
            )
        if not merges:
            raise ConfigError(
                f"containerd {_dotted(request.version)} would drop the CRI plugin's other configuration with a drop-in",
                "leave out --drop-in, so that the file itself is edited",
            )
        return True
    if not request.version:
        notes.append("containerd's version is unknown: the file itself is edited, because every version reads it")
    # without a main file there is none that could import a drop-in: the settings make a new main file
    return merges and bool(document) and not request.in_place


def _imported(path: str, document: Document, read: Read) -> list[str]:
    """The patterns that a file imports, each followed by the files that match it."""
    paths: list[str] = []
    for pattern in words(document, ("imports",)):
        pattern = posixpath.join(posixpath.dirname(path), pattern)
        paths += [pattern, *read.glob(pattern)]
    return paths


def _usual_drop_in(path: str, imported: list[str]) -> str:
    """The drop-in's usual path: in a directory below the file's own that it already imports, else in conf.d there."""
    directory = posixpath.dirname(path)
    directories = [
        posixpath.dirname(pattern)
        for pattern in imported
        if pattern.startswith(directory + "/") and pattern.endswith("/*.toml")
    ]
    return f"{directories[0]}/{posixpath.basename(DROP_IN)}" if directories else f"{directory}/{DROP_IN}"


def _with_imports(path: str, document: Document, read: Read) -> Document:
    """The document merged with the documents that it imports, as containerd merges them."""
    result = document
    for name in _imported(path, document, read):
        text = None if "*" in name else read.text(name)
        if text:
            try:
                result = merged(result, tomledit.parse(text))
            except ConfigError as error:
                raise error.within(name) from None
    return result


def _notes(document: Document, schema: int) -> list[str]:
    if {CRI[schema], CRI[2], "cri"} & set(words(document, ("disabled_plugins",))):
        return ["the CRI plugin is in disabled_plugins, so no pod can use a runtime handler: take it out of that list"]
    return []


def handlers(request: ConfigureRequest, document: Document, schema: int) -> list[Setting]:
    """The settings of all handlers and options.  Raises ConfigError when somebody else configured one of the names."""
    cri: tuple[str, ...] = ("plugins", CRI[schema])
    runtimes = table(document, (*cri, "containerd", "runtimes"))
    default = lookup(document, (*cri, "containerd", "default_runtime_name")) or "runc"
    settings = []
    if not runtimes and not request.version >= (2,):
        # as soon as the file has a handler, containerd 1.x no longer adds its built-in runc: write that one, too
        settings.append(Setting(TABLE, (*cri, "containerd", "runtimes", "runc"), {"runtime_type": RUNC}))
    candidates: list[Document] = [table(runtimes, (str(name),)) for name in ("runc", default)]
    base = next((each for each in candidates if each.get("runtime_type") == RUNC), {})
    for name, program in request.handlers:
        handler = _handler(request, base, program)
        if name in runtimes and runtimes[name] != handler:
            raise ConfigError(
                f"it has a handler {name!r} already, and this command did not write it",
                "choose another name with --handler NAME, or remove that handler",
            )
        settings.append(Setting(TABLE, (*cri, "containerd", "runtimes", name), handler))
    if request.default:
        settings.append(Setting(VALUE, (*cri, "containerd", "default_runtime_name"), request.handlers[0][0]))
    if request.cdi:
        settings.append(Setting(VALUE, (*cri, "enable_cdi"), True))
    if request.nri:
        settings.append(Setting(VALUE, ("plugins", NRI, "disable"), False))
    if request.nri_required:
        settings += _require_plugin(request, document)
    return settings


def _require_plugin(request: ConfigureRequest, document: Document) -> list[Setting]:
    """The settings that make containerd refuse containers while chandler-nri is not connected.  Raises ConfigError."""
    if not request.version:
        raise ConfigError(
            "--nri-required needs containerd 2.2 or newer, and the version of containerd is unknown",
            "--engine-version X.Y, or --programs DIR where containerd is",
        )
    if request.version < VALIDATES:
        raise ConfigError(
            f"containerd {_dotted(request.version)} cannot require an NRI plugin, as NRI has no validator before 2.2: "
            "a container that is created while chandler-nri is not connected starts without what it asks for",
            "use --nri, or the runtime handler with require-grant, or a newer containerd",
        )
    settings = [Setting(VALUE, (*VALIDATOR, "enable"), True)]
    plugins = words(document, (*VALIDATOR, "required_plugins"))
    if PLUGIN not in plugins:
        settings.append(Setting(VALUE, (*VALIDATOR, "required_plugins"), [*plugins, PLUGIN]))
    if not lookup(document, (*VALIDATOR, "tolerate_missing_plugins_annotation")):
        settings.append(Setting(VALUE, (*VALIDATOR, "tolerate_missing_plugins_annotation"), TOLERATE))
    return settings


def config_rejecting_hooks(text: Callable[[str], str | None], names: Callable[[str], list[str]]) -> str:
    """The configuration of this host's containerd if it rejects the OCI hooks of NRI plugins; else ''.

    Looks at the first that is there of containerd's own file and those of k3s and RKE2.  `text` and `names` are `text`
    and `glob` of Read.  Raises ConfigError when it cannot be read.
    """
    paths = [CONFIG, *(f"/var/lib{directory}/config.toml" for directory in RANCHER)]
    path = next((path for path in paths if text(path) is not None), "")
    return path if path and rejects_hooks(path, text, names) else ""


def rejects_hooks(path: str, text: Callable[[str], str | None], names: Callable[[str], list[str]]) -> bool:
    """Whether NRI's default validator rejects every create for which a plugin adds OCI hooks.

    `text` and `names` are `text` and `glob` of Read.  Raises ConfigError.
    """
    try:
        validator = table(_with_imports(path, tomledit.parse(text(path) or ""), Read(text, text, names)), VALIDATOR)
    except ConfigError as error:
        raise error.within(path) if path not in error.what else error from None
    return validator.get("enable") is True and validator.get("reject_oci_hook_adjustment") is True


def _handler(request: ConfigureRequest, base: Document, program: str) -> Document:
    """A handler with the keys of `base` (runc's handler), but with our program and the annotations that we need."""
    handler = {"runtime_type": RUNC, **{key: value for key, value in base.items() if key not in _OWN_KEYS}}
    for key in ("pod_annotations", "container_annotations"):
        handler[key] = [
            *(item for item in words(base, (key,)) if item not in request.annotations),
            *request.annotations,
        ]
    options = {key: value for key, value in table(base, ("options",)).items() if key != "BinaryName"}
    return {**handler, "options": {"BinaryName": program, **options}}


def _template(request: ConfigureRequest, path: str, schema: int) -> Changes:
    """The plan for a template of k3s or rke2: one block at its end.  Raises ConfigError for options beyond handlers."""
    if request.default or request.cdi or request.nri or request.nri_required or request.drop_in is not None:
        raise ConfigError(
            f"{path} is a template, and this command adds handlers to a template and nothing else",
            "set default-runtime in config.yaml of k3s or rke2; write CDI and NRI into the template by hand",
        )
    # Only k3s knows the node's cgroup driver, when it fills in the template.
    cri = ("plugins", CRI[schema], "containerd", "runtimes")
    settings = []
    for name, program in request.handlers:
        handler = _handler(request, {}, program)
        handler["options"]["SystemdCgroup"] = template.raw("{{ .SystemdCgroup }}")
        settings.append(Setting(TABLE, (*cri, name), handler))
    agent = command(request)[-1].replace("-server", "") + "-agent"
    return Changes([Edit(path, TEMPLATE, settings)], [f"on an agent the service is {agent}"], command(request))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
