"""The command lines of runc, crun and youki, as they really are.

Three parsers read the same words differently: runc's (Go, urfave/cli v1) moves a verb's options before its
arguments and knows -name for --name; crun's (GNU argp) stops at the first argument, and knows abbreviations and
clusters; youki's (clap) takes options anywhere.  The tables below are theirs, version by version together; the
launcher's tables are these, without what only one of the three knows (a test compares them).

Part of the create path: no imports.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Optional, Tuple

    # A reader of options: (words, options) -> (options with values, arguments, certain).
    Found = List[Tuple[str, str]]
    Reader = Callable[[List[str], Dict[str, str]], Tuple[Found, List[str], bool]]

KINDS = ("runc", "youki", "crun")

# Verbs that read config.json.
EDITED = frozenset(("create", "run", "restore"))

# Options that print something and leave, whatever else is there.
EXITS = frozenset(("help", "h", "version", "v", "V", "?", "usage"))

_UPDATE = (
    "blkio-weight= cpu-period= cpu-quota= cpu-rt-period= cpu-rt-runtime= cpu-share= cpuset-cpus= cpuset-mems= "
    "l3-cache-schema= mem-bw-schema= memory= memory-reservation= memory-swap= pids-limit= resources= r= "
)
_CRIU = "ext-unix-sk file-locks image-path= manage-cgroups-mode= shell-job tcp-established work-path= "
_EXEC = (
    "apparmor= cap= cgroup= console-socket= cwd= detach d env= e= no-new-privs pid-file= preserve-fds= process= p= "
    "process-label= user= u= "
)
_CREATE = "bundle= b= console-socket= no-new-keyring no-pivot pid-file= preserve-fds= "

# kind -> verb ("" for what comes before it) -> options: "name" alone, "name=" with a value, "name?" with one only in
# the same word.  A verb that is not here has none.
OPTIONS: Dict[str, Dict[str, str]] = {
    "runc": {
        "": "criu= debug help h log= log-format= root= rootless= systemd-cgroup version v",
        "checkpoint": _CRIU + "auto-dedup empty-ns= lazy-pages leave-running link-remap page-server= parent-path= "
        "pre-dump status-fd= tcp-skip-in-flight",
        "create": _CREATE + "pidfd-socket=",
        "delete": "force f",
        "events": "interval= stats",
        "exec": _EXEC + "additional-gids= g= c= ignore-paused no-subreaper pidfd-socket= tty t",
        "kill": "all a",
        "list": "format= f= quiet q",
        "ps": "format= f=",
        "restore": _CRIU + "auto-dedup bundle= b= console-socket= detach d empty-ns= lazy-pages lsm-mount-context= "
        "lsm-profile= no-pivot no-subreaper pid-file=",
        "run": _CREATE + "detach d keep no-subreaper pidfd-socket=",
        "spec": "bundle= b= rootless",
        "update": _UPDATE + "cpu-burst= cpu-idle= kernel-memory= kernel-memory-tcp=",
    },
    "youki": {
        "": "debug help h log= l= log-format= log-level= root= r= systemd-cgroup s systemd-log version v",
        "checkpointt": _CRIU + "leave-running link-remap",
        "completion": "shell= s=",
        "create": _CREATE + "c= p=",
        "delete": "force f",
        "events": "interval= stats",
        "exec": _EXEC + "additional-gids= g= ignore-paused tty t",
        "kill": "all a",
        "list": "format= quiet q",
        "ps": "format= f=",
        "run": _CREATE + "c= p= detach d keep no-subreaper",
        "spec": "bundle= b= rootless",
        "update": _UPDATE,
    },
    "crun": {
        "": "cgroup-manager= debug help ? log= log-format= log-level= root= rootless= systemd-cgroup usage version v V",
        "checkpoint": _CRIU + "leave-running network-lock parent-path= pre-dump",
        "create": _CREATE + "config= f= no-subreaper",
        "delete": "force f regex r",
        "exec": _EXEC + "c= tty? t?",
        "kill": "all a regex r",
        "list": "format= f= quiet q",
        "ps": "format= f=",
        "restore": _CRIU + "bundle= b= console-socket= detach d lsm-mount-context= lsm-profile= network-lock "
        "pid-file= tcp-close",
        "run": _CREATE + "config= f= detach d keep no-subreaper",
        "spec": "bundle= b= file= f= rootless",
        "update": _UPDATE + "kernel-memory= kernel-memory-tcp=",
    },
}

_VERBS = frozenset(verb for table in OPTIONS.values() for verb in table) | frozenset(
    ("features", "info", "init", "mounts", "pause", "resume", "start", "state")
)
# What every command of a kind knows besides.  (argp's two hidden ones are program-name and HANG.)
_ALWAYS = {"runc": "help h", "youki": "help h", "crun": "help ? usage program-name= HANG?"}
# runc's verbs that keep options where they are: what follows the id is another program's.
_IN_PLACE = frozenset(("exec", "ps"))
_SHORT = {"b": "bundle", "f": "config", "r": "root", "l": "log", "s": "systemd-cgroup"}
_FALSE = frozenset(("0", "f", "F", "false", "FALSE", "False"))


class Invocation:
    """What a command line says.

    `verb` is the first argument ("" when none, `index` is its place), `edited` whether it is a create, run or
    restore (and no --help), `id` the container, `bundle` "" for the working directory, `config` crun's --config.
    `words` are the arguments after the verb: with `certain` false, the id may be any of them.  `certain` is false
    where an option is unknown, or where the runtimes would read the words differently: the runtime, which knows,
    still gets them as they are.  `verb_certain`: the same for the verb alone.
    """

    __slots__ = (
        "verb",
        "index",
        "edited",
        "bundle",
        "config",
        "id",
        "words",
        "root",
        "log",
        "log_format",
        "systemd_cgroup",
        "cgroup_manager",
        "certain",
        "verb_certain",
    )

    def __init__(self) -> None:
        self.verb = self.bundle = self.config = self.id = self.root = self.log = self.log_format = (
            self.cgroup_manager
        ) = ""
        self.index = -1
        self.edited = self.systemd_cgroup = False
        self.words: List[str] = []
        self.certain = self.verb_certain = True

    def same(self, other: Invocation) -> bool:
        """Do both say the same about everything that matters to Chandler?"""
        return all(getattr(self, name) == getattr(other, name) for name in _COMPARED)


_COMPARED = ("verb", "index", "edited", "bundle", "config", "id", "root", "log")


def config_path(call: Invocation) -> str:
    """The config.json that a create, run or restore reads, absolute or relative to the working directory."""
    if call.config and call.config != "config.json":  # crun looks for this one name in the bundle, for others here
        return call.config
    return f"{call.bundle}/config.json" if call.bundle else "config.json"


def parse(argv: List[str], kind: str = "") -> Invocation:
    """`argv`, without the program's name, as a runtime of this kind reads it; "" when the kind is not known yet.

    Without a kind, the result is certain where all parsers that know every option agree.  Raises nothing.
    """
    if kind:
        return _read(argv, kind)
    readings = [_read(argv, each) for each in KINDS]
    certain = [reading for reading in readings if reading.certain]
    first = (certain or [reading for reading in readings if reading.verb_certain] or readings)[0]
    first.certain = bool(certain) and all(first.same(other) for other in certain)
    return first


def _read(argv: List[str], kind: str) -> Invocation:
    call = Invocation()
    table = OPTIONS[kind]
    reader = _READERS[kind]
    # Words before the verb end at the first argument, in all three.
    found, rest, call.certain = (_argp if kind == "crun" else _go if kind == "runc" else _clap_globals)(
        argv, _options(kind, table[""])
    )
    leaves = _note(call, found)
    if not call.certain:
        rest = argv[_verb_at(argv, len(argv) - len(rest)) :]
        call.verb_certain = False
    if not rest:
        return call
    call.verb, call.index = rest[0], len(argv) - len(rest)
    roots = call.root, call.log, call.log_format
    if kind == "runc" and call.verb not in _IN_PLACE:
        reader = _go_reordered
    if kind == "youki" and call.verb not in EDITED:
        reader = _clap_id
    found, call.words, certain = reader(rest[1:], _options(kind, table.get(call.verb, "")))
    leaves = _note(call, found) or leaves
    call.root, call.log, call.log_format = roots  # delete -r is not --root
    call.edited = call.verb in EDITED and not leaves
    if call.edited:
        call.certain = call.certain and certain and len(call.words) == 1
        if not call.certain and not call.bundle:
            # An unknown option's value may have hidden the rest.
            _note(call, _clap(rest[1:], _options(kind, table.get(call.verb, "")))[0])
            call.root, call.log, call.log_format = roots
    else:
        call.bundle = call.config = ""
        call.certain = call.certain and certain
    if call.words:
        # After an unknown option the id of a create is rather the last word: the others are that option's value.
        call.id = call.words[-1 if call.edited and not call.certain else 0]
    return call


def _verb_at(argv: List[str], otherwise: int) -> int:
    """Where the verb is, as far as one can tell when an option is unknown and may or may not take the next word."""
    takes: Dict[str, str] = {}
    for kind in KINDS:
        takes.update(_options(kind, OPTIONS[kind][""]))
    at = 0
    while at < len(argv) and argv[at][:1] == "-":
        name, equals, _ = argv[at].lstrip("-").partition("=")
        if name not in takes and not equals:
            return next((place for place in range(at, len(argv)) if argv[place] in _VERBS), otherwise)
        at += 1 if equals or takes[name] != "=" else 2
    return min(at, len(argv))


def _options(kind: str, table: str) -> Dict[str, str]:
    """name -> "", "=" or "?"."""
    result = {}
    for word in f"{table} {_ALWAYS[kind]}".split():
        name = word.rstrip("=?") or "?"
        result[name] = word[len(name) :]
    return result


def _note(call: Invocation, found: Found) -> bool:
    """Keeps the options that matter to us; true when one of them prints and leaves."""
    leaves = False
    for name, value in found:
        name = _SHORT.get(name, name)
        if name in ("bundle", "config", "root", "log"):
            setattr(call, name, value)
        elif name == "log-format":
            call.log_format = value
        elif name == "cgroup-manager":
            call.cgroup_manager = value
        elif name == "systemd-cgroup":
            call.systemd_cgroup = value not in _FALSE
        elif name in EXITS and value not in _FALSE:
            leaves = True
    return leaves


def _go(words: List[str], options: Dict[str, str]) -> Tuple[Found, List[str], bool]:
    """Go's flag package: -x and --x alike, an end at the first argument or after --."""
    found: Found = []
    certain = True
    at = 0
    while at < len(words):
        word = words[at]
        if len(word) < 2 or word[0] != "-":
            break
        at += 1
        if word == "--":
            break
        name, equals, value = word[2 if word[1] == "-" else 1 :].partition("=")
        takes = options.get(name)
        if takes is None:
            certain = False
        elif takes and not equals:
            if at == len(words):
                return found, [], False
            found.append((name, words[at]))
            at += 1
        else:
            found.append((name, value))
    return found, words[at:], certain


