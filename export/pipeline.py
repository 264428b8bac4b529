"""export_model: checkpoint -> artifact directory, in stages that a killed run takes up again.

Everything happens in a hidden directory beside the target, which is renamed to it at the end:
weights, per-layer rows, tokenizer, programs, parity gate, manifest.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from edge_kv import __version__, models
from edge_kv.artifact import CHECKED_BYTES, MANIFEST, sample_of, sha256_file, write_manifest
from edge_kv.errors import ConfigError, ExportError, ParityError, WeightsError, did_you_mean
from edge_kv.export import gate
from edge_kv.export.backends import ATTENTIONS, BACKENDS, WEIGHTS, Lowered, Request
from edge_kv.export.calibrated_weights import (
    SHIPPED,
    Calibration,
    calibrate_weights,
    calibrated,
    plain_encoder,
)
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.unfinished import read_record, sole_exporter, write_record
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    ple_layout,
    weight_reports,
    write_ple,
    write_weights,
)
from edge_kv.files import unfinished
from edge_kv.manifest import (
    UNFINISHED,
    Backend,
    DrafterEntry,
    Entry,
    FileEntry,
    IdentityEntry,
    Manifest,
    NeedsEntry,
    ParityEntry,
    PlanEntry,
    PleEntry,
    QuantEntry,
    SamplingEntry,
    TensorReport,
    TokenizerEntry,
    TokensEntry,
    model_digest,
    plan_digest,
)
from edge_kv.models.model import Model
from edge_kv.models.random_source import RandomSource
from edge_kv.models.sources import Paired, Source, open_drafter, open_model
from edge_kv.needs import count_needs, read_by_draft
from edge_kv.nets.oracle import Run, oracle, oracle_drafts, table_values
from edge_kv.nets.weights import Read, Weights
from edge_kv.parity import Scores
from edge_kv.plan import Plan
from edge_kv.ple import PleTable
from edge_kv.progress import Progress, Silent
from edge_kv.request import check_new
from edge_kv.tensors import AUTO, KEPT, parse_changes, storage
from edge_kv.weights.files import identity
from edge_kv.weights.source import Generation
from edge_kv.weights.tokenizer import opened, text_end, text_start, usable_tokenizer

log = logging.getLogger(__name__)
JOURNAL, REQUEST = "journal.jsonl", "request.json"
# What a killed export leaves that the next one writes anew.
_LEFT_OVER = ("*.part", MANIFEST, "verify*.npz")


def export_model(
    *,
    model: str | None = None,
    weights: str | None = None,
    assistant: str | None = None,
    ctx: int,
    chunk: int = 128,
    drafts: int = models.DRAFTS,
    kv: str = "int8",
    quant: str = AUTO,
    store: Sequence[str] = (),
    backends: tuple[str, ...] = ("onnx",),
    attention: str = "native",
    calibration: str = SHIPPED,
    device: str = "cpu",
    out: Path,
    open_session: gate.OpenSession,
    progress: Progress | None = None,
) -> Path:
    """Export a model to the artifact directory `out`; returns `out`.

    Args:
        model: name of a row of `models.ROWS`; its official checkpoint is used when `weights` is
            left out.
        weights: directory, `.gguf`, hub id or `random[:seed]`.
        assistant: what drafts for the model, exported beside it: a directory, hub id or
            `random[:seed]`.
        ctx, chunk: positions of context, tokens of a prefill step.
        drafts: most tokens that a pass of decode checks behind the one it decodes.
        kv: state storage f32 | f16 | int8.
        quant: weight storage int4 | int8 | none | auto, which keeps a quantised checkpoint as it is
            and makes int4 of a float one.
        store: weight formats of kinds of tensors, `kind=format`, other than the scheme's.
        attention: of ExecuTorch programs: native (operators of ours) or portable (stock ones).
        calibration: text that 4-bit weights are rounded for: shipped, none, or a file.
        device: what calibration computes on: cpu, or a device torch knows.
        open_session: opens an artifact directory for an engine; the parity gate runs on it.

    Raises:
        ConfigError, PlanError, WeightsError: the request cannot be served.
        ExportError: lowering or writing failed. ParityError: the result is not the model.
    """
    for backend in backends:
        if backend not in BACKENDS:
            raise ConfigError(f"Unknown backend {backend!r}.{did_you_mean(backend, BACKENDS)}")
    if attention not in ATTENTIONS:
        raise ConfigError(f"Unknown attention {attention!r}.{did_you_mean(attention, ATTENTIONS)}")
    if attention != "native" and "executorch" not in backends:
        raise ConfigError(f"Attention {attention!r} is ExecuTorch's; add --backend executorch.")
    if attention != "native" and assistant:
        raise ConfigError(
            f"Programs with {attention} attention do not check drafts; leave --assistant out, or "
            "use --attention native."
        )
    changes = parse_changes(store)
    scheme, formats = storage(quant, (), {}, changes)
    check_new(out)
    source = open_model(models.get_row(model) if model else None, weights, formats)
    config = source.config
    plan = models.plan(config, ctx=ctx, chunk=chunk, kv=kv, drafts=drafts)
    drafter: Model | None = None
    whole: Source = source
    if assistant:
        drafter, drafting = open_drafter(assistant, config, formats)
        whole = Paired(source, drafting)
    rows, held = models.weights(config, drafter), whole.formats()
    scheme, formats = storage(quant, rows, held, changes)
    if held and scheme not in (KEPT, "none"):
        log.warning(
            "%s holds integers already (%s); --quant %s rounds them a second time, and parity says "
            "what that costs. --quant auto keeps them.",
            source.label, ", ".join(sorted(set(held.values()))), quant,
        )  # fmt: skip
    for backend in backends:
        BACKENDS[backend].check(config, attention)
    layouts = {b: BACKENDS[b].layout(rows, formats, attention) for b in backends}
    for layout in layouts.values():
        layout.steps = dict(whole.steps())
    whole.check()
    job = _Job(
        source, whole, drafter, plan, scheme, layouts, attention, calibration, device, out,
        open_session, progress or Silent(),
    )  # fmt: skip
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ExportError(f"Cannot write beside {out} ({e.strerror}).") from e
    with sole_exporter(out):
        if out.exists():
            raise ExportError(f"{out} already exists; another export made it meanwhile.")
        job.run()
    return out


@dataclass(frozen=True)
class _Written:
    """What the programs stand on: error reports of the weights, per-layer rows, tokenizer."""

    reports: dict[str, TensorReport]
    ple: PleEntry | None
    tokenizer: TokenizerEntry | None


@dataclass(frozen=True)
class _Reference:
    """What the model over one weight file gives, and what it is held against.

    `source` are the logits of the checkpoint, `kept` those of the stored weights over a state that
    is not rounded, where these are to be the same. `drafts` are those of the stored drafter and
    `source_drafts` those of its checkpoint, behind the same model.
    """

    logits: Tensor
    source: Tensor
    kept: Tensor | None
    drafts: list[Scores]
    source_drafts: list[Scores]


class _Job:
    """One export: the paths and facts its stages share."""

    def __init__(
        self, source: Source, whole: Source, drafter: Model | None, plan: Plan, scheme: str,
        layouts: dict[str, WeightLayout],
        attention: str, calibration: str, device: str, out: Path, open_session: gate.OpenSession,
        progress: Progress,
    ):  # fmt: skip
        self.source, self.plan, self.layouts, self.out = source, plan, layouts, out
        self.whole, self.drafter = whole, drafter  # source is of the model that it drafts for
        self.scheme, self.attention, self.device = scheme, attention, device
        self.layout = next(iter(layouts.values()))
        self.config: Model = source.config
        self.open_session, self.progress = open_session, progress
        self.root = unfinished(out)
        self.identity = identity(whole.files)
        self.start = [] if self.config.bos_id is None else [self.config.bos_id]
        text = source.text
        content = text.tokenizer_json() if text else None
        self.tokenizer_json = content and usable_tokenizer(content, self.config.vocab, source.label)
        self.bos_id, self.adds_bos = self.config.bos_id, False
        first: list[int] = []  # of the end tokens: the one that templates write
        if text and self.tokenizer_json:
            engine, named = opened(self.tokenizer_json, source.label), text.named("bos_token")
            self.bos_id, self.adds_bos = text_start(
                engine, named, self.bos_id, self.config.vocab, source.label
            )
            first = text_end(engine, text.named("eos_token"))
        self.template = text.chat_template() if text else None
        said = text.generation() if text else Generation()
        stop_ids = text.stop_ids() if text else []
        eos_ids = list(dict.fromkeys([*first, *self.config.eos_ids, *stop_ids]))
        self.tokens = _tokens(self.config, self.bos_id, eos_ids, said, source.label)
        self.sampling = _sampling(self.config, said, source.label)
        self.unused = list(said.unused)
        wanted = scheme != KEPT and any(self._calibrated(layout) for layout in layouts.values())
        encode, longest = plain_encoder(self.tokenizer_json), self.config.max_ctx
        self.calibration = (
            Calibration.of(calibration, encode, self.start, longest) if wanted else None
        )
        self.model = _described(self.config)

    def run(self) -> None:
        self._begin()
        try:
            written = self._write()
            lowered = {}
            for name in self.layouts:
                self.progress.stage(f"programs: {name}")
                request = Request(self.config, self.plan, written.ple, self.attention, self.drafter)
                lowered[name] = BACKENDS[name].lower(request, self._stored(name), self.root / name)
            self._finish(written, lowered)
        except (ParityError, WeightsError):  # running it again would end the same way
            shutil.rmtree(self.root)
            raise
        except OSError as e:
            raise ExportError(
                f"Writing {self.root} failed ({e.strerror}); free some disk space and run the "
                "same command again: it continues where it stopped."
            ) from e

    def _begin(self) -> None:
        """Continue an interrupted export of the very same request, else start over.

        The same request is one for the same content: what was written of another checkpoint under
        the same name must not end up beside what is read now.
        """
        request = {
            "edge_kv": __version__,
            "torch": torch.__version__,
            "source": self.whole.label,
            "files": self.identity,
            "model": self.model,
            "drafter": self.drafter and _described(self.drafter),
            "plan": [self.plan.ctx, self.plan.chunk, self.plan.kv, self.plan.drafts],
            "quant": [self.scheme, self.layout.formats],
            "backends": list(self.layouts),
            "attention": self.attention,
            "calibration": self.calibration and self.calibration.digest,
        }
        held = self.root / REQUEST
        try:
            if self.root.exists() and read_record(held) != request:
                held.unlink(missing_ok=True)  # first: half a removal must not be taken up
                shutil.rmtree(self.root)
            for name in self.layouts:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            for path in [p for pattern in _LEFT_OVER for p in self.root.rglob(pattern)]:
                path.unlink()
            write_record(held, request)
        except OSError as e:
            raise ExportError(
                f"The unfinished export {self.root} cannot be used ({e.strerror or e}); remove it, "
                "or choose another --out."
            ) from e

    def _write(self) -> _Written:
        """Weights of every backend, per-layer rows, tokenizer."""
        found = {}
        for name, layout in self.layouts.items():
            if self._owner(name) != name:
                continue
            self.progress.stage("weights")
            journal = Journal(self.root / name / JOURNAL)
            path = self._stored(name).path
            left = self._calibrated(layout) if self.calibration else frozenset()
            write_weights(self.whole, layout, path, journal, self.progress, left)
            if self.calibration and left:
                self.progress.stage("calibration", "matrices")
                calibrate_weights(
                    self.config, self.source.read, layout, path, journal, self.calibration,
                    self.progress, device=self.device,
                    token_rows=table_values(self.config, self.source.read),
                )  # fmt: skip
            found[name] = weight_reports(layout, journal)
        reports = next(iter(found.values()))
        rows = self.config.token_rows
        ple = ple_layout(rows, self.config.vocab, self.layout.formats)
        if rows and ple:
            self.progress.stage("per-layer embeddings")
            path, journal = self.root / ple.file, Journal(self.root / JOURNAL)
            error = write_ple(self.source, rows.name, ple, path, journal, self.progress)
            if ple.bits < 32:
                reports[rows.name] = TensorReport(format=f"int{ple.bits}-f16", error=error)
        self._unchanged()
        return _Written(reports, ple, self._tokenizer())

    def _calibrated(self, layout: WeightLayout) -> frozenset[str]:
        """What is calibrated: weights of the model, and none of its drafter."""
        return calibrated(layout) & {row.name for row in models.weights(self.config)}

    def _unchanged(self) -> None:
        """Refuse to go on when a source file is not what it was at the start."""
        if identity(self.whole.files) != self.identity:
            raise WeightsError(
                f"{self.whole.label} was changed while it was exported, so nothing was written; "
                "run the same command again when its files are complete."
            )

    def _owner(self, name: str) -> str:
        """The backend in whose folder the weights of backend `name` lie: ONNX's programs find
        theirs beside them, others share them where the layout is the same."""
        layout = self.layouts[name]
        sharing = [b for b, other in self.layouts.items() if type(other) is type(layout)]
        return "onnx" if "onnx" in sharing else sharing[0]

    def _stored(self, name: str) -> StoredWeights:
        """The weight file of a backend."""
        return StoredWeights(self.layouts[name], self.root / self._owner(name) / WEIGHTS)

    def _tokenizer(self) -> TokenizerEntry | None:
        if self.tokenizer_json is None:
            return None
        (self.root / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        if self.template is not None:
            (self.root / "chat_template.jinja").write_text(self.template, encoding="utf-8")
        return TokenizerEntry(
            file="tokenizer.json",
            chat_template="chat_template.jinja" if self.template is not None else None,
            add_bos=self.adds_bos,
        )

    def _finish(self, written: _Written, lowered: dict[str, Lowered]) -> None:
        """Judge the programs of every backend and write the manifest."""
        drafted = self.drafter is not None
        run = gate.plan_run(self.plan, self.config.vocab, self._encoder(), drafter=drafted)
        # Random weights are drawn as a plain layout stores them.
        plain = all(type(layout) is WeightLayout for layout in self.layouts.values())
        drawn = plain and isinstance(self.source, RandomSource)
        self.progress.stage("parity: float reference", "modules")
        source = None if drawn else self._oracle(run, written, None).logits(run.prompt)
        self._unchanged()
        parity: dict[str, ParityEntry] = {}
        references: dict[str, _Reference] = {}  # of each weight file
        for name, programs in lowered.items():
            owner = self._owner(name)
            if owner not in references:
                self.progress.stage(f"parity: stored weights of {owner}", "modules")
                references[owner] = self._reference(run, written, owner, source)
            judged = self._judged(run, written, name, programs, references[owner])
            judged["vectors"] = f"verify.{name}.npz" if parity else "verify.npz"
            of = references[owner]
            gate.write_vectors(self.root / judged["vectors"], run, of.logits, of.drafts)
            parity[name] = ParityEntry.model_validate_json(json.dumps(judged))
        for programs in lowered.values():
            for path in programs.scratch:
                path.unlink()
        for path in self.root.rglob("*"):
            if path.name in (JOURNAL, REQUEST, MANIFEST):
                path.unlink()
        self.progress.stage("digests")
        backends = {name: programs.shipped for name, programs in lowered.items()}
        write_manifest(self.root, self._manifest(written, backends, parity))
        if self.out.exists():
            raise ExportError(
                f"{self.out} was made meanwhile; move it away and run the same command again."
            )
        self.root.rename(self.out)

    def _reference(
        self, run: gate.GateRun, written: _Written, owner: str, source: Tensor | None
    ) -> _Reference:
        """What the weight file of backend `owner` gives; `source` are the logits of the checkpoint,
        None where it is drawn as it is stored."""
        stored = self._stored(owner)
        read = self._oracle(run, written, stored)
        logits = read.logits(run.prompt)
        drafts, of_source = (self._drafts(run, read, weights) for weights in (stored, None))
        kept = None
        if source is None or self.scheme == "none" or self._keeps_all(self.layouts[owner]):
            kept = self._oracle(run, written, stored, exact_state=True).logits(run.prompt)
        if source is None:
            assert kept is not None
            source, kept = kept, None
        return _Reference(logits, source, kept, drafts, of_source)

    def _judged(
        self, run: gate.GateRun, written: _Written, name: str, programs: Lowered, of: _Reference
    ) -> dict[str, Any]:
        """The manifest's `parity` entry of one backend, but for the file of vectors."""
        self.progress.stage(f"parity: programs of {name}", "modules")
        fed = run if programs.shipped.checks_drafts else replace(run, passes=())

        def answers(backend: Backend) -> gate.Answers:
            write_manifest(self.root, self._manifest(written, {name: backend}, {}))
            session = self.open_session(self.root, BACKENDS[name].gate)
            try:
                return gate.replay(session, fed)
            finally:
                session.close()

        @cache
        def moved() -> Run:
            return self._oracle(run, written, self._stored(name), moved=True)

        exact, shipped = answers(programs.exact), answers(programs.shipped)
        rounds = bool(self.layout.steps)
        judged = gate.judge(
            fed,
            self.plan,
            exact=exact.logits,
            shipped=shipped.logits,
            stored=of.logits,
            source=of.source,
            scheme=self.scheme,
            moved=lambda: moved().logits(run.prompt),
            kept=of.kept,
            rounds=rounds,
        )
        if run.bursts:
            judged["draft"] = gate.judge_drafts(
                self.plan,
                exact=exact.drafts,
                shipped=shipped.drafts,
                stored=of.drafts,
                source=of.source_drafts,
                lossless=self.scheme == "none",
                moved=lambda: self._drafts(run, moved(), self._stored(name), moved=True),
                rounds=rounds,
            )
        return judged

    def _keeps_all(self, layout: WeightLayout) -> bool:
        """Whether every matrix is stored as the checkpoint holds it."""
        own = {row.name for row in models.weights(self.config)}
        stored = (t.spec.name for t in layout.tensors if t.format and t.spec.name in own)
        return self.scheme == KEPT and layout.calibrates and all(map(self.source.is_exact, stored))

    def _manifest(
        self, written: _Written, backends: dict[str, Backend], parity: dict[str, ParityEntry]
    ) -> Manifest:
        """The manifest of what is there; with digests once the programs are judged."""
        files = _files(self.root, digests=bool(parity))
        config, formats = self.config, self.layout.formats
        quant = QuantEntry(scheme=self.scheme, formats=formats, tensors=written.reports)
        entry = PlanEntry.of(self.plan)
        calibration = {"calibration": self.calibration.as_dict()} if self.calibration else {}
        drafter = None
        if self.drafter:
            read = read_by_draft(self.drafter, self.scheme, formats)
            drafter = DrafterEntry(width=config.hidden, read=read)
        return Manifest(
            schema_version=2,
            edge_kv=__version__,
            name=self.out.name,
            tokens=self.tokens,
            sampling=self.sampling,
            identity=IdentityEntry(
                model=model_digest(self.model, quant, files), plan=plan_digest(entry)
            ),
            plan=entry,
            quant=quant,
            ple=written.ple,
            drafter=drafter,
            backends=backends,
            tokenizer=written.tokenizer,
            parity=parity,
            needs=NeedsEntry.of(count_needs(config, self.scheme, formats, self.drafter)),
            files=files,
            made={
                "source": self.whole.label,
                "torch": torch.__version__,
                "model": self.model,
                **({"drafter": _described(self.drafter)} if self.drafter else {}),
                **({"unused": self.unused} if self.unused else {}),
                **calibration,
            },
        )

    def _encoder(self) -> Callable[[str], list[int]] | None:
        plain = plain_encoder(self.tokenizer_json)
        return plain and (lambda text: [*self.start, *plain(text)])

    def _oracle(
        self, run: gate.GateRun, written: _Written, stored: StoredWeights | None, *,
        exact_state: bool = False, moved: bool = False,
    ) -> Run:  # fmt: skip
        """The model over the tokens of `run`, by the source's weights or a backend's stored ones.

        `exact_state`: stored weights over a state that is not rounded as the plan says.
        `moved`: see `_weights`.
        """
        weights, read = self._weights(stored, moved=moved)
        entry = written.ple
        table = PleTable(self.root / entry.file, entry) if stored and entry else None

        def rows(ids: Tensor) -> Tensor:
            assert table and entry
            return torch.from_numpy(table.rows(ids.numpy(), entry.n_layers))

        held = rows if table else None
        values = held if stored else table_values(self.config, self.source.read)
        kv = "f32" if stored is None or exact_state else self.plan.kv
        try:
            return oracle(
                self.config, weights, read, torch.from_numpy(run.ids), kv=kv, token_values=values,
                on_module=lambda done, total: self.progress.advance("modules", done, total),
            )  # fmt: skip
        finally:
            if table:
                table.close()

    def _drafts(
        self, run: gate.GateRun, over: Run, stored: StoredWeights | None, *, moved: bool = False
    ) -> list[Scores]:
        """What the drafter says in the bursts of `run`, whose tokens the model has read in `over`.

        By the source's weights, or by a backend's stored ones; `moved`: see `_weights`.
        """
        if self.drafter is None:
            return []
        weights, read = self._weights(stored, moved=moved)
        places = [range(run.prompt + b.start, run.prompt + b.stop) for b in run.bursts]
        return oracle_drafts(self.drafter, weights, read, over, places)

    def _weights(self, stored: StoredWeights | None, *, moved: bool) -> tuple[Weights, Read]:
        """What makes the modules of model and drafter, and what yields their values.

        `moved`: stored ones moved by their last digit, see `gate.perturbed`.
        """
        rows = models.weights(self.config, self.drafter)
        if stored is None:

            def source_rows(name: str, start: int, stop: int) -> Tensor:
                return torch.from_numpy(self.whole.read(name, start, stop))

            return Weights(rows, self.layout.steps), source_rows
        ulps = gate.ROUNDED_ULPS if self.layout.steps else 1
        read = gate.perturbed(stored.read, ulps) if moved else stored.read
        return PackedWeights(rows, stored.layout), read


