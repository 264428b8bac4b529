"""export_net: any model of `edge_kv.models` -> artifact directory, in stages that can be taken up.

The same stages as `pipeline` runs for models of the old seam, over weight rows, tables and nets:
weights, tokenizer, programs, parity gate, manifest. Everything happens in a hidden directory beside
the target, which is renamed to it at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edge_kv import __version__, models
from edge_kv.artifact import MANIFEST, sha256_file, write_manifest
from edge_kv.errors import ConfigError, ExportError, ParityError, WeightsError
from edge_kv.export import gate
from edge_kv.export.calibrated_weights import (
    Calibration,
    calibrate_weights,
    calibrated,
    plain_encoder,
)
from edge_kv.export.lower_net import DETAILS, lower_net
from edge_kv.export.onnx_graph import EXACT
from edge_kv.export.packed_weights import PackedWeights
from edge_kv.export.random_source import RandomSource
from edge_kv.export.unfinished import sole_exporter, unfinished
from edge_kv.export.weight_file import (
    Journal,
    StoredWeights,
    WeightLayout,
    weight_reports,
    write_weights,
)
from edge_kv.footprint import footprint
from edge_kv.manifest import (
    UNFINISHED,
    Backend,
    FileEntry,
    IdentityEntry,
    Manifest,
    NeedsEntry,
    ParityEntry,
    PlanEntry,
    QuantEntry,
    SamplingEntry,
    TensorReport,
    TokenizerEntry,
    TokensEntry,
    model_digest,
    plan_digest,
)
from edge_kv.memory import TOKENIZER_BYTES
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.models.model import Model
from edge_kv.nets import make_net
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import Holder, Weights, holders, load, replace
from edge_kv.plan import Plan, Sizes
from edge_kv.presets import PRESETS
from edge_kv.progress import Progress
from edge_kv.weights import known_before
from edge_kv.weights.files import identity
from edge_kv.weights.gguf_file import open_gguf
from edge_kv.weights.gguf_model import GGUFText
from edge_kv.weights.hf import HFText
from edge_kv.weights.source import Generation
from edge_kv.weights.tokenizer import usable_tokenizer

WEIGHTS = "weights.bin"
JOURNAL, REQUEST = "journal.jsonl", "request.json"
_READ = (".json", ".safetensors", ".jinja")  # files of a checkpoint directory
Logits = np.ndarray[Any, np.dtype[np.float32]]


class Source(Protocol):
    """A model's weights by name, and what its files say of text and sampling."""

    config: Model
    label: str
    text: HFText | GGUFText | None
    files: list[Path]  # what it was read from

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        """Rows start … stop-1 of a weight, as f32."""


class CheckpointSource:
    """A Hugging Face directory or a .gguf file.

    Raises:
        WeightsError, ConfigError: see `models.checkpoint.open_checkpoint` and `Checkpoint.check`.
    """

    def __init__(self, path: Path):
        checkpoint = open_checkpoint(path)
        checkpoint.check()
        config: Model = checkpoint.config
        self.config, self.label, self.read = config, checkpoint.label, checkpoint.read
        self.text: HFText | GGUFText | None
        self.files = [path]
        if path.is_dir():
            self.files = sorted(f for f in path.iterdir() if f.suffix in _READ)
            self.text = HFText(path, config.vocab, config.eos_ids)
        else:
            metadata = open_gguf(path).metadata
            self.text = GGUFText(metadata, path.name, config.vocab, config.eos_ids)


def find_source(
    model: str | None, weights: str | None, formats: Mapping[str, str]
) -> Source | None:
    """The source of a model that only the new core knows; None: the old seam serves the request.

    `formats` are those of each kind of tensor: random weights are drawn in them.

    Raises:
        ConfigError, WeightsError: as `open_weights`.
    """
    row = models.ROWS.get(model) if model and model not in PRESETS else None
    if weights is not None and (weights == "random" or weights.startswith("random:")):
        seed = weights.removeprefix("random").removeprefix(":") or "0"
        if row is None or not seed.isdecimal():
            return None
        return RandomSource(row.config, int(seed), formats)
    if weights is None:
        if row is None:
            return None
        raise WeightsError(
            f"The weights of {model} are not here; give --weights DIR, a .gguf file or random."
        )
    path = Path(weights).expanduser()
    if not path.exists() or known_before(path):
        return None
    source = CheckpointSource(path)
    if row is not None and type(row.config) is not type(source.config):
        raise ConfigError(f"{source.label} is not the model that was named ({model}).")
    return source


