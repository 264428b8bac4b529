"""generation_config.json against transformers: what `generate` would do, or a line that says so."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from edge_kv.errors import ConfigError
from edge_kv.export import pipeline
from edge_kv.runtime.sampling import Sampler, Sampling
from edge_kv.weights.hf_text import HFText
from edge_kv.weights.source import Generation

VOCAB, ENDS = 64, (1, 2)
# What checkpoints of these families ship, without ids.
SHIPPED = {
    "gemma 3": {"cache_implementation": "hybrid", "do_sample": True, "top_k": 64, "top_p": 0.95},
    "gemma 4": {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "qwen3": {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "qwen2.5": {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
        "repetition_penalty": 1.05,
    },
    "llama 3.2": {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
    "smollm2": {"_from_model_config": True},
}  # fmt: skip
# Settings that `Sampler` does not compute; each changes the scores somewhere below.
OTHERS = {
    "no_repeat_ngram_size": 1, "typical_p": 0.2, "epsilon_cutoff": 0.02, "eta_cutoff": 0.3,
    "top_h": 0.1, "forced_bos_token_id": 0, "begin_suppress_tokens": list(range(40)),
    "exponential_decay_length_penalty": [0, 2.0], "min_new_tokens": 9, "min_length": 30,
    "encoder_repetition_penalty": 3.0, "encoder_no_repeat_ngram_size": 1,
    "sequence_bias": [[[5], 4.0]], "bad_words_ids": [[5, 6], [7]], "num_beams": 2,
    "guidance_scale": 1.5, "stop_strings": ["a"], "penalty_alpha": 0.5,
}  # fmt: skip


def read(root: Path, said: dict[str, object]) -> Generation:
    (root / "generation_config.json").write_text(json.dumps(said))
    return HFText(root, VOCAB, ENDS).generation()


def probabilities_of_transformers(
    said: dict[str, object], history: list[int], logits: torch.Tensor
) -> torch.Tensor:
    """What `generate` draws from; the processors are made by its own code."""
    config = GenerationConfig(**said)
    config.update(**GenerationConfig._get_default_generation_params(), defaults_only=True)
    config._eos_token_tensor = torch.tensor(ENDS)
    ids = torch.tensor([history])
    self = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=False),
        _merge_criteria_processor_list=lambda own, further: own,
    )
    processors = GenerationMixin._get_logits_processor(
        self, config, input_ids_seq_length=ids.shape[1], encoder_input_ids=ids,
        logits_processor=[], device="cpu", model_kwargs={},
    )  # fmt: skip
    scores = processors(ids, logits[None])[0]
    if config.do_sample:
        return scores.softmax(-1)
    return torch.nn.functional.one_hot(scores.argmax(), VOCAB).float()


def probabilities(said: Generation, history: list[int], logits: torch.Tensor) -> torch.Tensor:
    sampling = Sampling.of(SimpleNamespace(sampling=said))
    sampler = Sampler(**vars(sampling), suppress=said.suppress_tokens)
    shaped = sampler.shaped(logits.numpy().copy(), history)
    out = torch.zeros(VOCAB)
    if sampling.temperature == 0:
        out[int(shaped.argmax())] = 1
        return out
    ids, weights = sampler.candidates(shaped)
    out[torch.from_numpy(ids)] = torch.from_numpy(weights / weights.sum()).float()
    return out


def same(root: Path, said: dict[str, object], seed: int) -> bool:
    drawn = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(VOCAB, generator=drawn)
    history = torch.randint(VOCAB, (12,), generator=drawn).tolist()
    ours = probabilities(read(root, said), history, logits)
    theirs = probabilities_of_transformers(said, history, logits)
    return torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", SHIPPED)
def test_what_families_ship_is_drawn_as_transformers_does(family, tmp_path):
    assert all(same(tmp_path, SHIPPED[family], seed) for seed in range(8))
    assert read(tmp_path, SHIPPED[family]).unused == ()


def test_any_mixture_of_known_settings_is_drawn_as_transformers_does(tmp_path):
    drawn = random.Random(5)
    known = {
        "do_sample": (True, False, None), "temperature": (0.3, 1.0, 1.7, None),
        "top_k": (0, 1, 7, 500, None), "top_p": (0.3, 0.9, 1.0, None), "min_p": (0.0, 0.2, None),
        "repetition_penalty": (0.7, 1.0, 1.4, None), "suppress_tokens": ([], [3], [0, 9, 63]),
        "bad_words_ids": ([[4], [5]], [[1], [8]], None), "num_beams": (1, None),
        "typical_p": (1.0, None), "no_repeat_ngram_size": (0, None), "renormalize_logits": (True,),
    }  # fmt: skip
    for seed in range(150):
        said = {key: drawn.choice(values) for key, values in known.items() if drawn.random() < 0.6}
        assert same(tmp_path, said, seed), said
        assert read(tmp_path, said).unused == (), said


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_sampler_computes_is_told(name, tmp_path):
    for sampled in (True, False):
        said = {"do_sample": sampled, "top_k": 30, name: OTHERS[name]}
        unused = read(tmp_path, said).unused
        text = f"{name} {json.dumps(OTHERS[name])}"
        told = unused == (text if len(text) - len(name) <= 41 else f"{text[: len(name) + 40]}…",)
        # Silence is right only where transformers draws the same without the setting.
        assert told or all(same(tmp_path, said, seed) for seed in range(8)), (sampled, unused)
        assert told or unused == ()
    assert read(tmp_path, {name: None}).unused == ()


def test_without_the_file_config_json_counts(tmp_path):
    said = {"do_sample": True, "temperature": 0.7, "top_p": None, "suppress_tokens": [3]}
    (tmp_path / "config.json").write_text(json.dumps({**said, "text_config": {"top_p": 0.5}}))
    made = HFText(tmp_path, VOCAB, ENDS).generation()
    assert made == Generation(0.7, 50, 0.5, suppress_tokens=(3,))
    with pytest.raises(ConfigError, match=r"config\.json: top_k is -1"):
        (tmp_path / "config.json").write_text('{"do_sample": true, "top_k": -1}')
        HFText(tmp_path, VOCAB, ENDS).generation()


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 101.0), ("repetition_penalty", 1e30)]
)  # fmt: skip
def test_what_no_manifest_can_hold_is_refused_by_name(field, value):
    config = SimpleNamespace(vocab=VOCAB, pad_id=0)
    with pytest.raises(ConfigError, match=rf"directory x: {field} is {re.escape(repr(value))}, "):
        pipeline._sampling(config, Generation(**{field: value}), "directory x")
    with pytest.raises(ConfigError, match="directory x: eos is "):
        pipeline._tokens(config, None, list(range(65)), Generation(), "directory x")
    assert pipeline._sampling(config, Generation(top_k=1 << 40), "directory x").top_k == VOCAB
