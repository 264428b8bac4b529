"""export_model: checkpoint -> artifact directory, in stages that a killed run takes up again.

Everything happens in a hidden directory beside the target, which is renamed to it at the end:
weights, PLE file, tokenizer, programs, parity gate, manifest.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_kv import __version__, models, tensors
from edge_kv.artifact import (
    MANIFEST,
    SCHEMA_VERSION,
    Backend,
    FileEntry,
    Manifest,
    PleEntry,
    QuantEntry,
    TensorReport,
    TokenizerEntry,
    plan_entry,
    sha256_file,
    write_manifest,
)
from edge_kv.config import ModelConfig
from edge_kv.errors import ConfigError, ExportError, ParityError, WeightsError, did_you_mean
from edge_kv.export import gate, net_pipeline
from edge_kv.export.backends import BACKENDS as net_backends
from edge_kv.export.calibrated_weights import (
    SHIPPED,
    Calibration,
    calibrate_weights,
    calibrated,
    plain_encoder,
)
from edge_kv.export.old_backends import ATTENTIONS, BACKENDS, WEIGHTS, Lowered, Request
from edge_kv.export.quant_format import QuantFormat
from edge_kv.export.unfinished import read_record, sole_exporter, unfinished, write_record
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    ple_layout,
    weight_reports,
    write_ple,
    write_weights,
)
from edge_kv.kv_plan import KVPlan, plan_kv
from edge_kv.model.oracle import oracle_logits
from edge_kv.models import gemma
from edge_kv.ple import PleTable
from edge_kv.presets import get_preset
from edge_kv.progress import Progress, Silent
from edge_kv.weights import WeightSource, check_weights, open_weights
from edge_kv.weights.files import identity
from edge_kv.weights.hf import hf_name
from edge_kv.weights.tokenizer import usable_tokenizer

JOURNAL, REQUEST = "journal.jsonl", "request.json"
# What a killed export leaves that the next one writes anew.
_LEFT_OVER = ("*.part", MANIFEST, "verify*.npz")


def export_model(
    *,
    model: str | None = None,
    weights: str | None = None,
    ctx: int,
    chunk: int = 128,
    kv: str = "int8",
    quant: str = "int4",
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
        model: preset name; its official checkpoint is used when `weights` is left out.
        weights: directory, `.gguf`, hub id or `random[:seed]`.
        ctx, chunk: positions of context, tokens of a prefill step.
        kv: state storage f32 | f16 | int8. quant: weight storage int4 | int8 | none.
        store: weight formats of kinds of tensors, `kind=format`, other than the scheme's.
        attention: of ExecuTorch programs: native (operators of ours) or portable (stock ones).
        calibration: text that 4-bit weights are rounded for: shipped, none, or a file.
        device: what calibration computes on: cpu, or a device torch knows.
        open_session: opens an artifact directory for an engine; the parity gate runs on it.

    Raises:
        ConfigError, PlanError, WeightsError: the request cannot be served.
        ExportError: lowering or writing failed. ParityError: the result is not the model.
    """
    progress = progress or Silent()
    for backend in backends:
        if backend not in BACKENDS:
            raise ConfigError(f"Unknown backend {backend!r}.{did_you_mean(backend, BACKENDS)}")
    if attention not in ATTENTIONS:
        raise ConfigError(f"Unknown attention {attention!r}.{did_you_mean(attention, ATTENTIONS)}")
    if attention != "native" and "executorch" not in backends:
        raise ConfigError(f"Attention {attention!r} is ExecuTorch's; add --backend executorch.")
    formats = tensors.weight_formats(quant, tensors.parse_changes(store))
    if out.exists():
        raise ExportError(f"{out} already exists; remove it or choose another --out.")
    if (found := net_pipeline.find_source(model, weights, formats)) is not None:
        if missing := [b for b in backends if b not in net_backends]:
            raise ExportError(f"{found.label} is not exported with --backend {missing[0]} yet.")
        state = models.plan(found.config, ctx=ctx, chunk=chunk, kv=kv)
        return net_pipeline.export_net(
            found, state, quant, formats, backends=backends, attention=attention,
            calibration=calibration, device=device, out=out, open_session=open_session,
            progress=progress,
        )  # fmt: skip
    preset = get_preset(model) if model else None
    if preset is None and weights is None:
        raise ConfigError("Name a model (--model e2b) or its weights (--weights DIR).")
    source = open_weights(
        weights or (preset.source if preset else ""), preset.config if preset else None
    )
    plan = plan_kv(source.config, ctx=ctx, chunk=chunk, kv=kv)
    for backend in backends:
        BACKENDS[backend].check(source.config)
    layouts = {b: BACKENDS[b].layout(source.config, formats, attention) for b in backends}
    check_weights(source)
    job = _Job(
        source, plan, quant, layouts, attention, calibration, device, out, open_session, progress
    )
    _make_parent(out)
    with sole_exporter(out):
        if out.exists():
            raise ExportError(f"{out} already exists; another export made it meanwhile.")
        job.run()
    return out


