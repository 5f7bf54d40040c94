"""Rows of the keys for the container's process: references in env, command, user, groups, capabilities, limits."""

from __future__ import annotations

from shim import errors
from shim.edits import CAPABILITY, DEVICE_RULE, GID, LINUX, MOUNT, PROCESS, RLIMIT, USER
from shim.keys import common
from shim.keys.row import DANGEROUS, HOST, TIGHTEN, Row
from shim.oci import reader
from shim.policy import patterns
from shim.request import objects, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Callable

    from shim.keys.host_facts import Facts
    from shim.keys.row import Change
    from shim.shapes import Config, Document

# Each at the index that is its number in uapi/linux/capability.h.
CAPABILITIES = tuple(
    "CAP_" + name
    for name in (
        "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
        "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT "
        "SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL "
        "SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
    ).split()
)
# setrlimit(2)
RLIMITS = "as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack".split()
UNLIMITED = (1 << 64) - 1  # RLIM_INFINITY: setrlimit(2)


# beginning of a value: the word of allow and deny, and the list of [policy] that must have what the value names
_REFERENCES = {common.HOST_VARIABLE: ("env.host", "host-variables"), common.SECRET: ("env.secrets", "secrets")}


def _asks_env(env: dict[str, str]) -> list[tuple[str, str]]:
    return [(_REFERENCES[text[:3]][0], f"env.{name}") for name, text in env.items() if text[:3] in _REFERENCES]


def _unlisted_env(env: dict[str, str], config: Config) -> Iterator[tuple[str, str, str]]:
    for name, text in env.items():
        if text[:3] in _REFERENCES:
            list_name = _REFERENCES[text[:3]][1]
            if not patterns.matches_any(config[f"policy.{list_name}"], text[3:]):  # type: ignore[literal-required]
                yield f"env.{name}", text[3:], list_name


def _words(value: Any) -> list[str]:
    return objects.listing(value, objects.string, empty=True)


def _workdir(value: Any) -> str:
    text = objects.path(value.rstrip("/") or "/" if isinstance(value, str) and value else value)
    if text == "/proc" or text.startswith("/proc/"):
        raise values.wrong_value(value, "is below /proc, where no process may start")  # CVE-2024-21626
    return text


def _command(value: Document, request: Document, document: Document, facts: Facts) -> list[Change]:
    """The program and its arguments, and the working directory.

    As with Docker, entrypoint and args together replace the image's whole command.
    """
    args = value.get("entrypoint", []) + value.get("args", [])
    items: list[Change] = []
    if args:
        if not args[0]:
            raise errors.RequestError("the program's name is empty")
        items.append((PROCESS, "args", args))
    if "workdir" in value:
        if facts.root:
            # Raises when a link of the image leads below /proc, where a directory of the host may be (CVE-2024-21626).
            facts.target(value["workdir"], "workdir")
        items.append((PROCESS, "cwd", value["workdir"]))
    return items


def _user(value: Any) -> str:
    if type(value) is int:
        value = str(value)
    text = values.text(value, 255)
    parts = text.split(":")
    if len(parts) > 2:
        raise values.wrong_value(value, "is no user", "write uid, uid:gid, or names from the image's /etc/passwd")
    for part in parts:
        _account(part, value)
    return text


def _account(part: str, value: Any) -> str:
    """A number below 2**31, or a name as /etc/passwd can have it."""
    if part.isdigit() and part.isascii():
        if len(part) > 10 or int(part) >= 1 << 31:
            raise values.wrong_value(value, "has a number of 2147483648 or more")
    elif not part or set(part) - objects.LETTERS - set("._-$@+") or part.startswith(("-", "+")):
        raise values.wrong_value(value, "is no user", "write uid, uid:gid, or names from the image's /etc/passwd")
    return part


def _group(value: Any) -> Any:
    if type(value) is int:
        return values.number(value, 0, (1 << 31) - 1)
    part = _account(values.text(value, 255), value)
    return int(part) if part.isdigit() else part


def _user_edits(value: str, request: Document, document: Document, facts: Facts) -> list[Change]:
    """The user: uid[:gid], where gid is by default the uid, or names, which are looked up in the image."""
    name, _, group = value.partition(":")
    groups: list[int] = []
    if name.isdigit():
        uid = gid = int(name)
    else:
        uid, gid = facts.account(name)
        if not group:
            groups = facts.memberships(name)
    if group:
        gid = int(group) if group.isdigit() else facts.group(group)
    items: list[Change] = [(USER, "uid", uid), (USER, "gid", gid)]
    return items + [(GID, number, None) for number in groups if number != gid]


