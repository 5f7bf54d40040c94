"""The manual pages: no errors in either formatter, and every option, key and default of the code."""

from __future__ import annotations

import argparse
import functools
import glob
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from lab import REPOSITORY
from packages.test_completions import parsers

from hooks import container
from hooks import main as hooks
from shim.cli import main
from shim.gpu import vendors
from shim.keys import common, row, storage, table
from shim.kubelet import main as kubelet
from shim.node import config
from shim.nri import main as nri
from shim.policy import classes, rules
from shim.request import parse
from shim.state import allocations

PAGES = sorted(glob.glob(f"{REPOSITORY}/packaging/man/*.[1-8]"))


def page(name: str) -> str:
    return next(path for path in PAGES if os.path.basename(path) == name)


@functools.cache
def shown(name: str) -> str:
    """A page as a person reads it, without line breaks in paragraphs."""
    if not shutil.which("mandoc"):
        pytest.skip("not installed: mandoc")
    done = subprocess.run(
        ["mandoc", "-T", "ascii", "-O", "width=1000", page(name)], capture_output=True, text=True, check=True
    )
    return re.sub(".\b", "", done.stdout)


def part(name: str, title: str) -> str:
    """The text below a heading, up to the next."""
    found = re.search(rf"^ *{re.escape(title)}\n(.*?)(?=^ {{0,3}}\S|\Z)", shown(name), re.M | re.S)
    assert found, f"{name} has no heading {title!r}"
    return found[1]


@pytest.mark.parametrize("path", PAGES, ids=os.path.basename)
def test_formatters_report_nothing(path: str) -> None:
    for command in (
        ["mandoc", "-T", "lint", "-W", "warning"],
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z"],
    ):
        if not shutil.which(command[0]):
            pytest.skip(f"not installed: {command[0]}")
        done = subprocess.run([*command, path], capture_output=True, text=True, check=False)
        assert not done.stderr and (command[0] == "man" or not done.stdout), done.stdout + done.stderr


def test_every_reference_is_to_a_page_that_exists() -> None:
    ours = {os.path.basename(path) for path in PAGES}
    for path in PAGES:
        with open(path, encoding="ascii") as file:
            for name, section in re.findall(r"^\.Xr (chandler\S*) (\d)", file.read(), re.M):
                assert f"{name}.{section}" in ours, path


def test_every_program_and_every_unit_has_its_page() -> None:
    names = {os.path.basename(path).rpartition(".")[0] for path in PAGES} | {
        "chandler-runc",
        "chandler-youki",
        "chandler-crun",
    }
    programs = {name for name in os.listdir(f"{REPOSITORY}/packaging/bin") if name.startswith("chandler")}
    assert programs <= names
    for unit in os.listdir(f"{REPOSITORY}/systemd"):
        with open(f"{REPOSITORY}/systemd/{unit}", encoding="utf-8") as file:
            (documentation,) = re.findall(r"^Documentation=man:(.*)\((\d)\)$", file.read(), re.M)
        assert page(".".join(documentation)), unit


def headings() -> list[str]:
    return re.findall(r"^ {3}(\S.*)$", shown("chandler.1"), re.M)


def heading(command: str) -> str:
    """The heading over a command: its own, or `verb first, second, third`."""
    first, _, second = command.partition(" ")
    for title in headings():
        if (
            title == command
            or second
            and title.startswith(first + " ")
            and second in title[len(first) :].replace(",", " ").split()
        ):
            return title
    raise AssertionError(f"chandler.1 has no heading for {command!r}")


COMMANDS = [(name, options) for name, _, options in parsers(main.parser()) if name]
LEAVES = [
    (name, options)
    for name, options in COMMANDS
    if name == "leases" or not any(other.startswith(name + " ") for other, _ in COMMANDS)
]


@pytest.mark.parametrize("command, options", LEAVES, ids=[name for name, _ in LEAVES])
def test_every_option_of_every_command(command: str, options: set[str]) -> None:
    text = part("chandler.1", heading(command))
    for option in options - {"-h", "--help"}:
        assert re.search(rf"(?<![\w-]){option}\b", text, re.M), f"{command} {option}"
    for option in re.findall(r"^ +(--[a-z-]+)", text, re.M):
        assert any(option in others for name, others in LEAVES if heading(name) == heading(command)), (
            f"{option} is no option of {command}"
        )


