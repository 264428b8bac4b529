"""The artifact directory: the one contract between export and run time.

An artifact is a directory that can be copied to any device. `manifest.json` describes it and lists
every other file with size and digest; nothing in it is executable code, and no path in it leaves
the directory. This module is the manifest's schema, its reader, its writer and its checks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from edge_kv import manifest as schema2
from edge_kv.config import ModelConfig
from edge_kv.errors import ArtifactError, EdgeKVError, PlanError
from edge_kv.files import write_text
from edge_kv.kv_plan import KVPlan, plan_kv
from edge_kv.manifest import PleEntry as PleEntry
from edge_kv.manifest import SamplingEntry, TokensEntry
from edge_kv.manifest import TensorReport as TensorReport

CHECKED_BYTES = 64 << 20  # of a program whose digest is checked at every load
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_CACHED = re.compile(r"(models|datasets|spaces)--.+")  # how the hub's cache names a repository
CONFIG_ADAPTER: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Schema):
    """Size in bytes and SHA-256 of one file of the artifact."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]  # empty while an export runs


class PlanEntry(_Schema):
    """What `plan_kv` was asked for; the buffers are stored too, for readers that do not plan."""

    ctx: int
    chunk: int
    kv: str
    buffers: list[dict[str, Any]]


class QuantEntry(_Schema):
    """Weight storage: `scheme` int4 | int8 | none, the weight format of each kind of tensor under
    it, and the error of every quantised tensor."""

    scheme: str
    formats: dict[str, str]
    tensors: dict[str, TensorReport]


class TensorIO(_Schema):
    """One graph input or output; a symbolic size is a name ("chunk", "live")."""

    name: str
    dtype: str
    shape: list[int | str]


class Program(_Schema):
    """One exported graph and its contract."""

    file: str
    inputs: list[TensorIO]
    outputs: list[TensorIO]


class Backend(_Schema):
    """Programs of one runtime: `prefill` (writes state, no logits) and `decode`."""

    programs: dict[str, Program]
    files: list[str]  # everything this backend needs beside the manifest
    details: dict[str, Any] = {}


class TokenizerEntry(_Schema):
    """Where the tokenizer and the chat template lie; ids come from the model config."""

    file: str
    chat_template: str | None = None
    add_bos: bool = True
    stop_ids: list[int] = []  # turn ends beside the config's eos_ids