def capability(value: Any) -> str:
    """The kernel's name of a capability, such as CAP_NET_ADMIN, or ALL."""
    name = values.text(value, 64).upper()
    if name in ("ALL", "CAP_ALL"):
        return "ALL"
    name = name if name.startswith("CAP_") else "CAP_" + name
    if name not in CAPABILITIES:
        raise values.wrong_value(
            value, "is no capability that Chandler knows", "capabilities(7) lists them, for example NET_ADMIN"
        )
    return name


def _capabilities(value: Any) -> list[str]:
    return list(dict.fromkeys(objects.listing(value, capability)))


def _unlisted_capabilities(names: list[str], config: Config) -> Iterator[tuple[str, str, str]]:
    for name in names:
        if not {name, "ALL"} & set(config["policy.capabilities"]):
            yield "capabilities", name, "capabilities"


def capability_sets(
    present: dict[str, list[str]], add: list[str], drop: list[str], all_of_them: list[str]
) -> dict[str, list[str]]:
    """The capability sets after some are dropped and then some are added.

    ALL means what it means to Docker: to add ALL gives all but those dropped; to drop ALL leaves only those added.
    `all_of_them`: the capabilities that ALL gives.
    """
    result: dict[str, list[str]] = {}
    every = "ALL" in add
    added = [name for name in (all_of_them if every else add) if not (every and name in drop)]
    for key in ("bounding", "effective", "permitted"):
        kept = [name for name in present.get(key, []) if name not in drop and "ALL" not in drop]
        result[key] = list(dict.fromkeys(kept + added))
    for key in ("inheritable", "ambient"):
        if present.get(key):
            result[key] = [name for name in present[key] if name not in drop and "ALL" not in drop]
    return result


def _available(facts: Facts) -> list[str]:
    """The capabilities that the kernel knows and Chandler can give to others."""
    mask = facts.capabilities()
    return [name for number, name in enumerate(CAPABILITIES) if mask >> number & 1]


def _capability_edits(value: Any, request: Document, document: Document, facts: Facts) -> list[Change]:
    """The capability sets for `capabilities` and `cap_drop` together."""
    if request.get("privileged"):
        return []  # the row of `privileged` makes these edits
    present = reader.capabilities(document)
    add, drop = request.get("capabilities", []), request.get("cap_drop", [])
    if not add and not present:
        return []  # there are none to drop
    available = _available(facts) if add else []
    for name in add:
        if name != "ALL" and name not in available:
            raise errors.HostError(f"{name} is not available on this host")
    sets = capability_sets(present, add, drop, available)
    return [(CAPABILITY, key, names) for key, names in sets.items()]


def _privileged(value: bool, request: Document, document: Document, facts: Facts) -> list[Change]:
    """All capabilities of the host, no seccomp filter and AppArmor profile, every device, /proc and /sys unmasked."""
    if not value:
        return []
    present: dict[str, list[str]] = {key: [] for key in reader.capabilities(document)}
    every = capability_sets(
        present, ["ALL"], [name for name in request.get("cap_drop", []) if name != "ALL"], _available(facts)
    )
    items: list[Change] = [(CAPABILITY, key, names) for key, names in every.items()]
    items += [
        (PROCESS, "noNewPrivileges", False),
        (PROCESS, "apparmorProfile", None),
        (LINUX, "maskedPaths", []),
        (LINUX, "readonlyPaths", []),
        (LINUX, "seccomp", None),
        (DEVICE_RULE, "all", {"allow": True, "access": "rwm"}),
    ]
    for mount in reader.kernel_mounts(document):
        options = mount.get("options") or []
        if "ro" in options and isinstance(mount.get("destination"), str):
            writable = {**mount, "options": [option for option in options if option != "ro"]}
            items.append((MOUNT, mount["destination"], writable))
    return items


def _limit(value: Any) -> int:
    """A resource limit; -1 for unlimited."""
    if value == "unlimited":
        return -1
    if isinstance(value, str):
        value = values.number_text(value)
    return values.number(value, -1, (1 << 63) - 1)


