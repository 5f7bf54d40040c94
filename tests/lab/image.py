"""A busybox image that engines load from a file, without a registry."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import tarfile
from typing import Any

from lab.bundle import APPLETS, BUSYBOX

PASSWD = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"
GROUP = b"root:x:0:\nnogroup:x:65534:\n"


def layer() -> bytes:
    """The root file system."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("bin", "dev", "etc", "proc", "sys", "tmp", "usr", "usr/lib", "var", "var/run"):
            add(tar, name, None)
        with open(BUSYBOX, "rb") as busybox:
            add(tar, "bin/busybox", busybox.read(), 0o755)
        for applet in (*APPLETS, "head", "grep", "mount", "stat", "wc"):
            link = tarfile.TarInfo("bin/" + applet)
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        add(tar, "etc/passwd", PASSWD)
        add(tar, "etc/group", GROUP)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes | None, mode: int = 0o644) -> None:
    """A file, or a directory for no data."""
    info = tarfile.TarInfo(name)
    info.type, info.mode = (tarfile.DIRTYPE, 0o755) if data is None else (tarfile.REGTYPE, mode)
    info.size = len(data or b"")
    tar.addfile(info, io.BytesIO(data or b""))


def packed(directory: str) -> bytes:
    """A layer with a directory's files, which belong to root there."""

    def owned(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        return info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(directory, ".", filter=owned)
    return buffer.getvalue()


def make(path: str, name: str, files: bytes | None = None, annotations: Any = None, **configured: Any) -> str:
    """Write the image `name` (repository:tag) as an OCI archive; returns its path.

    `files`: directory with the files of its only layer, None for busybox. `annotations`: those of its manifest, or the
    text of other JSON members of the manifest.
    """
    blobs: dict[str, bytes] = {}

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": "sha256:" + digest, "size": len(data)}

    root = blob("layer.v1.tar", files or layer())
    target = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        "os": "linux",
    }
    config = blob(
        "config.v1+json",
        text(
            {
                **target,
                "config": {"Env": ["PATH=/bin"], "Cmd": ["sleep", "3600"], **configured},
                "rootfs": {"type": "layers", "diff_ids": [root["digest"]]},
            }
        ),
    )
    members = text(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [root],
        }
    )
    if annotations is not None:
        more = annotations if isinstance(annotations, str) else '"annotations": ' + json.dumps(annotations)
        members = members[:-1] + b", " + more.encode() + b"}"
    manifest = blob("manifest.v1+json", members)
    named = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name.rpartition(":")[2]}
    with tarfile.open(path + ".new", "w") as tar:
        add(tar, "oci-layout", text({"imageLayoutVersion": "1.0.0"}))
        add(
            tar,
            "index.json",
            text({"schemaVersion": 2, "manifests": [{**manifest, "platform": target, "annotations": named}]}),
        )
        # Docker's own form of the same, which it wants beside it.
        add(tar, "manifest.json", text([{"Config": path_of(config), "RepoTags": [name], "Layers": [path_of(root)]}]))
        for digest, data in blobs.items():
            add(tar, "blobs/sha256/" + digest, data)
    os.rename(path + ".new", path)
    return path


def path_of(blob: dict[str, Any]) -> str:
    return "blobs/" + str(blob["digest"]).replace(":", "/")


def text(value: Any) -> bytes:
    return json.dumps(value).encode()