def export_net(
    source: Source, plan: Plan, scheme: str, layout: WeightLayout, calibration: str, device: str,
    out: Path, open_session: gate.OpenSession, progress: Progress,
) -> Path:  # fmt: skip
    """Export `source` to the artifact directory `out` with ONNX programs; returns `out`.

    Raises:
        WeightsError: a tensor cannot be read. ExportError: lowering or writing failed.
        ParityError: the programs are not the model.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ExportError(f"Cannot write beside {out} ({e.strerror}).") from e
    job = _Job(source, plan, scheme, layout, calibration, device, out, open_session, progress)
    try:
        with sole_exporter(out):
            if out.exists():
                raise ExportError(f"{out} already exists; another export made it meanwhile.")
            job.run()
    except (ParityError, WeightsError):  # running it again would end the same way
        shutil.rmtree(job.root)
        raise
    except OSError as e:
        raise ExportError(
            f"Writing {job.root} failed ({e.strerror}); free some disk space and run the same "
            "command again: it continues where it stopped."
        ) from e
    return out


class _Job:
    """One export: the paths and facts its stages share."""

    def __init__(
        self, source: Source, plan: Plan, scheme: str, layout: WeightLayout, calibration: str,
        device: str, out: Path, open_session: gate.OpenSession, progress: Progress,
    ):  # fmt: skip
        self.source, self.plan, self.layout, self.out = source, plan, layout, out
        self.scheme = scheme
        self.config: Model = source.config
        self.open_session, self.progress = open_session, progress
        self.root = unfinished(out)
        self.stored = StoredWeights(layout, self.root / "onnx" / WEIGHTS)
        self.device, self.calibration = device, None
        if calibrated(layout):
            encode = plain_encoder(source.text.tokenizer_json() if source.text else None)
            start = [] if self.config.bos_id is None else [self.config.bos_id]
            self.calibration = Calibration.of(calibration, encode, start, self.config.max_ctx)
        self.model = json.loads(json.dumps({"type": _type(self.config), **asdict(self.config)}))

    def run(self) -> None:
        self._begin()
        self.progress.stage("weights")
        journal = Journal(self.root / JOURNAL)
        source: Any = self.source
        path = self.stored.path
        left = calibrated(self.layout) if self.calibration else frozenset()
        reports = write_weights(source, self.layout, path, journal, self.progress, left)
        if self.calibration:
            self.progress.stage("calibration")
            calibrate_weights(
                self.config, source.read, self.layout, path, journal, self.calibration,
                self.progress, device=self.device,
            )  # fmt: skip
            reports = weight_reports(self.layout, journal)
        tokenizer = self._tokenizer()
        self.progress.stage("programs: onnx")
        programs = lower_net(self.config, self.plan, self.layout, self.stored.path.parent, WEIGHTS)
        quant = QuantEntry(
            scheme=self.scheme,
            formats=self.layout.formats,
            tensors={n: TensorReport(**r.model_dump()) for n, r in reports.items()},
        )

        counted = footprint(
            self.config, self.plan, self.scheme, formats=self.layout.formats, depth=0
        )
        needs = NeedsEntry(
            weights=counted.weights,
            dense=counted.dense,
            experts=counted.experts,
            read_weights=counted.read_weights,
            anonymous=counted.anonymous - TOKENIZER_BYTES * self.config.vocab,
        )

        def backend(variant: str) -> Backend:
            named = {
                name: p.model_copy(update={"file": p.file.replace(".onnx", f"{variant}.onnx")})
                for name, p in programs.items()
            }
            files = [f"onnx/{WEIGHTS}", *(p.file for p in named.values())]
            return Backend(programs=named, files=files, details=DETAILS)

        def manifest(used: Backend, parity: dict[str, ParityEntry], digests: bool) -> Manifest:
            files = _files(self.root, digests)
            entry = PlanEntry.of(self.plan)
            text = self.source.text
            generation = text.generation() if text else Generation()
            stops = text.stop_ids() if text else []
            eos = dict.fromkeys([*self.config.eos_ids, *stops])
            return Manifest(
                schema_version=2,
                edge_kv=__version__,
                name=self.out.name,
                tokens=TokensEntry(
                    vocab=self.config.vocab,
                    bos=self.config.bos_id,
                    eos=list(eos),
                    pad=self.config.pad_id,
                    suppress=list(generation.suppress_tokens),
                ),
                sampling=SamplingEntry(
                    temperature=generation.temperature,
                    top_k=generation.top_k,
                    top_p=generation.top_p,
                    min_p=generation.min_p,
                    repetition_penalty=generation.repetition_penalty,
                ),
                identity=IdentityEntry(
                    model=model_digest(self.model, quant, files), plan=plan_digest(entry)
                ),
                plan=entry,
                quant=quant,
                ple=None,
                backends={"onnx": used},
                tokenizer=tokenizer,
                parity=parity,
                needs=needs,
                files=files,
                made={
                    "source": self.source.label,
                    "torch": torch.__version__,
                    "model": self.model,
                    **({"calibration": self.calibration.as_dict()} if self.calibration else {}),
                },
            )

        def logits_of(variant: str) -> Logits:
            write_manifest(self.root, manifest(backend(variant), {}, False))
            session = self.open_session(self.root, "onnx-stock")
            try:
                return gate.replay(session, run)
            finally:
                session.close()

        run = gate.plan_run(self.plan, self.config.vocab, self._encoder(tokenizer))
        self.progress.stage("parity: float reference")
        drawn = isinstance(self.source, RandomSource)  # it is what is stored
        source_logits = self._oracle(run, stored=drawn, exact_state=drawn)
        self.progress.stage("parity: stored weights")
        stored_logits = self._oracle(run, stored=True)
        kept = None
        if self.scheme == "none":
            kept = self._oracle(run, stored=True, exact_state=True)
        self.progress.stage("parity: programs")
        judged = gate.judge(
            run,
            self.plan,
            exact=logits_of(EXACT),
            shipped=logits_of(""),
            stored=stored_logits,
            source=source_logits,
            scheme=self.scheme,
            moved=lambda: self._oracle(run, stored=True, moved=True),
            kept=kept,
        )
        gate.write_vectors(self.root / judged["vectors"], run, stored_logits)
        for name in programs:
            (self.stored.path.parent / f"{name}{EXACT}.onnx").unlink()
        for path in (self.root / JOURNAL, self.root / REQUEST, self.root / MANIFEST):
            path.unlink()
        self.progress.stage("digests")
        parity = {"onnx": ParityEntry.model_validate_json(json.dumps(judged))}
        write_manifest(self.root, manifest(backend(""), parity, True))
        self.root.rename(self.out)

    def _begin(self) -> None:
        """Continue an interrupted export of the very same request, else start over."""
        request = json.dumps(
            {
                "edge_kv": __version__,
                "source": [self.source.label, identity(self.source.files)],
                "model": self.model,
                "plan": [self.plan.ctx, self.plan.chunk, self.plan.kv],
                "quant": [self.scheme, self.layout.formats],
                "calibration": self.calibration and self.calibration.digest,
            },
            sort_keys=True,
        )
        held = self.root / REQUEST
        if self.root.exists() and not (held.is_file() and held.read_text() == request):
            shutil.rmtree(self.root)
        try:
            self.stored.path.parent.mkdir(parents=True, exist_ok=True)
            held.write_text(request)
        except OSError as e:
            raise ExportError(f"Cannot write beside {self.out} ({e.strerror}).") from e

    def _tokenizer(self) -> TokenizerEntry | None:
        text = self.source.text
        content = text.tokenizer_json() if text else None
        template = text.chat_template() if text else None
        if content is None:
            return None
        content = usable_tokenizer(content, self.config.vocab, self.source.label)
        (self.root / "tokenizer.json").write_text(content, encoding="utf-8")
        if template is not None:
            (self.root / "chat_template.jinja").write_text(template, encoding="utf-8")
        return TokenizerEntry(
            file="tokenizer.json",
            chat_template="chat_template.jinja" if template is not None else None,
            add_bos=self.config.bos_id is not None,
        )

    def _encoder(self, entry: TokenizerEntry | None) -> Callable[[str], list[int]] | None:
        if entry is None:
            return None
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.root / entry.file))
        start = [] if self.config.bos_id is None else [self.config.bos_id]

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
            return [*start, *ids]

        return encode

    def _oracle(
        self, run: gate.GateRun, *, stored: bool, exact_state: bool = False, moved: bool = False
    ) -> Tensor:
        """Logits of the decode steps: of the source's weights, or of the stored ones and state.

        All tokens are one step, and a module is in memory while it runs: weights are read once.
        `exact_state`: over float state all the same. `moved`: see `gate.perturbed`.
        """
        rows = models.weights(self.config)
        with torch.device("meta"):
            net = make_net(
                self.config, PackedWeights(rows, self.layout) if stored else Weights(rows)
            )
        assert isinstance(net, nn.Module)

        def source_rows(name: str, start: int, stop: int) -> Tensor:
            return torch.from_numpy(self.source.read(name, start, stop))

        read = self.stored.read if stored else source_rows
        _stream(net, gate.perturbed(read) if moved else read)
        kv = self.plan.kv if stored and not exact_state else "f32"
        sizes = Sizes(self.plan.ctx, len(run.ids), kv)
        state = StaticState(
            Plan.of(models.module_of(self.config).tables(self.config, sizes), sizes)
        )
        with torch.no_grad():
            x = net(torch.from_numpy(run.ids), torch.tensor([0]), state)
            logits: Tensor = net.logits(x[run.prompt :])
        return logits


def _stream(net: nn.Module, read: Callable[[str, int, int], Tensor]) -> None:
    """Have every module read its weights when it is called and drop them when it is done."""

    def fill(module: nn.Module, args: Any) -> None:
        load(module, read)

    def drop(module: nn.Module, args: Any, out: Any) -> None:
        assert isinstance(module, Holder)
        for name in module.held:
            value: Tensor = getattr(module, name)
            replace(module, name, torch.empty_like(value, device="meta"))

    for holder in holders(net):
        holder.register_forward_pre_hook(fill)
        holder.register_forward_hook(drop)


def _type(config: Model) -> str:
    return type(config).__module__.rpartition(".")[2]


def _files(root: Path, digests: bool) -> dict[str, FileEntry]:
    """Every file of the artifact, with its digest (zeros while the gate runs)."""
    skip = {MANIFEST, JOURNAL, REQUEST}
    return {
        path.relative_to(root).as_posix(): FileEntry(
            size=path.stat().st_size, sha256=sha256_file(path) if digests else UNFINISHED
        )
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in skip
    }