def _go_reordered(words: List[str], options: Dict[str, str]) -> Tuple[Found, List[str], bool]:
    """urfave/cli v1 before Go's flag package: a verb's options, with what follows them, come before its arguments."""
    early: List[str] = []
    late: List[str] = []
    follows = False
    for at, word in enumerate(words):
        known = (
            len(word) > 1
            and word[0] == "-"
            and word != "--"
            and (word[2 if word[1] == "-" else 1 :].partition("=")[0] in options)
        )
        if follows and not known:
            follows = False
            early.append(word)
        elif word == "--":
            late = ["--", *late, *words[at + 1 :]]
            break
        elif known:
            early.append(word)
            follows = "=" not in word
        else:
            late.append(word)
    return _go(early + late, options)


def _argp(words: List[str], options: Dict[str, str]) -> Tuple[Found, List[str], bool]:
    """GNU argp in order: abbreviations of long options, clusters of short ones, an end at the first argument."""
    found: Found = []
    certain = True
    at = 0
    while at < len(words):
        word = words[at]
        if len(word) < 2 or word[0] != "-":
            break
        at += 1
        if word == "--":
            break
        if word[1] == "-":
            name, equals, value = word[2:].partition("=")
            full = _abbreviated(name, options)
            cluster = [(full, value if equals else None)] if full else []
            certain = certain and bool(full)
        else:
            cluster = []
            for place, name in enumerate(word[1:], 2):
                takes = options.get(name)
                if takes is None:
                    certain = False
                    break
                if takes:
                    cluster.append((name, word[place:] or None))
                    break
                cluster.append((name, None))
        for name, given in cluster:
            takes = options[name]
            if given is not None and not takes:
                certain = False
            if takes == "=" and given is None:
                if at == len(words):
                    return found, [], False
                given = words[at]
                at += 1
            found.append((name, given or ""))
    return found, words[at:], certain


