"""Parity on the device: the stored reference logits against what this machine computes, no torch.

An artifact keeps the ids and logits of a reference run (`parity["vectors"]`, a .npz of `ids` int32
[n], `prompt`: how many of them are prefilled, and `logits` [n - prompt, vocab]) and the limits its
programs met when it was made (`parity["verify"]`).
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
from edge_kv.parity import divergence, replayed, several
from edge_kv.runtime.session import Session


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

    @property
    def passed(self) -> bool:
        """Within the limits; a NaN is not."""
        return self.max_kl <= self.limit_kl and self.top1 >= self.limit_top1


def verify(session: Session, on_step: Callable[[int, int], None] | None = None) -> Parity:
    """Replay the stored vectors of the session's artifact and compare, step by step.

    Some of the steps are also run together, in passes of every number of tokens, and rewound.

    `on_step` is told (done, total) steps.

    Raises:
        ArtifactError: no vectors or limits, or they cannot be read.
    """
    ids, prompt, reference, limits = _vectors(session.artifact, session.backend)
    session.reset()
    session.prefill(ids[:prompt])
    found = []
    passes = several(session.drafts, len(reference))
    for at, logits in replayed(session, ids[prompt:], passes):
        found.append(divergence(reference[at : at + len(logits)], logits))
        if on_step and len(logits) == 1:
            on_step(at + 1, len(reference))
    rows = [f.steps for f in found]
    return Parity(
        steps=len(reference),
        max_abs=float(np.max([f.max_abs for f in found])),
        mean_kl=float(np.average([f.mean_kl for f in found], weights=rows)),
        max_kl=float(np.max([f.max_kl for f in found])),
        top1=float(np.average([f.top1 for f in found], weights=rows)),
        limit_kl=limits[0],
        limit_top1=limits[1],
    )


def _vectors(
    artifact: Artifact, backend: str
) -> tuple[npt.NDArray[np.int64], int, npt.NDArray[Any], tuple[float, float]]:
    entry = artifact.manifest.parity.get(backend)
    if entry is None:
        raise ArtifactError(f"{artifact.root} holds no reference vectors to verify; export again.")
    try:
        with np.load(artifact.path(entry.vectors), allow_pickle=False) as arrays:
            ids = arrays["ids"].astype(np.int64)
            prompt = int(arrays["prompt"])
            logits = arrays["logits"]
    except (KeyError, ValueError, TypeError, OSError, zipfile.BadZipFile) as e:
        raise ArtifactError(
            f"The reference vectors of {artifact.root} cannot be read ({e}); export again."
        ) from e
    steps = len(ids) - prompt
    if steps < 1 or prompt < 0 or logits.shape != (steps, artifact.tokens.vocab):
        raise ArtifactError(
            f"The reference vectors of {artifact.root} are {logits.shape} logits for {steps} "
            "steps; export again."
        )
    return ids, prompt, logits, (entry.verify.max_kl, entry.verify.min_top1)