def _tokens(
    config: Model, bos_id: int | None, eos_ids: list[int], said: Generation, label: str
) -> TokensEntry:
    """What the manifest says of tokens; raises as `_recorded`."""
    return _recorded(
        TokensEntry, label, vocab=config.vocab, bos=bos_id, eos=eos_ids, pad=config.pad_id,
        suppress=sorted(set(said.suppress_tokens)),
    )  # fmt: skip


def _sampling(config: Model, said: Generation, label: str) -> SamplingEntry:
    """What the manifest says of sampling; raises as `_recorded`."""
    top_k = said.top_k and min(said.top_k, config.vocab)
    return _recorded(
        SamplingEntry, label, temperature=said.temperature, top_k=top_k, top_p=said.top_p,
        min_p=said.min_p, repetition_penalty=said.repetition_penalty,
    )  # fmt: skip


_Part = TypeVar("_Part", bound=Entry)


def _recorded(part: type[_Part], label: str, **values: Any) -> _Part:
    """A part of the manifest of the checkpoint called `label`, made before any work is done.

    Raises:
        ConfigError: a value that no manifest can hold.
    """
    try:
        return part(**values)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False)[0]
        field, value = ".".join(map(str, error["loc"])), repr(error["input"])
        raise ConfigError(
            f"{label}: {field} is {value if len(value) <= 40 else value[:39] + '…'}, which no "
            f"artifact can hold ({error['msg']}); correct the checkpoint's files."
        ) from e


def _described(config: Model) -> dict[str, Any]:
    """A config as JSON holds it."""
    fields: dict[str, Any] = json.loads(
        json.dumps({"type": models.name_of(config), **asdict(config)})
    )
    return fields


def _files(root: Path, *, digests: bool) -> dict[str, FileEntry]:
    """Every file of the artifact, with its digests (zeros while the gate runs).

    Programs that are not large are read whole at every load, reference logits by `verify` alone.
    """
    skip = {MANIFEST, JOURNAL, REQUEST}
    found = {}
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name in skip:
            continue
        size = path.stat().st_size
        program = path.suffix in (".onnx", ".pte") and size <= CHECKED_BYTES
        sampled = digests and not program and path.suffix != ".npz"
        found[path.relative_to(root).as_posix()] = FileEntry(
            size=size,
            sha256=sha256_file(path) if digests else UNFINISHED,
            sample=sample_of(path) if sampled else None,
        )
    return found
