"""Sampling: one row of logits -> one id.

In this order: repetition penalty, temperature, top-k, top-p, min-p. The filters are those of
Hugging Face's logits processors (ties broken by the lower id), computed over the few candidates
they leave instead of a sorted vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from edge_kv.errors import ConfigError, RuntimeFault

Floats = npt.NDArray[np.float64]
_FIRST_CUT = 64  # candidates looked at first; top-p grows it until they hold enough probability


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
        seed: int | None = None,
    ) -> None:
        """top_k 0, top_p 1, min_p 0 and repetition_penalty 1 switch their filter off.

        Raises:
            ConfigError: parameters out of range, all of them named.
        """
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
            f"seed {seed} must not be negative": seed is None or seed >= 0,
        }
        faults = [text for text, good in checks.items() if not good]
        if faults:
            raise ConfigError("Sampling: " + "; ".join(faults) + ".")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.min_p = min_p
        self.repetition_penalty = repetition_penalty
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.float32], history: Iterable[int] = ()) -> int:
        """Choose an id from float32 [vocab]; ids in `history` are subject to the penalty.

        Raises:
            RuntimeFault: a logit is NaN or +inf, or all are -inf.
        """
        top = float(logits.max(initial=-math.inf))
        if not math.isfinite(top):  # max is NaN when any logit is
            raise RuntimeFault(
                f"The largest logit is {top}: the model computed nothing usable; "
                "run `edge-kv verify` on the artifact."
            )
        if self.repetition_penalty != 1.0:
            logits = self._penalised(logits, history)
        if self.temperature == 0.0:
            return int(logits.argmax())
        ids, weights = self.candidates(logits)
        cumulative = weights.cumsum()
        # the last candidate takes what rounding leaves; side="right" never lands on a weight of 0
        at = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(at), len(ids) - 1)])

    def candidates(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.intp], Floats]:
        """Ids that survive the filters and their unnormalised probabilities, likeliest first.

        Without any filter the ids stand in their own order.
        """
        scaled = logits.astype(np.float64)
        scaled -= scaled.max()
        scaled /= self.temperature
        np.exp(scaled, out=scaled)
        ids: npt.NDArray[np.intp] = np.arange(len(scaled))
        if self.top_k:
            ids = _largest(scaled, min(self.top_k, len(scaled)))
        if self.top_p < 1.0:
            total = scaled[ids].sum()
            if not self.top_k:
                ids = self._enough(scaled, total)
            before = scaled[ids].cumsum() - scaled[ids]
            ids = ids[before < self.top_p * total]
        if self.min_p > 0.0:
            ids = ids[scaled[ids] >= self.min_p * scaled[ids].max()]
        return ids, scaled[ids]

    def _enough(self, weights: Floats, total: float) -> npt.NDArray[np.intp]:
        """A head of the sorted candidates that holds top_p of the probability."""
        count = _FIRST_CUT
        while count < len(weights):
            ids = _largest(weights, count)
            if weights[ids].sum() >= self.top_p * total:
                return ids
            count *= 8
        return _largest(weights, len(weights))

    def _penalised(
        self, logits: npt.NDArray[np.float32], history: Iterable[int]
    ) -> npt.NDArray[np.float32]:
        seen = np.unique(np.fromiter(history, np.int64))
        out: npt.NDArray[np.float32] = logits.copy()
        rows = out[seen]
        penalty = np.float32(self.repetition_penalty)
        out[seen] = np.where(rows > 0, rows / penalty, rows * penalty)
        return out


def _largest(weights: Floats, count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest weights, largest first, ties by the lower index."""
    if count < len(weights):
        cut = np.partition(weights, len(weights) - count)[len(weights) - count]
        above = np.flatnonzero(weights > cut)
        level = np.flatnonzero(weights == cut)[: count - len(above)]
        kept = np.concatenate([above, level])
        kept.sort()
    else:
        kept = np.arange(len(weights))
    return kept[np.argsort(-weights[kept], kind="stable")]