def _abbreviated(name: str, options: Dict[str, str]) -> str:
    """The long option that `name` stands for, or "" when there is none or more than one."""
    if len(name) > 1 and name in options:
        return name
    matches = [option for option in options if len(option) > 1 and option.startswith(name)]
    return matches[0] if len(matches) == 1 else ""


def _clap(words: List[str], options: Dict[str, str], stops: bool = False) -> Tuple[Found, List[str], bool]:
    """clap: options anywhere, clusters of short ones, -bDIR, -b=DIR; a value does not begin with -."""
    found: Found = []
    arguments: List[str] = []
    certain = True
    at = 0
    while at < len(words):
        word = words[at]
        if len(word) < 2 or word[0] != "-":
            if stops:
                return found, words[at:], certain
            arguments.append(word)
            at += 1
            continue
        at += 1
        if word == "--":
            return found, arguments + words[at:], certain
        cluster: List[Tuple[str, Optional[str]]] = []
        if word[1] == "-":
            name, equals, value = word[2:].partition("=")
            cluster.append((name, value if equals else None))
        else:
            for place, name in enumerate(word[1:], 2):
                if options.get(name):
                    value = word[place:]
                    cluster.append((name, (value[1:] if value[0] == "=" else value) if value else None))
                    break
                cluster.append((name, None))
        for name, given in cluster:
            takes = options.get(name)
            if takes is None or (given is not None and not takes):
                certain = False
                continue
            if takes and given is None:
                if at == len(words) or (words[at][:1] == "-" and words[at] != "-"):
                    certain = False
                    continue
                given = words[at]
                at += 1
            found.append((name, given or ""))
    return found, arguments, certain


def _clap_globals(words: List[str], options: Dict[str, str]) -> Tuple[Found, List[str], bool]:
    """Before the verb, -- makes the verb an argument, which youki has none of."""
    found, rest, certain = _clap_id(words, options)
    return found, rest, certain and words[len(words) - len(rest) - 1 : len(words) - len(rest)] != ["--"]


def _clap_id(words: List[str], options: Dict[str, str]) -> Tuple[Found, List[str], bool]:
    """As far as the first argument: what follows may be another program's, and is nothing to us."""
    return _clap(words, options, stops=True)


_READERS: Dict[str, Reader] = {"runc": _go, "youki": _clap, "crun": _argp}
