"""How far two runs of logits are apart: the one measure of the export gate and of `verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Divergence:
    """Logits of one run against a reference run of the same tokens."""

    steps: int
    max_abs: float  # largest |Δlogit|
    spread: float  # standard deviation of the reference logits: what max_abs is to be held against
    mean_kl: float  # KL(reference || run) in nats
    max_kl: float
    top1: float  # share of steps with the same likeliest id

    @property
    def relative(self) -> float:
        """max_abs in units of the reference's spread."""
        return self.max_abs / self.spread if self.spread else float(self.max_abs > 0)


def divergence(reference: Floats, run: Floats) -> Divergence:
    """Compare logits [steps, vocab]; a NaN in either makes every figure NaN."""
    a, b = reference.astype(np.float64), run.astype(np.float64)
    p, q = log_softmax(a), log_softmax(b)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return Divergence(
        steps=len(a),
        max_abs=float(np.abs(a - b).max()),
        spread=float(a.std()),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float((a.argmax(-1) == b.argmax(-1)).mean()),
    )


def log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs
