"""Sampling: one row of logits -> one id.

In this order: bias, repetition penalty, frequency and presence penalty, temperature, top-k, top-p,
min-p. The filters are those of Hugging Face's logits processors (ties broken by the lower id),
computed over the few candidates they leave instead of a sorted vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_kv.errors import ConfigError, RuntimeFault

Floats = npt.NDArray[np.float64]
_BLOCK = 64  # weights whose maximum is looked at first
_IDS = 1 << 31  # no vocabulary has more
_FIRST_CUT = 64  # candidates looked at first; top-p grows it until they hold enough probability


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn: temperature 0 is greedy; 0, 1, 0 and 1 switch the other filters off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, artifact: Any) -> Sampling:
        """What the checkpoint's makers recommend; greedy where they say nothing."""
        stored = getattr(artifact, "sampling", None)
        known = stored if isinstance(stored, Mapping) else vars(stored) if stored else {}
        names = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in known.items() if k in names and v is not None})


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities before any filter, of a drawn id and others."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest ids, likeliest first

    @classmethod
    def of(cls, logits: npt.NDArray[np.float32], token: int, count: int) -> TokenLogprobs:
        """Of `token` and the `count` likeliest ids in float32 [vocab]."""
        wide = logits.astype(np.float64)
        top = float(wide.max())
        total = top + math.log(np.exp(wide - top).sum())
        best = _largest(wide, min(count, len(wide))) if count else ()
        likeliest = tuple((int(i), float(wide[i] - total)) for i in best)
        return cls(token, float(wide[token] - total), likeliest)


