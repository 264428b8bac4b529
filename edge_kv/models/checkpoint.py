"""A model's weights in a checkpoint, under the names of its weight rows, block of rows by block.

Nothing here imports torch, and a format's own libraries are imported when such a file is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from edge_kv import models
from edge_kv.errors import ArtifactError, ConfigError, WeightsError, one_line
from edge_kv.formats import Format, Quantised, find_format, pack
from edge_kv.models.model import EMBED, FLOAT, PLE_TABLE, TABLE, Model, Weight
from edge_kv.weights.compressed_tensors import is_pack_quantised, joined_packed
from edge_kv.weights.fields import Fields
from edge_kv.weights.gemma_quant import QUANTISATION, is_gemma_quant, joined_integers
from edge_kv.weights.gguf_blocks import NEAREST
from edge_kv.weights.gguf_file import GGUFFile, is_gguf, only_model, open_gguf
from edge_kv.weights.gguf_text import GGUFText
from edge_kv.weights.grid import on_grids
from edge_kv.weights.hf_files import open_files, read_json, weight_files
from edge_kv.weights.hf_text import HFText
from edge_kv.weights.scaled import joined_scales
from edge_kv.weights.source import COMPARED, Array, Stored, Text, filled_up, first_not_finite

# Where the text model sits: multimodal, older multimodal, text-only, bare decoder.
_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_EXPERT = "{e}"
_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "output.weight")
_ARCHITECTURE = "general.architecture"
_BY_BLOCK = {2: "int4-f16", 4: "int4-f16", 8: "int8-f16"}  # with scales of blocks, by bits
_LISTED = 20  # faults spelt out in one message


class Checkpoint:
    """What a file's tensors hold of the model `config`.

    Args:
        stored: every tensor of the checkpoint under its own name.
        format: "hf" or "gguf": which of a weight row's foreign names counts.
        label: where the weights came from, for people.
        text: what the checkpoint says beside its weights.
        files: every file that was read: their content decides what comes out.
    """

    def __init__(
        self, config: Model, stored: Mapping[str, Stored], format: str, label: str,
        text: Text | None, files: Sequence[Path],
    ):  # fmt: skip
        self.config, self.label, self.files = config, label, list(files)
        self.text: Text | None = text
        self.rows = {row.name: row for row in models.weights(config)}
        self._stored, self._hf = dict(stored), format == "hf"
        known = (p for p in _PREFIXES if any(name.startswith(p) for name in stored))
        self._prefix = next(known, "") if self._hf else ""
        self._parts = {name: self._resolve(row) for name, row in self.rows.items()}
        for row in self.rows.values():
            if row.filled and self._hf:
                self._fill(row, *row.filled)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start … stop-1 (axis 0) of the weight `name`, as f32.

        Raises:
            WeightsError: no such weight or rows, another shape, or a value that is not finite.
        """
        row = self.rows.get(name)
        if row is None:
            raise WeightsError(f"{name!r} is not a weight of this model; use a name of its rows.")
        stop = row.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= row.shape[0]:
            raise WeightsError(f"{name} has rows 0 to {row.shape[0]}, asked for {start} to {stop}.")
        if fault := self._fault(row):
            raise WeightsError(f"{self.label}: {fault}.")
        block = self._load(row, start, stop)
        if (where := first_not_finite(block, start)) is not None:
            raise WeightsError(
                f"{self.stored_name(name)} in {self.label} is not finite at {list(where)}; "
                "the checkpoint is damaged, download or convert it again."
            )
        return block

    def formats(self) -> dict[str, str]:
        """The weight format that keeps each matrix of a quantised checkpoint best, by name of the
        weight; those that such a checkpoint holds in floats are not named. Empty: all are floats.
        """
        return {
            name: found
            for name, row in self.rows.items()
            if len(row.shape) > 1
            and row.kind not in (FLOAT, TABLE)
            and (found := self._format(row))
        }

    def steps(self) -> dict[str, tuple[float, float]]:
        """Linears whose activations the checkpoint rounds: steps of (input, output), 0 for none."""
        found = {name: self._sources(row)[:1] for name, row in self.rows.items()}
        return {name: own[0].steps for name, own in found.items() if own and any(own[0].steps)}

    def is_exact(self, name: str) -> bool:
        """Whether `packed` yields the very values of the weight `name`."""
        row = self.rows[name]
        parts = self._sources(row)
        same = all(part.exact and part.format == self._format(row) for part in parts)
        return same and self._has_integers(row)

    def _has_integers(self, row: Weight) -> bool:
        parts = self._sources(row)
        one = len({part.format for part in parts}) == 1
        return one and not (self._hf and row.offset) and all(part.integers for part in parts)

    def packed(self, name: str, fmt: Format, start: int, stop: int) -> Array | None:
        """Rows start … stop-1, of a stack matrices, as `fmt` stores the checkpoint's own integers.

        None: the checkpoint does not hold them in that format (`formats`).

        Raises:
            WeightsError: a scale that is not finite.
        """
        row = self.rows[name]
        if len(row.shape) != 3:
            q = self.integers(name, fmt, start, stop)
            return None if q is None else pack(fmt, q)
        if not self._has_integers(row) or self._format(row) != fmt.name:
            return None
        return np.stack([pack(fmt, self._expert(row, e)) for e in range(start, stop)])

    def integers(self, name: str, fmt: Format, start: int, stop: int) -> Quantised | None:
        """Rows start … stop-1 of a matrix as `packed` packs them."""
        row = self.rows[name]
        if not self._has_integers(row) or self._format(row) != fmt.name:
            return None
        [[own]] = self._parts[name]
        read = self._stored[own].integers
        assert read
        if self._hf or not row.pairs:
            return _as(fmt, self._finite(own, read(start, stop)))
        dim = row.shape[0] // row.pairs
        first, last = start // dim * dim, -(-stop // dim) * dim
        paired = self._finite(own, read(first, last))
        return _each(paired, lambda a: _unpaired(a, dim)[start - first : stop - first])

    def _expert(self, row: Weight, e: int) -> Quantised:
        """One matrix of a stack, in integers."""
        found = []
        for part in self._parts[row.name]:
            stacked = len(self._stored[part[0]].shape) == 3
            own = part[0] if stacked else part[e]
            read = self._stored[own].integers
            assert read
            found.append(
                self._finite(
                    own, read(e, e + 1) if stacked else read(0, self._stored[own].shape[0])
                )
            )
        return _below(found)

    def _finite(self, own: str, q: Quantised) -> Quantised:
        for scales in (q.block_scales, q.row_scales):
            if scales is not None and not np.isfinite(scales).all():
                raise WeightsError(
                    f"{own} in {self.label} has a scale that is not finite; the checkpoint is "
                    "damaged, download or convert it again."
                )
        return q

    def _format(self, row: Weight) -> str:
        """One format for all parts of a weight: theirs, or 8 bits where they differ."""
        found = {part.format for part in self._sources(row)}
        if found <= {""}:
            return ""
        name = found.pop() if len(found) == 1 else NEAREST
        fmt = find_format(name)
        # Rows of the per-layer table have a half for each block and no scale of their own.
        return name if row.kind != PLE_TABLE or not fmt.has_row_scales else _BY_BLOCK[fmt.bits]

    def _sources(self, row: Weight) -> list[Stored]:
        """What a weight is made of, as far as it is there: `check` names what is missing."""
        names = (own for part in self._parts[row.name] for own in part)
        return [self._stored[own] for own in names if own in self._stored]

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls the weight `name`, for messages."""
        return " + ".join(part[0] for part in self._parts[name])

    def surplus(self) -> list[str]:
        """Stored tensors that no part of the model uses and no model of its kind carries."""
        used = {own for parts in self._parts.values() for part in parts for own in part}
        used |= set(_HEADS) if "head" not in self.rows else set()
        ignored: Callable[[Model, str], bool] = models.module_of(self.config).ignored
        return sorted(
            name
            for name in self._stored
            if name not in used and not ignored(self.config, self._bare(name))
        )

    def check(self, *, values: bool = False) -> None:
        """Compare the checkpoint with the model's weight rows.

        Args:
            values: also read every value and look for NaN and infinity (`read` does so anyway).

        Raises:
            WeightsError: one error that lists every missing, surplus, wrongly shaped, unreadable
                and (with `values`) not finite tensor.
        """
        faults = self._faults()
        for row in self.rows.values() if values else ():
            if not self._fault(row) and (where := self._not_finite(row)) is not None:
                faults.append(f"{self.stored_name(row.name)} is not finite at {list(where)}")
        if self.own_head():
            faults.append(
                f"{self.own_head()} is an LM head of its own (it differs from the token table), "
                "and this model has none"
            )
        self._refuse(faults)

    def check_headers(self) -> None:
        """`check` as far as names, shapes and types of tensors tell: no value is read."""
        self._refuse(self._faults())

    def _faults(self) -> list[str]:
        found = [fault for row in self.rows.values() if (fault := self._fault(row))]
        return found + [f"{name} is not part of the model" for name in self.surplus()]

    def _refuse(self, faults: list[str]) -> None:
        if not faults:
            return
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise WeightsError(
            f"{self.label} does not fit its config, {len(faults)} "
            f"tensor{'s are' if len(faults) > 1 else ' is'} wrong: "
            f"{'; '.join(faults[:_LISTED])}{more}."
        )

    def own_head(self) -> str:
        """The LM head that is stored beside the token table and is another, though the config says
        that the table is the head; "" when there is none. Both are read whole."""
        if "head" in self.rows or EMBED not in self.rows or self._fault(self.rows[EMBED]):
            return ""
        [[table]] = self._parts["embed"]
        heads = (h for h in _HEADS if h in self._stored and h != table)
        return next((h for h in heads if not self._repeats(h, table)), "")

    def _not_finite(self, row: Weight) -> tuple[int, ...] | None:
        step = max(1, COMPARED * row.shape[0] // row.elements)
        for start in range(0, row.shape[0], step):
            block = self._load(row, start, min(row.shape[0], start + step))
            if (where := first_not_finite(block, start)) is not None:
                return where
        return None

    def _fill(self, row: Weight, rows: int, spare: int) -> None:
        """Give a table of `rows` rows one for every token: those beyond are its row `spare`."""
        [[own]] = self._parts[row.name]
        table = self._stored.get(own)
        if table and rows != row.shape[0] and table.shape[:1] == (rows,):
            self._stored[own] = filled_up(table, row.shape[0], spare)

    def untied(self) -> Checkpoint:
        """The same, of a model whose head is not its token table."""
        config = replace(self.config, tied=False)  # type: ignore[call-arg]
        format = "hf" if self._hf else "gguf"
        return Checkpoint(config, self._stored, format, self.label, self.text, self.files)

    def _repeats(self, own: str, table: str) -> bool:
        """Whether two stored tensors hold the same values."""
        a, b = self._stored[own], self._stored[table]
        if a.shape != b.shape or a.fault:
            return False
        step = max(1, COMPARED // a.shape[1])
        ranges = [(i, min(i + step, a.shape[0])) for i in range(0, a.shape[0], step)]
        return all(np.array_equal(a.rows(*r), b.rows(*r)) for r in ranges)

    def _bare(self, name: str) -> str:
        """`name` without the prefix of the text model."""
        return name.removeprefix(self._prefix)

    def _names(self, row: Weight) -> str:
        return row.hf if self._hf else row.gguf

    def _resolve(self, row: Weight) -> list[list[str]]:
        """The stored names of each part of a weight, one an expert where they are apart.

        Of the alternatives it is the first of which most is there.
        """
        best: list[list[str]] = []
        most = -1.0
        for alternative in self._names(row).split(" | "):
            for prefix in dict.fromkeys((self._prefix, "")):
                parts = [
                    [prefix + part.replace(_EXPERT, str(e)) for e in range(row.shape[0])]
                    if _EXPERT in part
                    else [prefix + part]
                    for part in alternative.split(" + ")
                ]
                names = [own for part in parts for own in part]
                there = sum(own in self._stored for own in names) / len(names)
                if there > most:
                    best, most = parts, there
        return best

    def _fault(self, row: Weight) -> str:
        """Why a weight cannot be read; "" when it can."""
        shapes = []
        for part in self._parts[row.name]:
            for own in part:
                if own not in self._stored:
                    return f"{own} is missing"
                whole = row.kind == TABLE and self._stored[own].dtype in ("I64", "I32")
                if (fault := self._stored[own].fault) and not whole:
                    return f"{own} is {fault}"
            found = {self._stored[own].shape for own in part}
            if len(found) > 1:
                return f"{part[0]} and its like have different shapes {sorted(found)}"
            shape = found.pop()
            stacked = len(shape) < len(row.shape)  # experts that are stored one by one
            shapes.append((len(part), *shape) if stacked else shape)
        joined = list(shapes[0])
        if len(shapes) > 1 and all(len(shape) > 1 for shape in shapes):
            joined[1] = sum(shape[1] for shape in shapes)
        if tuple(joined) != row.shape:
            name = self.stored_name(row.name)
            return f"{name} has shape {tuple(joined)}, expected {row.shape}"
        return ""

    def _load(self, row: Weight, start: int, stop: int) -> Array:
        if not self._hf and row.pairs:
            return self._own_order(row, start, stop)
        blocks = [self._part(row, part, start, stop) for part in self._parts[row.name]]
        block = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        if self._hf and row.offset:
            block += np.float32(row.offset)
        return block

    def _part(self, row: Weight, part: Sequence[str], start: int, stop: int) -> Array:
        first = self._stored[part[0]]
        if len(first.shape) == len(row.shape):
            return first.rows(start, stop)
        return np.stack([self._stored[own].rows(0, first.shape[0]) for own in part[start:stop]])

    def _own_order(self, row: Weight, start: int, stop: int) -> Array:
        """Rows of a matrix whose heads a GGUF file interleaves, in their own order."""
        dim = row.shape[0] // row.pairs
        first, last = start // dim, -(-stop // dim)
        [[own]] = self._parts[row.name]
        heads = self._stored[own].rows(first * dim, last * dim)
        return _unpaired(heads, dim)[start - first * dim : stop - first * dim]


def _unpaired(rows: Array, dim: int) -> Array:
    """Rows of whole heads of `dim`, interleaved in a GGUF file, in their own order."""
    heads = rows.reshape(-1, dim // 2, 2, *rows.shape[1:])
    block: Array = heads.swapaxes(1, 2).reshape(rows.shape)
    return block


def _as(fmt: Format, q: Quantised) -> Quantised:
    """`q` in the words of `fmt`: scales of rows become scales of their blocks."""
    if fmt.has_row_scales or q.row_scales is None:
        return q
    blocks = fmt.blocks(q.codes.shape[1])
    return Quantised(q.codes, np.repeat(q.row_scales.astype(np.float16)[:, None], blocks, 1), None)


def _each(q: Quantised, turned: Callable[[Any], Any]) -> Quantised:
    """`turned` of the codes and of the scales there are."""
    scales = (s if s is None else turned(s) for s in (q.block_scales, q.row_scales))
    return Quantised(turned(q.codes), *scales)


def _below(parts: Sequence[Quantised]) -> Quantised:
    """Matrices of one format, one below the other."""

    def joined(arrays: list[Any]) -> Any:
        return None if arrays[0] is None else np.concatenate(arrays)

    fields = ("codes", "block_scales", "row_scales")
    return Quantised(*(joined([getattr(q, f) for q in parts]) for f in fields))


def open_checkpoint(path: Path, label: str = "") -> Checkpoint:
    """The weights of a Hugging Face directory or a .gguf file; of several parts, the first.

    An LM head of its own is used, as transformers does, also where the config says that the token
    table is the head.

    Args:
        label: what people call it; else the name of the directory or file.

    Raises:
        WeightsError: a file is missing, cut off or not what its name says.
        ConfigError: it describes a model that is not supported, or a field has a wrong value.
    """
    path = _model_path(path)
    if path.is_dir():
        raw = _config_json(path)
        config = config_from_hf(raw, str(path / "config.json"))
        files = weight_files(path, raw.get("transformers_weights"))
        stored = joined_packed(joined_scales(open_files(files)))
        if is_gemma_quant(raw):
            stored = joined_integers(stored, raw[QUANTISATION])
        elif raw.get(QUANTISATION) is None:
            stored = on_grids(stored)
        hf_text = HFText(path, config.vocab, config.eos_ids)
        files = [path / "config.json", *hf_text.files(), *files]
        label = label or f"directory {one_line(path.resolve().name)}"
        return _with_own_head(Checkpoint(config, stored, "hf", label, hf_text, files))
    file = _gguf(path)
    config = _gguf_config(file, path.name)
    text = GGUFText(file.metadata, path.name, config.vocab, config.eos_ids)
    label = label or f"{one_line(path.name)} (GGUF)"
    return _with_own_head(Checkpoint(config, file.tensors, "gguf", label, text, file.files))


def _with_own_head(checkpoint: Checkpoint) -> Checkpoint:
    if not getattr(checkpoint.config, "tied", False) or not checkpoint.own_head():
        return checkpoint
    return checkpoint.untied()


def _gguf(path: Path) -> GGUFFile:
    if not is_gguf(path):
        raise WeightsError(
            f"{path} is a file but not a .gguf; give a directory with config.json and "
            "safetensors, a .gguf file, a hub id or `random`."
        )
    return open_gguf(path)


def _gguf_config(file: GGUFFile, where: str) -> Model:
    arch = file.metadata.get(_ARCHITECTURE)
    if arch == "clip":
        raise ConfigError(
            f"{where} is the vision or audio projector of a model (general.architecture 'clip'); "
            "give the file of the language model."
        )
    module = models.module_for("GGUF", arch, where)
    return _described(lambda: module.read_gguf(file, where), where)


def open_described(path: Path) -> tuple[Model, Checkpoint | None]:
    """What model the checkpoint at `path` describes, and the checkpoint, its headers compared with
    that; None of a directory whose weights are not all there.

    Raises:
        WeightsError: nothing there, a file that is damaged, a directory of several models, or
            tensors that are not those of the config.
        ConfigError: a model that is not supported, or a field with a wrong value.
    """
    at = _model_path(path)
    if at.is_dir():
        raw = _config_json(at)
        try:
            weight_files(at, raw.get("transformers_weights"))
        except WeightsError:
            return config_from_hf(raw, str(at / "config.json")), None
    checkpoint = open_checkpoint(path)
    checkpoint.check_headers()
    return checkpoint.config, checkpoint


def _model_path(path: Path) -> Path:
    """`path`, or the one GGUF model in a directory without safetensors."""
    return (only_model(path) or path) if path.is_dir() else path


def config_from_hf(raw: dict[str, Any], where: str = "config.json") -> Model:
    """The config that a parsed config.json describes.

    Raises:
        ConfigError: an unknown model_type, an unsupported field or a wrong value, by name.
    """
    module = models.module_for("HF", raw.get("model_type"), where)
    for level in (raw, raw.get("text_config")):
        if isinstance(level, dict):  # transformers masks any model by it
            Fields(level, where).refuse_unless("is_causal", True)
    if is_gemma_quant(raw) or is_pack_quantised(raw):  # what makes integers of weights is read here
        raw = {key: value for key, value in raw.items() if key != QUANTISATION}
    return _described(lambda: module.read_hf(raw, where), where)


def recorded_config(made: Mapping[str, Any]) -> Model:
    """The config that an artifact's manifest records under `made`, for people and for checks.

    Raises:
        ArtifactError: it records none, or one that is no model's.
    """
    fields = made.get("model")
    fields = fields if isinstance(fields, dict) else {}
    kind = fields.get("type")
    module = next((m for m in models.MODULES if m.__name__.rpartition(".")[2] == kind), None)
    if module is None:
        raise ArtifactError("The manifest does not say which model it is of; export it again.")
    values = {name: value for name, value in fields.items() if name != "type"}
    try:
        config: Model = TypeAdapter(module.Config).validate_python(values)
    except (ValidationError, ConfigError) as e:
        reason = " ".join(str(e).split())[:160]
        raise ArtifactError(f"The manifest's model config is not valid: {reason}.") from e
    return config


def _config_json(root: Path) -> dict[str, Any]:
    raw = read_json(root / "config.json")
    if raw is None:
        raise WeightsError(
            f"{root} has no config.json; give a directory with config.json and safetensors, "
            "a .gguf file, a hub id or `random`."
        )
    return raw


def _described(read: Callable[[], Model], where: str) -> Model:
    """What `read` returns; its errors name the file."""
    try:
        return read()
    except ConfigError as e:
        raise ConfigError(str(e) if where in str(e) else f"{where}: {e}") from None
