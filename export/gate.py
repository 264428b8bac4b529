"""The parity gate: no artifact is finished before its programs were compared with the model.

Three comparisons over one run that crosses the window edge, chunk edges, the ring wrap and rewinds,
token by token and in passes of several: `lowering` (exact float kernels against PyTorch on the same
stored weights: must be noise), `kernels` (the programs as they ship, with 8-bit activations,
against the same), and `quantisation` (the programs as they ship against the float checkpoint: must
at least be about the same model, and where storage loses nothing the stored weights must be the
checkpoint's).

Passes of several tokens are compared with the single steps too: how far they move the lead of the
likeliest token says below which lead a greedy choice may depend on the number of drafts.

Of an artifact with a drafter, what it says behind some of the decoded tokens is compared too:
`lowering` and `kernels` of its program, and `quantisation` of its stored weights against those of
its checkpoint, both over what the model with stored weights has read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_kv.errors import ParityError
from edge_kv.parity import (
    Divergence,
    Drafting,
    Scores,
    burst,
    bursts,
    divergence,
    draft_divergence,
    lead_change,
    log_softmax,
    replayed,
    several,
    shared,
)
from edge_kv.plan import Plan

DECODE_STEPS = 24
ULP = 2.0**-23  # a unit in the last place of a float32 near 1
# What still counts as numerical noise of the lowering: the largest |Δlogit| in units of the logits'
# spread, and the largest KL divergence in nats. Float storage leaves the rounding of another
# summation order. In 8- and 16-bit rows a value on the edge rounds to the other side and changes
# by a whole step, which moves single logits but hardly the distribution (270 M parameters with
# int8 rows: 0.02 of the spread, 4e-6 nats).
NOISE = {"f32": (1e-3, 1e-6), "f16": (0.1, 1e-3), "int8": (0.1, 1e-3)}
# Models differ in how far they carry a rounding. Where the limits above do not hold, the stored
# weights are run once more with every float moved by a unit in its last place, and what that does
# to the logits, times NOISE_FACTOR (KL: its square), is what this model may show, up to a ceiling.
# Measured (benchmarks/gate_limits.py): float32 against float64 is at most 4.2 times the perturbed
# run, on models whose attention is so sharp that both lie between 4e-6 and 3e-2 of the spread.
NOISE_FACTOR = 8.0
NOISE_CEILING = (1.0, 0.05)
# A model that rounds activations to fixed steps hides what moves by one unit, and passes on what
# sums of a thousand products are wrong by. Two runs that round one value to different sides part as
# far as two runs can: 35 layers of random weights by 1.6 of the spread and 0.08 nats, E2B so by 2.0
# and 0.08. (Other weights are apart by more than a nat.)
ROUNDED_ULPS = 16
ROUNDED_CEILING = (3.0, 0.2)
# The least correlation of shipped logits with the checkpoint's, mean over the steps. Measured
# (benchmarks/gate_limits.py): own weights in int4 0.84 and more (random ones; trained ones 0.99),
# in int8 0.994, in floats 0.999; other weights 0.26 at most, two layers of tiny exchanged 0.80.
AGREEMENT = {"none": 0.95, "int8": 0.9, "kept": 0.9}
AGREEMENT_OF_FEWER_BITS = 0.5
# Of a drafter the same of its weights alone, and the least share of the tokens that it scores: a
# head of clusters scores some of them, and those at the edge may change places. Measured on random
# weights (tests/test_drafter.py): own weights with a head in int4 0.993, in int8 0.9999; with the
# rows of one matrix in another order 0.968 at most.
AGREEMENT_OF_DRAFTS = 0.97
COMMON_TOKENS = 0.5
# A device may use other int8 kernels than the one that exported: `verify` allows this much.
VERIFY_SLACK = 8.0
VERIFY_FLOOR_KL = 1e-3
VERIFY_TOP1_LOSS = 0.25
VERIFY_COMMON_LOSS = 0.25


class Runner(Drafting, Protocol):
    """What the gate needs of a session (`edge_kv.runtime.session.Session`)."""

    def prefill(self, ids: Any) -> None: ...
    def close(self) -> None: ...


OpenSession = Callable[[Path, str], Runner]  # (artifact directory, engine)


@dataclass(frozen=True)
class GateRun:
    """The tokens of the gate: `ids` [n], of which `prompt` are prefilled in `chunks`.

    The others are decoded one by one, and some of them before that together: `passes` are (first
    step, tokens). `bursts` are those of them that a drafter is asked for: see `parity.bursts`.
    """

    ids: npt.NDArray[np.int64]
    prompt: int
    chunks: tuple[int, ...]
    text: bool = False  # ids of a text, whose perplexity means something
    passes: tuple[tuple[int, int], ...] = ()
    bursts: tuple[range, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.ids) - self.prompt

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """The step of each row of logits that `replay` yields."""
        return np.concatenate([np.arange(at, at + n) for at, n in ((0, self.steps), *self.passes)])


@dataclass(frozen=True)
class Answers:
    """What a run gave: logits [steps, vocab], and drafts behind the tokens of its bursts."""

    logits: npt.NDArray[np.float32]
    drafts: list[Scores] = field(default_factory=list)


def plan_run(
    plan: Plan, vocab: int, encode: Callable[[str], list[int]] | None, *, drafter: bool = False
) -> GateRun:
    """Choose tokens: text when there is a tokenizer, seeded random ids otherwise.

    Long enough to wrap every ring behind a whole window, as far as ctx allows.
    """
    steps = max(1, min(DECODE_STEPS, plan.ctx // 2))
    prompt = min(plan.ctx - steps, _turn(plan) + plan.chunk // 2 + 5)
    if encode:
        once = encode((files("edge_kv") / "data" / "passage.txt").read_text(encoding="utf-8"))
        ids = np.resize(np.array(once, np.int64), prompt + steps)
    else:
        ids = np.random.default_rng(0).integers(0, vocab, prompt + steps)
    chunks = tuple(_chunks(prompt, plan.chunk))
    passes = tuple(several(plan.drafts, steps))
    asked = bursts(steps) if drafter else ()
    return GateRun(ids.astype(np.int64), prompt, chunks, encode is not None, passes, asked)


def _turn(plan: Plan) -> int:
    """Positions after which every ring has wrapped and two blocks of every kind are complete."""
    return max(t.slots if t.keep else 2 * t.stride if t.stride > 1 else 0 for t in plan.tables)


def _chunks(prompt: int, chunk: int) -> Iterator[int]:
    """Mixed chunk sizes that add up to `prompt`: whole ones, one token, and odd lengths."""
    sizes, left, i = (chunk, 1, max(1, chunk // 3), chunk), prompt, 0
    while left > 0:
        size = min(sizes[i % len(sizes)], left)
        yield size
        left, i = left - size, i + 1


def replay(session: Runner, run: GateRun) -> Answers:
    """Teacher-forced logits [steps, vocab], those of the passes of several tokens behind them, and
    the drafts of the run.

    The first decode steps are rewound and run again, as are all passes of several tokens.
    """
    at = 0
    for size in run.chunks:
        session.prefill(run.ids[at : at + size])
        at += size
    again = min(2, run.steps - 1)
    for token in run.ids[run.prompt : run.prompt + again]:
        session.decode(int(token))
    session.rewind(again)
    alone: list[npt.NDArray[np.float32]] = []
    together: list[npt.NDArray[np.float32]] = []
    drafts: list[Scores] = []
    asked = {tokens.start - 1: tokens for tokens in run.bursts}
    for step, logits in replayed(session, run.ids[run.prompt :], run.passes):
        (alone if len(logits) == 1 else together).append(logits)
        if len(logits) == 1 and step in asked:
            drafts += burst(session, run.ids[run.prompt :][asked[step]])
    return Answers(np.concatenate([*alone, *together]), drafts)


def judge(
    run: GateRun,
    plan: Plan,
    *,
    exact: npt.NDArray[np.float32],
    shipped: npt.NDArray[np.float32],
    stored: Tensor,
    source: Tensor,
    scheme: str,
    moved: Callable[[], Tensor],
    kept: Tensor | None = None,
    rounds: bool = False,
) -> dict[str, Any]:
    """The manifest's `parity` entry from runs of logits [steps, vocab], but for its vectors.

    Args:
        exact, shipped: the programs without and with 8-bit activations, as `replay` yields them.
        stored, source: the model over the stored weights and state, and over the checkpoint.
        scheme: how weights are stored, a key of AGREEMENT or a storage of fewer bits.
        moved: runs `stored` again over `perturbed` rows; called only when float32's noise on this
            model has to be known.
        kept: where storage is to lose nothing, the stored weights over a state that is not rounded.
        rounds: the model rounds activations to fixed steps, where a value on the edge may go either
            way as it may in 8-bit rows.

    Raises:
        ParityError: the lowering is not at numerical noise, a logit is not finite, storage without
            loss lost something, or the artifact has nothing to do with its checkpoint.
    """
    reference = stored.numpy()
    lowering = divergence(reference[run.rows], exact)
    kernels = divergence(reference[run.rows], shipped)
    quantisation = divergence(source.numpy()[run.rows], shipped)

    def noise() -> Divergence:
        return divergence(reference, moved().numpy())

    ceiling = ROUNDED_CEILING if rounds else NOISE_CEILING
    limit, limit_kl = _limits(lowering, NOISE["int8" if rounds else plan.kv], ceiling, noise)
    if not _within(lowering, limit, limit_kl):
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
    if kept is not None:
        lost = divergence(source.numpy(), kept.numpy())
        usual = NOISE["int8" if rounds else "f32"]
        if not _within(lost, *_limits(lost, usual, ceiling, noise)):
            raise ParityError(
                f"The stored weights are not those of the checkpoint: logits differ by "
                f"{lost.max_abs:.3g} where storage is exact, so nothing was written; run the same "
                "command again, and report it if it happens again."
            )
    agreement = float(np.mean(correlations(source.numpy()[run.rows], shipped)))
    needed = AGREEMENT.get(scheme, AGREEMENT_OF_FEWER_BITS)
    if not agreement >= needed:
        raise ParityError(
            f"The artifact has little to do with its checkpoint: their logits correlate to "
            f"{agreement:.2f} (expected {needed} or more) and agree on the likeliest token in "
            f"{quantisation.top1:.0%} of the steps, so nothing was written; export with "
            f"{'--quant int8' if needed < AGREEMENT['int8'] else '--quant none --kv f32'} to see "
            "whether storage is the reason."
        )
    perplexity = {
        "float": _perplexity(run, source.numpy()),
        "stored": _perplexity(run, shipped[: run.steps]),
    }
    return {
        "prompt": run.prompt,
        "steps": run.steps,
        "lowering": _rounded(lowering),
        "kernels": _rounded(kernels),
        "quantisation": _rounded(quantisation),
        **({"lead_change": _lead_change(run, shipped)} if run.passes else {}),
        **({"perplexity": perplexity} if run.text and run.steps > 1 else {}),
        "correlation": float(f"{agreement:.3g}"),
        "lowering_limit": _limit_entry(limit, limit_kl),
        "verify": _verify_limits(kernels),
    }


def _lead_change(run: GateRun, logits: npt.NDArray[np.float32]) -> float:
    """Between the passes of several tokens and the steps with the same tokens one by one."""
    alone = logits[run.rows[run.steps :]]
    return float(f"{lead_change(alone, logits[run.steps :]):.3g}")


def judge_drafts(
    plan: Plan,
    *,
    exact: Sequence[Scores],
    shipped: Sequence[Scores],
    stored: Sequence[Scores],
    source: Sequence[Scores],
    lossless: bool,
    moved: Callable[[], Sequence[Scores]],
    rounds: bool = False,
) -> dict[str, Any]:
    """The manifest's `parity.….draft` entry from the drafts of a run.

    Args:
        exact, shipped: the program without and with 8-bit activations, as `replay` yields them.
        stored, source: the drafter over its stored weights and over those of its checkpoint, both
            behind what the model with stored weights has read.
        lossless: storage is to lose nothing.
        moved, rounds: see `judge`.

    Raises:
        ParityError: the program is not that drafter, a value is not finite, or the stored weights
            have nothing to do with the checkpoint.
    """
    lowering, kernels = draft_divergence(stored, exact), draft_divergence(stored, shipped)
    quantisation = draft_divergence(source, stored)

    def noise() -> Divergence:
        return draft_divergence(stored, moved())

    ceiling = ROUNDED_CEILING if rounds else NOISE_CEILING
    limit, limit_kl = _limits(lowering, NOISE["int8" if rounds else plan.kv], ceiling, noise)
    if not (_within(lowering, limit, limit_kl) and lowering.common >= COMMON_TOKENS):
        raise ParityError(
            f"The exported drafter differs from the assistant by {lowering.max_abs:.3g} in a logit "
            f"({lowering.relative:.3g} of their spread, noise is at most {limit:.3g}) and "
            f"{lowering.max_kl:.3g} nats (noise: {limit_kl:.3g}), with {lowering.common:.0%} of "
            "the tokens in common, so nothing was written; please report this config, or leave "
            "--assistant out."
        )
    alike = agreement(stored, shipped)
    if not (alike >= AGREEMENT_OF_DRAFTS and kernels.common >= COMMON_TOKENS):
        raise ParityError(
            "The exported drafter computes something else with 8-bit activations: its logits "
            f"correlate to {alike:.2f} with those of the assistant (expected {AGREEMENT_OF_DRAFTS} "
            f"or more), with {kernels.common:.0%} of the tokens in common, so nothing was written; "
            "check the assistant's checkpoint, or leave --assistant out."
        )
    own = agreement(source, stored)
    usual = NOISE["int8" if rounds else "f32"]
    lost = lossless and not _within(quantisation, *_limits(quantisation, usual, ceiling, noise))
    if lost or not (own >= AGREEMENT_OF_DRAFTS and quantisation.common >= COMMON_TOKENS):
        raise ParityError(
            "The stored weights of the drafter are not those of the assistant: over one text their "
            f"logits correlate to {own:.2f} (expected {AGREEMENT_OF_DRAFTS} or more) and "
            f"differ by {quantisation.max_abs:.3g}, with {quantisation.common:.0%} of the tokens "
            "in common, so nothing was written; run the same command again, and report it if it "
            "happens again."
        )
    return {
        "drafts": lowering.steps,
        "lowering": _rounded(lowering),
        "kernels": _rounded(kernels),
        "quantisation": _rounded(quantisation),
        "correlation": float(f"{own:.3g}"),
        "lowering_limit": _limit_entry(limit, limit_kl),
        "verify": {
            **_verify_limits(kernels),
            "min_common": round(max(0.0, kernels.common - VERIFY_COMMON_LOSS), 4),
        },
    }


def agreement(reference: Sequence[Scores], run: Sequence[Scores]) -> float:
    """Mean correlation of the logits of drafts, over the tokens that both scored."""
    pairs = (shared(*pair) for pair in zip(reference, run, strict=True))
    return float(np.mean([_correlation(a, b) if a.size > 1 else 0.0 for a, b in pairs]))


def _limit_entry(limit: float, limit_kl: float) -> dict[str, float]:
    return {"relative": float(f"{limit:.3g}"), "max_kl": float(f"{limit_kl:.3g}")}


def _verify_limits(kernels: Divergence) -> dict[str, float]:
    """What `verify` allows a device, from what the programs showed when they were made."""
    return {
        "max_kl": float(f"{max(VERIFY_FLOOR_KL, VERIFY_SLACK * kernels.max_kl):.3g}"),
        "min_top1": round(max(0.0, kernels.top1 - VERIFY_TOP1_LOSS), 4),
    }


def _perplexity(run: GateRun, logits: npt.NDArray[np.float32]) -> float:
    """Of the tokens behind the first decoded one; the last logits predict nothing known."""
    targets = run.ids[run.prompt + 1 :]
    found = log_softmax(logits[:-1].astype(np.float64))[np.arange(len(targets)), targets]
    return float(f"{np.exp(-found.mean()) if len(targets) else np.nan:.4g}")


def _within(found: Divergence, limit: float, limit_kl: float) -> bool:
    return found.relative <= limit and found.max_kl <= limit_kl


def _limits(
    found: Divergence, usual: tuple[float, float], ceiling: tuple[float, float],
    noise: Callable[[], Divergence],
) -> tuple[float, float]:  # fmt: skip
    """The usual limits when `found` keeps them, else those that this model's noise asks for, at
    most the ceiling."""
    if _within(found, *usual) or not np.isfinite(found.max_kl):
        return usual
    own = noise()
    wanted = (NOISE_FACTOR * own.relative, NOISE_FACTOR**2 * own.max_kl)
    relative, kl = (
        min(most, max(least, asked))
        for most, least, asked in zip(ceiling, usual, wanted, strict=True)
    )
    return relative, kl


def correlations(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Pearson correlation of the logits of each step: 1 is the same shape, 0 is unrelated."""
    return np.array([_correlation(x, y) for x, y in zip(a, b, strict=True)])


