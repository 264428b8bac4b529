"""Sampling against plain reference implementations, and its statistics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kv.errors import ConfigError, RuntimeFault
from edge_kv.parity import lead
from edge_kv.runtime.sampling import Sampler, TokenLogprobs


def reference(logits, *, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities after the filters, by sorting everything: float64 [vocab]."""
    p = np.exp(logits.astype(np.float64) / temperature - (logits / temperature).max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        gone, so_far = [], 0.0
        for i in order:
            if so_far >= top_p:
                gone.append(i)
            so_far += p[i]
        p[gone] = 0
        p /= p.sum()
    if min_p:
        p[p < min_p * p.max()] = 0
        p /= p.sum()
    return p


def probabilities(sampler, logits):
    ids, weights = sampler.candidates(logits)
    p = np.zeros(len(logits))
    p[ids] = weights / weights.sum()
    return p


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.sampled_from([1, 2, 5, 63, 64, 65, 700]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 64, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.31, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.7, 1.0]),
    flat=st.booleans(),
)
def test_filters_equal_the_reference(seed, size, temperature, top_k, top_p, min_p, flat):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(size) * (0.1 if flat else 3)).astype(np.float32)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    want = reference(logits, **options)
    got = probabilities(Sampler(**options), logits)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_ties_are_cut_by_the_lower_id():
    logits = np.array([0, 1, 1, 1, 0, 1], np.float32)
    ids, _ = Sampler(temperature=1, top_k=3).candidates(logits)
    assert ids.tolist() == [1, 2, 3]
    assert Sampler()(logits) == 1


def test_frequencies_follow_the_probabilities():
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5, -30.0], np.float32)
    for options in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}):
        sampler = Sampler(seed=1, **options)
        n = 20_000
        counts = np.bincount([sampler(logits) for _ in range(n)], minlength=6)
        want = reference(logits, **options)
        error = np.sqrt(n * want * (1 - want))
        assert (np.abs(counts - n * want) <= 4 * error + 1e-9).all()
        assert (counts[want == 0] == 0).all()


def test_seed_repeats_and_other_seeds_differ():
    logits = np.zeros(1000, np.float32)

    def draw(seed):
        sampler = Sampler(temperature=1, seed=seed)
        return [sampler(logits) for _ in range(8)]

    assert draw(3) == draw(3) != draw(4)


def test_impossible_ids_are_never_drawn():
    logits = np.full(50, -np.inf, np.float32)
    logits[[7, 30]] = 0
    sampler = Sampler(temperature=1.0, seed=0)
    assert {sampler(logits) for _ in range(200)} == {7, 30}


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.8])
def test_repetition_penalty_is_that_of_hugging_face(penalty):
    logits = np.array([3.0, -2.0, 2.9, 0.0], np.float32)
    history = [0, 1, 0, 0]
    want = logits.copy()
    for i in set(history):
        want[i] = want[i] / penalty if want[i] > 0 else want[i] * penalty
    sampler = Sampler(repetition_penalty=penalty)
    assert sampler(logits, history) == int(want.argmax())
    np.testing.assert_allclose(sampler._penalised(logits, history), want, rtol=1e-6)
    assert logits[0] == 3.0


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_penalties_are_those_of_openai(temperature):
    rng = np.random.default_rng(4)
    penalties = {"frequency_penalty": 0.75, "presence_penalty": -0.5}
    sampler = Sampler(temperature=temperature, seed=6, repetition_penalty=1.2, **penalties)
    plain = Sampler(repetition_penalty=1.2)
    drawn = []
    for _ in range(60):
        logits = rng.standard_normal(12).astype(np.float32)
        want = plain.shaped(logits, [1, 2]).copy()
        for i in range(12):
            want[i] -= drawn.count(i) * 0.75 + (i in drawn) * -0.5
        shaped = sampler.shaped(logits, [1, 2])
        np.testing.assert_allclose(shaped, want, rtol=1e-5, atol=1e-5)
        drawn.append(sampler.draw(shaped))
    assert len(set(drawn)) > 6 and max(map(drawn.count, drawn)) < 12


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"frequency_penalty": 2.1}, "frequency_penalty 2.1"),
        ({"presence_penalty": float("nan")}, "presence_penalty nan"),
        ({"seed": -3}, "seed -3"),
    ],
)
def test_parameters_out_of_range_are_named(options, name):
    with pytest.raises(ConfigError, match=name):
        Sampler(**options)


def test_all_faults_are_listed_at_once():
    with pytest.raises(ConfigError, match=r"top_k -1 .*; min_p 2 "):
        Sampler(top_k=-1, min_p=2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_a_fault(value, temperature):
    logits = np.zeros(10, np.float32)
    logits[4] = value
    with pytest.raises(RuntimeFault, match="edge-kv verify"):
        Sampler(temperature=temperature)(logits)
    with pytest.raises(RuntimeFault):
        Sampler(temperature=temperature)(np.full(10, -np.inf, np.float32))


def test_logprobs_without_others():
    logits = np.array([0.0, 1.0, 3.0], np.float32)
    found = TokenLogprobs.of(logits, 1, 0)
    assert found.top == () and found.logprob == pytest.approx(1 - np.log(np.exp(logits).sum()))


def test_the_lead_of_a_logit():
    logits = np.array([0.5, 2.0, 1.5], np.float32)
    assert lead(logits, 1) == 0.5 and lead(logits, 0) == -1.5
    assert lead(np.array([1.0], np.float32), 0) == np.inf


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 4100])
@pytest.mark.parametrize("count", [1, 5, 15, 64])
def test_the_largest_of_many_equals_are_the_first_ones(size, count):
    """Blocks and what is left behind them, values of which many are equal or out of reach."""
    rng = np.random.default_rng(size + count)
    for values in (3, 40, 10_000):
        logits = rng.integers(0, values, size).astype(np.float32)
        logits[rng.random(size) < 0.5] = -np.inf
        logits[-1] = values
        ids, weights = Sampler(temperature=1.0, top_k=count).candidates(logits)
        order = np.lexsort((np.arange(size), -logits))[:count]
        assert ids.tolist() == order.tolist()
        expected = np.exp(logits[order].astype(np.float64) - values)
        np.testing.assert_allclose(weights, expected, rtol=1e-12)
