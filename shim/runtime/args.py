"""Reads a command line as runc, crun or youki does.

Their three parsers read the same words in different ways:
- runc's (Go, urfave/cli v1) moves a verb's options before its arguments, and takes -name for --name.
- crun's (GNU argp) stops at the first argument, and takes abbreviations of long options and clusters of short ones.
- youki's (clap) takes options anywhere.
The tables below have the options of all known versions of each.  After a change run `make launcher`, which writes them
into the launcher.

Part of the create path: no imports.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Dict, List, Optional, Tuple

    Given = List[Tuple[str, str]]  # the options of a command line, as (name, value)
    # A reader of options: (words, table of _options) -> (options, arguments, whether the reading is certain)
    Reader = Callable[[List[str], Dict[str, str]], Tuple[Given, List[str], bool]]

KINDS = ("runc", "youki", "crun")

# Verbs that read config.json.
EDITED = frozenset(("create", "run", "restore"))

# Options with which a runtime prints something and exits, whatever else the command line says.
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

# kind -> verb ("" for the options before it) -> options.  "name" takes no value, "name=" takes one, "name?" takes one
# only in the same word.  A verb that is not in the table has no options.
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
        # the spelling of youki itself
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
# The options that every command of a kind has as well.  (program-name and HANG are hidden options of argp.)
_ALWAYS = {"runc": "help h", "youki": "help h", "crun": "help ? usage program-name= HANG?"}
# The verbs whose options runc does not move: what follows the id is another program's command line.
_IN_PLACE = frozenset(("exec", "ps"))
_SHORT = {"b": "bundle", "f": "config", "r": "root", "l": "log", "s": "systemd-cgroup"}
_FALSE = frozenset(("0", "f", "F", "false", "FALSE", "False"))


class Invocation:
    """What a command line says.

    `verb`: the first argument, "" for none; `index`: its index in argv, -1 for none.
    `edited`: the verb is create, run or restore, and no option makes the runtime only print something.
    `id`: the container; `bundle`: --bundle, "" for the working directory; `config`: crun's --config.
    `words`: the arguments after the verb.  When `certain` is false, any of them may be the id.
    `certain`: false where an option is unknown, or where the runtimes would read the words in different ways.  The
    runtime gets the words unchanged in any case.  `verb_certain`: the same for the verb alone.
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
        """Whether both say the same about everything that Chandler uses."""
        return all(getattr(self, name) == getattr(other, name) for name in _COMPARED)


_COMPARED = ("verb", "index", "edited", "bundle", "config", "id", "root", "log")


def config_path(call: Invocation) -> str:
    """The config.json that a create, run or restore reads: absolute, or relative to the working directory."""
    # crun looks for this one name in the bundle, and for any other in the working directory.
    if call.config and call.config != "config.json":
        return call.config
    return f"{call.bundle}/config.json" if call.bundle else "config.json"


def parse(argv: List[str], kind: str = "") -> Invocation:
    """`argv`, without the program's name, as a runtime of this kind reads it; "" for a kind that is not known yet.

    Without a kind, the result is certain where all parsers that know every option agree.  Never raises.
    """
    if kind:
        return _read(argv, kind)
    readings = [_read(argv, each) for each in KINDS]
    certain = [reading for reading in readings if reading.certain]
    best = (certain or [reading for reading in readings if reading.verb_certain] or readings)[0]
    best.certain = bool(certain) and all(best.same(other) for other in certain)
    return best


def _read(argv: List[str], kind: str) -> Invocation:
    call = Invocation()
    table = OPTIONS[kind]
    reader = READERS[kind]
    # In all three, the options before the verb end at the first argument.
    given, rest, call.certain = (_argp if kind == "crun" else _go if kind == "runc" else _clap_globals)(
        argv, options_of(kind, table[""])
    )
    exits = _note(call, given)
    if not call.certain:
        rest = argv[_verb_at(argv, len(argv) - len(rest)) :]
        call.verb_certain = False
    if not rest:
        return call
    call.verb, call.index = rest[0], len(argv) - len(rest)
    before_verb = call.root, call.log, call.log_format
    if kind == "runc" and call.verb not in _IN_PLACE:
        reader = _go_reordered
    if kind == "youki" and call.verb not in EDITED:
        reader = _clap_id
    given, call.words, certain = reader(rest[1:], options_of(kind, table.get(call.verb, "")))
    exits = _note(call, given) or exits
    call.root, call.log, call.log_format = before_verb  # after the verb, -r is another option: delete's is --regex
    call.edited = call.verb in EDITED and not exits
    if call.edited:
        call.certain = call.certain and certain and len(call.words) == 1
        if not call.certain and not call.bundle:
            # The value of an unknown option may have ended the options too early: look for --bundle in all words.
            _note(call, _clap(rest[1:], options_of(kind, table.get(call.verb, "")))[0])
            call.root, call.log, call.log_format = before_verb
    else:
        call.bundle = call.config = ""
        call.certain = call.certain and certain
    if call.words:
        # After an unknown option, the id of a create is most likely the last word: others may be that option's value.
        call.id = call.words[-1 if call.edited and not call.certain else 0]
    return call


