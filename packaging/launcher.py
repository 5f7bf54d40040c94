#!/usr/bin/env python3
"""Writes the option tables of shim/runtime/args.py into packaging/bin/chandler-runtime (`make launcher`).

The launcher must read the same options as the runtimes, but without Python.  Each of its tables is an arm of a `case`
below the comment `# options: NAME`.  This script replaces the words of the arm, and nothing else in the file.
With --check it writes nothing; the exit status is 1 when the file is out of date.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAUNCHER = os.path.join(REPOSITORY, "packaging/bin/chandler-runtime")
sys.path.insert(0, REPOSITORY)

from shim.runtime import args

# Verbs that concern no container.  The launcher gives them to the first runtime, whatever their options are.
NO_CONTAINER = frozenset(("", "list", "spec", "features", "info", "completion"))
OTHERS = frozenset(verb for table in args.OPTIONS.values() for verb in table) - args.EDITED - NO_CONTAINER
WIDTH = 118  # of a line of the launcher, with tabs of four columns

ARM = re.compile(r"^(\t*)# options: (.+)\n[^)]*\)", re.MULTILINE)


def options(*verbs: str) -> dict[str, str]:
    """The options of some verbs in all runtimes: `--name` or `-n` -> "=" when the next word is the value, else ""."""
    result: dict[str, str] = {}
    for table in args.OPTIONS.values():
        for verb in verbs:
            for word in table.get(verb, "").split():
                name = word.rstrip("=?") or "?"
                takes = "=" if word[len(name) :] == "=" else ""
                if result.setdefault(dashed(name), takes) != takes and (_long(dashed(name)) or len(verbs) == 1):
                    raise SystemExit(
                        f"--{name} takes a value for one verb or runtime alone: the launcher cannot read it"
                    )
    return result


def dashed(name: str) -> str:
    """An option as it is written on the command line."""
    return f"--{name}" if len(name) > 1 else f"-{name}"


def tables() -> dict[str, list[str]]:
    """The patterns of each table, by its name.

    Their first character is the launcher's state ($_at): g before the verb, o after it.
    """
    exits = [dashed(name) for name in sorted(args.EXITS)]
    before_values, before_flags = _split({name: takes for name, takes in options("").items() if name not in exits})
    create_values, create_flags = _split(options("create", "run"))  # what only restore has is left to Python
    create_values = _without(create_values, "--bundle", "-b", "--config", "-f")
    other_values, other_flags = _split(options(*sorted(OTHERS)))
    # The same letter means different things to different verbs.
    letters = {
        verb + name: takes for verb in sorted(OTHERS) for name, takes in options(verb).items() if not _long(name)
    }
    letter_values, letter_flags = _split(letters)
    return {
        "before the verb, with a value": _after("g", _without(before_values, "--root", "-r")),
        "before the verb, without a value": _after("g", before_flags),
        "before the verb, with a value, but --log": _after("g", _without(before_values, "--log", "-l", "--log-format")),
        "of create and run, with a value": _after("o", create_values),
        "of create and run, with a value after =": [f"o{name}=*" for name in create_values if _long(name)],
        "of create and run, without a value": _after("o", create_flags),
        "of other verbs, with a value": _after("o", filter(_long, other_values)),
        "of other verbs, without a value": _after("o", filter(_long, other_flags)),
        "of one letter, with a value": letter_values,
        "of one letter, without a value": letter_flags,
        "print and exit": _after("/", [name.replace("?", "\\?") for name in exits]),
    }


def _split(table: dict[str, str]) -> tuple[list[str], list[str]]:
    """The options with a value and those without one."""
    return [name for name in table if table[name]], [name for name in table if not table[name]]


def _without(names: list[str], *others: str) -> list[str]:
    """Some names, but not those that have an arm of their own in the launcher."""
    unknown = set(others) - set(names)
    if unknown:
        raise SystemExit(
            f"{', '.join(sorted(unknown))}: an option of the launcher that no runtime has; correct {__file__}"
        )
    return [name for name in names if name not in others]


def _after(state: str, names: Iterable[str]) -> list[str]:
    return [state + name for name in names]


def _long(name: str) -> bool:
    return name.startswith("--")


def written(text: str) -> str:
    """The launcher's text with the present tables."""
    remaining = tables()

    def arm(match: re.Match[str]) -> str:
        indent, name = match[1], match[2]
        lines = [""]
        for pattern in remaining.pop(name):
            if len(lines[-1]) + len(pattern) + 4 * len(indent) + 5 > WIDTH:
                lines.append("")
            lines[-1] += f"{pattern} | "
        return f"{indent}# options: {name}\n{indent}" + f"\\\n{indent}\t".join(lines).removesuffix(" | ") + ")"

    text = ARM.sub(arm, text)
    if remaining:
        raise SystemExit(f"{LAUNCHER} has no comment `# options: {next(iter(remaining))}`")
    return text


def main(argv: list[str]) -> int:
    """Writes the launcher, or only compares it."""
    with open(LAUNCHER, encoding="utf-8") as file:
        present = file.read()
    wanted = written(present)
    if wanted == present:
        return 0
    if argv == ["--check"]:
        print(f"{LAUNCHER} has not the options of shim/runtime/args.py; run `make launcher`", file=sys.stderr)
        return 1
    with open(LAUNCHER, "w", encoding="utf-8") as file:
        file.write(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
