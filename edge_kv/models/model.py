"""The words every model's description uses: its size, its weight rows, its rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

EMBED = "embed"  # token table [vocab, hidden]; also the LM head where there is no HEAD
HEAD = "head"  # LM head [vocab, hidden] of its own
PLE_TABLE = "ple_table"  # per-layer token table [vocab, layers * dim]: a file of its own
LINEAR = "linear"  # [out, in]
PLE_LINEAR = "ple_linear"  # gates and projections of the per-layer embedding: 8 bits or more
EXPERT = "expert"  # stacked experts [n, out, in]
FLOAT = "float"  # norms, scalars, routers, small convolutions: kept in f32
TABLE = "table"  # whole numbers looked up by token id


@dataclass(frozen=True, kw_only=True)
class Model:
    """What every config says; a model adds its own fields."""

    vocab: int
    hidden: int
    layers: int
    max_ctx: int
    norm_eps: float = 1e-6
    bos_id: int | None = 2
    eos_ids: tuple[int, ...] = (1,)
    pad_id: int | None = 0


@dataclass(frozen=True)
class Weight:
    """One stored tensor: its name here, its shape, how it is kept, and its names in checkpoints.

    A foreign name is a small expression: " | " between alternatives, the first that is there
    counts; " + " between parts that are joined along the output axis; "{e}" in a part for one
    tensor an expert, stacked in order. `part` names a range of rows (start, stop) of what is
    stored, `offset` a number added to it, `twist` a reordering (see `edge_kv.weights`).
    """

    name: str
    shape: tuple[int, ...]
    kind: str = LINEAR
    hf: str = ""
    gguf: str = ""
    share: float = 1.0  # of its values that decoding one token reads: 0 for a mere look-up
    prefill: float = 1.0  # … that a chunk of a prompt reads
    offset: float = 0.0  # added to the values of a Hugging Face checkpoint
    twist: str = ""

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def dtype(self) -> str:
        return "i64" if self.kind == TABLE else "f32"


@dataclass(frozen=True)
class Yarn:
    """YaRN's ramp (arXiv 2309.00071): which pairs keep their frequency."""

    original: int  # positions the model was first trained for
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's blend of scaled and unscaled frequencies, by wavelength."""

    original: int
    low: float = 1.0
    high: float = 4.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of `dim` dims of a head: pair j turns theta**(-2j/dim) a position.

    Pairs from `pairs` on stand still; `factor` slows the others, all of them or as `scaling` says;
    `gain` multiplies cos and sin.
    """

    theta: float
    dim: int
    pairs: int
    factor: float = 1.0
    scaling: Yarn | Llama3 | None = None
    gain: float = 1.0

    @classmethod
    def whole(cls, theta: float, dim: int) -> Rope:
        """All pairs of `dim` dims turn, unscaled."""
        return cls(theta, dim, dim // 2)


@dataclass(frozen=True)
class Row:
    """A named model: its config, where its official weights live, and what it is."""

    config: Model
    hub_id: str
    about: str
    weights: Path | None = None  # shipped with the package