def _verb_at(argv: List[str], otherwise: int) -> int:
    """The most likely index of the verb when an option is unknown, and may or may not take the next word as its value.

    After such an option this is the first word that is a known verb; without one, `otherwise`.
    """
    options: Dict[str, str] = {}
    for kind in KINDS:
        options.update(options_of(kind, OPTIONS[kind][""]))
    at = 0
    while at < len(argv) and argv[at][:1] == "-":
        name, equals, _ = argv[at].lstrip("-").partition("=")
        if name not in options and not equals:
            return next((index for index in range(at, len(argv)) if argv[index] in _VERBS), otherwise)
        at += 1 if equals or options[name] != "=" else 2
    return min(at, len(argv))


def options_of(kind: str, table: str) -> Dict[str, str]:
    """A text of options, and those of _ALWAYS, as name -> whether it takes a value: "", "=" or "?" (see OPTIONS)."""
    result = {}
    for word in f"{table} {_ALWAYS[kind]}".split():
        name = word.rstrip("=?") or "?"
        result[name] = word[len(name) :]
    return result


def _note(call: Invocation, given: Given) -> bool:
    """Stores the options that Chandler uses in `call`.  Returns whether one makes the runtime print and exit."""
    exits = False
    for name, value in given:
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
            exits = True
    return exits


def _go(words: List[str], options: Dict[str, str]) -> Tuple[Given, List[str], bool]:
    """Go's flag package: -x means --x; options end at the first argument or after --."""
    given: Given = []
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
                return given, [], False
            given.append((name, words[at]))
            at += 1
        else:
            given.append((name, value))
    return given, words[at:], certain


def _go_reordered(words: List[str], options: Dict[str, str]) -> Tuple[Given, List[str], bool]:
    """urfave/cli v1: moves a verb's options before its arguments, then has Go's flag package read the words.

    With an option moves the word after it, even where the option takes no value.
    """
    options_first: List[str] = []
    arguments: List[str] = []
    after_option = False
    for at, word in enumerate(words):
        is_option = (
            len(word) > 1
            and word[0] == "-"
            and word != "--"
            and (word[2 if word[1] == "-" else 1 :].partition("=")[0] in options)
        )
        if after_option and not is_option:
            after_option = False
            options_first.append(word)
        elif word == "--":
            arguments = ["--", *arguments, *words[at + 1 :]]
            break
        elif is_option:
            options_first.append(word)
            after_option = "=" not in word
        else:
            arguments.append(word)
    return _go(options_first + arguments, options)


def _argp(words: List[str], options: Dict[str, str]) -> Tuple[Given, List[str], bool]:
    """GNU argp in order: abbreviations of long options, clusters of short ones; options end at the first argument."""
    given: Given = []
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
            for following, name in enumerate(word[1:], 2):
                takes = options.get(name)
                if takes is None:
                    certain = False
                    break
                if takes:
                    cluster.append((name, word[following:] or None))
                    break
                cluster.append((name, None))
        for name, attached in cluster:
            takes = options[name]
            if attached is not None and not takes:
                certain = False
            if takes == "=" and attached is None:
                if at == len(words):
                    return given, [], False
                attached = words[at]
                at += 1
            given.append((name, attached or ""))
    return given, words[at:], certain


def _abbreviated(name: str, options: Dict[str, str]) -> str:
    """The long option that `name` stands for, or "" when there is none or more than one."""
    if len(name) > 1 and name in options:
        return name
    matches = [option for option in options if len(option) > 1 and option.startswith(name)]
    return matches[0] if len(matches) == 1 else ""


def _clap(words: List[str], options: Dict[str, str], stops: bool = False) -> Tuple[Given, List[str], bool]:
    """clap: options anywhere, clusters of short ones, -bDIR and -b=DIR; a value does not begin with -.

    `stops`: options end at the first argument.
    """
    given: Given = []
    arguments: List[str] = []
    certain = True
    at = 0
    while at < len(words):
        word = words[at]
        if len(word) < 2 or word[0] != "-":
            if stops:
                return given, words[at:], certain
            arguments.append(word)
            at += 1
            continue
        at += 1
        if word == "--":
            return given, arguments + words[at:], certain
        cluster: List[Tuple[str, Optional[str]]] = []
        if word[1] == "-":
            name, equals, value = word[2:].partition("=")
            cluster.append((name, value if equals else None))
        else:
            for following, name in enumerate(word[1:], 2):
                if options.get(name):
                    value = word[following:]
                    cluster.append((name, (value[1:] if value[0] == "=" else value) if value else None))
                    break
                cluster.append((name, None))
        for name, attached in cluster:
            takes = options.get(name)
            if takes is None or (attached is not None and not takes):
                certain = False
                continue
            if takes and attached is None:
                if at == len(words) or (words[at][:1] == "-" and words[at] != "-"):
                    certain = False
                    continue
                attached = words[at]
                at += 1
            given.append((name, attached or ""))
    return given, arguments, certain


def _clap_globals(words: List[str], options: Dict[str, str]) -> Tuple[Given, List[str], bool]:
    """clap before the verb.  A -- there makes the verb an argument, and youki takes no argument there: not certain."""
    given, rest, certain = _clap_id(words, options)
    return given, rest, certain and words[len(words) - len(rest) - 1 : len(words) - len(rest)] != ["--"]


def _clap_id(words: List[str], options: Dict[str, str]) -> Tuple[Given, List[str], bool]:
    """clap as far as the first argument, the id: what follows may be another program's command line."""
    return _clap(words, options, stops=True)


READERS: Dict[str, Reader] = {"runc": _go, "youki": _clap, "crun": _argp}
