"""`manifest.json` of an artifact, schema 2: what a runtime needs to know, and nothing to compute.

The manifest carries the tables of the decode state, the programs, the special tokens and the
sampling its checkpoint recommends. A runtime reads no model config: that stays under `made`, for
people. Digests are written once, by the exporter; readers only compare them. A manifest is foreign
input, so every field has a type and bounds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_kv.errors import ArtifactError, PlanError
from edge_kv.files import LONGEST_TEXT
from edge_kv.needs import Needs
from edge_kv.plan import MOST_DRAFTS, Plan, Table

SCHEMA_VERSION = 2
DRAFTS_AXIS = "tokens"  # open axis of what `decode` takes
DRAFT = "draft"  # the program of a drafter
HIDDEN = "hidden"  # what it takes up, and what `decode` returns for it
CARRY = f"{HIDDEN}.out"  # what `draft` returns for the next draft
TOKENS = "tokens"  # which tokens its logits are of
PLE = "ple"  # input of programs that take rows of the per-layer embedding
UNFINISHED = "0" * 64  # stands for every digest while an export is not over
LONGEST_MANIFEST = 8 << 20  # bytes
STATE_LIMIT = 1 << 42  # bytes of state that no plan exceeds
_MOST = (1 << 31) - 1

Count = Annotated[int, Field(ge=1, le=_MOST)]
Number = Annotated[int, Field(ge=0, le=_MOST)]
Size = Annotated[int, Field(ge=0, le=1 << 53)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
Axis = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]{0,15}$")]
Label = Annotated[str, Field(max_length=256)]
FileName = Annotated[str, Field(min_length=1, max_length=256)]  # its path is checked where opened
Share = Annotated[float, Field(ge=0, le=1)]
Distance = Annotated[float, Field(ge=0, le=1e30)]


class Entry(BaseModel):
    """A part of a manifest: no field it does not know, no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(Entry):
    """Size in bytes and SHA-256 of one file of the artifact; `sample` is the SHA-256 of pieces
    spread over it (`artifact.sample_of`), of files that are too large to be read at every load."""

    size: Size
    sha256: Digest
    sample: Digest | None = None


class TokensEntry(Entry):
    """The vocabulary's size and the ids with a meaning of their own."""

    vocab: Count
    bos: Number | None
    eos: Annotated[list[Number], Field(max_length=64)]
    pad: Number | None
    suppress: Annotated[list[Number], Field(max_length=65_536)]  # never to be generated


class SamplingEntry(Entry):
    """What the checkpoint recommends; None where it says nothing."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Number | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None


class IdentityEntry(Entry):
    """What ties a snapshot to its model and to the layout of its state."""

    model: Digest
    plan: Digest


class TableEntry(Entry):
    """One table of state: see `plan.Table`."""

    name: Name
    row: tuple[Count, Count]
    slots: Count
    stride: Count
    keep: Number
    dtype: Literal["f32", "f16", "int8"]
    writer: Number
    readers: Annotated[list[Number], Field(max_length=4096)]
    picks: Number
    exact: bool


class PlanEntry(Entry):
    """The state of the model: see `plan.Plan`."""

    ctx: Count
    chunk: Count
    kv: Literal["f32", "f16", "int8"]
    tables: Annotated[list[TableEntry], Field(max_length=65_536)]
    drafts: Annotated[int, Field(ge=0, le=MOST_DRAFTS)] = 0

    @classmethod
    def of(cls, plan: Plan) -> PlanEntry:
        tables = [TableEntry(**{**asdict(t), "readers": list(t.readers)}) for t in plan.tables]
        return cls(
            ctx=plan.ctx, chunk=plan.chunk, kv=plan.kv, tables=tables,  # type: ignore[arg-type]
            drafts=plan.drafts,
        )  # fmt: skip

    def plan(self) -> Plan:
        """The plan it describes.

        Raises:
            PlanError: tables that could lose a row, or more state than any machine has.
        """
        tables = [Table(**{**t.model_dump(), "readers": tuple(t.readers)}) for t in self.tables]
        plan = Plan(self.ctx, self.chunk, self.kv, tuple(tables), self.drafts)
        plan.validate()
        if plan.bytes > STATE_LIMIT:
            raise PlanError(f"The tables take {plan.bytes} bytes, more than {STATE_LIMIT}.")
        return plan


class TensorReport(Entry):
    """How one tensor was stored: its weight format and ||w - q(w)|| / ||w||."""

    format: Name
    error: Distance


class QuantEntry(Entry):
    """Weight storage: the scheme, the weight format of each kind of tensor, and the error of every
    quantised tensor."""

    scheme: Name
    formats: dict[Name, Name]
    tensors: dict[Name, TensorReport]


class PleEntry(Entry):
    """Layout of the per-layer embedding file: one row a token, read by row outside the graph.

    A row is n_layers * dim values (bits 4: two in a byte, low nibble first, stored + 8; bits 8:
    int8; bits 32: f32) and then, below 32 bits, one f16 scale for every `block` values.
    """

    file: FileName
    rows: Count
    n_layers: Count
    dim: Count
    bits: Count
    block: Number

    @property
    def values(self) -> int:
        return self.n_layers * self.dim

    @property
    def data_bytes(self) -> int:
        return self.values * self.bits // 8

    @property
    def row_bytes(self) -> int:
        scales = 0 if self.bits == 32 else self.values // self.block * 2
        return self.data_bytes + scales


class DrafterEntry(Entry):
    """What drafts beside the model, in the program `draft`: the values of a hidden state that it
    takes up, and the bytes of weights that one draft reads."""

    width: Count
    read: Size


class TensorIO(Entry):
    """One graph input or output; an open axis is a name ("chunk", "tokens", "live")."""

    name: Name
    dtype: Name
    shape: Annotated[list[Count | Axis], Field(max_length=8)]


class Program(Entry):
    """One exported graph and its contract."""

    file: FileName
    inputs: Annotated[list[TensorIO], Field(max_length=65_536)]
    outputs: Annotated[list[TensorIO], Field(max_length=65_536)]


class Backend(Entry):
    """Programs of one runtime: `prefill` (no logits), `decode` (the logits of each token), and
    `draft` where the artifact has a drafter (the logits of some tokens)."""

    programs: dict[Name, Program]
    files: Annotated[list[FileName], Field(max_length=4096)]  # what it needs beside the manifest
    details: dict[str, Any] = {}

    @property
    def checks_drafts(self) -> bool:
        """Whether `decode` takes the drafts that the plan counts, behind the first token."""
        decode = self.programs.get("decode")
        return decode is not None and any(i.shape == [DRAFTS_AXIS] for i in decode.inputs)


class TokenizerEntry(Entry):
    """Where the tokenizer and the chat template lie."""

    file: FileName
    chat_template: FileName | None = None
    add_bos: bool = True


class VerifyEntry(Entry):
    """What a device's programs may differ by from the reference vectors."""

    max_kl: Distance
    min_top1: Share


class DraftVerifyEntry(VerifyEntry):
    """What a device's drafts may differ by from the reference vectors."""

    min_common: Share  # of the tokens that are scored


class DraftParityEntry(Entry):
    """What one backend's `draft` met when it was made."""

    drafts: Count
    lowering: dict[Name, Distance]
    kernels: dict[Name, Distance]
    quantisation: dict[Name, Distance]
    correlation: Annotated[float, Field(ge=-1, le=1)]  # of logits with its checkpoint's
    lowering_limit: dict[Name, Distance]
    verify: DraftVerifyEntry


class ParityEntry(Entry):
    """What one backend's programs met when they were made, and the vectors to check them by."""

    prompt: Number
    steps: Count
    lowering: dict[Name, Distance]
    kernels: dict[Name, Distance]
    quantisation: dict[Name, Distance]
    perplexity: dict[Name, Distance] | None = None  # of a text, where there was one
    correlation: Annotated[float, Field(ge=-1, le=1)]  # of logits with the checkpoint's
    # By how much passes of several tokens move the likeliest one's lead; None: not measured.
    lead_change: Distance | None = None
    lowering_limit: dict[Name, Distance]
    vectors: FileName
    verify: VerifyEntry
    draft: DraftParityEntry | None = None  # None: no drafter, or one that was not judged


class NeedsEntry(Entry):
    """What the weights take, as the exporter counted it: see `needs.Needs`."""

    weights: dict[Name, Size]
    dense: Size
    experts: Size
    read_weights: Size
    read_experts: Size
    prefill: Size
    row: Number

    @classmethod
    def of(cls, needs: Needs) -> NeedsEntry:
        return cls(**{name: getattr(needs, name) for name in cls.model_fields})


