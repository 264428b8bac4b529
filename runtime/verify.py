"""Parity on the device: the stored reference logits against what this machine computes, no torch.

An artifact keeps the ids and logits of a reference run (`parity["vectors"]`, a .npz of `ids` int32
[n], `prompt`: how many of them are prefilled, and `logits` [n - prompt, vocab]) and the limits its
programs met when it was made (`parity["verify"]`). One with a drafter keeps what that says behind
some of the decoded tokens too (`draft_steps` [b], and for each of them as many rows of
`draft_logits` [b * drafts, scored], whose tokens are `draft_tokens` unless all are scored).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_kv.artifact import Artifact
from edge_kv.errors import ArtifactError
from edge_kv.manifest import DraftParityEntry, ParityEntry
from edge_kv.parity import (
    Divergence,
    Scores,
    burst,
    divergence,
    draft_divergence,
    replayed,
    several,
    together,
)
from edge_kv.runtime.session import Session


@dataclass(frozen=True)
class DraftParity:
    """How far the drafts of this machine are from the reference, over the tokens that both score.

    The likeliest token is that of all that each scores.
    """

    drafts: int
    max_abs: float  # largest |Δlogit|
    mean_kl: float  # KL(reference || here) in nats
    max_kl: float
    top1: float  # share of drafts with the same likeliest id
    common: float  # share of tokens that both score
    limit_kl: float
    limit_top1: float
    limit_common: float

    @property
    def passed(self) -> bool:
        """Within the limits; a NaN is not."""
        near = self.max_kl <= self.limit_kl and self.top1 >= self.limit_top1
        return near and self.common >= self.limit_common


@dataclass(frozen=True)
class Parity:
    """How far the logits of this machine are from the reference, over all stored steps."""

    steps: int
    max_abs: float  # largest |Δlogit|
    mean_kl: float  # KL(reference || here) in nats
    max_kl: float
    top1: float  # share of steps with the same likeliest id
    limit_kl: float
    limit_top1: float
    draft: DraftParity | None = None  # None: no drafter, or one without reference drafts

    @property
    def passed(self) -> bool:
        """Within the limits; a NaN is not."""
        near = self.max_kl <= self.limit_kl and self.top1 >= self.limit_top1
        return near and (self.draft is None or self.draft.passed)


@dataclass(frozen=True)
class _Vectors:
    """A reference run: `ids` [n], of which `prompt` are prefilled, `logits` [n - prompt, vocab].

    `bursts` are the decoded tokens that drafts were made behind, and `drafts` these, burst by
    burst.
    """

    ids: npt.NDArray[np.int64]
    prompt: int
    logits: npt.NDArray[Any]
    bursts: tuple[range, ...] = ()
    drafts: tuple[Scores, ...] = ()


def verify(session: Session, on_step: Callable[[int, int], None] | None = None) -> Parity:
    """Replay the stored vectors of the session's artifact and compare, step by step.

    Some of the steps are also run together, in passes of every number of tokens, and rewound. The
    drafter is asked where the reference run asked it.

    `on_step` is told (done, total) steps.

    Raises:
        ArtifactError: no vectors or limits, or they cannot be read.
    """
    artifact = session.artifact
    entry = artifact.manifest.parity.get(session.backend)
    if entry is None:
        raise ArtifactError(f"{artifact.root} holds no reference vectors to verify; export again.")
    judged = entry.draft if session.has_drafter else None
    vectors = _vectors(artifact, entry, drafts=judged is not None)
    ids, reference = vectors.ids[vectors.prompt :], vectors.logits
    asked = {tokens.start - 1: tokens for tokens in vectors.bursts}
    session.reset()
    session.prefill(vectors.ids[: vectors.prompt])
    found: list[Divergence] = []
    drafts: list[Scores] = []
    for at, logits in replayed(session, ids, several(session.drafts, len(reference))):
        found.append(divergence(reference[at : at + len(logits)], logits))
        if len(logits) > 1:
            continue
        if at in asked:
            drafts += burst(session, ids[asked[at]])
        if on_step:
            on_step(at + 1, len(reference))
    of = together(found)
    return Parity(
        steps=len(reference),
        max_abs=of.max_abs,
        mean_kl=of.mean_kl,
        max_kl=of.max_kl,
        top1=of.top1,
        limit_kl=entry.verify.max_kl,
        limit_top1=entry.verify.min_top1,
        draft=_drafted(vectors, drafts, judged) if judged else None,
    )


def _drafted(vectors: _Vectors, drafts: list[Scores], judged: DraftParityEntry) -> DraftParity:
    of = draft_divergence(vectors.drafts, drafts)
    return DraftParity(
        drafts=of.steps,
        max_abs=of.max_abs,
        mean_kl=of.mean_kl,
        max_kl=of.max_kl,
        top1=of.top1,
        common=of.common,
        limit_kl=judged.verify.max_kl,
        limit_top1=judged.verify.min_top1,
        limit_common=judged.verify.min_common,
    )


def _vectors(artifact: Artifact, entry: ParityEntry, *, drafts: bool) -> _Vectors:
    try:
        with np.load(artifact.path(entry.vectors), allow_pickle=False) as arrays:
            ids = arrays["ids"].astype(np.int64)
            prompt = int(arrays["prompt"])
            logits = arrays["logits"]
            steps = arrays["draft_steps"].astype(np.int64) if drafts else None
            scored = arrays["draft_logits"] if drafts else None
            tokens = arrays["draft_tokens"] if drafts and "draft_tokens" in arrays else None
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as e:
        raise ArtifactError(
            f"The reference vectors of {artifact.root} cannot be read ({e}); export again."
        ) from e
    decoded = len(ids) - prompt
    if decoded < 1 or prompt < 0 or logits.shape != (decoded, artifact.tokens.vocab):
        raise ArtifactError(
            f"The reference vectors of {artifact.root} are {logits.shape} logits for {decoded} "
            "steps; export again."
        )
    if steps is None or scored is None:
        return _Vectors(ids, prompt, logits)
    count = len(scored) // max(1, steps.size) if scored.ndim == 2 and steps.ndim == 1 else 0
    if (
        not count
        or len(scored) != count * len(steps)
        or not 1 <= scored.shape[1] <= artifact.tokens.vocab
        or (tokens is None) != (scored.shape[1] == artifact.tokens.vocab)
        or (tokens is not None and (tokens.shape != scored.shape or tokens.dtype.kind != "i"))
        or (np.diff(steps) < 1).any()
        or steps.min() < 0
        or steps.max() + count >= decoded
    ):
        raise ArtifactError(
            f"The reference vectors of {artifact.root} are drafts {scored.shape} behind "
            f"{steps.size} of {decoded} steps; export again."
        )
    rows = [Scores(s, None if tokens is None else tokens[i]) for i, s in enumerate(scored)]
    bursts = tuple(range(at + 1, at + 1 + count) for at in steps.tolist())
    return _Vectors(ids, prompt, logits, bursts, tuple(rows))
