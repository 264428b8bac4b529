"""How well an artifact predicts a text, and how far it is from the float checkpoint; no torch.

The text is read in independent windows that each begin with the model's start token; every token
of the text is predicted once, through `decode`, as in use: stored weights, 8-bit activations, the
exported state. A reference, if there is one, yields the float model's logits in the same order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import exp
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_kv.errors import PromptError
from edge_kv.parity import log_softmax
from edge_kv.runtime.session import Session

WINDOW = 512  # tokens of a window, as perplexities are commonly measured
WORST = 10  # tokens listed

Logits = npt.NDArray[np.float32]
Reference = Callable[
    [Sequence[int]], Iterable[Logits]
]  # ids [T] -> logits behind each but the last


@dataclass(frozen=True, order=True)
class Miss:
    """A token at which the run and the reference differ most."""

    kl: float  # KL(reference || run) in nats
    at: int  # index among the text's tokens
    token: int = field(compare=False)
    loss: float = field(compare=False)
    reference_loss: float = field(compare=False)
    likeliest: int = field(compare=False)
    reference_likeliest: int = field(compare=False)


@dataclass(frozen=True)
class Divergences:
    """The run against the reference, over all predicted tokens."""

    perplexity: float  # of the reference
    mean_kl: float
    p99_kl: float
    max_kl: float
    top1: float  # share of tokens with the same likeliest id
    worst: tuple[Miss, ...]  # by KL, largest first


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; losses are means in nats a token."""

    tokens: int
    windows: int
    window: int
    loss: float
    perplexity: float
    against: Divergences | None = None


def windows(ids: Sequence[int], bos: int | None, length: int) -> Iterator[list[int]]:
    """`ids` cut into windows of at most `length` that each begin with the start token.

    Without one, a window's first token is only read: every other token is predicted once.
    """
    lead = [] if bos is None else [bos]
    step = length - len(lead)
    for at in range(0, len(ids), step):
        cut = [*lead, *ids[at : at + step]]
        if len(cut) > 1:
            yield cut


def evaluate(
    session: Session,
    ids: Sequence[int],
    *,
    bos: int | None,
    window: int = WINDOW,
    reference: Reference | None = None,
    on_token: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Predict the tokens `ids` of a text (without start token) on `session`.

    Args:
        window: tokens of a window, at most the session's context.
        on_token: is told (done, total) predicted tokens.

    Raises:
        PromptError: a text of fewer than two tokens.
    """
    cuts = list(windows(ids, bos, min(window, session.plan.ctx)))
    total = sum(len(cut) - 1 for cut in cuts)
    if not total:
        raise PromptError(f"A text of {len(ids)} tokens has nothing to predict; give a longer one.")
    tally = _Tally()
    for cut in cuts:
        session.reset()
        expected = iter(reference(cut)) if reference else None
        for token, target in pairwise(cut):
            logits = session.decode(token)
            tally.add(logits, next(expected) if expected else None, target)
            on_token(len(tally.loss), total)
    return tally.evaluation(len(cuts), min(window, session.plan.ctx))


class _Tally:
    """Losses and divergences, token by token."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.reference_loss: list[float] = []
        self.kl: list[float] = []
        self.same = 0
        self.worst: list[Miss] = []

    def add(self, logits: Logits, reference: Logits | None, target: int) -> None:
        q = log_softmax(logits.astype(np.float64))
        self.loss.append(-float(q[target]))
        if reference is None:
            return
        p = log_softmax(reference.astype(np.float64))
        kl = float((np.exp(p) * (p - q)).sum())
        self.reference_loss.append(-float(p[target]))
        self.kl.append(kl)
        best, expected = int(q.argmax()), int(p.argmax())
        self.same += best == expected
        miss = Miss(
            kl, len(self.kl) - 1, target, self.loss[-1], self.reference_loss[-1], best, expected
        )
        (heapq.heappush if len(self.worst) < WORST else heapq.heappushpop)(self.worst, miss)

    def evaluation(self, count: int, window: int) -> Evaluation:
        against = None
        if self.kl:
            against = Divergences(
                perplexity=_perplexity(self.reference_loss),
                mean_kl=float(np.mean(self.kl)),
                p99_kl=float(np.percentile(self.kl, 99)),
                max_kl=float(np.max(self.kl)),
                top1=self.same / len(self.kl),
                worst=tuple(sorted(self.worst, reverse=True)),
            )
        return Evaluation(
            tokens=len(self.loss),
            windows=count,
            window=window,
            loss=float(np.mean(self.loss)),
            perplexity=_perplexity(self.loss),
            against=against,
        )


def _perplexity(losses: Sequence[float]) -> float:
    mean = float(np.mean(losses))
    return exp(mean) if mean < 700 else float("inf")


def readable(evaluation: Evaluation, text: Callable[[int], str]) -> dict[str, Any]:
    """The evaluation as JSON types; `text` spells a token id."""
    data = asdict(evaluation)
    against = data.pop("against")
    if against:
        for miss in against["worst"]:
            miss["text"] = text(miss["token"])
            miss["likeliest_text"] = text(miss["likeliest"])
            miss["reference_likeliest_text"] = text(miss["reference_likeliest"])
        data["against"] = against
    return data
