"""Where a session's experts come from: their mapped file, or a bank when memory is too small.

Mapped pages are best as long as all experts stay in memory. Where they do not, whole matrices in
anonymous memory, read past the page cache, take a half to two thirds of the time
(benchmarks/expert_reads.py). The bank is native: `runtime/native/expert_bank.h`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from edge_kv.artifact import Artifact
from edge_kv.memory import predict_artifact
from edge_kv.runtime.available import available_memory

LEAST = 8  # the least bank has this part of what a token reads: the experts of several layers
RESERVE = 64 << 20  # bytes left to the system: buffers of its reads, and what else it runs


def bank_bytes(experts: int, chosen: int, others: int, available: int | None) -> int:
    """Bytes for a bank of `experts` bytes of matrices beside `others` of everything else.

    0 where all of them fit into `available`, and where the system does not say what there is
    (None). Never less than those of a few layers, of `chosen` bytes that a token reads: mapped
    pages are read several times where they do not stay, so that a bank pays that holds nothing
    from one token to the next.
    """
    if available is None:
        return 0
    left = available - others - RESERVE
    return 0 if experts <= left else max(chosen // LEAST, left)


def keep_experts(library: Any, artifact: Artifact) -> int:
    """Give the operators of `library` a bank if the experts of `artifact` need one; its bytes.

    To be called whenever one of its programs is loaded: a bank knows matrices by their addresses,
    so one of before ends with it.
    """
    needs = artifact.manifest.needs
    if not needs.experts:
        return 0
    planned = predict_artifact(artifact)
    others = needs.dense + planned.anonymous + planned.state - planned.touched
    size = bank_bytes(needs.experts, needs.read_experts, others, available_memory())
    library.edge_kv_keep_experts(ctypes.c_int64(size))
    return size


def forget_experts(library: Any, artifact: Artifact) -> None:
    """End the bank of `artifact`, before its weights are no longer mapped."""
    if artifact.manifest.needs.experts:
        library.edge_kv_keep_experts(ctypes.c_int64(0))
