"""The runs that parity is measured on: mixed chunks, several ring wraps, rewinds, decoding.

Used by the tests, which bound the error, and by `benchmarks/parity.py`, which records it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from weights_models import tiny_hf

from edge_kv import runtime
from edge_kv.export import export_model
from edge_kv.kv_plan import plan_kv
from edge_kv.model.binding import load_parameters
from edge_kv.model.decoder import Decoder
from edge_kv.model.state import StaticState
from edge_kv.weights import open_weights

LENGTH, CHUNK, CTX = 70, 8, 96  # window 8: rings of 15 slots wrap four times
CHUNKS = (8, 3, 1, 8, 5, 2, 7)  # 34 prompt tokens, the rest is decoded


def reference(name: str, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Save the tiny model `name` to `root`; ids [LENGTH] and transformers' logits of them."""
    model = tiny_hf(name)
    model.save_pretrained(root)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 90, LENGTH))
    with torch.no_grad():
        return ids, model(ids[None]).logits[0]


class Eager:
    """The eager decoder with a checkpoint's float parameters."""

    def __init__(self, root: Path):
        self.source = open_weights(str(root))
        self.config = self.source.config
        self.plan = plan_kv(self.config, ctx=CTX, chunk=CHUNK, kv="f32")
        with torch.device("meta"):
            self.decoder = Decoder(self.config, self.plan)
        self.decoder.rope = Decoder.rope_tables(self.config)
        load_parameters(self.decoder, self.config, self.read)

    def read(self, region: str, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self.source.read(region, start, stop))

    def ple(self, ids: torch.Tensor) -> torch.Tensor | None:
        """PLE rows [T, n_layers, dim]; None for a model without."""
        if not self.config.ple_dim:
            return None
        table = torch.from_numpy(self.source.read("ple_embed.weight"))
        return table[ids].view(len(ids), self.config.n_layers, self.config.ple_dim)


@torch.no_grad()
def static_logits(eager: Eager, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Logits by position of the eager decoder over static buffers, rewinding three times."""
    state, pos, got = StaticState(eager.plan), 0, {}

    def step(size: int) -> None:
        nonlocal pos
        part = ids[pos : pos + size]
        logits = eager.decoder(part, torch.tensor([pos]), eager.ple(part), state)
        got.update({pos + i: row for i, row in enumerate(logits)})
        pos += size

    for size in CHUNKS:
        step(size)
    for stop in (40, 55, 66, LENGTH):
        while pos < stop:
            step(1)
        if stop < LENGTH:  # within what the rings retain
            pos -= 5
            step(4)
    return got


def program_logits(
    root: Path, out: Path, ids: np.ndarray, engine: str = "onnx", attention: str = "native"
) -> list[tuple[int, np.ndarray]]:
    """(position, logits) of unquantised programs: decoding, two rewinds, one restart."""
    backend = "onnx" if engine == "onnx" else "executorch"
    export_model(
        weights=str(root), ctx=CTX, chunk=CHUNK, kv="f32", quant="none", out=out,
        backends=(backend,), attention=attention, open_session=runtime.load,
    )  # fmt: skip
    got = []
    with runtime.load(out, engine) as session:
        for size in CHUNKS:
            session.prefill(ids[session.pos : session.pos + size])
        for stop in (42, 59, LENGTH):
            while session.pos < stop:
                pos = session.pos
                got.append((pos, session.decode(int(ids[pos]))))
            if stop < LENGTH:
                session.rewind(4)
                session.prefill(ids[session.pos : session.pos + 2])
        session.reset()
        session.prefill(ids[: LENGTH - 1])
        got.append((LENGTH - 1, session.decode(int(ids[-1]))))
    return got
