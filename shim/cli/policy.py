"""`chandler policy check`: shows which rule of the node's policy applies to a container, why, and what it decides."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from shim import engine, jsontext
from shim.cli import engine_options
from shim.errors import BundleError, ChandlerError
from shim.keys import host_facts
from shim.keys.row import TIGHTEN
from shim.node import compiler
from shim.node.inventory import Account
from shim.oci import config_file
from shim.policy import classes, engines, permission, rules, words
from shim.policy.caller import Caller
from shim.request import parse
from shim.shapes import Config, Document

if TYPE_CHECKING:
    from shim.policy.caller import CallFacts


def add_parser(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser("policy", help="explain the node's policy", description=__doc__)
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="show which rule applies to a container, and what it decides",
        description="Shows which rule applies to a container, why, and what it decides about the request.  "
        "Exit status 1 for a refusal.",
    )
    source = check.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", metavar="DIR", help="the container's bundle")
    source.add_argument("--config", metavar="FILE", help="its config.json")
    check.add_argument("--handler", default="chandler-runtime", metavar="NAME", help="how the engine calls the runtime")
    engine_options.add_options(check)
    check.add_argument(
        "--user", action="append", metavar="USER", help="who starts the container, uid or name (default: you)"
    )
    check.add_argument("--format", choices=("text", "json"), default="text")
    check.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns exit status 0 when the policy allows the request, 1 when it refuses the request."""
    path = arguments.config or os.path.join(arguments.bundle, "config.json")
    config = compiler.read_config(Account(dict(os.environb)))[0]
    document, built = _document(path, config)
    annotations = document.get("annotations")
    annotations = annotations if isinstance(annotations, dict) else {}
    caller = engine_options.caller(arguments, path, document, built)
    call_facts: CallFacts = {
        "caller": caller,
        "handler": arguments.handler,
        "user": tuple(arguments.user or host_facts.caller()),
    }
    identity = rules.identity(annotations, rules.believed_engine(config, call_facts), call_facts)
    shown: Document = {
        "engine": engine_options.caller_facts(caller, config),
        "known": {field: list(values) for field, values in identity.items()},
        "unknown": [field for field in rules.FIELDS if field not in identity],
        "rules": [],
    }
    applied = rules.applied(config, annotations, call_facts)
    for rule in config["policy.rule"]:
        verdict, why = rules.verdict(rule["match"], identity)
        denies = list(rule.get("policy.deny", ())) if verdict != rules.NO else []
        shown["rules"].append(
            {
                "name": rule["name"],
                "verdict": verdict,
                "why": why,
                "denies": denies,
                "decides": applied.get("policy.by") == f"rule {rule['name']!r}" and verdict == rules.YES,
            }
        )
    shown["by"] = words.source_of_policy(applied)
    shown["policy"] = {
        key[len("policy.") :]: value
        for key, value in applied.items()
        if key.startswith("policy.")
        and key not in ("policy.rule", "policy.by", "policy.denied-by", "policy.evict-unadjusted")
    }
    shown.update(_verdict(document, annotations, applied, caller))
    print(json.dumps(shown, indent=2) if arguments.format == "json" else _text(shown))
    return 1 if shown["refusal"] else 0


def _document(path: str, config: Config) -> tuple[Document, bool]:
    """config.json as the engine wrote it, and whether `chandler bundle` built it.  Raises BundleError."""
    config_json = config_file.ConfigJson(os.path.realpath(path), engine.mark(config))
    try:
        document = jsontext.loads(config_json.engine_bytes)
    except ChandlerError as error:
        raise BundleError(f"{path}: {error.what}") from None
    if type(document) is not dict:
        raise BundleError(f"{path} is not an object")
    return document, config_json.built(document)


def _verdict(document: Document, annotations: Document, config: Config, caller: Caller) -> Document:
    """What the request asks for, with the class of each key, and why the policy refuses it ('' when it allows it)."""
    refusal, asked = "", []
    try:
        name, sandbox = engines.container(annotations, caller.engine)
        if not sandbox:
            caller.check(annotations, config)
        request = None if sandbox else parse.from_annotations(annotations, config["annotation-prefix"], name)
        if request is not None:
            known_words = classes.known_words()
            asked = [
                {
                    "key": key,
                    "word": word,
                    "class": TIGHTEN if tightens else known_words[word],
                }
                for word, key, tightens in classes.asked(request, document)
            ]
            permission.check(request, document, config)
    except ChandlerError as error:
        refusal = str(error)
    return {"asked": asked, "refusal": refusal}


def _text(shown: Document) -> str:
    lines: list[str] = [engine_options.caller_line(shown["engine"])]
    lines += [f"{field:<12}{', '.join(values)}" for field, values in shown["known"].items()]
    if shown["unknown"]:
        lines.append(f"not known   {', '.join(shown['unknown'])}")
    for rule in shown["rules"]:
        also = f"; it denies {', '.join(rule['denies'])}" if rule["denies"] else ""
        mark = "*" if rule["decides"] else " "
        lines.append(f"{mark} rule {rule['name']!r} {rule['verdict']}: {rule['why']}{also}")
    lines.append(f"decided by  {shown['by']}")
    lines += [f"  {key} = {json.dumps(value)}" for key, value in shown["policy"].items() if value not in ([], 0)]
    lines += [f"asked for   {each['key']} ({each['class']})" for each in shown["asked"]]
    lines.append(
        f"refused     {shown['refusal']}"
        if shown["refusal"]
        else "allowed     by the policy; the host may still lack what is asked for"
    )
    return "\n".join(lines)
