"""The parity gate's judgement: what is noise on this model, what is another model."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from weights_models import tiny_hf

from edge_kv import models
from edge_kv.errors import ParityError
from edge_kv.export import gate
from edge_kv.models.checkpoint import open_checkpoint
from edge_kv.nets.oracle import oracle
from edge_kv.nets.weights import Weights
from edge_kv.parity import Scores, divergence, draft_divergence

STEPS, VOCAB = 24, 64
RUN = gate.GateRun(np.zeros(60, np.int64), 60 - STEPS, (60 - STEPS,))


def logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((STEPS, VOCAB)).astype(np.float32)


def near(values: np.ndarray, distance: float, seed: int = 9) -> np.ndarray:
    return (values + distance * logits(seed)).astype(np.float32)


def unasked() -> torch.Tensor:
    raise AssertionError("the noise of float32 was asked for without need")


class Plan:
    kv = "f32"


def judge(
    source, stored, exact, shipped, scheme="int4", moved=unasked, kept=None, plan=Plan, rounds=False
):
    return gate.judge(
        RUN, plan, exact=exact, shipped=shipped, stored=torch.from_numpy(stored),
        source=torch.from_numpy(source), scheme=scheme, moved=moved,
        kept=None if kept is None else torch.from_numpy(kept), rounds=rounds,
    )  # fmt: skip


def test_a_quantised_model_passes_and_its_figures_are_recorded():
    source = logits()
    stored = near(source, 0.3)
    found = judge(source, stored, stored, near(stored, 0.01))
    assert found["lowering"]["max_abs"] == 0
    assert 0.9 < found["correlation"] < 1
    assert found["lowering_limit"] == {"relative": 1e-3, "max_kl": 1e-6}


def test_how_far_passes_of_several_tokens_move_a_lead_is_recorded():
    """Against single steps of the shipped programs, whatever is far from the likeliest token."""
    alone = logits()
    run = replace(RUN, passes=((3, 2), (9, 1)))
    exact = np.concatenate([alone, alone[[3, 4, 9]]])
    shipped = exact.copy()
    shipped[-2, alone[4].argmax()] -= 0.125
    shipped[-1, alone[9].argmin()] -= 0.5
    stored = torch.from_numpy(alone)
    found = gate.judge(
        run, Plan, exact=exact, shipped=shipped, stored=stored, source=stored, scheme="int4",
        moved=unasked,
    )  # fmt: skip
    assert found["lead_change"] == 0.125
    assert "lead_change" not in judge(alone, alone, alone, alone)


@pytest.mark.parametrize("scheme", ["int4", "int8", "none", "another-storage"])
def test_weights_of_another_model_are_refused(scheme):
    source, stored = logits(0), logits(1)
    with pytest.raises(ParityError, match="has little to do with its checkpoint"):
        judge(source, stored, stored, stored, scheme)


def test_fine_storage_has_to_be_closer_than_coarse_storage():
    source = logits()
    stored = near(source, 0.6)
    judge(source, stored, stored, stored, "int4")
    with pytest.raises(ParityError, match=r"expected 0\.9 or more.*--quant none"):
        judge(source, stored, stored, stored, "int8")


def test_exact_storage_has_to_be_exact():
    source = logits()
    stored = near(source, 0.05)  # a state in int8
    judge(source, stored, stored, stored, "none", kept=source)
    with pytest.raises(ParityError, match="The stored weights are not those of the checkpoint"):
        judge(source, stored, stored, stored, "none", moved=lambda: torch.from_numpy(stored),
              kept=near(source, 0.02))  # fmt: skip


def test_rounded_activations_part_two_runs_further_but_not_altogether():
    stored = logits()
    moved = lambda: torch.from_numpy(near(stored, 0.4, 8))  # noqa: E731
    parted = near(stored, 0.4)
    assert gate.NOISE_CEILING[1] < divergence(stored, parted).max_kl < gate.ROUNDED_CEILING[1]
    judge(stored, stored, parted, parted, moved=moved, rounds=True)
    with pytest.raises(ParityError, match="differ from the model"):
        judge(stored, stored, parted, parted, moved=moved)
    other = near(stored, 1.5)
    with pytest.raises(ParityError, match="differ from the model"):
        judge(stored, stored, other, stored, moved=moved, rounds=True)


def test_what_is_not_finite_is_refused():
    source = logits()
    broken = source.copy()
    broken[3, 5] = np.nan
    with pytest.raises(ParityError, match="differ from the model"):
        judge(source, source, broken, source)
    with pytest.raises(ParityError, match="not finite"):
        judge(source, source, source, broken)


def scored(values: np.ndarray, first: int = 0) -> list[Scores]:
    """Logits of the tokens from `first` on, each draft of its own."""
    return [Scores(row, np.arange(first, first + len(row))) for row in values]


def judge_drafts(exact, shipped=None, stored=None, source=None, lossless=False, moved=unasked):
    stored = scored(logits()) if stored is None else stored
    return gate.judge_drafts(
        Plan, exact=exact, shipped=exact if shipped is None else shipped, stored=stored,
        source=stored if source is None else source, lossless=lossless, moved=moved,
    )  # fmt: skip


def test_drafts_pass_and_their_figures_are_recorded():
    reference = logits()
    shipped, source = scored(near(reference, 0.01)), scored(near(reference, 0.1))
    found = judge_drafts(scored(reference), shipped, source=source)
    assert found["drafts"] == STEPS and found["lowering"]["max_abs"] == 0
    assert found["kernels"]["common"] == 1.0 and 0.98 < found["correlation"] < 1
    assert found["verify"]["min_common"] == 0.75


def test_drafts_are_compared_by_their_tokens():
    """Clusters come in any order, and those at the edge may be others."""
    reference = logits()
    order = np.random.default_rng(2).permutation(VOCAB)
    moved = [Scores(row[order], order) for row in reference]
    assert judge_drafts(moved)["lowering"]["max_abs"] == 0
    found = draft_divergence(scored(reference), scored(np.roll(reference, -8, 1), 8))
    assert found.common == 0.875 and found.max_abs == 0
    whole = [Scores(row) for row in reference]
    assert draft_divergence(whole, moved).max_abs == 0
    with pytest.raises(ParityError, match="differs from the assistant"):
        judge_drafts(scored(np.roll(reference, -40, 1), 40))
    nothing = draft_divergence(scored(reference), scored(reference, 1000))
    assert nothing.common == 0 and np.isnan(nothing.max_kl)


def test_wrong_drafts_are_refused():
    reference = logits()
    right, other = scored(reference), scored(logits(1))
    with pytest.raises(ParityError, match="The exported drafter differs from the assistant"):
        judge_drafts(scored(near(reference, 0.02)), moved=lambda: right)
    with pytest.raises(ParityError, match="something else with 8-bit activations"):
        judge_drafts(right, other)
    with pytest.raises(ParityError, match="something else with 8-bit activations"):
        judge_drafts(right, scored(np.full_like(reference, np.nan)))
    with pytest.raises(ParityError, match="stored weights of the drafter are not those"):
        judge_drafts(right, source=other)
    near_by = scored(near(reference, 0.05))
    judge_drafts(right, source=near_by)
    with pytest.raises(ParityError, match="stored weights of the drafter are not those"):
        judge_drafts(right, source=near_by, lossless=True, moved=lambda: right)


def sharp_model(factor: float):
    """A 31B in small whose attention is sharp: it multiplies rounding."""
    model = tiny_hf("31b")
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                value.mul_(factor)
    return model


@torch.no_grad()
def test_noise_is_measured_on_the_model(tmp_path):
    """Float64 and float32 differ by more than usual noise: correct programs pass, wrong ones do
    not."""
    model = sharp_model(6.0)
    model.save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    ids = torch.randint(0, 128, (60,), generator=torch.Generator().manual_seed(1))
    start = 60 - STEPS

    def read(name: str, a: int, b: int) -> torch.Tensor:
        return torch.from_numpy(source.read(name, a, b))

    def run(config=source.config, read=read) -> torch.Tensor:
        return oracle(config, Weights(models.weights(config)), read, ids).logits(start)

    stored = run().numpy()
    exact = copy.deepcopy(model).double()(ids[None]).logits[0, start:].float().numpy()
    assert divergence(stored, exact).relative > 3e-3

    def judged(programs):
        return judge(stored, stored, programs, programs, "none",
                     moved=lambda: run(read=gate.perturbed(read)))  # fmt: skip

    config, sliding = source.config, source.config.sliding
    allowed = judged(exact)["lowering_limit"]["relative"]
    assert 3e-3 < allowed < 0.3
    for wrong in (
        replace(config, window=config.window - 1),
        replace(config, softcap=config.softcap / 4),
        replace(config, sliding=replace(sliding, rope=replace(sliding.rope, pairs=7))),
    ):
        with pytest.raises(ParityError, match="differ from the model"):
            judged(run(wrong).numpy())


def test_moved_rows_are_the_same_rows_in_the_last_place():
    values = torch.from_numpy(logits())
    rows = gate.perturbed(lambda name, a, b: values[a:b])
    moved = rows("w", 0, STEPS)
    assert 0 < float(((moved - values) / values).abs().max()) <= 1.5 * gate.ULP
    assert torch.equal(moved, rows("w", 0, STEPS))
    further = gate.perturbed(lambda name, a, b: values[a:b], 16)("w", 0, STEPS)
    assert 8 * gate.ULP < float(((further - values) / values).abs().max()) <= 17 * gate.ULP
    assert not torch.equal(moved, rows("v", 0, STEPS))
    packed = torch.zeros(3, dtype=torch.uint8)
    assert gate.perturbed(lambda *_: packed)("w", 0, 3) is packed
