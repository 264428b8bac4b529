"""Gemma 4's assistant against transformers: its modules, the candidates of its assisted generation,
and what is refused. Every parameter is drawn.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.generation import candidate_generator
from transformers.models.gemma4_assistant import Gemma4AssistantConfig, Gemma4AssistantForCausalLM
from transformers.models.gemma4_unified_assistant import (
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
)
from weights_models import layer_types, randomise, tiny_config, tiny_hf

from edge_kv import models, nets
from edge_kv.errors import ConfigError, PlanError, WeightsError
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.models.gemma_assistant import OFFICIAL, check_values
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import Weights, load

TARGETS = ("e2b", "e4b", "12b", "26b", "31b")
CLUSTERED = ("e2b", "e4b")  # as published: the small ones have a head of clusters
BOUND = 2e-4
CTX, CHUNK, WINDOW = 96, 8, 8


def tiny_assistant(target_name, target, *, clustered, window=WINDOW, seed=5, **changes):
    """An assistant of the tiny target, all layers sharing: SSSF of width 32."""
    t = target.config
    text = tiny_config(
        target_name,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=t.num_attention_heads,
        layer_types=layer_types("SSSF"),
        num_hidden_layers=4,
        num_kv_shared_layers=4,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        enable_moe_block=False,
        use_double_wide_mlp=False,
        final_logit_softcapping=None,
        sliding_window=window,
        attn_implementation="eager",
    )
    kinds = (Gemma4AssistantConfig, Gemma4AssistantForCausalLM)
    if target_name == "12b":
        kinds = (Gemma4UnifiedAssistantConfig, Gemma4UnifiedAssistantForCausalLM)
    config = kinds[0](
        text_config=text,
        backbone_hidden_size=t.hidden_size,
        use_ordered_embeddings=clustered,
        num_centroids=16,
        centroid_intermediate_top_k=5,
        **changes,
    )
    model = randomise(kinds[1](config).float().eval(), seed)
    model.tie_weights()
    if clustered:
        order = torch.randperm(t.vocab_size, generator=torch.Generator().manual_seed(seed))
        model.masked_embedding.token_ordering.copy_(order)
    return model


def saved(model, root):
    model.save_pretrained(root)
    return root


def read_back(target, drafter, root):
    """Both as `open_checkpoint` reads what transformers saved."""
    pair = [open_checkpoint(saved(m, root / n)) for m, n in ((target, "t"), (drafter, "d"))]
    pair[1].check()
    return Pair(*pair)


class Pair:
    """The nets of a target and its assistant, over the weights of two sources."""

    def __init__(self, target, drafter, ctx=CTX, chunk=CHUNK, kv="f32", stored=None):
        """`stored`: what makes the modules, and what yields their values, where not the sources."""
        self.target, self.drafter, self.stored = target, drafter, stored
        self.config = models.attach(drafter.config, target.config)
        self.net = self.made(target.config)
        self.draft = self.made(self.config)
        self.plan = models.plan(target.config, ctx=ctx, chunk=chunk, kv=kv)
        self.state = StaticState(self.plan, fill=torch.nan)

    def made(self, config):
        make, read = self.stored or (
            Weights(models.weights(self.target.config, self.config)),
            lambda *rows: torch.from_numpy(self.source(rows[0]).read(*rows)),
        )
        with torch.device("meta"):
            net = nets.make_net(config, make)
        load(net, read)
        return net

    def source(self, name):
        return self.target if name in self.target.rows else self.drafter

    def rows(self, ids):
        c = self.target.config
        if not c.ple_dim:
            return None
        return torch.from_numpy(self.target.read("ple.embed"))[ids].view(len(ids), c.layers, -1)

    def feed(self, ids, pos):
        """Write `ids` from `pos` on; hidden states and logits [T, …]."""
        x = self.net(ids, torch.tensor([pos]), self.state, self.rows(ids))
        return self.net.hidden(x), self.net.logits(x)

    def burst(self, token, hidden, pos, n):
        """Logits [vocab] and token of n drafts behind `token`, which is to stand at `pos`."""
        out = []
        for _ in range(n):
            y = self.draft(torch.tensor([token]), hidden, torch.tensor([pos]), self.state)
            hidden = self.draft.carry(y)
            logits, tokens = self.draft.logits(y)
            if tokens is not None:
                whole = torch.full((self.config.vocab,), float(logits.min()) - 1)
                logits = whole.scatter(0, tokens, logits)
            token = int(logits.argmax())
            out.append((logits, token))
        return out


@pytest.fixture(params=TARGETS)
def trio(request, tmp_path):
    name = request.param
    target = tiny_hf(name)
    drafter = tiny_assistant(name, target, clustered=name in CLUSTERED)
    return target, drafter, read_back(target, drafter, tmp_path)


def theirs(target, drafter, ids, token, n):
    """The same burst by transformers' modules: the target reads `ids`, the assistant drafts.

    Of the sliding layers it is given the newest `window` rows: transformers' own mask lets through
    as many as its cache happens to hold, up to window + 1.
    """
    read = target(
        ids[None], use_cache=True, output_hidden_states=True, return_shared_kv_states=True
    )
    shared = {
        kind: tuple(x[:, :, -WINDOW:] if kind.startswith("sliding") else x for x in pair)
        for kind, pair in read.shared_kv_states.items()
    }
    hidden, out = read.hidden_states[-1][:, -1:], []
    for _ in range(n):
        embedded = target.get_input_embeddings()(torch.tensor([[token]]))
        made = drafter(
            inputs_embeds=torch.cat((embedded, hidden), -1),
            position_ids=torch.tensor([[len(ids)]]),
            shared_kv_states=shared,
            use_cache=False,
        )
        hidden = made.last_hidden_state
        token = int(made.logits[0, -1].argmax())
        out.append((made.logits[0, -1], token))
    return out


@torch.no_grad()
def test_drafts_are_those_of_transformers(trio):
    """Bursts at depths before, at and far behind the window; wrong tokens stand behind the last
    row, as refused drafts do, and rings have wrapped."""
    target, drafter, pair = trio
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 120, 80))
    pos, worst = 0, 0.0
    for depth in (1, 5, 8, 9, 23, 40, 41, 77):
        while pos < depth:
            n = min(CHUNK, depth - pos)
            hidden, _ = pair.feed(ids[pos : pos + n], pos)
            pos += n
        pair.feed((ids[pos : pos + CHUNK - 1] + 7) % 100, pos)  # refused: the position stays
        token = int(ids[depth])
        before = {name: values.clone() for name, values in pair.state.tables.items()}
        ours = pair.burst(token, hidden[-1:], depth, 4)
        for name, values in before.items():
            assert torch.equal(values, pair.state.tables[name]) or values.isnan().any()
        for (mine, _), (wanted, _) in zip(
            ours, theirs(target, drafter, ids[:depth], token, 4), strict=True
        ):
            worst = max(worst, float((mine - wanted).abs().max()))
    assert worst <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("name", TARGETS)
def test_candidates_are_those_of_assisted_generation(name, tmp_path, monkeypatch):
    """The first burst behind each prompt: a later one of transformers sees a refused row."""
    target = tiny_hf(name, sliding_window=48)
    drafter = tiny_assistant(name, target, clustered=name in CLUSTERED, window=48)
    pair = read_back(target, drafter, tmp_path)
    drafter.generation_config.num_assistant_tokens = 5
    found = []
    kind = candidate_generator.SinglePositionMultiTokenCandidateGenerator
    inner = kind.get_candidates

    def recorded(self, input_ids, *args, **kwargs):
        ids, logits = inner(self, input_ids, *args, **kwargs)
        if logits is not None:
            found.append(ids[0, input_ids.shape[1] - 1 :].tolist())
        return ids, logits

    monkeypatch.setattr(kind, "get_candidates", recorded)
    rng = np.random.default_rng(2)
    for n in (1, 7, 19, 33):
        prompt = torch.from_numpy(rng.integers(3, 120, n))
        found.clear()
        plain = target.generate(prompt[None], do_sample=False, max_new_tokens=12, eos_token_id=-1)
        found.clear()
        drafted = target.generate(
            prompt[None], do_sample=False, max_new_tokens=12, eos_token_id=-1,
            assistant_model=drafter,
        )  # fmt: skip
        assert torch.equal(plain, drafted)
        for at in range(0, n, CHUNK):
            hidden, logits = pair.feed(prompt[at : at + CHUNK], at)
        token = int(logits[-1].argmax())
        burst = pair.burst(token, hidden[-1:], n, 5)
        assert [token, *(t for _, t in burst)] == found[0]


@torch.no_grad()
def test_a_target_that_checks_drafts_writes_what_it_would_have(trio):
    """Greedy text by drafts of the assistant is the greedy text, position by position."""
    _, _, pair = trio
    prompt = torch.from_numpy(np.random.default_rng(3).integers(3, 120, 6))
    plain, pos = [], len(prompt)
    _, logits = pair.feed(prompt, 0)
    while len(plain) < 40:
        plain.append(int(logits[-1].argmax()))
        _, logits = pair.feed(torch.tensor(plain[-1:]), pos)
        pos += 1
    hidden, logits = pair.feed(prompt, 0)
    text, pos = [int(logits[-1].argmax())], len(prompt)
    while len(text) < 40:
        drafts = [t for _, t in pair.burst(text[-1], hidden[-1:], pos, 3)]
        if len(text) % 2:  # a drafter that is right: what the target would say
            drafts = plain[len(text) : len(text) + 3]
        hidden, logits = pair.feed(torch.tensor([text[-1], *drafts]), pos)
        said = logits.argmax(-1).tolist()
        taken = next((i for i, d in enumerate(drafts) if d != said[i]), len(drafts))
        text += said[: taken + 1]
        hidden = hidden[: taken + 1]
        pos += taken + 1
    assert text[:40] == plain[:40]


# --- what is refused ----------------------------------------------------------------------------


def test_an_assistant_fits_its_target_only(tmp_path):
    targets = {n: tiny_hf(n) for n in TARGETS}
    fitting = tiny_assistant("e2b", targets["e2b"], clustered=False)
    drafter = open_checkpoint(saved(fitting, tmp_path / "a")).config
    config = open_checkpoint(saved(targets["e4b"], tmp_path / "e4b")).config
    with pytest.raises(ConfigError, match=r"read 1 KV heads of 16 values, the target has 2 of 16"):
        models.attach(drafter, config)
    own = open_checkpoint(saved(targets["e2b"], tmp_path / "e2b")).config
    assert models.attach(drafter, own).reads == (3, 3, 3, 2)
    for change, what in (
        ({"hidden": 96}, "its target's hidden size is 64, the target's is 96"),
        ({"vocab": 256}, "its vocabulary is 128, the target's is 256"),
        ({"window": 16}, "its window is 8, the target's is 16"),
        (
            {"pattern": "FFFFFFFF"},
            "the target has no sliding layer with keys and values of its own",
        ),
    ):
        with pytest.raises(ConfigError, match=what):
            models.attach(drafter, replace(own, **change))
    with pytest.raises(ConfigError, match="drafts for Gemma 4 models, and the target is none"):
        models.attach(drafter, models.get_row("smollm2-135m").config)
    with pytest.raises(ConfigError, match="A gemma model drafts for no other"):
        models.attach(own, own)
    with pytest.raises(PlanError, match="give this one as --assistant"):
        models.plan(drafter, ctx=64)


def test_published_assistants_fit_their_targets():
    """Sizes are those of the model cards: 78 M, 78.8 M, 423 M, 0.42 B and 0.47 B parameters."""
    parameters = {"e2b": 78.2e6, "e4b": 79.3e6, "12b": 423e6, "26b-a4b": 420e6, "31b": 470e6}
    for name, row in OFFICIAL.items():
        target = models.get_row(name).config
        bound = models.attach(row.config, target)
        found = models.official_drafter(target)
        assert (found.config, found.hub_id) == (bound, row.hub_id)
        if name in parameters:
            count = sum(w.elements for w in models.weights(bound))
            assert count == pytest.approx(parameters[name], rel=0.01)
        own = {w.name for w in models.weights(target)}
        assert not own & {w.name for w in models.weights(bound)}
    reads = {n: models.official_drafter(models.get_row(n).config).config.reads for n in parameters}
    assert reads["e2b"] == (13, 13, 13, 14) and reads["e4b"] == (22, 22, 22, 23)
    assert reads["26b-a4b"] == (28, 28, 28, 29) and reads["31b"] == (58, 58, 58, 59)
    with pytest.raises(ConfigError, match="No assistant is known"):
        models.official_drafter(models.get_row("gemma3-270m").config)


@pytest.fixture
def checkpoint(tmp_path):
    target = tiny_hf("e2b")
    return saved(tiny_assistant("e2b", target, clustered=True), tmp_path / "assistant")


def configure(root, change):
    raw = json.loads((root / "config.json").read_text())
    change(raw)
    (root / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda raw: raw.pop("text_config"), "text_config is absent"),
        (lambda raw: raw.update(backbone_hidden_size="wide"), "backbone_hidden_size"),
        (lambda raw: raw.update(num_centroids=7), "7 centroids must divide"),
        (lambda raw: raw.update(centroid_intermediate_top_k=17), "top_centroids 17"),
        (
            lambda raw: raw["text_config"].update(
                hidden_size_per_layer_input=8, vocab_size_per_layer_input=128
            ),
            "no per-layer embedding",
        ),
        (lambda raw: raw["text_config"].update(attention_bias=True), "attention_bias"),
    ],
)
def test_configs_are_refused_by_name(checkpoint, change, what):
    configure(checkpoint, change)
    with pytest.raises(ConfigError, match=what):
        open_checkpoint(checkpoint)


def test_damaged_weights_are_refused_by_name(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    order = "masked_embedding.token_ordering"
    drafter = open_checkpoint(checkpoint)
    check_values(drafter.config, drafter.read, "it")
    tensors[order][3] = tensors[order][4]
    save_file(tensors, checkpoint / "model.safetensors")
    drafter = open_checkpoint(checkpoint)
    with pytest.raises(WeightsError, match="does not name each of 128 tokens once"):
        check_values(drafter.config, drafter.read, "it")
    del tensors["pre_projection.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(WeightsError, match=r"pre_projection\.weight is missing"):
        open_checkpoint(checkpoint).check()
