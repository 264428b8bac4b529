"""A Gemma 3 or Gemma 4 GGUF file: metadata -> ModelConfig, tensor names, tokenizer.

Keys, names and conventions are those llama.cpp's converter writes and its loader reads
(conversion/gemma.py, src/models/gemma3.cpp and gemma4.cpp): norm weights already hold Gemma 3's
1 + w, q and k rows are in Hugging Face's (NEOX) order, linears are [out, in].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_kv.config import FULL, SLIDING, AttentionSpec, ModelConfig, MoESpec
from edge_kv.errors import ConfigError, did_you_mean
from edge_kv.tensors import tensor_table
from edge_kv.weights.fields import Fields
from edge_kv.weights.gguf_file import GGUFFile, open_gguf
from edge_kv.weights.gguf_tokenizer import hf_tokenizer_json
from edge_kv.weights.source import Checkpoint, Generation, Stored, turn_end_ids

_ROPE_FREQS = "rope_freqs.weight"
_HEAD = "output.weight"
_TOWERS = ("v.", "a.", "mm.")  # vision, audio and their projector, when they lie in the same file
ARCHITECTURES = ("gemma3", "gemma4")
_UNROTATED = 1e29  # llama.cpp divides the angles of unrotated pairs by 1e30
_LAYERS_OF_27B = 62

_MODEL = {
    "embed.weight": "token_embd.weight",
    "ple_embed.weight": "per_layer_token_embd.weight",
    "ple_proj.weight": "per_layer_model_proj.weight",
    "ple_norm.weight": "per_layer_proj_norm.weight",
    "norm.weight": "output_norm.weight",
}
_LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "attn.q_proj.weight": "attn_q.weight",
    "attn.k_proj.weight": "attn_k.weight",
    "attn.v_proj.weight": "attn_v.weight",
    "attn.o_proj.weight": "attn_output.weight",
    "attn.q_norm.weight": "attn_q_norm.weight",
    "attn.k_norm.weight": "attn_k_norm.weight",
    "post_attn_norm.weight": "post_attention_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_mlp_norm.weight": "post_ffw_norm.weight",
    "moe.dense_norm.weight": "post_ffw_norm_1.weight",
    "moe.router.scale": "ffn_gate_inp.scale",
    "moe.router.proj.weight": "ffn_gate_inp.weight",
    "moe.router.expert_scale": "ffn_down_exps.scale",
    "moe.in_norm.weight": "pre_ffw_norm_2.weight",
    "moe.gate_up": "ffn_gate_up_exps.weight",
    "moe.down": "ffn_down_exps.weight",
    "moe.out_norm.weight": "post_ffw_norm_2.weight",
    "ple.gate.weight": "inp_gate.weight",
    "ple.proj.weight": "proj.weight",
    "ple.norm.weight": "post_norm.weight",
    "scalar": "layer_output_scale.weight",
}
_SHARED = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")


class GGUFText:
    """What a GGUF file says beside its weights: tokenizer, template, ids, sampling."""

    def __init__(self, metadata: dict[str, Any], where: str, vocab: int, eos: tuple[int, ...]):
        self._metadata, self._where, self.vocab, self.eos = metadata, where, vocab, eos
        self._tokenizer: str | None = None

    def tokenizer_json(self) -> str | None:
        if self._tokenizer is None:
            self._tokenizer = hf_tokenizer_json(self._metadata, self._where)
        return self._tokenizer

    def chat_template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def stop_ids(self) -> list[int]:
        fields, n = Fields(self._metadata, self._where), self.vocab
        known = self.eos
        tokens = self._metadata.get("tokenizer.ggml.tokens") or []
        ids = {
            *fields.token_ids("tokenizer.ggml.eot_token_id", n),
            *turn_end_ids({t: i for i, t in enumerate(tokens)}, known),
        }
        return sorted(ids - set(known))

    def generation(self) -> Generation:
        fields = Fields(self._metadata, self._where, prefix="general.sampling.")
        return Generation(
            temperature=fields.positive("temp", or_zero=True),
            top_k=fields.count("top_k"),
            top_p=fields.positive("top_p", at_most=1.0),
            min_p=fields.positive("min_p", at_most=1.0, or_zero=True),
            repetition_penalty=fields.positive("penalty_repeat"),
        )


class GGUFModel(GGUFText, Checkpoint):
    """A GGUF file of architecture `gemma3` or `gemma4`; of several parts, the first.

    Raises:
        WeightsError: not a GGUF file, or cut off.
        ConfigError: another architecture, an unsupported or a wrong metadata value.
    """

    def __init__(self, path: Path, label: str = ""):
        file = open_gguf(path)
        self._files = file.files
        config = config_from_gguf(file, path.name)
        GGUFText.__init__(self, file.metadata, path.name, config.vocab_size, config.eos_ids)
        names = {s.name: _own_names(s.name, file.tensors) for s in tensor_table(config)}
        heads = [_HEAD] if _HEAD in file.tensors else []
        used = {own for parts in names.values() for own in parts} | set(heads)
        dead = {f"blk.{i}.{t}" for i in range(config.n_own, config.n_layers) for t in _SHARED}
        if config.family == "gemma4":
            dead.add(_ROPE_FREQS)  # read with the config
        Checkpoint.__init__(
            self,
            config,
            label or f"{path.name} (GGUF)",
            stored=file.tensors,
            names=names,
            surplus=sorted(
                n
                for n in file.tensors
                if n not in used and n not in dead and not n.startswith(_TOWERS)
            ),
            heads=heads,
        )

    def files(self) -> list[Path]:
        return self._files


def config_from_gguf(file: GGUFFile, where: str) -> ModelConfig:
    """The ModelConfig a GGUF file's metadata describes.

    Raises:
        ConfigError: an unknown architecture, an unsupported field or a wrong value, by name.
    """
    arch = file.metadata.get("general.architecture")
    if arch == "clip":
        raise ConfigError(
            f"{where} is the vision or audio projector of a model (general.architecture 'clip'); "
            "give the file of the language model."
        )
    if arch not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: general.architecture {arch!r} is not supported."
            + did_you_mean(str(arch), ARCHITECTURES)
        )
    everywhere = Fields(file.metadata, where, _token_defaults())
    defaults = {"rope.freq_base_swa": 1e4}  # llama.cpp's own
    fields = Fields(file.metadata, where, defaults, f"{arch}.")
    fields.refuse_unless("attention.causal", True)
    fields.refuse_unless("rope.scaling.type", "none", "linear")
    softcap = fields.get("final_logit_softcapping")
    build = _gemma3 if arch == "gemma3" else _gemma4
    try:
        return build(
            fields,
            file.tensors,
            family=arch,
            vocab_size=_vocab_size(fields, file),
            hidden=fields.integer("embedding_length"),
            sliding_window=fields.integer("attention.sliding_window"),
            max_ctx=fields.integer("context_length"),
            final_softcap=0.0 if softcap is None else fields.number("final_logit_softcapping"),
            # The file holds the nearest f32 of a decimal number.
            norm_eps=float(f"{fields.number('attention.layer_norm_rms_epsilon'):.7g}"),
            pad_id=everywhere.integer("tokenizer.ggml.padding_token_id"),
            bos_id=everywhere.integer("tokenizer.ggml.bos_token_id"),
            eos_ids=everywhere.ids("tokenizer.ggml.eos_token_id"),
        )
    except ConfigError as e:
        raise ConfigError(str(e) if where in str(e) else f"{where}: {e}") from None


def _token_defaults() -> dict[str, int]:
    ids = {"padding": 0, "eos": 1, "bos": 2}
    return {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}


def _vocab_size(fields: Fields, file: GGUFFile) -> int:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        return len(tokens)
    if fields.get("vocab_size") is not None:
        return fields.integer("vocab_size")
    table = file.tensors.get("token_embd.weight")
    return table.shape[0] if table else 0


def _gemma3(fields: Fields, tensors: dict[str, Stored], **common: object) -> ModelConfig:
    n_layers = fields.n_layers("block_count")
    q_heads = fields.integer("attention.head_count")
    kv_heads = _uniform(fields, "attention.head_count_kv", range(n_layers), n_layers)
    dim = _head_dim(fields, "")
    factor = _rope_factor(fields)
    hidden = fields.integer("embedding_length")
    # llama.cpp's rule: only the 27B scales by hidden / heads instead of head_dim.
    scale_dim = hidden / q_heads if n_layers == _LAYERS_OF_27B else dim
    specs = {
        SLIDING: AttentionSpec(
            q_heads, kv_heads, dim, _theta(fields, "rope.freq_base_swa"), dim // 2
        ),
        FULL: AttentionSpec(
            q_heads, kv_heads, dim, _theta(fields, "rope.freq_base"), dim // 2, factor
        ),
    }
    return ModelConfig(
        pattern=_pattern(fields, n_layers, 6),
        sliding=specs[SLIDING],
        full=specs[FULL],
        mlp_width=_uniform(fields, "feed_forward_length", range(n_layers), n_layers),
        attention_scale=scale_dim**-0.5,
        v_norm=False,
        **common,  # type: ignore[arg-type]
    )


def _gemma4(fields: Fields, tensors: dict[str, Stored], **common: object) -> ModelConfig:
    n_layers = fields.n_layers("block_count")
    pattern = _pattern(fields, n_layers, 0)
    shared = fields.get("attention.shared_kv_layers")
    n_shared = 0 if shared is None else fields.integer("attention.shared_kv_layers")
    if not 0 <= n_shared < n_layers:
        raise fields.fault("attention.shared_kv_layers", f"a number below {n_layers}")
    owners, sharers = range(n_layers - n_shared), range(n_layers - n_shared, n_layers)
    of_type = {t: [i for i in range(n_layers) if pattern[i] == t] for t in (SLIDING, FULL)}
    heads = {t: _uniform(fields, "attention.head_count", at, n_layers)
             for t, at in of_type.items()}  # fmt: skip
    kv_heads = {t: _uniform(fields, "attention.head_count_kv", at, n_layers)
                for t, at in of_type.items()}  # fmt: skip
    dims = {SLIDING: _head_dim(fields, "_swa"), FULL: _head_dim(fields, "")}
    for letter, suffix in ((SLIDING, "_swa"), (FULL, "")):
        fields.refuse_unless(f"rope.dimension_count{suffix}", dims[letter])
    # The converter writes no flag: a file whose own full layers have no attn_v reuses K as V.
    own_full = [i for i in of_type[FULL] if i in owners]
    k_eq_v = bool(own_full) and not any(f"blk.{i}.attn_v.weight" in tensors for i in own_full)
    mlp = _uniform(fields, "feed_forward_length", owners, n_layers)
    shared_mlp = _uniform(fields, "feed_forward_length", sharers, n_layers) if n_shared else mlp
    ple = fields.get("embedding_length_per_layer_input")
    return ModelConfig(
        pattern=pattern,
        sliding=AttentionSpec(
            heads[SLIDING], kv_heads[SLIDING], dims[SLIDING],
            _theta(fields, "rope.freq_base_swa"), dims[SLIDING] // 2,
        ),
        full=AttentionSpec(
            heads[FULL], kv_heads[FULL], dims[FULL], _theta(fields, "rope.freq_base"),
            _rotated_pairs(fields.where, tensors, dims[FULL]),
            _rope_factor(fields), k_eq_v,
        ),
        mlp_width=mlp,
        n_kv_shared=n_shared,
        shared_mlp_width=0 if shared_mlp == mlp else shared_mlp,
        ple_dim=0 if ple is None else fields.integer("embedding_length_per_layer_input"),
        moe=_moe(fields),
        **common,  # type: ignore[arg-type]
    )  # fmt: skip


def _pattern(fields: Fields, n_layers: int, period: int) -> str:
    """A flag for each layer (true: sliding), or a period: every n-th layer is full."""
    key = "attention.sliding_window_pattern"
    flags = fields.get(key)
    if isinstance(flags, list):
        return "".join(SLIDING if f else FULL for f in fields.per_layer(key, n_layers))
    if flags is not None:
        period = fields.integer(key)
    if period < 1:
        raise fields.fault(key, "a flag for each layer")
    return "".join(SLIDING if (i + 1) % period else FULL for i in range(n_layers))


def _uniform(fields: Fields, key: str, layers: range | list[int], n_layers: int) -> int:
    """The value `key` has in all of `layers`; refused by name when they differ."""
    values = fields.per_layer(key, n_layers)
    found = sorted({values[i] for i in layers} or set(values))
    if len(found) > 1:
        raise fields.unsupported(key, found, f"one value for layers {list(layers)}")
    return found[0]


def _head_dim(fields: Fields, suffix: str) -> int:
    dim = fields.integer(f"attention.key_length{suffix}")
    fields.refuse_unless(f"attention.value_length{suffix}", dim)
    return dim


def _theta(fields: Fields, key: str) -> float:
    theta = fields.number(key)
    if theta <= 0:
        raise fields.fault(key, "a positive number")
    return theta


def _rope_factor(fields: Fields) -> float:
    """What positions of full layers are divided by; llama.cpp reads 0 as 1, like no scaling."""
    if fields.get("rope.scaling.type") == "none":
        return 1.0
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        if factor := fields.positive(key, or_zero=True):
            return factor
    return 1.0


def _rotated_pairs(where: str, tensors: dict[str, Stored], head_dim: int) -> int:
    """Pairs that turn in full layers: divisors in `rope_freqs.weight` are 1, then 1e30."""
    found = tensors.get(_ROPE_FREQS)
    if found is None or found.shape != (head_dim // 2,):
        raise ConfigError(
            f"{where}: {_ROPE_FREQS} {'is missing' if found is None else f'is {found.shape}'}, "
            f"expected {head_dim // 2} rope divisors; convert it with a current llama.cpp."
        )
    divisors = found.rows(0, head_dim // 2)
    pairs = int((divisors == 1).sum())
    if not ((divisors[:pairs] == 1).all() and (divisors[pairs:] > _UNROTATED).all()):
        raise ConfigError(
            f"{where}: {_ROPE_FREQS} holds other divisors than 1 and 1e30; "
            "edge-kv supports plain and proportional rope."
        )
    return pairs


def _moe(fields: Fields) -> MoESpec | None:
    if not fields.get("expert_count"):
        return None
    return MoESpec(
        fields.integer("expert_count"),
        fields.integer("expert_used_count"),
        fields.integer("expert_feed_forward_length"),
    )


def _own_names(name: str, tensors: dict[str, Stored]) -> tuple[str, ...]:
    """Canonical name -> the file's names; older files keep gate and up experts apart."""
    if name in _MODEL:
        return (_MODEL[name],)
    _, layer, rest = name.split(".", 2)
    own = f"blk.{layer}.{_LAYER[rest]}"
    halves = (f"blk.{layer}.ffn_gate_exps.weight", f"blk.{layer}.ffn_up_exps.weight")
    if rest == "moe.gate_up" and own not in tensors and halves[0] in tensors:
        return halves
    return (own,)
