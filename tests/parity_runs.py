"""The runs that parity is measured on, of nets and of programs, against transformers.

Prompts in mixed chunks, passes of every size with wrong drafts, rings that wrap, blocks complete
and not, rewinds, wrong continuations that are overwritten, snapshots into memory full of other
rows. Used by the tests, which bound the error, and by `benchmarks/parity.py`, which records it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from tiny_models import tiny

from edge_kv import models, nets, runtime
from edge_kv.export import export_model
from edge_kv.nets.state import StaticState
from edge_kv.nets.weights import Weights, load

LENGTH, CTX, CHUNK = 70, 78, 8  # windows of 8: rings of 15 slots wrap four times
CHUNKS = (8, 3, 1, 8, 5, 2, 7)  # 34 prompt tokens, the rest is decoded
BOUND = 2e-4  # of |Δlogit| in float


def allowed(noise: float) -> float:
    """The bound of a model whose own float32 logits are up to `noise` from its float64 ones."""
    return max(BOUND, 4 * noise)


def reference(name: str, root: Path) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Save the tiny model `name` to `root`; ids [LENGTH], transformers' logits, their noise."""
    model = tiny(name)
    model.save_pretrained(root)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 90, LENGTH))
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
        model.set_experts_implementation("eager")
        exact = model.double()(ids[None], use_cache=False).logits[0]
    return ids, expected, float((expected - exact).abs().max())


def export(root: Path, out: Path, backend: str = "onnx", attention: str = "native") -> None:
    """Unquantised programs of the checkpoint in `root`."""
    export_model(
        weights=str(root), ctx=CTX, chunk=CHUNK, kv="f32", quant="none", out=out,
        backends=(backend,), attention=attention, open_session=runtime.load,
    )  # fmt: skip


def program_logits(out: Path, ids: np.ndarray, engine: str) -> list[tuple[int, np.ndarray]]:
    """(position, logits) of an artifact's programs, over all that the module promises."""
    snapshot = out.with_suffix(".kv")
    with runtime.load(out, engine) as session:
        for size in CHUNKS:
            session.prefill(ids[session.pos : session.pos + size])
        got = [*decoded(session, ids, 42)]
        session.rewind(4)
        session.prefill(ids[session.pos : session.pos + 2])
        session.prefill((ids[session.pos : session.pos + 6] + 7) % 90)  # a wrong continuation
        session.rewind(6)
        got += decoded(session, ids, 59)
        session.snapshot(snapshot)
    with runtime.load(out, engine) as session:
        poison(session)
        session.restore(snapshot)
        session.rewind(4)
        session.prefill(ids[session.pos : session.pos + 2])
        got += decoded(session, ids, LENGTH)
        session.reset()
        session.prefill(ids[: LENGTH - 1])
        got.append((LENGTH - 1, session.decode(int(ids[-1]))))
    return got


def decoded(
    session: runtime.Session, ids: np.ndarray, stop: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(position, logits) up to `stop`, in passes of every size that the engine takes.

    The second half of a pass is wrong drafts, which are taken back.
    """
    sizes = cycle(n for n in (1, session.drafts + 1, 3, 2, 6, 4, 5, 7) if n <= session.drafts + 1)
    while session.pos < stop:
        at = session.pos
        fed = ids[at : min(at + next(sizes), stop)].copy()
        kept = -(-len(fed) // 2)
        fed[kept:] = (fed[kept:] + 11) % 90
        logits = session.decode_many(fed)
        yield from enumerate(logits[:kept], at)
        session.rewind(len(fed) - kept)


def poison(session: runtime.Session) -> None:
    """Rows of nobody in all of the state: finite, as other tokens leave behind."""
    generator = np.random.default_rng(9)
    for memory in session.state.values():
        memory[:] = generator.normal(0, 30, memory.shape).astype(memory.dtype)


class Run:
    """A net in PyTorch at work on `ids`; errors of its logits against `expected`, by position."""

    def __init__(self, checkpoint, ids, expected, kv, chunk=CHUNK):
        self.ids, self.expected = ids, expected
        self.plan = models.plan(checkpoint.config, ctx=CTX, chunk=chunk, kv=kv)
        self.checkpoint = checkpoint
        with torch.device("meta"):
            self.net = nets.make_net(checkpoint.config, Weights(models.weights(checkpoint.config)))
        load(self.net, lambda name, a, b: torch.from_numpy(checkpoint.read(name, a, b)))
        self.state = StaticState(self.plan, fill=torch.nan)
        self.pos = self.written = 0
        self.errors: dict[int, float] = {}

    def rows(self, ids, layers):
        """Token rows of the per-layer embedding, of models that have one."""
        config = self.checkpoint.config
        if "ple.embed" not in self.checkpoint.rows:
            return None
        table = torch.from_numpy(self.checkpoint.read("ple.embed"))
        return table[ids].view(len(ids), config.layers, -1)[:, :layers]

    def feed(self, ids):
        """Write `ids` at the current position, which stays."""
        self.written = max(self.written, self.pos + len(ids))
        pos = torch.tensor([self.pos])
        rows = self.rows(ids, self.checkpoint.config.layers)
        return self.net.logits(self.net(ids, pos, self.state, rows))

    def step(self, n):
        logits = self.feed(self.ids[self.pos : self.pos + n])
        for i, row in enumerate(logits, self.pos):
            error = float((row - self.expected[i]).abs().max())
            self.errors[i] = max(self.errors.get(i, 0.0), error)
        self.pos += n

    def prefill(self, n):
        ids = self.ids[self.pos : self.pos + n]
        self.written = max(self.written, self.pos + n)
        owners = getattr(self.checkpoint.config, "owners", None)
        self.net.prefill(ids, torch.tensor([self.pos]), self.state, self.rows(ids, owners))
        self.pos += n

    def wrong(self, n):
        """Write other tokens, to be overwritten."""
        self.feed((self.ids[self.pos : self.pos + n] + 7) % 90)

    def rewind(self, n):
        assert self.plan.can_rewind(self.pos - n, self.written)
        self.pos -= n

    def snapshot(self):
        """Only what a snapshot holds goes on, into memory full of NaN."""
        fresh = StaticState(self.plan, fill=torch.nan)
        for table in self.plan.tables:
            for row in table.held(self.pos, self.written):
                slot = row % table.slots
                fresh.tables[table.name][slot] = self.state.tables[table.name][slot]
        self.state = fresh

    @torch.no_grad()
    def run(self):
        """The whole text, step by step; the largest error of a logit."""
        for n in (8, 8, 5, 1, 1, 3):
            self.step(n)
        self.snapshot()
        self.step(2)
        self.rewind(4)
        self.step(7)
        self.wrong(4)
        self.step(1)
        self.step(1)
        self.snapshot()
        self.wrong(7)
        self.prefill(3)
        while self.pos < 60:
            self.step(1)
        self.rewind(5)
        self.snapshot()
        self.prefill(8)
        while self.pos < LENGTH:
            self.step(1)
        return max(self.errors.values())