class Manifest(Entry):
    """`manifest.json`, schema 2."""

    schema_version: Literal[2]
    edge_kv: Label
    name: Label
    tokens: TokensEntry
    sampling: SamplingEntry
    identity: IdentityEntry
    plan: PlanEntry
    quant: QuantEntry
    ple: PleEntry | None
    drafter: DrafterEntry | None = None
    backends: dict[Name, Backend]
    tokenizer: TokenizerEntry | None
    parity: dict[Name, ParityEntry]
    needs: NeedsEntry
    files: dict[FileName, FileEntry]
    made: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the export is over: until then files have no digests."""
        return all(entry.sha256 != UNFINISHED for entry in self.files.values())

    def named_files(self) -> Iterator[str]:
        """Every file that some part of the manifest uses."""
        for backend in self.backends.values():
            yield from backend.files
            yield from (p.file for p in backend.programs.values())
        if self.ple:
            yield self.ple.file
        if self.tokenizer:
            yield self.tokenizer.file
            if self.tokenizer.chat_template:
                yield self.tokenizer.chat_template
        if self.finished:
            yield from (p.vectors for p in self.parity.values())


def parse_manifest(text: bytes, where: str) -> Manifest:
    """The manifest in `text`, every field checked.

    Raises:
        ArtifactError: a field is missing, unknown, of another type or out of range, by name.
    """
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(x) for x in error["loc"])[:120] or "the document"
        raise ArtifactError(
            f"{where} is not a valid manifest ({field}: {error['msg']}); it was edited or comes "
            "from another edge-kv; export again."
        ) from e
    tokens = manifest.tokens
    ids = [i for i in (tokens.bos, tokens.pad, *tokens.eos, *tokens.suppress) if i is not None]
    if max(ids, default=0) >= tokens.vocab:
        raise ArtifactError(
            f"{where} names token {max(ids)} of a vocabulary of {tokens.vocab}; it was edited; "
            "export again."
        )
    _check_token_rows(manifest, where)
    _check_texts(manifest, where)
    return manifest


def _check_token_rows(manifest: Manifest, where: str) -> None:
    """Programs take per-layer rows that the file of them holds, for every token."""
    ple = manifest.ple
    held = (ple.rows, ple.n_layers, ple.dim) if ple else None
    for backend in manifest.backends.values():
        for name, program in backend.programs.items():
            if name == DRAFT:
                continue
            shapes = [i.shape for i in program.inputs if i.name == PLE]
            wanted = [(manifest.tokens.vocab, *shape[1:]) for shape in shapes]
            if len(wanted) != bool(ple) or not all(ple and _part_of(w, ple) for w in wanted):
                raise ArtifactError(
                    f"{where}: the file of per-layer rows holds {held} (tokens, layers, values), "
                    f"{program.file} takes {wanted[0] if wanted else None}; it was edited; copy or "
                    "export the artifact again."
                )


def _check_texts(manifest: Manifest, where: str) -> None:
    """What is read as a whole, tokenizer and template, is no longer than any text."""
    entry = manifest.tokenizer
    for name in (entry.file, entry.chat_template) if entry else ():
        listed = manifest.files.get(name or "")
        if listed and listed.size > LONGEST_TEXT:
            raise ArtifactError(
                f"{where} lists {name} with {listed.size} bytes, at most {LONGEST_TEXT} are read; "
                "it was edited; export again."
            )


def _part_of(wanted: tuple[int | str, ...], ple: PleEntry) -> bool:
    """Whether a program's (tokens, layers, values) are the first layers of all rows of a file."""
    tokens, layers, dim = wanted if len(wanted) == 3 else (0, 0, 0)
    return tokens == ple.rows and dim == ple.dim and layers in range(1, ple.n_layers + 1)


def live_axis(table: Table) -> str | None:
    """Name of the axis that grows with the position, for tables bound as a prefix."""
    if table.keep or table.slots == 1:
        return None
    return "live" if table.stride == 1 else f"live{table.stride}"


def table_shape(table: Table) -> tuple[int | str, ...]:
    """Shape under which programs take and return a table."""
    return (live_axis(table) or table.slots, *table.row)


def tokens_axis(program: str, plan: Plan) -> str | None:
    """The open axis of the tokens a program takes: up to a chunk, up to the drafts + 1; or one."""
    if program == "decode":
        return DRAFTS_AXIS if plan.drafts else None
    return "chunk" if plan.chunk > 1 else None


def logits_shape(plan: Plan, vocab: int) -> tuple[int | str, ...]:
    """Shape of what `decode` returns; without drafts there is no axis of tokens."""
    axis = tokens_axis("decode", plan)
    return (axis, vocab) if axis else (vocab,)


def draft_outputs(vocab: int, width: int, scored: int) -> list[TensorIO]:
    """What `draft` returns: logits of `scored` tokens, what the next draft takes up, and which
    tokens these are where they are not all `vocab`."""
    out = [
        TensorIO(name="logits", dtype="float", shape=[scored]),
        TensorIO(name=CARRY, dtype="float", shape=[1, width]),
    ]
    tokens = TensorIO(name=TOKENS, dtype="int64", shape=[scored])
    return out if scored == vocab else [*out, tokens]


def model_digest(model: dict[str, Any], quant: QuantEntry, files: dict[str, FileEntry]) -> str:
    """What ties a snapshot to a model: config, weight storage and every file's digest."""
    parts: list[Any] = [model, quant.scheme]
    parts += sorted((n, f.sha256) for n, f in files.items() if not n.startswith("verify"))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def plan_digest(plan: PlanEntry) -> str:
    """What ties a snapshot to the layout of its state."""
    return hashlib.sha256(plan.model_dump_json().encode()).hexdigest()
