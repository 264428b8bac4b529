"""ModelConfig: one frozen description for every decoder family edge-kv knows.

A config says what is computed; it holds no Hugging Face or GGUF names (those live in
`edge_kv.weights`, where checkpoints are read) and no memory decisions (those live in `kv_plan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from edge_kv.errors import ConfigError

SLIDING, FULL = "S", "F"


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer type (sliding or full).

    `rotated_pairs` counts the leading angle pairs that turn; the other `head_dim/2 - rotated_pairs`
    pairs have angle 0. inv_freq[j] = rope_theta ** (-2j / head_dim) / rope_factor.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rotated_pairs: int
    rope_factor: float = 1.0
    k_eq_v: bool = False  # no v_proj: V is the raw key projection

    @property
    def q_width(self) -> int:
        return self.q_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class MoESpec:
    """Routed experts beside the always-on MLP (Gemma 4 26B-A4B)."""

    n_experts: int
    top_k: int
    width: int

    def faults(self) -> list[str]:
        """What cannot be, one sentence each."""
        faults = [
            f"{k} {v} must be positive"
            for k, v in (("n_experts", self.n_experts), ("expert width", self.width))
            if v <= 0
        ]
        if not 1 <= self.top_k <= max(1, self.n_experts):
            faults.append(f"top_k {self.top_k} must be from 1 to n_experts {self.n_experts}")
        return faults


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Gemma 3 / Gemma 4 text family.

    `pattern` has one letter a layer: S sliding, F full attention. The last `n_kv_shared` layers own
    no keys or values and read those of the last owner of their type. Norm weights are plain
    multipliers: a checkpoint's (1 + w) form is folded where it is read.
    """

    family: str  # "gemma4" | "gemma3"
    vocab_size: int
    hidden: int
    pattern: str
    sliding_window: int
    sliding: AttentionSpec
    full: AttentionSpec
    mlp_width: int
    max_ctx: int
    attention_scale: float = 1.0
    n_kv_shared: int = 0
    shared_mlp_width: int = 0  # MLP width of the sharing layers; 0: same as mlp_width
    ple_dim: int = 0  # per-layer embedding width; 0: none
    moe: MoESpec | None = None
    v_norm: bool = True
    final_softcap: float = 0.0  # 0: none
    norm_eps: float = 1e-6
    pad_id: int = 0
    bos_id: int = 2
    eos_ids: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        faults = self._faults()
        if faults:
            raise ConfigError("Inconsistent model config: " + "; ".join(faults) + ".")

    def _faults(self) -> list[str]:
        faults: list[str] = []
        if not self.pattern or set(self.pattern) - {SLIDING, FULL}:
            faults.append(f"pattern {self.pattern!r} must be one S or F per layer")
        if not 0 <= self.n_kv_shared < max(len(self.pattern), 1):
            faults.append(
                f"n_kv_shared {self.n_kv_shared} must be below n_layers {len(self.pattern)}"
            )
        else:
            owned = set(self.pattern[: self.n_own])
            lost = set(self.pattern[self.n_own :]) - owned
            if lost:
                faults.append(f"sharing layers of type {''.join(lost)} have no owner to read from")
        positive = {
            "vocab_size": self.vocab_size,
            "hidden": self.hidden,
            "sliding_window": self.sliding_window,
            "mlp_width": self.mlp_width,
            "max_ctx": self.max_ctx,
        }
        faults += [f"{k} {v} must be positive" for k, v in positive.items() if v <= 0]
        scales = {
            "norm_eps": self.norm_eps,
            "attention_scale": self.attention_scale,
            "sliding rope_theta": self.sliding.rope_theta,
            "sliding rope_factor": self.sliding.rope_factor,
            "full rope_theta": self.full.rope_theta,
            "full rope_factor": self.full.rope_factor,
        }
        faults += [
            f"{k} {v} must be a positive number" for k, v in scales.items() if not 0 < v < inf
        ]
        widths = {"ple_dim": self.ple_dim, "shared_mlp_width": self.shared_mlp_width}
        faults += [f"{k} {v} must not be negative" for k, v in widths.items() if v < 0]
        if not 0 <= self.final_softcap < inf:
            faults.append(f"final_softcap {self.final_softcap} must be a number from 0")
        faults += [
            f"token id {i} must be below vocab_size {self.vocab_size}"
            for i in dict.fromkeys((self.pad_id, self.bos_id, *self.eos_ids))
            if not 0 <= i < max(1, self.vocab_size)
        ]
        if self.moe:
            faults += self.moe.faults()
        for name, spec in (("sliding", self.sliding), ("full", self.full)):
            if min(spec.q_heads, spec.kv_heads, spec.head_dim) <= 0:
                faults.append(f"{name} heads and head_dim must be positive")
            elif spec.q_heads % spec.kv_heads:
                faults.append(
                    f"{name} q_heads {spec.q_heads} must be a multiple of kv_heads {spec.kv_heads}"
                )
            if spec.head_dim % 2 or not 0 <= spec.rotated_pairs <= spec.head_dim // 2:
                faults.append(f"{name} rotated_pairs {spec.rotated_pairs} must fit head_dim/2")
        return faults

    @property
    def n_layers(self) -> int:
        return len(self.pattern)

    @property
    def n_own(self) -> int:
        """Layers 0 … n_own-1 own keys and values; the others share."""
        return len(self.pattern) - self.n_kv_shared

    def spec(self, layer: int) -> AttentionSpec:
        return self.full if self.pattern[layer] == FULL else self.sliding

    def owns(self, layer: int) -> bool:
        return layer < self.n_own

    def source(self, layer: int) -> int:
        """The layer whose keys and values `layer` reads: itself, or the last owner of its type."""
        return (
            layer if self.owns(layer) else self.pattern.rindex(self.pattern[layer], 0, self.n_own)
        )

    def mlp(self, layer: int) -> int:
        """MLP width of `layer`."""
        return self.mlp_width if self.owns(layer) else (self.shared_mlp_width or self.mlp_width)
