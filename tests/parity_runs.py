"""The runs that parity is measured on: mixed chunks, several ring wraps, rewinds, decoding.

Used by the tests, which bound the error, and by `benchmarks/parity.py`, which records it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_models import tiny

from edge_kv import runtime
from edge_kv.export import export_model

LENGTH, CHUNK, CTX = 70, 8, 96  # window 8: rings of 15 slots wrap four times
CHUNKS = (8, 3, 1, 8, 5, 2, 7)  # 34 prompt tokens, the rest is decoded


def reference(name: str, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Save the tiny model `name` to `root`; ids [LENGTH] and transformers' logits of them."""
    model = tiny(name)
    model.save_pretrained(root)
    ids = torch.from_numpy(np.random.default_rng(1).integers(3, 90, LENGTH))
    with torch.no_grad():
        return ids, model(ids[None], use_cache=False).logits[0]


def export(root: Path, out: Path, backend: str = "onnx", attention: str = "native") -> None:
    """Unquantised programs of the checkpoint in `root`."""
    export_model(
        weights=str(root), ctx=CTX, chunk=CHUNK, kv="f32", quant="none", out=out,
        backends=(backend,), attention=attention, open_session=runtime.load,
    )  # fmt: skip


def program_logits(out: Path, ids: np.ndarray, engine: str) -> list[tuple[int, np.ndarray]]:
    """(position, logits) of an artifact's programs: decoding, two rewinds, one restart."""
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
