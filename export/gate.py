"""The parity gate: no artifact is finished before its programs were compared with the model.

Three comparisons over one run that crosses the window edge, chunk edges, the ring wrap and a
rewind: `lowering` (exact float kernels against PyTorch on the same stored weights: must be noise),
`kernels` (the programs as they ship, with 8-bit activations, against the same), and `quantisation`
(the programs as they ship against the float checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_kv.config import ModelConfig
from edge_kv.errors import ParityError
from edge_kv.kv_plan import KVPlan
from edge_kv.parity import Divergence, divergence, log_softmax

DECODE_STEPS = 24
# What still counts as numerical noise of the lowering: the largest |Δlogit| in units of the logits'
# spread, and the largest KL divergence in nats. Float storage leaves the rounding of another
# summation order. In 8- and 16-bit rows a value on the edge rounds to the other side and changes
# by a whole step, which moves single logits but hardly the distribution (Gemma 3 270M with int8
# rows: 0.02 of the spread, 4e-6 nats).
NOISE = {"f32": (1e-3, 1e-6), "f16": (0.1, 1e-3), "int8": (0.1, 1e-3)}
# A device may use other int8 kernels than the one that exported: `verify` allows this much.
VERIFY_SLACK = 8.0
VERIFY_FLOOR_KL = 1e-3
VERIFY_TOP1_LOSS = 0.25


class Runner(Protocol):
    """What the gate needs of a session (`edge_kv.runtime.session.Session`)."""

    def prefill(self, ids: Any) -> None: ...
    def decode(self, token: int) -> npt.NDArray[np.float32]: ...
    def rewind(self, n: int) -> None: ...
    def close(self) -> None: ...


OpenSession = Callable[[Path, str], Runner]  # (artifact directory, engine)


@dataclass(frozen=True)
class GateRun:
    """The tokens of the gate: `ids` [n], of which `prompt` are prefilled in `chunks`."""

    ids: npt.NDArray[np.int64]
    prompt: int
    chunks: tuple[int, ...]
    text: bool = False  # ids of a text, whose perplexity means something

    @property
    def steps(self) -> int:
        return len(self.ids) - self.prompt


def plan_run(plan: KVPlan, vocab: int, encode: Callable[[str], list[int]] | None) -> GateRun:
    """Choose tokens: text when there is a tokenizer, seeded random ids otherwise.

    Long enough to wrap every ring behind a whole window, as far as ctx allows.
    """
    steps = max(1, min(DECODE_STEPS, plan.ctx // 2))
    prompt = min(plan.ctx - steps, plan.ring_slots + plan.chunk // 2 + 5)
    if encode:
        once = encode((files("edge_kv") / "data" / "passage.txt").read_text(encoding="utf-8"))
        ids = np.resize(np.array(once, np.int64), prompt + steps)
    else:
        ids = np.random.default_rng(0).integers(0, vocab, prompt + steps)
    chunks = tuple(_chunks(prompt, plan.chunk))
    return GateRun(ids.astype(np.int64), prompt, chunks, text=encode is not None)


def _chunks(prompt: int, chunk: int) -> Iterator[int]:
    """Mixed chunk sizes that add up to `prompt`: whole ones, one token, and odd lengths."""
    sizes, left, i = (chunk, 1, max(1, chunk // 3), chunk), prompt, 0
    while left > 0:
        size = min(sizes[i % len(sizes)], left)
        yield size
        left, i = left - size, i + 1


def replay(session: Runner, run: GateRun) -> npt.NDArray[np.float32]:
    """Teacher-forced logits [steps, vocab]; the first decode steps are rewound and run again."""
    at = 0
    for size in run.chunks:
        session.prefill(run.ids[at : at + size])
        at += size
    again = min(2, run.steps - 1)
    for token in run.ids[run.prompt : run.prompt + again]:
        session.decode(int(token))
    session.rewind(again)
    return np.stack([session.decode(int(t)) for t in run.ids[run.prompt :]])


def judge(
    run: GateRun,
    plan: KVPlan,
    *,
    exact: npt.NDArray[np.float32],
    shipped: npt.NDArray[np.float32],
    stored: Tensor,
    source: Tensor,
    vectors: str = "verify.npz",
) -> dict[str, Any]:
    """The manifest's `parity` entry from four runs of logits [steps, vocab].

    `vectors` names the file that is going to hold `stored`.

    Raises:
        ParityError: the lowering is not at numerical noise, or a logit is not finite.
    """
    reference = stored.numpy()
    lowering = divergence(reference, exact)
    kernels = divergence(reference, shipped)
    quantisation = divergence(source.numpy(), shipped)
    limit, limit_kl = NOISE[plan.kv]
    if not (lowering.relative <= limit and lowering.max_kl <= limit_kl):
        raise ParityError(
            f"The exported programs differ from the model by {lowering.max_abs:.3g} in a logit "
            f"({lowering.relative:.3g} of their spread, noise is at most {limit:.3g}) and "
            f"{lowering.max_kl:.3g} nats (noise: {limit_kl:.3g}), so nothing was written; "
            "please report this config."
        )
    if not np.isfinite(quantisation.max_kl):
        raise ParityError(
            "The exported programs produce logits that are not finite; nothing was written; "
            "check the checkpoint, or export with --quant none."
        )
    perplexity = {"float": _perplexity(run, source.numpy()), "stored": _perplexity(run, shipped)}
    return {
        "prompt": run.prompt,
        "steps": run.steps,
        "lowering": _rounded(lowering),
        "kernels": _rounded(kernels),
        "quantisation": _rounded(quantisation),
        **({"perplexity": perplexity} if run.text and run.steps > 1 else {}),
        "lowering_limit": {"relative": limit, "max_kl": limit_kl},
        "vectors": vectors,
        "verify": {
            "max_kl": float(f"{max(VERIFY_FLOOR_KL, VERIFY_SLACK * kernels.max_kl):.3g}"),
            "min_top1": round(max(0.0, kernels.top1 - VERIFY_TOP1_LOSS), 4),
        },
    }


def _perplexity(run: GateRun, logits: npt.NDArray[np.float32]) -> float:
    """Of the tokens behind the first decoded one; the last logits predict nothing known."""
    targets = run.ids[run.prompt + 1 :]
    found = log_softmax(logits[:-1].astype(np.float64))[np.arange(len(targets)), targets]
    return float(f"{np.exp(-found.mean()) if len(targets) else np.nan:.4g}")


def _rounded(d: Divergence) -> dict[str, Any]:
    """Three significant digits: what is printed, and stable between runs."""
    return {k: v if isinstance(v, int) else float(f"{v:.3g}") for k, v in asdict(d).items()}


def write_vectors(path: Path, run: GateRun, logits: Tensor) -> None:
    """Reference logits for `verify`, readable without torch and without pickle."""
    with path.open("wb") as f:
        np.savez(
            f,
            ids=run.ids.astype(np.int32),
            prompt=np.int32(run.prompt),
            logits=logits.numpy().astype(np.float16),
        )


def float_rows(
    config: ModelConfig, read: Callable[[str, int, int], Any]
) -> Callable[[Tensor], Tensor]:
    """PLE rows [T, n_layers, dim] straight from a checkpoint, one token's row at a time."""

    def rows(ids: Tensor) -> Tensor:
        parts = [torch.from_numpy(read("ple_embed.weight", int(i), int(i) + 1)) for i in ids]
        return torch.cat(parts).view(len(ids), config.n_layers, config.ple_dim)

    return rows
