"""Gemma 4's assistants: small decoders that draft tokens for a target over its keys and values.

An assistant owns no keys and values. Each of its layers reads those of the target's last owner of
the layer's type; its input is the target's embedding of a token beside the target's last hidden
state, or the one that the assistant made of it (`carry`). The meaning of the fields is that of
transformers 5.24 (configuration_gemma4_assistant.py, modeling_gemma4_assistant.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_kv.errors import ConfigError, WeightsError
from edge_kv.models import gemma
from edge_kv.models.gemma import FULL, SLIDING, Attention
from edge_kv.models.model import FLOAT, HEAD, LINEAR, LINEAR8, TABLE, Model, Rope, Row, Weight
from edge_kv.weights.fields import Fields

if TYPE_CHECKING:
    from edge_kv.weights.gguf_file import GGUFFile

# Multimodal and unified checkpoints: model_type -> model_type of the text_config.
HF = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
GGUF: tuple[str, ...] = ()
ROWS: dict[str, Row] = {}
_ORDER = "draft.order"
_KIND_NAMES = {SLIDING: "sliding", FULL: "full"}


@dataclass(frozen=True, kw_only=True)
class Config(gemma.Config):
    """A decoder all of whose layers share; `reads` are the target's layers whose keys and values
    they read, one for each layer, and empty until `attach` has found them."""

    backbone: int  # hidden size of the target
    centroids: int = 0  # clusters of the vocabulary, of equal size; 0: every token is scored
    top_centroids: int = 0  # clusters whose tokens are scored
    reads: tuple[int, ...] = ()

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        yield from self.not_positive("backbone")
        if self.centroids and not 1 <= self.top_centroids <= self.centroids:
            yield f"top_centroids {self.top_centroids} must be from 1 to {self.centroids} centroids"
        if self.centroids < 0 or (self.centroids and self.vocab % self.centroids):
            yield f"{self.centroids} centroids must divide the vocabulary's {self.vocab} tokens"
        if self.ple_dim or self.moe or self.shared_mlp_width:
            yield "an assistant has no per-layer embedding, no experts and one MLP width"

    def sharing_faults(self) -> Iterator[str]:
        if self.shared != self.layers:
            yield f"{self.shared} sharing layers must be all {self.layers} of an assistant"
        if self.reads and len(self.reads) != self.layers:
            yield f"reads {self.reads} must name a layer for each of {self.layers}"

    @property
    def scored(self) -> int:
        return self.vocab // self.centroids * self.top_centroids if self.centroids else self.vocab

    def source(self, layer: int) -> int:
        """The layer of the target whose keys and values `layer` reads."""
        return self.reads[layer]


def of_text(text: gemma.Config, **own: Any) -> Config:
    """The assistant whose layers are those of `text`, a decoder without sharing."""
    held = {f.name: getattr(text, f.name) for f in fields(text)}
    # The logits of an assistant are not capped; its head is one of the weights below.
    held |= {"shared": text.layers, "softcap": 0.0, "tied": False}
    return Config(**held, **own)


def read_hf(raw: dict[str, Any], where: str) -> Config:
    """The config that a config.json describes.

    Raises:
        ConfigError: a field that would change the computation, or a wrong value, by name.
    """
    from edge_kv.models import gemma_files

    outer = Fields(raw, where, {"num_centroids": 2048, "centroid_intermediate_top_k": 32})
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise outer.fault("text_config", "an object")
    kind = {"model_type": HF[raw["model_type"]]}
    clustered = outer.flag("use_ordered_embeddings")
    return of_text(
        gemma_files.read_hf({**kind, **text, "num_kv_shared_layers": 0}, where),
        backbone=outer.integer("backbone_hidden_size"),
        centroids=outer.integer("num_centroids") if clustered else 0,
        top_centroids=outer.integer("centroid_intermediate_top_k") if clustered else 0,
    )


def read_gguf(file: GGUFFile, where: str) -> Config:
    raise ConfigError(f"{where} is an assistant as a GGUF file, which is not supported; "
                      "give its Hugging Face checkpoint.")  # fmt: skip


def ignored(c: Config, name: str) -> bool:
    """Whether checkpoints carry the tensor `name` and the assistant does not use it."""
    return gemma.ignored(c, name) or name in ("embed_tokens.weight", "lm_head.weight")


def weights(c: Config) -> Iterator[Weight]:
    """Its weights, whose names differ from all of a target: both lie in one weight file.

    An assistant reads a hundredth of what its target reads, and every wrong guess costs a token:
    its matrices keep 8 bits, but for the head, which is most of it.
    """
    d = c.hidden
    yield Weight("draft.pre", (d, 2 * c.backbone), LINEAR8, "pre_projection.weight", prefill=0)
    for i in range(c.layers):
        for row in gemma.layer_weights(c, i, f"draft.layers.{i}"):
            yield replace(row, kind=LINEAR8) if row.kind == LINEAR else row
    yield Weight("draft.norm", (d,), FLOAT, "norm.weight", prefill=0)
    yield Weight("draft.post", (c.backbone, d), LINEAR8, "post_projection.weight", prefill=0)
    share = 1.0
    if c.centroids:
        share = c.top_centroids / c.centroids
        hf = "masked_embedding.centroids.weight"
        yield Weight("draft.centroids", (c.centroids, d), LINEAR8, hf, prefill=0)
        hf = "masked_embedding.token_ordering"
        yield Weight(_ORDER, (c.vocab,), TABLE, hf, share=share, prefill=0)
    hf = "lm_head.weight | embed_tokens.weight"
    yield Weight("draft.head", (c.vocab, d), HEAD, hf, share=share, prefill=0)


def attach(c: Config, target: Model) -> Config:
    """The assistant `c` as it reads the tables of `target`.

    Raises:
        ConfigError: it was made for another target; one sentence names all that differs.
    """
    if type(target) is not gemma.Config:
        raise ConfigError(
            "The assistant drafts for Gemma 4 models, and the target is none; leave it out."
        )
    if faults := list(_misfits(c, target)):
        raise ConfigError(
            f"The assistant was made for another target: {'; '.join(faults)}; "
            "give the assistant of this very model."
        )
    last = {kind: target.pattern.rindex(kind, 0, target.owners) for kind in set(c.pattern)}
    return replace(c, reads=tuple(last[kind] for kind in c.pattern))


def _misfits(c: Config, target: gemma.Config) -> Iterator[str]:
    for what, own, wanted in (
        ("its target's hidden size", c.backbone, target.hidden),
        ("its vocabulary", c.vocab, target.vocab),
        ("its window", c.window, target.window),
    ):
        if own != wanted:
            yield f"{what} is {own}, the target's is {wanted}"
    for kind in sorted(set(c.pattern)):
        name = _KIND_NAMES[kind]
        read, kept = (_kv(m.full if kind == FULL else m.sliding) for m in (c, target))
        if kind not in target.pattern[: target.owners]:
            yield f"the target has no {name} layer with keys and values of its own"
        elif read != kept:
            yield (
                f"its {name} layers read {read[0]} KV heads of {read[1]} values, "
                f"the target has {kept[0]} of {kept[1]}"
                if read[:2] != kept[:2]
                else f"its {name} layers have another rotary embedding than the target's"
            )


def _kv(a: Attention) -> tuple[int, int, Rope]:
    return a.kv_heads, a.head_dim, a.rope


def read_tables(c: Config) -> Iterator[str]:
    """The tables of its target that it reads."""
    for i in sorted(set(c.reads)):
        yield from (f"l{i}.k", f"l{i}.v")


def check_values(c: Config, read: Callable[[str], Any], label: str) -> None:
    """Refuse a token order that is none: the head looks rows up by it.

    Raises:
        WeightsError: a token is missing or named twice.
    """
    if c.centroids and not np.array_equal(np.sort(read(_ORDER)), np.arange(c.vocab)):
        raise WeightsError(
            f"{label}: masked_embedding.token_ordering does not name each of {c.vocab} tokens "
            "once; the checkpoint is damaged, download it again."
        )


def _row(
    target: str, hidden: int, mlp_width: int, q_heads: int, centroids: int, top: int, hub_id: str
) -> Row:
    """The official assistant of a named model: three sliding layers and a full one."""
    row = gemma.ROWS[target]
    t = row.config
    assert isinstance(t, gemma.Config)
    kinds = (replace(a, q_heads=q_heads, k_eq_v=False) for a in (t.sliding, t.full))
    sliding, full = kinds
    text = gemma.gemma4(
        vocab=t.vocab, hidden=hidden, layers=4, pattern="SSSF", window=t.window, sliding=sliding,
        full=full, mlp_width=mlp_width, max_ctx=t.max_ctx, eos_ids=t.eos_ids,
    )  # fmt: skip
    config = of_text(text, backbone=t.hidden, centroids=centroids, top_centroids=top)
    return Row(config, hub_id, f"drafter of {row.about}")


# By the name of the target. That of 12B is told by its size, 423 M parameters.
OFFICIAL = {
    "e2b": _row("e2b", 256, 2048, 4, 2048, 32, "google/gemma-4-E2B-it-assistant"),
    "e4b": _row("e4b", 256, 2048, 4, 2048, 32, "google/gemma-4-E4B-it-assistant"),
    "12b": _row("12b", 1024, 8192, 16, 0, 0, "google/gemma-4-12B-it-assistant"),
    "26b-a4b": _row("26b-a4b", 1024, 8192, 16, 0, 0, "google/gemma-4-26B-A4B-it-assistant"),
    "31b": _row("31b", 1024, 8192, 32, 0, 0, "google/gemma-4-31B-it-assistant"),
    "tiny": _row("tiny", 32, 64, 2, 64, 8, ""),
}
