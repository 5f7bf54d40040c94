"""shim.runtime.args against tables of command lines, and against the --help of the installed runtimes."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab import runtimes

from shim.runtime import args

ALL = args.KINDS

# Command line, kinds of runtimes, expected attributes; all other attributes must be as in a new Invocation.
CASES: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    # Words before the verb.
    (
        "--root /r --log /l --log-format json state ID",
        (*ALL, ""),
        {"root": "/r", "log": "/l", "log_format": "json", "verb": "state", "index": 6, "id": "ID"},
    ),
    (
        "--root=/r --log=/l --log-format=json state ID",
        (*ALL, ""),
        {"root": "/r", "log": "/l", "log_format": "json", "verb": "state", "index": 3, "id": "ID"},
    ),
    ("--root create state run", (*ALL, ""), {"root": "create", "verb": "state", "index": 2, "id": "run"}),
    (
        "--systemd-cgroup --debug kill create 9",
        (*ALL, ""),
        {"systemd_cgroup": True, "verb": "kill", "index": 2, "id": "create"},
    ),
    (
        "-root=/r -debug=true -systemd-cgroup=false start ID",
        ("runc", ""),
        {"root": "/r", "verb": "start", "index": 3, "id": "ID"},
    ),
    ("-log /l state ID", ("runc",), {"log": "/l", "verb": "state", "index": 2, "id": "ID"}),
    ("--criu x --rootless true list", ("runc",), {"verb": "list", "index": 4}),
    ("--cgroup-manager disabled --log-level=debug list", ("crun", ""), {"verb": "list", "index": 3}),
    (
        "--syst --roo /r state ID",
        ("crun",),
        {"systemd_cgroup": True, "verb": "state", "index": 3, "id": "ID", "certain": False, "verb_certain": False},
    ),
    ("--deb --log-f json state ID", ("crun",), {"log_format": "json", "verb": "state", "index": 3, "id": "ID"}),
    (
        "-s -l /l -r /r state ID",
        ("youki", ""),
        {"systemd_cgroup": True, "log": "/l", "root": "/r", "verb": "state", "index": 5, "id": "ID"},
    ),
    (
        "-sr/r -l=/l state ID",
        ("youki", ""),
        {"systemd_cgroup": True, "log": "/l", "root": "/r", "verb": "state", "index": 2, "id": "ID"},
    ),
    ("-- state ID", ("runc", "crun", ""), {"verb": "state", "index": 1, "id": "ID"}),
    ("", (*ALL, ""), {"index": -1}),
    ("--version create ID", (*ALL, ""), {"verb": "create", "index": 1, "id": "ID"}),
    ("--help", (*ALL, ""), {"index": -1}),
    # create, run, restore.
    ("create ID", (*ALL, ""), {"verb": "create", "index": 0, "edited": True, "id": "ID"}),
    (
        "create --bundle /b --pid-file create --console-socket run ID",
        (*ALL, ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"},
    ),
    (
        "run --bundle=run -d --preserve-fds 3 create",
        (*ALL, ""),
        {"verb": "run", "index": 0, "edited": True, "bundle": "run", "id": "create"},
    ),
    (
        "create -b /a -b /b ID",
        ("runc", "crun"),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"},
    ),
    (
        "create -b /b --no-pivot --no-new-keyring -- ID",
        (*ALL, ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"},
    ),
    (
        "restore --image-path /i --bundle /b ID",
        ("runc", "crun"),
        {"verb": "restore", "index": 0, "edited": True, "bundle": "/b", "id": "ID"},
    ),
    ("create --help", (*ALL, ""), {"verb": "create", "index": 0}),
    ("create --bundle /b --help ID", (*ALL, ""), {"verb": "create", "index": 0, "id": "ID"}),
    (
        "create --bundle --help ID",
        ("runc", "crun", ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "--help", "id": "ID"},
    ),
    # Only runc: one dash for long names, options after arguments.
    ("create -bundle /b ID", ("runc", ""), {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"}),
    (
        "create ID --bundle /b",
        ("runc", "youki", ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"},
    ),
    (
        "create ID --bundle /b --no-pivot",
        ("runc", "youki", ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"},
    ),
    (
        "create ID --no-pivot --bundle=/b",
        ("runc", ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"},
    ),
    ("create - --bundle /b", ("runc",), {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "-"}),
    ("create -b=/b ID", ("runc", "youki"), {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"}),
    # Only crun: clusters, abbreviations, another config, an end at the first argument.
    ("create -b=/b ID", ("crun",), {"verb": "create", "index": 0, "edited": True, "bundle": "=/b", "id": "ID"}),
    (
        "create -b/b ID",
        ("crun", "youki", ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID"},
    ),
    (
        "run -db/b -f /c ID",
        ("crun", ""),
        {"verb": "run", "index": 0, "edited": True, "bundle": "/b", "config": "/c", "id": "ID"},
    ),
    (
        "create --bund /b --conf=/c ID",
        ("crun", ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "config": "/c", "id": "ID"},
    ),
    ("create --no-piv ID", ("crun",), {"verb": "create", "index": 0, "edited": True, "id": "ID"}),
    ("create --program-name x ID", ("crun",), {"verb": "create", "index": 0, "edited": True, "id": "ID"}),
    ("create --p x ID", ("crun",), {"verb": "create", "index": 0, "edited": True, "id": "ID", "certain": False}),
    (
        "create ID --bundle /b",
        ("crun",),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "/b", "certain": False},
    ),
    # Unknown options: never an error, never certain.
    (
        "create --future --bundle /b ID",
        (*ALL, ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID", "certain": False},
    ),
    (
        "create --future x --bundle /b ID",
        (*ALL, ""),
        {"verb": "create", "index": 0, "edited": True, "bundle": "/b", "id": "ID", "certain": False},
    ),
    (
        "--future x create -b /b ID",
        (*ALL, ""),
        {
            "verb": "create",
            "index": 2,
            "edited": True,
            "bundle": "/b",
            "id": "ID",
            "certain": False,
            "verb_certain": False,
        },
    ),
    (
        "--future=x state create",
        (*ALL, ""),
        {"verb": "state", "index": 1, "id": "create", "certain": False, "verb_certain": False},
    ),
    ("create --bundle", (*ALL, ""), {"verb": "create", "index": 0, "edited": True, "certain": False}),
    ("create", (*ALL, ""), {"verb": "create", "index": 0, "edited": True, "certain": False}),
    # The container of other verbs.
    ("kill --all ID 9", (*ALL, ""), {"verb": "kill", "index": 0, "id": "ID"}),
    ("delete -f ID", (*ALL, ""), {"verb": "delete", "index": 0, "id": "ID"}),
    ("kill -r ID", ("crun", ""), {"verb": "kill", "index": 0, "id": "ID"}),
    ("update -r - --memory 5 ID", (*ALL, ""), {"verb": "update", "index": 0, "id": "ID"}),
    ("exec -t -e A=B --cwd / -u 0 ID create --bundle x", (*ALL, ""), {"verb": "exec", "index": 0, "id": "ID"}),
    ("exec -tu0 ID sh", ("crun",), {"verb": "exec", "index": 0, "id": "ID", "certain": True}),
    ("exec -du 0 ID sh -c run", ("crun", "youki", ""), {"verb": "exec", "index": 0, "id": "ID"}),
    ("exec --process create --detach --pid-file run ID", (*ALL, ""), {"verb": "exec", "index": 0, "id": "ID"}),
    ("ps -f json create -ef", (*ALL, ""), {"verb": "ps", "index": 0, "id": "create"}),
    ("kill ID -9", ALL, {"verb": "kill", "index": 0, "id": "ID"}),
    (
        "checkpoint --image-path create --leave-running ID",
        ("runc", "crun", ""),
        {"verb": "checkpoint", "index": 0, "id": "ID"},
    ),
    ("state --bundle /b ID", (), {}),
    ("spec --bundle /b", (*ALL, ""), {"verb": "spec", "index": 0}),
]


@pytest.mark.parametrize("words, kinds, expected", CASES, ids=[case[0] for case in CASES])
def test_parse(words: str, kinds: tuple[str, ...], expected: dict[str, Any]) -> None:
    for kind in kinds:
        call = args.parse(words.split(), kind)
        plain = args.Invocation()
        for name in args.Invocation.__slots__:
            if name in ("words", "certain") and name not in expected and (name == "words" or not call.edited):
                continue
            if name == "id" and kind == "crun" and words == "exec -tu0 ID sh":
                continue  # -t takes the rest of its word
            if name == "cgroup_manager" and "--cgroup-manager" in words:
                assert call.cgroup_manager == "disabled"
                continue
            assert getattr(call, name) == expected.get(name, getattr(plain, name)), (kind, name)


@pytest.mark.parametrize(
    "words, path",
    [
        ("create ID", "config.json"),
        ("create -b /b ID", "/b/config.json"),
        ("create -b /b -f /c ID", "/c"),
        ("create -b /b -f c ID", "c"),
        ("create -b /b -f config.json ID", "/b/config.json"),
    ],
)
def test_the_config_json_that_crun_reads(words: str, path: str) -> None:
    assert args.config_path(args.parse(words.split(), "crun")) == path


def test_a_command_line_that_runtimes_read_differently_is_not_certain() -> None:
    assert not args.parse(["create", "-b=/b", "ID"]).certain


def test_an_empty_word_is_an_argument() -> None:
    for kind in ("", *ALL):
        assert args.parse(["", "create"], kind).verb == ""
        assert args.parse(["state", ""], kind).id == ""


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    "create",
                    "run",
                    "-",
                    "--",
                    "",
                    "--bundle",
                    "-b",
                    "-f",
                    "--root",
                    "-=",
                    "---",
                    "--=",
                    "-?",
                    "--x=",
                    "=",
                    "-h",
                ]
            ),
            st.text(max_size=5),
        )
    ),
    st.sampled_from(["", *ALL]),
)
def test_parsing_any_words_raises_nothing_and_keeps_the_words(argv: list[str], kind: str) -> None:
    words = list(argv)
    call = args.parse(words, kind)
    assert words == argv
    assert not call.edited or call.verb in args.EDITED
    assert call.index == -1 or argv[call.index] == call.verb


# --- The runtimes themselves.


def options_in_help(kind: str, text: str) -> set[str]:
    """The options in a runtime's --help, as in args.OPTIONS."""
    found: set[str] = set()
    for line in text.splitlines():
        match = re.match(r"\s+(-\S.*)$", line)
        if not match:
            continue
        head = re.split(r"\s{2,}", match[1])[0]
        if kind == "runc":
            found |= {part.split()[0].lstrip("-") + ("=" if " " in part.strip() else "") for part in head.split(", ")}
        else:
            takes = "?" if "[=" in head else "=" if "=" in head or "<" in head else ""
            found |= {re.split(r"\[?[= ]", part.lstrip("-"))[0] + takes for part in head.split(", ")}
    return found


