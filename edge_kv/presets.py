"""The rows of `--model`: names, configs and official hub checkpoints. Variants are data.

Sources of the numbers: architectures.md §1a (each Gemma 4 E number has two independent sources).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_kv.config import AttentionSpec, ModelConfig, MoESpec
from edge_kv.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """A named model: its config, where its official weights live, and what it is."""

    config: ModelConfig
    hub_id: str
    about: str
    weights: Path | None = None  # shipped with the package

    @property
    def source(self) -> str:
        """What `--weights` would say: the shipped directory, else the official checkpoint."""
        return str(self.weights) if self.weights else self.hub_id


def _gemma4(
    pattern: str, hidden: int, q_heads: int, kv_sliding: int, kv_full: int, mlp_width: int,
    **kwargs: object,
) -> ModelConfig:  # fmt: skip
    """A Gemma 4 text decoder: head_dim 256 sliding (theta 1e4), 512 full (theta 1e6, 64 pairs)."""
    k_eq_v = bool(kwargs.pop("k_eq_v", False))
    return ModelConfig(
        family="gemma4",
        vocab_size=262_144,
        hidden=hidden,
        pattern=pattern,
        sliding=AttentionSpec(q_heads, kv_sliding, 256, 1e4, 128),
        full=AttentionSpec(q_heads, kv_full, 512, 1e6, 64, k_eq_v=k_eq_v),
        mlp_width=mlp_width,
        final_softcap=30.0,
        eos_ids=(1, 106),
        **kwargs,  # type: ignore[arg-type]
    )


def _gemma3(pattern: str, hidden: int, q_heads: int, mlp_width: int, max_ctx: int) -> ModelConfig:
    """A Gemma 3 text decoder with head_dim 256, one KV head, window 512."""
    return ModelConfig(
        family="gemma3",
        vocab_size=262_144,
        hidden=hidden,
        pattern=pattern,
        sliding_window=512,
        sliding=AttentionSpec(q_heads, 1, 256, 1e4, 128),
        full=AttentionSpec(q_heads, 1, 256, 1e6, 128),
        mlp_width=mlp_width,
        max_ctx=max_ctx,
        attention_scale=256**-0.5,
        v_norm=False,
        eos_ids=(1, 106),
    )


_E2B = _gemma4(
    "SSSSF" * 7, 1536, 8, 1, 1, 6144, shared_mlp_width=12_288,
    sliding_window=512, n_kv_shared=20, ple_dim=256, max_ctx=131_072,
)  # fmt: skip
_E4B = _gemma4(
    "SSSSSF" * 7, 2560, 8, 2, 2, 10_240,
    sliding_window=512, n_kv_shared=18, ple_dim=256, max_ctx=131_072,
)  # fmt: skip
_12B = _gemma4(
    "SSSSSF" * 8, 3840, 16, 8, 1, 15_360, k_eq_v=True, sliding_window=1024, max_ctx=262_144
)
_26B = _gemma4(
    "SSSSSF" * 5, 2816, 16, 8, 2, 2112, k_eq_v=True, moe=MoESpec(128, 8, 704),
    sliding_window=1024, max_ctx=262_144,
)  # fmt: skip
_31B = _gemma4(
    "SSSSSF" * 10, 5376, 32, 16, 4, 21_504, k_eq_v=True, sliding_window=1024, max_ctx=262_144
)

PRESETS: dict[str, Preset] = {
    "e2b": Preset(_E2B, "google/gemma-4-E2B-it", "Gemma 4 E2B, 2.3 B effective parameters"),
    "e4b": Preset(_E4B, "google/gemma-4-E4B-it", "Gemma 4 E4B, 4.5 B effective parameters"),
    "12b": Preset(_12B, "google/gemma-4-12B-it", "Gemma 4 12B, dense"),
    "26b-a4b": Preset(_26B, "google/gemma-4-26B-A4B-it", "Gemma 4 26B-A4B, mixture of experts"),
    "31b": Preset(_31B, "google/gemma-4-31B-it", "Gemma 4 31B, dense"),
    "gemma3-270m": Preset(
        _gemma3("SSSSSF" * 3, 640, 4, 2048, 32_768), "google/gemma-3-270m-it", "Gemma 3 270M"
    ),
    "tiny": Preset(
        ModelConfig(
            family="gemma4",
            vocab_size=2048,
            hidden=128,
            pattern="SSSF" * 2,
            sliding_window=64,
            sliding=AttentionSpec(4, 1, 32, 1e4, 16),
            full=AttentionSpec(4, 1, 64, 1e6, 8),
            mlp_width=256,
            shared_mlp_width=512,
            n_kv_shared=4,
            ple_dim=32,
            max_ctx=32_768,
            final_softcap=30.0,
        ),
        "",
        "A 2.4 M parameter Gemma 4 trained for this project; ships with it",
        weights=Path(__file__).parent / "data" / "tiny",
    ),
    "gemma3-1b": Preset(
        _gemma3("SSSSSF" * 4 + "SS", 1152, 4, 6912, 32_768), "google/gemma-3-1b-it", "Gemma 3 1B"
    ),
}


def get_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ConfigError: no such row; the message names the closest one.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"Unknown model {name!r}.{did_you_mean(name, PRESETS)}") from None
