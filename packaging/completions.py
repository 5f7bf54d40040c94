#!/usr/bin/python3
"""completions.py SHELL=FILE...: writes completions of `chandler` for bash, zsh or fish, from the parser of its options.

packaging/install calls it.  The completions of each shell come from one table: the kind of a word, by the command and
the option before it.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Callable, NamedTuple

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.dont_write_bytecode = True

from shim.cli import main

# Metavar: kind of the word.  Any other metavar stands for a word that only the user knows.
KINDS = {"FILE": "file", "DIR": "directory", "BUNDLE": "directory", "USER": "user", "DEVICE": "device"}
# (Command, positional argument): kind of the word, for arguments that name a device or a lease.
NAMED = {("cdi show", "name"): "device", ("leases release", "id"): "lease"}
# Kind: the command that prints the words, in the first column of a table with a heading.
SOURCES = {"device": "chandler cdi list", "lease": "chandler leases"}


class Command(NamedTuple):
    """A command.  `name`: all its words.  `options`: name, kind of the value ('' for none; 'one of a b'), help text."""

    name: str
    help: str
    subcommands: list[str]
    options: list[tuple[str, str, str]]
    words: str  # the kind of its positional arguments


def commands(parser: argparse.ArgumentParser, name: str = "", help: str = "") -> list[Command]:
    """A command and all commands below it."""
    subcommands: list[str] = []
    options: list[tuple[str, str, str]] = []
    words = ""
    below: list[Command] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            help_texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for word, child in action.choices.items():
                subcommands.append(word)
                below += commands(child, f"{name} {word}".strip(), help_texts.get(word, ""))
        elif action.option_strings:
            kind = "" if action.nargs == 0 else _kind(name, action) or "text"
            options += [(option, kind, action.help or "") for option in action.option_strings]
        else:
            words = words or _kind(name, action)
    return [Command(name, help, subcommands, options, words), *below]


def _kind(name: str, action: argparse.Action) -> str:
    if action.choices is not None:
        return "one of " + " ".join(map(str, action.choices))
    return NAMED.get((name, action.dest)) or KINDS.get(str(action.metavar), "")


def _rows(table: list[Command]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Two dicts by the kind of a word: the options that take such a word ("COMMAND OPTION"), and the commands."""
    values: dict[str, list[str]] = {}
    words: dict[str, list[str]] = {}
    for command in table:
        for option, kind, _ in command.options:
            if kind:
                values.setdefault(kind, []).append(f"{command.name} {option}")
        if command.words:
            words.setdefault(command.words, []).append(command.name)
    return values, words


# --- bash and zsh -------------------------------------------------------------------------------------------------

BASH = """\
# bash completions for chandler(1).  Made by packaging/completions.py from its command line.
_chandler() {
    local cur prev words cword command= word
    _get_comp_words_by_ref -n =: cur prev words cword
    case $cur in
    --*=*) prev=${cur%%=*} cur=${cur#*=} ;;
    esac
    for word in "${words[@]:1:cword-1}"; do
        case "$command $word" in
        @COMMANDS@) command=${command:+$command }$word ;;
        esac
    done
    COMPREPLY=()
    case "$command $prev" in
@VALUES@
    esac
    case $cur in
    -*)
        case $command in
@OPTIONS@
        esac
        return
        ;;
    esac
    case $command in
@SUBCOMMANDS@
    esac
    case $command in
@WORDS@
    esac
}
_chandler_words() {
    COMPREPLY=($(compgen -W "$1" -- "$cur"))
    # readline has cut the word at = and :, which device names have
    local before=${cur%"${cur##*[=:]}"}
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -F _chandler chandler
"""
BASH_KINDS = {
    "file": 'compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur"))',
    "directory": 'compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur"))',
    "user": 'COMPREPLY=($(compgen -u -- "$cur"))',
    "text": ":",
}
ZSH = """\
#compdef chandler
# zsh completions for chandler(1).  Made by packaging/completions.py from its command line.
_chandler() {
    local cur=$words[CURRENT] prev=$words[CURRENT-1] command= word
    if [[ $cur == --*=* ]]; then
        prev=${cur%%=*} cur=${cur#*=}
        compset -P 1 '*='
    fi
    for word in "${(@)words[2,CURRENT-1]}"; do
        case "$command $word" in
        @COMMANDS@) command=${command:+$command }$word ;;
        esac
    done
    local -a found
    case "$command $prev" in
@VALUES@
    esac
    if [[ $cur == -* ]]; then
        case $command in
@OPTIONS@
        esac
        _describe -o option found
        return
    fi
    case $command in
@SUBCOMMANDS@
    esac
    case $command in
@WORDS@
    esac
}
_chandler "$@"
"""
ZSH_KINDS = {"file": "_files", "directory": "_files -/", "user": "_users", "text": ":"}