@pytest.mark.parametrize("label", ["runc", "crun", "youki", "newer-runc", "newer-crun"])
def test_the_tables_have_every_option_of_the_installed_runtimes(label: str) -> None:
    runtime = runtimes.named(label)
    if runtime.missing:
        pytest.skip(runtime.missing)
    always = {name + takes for name, takes in args.options_of(runtime.kind, "").items()} | {"help", "h", "usage", "?"}
    asked = 0
    for verb in sorted(
        {verb for table in args.OPTIONS.values() for verb in table} | {"start", "state", "pause", "resume", "features"}
    ):
        done = subprocess.run(
            [runtime.path, *([verb] if verb else []), "--help"],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin"},
        )
        if done.returncode or (verb and not re.search(rf"(?m)^(Usage:|\s+\S*runc\b).*\b{verb}\b", done.stdout)):
            continue  # not one of this version's verbs
        asked += 1
        unknown = (
            options_in_help(runtime.kind, done.stdout) - set(args.OPTIONS[runtime.kind].get(verb, "").split()) - always
        )
        assert not unknown, f"{label} {verb or 'globally'}"
    assert asked > 8


@pytest.mark.parametrize(
    "words, runs",
    [
        (["create", "--bundle", "{b}", "ID"], ALL),
        (["create", "ID", "--bundle", "{b}"], ("runc", "youki")),
        (["create", "-b{b}", "ID"], ("crun", "youki")),
        (["create", "--bund", "{b}", "ID"], ("crun",)),
        (["create", "-bundle", "{b}", "ID"], ("runc",)),
        (["create", "--no-pivot", "ID", "--bundle", "{b}"], ("youki",)),
        (["--", "create", "--bundle", "{b}", "ID"], ("runc", "crun")),
        (["create", "--bundle", "{b}", "--", "ID"], ALL),
        (["create", "-b", "{b}", "-b", "{b}", "ID"], ("runc", "crun")),
        (["create", "--bundle", "{b}", "ID", "X"], ()),
        (["create", "--future", "--bundle", "{b}", "ID"], ()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("label", ["runc", "crun", "youki"])
def test_the_runtime_reads_a_command_line_as_we_do(
    label: str, words: list[str], runs: tuple[str, ...], tmp_path: Any
) -> None:
    """A runtime that gets as far as the bundle either names it or fails because it does not exist."""
    runtime = runtimes.named(label)
    if runtime.missing:
        pytest.skip(runtime.missing)
    bundle = str(tmp_path / "no-bundle")
    argv = ["--root", str(tmp_path / "root"), *(word.replace("{b}", bundle) for word in words)]
    done = subprocess.run(
        [runtime.path, *argv],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode != 0
    reached = bool(re.search("chdir|realpath|os error 2", done.stderr))
    call = args.parse(argv, runtime.kind)
    if runtime.kind in runs:
        assert reached and call.certain and call.bundle == bundle and call.id == "ID", done.stderr
    else:
        assert not reached, done.stderr
