"""The leaves of the request's table for rare keys: how each of these keys is checked and read.

shim.request.schema imports this when a request has one of these keys.  Pure.
"""

from __future__ import annotations

from shim import errors, jsontext
from shim.pathtext import clean
from shim.request import quantity, values

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Dict, List, Tuple

    from shim.shapes import Document

    Leaf = Tuple[Callable[[Any], Any], Callable[[str], Any]]

_MAX_ITEMS = 1024
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
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
RLIMITS = (
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
)
# The sysctls of an IPC namespace, besides fs.mqueue.*.  Source: runc, libcontainer/configs/validate.
_IPC_SYSCTLS = (
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
)
# YAML reads 0777 as the number 511, whose digits can be read as octal once more: as another mode.  So such a number is
# refused where it is the value of a usual mode.
_USUAL_MODES = frozenset(
    int(mode, 8)
    for mode in "1777 1775 1770 1755 1750 777 775 771 770 757 755 750 711 700 666 664 "
    "660 644 640 600 555 550 500 444 440 400".split()
)


def _string(value: Any) -> str:
    return value if value == "" and type(value) is str else values.text(value, 128 << 10)


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise values.wrong(value, "is neither true nor false")
    return value


def _boolean_text(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


def _list(value: Any, item: Callable[[Any], Any], empty: bool = False) -> List[Any]:
    if not isinstance(value, list):
        raise values.wrong(value, "is not a list")
    if not value and not empty:
        raise errors.RequestError("the list is empty", "leave the key out")
    if len(value) > _MAX_ITEMS:
        raise errors.RequestError(f"the list has {len(value)} items, more than {_MAX_ITEMS}")
    return [item(member) for member in value]


def _json(text: str) -> Any:
    """The value of a single-value annotation that is JSON.  Other text stays as it is, so that the check refuses it."""
    try:
        value = jsontext.loads(text.encode("utf-8", "surrogatepass"), unique=True)
        jsontext.check_value(value)
        return value
    except errors.JsonError:
        return text


def _object(value: Any, members: Dict[str, Callable[[Any], Any]], needed: Tuple[str, ...]) -> Document:
    """An object with no other members than `members`, each checked by its function.

    `needed`: the members that must be there.  Raises RequestError, which names the member.
    """
    if not isinstance(value, dict):
        raise values.wrong(value, "is not an object")
    result = {}
    for key, item in value.items():
        if key not in members:
            raise errors.RequestError(f"unknown key {key!r}", f"known here: {', '.join(sorted(members))}")
        try:
            result[key] = members[key](item)
        except errors.RequestError as error:
            raise error.within(key) from None
    for key in needed:
        if key not in result:
            raise errors.RequestError(f"has no {key!r}")
    return result


def _map(value: Any, name: Callable[[str], str], item: Callable[[Any], Any]) -> Document:
    """An object whose keys are free.  `name` checks a key and gives its normal form, `item` checks a value."""
    if not isinstance(value, dict):
        raise values.wrong(value, "is not an object")
    result: Document = {}
    for key, member in value.items():
        normal = name(key)
        if normal in result:
            raise errors.RequestError(f"{key!r} is the second key that means {normal!r}", "remove one of them")
        try:
            result[normal] = item(member)
        except errors.RequestError as error:
            raise error.within(key) from None
    return result


# --- paths and names ------------------------------------------------------------------------------------------


def path(value: Any) -> str:
    """An absolute path without `..`, doubled slashes, or a slash at the end."""
    text = values.text(value)
    if not text.startswith("/") or clean(text) != text or not text.isprintable():
        raise values.wrong(value, "is not a plain absolute path", "write it without .., // and a slash at the end")
    return text


def _target(value: Any) -> str:
    text = path(value.rstrip("/") or "/" if isinstance(value, str) else value)
    if text == "/":
        raise errors.RequestError("/ cannot be mounted over")
    return text


def _workdir(value: Any) -> str:
    text = path(value.rstrip("/") or "/" if isinstance(value, str) and value else value)
    if text == "/proc" or text.startswith("/proc/"):
        raise values.wrong(value, "is below /proc, where no process may start")  # CVE-2024-21626
    return text


def _device_path(value: Any) -> str:
    text = path(value)
    if not text.startswith("/dev/"):
        raise values.wrong(value, "is not below /dev")
    return text


def _name(value: Any) -> str:
    """The name of a volume or a bucket."""
    text = values.text(value, 255)
    if set(text) - _LETTERS - set("._-") or text.startswith((".", "-")):
        raise values.wrong(value, "is no name: letters, digits, dots, hyphens and underscores")
    return text


def _prefix(value: Any) -> str:
    text = _string(value)
    if not text.isprintable() or ".." in text.split("/"):
        raise values.wrong(value, "is no prefix of a bucket")
    return text


def _hostname(value: Any) -> str:
    text = values.text(value, 64)
    if set(text) - _LETTERS - set(".-") or text[0] in ".-" or text[-1] in ".-" or ".." in text:
        raise values.wrong(value, "is no name of a host")
    return text


def _user(value: Any) -> str:
    if type(value) is int:
        value = str(value)
    text = values.text(value, 255)
    parts = text.split(":")
    if len(parts) > 2:
        raise values.wrong(value, "is no user", "write uid, uid:gid, or names from the image's /etc/passwd")
    for part in parts:
        _account(part, value)
    return text


def _account(part: str, value: Any) -> str:
    """A number below 2**31, or a name as /etc/passwd can have it."""
    if part.isdigit() and part.isascii():
        if len(part) > 10 or int(part) >= 1 << 31:
            raise values.wrong(value, "has a number of 2147483648 or more")
    elif not part or set(part) - _LETTERS - set("._-$@+") or part.startswith(("-", "+")):
        raise values.wrong(value, "is no user", "write uid, uid:gid, or names from the image's /etc/passwd")
    return part


def _group(value: Any) -> Any:
    if type(value) is int:
        return values.number(value, 0, (1 << 31) - 1)
    part = _account(values.text(value, 255), value)
    return int(part) if part.isdigit() else part


def capability(value: Any) -> str:
    """The kernel's name of a capability, such as CAP_NET_ADMIN, or ALL."""
    name = values.text(value, 64).upper()
    if name in ("ALL", "CAP_ALL"):
        return "ALL"
    name = name if name.startswith("CAP_") else "CAP_" + name
    if name not in CAPABILITIES:
        raise values.wrong(
            value, "is no capability that Chandler knows", "capabilities(7) lists them, for example NET_ADMIN"
        )
    return name


def _capabilities(value: Any) -> List[str]:
    return list(dict.fromkeys(_list(value, capability)))


def _cgroup_parent(value: Any) -> str:
    text = values.text(value, 1024)
    if text.startswith("/"):
        return path(text.rstrip("/") or "/")
    if not text.endswith(".slice") or set(text) - _LETTERS - set("._-\\:@") or ":" in text or text.startswith("-"):
        raise values.wrong(value, "is neither an absolute path of a control group nor a systemd slice")
    return text


def sysctl_namespace(name: str) -> str:
    """The kind of namespace that a sysctl belongs to: ipc, network, or '' when it belongs to the whole host."""
    if name in _IPC_SYSCTLS or name.startswith("fs.mqueue."):
        return "ipc"
    return "network" if name.startswith("net.") else ""


def _sysctl(name: str) -> str:
    plain = name.replace("/", ".")
    if set(plain) - _LETTERS - set("._-") or ".." in plain or plain.startswith(".") or plain.endswith("."):
        raise values.wrong(name, "is no name of a sysctl")
    if not sysctl_namespace(plain):
        raise errors.RequestError(
            f"{name} belongs to the whole host",
            "only net.*, fs.mqueue.* and the kernel's IPC limits are a container's own",
        )
    return plain


def _sysctl_value(value: Any) -> str:
    text = str(value) if type(value) is int else values.text(value)
    if "\n" in text:
        raise values.wrong(value, "has more than one line")
    return text


# --- amounts --------------------------------------------------------------------------------------------------


def _amount(value: Any) -> int:
    """A number of bytes, from a number or a quantity."""
    if type(value) is int or isinstance(value, jsontext.Number):
        value = str(value)
    return quantity.scaled(values.text(value, 100))


def _size(value: Any) -> int:
    size = _amount(value)
    if not size:
        raise errors.RequestError("a size of 0 is no limit", "leave the key out")
    return size


def _page_size(name: str) -> str:
    """The size of a huge page as the kernel and OCI write it: 2MB, 1GB, 64KB.  2M, 2Mi and 2MiB mean the same."""
    text = name[:-1] if name.endswith("B") else name
    for unit in "KMG":  # units of page sizes are always powers of two
        if text.endswith(unit):
            text += "i"
    size = quantity.scaled(text)
    if size < 4096 or size & (size - 1):
        raise values.wrong(name, "is no size of a page", "write for example 2Mi or 1Gi")
    for power, unit in ((30, "GB"), (20, "MB"), (10, "KB")):
        if not size & ((1 << power) - 1):
            return f"{size >> power}{unit}"
    raise values.wrong(name, "is no size of a page")


def _limit(value: Any) -> int:
    """A resource limit; -1 for unlimited."""
    if value == "unlimited":
        return -1
    if isinstance(value, str):
        value = values.number_text(value)
    return values.number(value, -1, (1 << 63) - 1)


def _rlimit(value: Any) -> Dict[str, int]:
    """A soft and a hard limit, from an object, from soft:hard, or from one value for both."""
    if isinstance(value, str):
        soft, _, hard = value.partition(":")
        value = {"soft": soft, "hard": hard or soft}
    elif type(value) is int:
        value = {"soft": value, "hard": value}
    limits = _object(value, {"soft": _limit, "hard": _limit}, ("soft", "hard"))
    if limits["hard"] >= 0 and not 0 <= limits["soft"] <= limits["hard"]:
        raise errors.RequestError(f"the soft limit {limits['soft']} is above the hard one, {limits['hard']}")
    return {"soft": limits["soft"], "hard": limits["hard"]}


def _rlimit_name(name: str) -> str:
    plain = name.lower()
    plain = plain[len("rlimit_") :] if plain.startswith("rlimit_") else plain
    if plain not in RLIMITS:
        raise errors.RequestError(f"{name!r} is no limit", f"known: {', '.join(RLIMITS)}")
    return plain


def _mode(value: Any) -> str:
    """A file mode in octal, as a text of four digits."""
    text = str(value) if type(value) is int else values.text(value, 8)
    if set(text) - set("01234567") or len(text) > 5 or int(text, 8) > 0o7777:
        raise values.wrong(value, "is no mode", 'write it in octal, as a text: "1777"')
    if type(value) is int and value in _USUAL_MODES:
        raise errors.RequestError(
            f"{value} may be meant as {value:o}, which YAML reads as {value} when it begins with 0",
            f'write it as a text: "{value:o}"',
        )
    return f"{int(text, 8):04o}"


# --- objects --------------------------------------------------------------------------------------------------


def _device(value: Any) -> Document:
    if isinstance(value, str):
        value = {"path": value}
    device = _object(value, {"path": _device_path, "read": _boolean, "write": _boolean, "mknod": _boolean}, ("path",))
    device = {
        "path": device["path"],
        "read": device.get("read", True),
        "write": device.get("write", True),
        "mknod": device.get("mknod", False),
    }
    if not (device["read"] or device["write"] or device["mknod"]):
        raise errors.RequestError(f"{device['path']} is asked for without any access", "leave it out")
    return device


def _tier(value: Any) -> str:
    if value not in ("local", "cached", "network"):
        raise values.wrong(value, "is none of local, cached, network")
    return str(value)


# type of storage: (its members and their checks, the members that must be there)
_STORAGE: Dict[str, Tuple[Dict[str, Callable[[Any], Any]], Tuple[str, ...]]] = {
    "bind": ({"source": path, "target": _target, "readonly": _boolean}, ("source", "target")),
    "named": (
        {"name": _name, "target": _target, "readonly": _boolean, "tier": _tier, "size": _size},
        ("name", "target"),
    ),
    "anonymous": ({"target": _target, "tier": _tier}, ("target",)),
    "tmpfs": ({"target": _target, "size": _size, "mode": _mode}, ("target",)),
    # Chandler mounts no bucket itself: who did used endpoint and credentials, so they are accepted and not kept
    "s3": (
        {
            "bucket": _name,
            "prefix": _prefix,
            "target": _target,
            "readonly": _boolean,
            "endpoint": values.text,
            "credentials": lambda value: None,
        },
        ("bucket", "target"),
    ),
}


def _storage(value: Any) -> Document:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _STORAGE:
        raise values.wrong(kind, "is no type of storage", f"known: {', '.join(_STORAGE)}")
    members, needed = _STORAGE[kind]
    try:
        storage = _object(value, {"type": str, **members}, needed)
    except errors.RequestError as error:
        raise error.within(kind) from None
    return {key: item for key, item in storage.items() if key not in ("endpoint", "credentials")}


def _storages(value: Any) -> List[Document]:
    storages = _list(value, _storage)
    targets = [storage["target"] for storage in storages]
    for target in targets:
        if targets.count(target) > 1:
            raise errors.RequestError(f"{target} is mounted twice")
    return storages


def _devices(value: Any) -> List[Document]:
    devices = _list(value, _device)
    paths = [device["path"] for device in devices]
    for device_path in paths:
        if paths.count(device_path) > 1:
            raise errors.RequestError(f"{device_path} is named twice")
    return devices


def _words(value: Any) -> List[str]:
    return _list(value, _string, empty=True)


def _groups(value: Any) -> List[Any]:
    return _list(value, _group)


def _backend(value: Any) -> str:
    if value not in ("nccl", "gloo", "mpi"):
        raise values.wrong(value, "is none of nccl, gloo, mpi")
    return str(value)


def _interface(value: Any) -> str:
    text = values.text(value, 64)
    if set(text) - _LETTERS - set("._-,=^@"):
        raise values.wrong(value, "is no network interface")
    return text


_RANK = values.integer(0, (1 << 31) - 1)
_TEXT: Callable[[str], Any] = str

# The leaves by the texts that stand for them in shim.request.schema.SCHEMA; a dict is a table with leaves of its own.
# A third member says that a single-value annotation can set any name in the object, such as sysctls.NAME.
LEAVES: values.Table = {
    "oom_score_adj": values.integer(-1000, 1000),
    "blkio_weight": values.integer(10, 1000),
    "hugepages": (lambda value: _map(value, _page_size, _amount), _TEXT, True),
    "distributed": {
        "backend": (_backend, _TEXT),
        "master_addr": (_hostname, _TEXT),
        "master_port": values.integer(1, 65535),
        "rank": _RANK,
        "world_size": values.integer(1, (1 << 31) - 1),
        "local_rank": _RANK,
        "interface": (_interface, _TEXT),
    },
    "command": {"entrypoint": (_words, values.listed), "args": (_words, values.listed), "workdir": (_workdir, _TEXT)},
    "devices": (_devices, values.listed),
    "storage": (_storages, _json),
    "capabilities": (_capabilities, values.listed),
    "cap_drop": (_capabilities, values.listed),
    "flag": (_boolean, _boolean_text),
    "hostname": (_hostname, _TEXT),
    "cgroup_parent": (_cgroup_parent, _TEXT),
    "user": (_user, _TEXT),
    "sysctls": (lambda value: _map(value, _sysctl, _sysctl_value), _TEXT, True),
    "ulimits": (lambda value: _map(value, _rlimit_name, _rlimit), _TEXT, True),
    "extra_groups": (_groups, values.listed),
}


def written(document: Document) -> Document:
    """A document in normal form changed for an annotation, so that parsing gives the same document again."""
    resources = document.get("resources")
    if not isinstance(resources, dict) or "cpu" not in resources:
        return document
    return {**document, "resources": {**resources, "cpu": f"{resources['cpu']}m"}}