class Sampler:
    """A seeded sampler with checked parameters; greedy when temperature is 0."""

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        seed: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        suppress: Collection[int] = (),
    ) -> None:
        """top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch their filter off.

        From the logit of an id that this sampler has drawn n times, n * `frequency_penalty` +
        `presence_penalty` is taken (OpenAI's definition). `logit_bias` is added to the logits of
        its ids; ids in `suppress` are never drawn.

        Raises:
            ConfigError: parameters out of range, all of them named.
        """
        bias = dict(logit_bias or {})
        checks = {
            f"temperature {temperature} must be 0 (greedy) or a positive number": (
                math.isfinite(temperature) and temperature >= 0
            ),
            f"top_k {top_k} must be 0 (off) or more": top_k >= 0,
            f"top_p {top_p} must lie above 0 and up to 1": 0 < top_p <= 1,
            f"min_p {min_p} must lie in 0 … 1": 0 <= min_p <= 1,
            f"repetition_penalty {repetition_penalty} must be a positive number": (
                math.isfinite(repetition_penalty) and repetition_penalty > 0
            ),
            f"frequency_penalty {frequency_penalty} must lie in -2 … 2": abs(frequency_penalty)
            <= 2,
            f"presence_penalty {presence_penalty} must lie in -2 … 2": abs(presence_penalty) <= 2,
            f"seed {seed} must not be negative": seed is None or seed >= 0,
            "logit_bias must give a number for each token id": all(
                isinstance(i, int) and 0 <= i < _IDS and not math.isnan(b) for i, b in bias.items()
            ),
        }
        faults = [text for text, good in checks.items() if not good]
        if faults:
            raise ConfigError("Sampling: " + "; ".join(faults) + ".")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.repetition_penalty = repetition_penalty
        self._penalties = (frequency_penalty, presence_penalty)
        self._drawn: Counter[int] = Counter()
        self._random = np.random.default_rng(seed)
        self._biased = np.array(sorted(bias), np.int64)
        self._bias = np.array([bias[i] for i in sorted(bias)], np.float32)
        self._suppressed = np.array(sorted(suppress), np.int64)

    def __call__(self, logits: npt.NDArray[np.float32], history: Iterable[int] = ()) -> int:
        """Choose an id from float32 [vocab]; ids in `history` are subject to the penalty.

        Raises:
            As `shaped`.
        """
        return self.draw(self.shaped(logits, history))

    def shaped(
        self, logits: npt.NDArray[np.float32], history: Iterable[int] = ()
    ) -> npt.NDArray[np.float32]:
        """Logits with bias and penalties, float32 [vocab]; that of repetition is for ids in
        `history`, the others for ids that `draw` gave.

        Raises:
            RuntimeFault: a logit is NaN or +inf, or all are -inf.
            ConfigError: `logit_bias` names an id the model does not have.
        """
        logits = self._shifted(logits)
        top = float(logits.max(initial=-math.inf))
        if not math.isfinite(top):  # max is NaN when any logit is
            raise RuntimeFault(
                f"The largest logit is {top}: the model computed nothing usable; "
                "run `edge-kv verify` on the artifact."
            )
        if self.repetition_penalty != 1.0:
            logits = self._penalised(logits, history)
        if any(self._penalties) and self._drawn:
            logits = self._lowered(logits)
        return logits

    def draw(self, logits: npt.NDArray[np.float32]) -> int:
        """Choose an id from `shaped` logits."""
        token = int(logits.argmax()) if self.temperature == 0.0 else self._sampled(logits)
        self._drawn[token] += 1
        return token

    def _sampled(self, logits: npt.NDArray[np.float32]) -> int:
        ids, weights = self.candidates(logits)
        cumulative = weights.cumsum()
        # the last candidate takes what rounding leaves; side="right" never lands on a weight of 0
        at = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(at), len(ids) - 1)])

    def candidates(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.intp], Floats]:
        """Ids that survive the filters and their unnormalised probabilities, likeliest first.

        Without any filter the ids stand in their own order.
        """
        if self.top_k:
            ids = _largest(logits, min(self.top_k, len(logits)))
            weights = self._weights(logits[ids])
        else:
            ids, weights = np.arange(len(logits)), self._weights(logits)
        if self.top_p < 1.0:
            total = weights.sum()
            if not self.top_k:
                ids = self._enough(weights, total)
                weights = weights[ids]
            kept = weights.cumsum() - weights < self.top_p * total
            ids, weights = ids[kept], weights[kept]
        if self.min_p > 0.0:
            kept = weights >= self.min_p * weights.max()
            ids, weights = ids[kept], weights[kept]
        return ids, weights

    def _weights(self, logits: npt.NDArray[np.float32]) -> Floats:
        """Probabilities of logits, the largest one among them, as multiples of its own."""
        scaled = logits.astype(np.float64)
        scaled -= scaled.max()
        scaled /= self.temperature
        weights: Floats = np.exp(scaled, out=scaled)
        return weights

    def _enough(self, weights: Floats, total: float) -> npt.NDArray[np.intp]:
        """A head of the sorted candidates that holds top_p of the probability."""
        count = _FIRST_CUT
        while count < len(weights):
            ids = _largest(weights, count)
            if weights[ids].sum() >= self.top_p * total:
                return ids
            count *= 8
        return _largest(weights, len(weights))

    def _shifted(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits with the bias, and without what is never drawn."""
        suppressed = self._suppressed[self._suppressed < len(logits)]
        if not len(self._biased) and not len(suppressed):
            return logits
        if len(self._biased) and self._biased[-1] >= len(logits):
            raise ConfigError(
                f"logit_bias names token id {self._biased[-1]}; this model has 0 … "
                f"{len(logits) - 1}."
            )
        shifted: npt.NDArray[np.float32] = logits.copy()
        shifted[self._biased] += self._bias
        shifted[suppressed] = -np.inf
        return shifted

    def _penalised(
        self, logits: npt.NDArray[np.float32], history: Iterable[int]
    ) -> npt.NDArray[np.float32]:
        seen = np.unique(np.fromiter(history, np.int64))
        out: npt.NDArray[np.float32] = logits.copy()
        rows = out[seen]
        penalty = np.float32(self.repetition_penalty)
        out[seen] = np.where(rows > 0, rows / penalty, rows * penalty)
        return out

    def _lowered(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        frequency, presence = self._penalties
        counts = np.fromiter(self._drawn.values(), np.float32)
        out: npt.NDArray[np.float32] = logits.copy()
        out[np.fromiter(self._drawn, np.int64)] -= counts * frequency + presence
        return out


def _largest(weights: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest weights, largest first, ties by the lower index."""
    kept = _candidates(weights, count)
    if count < len(kept):
        found = weights[kept]
        cut = np.partition(found, len(found) - count)[len(found) - count]
        above = np.flatnonzero(found > cut)
        level = np.flatnonzero(found == cut)[: count - len(above)]
        chosen = np.concatenate([above, level])
        chosen.sort()
        kept = kept[chosen]
    return kept[np.argsort(-weights[kept], kind="stable")]


def _candidates(weights: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.intp]:
    """Indices, in order, among which are the `count` largest weights; few, where that is cheap.

    Each of the `count` blocks with the largest maxima holds a weight that is as large as the least
    of those maxima, so no smaller one is wanted.
    """
    blocks = len(weights) // _BLOCK
    if not 0 < count <= blocks:
        return np.arange(len(weights))
    maxima = weights[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    return np.flatnonzero(weights >= np.partition(maxima, blocks - count)[blocks - count])
