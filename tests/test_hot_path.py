"""Which modules a create may load (the start-up contract of shim/runtime/wrapper.py), from an installation."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lab import REPOSITORY

PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable

# A create loads only these modules of the standard library that a bare interpreter has not loaded; all are written in
# C.
OTHERS = {"_json", "_blake2", "_signal", "errno", "fcntl", "gc", "marshal", "posix", "time", "zlib"}
# Chandler's modules that a create loads. A new one costs every container on every node: think first.
OURS = set(
    """
shim shim.cdi shim.cdi.names shim.cdi.resolve shim.edits shim.engine shim.errors shim.gpu shim.gpu.choose
shim.gpu.vendors shim.host shim.host.device_nodes shim.host.files shim.host.kernel shim.host.runtimes shim.host.trust
shim.host.userns shim.jsontext shim.keys shim.keys.common shim.node shim.node.cdi_check shim.node.inventory shim.oci
shim.oci.config_file shim.oci.reader shim.oci.targets shim.oci.writer shim.paths shim.pathtext shim.policy
shim.policy.caller shim.policy.engines shim.policy.permission shim.policy.words shim.request shim.request.parse
shim.request.quantity shim.request.schema shim.request.values shim.runtime shim.runtime.args shim.runtime.equip
shim.runtime.node_inventory shim.runtime.wrapper shim.state shim.state.grants
""".split()
)
# Loaded where leases are kept. The image always has them, because leases are the default.
LEASES = {"shim.state.leases", "shim.state.ledger", "shim.state.lock"}

REPORT = """
import sys
before = set(sys.modules)
sys.argv = {argv!r}
import posix
def report(*_):
    posix.write(1, repr(sorted(set(sys.modules) - before)).encode())
    posix._exit(0)
posix.execve = report
path = {start!r}
exec(compile(open(path).read(), path, "exec"))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    directory.mkdir()
    config = {
        "ociVersion": "1.0.2",
        "process": {"args": ["true"], "cwd": "/", "env": ["A=1"]},
        "annotations": {
            "chandler.oci/service": '{"resources": {"memory": "1Gi", "gpu": {"count": 1}}, "env": {"B": "2"}}'
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def installed(tmp_path: Path, needs_root: None) -> Path:
    """An installation under a prefix of its own, with one device in one CDI file that is old enough to be trusted."""
    settings = {
        "PREFIX": f"{tmp_path}/usr",
        "SYSCONFDIR": f"{tmp_path}/etc",
        "STATEDIR": f"{tmp_path}/state",
        "PYTHON": PYTHON,
    }
    subprocess.run([f"{REPOSITORY}/packaging/install"], check=True, env={**os.environ, **settings})
    cdi = tmp_path / "cdi"
    cdi.mkdir()
    (cdi / "a.json").write_text(
        json.dumps(
            {
                "cdiVersion": "0.5.0",
                "kind": "nvidia.com/gpu",
                "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/null"}]}}],
            }
        )
    )
    (tmp_path / "etc/chandler/config.toml").write_text(
        f'runtimes = ["/bin/true"]\nengines = ["other"]\n[cdi]\nspec-dirs = ["{cdi}"]\n'
    )
    # ctime cannot be set, so the installed copy is changed to trust sources of any age
    compiler = tmp_path / "usr/lib/chandler/shim/node/compiler.py"
    compiler.write_text(compiler.read_text().replace("SETTLED_NS = 2_000_000_000", "SETTLED_NS = -1"))
    subprocess.run(
        [PYTHON, "-I", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash", str(compiler)],
        check=True,
    )
    return tmp_path


def loaded(start: Path, bundle: Path) -> set[str]:
    argv = [str(start), "chandler-runtime", "create", "--bundle", str(bundle), "c1"]
    done = subprocess.run(
        [PYTHON, "-I", "-S", "-B", "-X", "utf8", "-c", REPORT.format(argv=argv, start=str(start))],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    return set(eval(done.stdout))


def forget(state: Path) -> None:
    """Remove the ledger, its copy and the grant records, as if no container was ever created."""
    for path in (*state.glob("leases*"), *state.glob("grants/*")):
        path.unlink()


@pytest.mark.parametrize("allocator", ["leases", "fixed"])
def test_a_warm_create_loads_nothing_else(installed: Path, bundle: Path, allocator: str) -> None:
    with open(installed / "etc/chandler/config.toml", "a", encoding="ascii") as file:
        file.write(f'[gpu]\nallocator = "{allocator}"\n')
    original = (bundle / "config.json").read_bytes()
    start = installed / "usr/lib/chandler/start.py"
    (image,) = (installed / "usr/lib/chandler").glob("create-*.image")
    results = []
    for with_image in (True, False):
        if not with_image:
            image.unlink()
        for path in bundle.iterdir():
            path.unlink()
        (bundle / "config.json").write_bytes(original)
        loaded(start, bundle)  # compiles the inventory
        forget(installed / "state")
        (bundle / "config.json").write_bytes(original)
        names = loaded(start, bundle)
        assert {name for name in names if name.startswith("shim")} == OURS | (
            LEASES if with_image or allocator == "leases" else set()
        )
        # an image does not need __future__
        assert {name for name in names if not name.startswith("shim")} <= OTHERS | (
            set() if with_image else {"__future__", "zipimport"}
        )
        forget(installed / "state")
        results.append(re.sub(rb'"[0-9a-f]{24}"', b'"TOKEN"', (bundle / "config.json").read_bytes()))
    assert results[0] == results[1] != original, "with the image and without: the same result"


def test_an_image_of_another_python_is_not_used(installed: Path, bundle: Path) -> None:
    (image,) = (installed / "usr/lib/chandler").glob("create-*.image")
    image.write_bytes(b"not an image")
    assert OURS | LEASES <= loaded(installed / "usr/lib/chandler/start.py", bundle)
