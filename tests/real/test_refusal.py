"""A refused create: one sentence, one record, nothing changed, and no runtime started."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from lab import bundle
from lab.engine import Engine, records
from lab.install import Installation
from lab.node import Node

REFUSED = {
    "an unknown key": ('{"resources": {"gpus": {"count": 2}}}', "gpus"),
    "an unknown key inside": ('{"resources": {"gpu": {"number": 2}}}', "number"),
    "more GPUs than the node has": ('{"resources": {"gpu": {"count": 9}}}', "9"),
    "a GPU that is not there": ('{"resources": {"gpu": {"devices": ["77"]}}}', "77"),
    "a duplicate key": ('{"env": {"A": "1"}, "env": {"A": "2"}}', "env"),
    "a wrong type": ('{"resources": {"pids_limit": "many"}}', "pids_limit"),
    "a negative limit": ('{"resources": {"memory": "-1Mi"}}', "memory"),
    "not a number": ('{"resources": {"cpu": NaN}}', ""),
    "text that is no document": ('{"resources": ', ""),
    "a variable that is Chandler's": ('{"env": {"NVIDIA_VISIBLE_DEVICES": "all"}}', "NVIDIA_VISIBLE_DEVICES"),
    "a variable that loads code": ('{"env": {"LD_PRELOAD": "/tmp/x.so"}}', "LD_PRELOAD"),
}


class Refusals:
    """Chandler over a runtime that only records that it was started."""

    def __init__(self, installation: Installation, node: Node, workdir: str) -> None:
        self.installation, self.node, self.workdir = installation, node, workdir
        self.note = os.path.join(workdir, "started")
        runtime = os.path.join(workdir, "runc")
        with open(runtime, "w", encoding="utf-8") as script:
            script.write(f'#!/bin/sh\necho "$@" >> {self.note}\n')
        os.chmod(runtime, 0o755)
        installation.configure([runtime], [node.cdi])
        self.runtime = runtime
        self.engine = Engine([installation.program()], os.path.join(workdir, "root"))

    def started(self) -> bool:
        return os.path.exists(self.note)


@pytest.fixture
def refusals(installation: Installation, node: Node, workdir: str) -> Iterator[Refusals]:
    yield Refusals(installation, node, workdir)


def refused(refusals: Refusals, made: bundle.Bundle, word: str, verb: str = "create") -> str:
    """Check that the create is refused in a sentence with `word`; returns the sentence."""
    before, files = made.bytes, sorted(os.listdir(made.directory))
    done = refusals.engine.create(made, "c1", verb=verb, check=False)
    assert done.returncode == 1
    assert not refusals.started()
    assert made.bytes == before
    assert set(os.listdir(made.directory)) - set(files) <= {"out.log", "log.json"}, "the create left something behind"
    (sentence,) = done.stderr.splitlines()
    assert word in sentence and "Traceback" not in sentence
    (record,) = records(made.log)
    assert record["level"] == "error" and record["time"] and word in record["msg"]
    assert record["msg"] in sentence or sentence in record["msg"]
    return sentence


@pytest.mark.parametrize("document, word", REFUSED.values(), ids=REFUSED)
def test_a_document_is_refused(refusals: Refusals, document: str, word: str) -> None:
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], {"chandler.oci/service": document})
    refused(refusals, made, word)


def test_run_is_refused_like_create(refusals: Refusals) -> None:
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(nonsense=1))
    refused(refusals, made, "nonsense", verb="run")


def test_a_path_that_the_document_also_sets(refusals: Refusals) -> None:
    made = bundle.make(
        os.path.join(refusals.workdir, "b"),
        ["true"],
        {**bundle.request(resources={"gpu": {"count": 1}}), "chandler.oci/resources.gpu.count": "2"},
    )
    refused(refusals, made, "resources.gpu.count")


def test_more_than_the_policy_allows(refusals: Refusals) -> None:
    refusals.installation.configure([refusals.runtime], [refusals.node.cdi], "[policy]\nmax-gpus = 2\n")
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(resources={"gpu": {"count": 3}}))
    refused(refusals, made, "max-gpus")


def test_values_that_the_policy_does_not_list(refusals: Refusals) -> None:
    refusals.installation.configure([refusals.runtime], [refusals.node.cdi], '[policy]\nallow = ["gpu"]\n')
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(env={"A": "b"}))
    refused(refusals, made, "env")


def test_a_limit_above_the_one_that_the_engine_set(refusals: Refusals) -> None:
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(resources={"memory": "2Gi"}))
    config = made.config
    config["linux"]["resources"]["memory"] = {"limit": 1 << 30}
    made.config = config
    refused(refusals, made, "memory")


def test_a_configuration_with_an_unknown_key(refusals: Refusals) -> None:
    refusals.installation.configure([refusals.runtime], [refusals.node.cdi], "[policy]\nmaximum-gpus = 2\n")
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(env={"A": "b"}))
    refused(refusals, made, "maximum-gpus")


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_cdi_source_that_others_can_write(refusals: Refusals, what: str) -> None:
    """A CDI file contains hooks that run as root."""
    directory = os.path.join(refusals.workdir, "cdi")
    os.mkdir(directory, 0o755)
    spec = os.path.join(directory, "nvidia.yaml")
    with open(refusals.node.spec, encoding="utf-8") as source, open(spec, "w", encoding="utf-8") as copy:
        copy.write(source.read())
    os.chmod(spec if what == "file" else directory, 0o777)
    refusals.installation.configure([refusals.runtime], [directory])
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(resources={"gpu": {"count": 1}}))
    refused(refusals, made, spec if what == "file" else directory)


def test_a_runtime_that_others_can_write(refusals: Refusals) -> None:
    os.chmod(refusals.runtime, 0o777)
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(env={"A": "b"}))
    refused(refusals, made, refusals.runtime)


def test_a_refused_create_works_after_a_correction(refusals: Refusals) -> None:
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(nonsense=1))
    refused(refusals, made, "nonsense")
    config = made.config
    config["annotations"] = bundle.request(env={"A": "b"})
    made.config = config
    refusals.engine.create(made, "c1")
    assert refusals.started()
    assert "A=b" in made.config["process"]["env"]


def test_a_log_in_text(refusals: Refusals) -> None:
    made = bundle.make(os.path.join(refusals.workdir, "b"), ["true"], bundle.request(nonsense=1))
    log = os.path.join(refusals.workdir, "log.txt")
    done = refusals.engine.call(
        "--log", log, "--log-format", "text", "create", "--bundle", made.directory, "c1", check=False
    )
    assert done.returncode == 1
    with open(log, encoding="utf-8") as file:
        (line,) = file.read().splitlines()
    assert "nonsense" in line and "level=error" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)
