"""The words every model's description uses: its size, its weight rows, its rotary embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from edge_kv.errors import ConfigError

EMBED = "embed"  # token table [vocab, hidden]; also the LM head where there is no HEAD
HEAD = "head"  # LM head [vocab, hidden] of its own
PLE_TABLE = "ple_table"  # per-layer token table [vocab, layers * dim]: a file of its own
LINEAR = "linear"  # [out, in]
LINEAR8 = "linear8"  # a small matrix that is not stored in fewer than 8 bits
KV = "kv"  # key and value projections of attention
EXPERT = "expert"  # stacked experts [n, out, in]
EXPERT8 = "expert8"  # experts of which a token runs one: no sum that would average their error
FLOAT = "float"  # norms, scalars, routers, small convolutions: kept in f32
TABLE = "table"  # whole numbers looked up by token id
# Weights of a layer that the rows of its keys and values take: all that prefill reads of the last.
OF_STATE = ("attn_norm", "attn.k", "attn.k_norm", "attn.v")


@dataclass(frozen=True)
class TokenRows:
    """A per-layer embedding: a token's row holds `dim` values for each of `layers` layers.

    It is read outside the programs. A chunk of a prompt takes the values of the first `prefill`
    layers only.
    """

    name: str  # of its weight row
    layers: int
    prefill: int
    dim: int


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

    def __post_init__(self) -> None:
        if faults := list(self.faults()):
            raise ConfigError("Inconsistent model config: " + "; ".join(faults) + ".")

    @property
    def token_rows(self) -> TokenRows | None:
        """The per-layer embedding of a model that has one: its weight row is of kind PLE_TABLE."""
        return None

    @property
    def scored(self) -> int:
        """Tokens whose logits it gives: all, or those that a drafter chose."""
        return self.vocab

    def faults(self) -> Iterator[str]:
        """What no model can be; a config adds its own."""
        yield from self.not_positive("vocab", "hidden", "layers", "max_ctx", "norm_eps")
        ids = {"bos_id": self.bos_id, "pad_id": self.pad_id}
        ids |= {f"eos_ids[{i}]": e for i, e in enumerate(self.eos_ids)}
        for name, i in ids.items():
            if i is not None and not 0 <= i < self.vocab:
                yield f"{name} {i} is not a token id below the vocabulary's {self.vocab}"

    def not_positive(self, *names: str) -> Iterator[str]:
        for name in names:
            if (value := getattr(self, name)) <= 0:
                yield f"{name} {value:g} must be positive"

    def not_one_of(self, name: str, known: str) -> Iterator[str]:
        """A pattern must have one of the letters `known` for each layer."""
        pattern = getattr(self, name)
        if len(pattern) != self.layers or set(pattern) - set(known):
            yield f"{name} {pattern!r} must have one of {known} for each of {self.layers} layers"

    def uneven_heads(self, q_heads: int, kv_heads: int, what: str = "") -> Iterator[str]:
        if min(q_heads, kv_heads) < 1 or q_heads % kv_heads:
            yield f"{what}q_heads {q_heads} must be a positive multiple of kv_heads {kv_heads}"


@dataclass(frozen=True)
class Weight:
    """One stored tensor: its name here, its shape, how it is kept, and its names in checkpoints.

    A foreign name is a small expression: " | " between alternatives, the first that is there
    counts; " + " between parts that are joined along the output axis; "{e}" in a part for one
    tensor an expert, stacked in order.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = LINEAR
    hf: str = ""
    gguf: str = ""
    share: float = 1.0  # of its values that decoding one token reads: 0 for a mere look-up
    prefill: float = 1.0  # … that a chunk of a prompt reads
    offset: float = 0.0  # added to the values of a Hugging Face checkpoint
    pairs: int = 0  # heads whose rows a GGUF file interleaves: dims j and n + j are neighbours
    filled: tuple[int, int] | None = None  # (rows a Hugging Face checkpoint holds, the one of them
    # that stands for all beyond), where these are not all
    drawn: tuple[float, float] | None = None  # centre and deviation of random values, where they
    # are not those of its kind; packed ones have no centre

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
class Divisors:
    """What each pair's frequency is divided by, as GGUF files write Llama 3's blend."""

    values: tuple[float, ...]


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
    scaling: Yarn | Llama3 | Divisors | None = None
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not (self.theta > 0 < self.factor and self.dim % 2 == 0 <= self.pairs <= self.dim // 2):
            raise ConfigError(
                f"Rotary embedding of {self.pairs} pairs in {self.dim} dims with theta "
                f"{self.theta:g} and factor {self.factor:g} cannot be; pairs are at most half the "
                "dims, theta and factor are positive."
            )
        if isinstance(self.scaling, Yarn) and self.theta <= 1:
            raise ConfigError(f"YaRN needs a rope theta above 1, and it is {self.theta:g}.")

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

    @property
    def official(self) -> str:
        """Where its own weights are: those that ship with the package, else on the hub."""
        return str(self.weights) if self.weights else self.hub_id
