"""A seeded part of `fuzz_inputs`: damaged files are served or refused in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CASES, SEED = 150, 11


def test_damaged_files_end_in_one_sentence():
    command = [sys.executable, str(Path(__file__).with_name("fuzz_inputs.py"))]
    done = subprocess.run(
        [*command, "--cases", str(CASES), "--seed", str(SEED)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    counts = {kind: sum(outcomes.values()) for kind, outcomes in found["outcomes"].items()}
    assert found["failures"] == 0 and sum(counts.values()) == CASES and len(counts) == 7
    refused = sum(outcomes.get("refused", 0) for outcomes in found["outcomes"].values())
    assert CASES // 2 < refused < CASES
