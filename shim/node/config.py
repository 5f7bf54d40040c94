"""The node's configuration: checks /etc/chandler/config.toml and config.d/*.toml against the table KEYS.

The result is a dict with every key.  Not part of the create path, which reads that dict from the inventory.
Pure: texts in, values out.
"""

from __future__ import annotations

import re
from typing import Any, Callable

from shim.errors import ChandlerError, ConfigError
from shim.gpu import vendors
from shim.policy.rules import FIELDS
from shim.request import quantity
from shim.shapes import Config, Document

# An extended resource: a domain that is not Kubernetes' own, and a name (Kubernetes, "Extended resources").
_RESOURCE = re.compile(
    r"(?!(?:[a-z0-9.-]*\.)?kubernetes\.io/)[a-z0-9][a-z0-9.-]{0,252}/[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
)


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _paths(value: Any) -> bool:
    return _strings(value) and all(_path(item) for item in value)


def _path(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("/") and not any(c in value for c in "\n\t\0")


def _runtimes(value: Any) -> bool:
    return (
        _strings(value)
        and bool(value)
        and all((_path(item) or "/" not in item) and not any(c.isspace() for c in item) for item in value)
    )


def _prefix(value: Any) -> bool:
    # The launcher searches config.json for it with grep, without the slash at its end.  So it may not have characters
    # that JSON can write in two ways.
    return (
        isinstance(value, str)
        and len(value) > 1
        and value.endswith("/")
        and value.count("/") == 1
        and all(c.isascii() and (c.isalnum() or c in "-./") for c in value)
    )


def _log_file(value: Any) -> bool:
    return value in ("", "journal") or _path(value)


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: value in words


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _seconds(value: Any) -> bool:
    return _count(value) and 1 <= value <= 60


# Short words that allow and deny also accept: the full words.
_SHORT = {"bind": "storage.bind", "tmpfs": "storage.tmpfs"}


def _words() -> list[str]:
    """The words of allow and deny.  Loads the rows of all keys of a request, which most configurations do not need."""
    from shim.policy.classes import known_words

    return list(known_words())


def _classes(value: Any) -> bool:
    return _strings(value) and set(value) <= {*_SHORT, *_words()}


def _wrong(key: str, value: Any, wanted: str) -> ConfigError:
    wanted = wanted or f"a list of {', '.join(_words())}"
    return ConfigError(f"{key} = {value!r} is wrong", f"it must be {wanted}")


# The engines whose annotations may identify a container, and `other`: see shim.policy.engines.
_ENGINES = ("containerd", "crio", "podman", "docker", "other")


def _engines(value: Any) -> bool:
    return isinstance(value, list) and all(item in _ENGINES for item in value)


DEFAULT_PREFIX = "chandler.oci/"


def _vendors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item in vendors.all_names() for item in value)


def _path_or_none(value: Any) -> bool:
    return value == "" or _path(value)


def _prefixes(value: Any) -> bool:
    return _paths(value) and all(not {"..", "."} & set(item.split("/")) and "//" not in item for item in value)


def _parents(value: Any) -> bool:
    return _strings(value) and all(_prefixes([item]) or item.endswith(".slice") and "/" not in item for item in value)


def _capabilities(value: Any) -> bool:
    return _strings(value) and all(_is_capability(item) for item in value)


def _is_capability(name: str) -> bool:
    from shim.keys.process import capability

    try:
        return bool(capability(name))
    except ChandlerError:
        return False


def _amount(scale: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return value == 0 and not isinstance(value, bool) or _scaled(value, scale) > 0

    return check


def _scaled(value: Any, scale: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return 0
    try:
        return quantity.scaled(str(value), scale)
    except ChandlerError:
        return 0


def _directory(value: Any) -> bool:
    return _path_or_none(value) and ".." not in value.split("/")


def _command(value: Any) -> bool:
    return value == [] or _strings(value) and _path(value[0]) and not any("\0" in word for word in value)


def _volumes(value: Any) -> bool:
    return isinstance(value, dict) and all(name and _path(path) for name, path in value.items())


def _resources(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all("/" in name or vendors.by_name(name) in vendors.with_gpus() for name in value)
        and all(isinstance(name, str) and _RESOURCE.fullmatch(name) for name in value.values())
        and len(set(value.values())) == len(value)
    )


_ONCE = ("policy.rule", "policy.evict-unadjusted")  # the keys of [policy] that a rule cannot have


def _rules(value: Any) -> bool:
    """Whether a value is a list of tables.  Raises ConfigError, which names the rule and its key, for a wrong table."""
    if not isinstance(value, list) or not all(isinstance(rule, dict) for rule in value):
        return False
    for number, rule in enumerate(value, 1):
        name = rule.get("name")
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise ConfigError(f"policy.rule number {number} has no name", 'write name = "…"')
        match = rule.get("match")
        if not isinstance(match, dict) or not match:
            raise ConfigError(f"policy.rule {name!r} has no match", 'write match = {namespace = ["…"]}')
        for field, patterns in match.items():
            if field not in FIELDS or not _strings(patterns) or not patterns:
                raise ConfigError(
                    f"policy.rule {name!r}: match.{field} = {patterns!r} is wrong",
                    f"it must be a list of patterns, for one of {', '.join(FIELDS)}",
                )
        for key, item in rule.items():
            if key in ("name", "match"):
                continue
            definition = KEYS.get(f"policy.{key}")
            if definition is None or f"policy.{key}" in _ONCE:
                raise ConfigError(
                    f"policy.rule {name!r}: unknown key {key!r}", "a rule has name, match, and keys of [policy]"
                )
            check, wanted, _ = definition
            if not check(item):
                raise _wrong(f"policy.rule {name!r}: {key}", item, wanted)
    return True


def _normal(key: str, value: Any) -> Any:
    """A checked value in the form that the create path reads: numbers without units, full names of classes."""
    if key in ("policy.allow", "policy.deny"):
        return [_SHORT.get(word, word) for word in value]
    if key == "cdi.generate":
        return [vendor.name for vendor in vendors.VENDORS if set(vendor.names) & set(value)]
    if key == "policy.max-cpu":
        return _scaled(value, 1000)
    if key == "policy.max-memory":
        return _scaled(value, 1)
    if key == "policy.capabilities":
        from shim.keys.process import capability

        return [capability(name) for name in value]
    if key == "policy.rule":
        return [
            {
                **{
                    f"policy.{name}": _normal(f"policy.{name}", item)
                    for name, item in rule.items()
                    if name not in ("name", "match")
                },
                "name": rule["name"],
                "match": rule["match"],
            }
            for rule in value
        ]
    return value


_GLOBS = "a list of names, in which * stands for any characters"
# Key: (function that checks a value, what the value must be ('' for words of allow and deny), default).
KEYS: dict[str, tuple[Callable[[Any], bool], str, Any]] = {
    "runtimes": (_runtimes, "a list of names or absolute paths", ["runc", "youki", "crun"]),
    "annotation-prefix": (_prefix, "letters, digits, dots and hyphens that end in one slash", DEFAULT_PREFIX),
    "state-dir": (_path, "an absolute path", ""),
    "engines": (_engines, f"a list of {', '.join(_ENGINES)}", []),
    "engine": (_one_of(*_ENGINES), f"one of {', '.join(_ENGINES)}", ""),  # older than `engines`: adds one engine to it
    "require-grant": (_boolean, "true or false", False),
    "cdi.spec-dirs": (_paths, "a list of absolute paths", ["/etc/cdi", "/var/run/cdi"]),
    "cdi.annotations": (_boolean, "true or false", False),
    "gpu.allocator": (_one_of("leases", "fixed", "none"), "leases, fixed or none", "leases"),
    "cdi.generate": (_vendors, "a list of " + ", ".join(vendors.all_names()), []),
    "cdi.generate-dir": (_path_or_none, 'an absolute path or ""', ""),
    "cdi.hook": (_path_or_none, 'an absolute path or ""', ""),
    "gpu.fallback": (_one_of("devices", "generate", "off"), "devices, generate or off", "devices"),
    "log.file": (_log_file, 'an absolute path, "journal" or ""', ""),
    "gpu.mps": (_one_of("off", "external", "managed"), "off, external or managed", "off"),
    "gpu.mps-pipe-dir": (_path, "an absolute path", "/tmp/nvidia-mps"),
    "gpu.mps-shm-dir": (_path, "an absolute path", "/dev/shm"),
    "gpu.mps-limits": (_one_of("advisory", "enforced"), "advisory or enforced", "advisory"),
    "gpu.mps-patience": (_seconds, "a whole number of seconds from 1 to 60", 10),
    "gpu.max-sharers": (_count, "a whole number", 48),
    "gpu.mps-control": (_path, "an absolute path", "/usr/bin/nvidia-cuda-mps-control"),
    "gpu.nvidia-smi": (_path, "an absolute path", "/usr/bin/nvidia-smi"),
    "policy.trust": (_one_of("policy", "all"), "policy or all", "policy"),
    "policy.allow": (_classes, "", ["gpu", "env", "resources"]),
    "policy.deny": (_classes, "", []),
    "policy.evict-unadjusted": (_boolean, "true or false", False),
    "policy.max-gpus": (_count, "a whole number", 8),
    "policy.max-cpu": (_amount(1000), 'CPUs, such as 4 or "500m"; 0 is no maximum', 0),
    "policy.max-memory": (_amount(1), 'bytes, such as "16Gi"; 0 is no maximum', 0),
    "policy.bind-sources": (_prefixes, "a list of absolute paths without ..", []),
    "policy.volumes": (_strings, _GLOBS, []),
    "policy.host-variables": (_strings, _GLOBS, []),
    "policy.secrets": (_strings, _GLOBS, []),
    "policy.devices": (_strings, "a list of paths, in which * stands for any characters", []),
    "policy.cgroup-parents": (_parents, "a list of absolute paths or systemd slices", []),
    "policy.capabilities": (_capabilities, "a list of capabilities, or ALL", []),
    "policy.rule": (_rules, "a list of tables, each written as [[policy.rule]]", []),
    "secrets.directory": (_directory, 'an absolute path, in which {scope} stands for the namespace, or ""', ""),
    "secrets.command": (_command, "a program's absolute path and its arguments", []),
    "volumes": (_volumes, "names with absolute paths", {}),
    "kubernetes.resources": (_resources, "vendors or CDI kinds with names such as example.com/gpu", {}),
    "policy.kinds": (_strings, "a list of CDI kinds", [vendor.kind for vendor in vendors.with_gpus()]),
}
_TABLES = {key.partition(".")[0] for key in KEYS if "." in key}


def compile_config(sources: list[tuple[str, bytes]]) -> Config:
    """The configuration from (path, text) pairs, as a flat dict with every key.  A later text overrides an earlier one.

    Raises ConfigError, which names the file and the key.
    """
    result: Any = {key: default for key, (_, _, default) in KEYS.items()}
    for path, data in sources:
        for key, value in _flat(_parse(path, data), path):
            check, wanted, _ = KEYS[key]
            try:
                valid = check(value)
            except ConfigError as error:
                raise error.within(path) from None
            if not valid:
                raise _wrong(f"{path}: {key}", value, wanted)
            if key in ("engines", "engine"):  # lists add up, since each engine may have a file of its own
                result["engines"] = list(dict.fromkeys([*result["engines"], *([value] if key == "engine" else value)]))
            elif key == "policy.rule":  # rules add up, too, so that a later file cannot drop one that denies
                result[key] = result[key] + _normal(key, value)
            else:
                result[key] = _normal(key, value)
    del result["engine"]
    configuration: Config = result  # a test compares the keys of KEYS and Config
    return configuration


def annotation_prefix(sources: list[tuple[str, bytes]]) -> str:
    """The annotation prefix of a configuration that may have errors elsewhere; the default if none can be read."""
    prefix = DEFAULT_PREFIX
    for path, data in sources:
        try:
            value = _parse(path, data).get("annotation-prefix")
        except ConfigError:
            continue
        if _prefix(value):
            prefix = str(value)
    return prefix


def _parse(path: str, data: bytes) -> Document:
    """The TOML document in `data`.  Raises ConfigError."""
    try:
        import tomllib
    except ImportError:  # Python before 3.11
        import tomli as tomllib  # type: ignore[no-redef, unused-ignore]
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def _flat(document: Document, path: str) -> list[tuple[str, Any]]:
    """Pairs of dotted key and value.  Raises ConfigError for a key that KEYS does not have."""
    pairs: list[tuple[str, Any]] = []
    for key, value in document.items():
        if key in _TABLES and isinstance(value, dict):
            pairs.extend((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            pairs.append((key, value))
    for key, _ in pairs:
        if key not in KEYS:
            from difflib import get_close_matches

            near = get_close_matches(key, KEYS, 1)
            raise ConfigError(f"{path}: unknown key {key!r}", f"did you mean {near[0]!r}?" if near else "remove it")
    return pairs
