"""How far two runs of logits are apart: the one measure of the export gate and of `verify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

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
    kl, largest, same = [], [], []
    for rows in zip(reference, run, strict=True):  # one by one: a vocabulary may be large
        a, b = (row.astype(np.float64) for row in rows)
        p, q = log_softmax(a), log_softmax(b)
        kl.append((np.exp(p) * (p - q)).sum())
        largest.append(np.abs(a - b).max())
        same.append(a.argmax() == b.argmax())
    return Divergence(
        steps=len(reference),
        max_abs=float(np.max(largest)),
        spread=float(reference.std(dtype=np.float64)),
        mean_kl=float(np.mean(kl)),
        max_kl=float(np.max(kl)),
        top1=float(np.mean(same)),
    )


def several(drafts: int, steps: int) -> Iterator[tuple[int, int]]:
    """(first step, tokens) of passes that decode several of `steps` tokens: every number of them
    that a pass with `drafts` takes, spread over the steps."""
    counts = range(2, min(drafts + 1, steps) + 1)
    for i, count in enumerate(counts):
        yield i * (steps - counts[-1]) // max(1, len(counts) - 1), count


class Decoding(Protocol):
    """What `replayed` needs of a session (`edge_kv.runtime.session.Session`)."""

    def decode(self, token: int) -> npt.NDArray[np.float32]: ...
    def decode_many(self, ids: Any) -> npt.NDArray[np.float32]: ...
    def rewind(self, n: int) -> None: ...


def replayed(
    session: Decoding, ids: npt.NDArray[np.int64], passes: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """(first step, logits [n, vocab]) of decoding `ids` one by one, and of every one of `passes`,
    which runs before its first step and is rewound."""
    counts: dict[int, list[int]] = {}
    for at, count in passes:
        counts.setdefault(at, []).append(count)
    for step, token in enumerate(ids.tolist()):
        for count in counts.get(step, ()):
            logits = session.decode_many(ids[step : step + count])
            session.rewind(count)
            yield step, logits
        yield step, session.decode(token)[None]


def log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs
