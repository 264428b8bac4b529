"""What lies on this machine: the artifacts of a folder, and what the product keeps in its cache."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from edge_kv.amounts import size
from edge_kv.artifact import MANIFEST, Artifact, read_artifact
from edge_kv.errors import ConfigError, EdgeKVError


@dataclass(frozen=True)
class Listed:
    """One artifact, or why it cannot be used."""

    name: str
    bytes: int
    artifact: Artifact | None
    fault: str = ""


def artifacts(folder: Path) -> list[Listed]:
    """The artifacts in `folder` and in the folders directly below it, by name.

    Hidden ones are unfinished exports.
    """
    found = []
    below = [m for m in folder.glob(f"*/{MANIFEST}") if not m.parent.name.startswith(".")]
    for manifest in sorted([*folder.glob(MANIFEST), *below]):
        root = manifest.parent
        name = root.name if root != folder else str(folder)
        try:
            found.append(Listed(name, size_of(root), read_artifact(root)))
        except EdgeKVError as e:
            found.append(Listed(name, size_of(root), None, str(e)))
    return found


@dataclass(frozen=True)
class Cached:
    """One kind of thing in the cache directory."""

    kind: str
    path: Path
    entries: int
    bytes: int


KINDS = {
    "native": "native libraries, compiled once",
    "onnx": "weights packed for onnxruntime",
    "wheels": "libraries for phones",
    "memory": "what Python and libraries take here, measured once",
    "bench": "states that bench goes on from",
}
"""Folders of the cache directory and what they hold."""


def cached(directory: Path) -> list[Cached]:
    """What the cache directory holds, by kind; empty where there is none."""
    if not directory.is_dir():
        return []
    folders = sorted(p for p in directory.iterdir() if p.is_dir())
    return [
        Cached(KINDS.get(p.name, p.name), p, sum(1 for _ in p.iterdir()), size_of(p))
        for p in folders
    ]


def clear(directory: Path) -> int:
    """Remove everything in the cache directory; returns the bytes that were freed.

    Raises:
        ConfigError: some of it cannot be removed.
    """
    held = cached(directory)
    for entry in held:
        shutil.rmtree(entry.path, ignore_errors=True)
    left = sum(c.bytes for c in cached(directory))
    if left:
        raise ConfigError(
            f"{size(left)} in {directory} cannot be removed; look at its permissions."
        )
    return sum(c.bytes for c in held)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; a file with several names counts once."""
    sizes = {}
    for path in folder.rglob("*"):
        if path.is_file():
            stat = path.stat()
            sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())