def net_names(config: ModelConfig) -> dict[str, str]:
    """The net's name of a weight -> its name in the parameter table."""
    by_hf = {hf_name(spec.name): spec.name for spec in tensors.tensor_table(config)}
    return {row.name: by_hf[row.hf.split(" | ")[0]] for row in models.weights(gemma.of(config))}


def _make_parent(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ExportError(f"Cannot write beside {out} ({e.strerror}).") from e


class _Job:
    """One export: the paths and facts its stages share."""

    def __init__(
        self, source: WeightSource, plan: KVPlan, scheme: str, layouts: dict[str, WeightLayout],
        attention: str, calibration: str, device: str, out: Path, open_session: gate.OpenSession,
        progress: Progress,
    ):  # fmt: skip
        self.source, self.plan, self.layouts, self.out = source, plan, layouts, out
        self.scheme, self.attention = scheme, attention
        self.layout = next(iter(layouts.values()))
        self.config: ModelConfig = source.config
        self.open_session, self.progress = open_session, progress
        self.root = unfinished(out)
        self.identity = identity(source.files())
        tokenizer = source.tokenizer_json()
        self.tokenizer_json = tokenizer and usable_tokenizer(
            tokenizer, self.config.vocab_size, source.label
        )
        self.stop_ids, self.generation = source.stop_ids(), source.generation()
        self.device = device
        wanted = any(calibrated(layout) for layout in layouts.values())
        encode, start = plain_encoder(self.tokenizer_json), [self.config.bos_id]
        longest = self.config.max_ctx
        self.calibration = Calibration.of(calibration, encode, start, longest) if wanted else None

    def run(self) -> None:
        self._begin()
        try:
            reports, ple = self._weights()
            tokenizer = self._tokenizer()
            lowered = {}
            for name in self.layouts:
                self.progress.stage(f"programs: {name}")
                request = Request(self.config, self.plan, ple, self.attention)
                stored = self._stored(name)
                lowered[name] = BACKENDS[name].lower(request, stored, self.root / name)
            self._finish(reports, ple, tokenizer, lowered)
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
            "source": self.source.label,
            "files": self.identity,
            "model": json.loads(json.dumps(asdict(self.config))),
            "plan": [self.plan.ctx, self.plan.chunk, self.plan.kv],
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
            raise ExportError(f"Cannot write beside {self.out} ({e.strerror}).") from e

    def _weights(self) -> tuple[dict[str, TensorReport], PleEntry | None]:
        found = {}
        for name, layout in self.layouts.items():
            if self._owner(name) != name:
                continue
            self.progress.stage("weights")
            journal = Journal(self.root / name / JOURNAL)
            path = self._stored(name).path
            left = calibrated(layout) if self.calibration else frozenset()
            write_weights(self.source, layout, path, journal, self.progress, left)
            if self.calibration and left:
                self.progress.stage("calibration", "matrices")
                self._calibrate(self.calibration, layout, path, journal)
            found[name] = weight_reports(layout, journal)
        reports = next(iter(found.values()))
        ple = ple_layout(gemma.of(self.config).token_rows, self.config.vocab_size, self.scheme)
        if ple:
            self.progress.stage("per-layer embeddings")
            journal = Journal(self.root / JOURNAL)
            error = write_ple(
                self.source, "ple_embed.weight", ple, self.root / ple.file, journal, self.progress
            )
            if ple.bits < 32:
                reports["ple_embed.weight"] = TensorReport(format=f"int{ple.bits}-f16", error=error)
        self._unchanged()
        return reports, ple

    def _calibrate(
        self, calibration: Calibration, layout: WeightLayout, path: Path, journal: Journal
    ) -> None:
        """Round the matrices that were left, for what they read in the calibration text."""
        config = gemma.of(self.config)
        calibrate_weights(
            config,
            self.source.read,
            layout,
            path,
            journal,
            calibration,
            self.progress,
            names=net_names(self.config),
            token_rows=gate.float_rows(self.config, self.source.read) if config.ple_dim else None,
            device=self.device,
        )

    def _unchanged(self) -> None:
        """Refuse to go on when a source file is not what it was at the start."""
        if identity(self.source.files()) != self.identity:
            raise WeightsError(
                f"{self.source.label} was changed while it was exported, so nothing was written; "
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
        template = self.source.chat_template()
        if self.tokenizer_json is None:
            return None
        (self.root / "tokenizer.json").write_text(self.tokenizer_json, encoding="utf-8")
        if template is not None:
            (self.root / "chat_template.jinja").write_text(template, encoding="utf-8")
        return TokenizerEntry(
            file="tokenizer.json",
            chat_template="chat_template.jinja" if template is not None else None,
            stop_ids=self.stop_ids,
        )

    def _finish(
        self,
        reports: dict[str, TensorReport],
        ple: PleEntry | None,
        tokenizer: TokenizerEntry | None,
        lowered: dict[str, Lowered],
    ) -> None:
        def manifest(
            backends: dict[str, Backend], parity: dict[str, Any], *, digests: bool
        ) -> Manifest:
            files = _files(self.root, digests=digests)
            calibration = {"calibration": self.calibration.as_dict()} if self.calibration else {}
            return Manifest(
                schema_version=SCHEMA_VERSION,
                edge_kv=__version__,
                name=self.out.name,
                model=json.loads(json.dumps(asdict(self.config))),
                plan=plan_entry(self.plan),
                quant=QuantEntry(scheme=self.scheme, formats=self.layout.formats, tensors=reports),
                ple=ple,
                backends=backends,
                tokenizer=tokenizer,
                files=files,
                made={"source": self.source.label, "torch": torch.__version__, **calibration},
                parity=parity,
                memory={},  # what an artifact needs is predicted when it is asked for
            )

        def logits_of(name: str, backend: Backend) -> np.ndarray[Any, np.dtype[np.float32]]:
            write_manifest(self.root, manifest({name: backend}, {}, digests=False))
            session = self.open_session(self.root, BACKENDS[name].gate)
            try:
                return gate.replay(session, run)
            finally:
                session.close()

        run = gate.plan_run(self.plan, self.config.vocab_size, self._encoder(tokenizer))
        self.progress.stage("parity: float reference", "layers")
        source_logits = self._oracle(run, None, ple)
        self._unchanged()
        parity: dict[str, Any] = {}
        references: dict[str, torch.Tensor] = {}  # of each weight file
        for name, programs in lowered.items():
            owner = self._owner(name)
            if owner not in references:
                self.progress.stage(f"parity: stored weights of {owner}", "layers")
                references[owner] = self._oracle(run, self._stored(name), ple)
            stored_logits = references[owner]
            kept = None
            if self.scheme == "none":
                kept = self._oracle(run, self._stored(name), ple, exact_state=True)
            self.progress.stage(f"parity: programs of {name}")
            judged = gate.judge(
                run,
                self.plan,
                exact=logits_of(name, programs.exact),
                shipped=logits_of(name, programs.shipped),
                stored=stored_logits,
                source=source_logits,
                scheme=self.scheme,
                moved=partial(self._oracle, run, self._stored(name), ple, moved=True),
                kept=kept,
                vectors=f"verify.{name}.npz" if parity else "verify.npz",
            )
            gate.write_vectors(self.root / judged["vectors"], run, stored_logits)
            # The first backend's entry is the artifact's; others stand beside it by name.
            parity |= {name: judged} if parity else judged
        for programs in lowered.values():
            for path in programs.scratch:
                path.unlink()
        for path in self.root.rglob("*"):
            if path.name in (JOURNAL, REQUEST, MANIFEST):
                path.unlink()
        self.progress.stage("digests")
        backends = {name: programs.shipped for name, programs in lowered.items()}
        write_manifest(self.root, manifest(backends, parity, digests=True))
        if self.out.exists():
            raise ExportError(
                f"{self.out} was made meanwhile; move it away and run the same command again."
            )
        self.root.rename(self.out)

    def _oracle(
        self,
        run: gate.GateRun,
        stored: StoredWeights | None,
        ple: PleEntry | None,
        *,
        exact_state: bool = False,
        moved: bool = False,
    ) -> torch.Tensor:
        """Logits of the source's weights, or of a backend's stored ones.

        `exact_state`: stored weights over a state that is not rounded as the plan says.
        `moved`: over weights moved by their last digit, see `gate.perturbed`.
        """
        layers = self.config.n_layers
        kwargs: dict[str, Any] = {
            "ids": torch.from_numpy(run.ids),
            "start": run.prompt,
            "on_layer": lambda i: self.progress.advance(f"layer {i}", i + 1, layers),
        }
        if stored is None:
            rows = gate.float_rows(self.config, self.source.read) if ple else None
            return oracle_logits(
                self.config,
                self.plan,
                lambda region, a, b: torch.from_numpy(self.source.read(region, a, b)),
                ple_rows=rows,
                **kwargs,
            )
        table = PleTable(self.root / ple.file, ple) if ple else None

        def table_rows(ids: torch.Tensor) -> torch.Tensor:
            assert table
            return torch.from_numpy(table.rows(ids.numpy(), layers))

        try:
            return oracle_logits(
                self.config,
                self.plan,
                gate.perturbed(stored.read) if moved else stored.read,
                fmt=QuantFormat(stored.layout),
                ple_rows=table_rows if table else None,
                exact_state=exact_state,
                **kwargs,
            )
        finally:
            if table:
                table.close()

    def _encoder(self, entry: TokenizerEntry | None) -> Callable[[str], list[int]] | None:
        if entry is None:
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.root / entry.file))

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return [self.config.bos_id, *ids]

        return encode


def _files(root: Path, *, digests: bool) -> dict[str, FileEntry]:
    """Every file of the artifact, with its digest (empty while the gate runs)."""
    skip = {MANIFEST, JOURNAL, REQUEST}
    return {
        str(path.relative_to(root).as_posix()): FileEntry(
            size=path.stat().st_size, sha256=sha256_file(path) if digests else ""
        )
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in skip
    }
