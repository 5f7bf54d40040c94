"""Completions in real shells: every command and option, choices, files, and values that `chandler` prints."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import REPOSITORY, needs

from shim.cli import main

BASH_COMPLETION = "/usr/share/bash-completion/bash_completion"
# What the shell is told of, and what stands where the cursor is.
Complete = Callable[[str], set[str]]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three completion files, and a `chandler` that prints what a node would."""
    directory = tmp_path_factory.mktemp("completions")
    subprocess.run(
        [
            sys.executable,
            "-I",
            f"{REPOSITORY}/packaging/completions.py",
            *(f"{shell}={directory}/{shell}" for shell in ("bash", "fish")),
            f"zsh={directory}/_chandler",
        ],
        check=True,
    )
    (directory / "bin").mkdir()
    program = directory / "bin/chandler"
    program.write_text(
        '#!/bin/sh\ncase $* in\n"cdi list") printf "DEVICE FILE\\nnvidia.com/gpu=0 x\\nnvidia.com/gpu=all y\\n" ;;\n'
        'leases) printf "CONTAINER  DEVICES\\nweb-1  nvidia.com/gpu=0\\nweb-2  nvidia.com/gpu=1\\n" ;;\nesac\n'
    )
    program.chmod(0o755)
    (directory / "work/folder").mkdir(parents=True)
    (directory / "work/file.yaml").touch()
    return directory


def shell(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"not installed: {name}")
    return found


def words(scripts: Path, *command: str) -> set[str]:
    done = subprocess.run(
        command,
        cwd=scripts / "work",
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=60,
        env={
            "PATH": f"{scripts}/bin:/usr/bin:/bin",
            "HOME": str(scripts),
            "TERM": "dumb",
            "XDG_CONFIG_HOME": str(scripts),
            "XDG_DATA_HOME": str(scripts),
        },
    )
    assert not done.stderr, done.stderr
    return {line.rstrip("/ ") for line in done.stdout.splitlines() if line.strip()}


def in_bash(scripts: Path, line: str) -> set[str]:
    """As readline does: the line is split at COMP_WORDBREAKS."""
    if not os.path.exists(BASH_COMPLETION):
        pytest.skip("not installed: bash-completion")
    parts = [part for word in line.split(" ") for part in (re.findall(r"[=:]+|[^=:]+", word) or [""])]
    script = (
        f"source {BASH_COMPLETION}; source {scripts}/bash; compopt() {{ :; }}; "
        f"COMP_WORDS=({' '.join(repr(part) for part in parts)}); COMP_CWORD={len(parts) - 1}; COMP_LINE={line!r}; "
        f"COMP_POINT={len(line)}; _chandler; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    before = re.split("[=:]", line.split(" ")[-1])
    cut = line.split(" ")[-1][: -len(before[-1]) or None] if len(before) > 1 else ""
    cut = "" if cut.startswith("--") else cut
    return {cut + word for word in words(scripts, shell("bash"), "--norc", "-c", script)}


# zsh completes only while a line is edited, so it needs a terminal; compadd is replaced to print its words.
ZSH = r"""
zmodload zsh/zpty
zpty z zsh -f -i || exit 1
zpty -w z 'PS1=; unsetopt zle_bracketed_paste; fpath=($MADE $fpath); autoload -Uz compinit; compinit -u -d $MADE/dump
compadd() {
  local -a found hits
  case ${@[(r)-[OAD]]} in ?*) builtin compadd "$@"; return ;; esac
  builtin compadd -A hits "$@"
  print -rl -- ${(q)hits/#/HIT:} >>$MADE/out
  builtin compadd "$@"
}
zstyle ":completion:*" verbose no
finish() { print END >>$MADE/out }
bindkey "^I" complete-word
zle -N finish; bindkey "^X" finish; print READY'
while zpty -r z line; do [[ $line = *READY* && $line != *print* ]] && break; done
zpty -w -n z "$LINE"$'\t'$'\x18'
until [[ -e $MADE/out ]] && grep -q END $MADE/out; do zpty -r -t z line || sleep 0.02; done
zpty -d z
sed -n 's/^HIT://p' $MADE/out
"""


def in_zsh(scripts: Path, line: str) -> set[str]:
    if reason := needs.terminals():
        pytest.skip(reason)
    (scripts / "out").unlink(missing_ok=True)
    found = words(scripts, shell("env"), f"MADE={scripts}", f"LINE={line}", shell("zsh"), "-f", "-c", ZSH)
    return {re.sub(r"\\(.)", r"\1", word) for word in found}


def in_fish(scripts: Path, line: str) -> set[str]:
    found = words(scripts, shell("fish"), "--no-config", "-c", f"source {scripts}/fish; complete -C {line!r}")
    return {word.partition("\t")[0].rstrip("/") for word in found}


SHELLS = {"bash": in_bash, "zsh": in_zsh, "fish": in_fish}


@pytest.fixture(params=SHELLS)
def complete(request: pytest.FixtureRequest, scripts: Path) -> Complete:
    return lambda line: SHELLS[request.param](scripts, line)


def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, set[str], set[str]]]:
    """Every command with its subcommands and its options."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    yield (
        name,
        {word for action in below for word in action.choices},
        {option for action in parser._actions for option in action.option_strings},
    )
    for action in below:
        for word, child in action.choices.items():
            yield from parsers(child, f"{name} {word}".strip())


COMMANDS = list(parsers(main.parser()))


def test_commands(complete: Complete) -> None:
    assert complete("chandler ") == next(commands for name, commands, _ in COMMANDS if not name)
    assert complete("chandler cdi ") == next(commands for name, commands, _ in COMMANDS if name == "cdi")
    assert complete("chandler cdi d") == {"dirs", "diff"}


@pytest.mark.parametrize("name", ["bash", "fish"])
def test_every_option_of_every_command(scripts: Path, name: str) -> None:
    for command, _, options in COMMANDS:
        found = SHELLS[name](scripts, f"chandler {command} -".replace("  ", " "))
        assert {option for option in options if option.startswith("--")} <= found <= options, command


def test_options(complete: Complete) -> None:
    assert complete("chandler cdi show --s") == {"--spec-dir"}
    assert complete("chandler bundle run --ho") == {"--hostname", "--host-network"}


def test_values(complete: Complete) -> None:
    assert complete("chandler cdi generate --vendor ") == {"nvidia", "amd", "intel", "gaudi", "npu", "all"}
    assert complete("chandler cdi generate --dry-run --mode wsl --format ") == {"json", "yaml"}
    assert complete("chandler leases --format j") == {"json"}
    assert complete("chandler cdi validate ") == {"file.yaml", "folder"}
    assert complete("chandler explain --bundle ") == {"folder"}


def test_names_of_devices_and_leases(complete: Complete) -> None:
    assert complete("chandler cdi show nvidia.com/gpu=") == {"nvidia.com/gpu=0", "nvidia.com/gpu=all"}
    assert complete("chandler cdi inject --config file.yaml nvidia.com/gpu=a") == {"nvidia.com/gpu=all"}
    assert complete("chandler leases release ") == {"web-1", "web-2"}
