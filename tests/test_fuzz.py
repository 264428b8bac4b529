"""A seeded part of `fuzz_inputs`: damaged checkpoints are served or refused in one sentence."""

from __future__ import annotations

from collections import Counter

from fuzz_inputs import batch

CASES, SEED = 150, 11


def test_damaged_checkpoints_end_in_one_sentence(tmp_path):
    found = list(batch(range(CASES), SEED, tmp_path))
    counts = Counter(result for _, _, result in found)
    assert [f for f in found if f[2] not in ("served", "refused")] == []
    assert counts["refused"] > CASES // 2 and counts["served"] > 0
