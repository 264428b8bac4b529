"""The artifact directory: the one contract between export and run time.

An artifact is a directory that can be copied to any device. `manifest.json` describes it and lists
every other file with size and digest; nothing in it is executable code, and no path in it leaves
the directory. `edge_kv.manifest` is the manifest's schema; here it is read, written and checked
against the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from edge_kv.errors import ArtifactError, PlanError, unusable
from edge_kv.files import write_text
from edge_kv.manifest import (
    LONGEST_MANIFEST,
    SCHEMA_VERSION,
    Backend,
    FileEntry,
    Manifest,
    parse_manifest,
)

CHECKED_BYTES = 64 << 20  # of a program whose digest is checked at every load
SAMPLES, SAMPLE = 64, 4096  # pieces of a file that are read at every load, bytes of each
MANIFEST = "manifest.json"
_CACHED = re.compile(r"(models|datasets|spaces)--.+")  # how the hub's cache names a repository


class Artifact:
    """An opened artifact directory: manifest read, sizes checked (digests by `check_digests`)."""

    def __init__(self, root: Path, manifest: Manifest):
        """Take what the manifest says; raises ArtifactError when its plan cannot be."""
        self.root, self.manifest = root, manifest
        self.tokens, self.sampling = manifest.tokens, manifest.sampling
        self.model_digest, self.plan_digest = manifest.identity.model, manifest.identity.plan
        try:
            self.plan = manifest.plan.plan()
        except PlanError as e:
            raise ArtifactError(f"The manifest's plan is not valid: {e}") from e

    @property
    def family(self) -> str:
        """What kind of model it is, for people."""
        model = self.manifest.made.get("model")
        return str(model.get("type", "")) if isinstance(model, dict) else ""

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return 1 + max((r for t in self.plan.tables for r in t.readers), default=0)

    def path(self, name: str) -> Path:
        """Absolute path of a file the manifest lists."""
        return self.root / name

    def backend(self, engine: str) -> Backend:
        """Programs for `engine`; raises ArtifactError when it was exported without them."""
        try:
            found: Backend = self.manifest.backends[engine]
            return found
        except KeyError:
            have = ", ".join(sorted(self.manifest.backends)) or "none"
            raise ArtifactError(
                f"{self.root} has no programs for {engine!r} (it has: {have}); "
                f"export again with --backend {engine}."
            ) from None

    def parity(self, backend: str) -> dict[str, Any]:
        """What the programs of a backend met when they were made; empty when that is not there."""
        entry = self.manifest.parity.get(backend)
        return entry.model_dump() if entry else {}

    def check_digests(self) -> Iterator[tuple[str, int]]:
        """Verify every file's SHA-256, yielding (name, bytes) as each one passes.

        Raises:
            ArtifactError: a file's content is not what the manifest says.
        """
        for name, entry in self.manifest.files.items():
            self._check_digest(name, entry)
            yield name, entry.size

    def check_samples(self) -> None:
        """Compare pieces of each file that runs with those that were exported: files of another
        artifact are found at every load, a few changed bytes by `check_digests` alone.

        Raises:
            ArtifactError: a piece is another, or a file cannot be read.
        """
        for name, entry in self.manifest.files.items():
            if entry.sample is not None and self._digest(name, sample_of) != entry.sample:
                raise ArtifactError(
                    f"{self.path(name)} is not the file that was exported (its content differs); "
                    "copy or export the artifact again."
                )

    def program(self, name: str) -> Path:
        """Absolute path of a program, its digest checked unless it is large or being exported.

        A program says what memory its operators touch, so a changed one is refused at every load;
        one that holds its weights too (above `CHECKED_BYTES`) by `verify` alone.

        Raises:
            ArtifactError: its content is not what the manifest says.
        """
        entry = self.manifest.files[name]
        if self.manifest.finished and entry.size <= CHECKED_BYTES:
            self._check_digest(name, entry)
        return self.path(name)

    def _check_digest(self, name: str, entry: FileEntry) -> None:
        digest = self._digest(name, sha256_file)
        if digest != entry.sha256:
            raise ArtifactError(
                f"{name} has SHA-256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…: "
                "the file was changed; copy or export the artifact again."
            )

    def _digest(self, name: str, digest: Callable[[Path], str]) -> str:
        try:
            return digest(self.path(name))
        except OSError as e:
            raise ArtifactError(unusable(e)) from e


def read_artifact(root: str | Path) -> Artifact:
    """Open an artifact directory, checking schema, version, paths and sizes (not digests).

    Raises:
        ArtifactError: no such directory, not an artifact, another version, a path that leaves the
            directory, or a file that is missing or of another size.
    """
    try:
        return _read(Path(root))
    except OSError as e:  # a name that is too long, a file or folder that may not be read
        raise ArtifactError(unusable(e)) from e


def _read(root: Path) -> Artifact:
    path = root / MANIFEST
    if not root.is_dir():
        raise ArtifactError(f"{root} is not a directory; give the directory `edge-kv export` made.")
    if not path.is_file():
        raise ArtifactError(f"{root} has no {MANIFEST}; it is not an edge-kv artifact.")
    if (size := path.stat().st_size) > LONGEST_MANIFEST:
        raise ArtifactError(
            f"{path} has {size} bytes, at most {LONGEST_MANIFEST} are read; "
            "the artifact is damaged."
        )
    try:
        text = path.read_bytes()
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{path} is not valid JSON ({e}); the artifact is damaged.") from e
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} is not a JSON object; the artifact is damaged.")
    version = raw.get("schema_version")
    if version == 1 and version is not True:
        raise ArtifactError(f"{path} was made by an earlier edge-kv; export it again.")
    if version != SCHEMA_VERSION or version is True:
        raise ArtifactError(
            f"{path} has schema_version {repr(version)[:40]}, this edge-kv reads {SCHEMA_VERSION}; "
            "update edge-kv or export again."
        )
    manifest = parse_manifest(text, str(path))
    for name, entry in manifest.files.items():
        _check_file(root, name, entry)
    for name in manifest.named_files():
        if name not in manifest.files:
            raise ArtifactError(f"{path} uses {name!r} but does not list its size and digest.")
    return Artifact(root, manifest)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `manifest.json` beside and rename it: readers see the old one or the whole new one."""
    path = root / MANIFEST
    write_text(path, manifest.model_dump_json(indent=1) + "\n")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sample_of(path: Path) -> str:
    """SHA-256 of pieces of a file, evenly spread from its beginning to its end; of a file that is
    no longer than all of them, of the whole.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as f:
        last = f.seek(0, os.SEEK_END) - SAMPLE
        if last < SAMPLES * SAMPLE:
            return sha256_file(path)
        if hasattr(os, "posix_fadvise"):  # reading ahead would fill the cache with what is between
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for i in range(SAMPLES):
            f.seek(last * i // (SAMPLES - 1))
            digest.update(f.read(SAMPLE))
    return digest.hexdigest()


def _check_file(root: Path, name: str, entry: FileEntry) -> None:
    pure = PurePosixPath(name)
    odd = "\\" in name or not name.isprintable()
    if pure.is_absolute() or ".." in pure.parts or odd or not pure.parts:
        raise ArtifactError(f"The manifest names {name!r}, a path outside the artifact; refused.")
    path = root / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; copy or export the artifact again.")
    if not any(path.resolve().is_relative_to(home) for home in _homes(root.resolve())):
        raise ArtifactError(f"{path} is a link that leaves the artifact; refused.")
    size = path.stat().st_size
    if size != entry.size:
        raise ArtifactError(
            f"{path} has {size} bytes, the manifest says {entry.size}; "
            "it is cut off or changed; copy or export the artifact again."
        )


def _homes(root: Path) -> list[Path]:
    """Where the files of an artifact may lie: in it, or, when it is a snapshot of the Hugging Face
    cache (`models--ORG--NAME/snapshots/REVISION`), among the blobs that its links lead to.
    """
    blobs = [
        above.parent / "blobs"
        for above in root.parents
        if above.name == "snapshots" and _CACHED.fullmatch(above.parent.name)
    ]
    return [root, *blobs]