def _rlimit(value: Any) -> dict[str, int]:
    """A soft and a hard limit, from an object, from soft:hard, or from one value for both."""
    if isinstance(value, str):
        soft, _, hard = value.partition(":")
        value = {"soft": soft, "hard": hard or soft}
    elif type(value) is int:
        value = {"soft": value, "hard": value}
    limits = objects.object_of(value, {"soft": _limit, "hard": _limit}, ("soft", "hard"))
    if limits["hard"] >= 0 and not 0 <= limits["soft"] <= limits["hard"]:
        raise errors.RequestError(f"the soft limit {limits['soft']} is above the hard one, {limits['hard']}")
    return {"soft": limits["soft"], "hard": limits["hard"]}


def _rlimit_name(name: str) -> str:
    plain = name.lower()
    plain = plain[len("rlimit_") :] if plain.startswith("rlimit_") else plain
    if plain not in RLIMITS:
        raise errors.RequestError(f"{name!r} is no limit", f"known: {', '.join(RLIMITS)}")
    return plain


def _ulimits(value: Document, request: Document, document: Document, facts: Facts) -> list[Change]:
    limits = {
        name: {key: limit if limit >= 0 else UNLIMITED for key, limit in pair.items()} for name, pair in value.items()
    }
    return [(RLIMIT, f"RLIMIT_{name.upper()}", limit) for name, limit in limits.items()]


def _not_above_engine(limits: dict[str, dict[str, int]], document: Document) -> bool:
    """Whether the engine has set each of these limits to the same value or a higher one."""
    present = reader.rlimits(document)
    for name, limit in limits.items():
        for key, engine_limit in zip(("soft", "hard"), present.get(f"RLIMIT_{name.upper()}", (None, None))):
            if type(engine_limit) is not int or limit[key] < 0 or limit[key] > engine_limit:
                return False
    return True


def _check_score(score: int, document: Document, unified: Callable[[], bool], trusted: bool) -> None:
    present = reader.oom_score(document)
    if score < present:
        raise errors.PolicyError(
            f"resources.oom_score_adj = {score} loosens the engine's {present}: it is the other containers that would "
            "be killed"
        )


ROWS: dict[str, Row] = {
    # for variables that refer to the host or to secrets; shim.keys.rare makes the edits
    "env": Row(
        common.ENTRIES["env"],
        words={"env.host": HOST, "env.secrets": HOST},
        asks=_asks_env,
        unlisted=_unlisted_env,
    ),
    "command": Row(
        {
            "entrypoint": (_words, values.split_list),
            "args": (_words, values.split_list),
            "workdir": (_workdir, str),
        },
        asks=lambda value: [("command", "command")] if any(value.values()) else [],
        edits=_command,
    ),
    "user": Row((_user, str), trust=DANGEROUS, edits=_user_edits),
    "extra_groups": Row(
        (lambda value: objects.listing(value, _group), values.split_list),
        trust=DANGEROUS,
        edits=lambda value, request, document, facts: [
            (GID, group if type(group) is int else facts.group(group), None) for group in value
        ],
    ),
    "capabilities": Row(
        (_capabilities, values.split_list), trust=DANGEROUS, unlisted=_unlisted_capabilities, edits=_capability_edits
    ),
    "cap_drop": Row(
        (_capabilities, values.split_list),
        trust=TIGHTEN,
        # with `capabilities` in the request, the edits of that key also drop
        edits=lambda value, request, *more: (
            [] if request.get("capabilities") else _capability_edits(value, request, *more)
        ),
    ),
    "privileged": Row(
        objects.FLAG,
        trust=DANGEROUS,
        asks=lambda value: [("privileged", "privileged")] if value else [],
        implies=("capabilities", "devices", "gpu.all"),
        edits=_privileged,
    ),
    "ulimits": Row(
        (lambda value: objects.mapping(value, _rlimit_name, _rlimit), str, common.FREE),
        trust=HOST,
        tightens=_not_above_engine,
        edits=_ulimits,
    ),
    "resources.oom_score_adj": Row(
        (values.integer(-1000, 1000), values.number_text),
        trust=TIGHTEN,
        check=_check_score,
        edits=lambda value, *_: [(PROCESS, "oomScoreAdj", value)],
    ),
}