def _correlation(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    x, y = (row.astype(np.float64) - row.mean() for row in (a, b))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def perturbed(
    read: Callable[[str, int, int], Tensor], ulps: int = 1
) -> Callable[[str, int, int], Tensor]:
    """`read` with every float it yields moved by up to `ulps` units in its last place, either way.

    What that does to the logits is what float32 arithmetic may do to them: each sum is then as
    wrong as another order of summation makes it. It costs no more memory than the run itself.
    """

    def rows(region: str, start: int, stop: int) -> Tensor:
        values = read(region, start, stop)
        if values.dtype != torch.float32:
            return values
        seed = zlib.crc32(f"{region}/{start}".encode())
        noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
        return values * (1 + (2 * noise - 1) * ulps * ULP)

    return rows


def _rounded(d: Divergence) -> dict[str, Any]:
    """Three significant digits: what is printed, and stable between runs."""
    return {k: v if isinstance(v, int) else float(f"{v:.3g}") for k, v in asdict(d).items()}


def write_vectors(path: Path, run: GateRun, logits: Tensor, drafts: Sequence[Scores] = ()) -> None:
    """Reference logits and drafts for `verify`, readable without torch and without pickle."""
    arrays: dict[str, Any] = {
        "ids": run.ids.astype(np.int32),
        "prompt": np.int32(run.prompt),
        "logits": logits.numpy().astype(np.float16),
    }
    if drafts:
        arrays["draft_steps"] = np.array([b.start - 1 for b in run.bursts], np.int32)
        arrays["draft_logits"] = np.stack([d.logits for d in drafts]).astype(np.float16)
        tokens = [d.tokens for d in drafts if d.tokens is not None]
        if tokens:
            arrays["draft_tokens"] = np.stack(tokens).astype(np.int32)
    with path.open("wb") as f:
        np.savez(f, **arrays)