class Manifest(_Schema):
    """`manifest.json`."""

    schema_version: int
    edge_kv: str
    name: str
    model: dict[str, Any]
    plan: PlanEntry
    quant: QuantEntry
    ple: PleEntry | None
    backends: dict[str, Backend]
    tokenizer: TokenizerEntry | None
    files: dict[str, FileEntry]
    made: dict[str, Any]
    parity: dict[str, Any]
    memory: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the export is over: until then files have no digests."""
        return all(entry.sha256 for entry in self.files.values())

    def config(self) -> ModelConfig:
        """The model config; raises ArtifactError when it does not describe a model."""
        try:
            return CONFIG_ADAPTER.validate_python(self.model)
        except (ValidationError, EdgeKVError) as e:
            raise ArtifactError(f"The manifest's model config is not valid: {_first(e)}") from e

    def kv_plan(self) -> KVPlan:
        """Plan the state anew; raises ArtifactError when the stored buffers differ."""
        config = self.config()
        try:
            plan = plan_kv(config, ctx=self.plan.ctx, chunk=self.plan.chunk, kv=self.plan.kv)
        except PlanError as e:
            raise ArtifactError(f"The manifest's KV plan is not valid: {e}") from e
        if plan_entry(plan) != self.plan:
            raise ArtifactError(
                "The manifest's KV plan is not the one its model config asks for; "
                "the manifest was edited or comes from another edge-kv; export again."
            )
        return plan


class Artifact:
    """An opened artifact directory: manifest read, sizes checked (digests by `check_digests`).

    Schema 2 carries its plan and its tokens; of schema 1, which models of the old seam still have,
    both are derived from the model config.
    """

    tokens: TokensEntry
    sampling: SamplingEntry
    config: Any  # ModelConfig; None for schema 2, whose runtimes need no model
    plan: Any  # KVPlan, or plan.Plan for schema 2

    def __init__(self, root: Path, manifest: Manifest | schema2.Manifest):
        self.root = root
        self.manifest: Any = manifest
        if isinstance(manifest, schema2.Manifest):
            self.config = None
            self.tokens, self.sampling = manifest.tokens, manifest.sampling
            try:
                self.plan = manifest.plan.plan()
            except PlanError as e:
                raise ArtifactError(f"The manifest's plan is not valid: {e}") from e
            self.model_digest = manifest.identity.model
            self.plan_digest = manifest.identity.plan
            return
        self.config, self.plan = manifest.config(), manifest.kv_plan()
        stops = manifest.tokenizer.stop_ids if manifest.tokenizer else []
        self.tokens = TokensEntry(
            vocab=self.config.vocab_size,
            bos=self.config.bos_id,
            eos=list(dict.fromkeys([*self.config.eos_ids, *stops])),
            pad=self.config.pad_id,
            suppress=[],
        )
        self.sampling = SamplingEntry()
        self.model_digest = model_fingerprint(manifest)
        entry = manifest.plan.model_dump_json()
        self.plan_digest = hashlib.sha256(entry.encode()).hexdigest()

    @property
    def family(self) -> str:
        """What kind of model it is, for people."""
        if self.config is not None:
            return str(self.config.family)
        model = self.manifest.made.get("model")
        return str(model.get("type", "")) if isinstance(model, dict) else ""

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        if self.config is not None:
            return int(self.config.n_layers)
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
        entries = self.manifest.parity
        if isinstance(self.manifest, schema2.Manifest):
            return entries[backend].model_dump() if backend in entries else {}
        found: dict[str, Any] = entries.get(
            backend, entries
        )  # the first backend's is the artifact's
        return found

    def check_digests(self) -> Iterator[tuple[str, int]]:
        """Verify every file's SHA-256, yielding (name, bytes) as each one passes.

        Raises:
            ArtifactError: a file's content is not what the manifest says.
        """
        for name, entry in self.manifest.files.items():
            self._check_digest(name, entry)
            yield name, entry.size

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

    def ple(self) -> PleEntry | None:
        """The per-layer embedding file; of schema 1, the one that the model config asks for.

        Raises:
            ArtifactError: the manifest has another one, or none.
        """
        entry: PleEntry | None = self.manifest.ple
        config = self.config
        if config is None:
            return entry
        said = (entry.rows, entry.n_layers, entry.dim) if entry else None
        wanted = (config.vocab_size, config.n_layers, config.ple_dim) if config.ple_dim else None
        if said != wanted:
            raise ArtifactError(
                f"{self.root}: the manifest has per-layer rows of {said}, its model of {wanted} "
                "(tokens, layers, values); it was edited; copy or export the artifact again."
            )
        return entry

    def _check_digest(self, name: str, entry: FileEntry) -> None:
        digest = sha256_file(self.path(name))
        if digest != entry.sha256:
            raise ArtifactError(
                f"{name} has SHA-256 {digest[:12]}…, the manifest says {entry.sha256[:12]}…: "
                "the file was changed; copy or export the artifact again."
            )


def read_artifact(root: str | Path) -> Artifact:
    """Open an artifact directory, checking schema, version, paths and sizes (not digests).

    Raises:
        ArtifactError: no such directory, not an artifact, another version, a path that leaves the
            directory, or a file that is missing or of another size.
    """
    root = Path(root)
    path = root / MANIFEST
    if not root.is_dir():
        raise ArtifactError(f"{root} is not a directory; give the directory `edge-kv export` made.")
    if not path.is_file():
        raise ArtifactError(f"{root} has no {MANIFEST}; it is not an edge-kv artifact.")
    try:
        text = path.read_bytes()
        raw = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ArtifactError(f"{path} is not valid JSON ({e}); the artifact is damaged.") from e
    if not isinstance(raw, dict):
        raise ArtifactError(f"{path} is not a JSON object; the artifact is damaged.")
    version = raw.get("schema_version")
    if version == schema2.SCHEMA_VERSION and version is not True:
        return _checked(root, path, schema2.parse_manifest(text, str(path)))
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema_version {repr(version)[:40]}, this edge-kv reads 1 and 2; "
            "update edge-kv or export again."
        )
    quant = raw.get("quant")
    if isinstance(quant, dict) and "block_size" in quant:
        raise ArtifactError(
            f"{path} is of an edge-kv that stored weights in another layout; export it again."
        )
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as e:
        raise ArtifactError(
            f"{path} is not a valid manifest ({_first(e)}); it was edited or comes from another "
            "edge-kv; export again."
        ) from e
    return _checked(root, path, manifest)


def _checked(root: Path, path: Path, manifest: Manifest | schema2.Manifest) -> Artifact:
    """The artifact of a manifest whose files are there."""
    for name, entry in manifest.files.items():
        _check_file(root, name, entry)
    for name in (
        _named_files(manifest) if isinstance(manifest, Manifest) else manifest.named_files()
    ):
        if name not in manifest.files:
            raise ArtifactError(f"{path} uses {name!r} but does not list its size and digest.")
    return Artifact(root, manifest)


def write_manifest(root: Path, manifest: Manifest | schema2.Manifest) -> None:
    """Write `manifest.json` beside and rename it: readers see the old one or the whole new one."""
    path = root / MANIFEST
    write_text(path, manifest.model_dump_json(indent=1) + "\n")


def plan_entry(plan: KVPlan) -> PlanEntry:
    """The stored form of a KV plan."""
    buffers = [
        {**asdict(b), "shape": list(b.shape), "readers": list(b.readers), "bytes": b.bytes}
        for b in plan.buffers
    ]
    return PlanEntry(ctx=plan.ctx, chunk=plan.chunk, kv=plan.kv, buffers=buffers)


def model_fingerprint(manifest: Manifest) -> str:
    """What ties a KV snapshot to a model: config, quantisation and every file's digest."""
    parts = [manifest.model, manifest.quant.scheme]
    parts += sorted((n, f.sha256) for n, f in manifest.files.items() if not n.startswith("verify"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _named_files(manifest: Manifest) -> Iterator[str]:
    for backend in manifest.backends.values():
        yield from backend.files
        yield from (p.file for p in backend.programs.values())
    if manifest.ple:
        yield manifest.ple.file
    if manifest.tokenizer:
        yield manifest.tokenizer.file
        if manifest.tokenizer.chat_template:
            yield manifest.tokenizer.chat_template


def _check_file(root: Path, name: str, entry: FileEntry | schema2.FileEntry) -> None:
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


def _first(e: Exception) -> str:
    if isinstance(e, ValidationError):
        error = e.errors()[0]
        where = ".".join(str(x) for x in error["loc"]) or "value"
        return f"{where}: {error['msg']}"
    return str(e)