def _source(command: str) -> str:
    return f"$({command} 2>/dev/null | awk 'NR > 1 {{ print $1 }}')"


def _bash(kind: str) -> str:
    if kind.startswith("one of "):
        return f"_chandler_words '{kind[7:]}'"
    return BASH_KINDS.get(kind) or f'_chandler_words "{_source(SOURCES[kind])}"'


def _zsh(kind: str) -> str:
    if kind.startswith("one of "):
        return f"compadd -- {kind[7:]}"
    return ZSH_KINDS.get(kind) or f'compadd -- ${{(f)"{_source(SOURCES[kind])}"}}'


def _patterns(names: list[str]) -> str:
    return " | ".join(f"'{name}'" for name in names)


def _described(pairs: list[tuple[str, str]]) -> str:
    """The array for zsh's _describe, whose entries have the form word:description."""

    def plain(text: str) -> str:
        return text.replace("\\", "").replace("'", "’").replace(":", "\\:")

    return "found=(" + " ".join(f"'{word}:{plain(text)}'" for word, text in pairs) + ")"


def sh(table: list[Command], zsh: bool) -> str:
    """The completions for zsh, or for bash."""
    values, words = _rows(table)
    help_texts = {command.name: command.help for command in table}
    completion = _zsh if zsh else _bash
    options, subcommands = [], []
    for command in table:
        name = f"'{command.name}'"
        pairs = [(option, text) for option, _, text in command.options]
        act = _described(pairs) if zsh else _bash("one of " + " ".join(option for option, _ in pairs))
        options.append(f"        {name}) {act} ;;")
        if command.subcommands:
            pairs = [(word, help_texts[f"{command.name} {word}".strip()]) for word in command.subcommands]
            act = (
                _described(pairs) + "; _describe command found"
                if zsh
                else _bash("one of " + " ".join(command.subcommands))
            )
            subcommands.append(f"    {name}) {act} ;;")
    fill = {
        "@COMMANDS@": _patterns([f"{command.name} {word}" for command in table for word in command.subcommands]),
        "@VALUES@": "\n".join(
            f"    {_patterns(names)}) {completion(kind)}; return ;;" for kind, names in values.items()
        ),
        "@OPTIONS@": "\n".join(options),
        "@SUBCOMMANDS@": "\n".join(subcommands),
        "@WORDS@": "\n".join(f"    {_patterns(names)}) {completion(kind)} ;;" for kind, names in words.items()),
    }
    text = ZSH if zsh else BASH
    for mark, filling in fill.items():
        text = text.replace(mark, filling)
    return text


# --- fish ---------------------------------------------------------------------------------------------------------

FISH = """\
# fish completions for chandler(1).  Made by packaging/completions.py from its command line.
function __chandler_at
    set -l command
    for word in (commandline -opc)[2..-1]
        contains -- (string join -- ' ' $command $word) @COMMANDS@; and set -a command $word
    end
    test "$command" = "$argv[1]"
end
complete -c chandler -f
"""
FISH_KINDS = {
    "file": "-F",
    "directory": "-a '(__fish_complete_directories)'",
    "user": "-a '(__fish_complete_users)'",
    "text": "",
    "": "",
}


def _fish(kind: str) -> str:
    if kind.startswith("one of "):
        return f"-a '{kind[7:]}'"
    return (
        FISH_KINDS[kind]
        if kind in FISH_KINDS
        else f'-a \'({SOURCES[kind]} 2>/dev/null | string replace -rf "^([^ ]+) .*" "\\$1" | tail -n +2)\''
    )


def fish(table: list[Command]) -> str:
    """The completions for fish."""

    def text(words: str) -> str:
        return "'" + words.replace("\\", "").replace("'", "\\'") + "'"

    lines = []
    for command in table:
        at = f"complete -c chandler -n '__chandler_at \"{command.name}\"'"
        for word in command.subcommands:
            full = f"{command.name} {word}".strip()
            help_text = next(other.help for other in table if other.name == full)
            lines.append(f"{at} -a {word} -d {text(help_text)}")
        for option, kind, help in command.options:
            form = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            value = f" -r {_fish(kind)}" if kind == "file" else f" -x {_fish(kind)}" if kind else ""
            lines.append(f"{at} {form}{value.rstrip()} -d {text(help)}")
        if command.words:
            lines.append(f"{at} {_fish(command.words)}")
    command_names = [f"{command.name} {word}".strip() for command in table for word in command.subcommands]
    return FISH.replace("@COMMANDS@", " ".join(f"'{name}'" for name in command_names)) + "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[list[Command]], str]] = {
    "bash": lambda table: sh(table, False),
    "zsh": lambda table: sh(table, True),
    "fish": fish,
}

if __name__ == "__main__":
    table = commands(main.parser())
    for argument in sys.argv[1:]:
        shell, _, path = argument.partition("=")
        with open(path, "w", encoding="utf-8") as file:
            file.write(SHELLS[shell](table))