def test_every_choice_of_an_option() -> None:
    def choices(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, Any]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, child in action.choices.items():
                    yield from choices(child, f"{name} {word}".strip())
            elif action.choices is not None:
                yield name, action

    for name, action in choices(main.parser()):
        text = part("chandler.1", heading(name))
        for word in action.choices:
            assert re.search(rf"\b{word}\b", text), f"{name} {action.option_strings} {word}"


def test_options_of_the_plugins_and_hooks() -> None:
    for name, place in (("chandler-nri", nri.SOCKET), ("chandler-kubelet-plugin", kubelet.DIRECTORY)):
        done = subprocess.run(
            [f"{REPOSITORY}/packaging/bin/{name}", "--help"], capture_output=True, text=True, check=True
        )
        for option in set(re.findall(r"--[a-z]+", done.stdout)):
            assert option in shown(f"{name}.8")
        assert place in shown(f"{name}.8")
    assert allocations.key_path() in shown("chandler-kubelet-plugin.8")
    assert parse.ALLOCATION in shown("chandler-kubelet-plugin.8")
    resources = part("chandler-kubelet-plugin.8", "Resources")
    assert all(f"chandler.oci/{vendor.name}" in resources for vendor in vendors.with_gpus())
    for name in (*container.HOOKS, hooks.RELEASE, hooks.MPS_READY):
        assert re.search(rf"^ +{name} ?", part("chandler-hook.8", "DESCRIPTION"), re.M), name


def default(value: Any) -> str:
    return json.dumps(value)


def test_every_key_of_the_configuration_with_its_default() -> None:
    wanted: dict[str, dict[str, str]] = {}
    for key, (_, _, value) in config.KEYS.items():
        table, _, name = key.rpartition(".")
        if key != "volumes":  # a table of the administrator's own names
            wanted.setdefault(f"[{table}]" if table else "Top level", {})[name] = default(value)
    for title, keys in wanted.items():
        documented = dict(re.findall(r"^ +([a-z-]+) = (.*)$", part("chandler.toml.5", title), re.M))
        assert documented == keys, title
    assert part("chandler.toml.5", "[volumes]")


def test_every_word_of_the_policy() -> None:
    text = part("chandler.toml.5", "Words of allow and deny")
    by_class = re.findall(r"^ +(Tightening|Named|Reaching to the host|Dangerous)\s+(.*)\.$", text, re.M)
    names = {
        "Tightening": row.TIGHTEN,
        "Named": row.NAMED,
        "Reaching to the host": row.HOST,
        "Dangerous": row.DANGEROUS,
    }
    assert len(by_class) == len(names)
    assert {word.rstrip("*") for _, line in by_class for word in line.split(", ")} == set(classes.known_words())
    for title, line in by_class:
        assert all(classes.known_words()[word.rstrip("*")] == names[title] for word in line.split(", ")), title


def test_every_field_of_a_rule() -> None:
    text = part("chandler.toml.5", "[[policy.rule]]")
    for field in rules.FIELDS:
        assert re.search(rf"^ +([a-z, ]+, )?{field}\b", text, re.M), field


def keys(entries: dict[str, Any], path: str = "") -> Iterator[str]:
    for key, entry in entries.items():
        if isinstance(entry, dict):
            yield from keys(entry, f"{path}{key}.")
        else:
            yield path + key


def test_every_key_of_a_request() -> None:
    documented = {
        key
        for line in re.findall(r"^ {5}([a-z_.]+(?:, [a-z_.]+)*)(?:  .*)?$", shown("chandler-annotations.7"), re.M)
        for key in line.split(", ")
    }
    assert {*keys(common.ENTRIES), *keys({path: row.entry for path, row in table.ROWS.items()})} <= documented
    text = shown("chandler-annotations.7")
    for kind, (members, _) in storage.TYPES.items():
        assert re.search(rf"^ +{kind}\s", text, re.M), kind
        for member in members:
            assert re.search(rf"\b{member}\b", text), member
