"""How far two runs of logits are apart: the one measure of the export gate and of `verify`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
BURST = 3  # drafts that are asked for one behind the other
_NOTHING = np.full((1, 1), np.nan)


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


def lead_change(alone: Floats, passes: Floats) -> float:
    """By how much the likeliest token's lead over the second differs between two runs, at most.

    A greedy choice may come out otherwise where its lead is below that. Logits are [rows, vocab].
    """
    changes = []
    for a, b in zip(alone, passes, strict=True):
        best = int(a.argmax())
        changes.append(abs(lead(a, best) - lead(b, best)))
    return float(np.max(changes))


def lead(logits: Floats, token: int) -> float:
    """By how much the logit of `token` is above the largest other one of logits [vocab]."""
    others = (logits[:token].max(initial=-np.inf), logits[token + 1 :].max(initial=-np.inf))
    return float(logits[token] - max(others))


def together(parts: Sequence[Divergence]) -> Divergence:
    """The divergence of a run from those of its parts."""
    steps = [p.steps for p in parts]
    return Divergence(
        steps=sum(steps),
        max_abs=float(np.max([p.max_abs for p in parts])),
        spread=float(np.sqrt(np.average([p.spread**2 for p in parts], weights=steps))),
        mean_kl=float(np.average([p.mean_kl for p in parts], weights=steps)),
        max_kl=float(np.max([p.max_kl for p in parts])),
        top1=float(np.average([p.top1 for p in parts], weights=steps)),
    )


class Scores(NamedTuple):
    """What a drafter says of one token: logits [n], and of which tokens they are [n]; None: all."""

    logits: Floats
    tokens: npt.NDArray[np.integer[Any]] | None = None

    @property
    def best(self) -> int:
        """The likeliest token."""
        best = int(self.logits.argmax())
        return best if self.tokens is None else int(self.tokens[best])


@dataclass(frozen=True)
class DraftDivergence(Divergence):
    """Drafts of one run against those of another, over the tokens that both scored.

    `top1` is the share of drafts whose likeliest token is the same among all that each scored.
    """

    common: float  # share of scored tokens that both scored


def draft_divergence(reference: Sequence[Scores], run: Sequence[Scores]) -> DraftDivergence:
    """Compare drafts; those without a common token, or with a NaN, make every distance NaN."""
    parts, shares, same = [], [], []
    for pair in zip(reference, run, strict=True):
        a, b = shared(*pair)
        shares.append(a.size / pair[0].logits.size)
        parts.append(divergence(*((x[None] if x.size else _NOTHING) for x in (a, b))))
        same.append(pair[0].best == pair[1].best)
    found = together(parts)
    return DraftDivergence(
        found.steps, found.max_abs, found.spread, found.mean_kl, found.max_kl,
        top1=float(np.mean(same)), common=float(np.mean(shares)),
    )  # fmt: skip


def shared(a: Scores, b: Scores) -> tuple[Floats, Floats]:
    """The logits of the tokens that both scored, in one order."""
    if a.tokens is None and b.tokens is None:
        return a.logits, b.logits
    own, other = (np.arange(x.logits.size) if x.tokens is None else x.tokens for x in (a, b))
    _, at, there = np.intersect1d(own, other, return_indices=True)
    return a.logits[at], b.logits[there]


def bursts(steps: int) -> tuple[range, ...]:
    """Where drafts are asked for among `steps` decoded tokens: at the first, half way, at the last.

    Each range holds the tokens that are drafted behind, one after another: the first of them is to
    be decoded next. None where there is no next one.
    """
    count = min(BURST, steps - 1)
    last = steps - count
    return tuple(range(at, at + count) for at in sorted({1, (1 + last) // 2, last}) if count > 0)


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


class Drafted(Protocol):
    """What a drafter says of one token, and what its next draft takes up."""

    @property
    def logits(self) -> npt.NDArray[np.float32]: ...
    @property
    def tokens(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def hidden(self) -> npt.NDArray[np.float32]: ...


class Drafting(Decoding, Protocol):
    """What `burst` needs of a session."""

    @property
    def hidden(self) -> npt.NDArray[np.float32] | None: ...
    def draft(self, token: int, hidden: npt.NDArray[np.float32]) -> Drafted: ...


def burst(session: Drafting, tokens: npt.NDArray[np.int64]) -> list[Scores]:
    """What the session's drafter says behind each of `tokens`; the first is to be decoded next."""
    found, hidden = [], session.hidden
    assert hidden is not None  # a token was decoded
    for token in tokens.tolist():
        draft = session.draft(token, hidden)
        hidden = draft.hidden
        found.append(Scores(draft.logits, draft.tokens))
    return found


def log_softmax(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis."""
    shifted = x - x.max(-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs
